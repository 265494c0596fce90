"""A state of a run's loop, written as a checkpoint's and resumed from: what tests of it share."""

import copy
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy
import pytest

from megatron_fipo import loop_state
from megatron_fipo.errors import FipoError
from megatron_fipo.loop_state import LoopState
from megatron_fipo.records.sample import Group, RewardResult, sample_from_lists
from megatron_fipo.records.segments import segments_around
from megatron_fipo.rollout import snapshot
from megatron_fipo.rollout.training_rollouts import TrainingRollouts

STEP, VOCABULARY = 3, 38
SAMPLES = "rollout/samples-00000.safetensors"


def group(run: TrainingRollouts, number: int) -> Group:
    """A group as sampling and judging leave it; its log-probs are fp32, as an engine's."""
    drawn = random.Random(number)
    samples, results = [], []
    for length in (1, drawn.randint(2, 9)):
        token_ids = [drawn.randrange(VOCABULARY) for _ in range(length)]
        log_probs = numpy.float32([-drawn.random() for _ in range(length)]).tolist()
        sample = sample_from_lists(token_ids, log_probs, "stop", STEP - 1)
        segments = segments_around([(1, length - 1)] if length > 3 else [], length, "made")
        text = run.tokenizer.decode(token_ids) + "é"
        samples.append(dataclasses.replace(sample, text=text, segments=segments))
        extra: dict[str, float | str] = {"steps": 2.0, "why": "é"} if length > 1 else {}
        results.append(RewardResult(float(length > 1), drawn.random(), "é7", "judged", extra))
    return Group(run.problems[number], tuple(samples)).with_results(results)


def write(directory: Path, state: LoopState) -> None:
    directory.mkdir(parents=True)
    content = loop_state.content(state.step, state.seconds, state.results)
    (directory / "trainer.json").write_text(json.dumps(content | {"megatron_core": "0.16.1"}))
    snapshot.encode(state.rollout).write(directory)


def resume(run: TrainingRollouts, directory: Path) -> LoopState:
    return loop_state.resume(directory, STEP, run)


def refusal(run: TrainingRollouts, directory: Path) -> str:
    """What is said instead of going on: one line of the project's own."""
    with pytest.raises(FipoError) as refused:
        resume(run, directory)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def changed(content: Any, key: str, value: Any) -> Any:
    """A copy with another value at a key such as tickets.0.state."""
    content = copy.deepcopy(content)
    *parents, last = key.split(".")
    place = content
    for name in parents:
        place = place[int(name) if name.isdigit() else name]
    place[last] = value
    return content


def of_one_turn(group: Group) -> Group:
    """The same tokens, all of them the policy's."""
    samples = tuple(dataclasses.replace(sample, segments=()) for sample in group.samples)
    return dataclasses.replace(group, samples=samples)
