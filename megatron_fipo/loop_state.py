"""What a run's loop needs to go on where it stood, beside the weights: records, and their place in a checkpoint.

A small JSON file, in which what follows from tokens is left out, and a safetensors file with that. Both are held to
types, ranges and to each other when they are read: whatever is wrong is refused in one line that names file and place.
"""

from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from megatron_fipo import carried_groups
from megatron_fipo.carried_groups import Arrays, GroupRow
from megatron_fipo.data.fingerprint import Fingerprint
from megatron_fipo.data.order import OrderState
from megatron_fipo.errors import DataError
from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.records.sample import Group, RewardResult, sample_from_lists

_G = TypeVar("_G")
_T = TypeVar("_T")
_Count = Annotated[int, Meta(ge=0, le=2**62)]
_FORMAT = 2
RESULTS = [f"{what}_{when}" for what in ("accuracy", "response_length") for when in ("before", "after")]
"""What validations so far have told."""


class ExperienceState(Struct, Generic[_G], frozen=True, forbid_unknown_fields=True):
    """Rank 0's side of a run between two steps. `_G` is Group, and GroupRow in a file."""

    order: OrderState
    drawn: _Count
    """Prompts that have been sampled, which seeds follow from."""
    kept: list[_G]
    """Groups carried over to the next step."""
    data: Fingerprint | None
    """None in checkpoints from before it was kept."""


class LoopState(Struct, Generic[_G], frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A run after a step."""

    step: _Count
    seconds: Annotated[float, Meta(ge=0, le=1e12)]
    """Of training, without the start of processes and servers."""
    results: dict[Annotated[str, Meta(pattern=r"^(accuracy|response_length)_(before|after)\Z")], float | None]
    """Of validations so far; None where nothing could be judged."""
    experience: ExperienceState[_G]


class _Saved(LoopState[_G], Generic[_G], frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What stands in the JSON file."""

    format: Literal[2]
    megatron_core: str
    """The version that wrote the checkpoint: policy/checkpoint.py notes and judges it."""


def encode(state: LoopState[Group]) -> tuple[dict[str, Any], Arrays]:
    """What to write: JSON-ready state, and arrays.

    Raises:
        DataError: a number is not finite, or a group's parts do not belong together.
    """
    experience = state.experience
    try:
        rows, arrays = carried_groups.pack(experience.kept)
    except (ValueError, OverflowError) as error:
        raise DataError(f"a group that is carried over cannot be saved: {error}") from None
    saved = msgspec.structs.replace(state, experience=msgspec.structs.replace(experience, kept=rows))
    return {"format": _FORMAT} | msgspec.to_builtins(saved), arrays


def read(json_file: Path, arrays_file: Path, *, step: int, vocab_size: int) -> LoopState[Group]:
    """What `encode` gave, from where it was written.

    Args:
        step: the checkpoint's.
        vocab_size: the model's.

    Raises:
        DataError: a file is damaged, or holds what cannot be. One line, with file and key or tensor.
    """
    saved: LoopState[Any]
    try:
        data = json_file.read_bytes()
        if "format" in msgspec.json.decode(data, type=dict[str, msgspec.Raw]) or arrays_file.exists():
            saved = _decode(data, _Saved[GroupRow], json_file)
            if saved.experience.data is None:
                raise DataError(f"{json_file}: experience.data is null, and should be the fingerprint of the data")
            rows, path = saved.experience.kept, arrays_file
            arrays = carried_groups.read(arrays_file, rows, described_by=json_file)
        else:
            saved, path = _read_old(data, json_file), json_file
            rows, arrays = carried_groups.pack(saved.experience.kept)
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{json_file} cannot be read: {error}") from None
    carried_groups.check(arrays, path, vocab_size)
    _check(saved, rows, step, json_file)
    kept = carried_groups.unpack(rows, arrays, path)
    experience = msgspec.structs.replace(saved.experience, kept=kept)
    return LoopState(step=saved.step, seconds=saved.seconds, results=saved.results, experience=experience)


def _decode(data: bytes, kind: type[_T], path: Path) -> _T:
    """JSON of a type. DataError, with the file and the key, for anything else."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise DataError(f"{path}: {error}") from None


def _check(state: LoopState[Any], rows: list[GroupRow], step: int, path: Path) -> None:
    """What types do not say."""
    experience = state.experience
    if state.step != step:
        raise DataError(f"{path}: step is {state.step}, and should be {step} in {path.parent.name}")
    if experience.data is not None and experience.data.count != experience.order.size:
        raise DataError(
            f"{path}: experience.data.count is {experience.data.count}, and should be experience.order.size, "
            f"{experience.order.size}"
        )
    for number, row in enumerate(rows):
        for place, response in enumerate(row.responses):
            if response.weight_version > step:
                raise DataError(
                    f"{path}: experience.kept[{number}].responses[{place}].weight_version is "
                    f"{response.weight_version}, and should be at most the step, {step}"
                )


class _OldResponse(Struct):
    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str
    weight_version: int


class _OldProblem(Struct):
    id: str
    text: str
    token_ids: list[int]
    ground_truth: str
    data_source: str
    extra: dict[str, Any] = {}
    columns: str = "{}"


class _OldGroup(Struct):
    problem: _OldProblem
    responses: list[_OldResponse]
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


class _OldSampling(Struct):
    kept: list[_OldGroup]


class _OldExperience(Struct):
    order: OrderState
    drawn: _Count
    sampling: _OldSampling
    data: Fingerprint | None = None


class _OldState(Struct):
    step: _Count
    seconds: float
    results: dict[str, float | None]
    experience: _OldExperience


def _read_old(data: bytes, path: Path) -> LoopState[Group]:
    """The state in checkpoints from before arrays had a file of their own: all of it is JSON."""
    old = _decode(data, _OldState, path)
    experience = ExperienceState(
        order=old.experience.order,
        drawn=old.experience.drawn,
        kept=[group.today() for group in old.experience.sampling.kept],
        data=old.experience.data,
    )
    return LoopState(step=old.step, seconds=old.seconds, results=old.results, experience=experience)
