"""Why: runs go on from checkpoints that an older version wrote; half of one would show nowhere but in what they learn.

The two forms from before there was a ledger, and damage to them. Today's is test_loop_state.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec import to_builtins
from safetensors.numpy import save_file

from megatron_fipo.loop_state import LoopState
from megatron_fipo.records.sample import Group
from megatron_fipo.rollout import saved_groups
from megatron_fipo.rollout.ledger import Ends, StepCounts
from megatron_fipo.rollout.seeds import request_seed
from megatron_fipo.rollout.training_rollouts import TrainingRollouts
from tests.loop_state.states import STEP, VOCABULARY, changed, of_one_turn, refusal, resume, write

pytestmark = pytest.mark.slow


def test_the_formats_of_before_are_read(run: TrainingRollouts, before: LoopState, tmp_path: Path) -> None:
    """They have no numbers of tickets: the groups get the last ones. At first they had no fingerprint either."""
    groups = list(before.rollout.collected.groups.values())
    for form in ("arrays", "json"):
        directory = old(before, form, tmp_path / form / "step-000003")
        state = resume(run, directory)
        assert (state.step, state.seconds, state.results) == (before.step, before.seconds, before.results)
        assert state.rollout.data == before.rollout.data and run.snapshot() == state.rollout
        assert state.rollout.collected.order == before.rollout.collected.order
        expected = groups if form == "arrays" else [of_one_turn(each) for each in groups]
        assert list(state.rollout.collected.groups.items()) == list(zip((6, 7, 8), expected, strict=True))
        ledger = state.rollout.collected.ledger
        assert (ledger.next_number, ledger.ends, ledger.step) == (9, Ends(unknown=6), StepCounts(carried_in=3))
        assert [ticket.seed for ticket, _ in ledger.tickets] == [request_seed(0, "train", n) for n in (6, 7, 8)]
        write(tmp_path / form / "again" / "step-000003", state)
        assert resume(run, tmp_path / form / "again" / "step-000003") == state
        content = json.loads((directory / "trainer.json").read_text())
        content["experience"]["drawn"] = 2
        (directory / "trainer.json").write_text(json.dumps(content))
        assert "experience.drawn is 2, and 3 groups were carried over" in refusal(run, directory)
    content["experience"]["drawn"] = 9
    del content["experience"]["data"]
    (directory / "trainer.json").write_text(json.dumps(content))
    assert resume(run, directory).rollout.data is None
    assert run.snapshot() == state.rollout, "with the present data's fingerprint"


def test_damage_to_the_formats_of_before_is_refused(run: TrainingRollouts, before: LoopState, tmp_path: Path) -> None:
    directory = old(before, "json", tmp_path / "json" / "step-000003")
    content = json.loads((directory / "trainer.json").read_text())
    response = content["experience"]["sampling"]["kept"][1]["responses"][0]
    for key, value, words in (
        ("token_ids", [VOCABULARY], "is 38 at"),
        ("token_ids", [2**40], "cannot be read"),
        ("token_ids", [1, 2], "2 token_ids, 1 rollout_log_probs"),
        ("token_ids", "x", "kept[1].responses[0].token_ids"),
        ("log_probs", [1e300], "is inf at"),
        ("weight_version", 9, "kept[1].responses[0].weight_version is 9"),
    ):
        right = response[key]
        response[key] = value
        (directory / "trainer.json").write_text(json.dumps(content))
        assert words in refusal(run, directory) and "trainer.json" in refusal(run, directory)
        response[key] = right
    directory = old(before, "arrays", tmp_path / "arrays" / "step-000003")
    whole = json.loads((directory / "trainer.json").read_text())
    for key, value, words in (
        ("experience.data", None, "Expected `object`, got `null` - at `$.experience.data`"),
        ("experience.data.count", 5, "experience.data.count is 5, and should be order.size beside it, 4000"),
        ("experience.kept.1.responses.1.weight_version", 4, "experience.kept[1].responses[1].weight_version is 4"),
        ("experience.order.position", 4001, "experience.order.position is 4001, and should be at most order.size"),
        ("experience.kept.2.responses.0.tokens", 2, "trainer.safetensors: response_token_ids is I32 of shape"),
        ("step", 4, "step is 4, and should be 3 in step-000003"),
        ("x", 4, "unknown field `x`"),
    ):
        (directory / "trainer.json").write_text(json.dumps(changed(whole, key, value)))
        assert words in refusal(run, directory)
    (directory / "trainer.json").write_text(json.dumps(whole))
    (directory / "trainer.safetensors").unlink()
    assert f"{directory / 'trainer.safetensors'} cannot be read" in refusal(run, directory)


def old(state: LoopState, form: str, directory: Path) -> Path:
    """The state as it was written before there were tickets, with arrays beside the JSON or not."""
    directory.mkdir(parents=True)
    collected = state.rollout.collected
    experience = {
        "order": to_builtins(collected.order),
        "drawn": collected.ledger.next_number,
        "data": to_builtins(state.rollout.data),
    }
    content = {"step": STEP, "seconds": 1.5, "results": state.results, "megatron_core": "0.16.1"}
    groups = list(collected.groups.values())
    if form == "arrays":
        rows, arrays = saved_groups.pack(groups)
        save_file(arrays, directory / "trainer.safetensors")
        content |= {"format": 2, "experience": experience | {"kept": to_builtins(rows)}}
    else:
        kept = [old_group(each) for each in groups]
        content["experience"] = experience | {"sampling": {"kept": kept, "counts": {"carried_in": 3}}}
    (directory / "trainer.json").write_text(json.dumps(content))
    return directory


def old_group(group: Group) -> dict[str, Any]:
    """As it was when all was JSON."""
    return {
        "problem": vars(group.problem) | {"token_ids": group.problem.token_ids.tolist()},
        "responses": [
            {
                "token_ids": each.token_ids.tolist(),
                "log_probs": each.streams["rollout_log_probs"].tolist(),
                "finish_reason": each.finish_reason,
                "weight_version": each.weight_version,
            }
            for each in group.samples
        ],
        "judgements": [vars(result) for result in group.results],
        "text": [each.text for each in group.samples],
    }
