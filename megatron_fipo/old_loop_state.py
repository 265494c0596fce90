"""The loop's state in checkpoints from before the ledger of tickets: read, and no longer written.

Two forms. Format 2 has trainer.json, and trainer.safetensors with what is as long as tokens. Before, all was JSON. Both
say how many prompts were drawn and which groups were carried over, but not which numbers these groups had: they get the
last ones, and all others have ended in a way that is unknown.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta, Struct

from megatron_fipo.data.fingerprint import Fingerprint
from megatron_fipo.data.order import OrderState
from megatron_fipo.errors import DataError
from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.records.sample import Group, RewardResult, sample_from_lists
from megatron_fipo.rollout import saved_groups
from megatron_fipo.rollout.collector import CollectorState
from megatron_fipo.rollout.ledger import Count, Ends, LedgerState, State, StepCounts, Ticket
from megatron_fipo.rollout.saved_groups import GroupRow, Saved
from megatron_fipo.rollout.seeds import request_seed
from megatron_fipo.rollout.snapshot import RolloutState, check_data, check_versions

FORMAT = 2
_ARRAYS_FILE = "trainer.safetensors"
_T = TypeVar("_T")


class OldState(NamedTuple):
    """A run after a step."""

    step: int
    seconds: float
    results: dict[str, float | None]
    rollout: RolloutState


class _Experience(Struct, frozen=True, forbid_unknown_fields=True):
    order: OrderState
    drawn: Count
    """Prompts that have been sampled."""
    kept: list[GroupRow]
    data: Fingerprint


class _Saved(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: Literal[2]
    megatron_core: str
    step: Count
    seconds: Annotated[float, Meta(ge=0, le=1e12)]
    results: dict[Annotated[str, Meta(pattern=r"^(accuracy|response_length)_(before|after)\Z")], float | None]
    experience: _Experience


class _JsonResponse(Struct):
    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str
    weight_version: int


class _JsonProblem(Struct):
    id: str
    text: str
    token_ids: list[int]
    ground_truth: str
    data_source: str
    extra: dict[str, Any] = {}
    columns: str = "{}"


class _JsonGroup(Struct):
    problem: _JsonProblem
    responses: list[_JsonResponse]
    judgements: list[RewardResult]
    text: list[str]

    def today(self) -> Group:
        """The same as it is now."""
        problem = Problem(**{**msgspec.structs.asdict(self.problem), "token_ids": prompt_ids(self.problem.token_ids)})
        samples = [
            sample_from_lists(old.token_ids, old.log_probs, old.finish_reason, old.weight_version)
            for old in self.responses
        ]
        return Group(problem, tuple(samples)).with_texts(self.text).with_results(self.judgements)


class _JsonSampling(Struct):
    kept: list[_JsonGroup]


class _JsonExperience(Struct):
    order: OrderState
    drawn: Count
    sampling: _JsonSampling
    data: Fingerprint | None = None


class _JsonState(Struct):
    step: Count
    seconds: float
    results: dict[str, float | None]
    experience: _JsonExperience


def read(path: Path, content: bytes, step: int, vocab_size: int) -> OldState:
    """The state in the checkpoint whose trainer.json, at `path`, has this content.

    Args:
        step: the checkpoint's.
        vocab_size: the model's.

    Raises:
        DataError: a file is damaged, or holds what cannot be. One line, with file and key or tensor.
    """
    arrays_file = path.with_name(_ARRAYS_FILE)
    saved: _Saved | _JsonState
    data: Fingerprint | None
    try:
        if "format" in msgspec.json.decode(content, type=dict[str, msgspec.Raw]) or arrays_file.exists():
            saved = _decode(content, _Saved, path)
            rows, data, place = saved.experience.kept, saved.experience.data, arrays_file
            arrays = saved_groups.read(arrays_file, rows, described_by=path)
        else:
            saved, place = _decode(content, _JsonState, path), path
            data = saved.experience.data
            kept = [old.today() for old in saved.experience.sampling.kept]
            rows, arrays = saved_groups.pack([Saved(group.problem, group.samples) for group in kept])
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    saved_groups.check(arrays, place, vocab_size)
    experience = saved.experience
    if saved.step != step:
        raise DataError(f"{path}: step is {saved.step}, and should be {step} in {path.parent.name}")
    check_data(data, experience.order, f"{path}: experience.")
    for number, row in enumerate(rows):
        check_versions(row, step, f"{path}: experience.kept[{number}]")
    if experience.drawn < len(rows):
        raise DataError(f"{path}: experience.drawn is {experience.drawn}, and {len(rows)} groups were carried over")
    groups = [group.whole() for group in saved_groups.unpack(rows, arrays, place)]
    return OldState(
        saved.step, saved.seconds, saved.results, _rollout(experience.order, experience.drawn, data, groups)
    )


def _rollout(order: OrderState, drawn: int, data: Fingerprint | None, groups: list[Group]) -> RolloutState:
    """The same as it is now."""
    by_number = dict(enumerate(groups, start=drawn - len(groups)))
    tickets = tuple(
        (
            Ticket(
                number=number,
                problem=group.problem.id,
                seed=request_seed(order.seed, "train", number),
                attempt=0,
                start_version=min(sample.weight_version for sample in group.samples),
            ),
            State.READY,
        )
        for number, group in by_number.items()
    )
    ledger = LedgerState(drawn, Ends(unknown=drawn - len(groups)), StepCounts(carried_in=len(groups)), tickets)
    return RolloutState(CollectorState(order, ledger, by_number), data)


def _decode(content: bytes, kind: type[_T], path: Path) -> _T:
    """JSON of a type. DataError, with the file and the key, for anything else."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise DataError(f"{path}: {error}") from None
