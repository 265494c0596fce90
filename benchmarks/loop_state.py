"""Measure size and time of the loop's state in a checkpoint, with groups carried over: as arrays and JSON, and as JSON.

python -m benchmarks.loop_state
"""

import json
import random
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy

from benchmarks.measure import machine, once
from megatron_fipo import loop_state
from megatron_fipo.data.fingerprint import Fingerprint
from megatron_fipo.data.order import OrderState
from megatron_fipo.files import write_json_atomically
from megatron_fipo.loop_state import LoopState
from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.records.sample import Group, RewardResult, sample_from_lists
from megatron_fipo.rollout import snapshot
from megatron_fipo.rollout.collector import CollectorState
from megatron_fipo.rollout.ledger import Ends, LedgerState, State, StepCounts, Ticket
from megatron_fipo.rollout.snapshot import RolloutState

SAMPLES, LENGTH, PROMPT, VOCABULARY = 16, 2000, 200, 152_064
FEW, MANY = 32, 512
"""Numbers of groups. JSON is measured with few, since it takes minutes and gigabytes."""


def groups(count: int) -> list[Group]:
    """Return random groups whose text has four bytes per token, as in English."""
    drawn = numpy.random.default_rng(0)
    text = "".join(random.Random(0).choices("abcdefgh ", k=4 * LENGTH))
    made = []
    for number in range(count):
        prompt = drawn.integers(VOCABULARY, size=PROMPT).tolist()
        problem, samples = Problem(f"{number:016x}", text[: 4 * PROMPT], prompt_ids(prompt), "7", "math_dapo"), []
        for _ in range(SAMPLES):
            token_ids = drawn.integers(VOCABULARY, size=LENGTH).tolist()
            log_probs = (-drawn.exponential(size=LENGTH)).astype(numpy.float32).tolist()
            samples.append(sample_from_lists(token_ids, log_probs, "stop", 1))
        group = Group(problem, tuple(samples)).with_texts([text] * SAMPLES)
        made.append(group.with_results([RewardResult(1.0, 1.0, "7", "judged")] * SAMPLES))
    return made


def plain_json(kept: list[Group], directory: Path) -> dict[str, float]:
    """Write and read everything as JSON, as in older checkpoints."""
    path = directory / "plain.json"
    plain = [_plain(group) for group in kept]
    wrote = once(lambda: write_json_atomically(path, {"experience": {"sampling": {"kept": plain}}}))
    read = once(lambda: json.loads(path.read_text()))
    return {"bytes": path.stat().st_size, "write": wrote, "read": read}


def _plain(group: Group) -> dict[str, Any]:
    """Return the group in the form of older checkpoints."""
    streams = [{name: values.tolist() for name, values in sample.streams.items()} for sample in group.samples]
    return {
        "problem": vars(group.problem) | {"token_ids": group.problem.token_ids.tolist()},
        "responses": [
            {
                "token_ids": values["token_ids"],
                "log_probs": values["rollout_log_probs"],
                "finish_reason": sample.finish_reason,
                "weight_version": sample.weight_version,
            }
            for sample, values in zip(group.samples, streams, strict=True)
        ],
        "judgements": [asdict(result) for result in group.results],
        "text": [sample.text for sample in group.samples],
    }


def arrays(kept: list[Group], directory: Path) -> dict[str, float]:
    """Write and read arrays and JSON, as in checkpoints now."""
    order = OrderState(epoch=0, position=0, size=1, seed=0, shuffle=True)
    tickets = tuple((Ticket(number, group.problem.id, 0, 0, 1), State.READY) for number, group in enumerate(kept))
    ledger = LedgerState(len(kept), Ends(), StepCounts(carried_in=len(kept)), tickets)
    collected = CollectorState(order, ledger, dict(enumerate(kept)))
    rollout = RolloutState(collected, Fingerprint(1, "0" * 32, "0" * 32))
    state = LoopState(step=1, seconds=0.0, results={}, rollout=rollout)

    def write() -> None:
        content = loop_state.content(state.step, state.seconds, state.results)
        write_json_atomically(directory / "trainer.json", content | {"megatron_core": "0.16.1"})
        snapshot.encode(state.rollout).write(directory)

    wrote = once(write)
    found: list[Any] = []
    read = once(lambda: found.append(loop_state.read(directory, step=1, vocab_size=VOCABULARY)))
    assert found == [state], "a round trip changes nothing"
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return {"bytes": size, "write": wrote, "read": read}


def main() -> None:
    """Print the table in Markdown."""
    print(f"{machine()}; {SAMPLES} samples per group, {LENGTH} tokens per sample\n")
    print("| groups | form | MB | bytes per token | write, s | read, s |")
    print("|---|---|---|---|---|---|")
    for count, name, form in ((FEW, "JSON", plain_json), (FEW, "arrays", arrays), (MANY, "arrays", arrays)):
        with tempfile.TemporaryDirectory() as directory:
            kept = groups(count)
            row = form(kept, Path(directory))
        tokens = count * (SAMPLES * LENGTH + PROMPT)
        print(
            f"| {count} | {name} | {row['bytes'] / 1e6:.0f} | {row['bytes'] / tokens:.1f} "
            f"| {row['write']:.2f} | {row['read']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
