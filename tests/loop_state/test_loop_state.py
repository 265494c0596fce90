"""Why: a resume that goes on from half a state, or from another one, shows nowhere but in what the run learns.

The state of rollouts of the embedded problems, written and read as a checkpoint's, and damaged ones. Random damage is
test_damage.py, older formats are test_old_formats.py. Whole runs that resume, and the ranks that hear of a refusal, are
tests/end_to_end; that a file is the one which was written (a digit that has become another digit) is not covered here.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from msgspec.structs import replace
from safetensors.numpy import load_file, save_file

from megatron_fipo.errors import DataError
from megatron_fipo.loop_state import LoopState
from megatron_fipo.rollout import snapshot
from megatron_fipo.rollout.collector import CollectorState
from megatron_fipo.rollout.ledger import Ends, StepCounts
from megatron_fipo.rollout.training_rollouts import TrainingRollouts
from tests.loop_state.states import SAMPLES, VOCABULARY, changed, group, of_one_turn, refusal, resume, write

pytestmark = pytest.mark.slow


def test_a_state_comes_back_bit_for_bit(run: TrainingRollouts, saved: Path, before: LoopState) -> None:
    assert resume(run, saved) == before
    assert run.snapshot() == before.rollout
    kept = [load_file(path) for path in sorted(saved.glob("rollout/*.safetensors"))]
    tokens = sum(len(each) for group in before.rollout.collected.groups.values() for each in group.samples)
    for name in ("response_token_ids", "response_log_probs"):
        assert sum(arrays[name].nbytes for arrays in kept) == 4 * tokens


def test_a_row_from_before_there_were_segments_is_one_action(
    run: TrainingRollouts, saved: Path, before: LoopState, tmp_path: Path
) -> None:
    directory = shutil.copytree(saved, tmp_path / saved.name)
    path = directory / "rollout/ledger.json"
    content = json.loads(path.read_text())
    rows = [row["group"] for row in content["tickets"] if row["group"]]
    told = [response.pop("told", []) for row in rows for response in row["responses"]]
    assert any(told), "the control"
    path.write_text(json.dumps(content))
    found, expected = (state.rollout.collected.groups for state in (resume(run, directory), before))
    assert found == {number: of_one_turn(each) for number, each in expected.items()}


def test_without_groups_there_is_no_file_of_samples(run: TrainingRollouts, before: LoopState, tmp_path: Path) -> None:
    collected = before.rollout.collected
    ledger = replace(collected.ledger, tickets=(), ends=Ends(trained=9), step=StepCounts())
    nothing = CollectorState(collected.order, ledger, {})
    empty = replace(before, rollout=replace(before.rollout, collected=nothing))
    write(tmp_path / "step-000003", empty)
    assert [path.name for path in tmp_path.glob("step-000003/rollout/*")] == ["ledger.json"]
    assert resume(run, tmp_path / "step-000003") == empty


LOOP_FAULTS: dict[str, tuple[str, Any, str]] = {
    "another step": ("step", 4, "step is 4, and should be 3 in step-000003"),
    "an unknown result": ("results.accurcy_before", 1.0, "^(accuracy|response_length)_(before|after)"),
    "a format of the future": ("format", 4, "Invalid enum value 4 - at `$.format`"),
    "no format": ("format", None, "got `null` - at `$.format`"),
    "the format of before": ("format", 2, "missing required field `experience`"),
    "more seconds than there were": ("seconds", 1e300, "`float` <= 1000000000000.0 - at `$.seconds`"),
}
LEDGER_FAULTS: dict[str, tuple[str, Any, str]] = {
    "position beyond the data": ("order.position", 4001, "order.position is 4001, and should be at most"),
    "negative position": ("order.position", -1, "`int` >= 0 - at `$.order.position`"),
    "position of another type": ("order.position", "5", "Expected `int`, got `str` - at `$.order.position"),
    "true as a number": ("next_number", True, "Expected `int`, got `bool` - at `$.next_number`"),
    "other data of equal size": ("data.problems", "0" * 32, "data: the problems have changed"),
    "no fingerprint": ("data", None, "Expected `object`, got `null` - at `$.data`"),
    "a garbled fingerprint": ("data.prompts", "x", "at `$.data.prompts`"),
    "two sizes": ("data.count", 5, "data.count is 5, and should be order.size beside it, 4000"),
    "another seed": ("order.seed", 1, "order.seed is 1, and this run's is 0"),
    "a prompt put back that is none": ("order.returned", [5, 4000], "order.returned has 4000, and should have numbers"),
    "an unknown key": ("order.x", 1, "unknown field `x` - at `$.order`"),
    "a ticket is lost": ("next_number", 10, "tickets: 10 tickets were opened, and 5 that have ended + 4 are known"),
    "a count is lost": ("ends.trained", 2, "tickets: 9 tickets were opened, and 4 that have ended + 4 are known"),
    "a step's count is lost": ("step.opened", 2, "tickets: of the 2 tickets that the step began with and the 2"),
    "a ticket twice": ("tickets.1.ticket.number", 4, "tickets: ticket 4 is there twice"),
    "a ticket that was never opened": ("tickets.3.ticket.number", 9, "tickets: ticket 9 is there, and only 9 were"),
    "tickets out of order": ("tickets.1.ticket.number", 2, "tickets[1].ticket.number is 2, and should be above 4"),
    "a state that is none": ("tickets.0.state", "taken", "Invalid enum value 'taken' - at `$.tickets[0].state`"),
    "a ticket without its group": (
        "tickets.0.group",
        None,
        "tickets[0].group should be a group, since the ticket is r",
    ),
    "a group too early": ("tickets.0.state", "open", "tickets[0].group should be null, since the ticket is open"),
    "another problem's group": ("tickets.0.ticket.problem", "x", "group.problem.id is '"),
    "a ticket of no problem": ("tickets.3.ticket.problem", "x", "ticket 8 is for the problem x, which the data lacks"),
    "a ticket of the future": ("tickets.3.ticket.start_version", 4, "tickets[3].ticket.start_version is 4"),
    "a file of samples too many": ("files", [2, 1, 1], "files has 4 groups, and should have 3 as tickets has"),
    "groups in other files": ("files", [1, 2], "prompt_token_ids is I32 of shape"),
    "more tokens than there are": ("tickets.2.group.responses.0.tokens", 2, "response_token_ids is I32 of shape"),
    "no response": ("tickets.0.group.responses", [], "length >= 1 - at `$.tickets[0].group.responses`"),
    "a future version": (
        "tickets.1.group.responses.1.weight_version",
        4,
        "tickets[1].group.responses[1].weight_version is 4",
    ),
    "a count beyond counting": ("next_number", 2**63, "<= 4611686018427387904 - at `$.next_number`"),
    "an epoch beyond counting": ("order.epoch", 2**63, "<= 4611686018427387904 - at `$.order.epoch"),
    "a reward that overflows": (
        "tickets.0.group.responses.0.reward",
        1e300,
        "$.tickets[0].group.responses[0].reward`",
    ),
    "context at the end": ("tickets.0.group.responses.0.told", [[0, 1]], "responses[0].told of problem "),
    "an outcome that is none": (
        "tickets.1.group.responses.1.outcome",
        "ok",
        "$.tickets[1].group.responses[1].outcome`",
    ),
}


@pytest.mark.parametrize("fault", [*LOOP_FAULTS, *LEDGER_FAULTS])
def test_a_fault_in_the_json_names_its_key(fault: str, run: TrainingRollouts, saved: Path, tmp_path: Path) -> None:
    key, value, words = (LOOP_FAULTS | LEDGER_FAULTS)[fault]
    directory = shutil.copytree(saved, tmp_path / saved.name)
    path = directory / ("trainer.json" if fault in LOOP_FAULTS else "rollout/ledger.json")
    path.write_text(json.dumps(changed(json.loads(path.read_text()), key, value)))
    said = refusal(run, directory)
    assert words in said
    assert str(directory / "rollout/samples-0000" if "of shape" in words else path) in said


ARRAY_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "one token less": (
        lambda arrays: arrays.update(response_token_ids=arrays["response_token_ids"][1:]),
        "response_token_ids is I32 of shape",
    ),
    "log-probs in fp64": (
        lambda arrays: arrays.update(response_log_probs=arrays["response_log_probs"].astype(numpy.float64)),
        "response_log_probs is F64 of shape",
    ),
    "two dimensions": (
        lambda arrays: arrays.update(response_text=arrays["response_text"][None]),
        "response_text is U8 of shape [1, ",
    ),
    "a tensor is lacking": (lambda arrays: arrays.pop("prompt_token_ids"), "and should have prompt_token_ids,"),
    "a tensor too many": (lambda arrays: arrays.update(x=arrays["response_text"]), "response_token_ids, x, and should"),
    "an unknown token": (
        lambda arrays: arrays["response_token_ids"].__setitem__(1, VOCABULARY),
        "response_token_ids is 38 at 1, and should be 0 to 37",
    ),
    "a negative token": (
        lambda arrays: arrays["prompt_token_ids"].__setitem__(0, -1),
        "prompt_token_ids is -1 at 0, and should be 0 to 37",
    ),
    "no number": (
        lambda arrays: arrays["response_log_probs"].__setitem__(2, numpy.nan),
        "response_log_probs is nan at 2, and should be a finite number",
    ),
    "no text": (lambda arrays: arrays["response_text"].__setitem__(0, 255), "response_text is not UTF-8 at 0"),
}


@pytest.mark.parametrize("fault", ARRAY_FAULTS)
def test_a_fault_in_the_arrays_names_its_tensor(fault: str, run: TrainingRollouts, saved: Path, tmp_path: Path) -> None:
    change, words = ARRAY_FAULTS[fault]
    directory = shutil.copytree(saved, tmp_path / saved.name)
    arrays = {name: array.copy() for name, array in load_file(saved / SAMPLES).items()}
    change(arrays)
    save_file(arrays, directory / SAMPLES)
    said = refusal(run, directory)
    assert words in said and str(directory / SAMPLES) in said


def test_a_file_of_samples_that_is_missing_is_named(run: TrainingRollouts, saved: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(saved, tmp_path / saved.name)
    missing = directory / "rollout" / "samples-00001.safetensors"
    missing.unlink()
    assert f"{missing} cannot be read" in refusal(run, directory)


def test_a_group_longer_than_the_configurations_limits_is_refused(
    run: TrainingRollouts, saved: Path, before: LoopState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or discarded, together with the tickets that wait to be sampled."""
    monkeypatch.setattr(run.config.rollout, "max_response_length", 1)
    assert "before rollout.max_response_length=1: resume with at least " in refusal(run, saved)
    monkeypatch.setattr(run.config.checkpoint, "in_flight", "discard")
    resume(run, saved)
    state = run.snapshot().collected
    assert (state.groups, state.ledger.tickets, state.order.returned) == ({}, (), (*drawn(run, before), 3, 1))
    assert state.ledger.ends.discarded == 4


def drawn(run: TrainingRollouts, before: LoopState) -> list[int]:
    """Places in the data of the problems of all tickets in a state."""
    places = {problem.id: place for place, problem in enumerate(run.problems)}
    return [places[ticket.problem] for ticket, _ in before.rollout.collected.ledger.tickets]


def test_what_cannot_be_saved_is_refused_before_anything_is_written(run: TrainingRollouts, before: LoopState) -> None:
    for attribute, value in (("reward", float("nan")), ("accuracy", float("inf"))):
        whole = group(run, 4)
        first, *others = whole.results
        broken = whole.with_results([dataclasses.replace(first, **{attribute: value}), *others])
        collected = replace(before.rollout.collected, groups={**before.rollout.collected.groups, 4: broken})
        with pytest.raises(DataError, match=f"{broken.problem.id} has accuracy .*; finite numbers can be saved"):
            snapshot.encode(replace(before.rollout, collected=collected))
