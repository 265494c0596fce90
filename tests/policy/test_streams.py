"""Why: a per-token array that is shifted, padded or cut a token off still trains, and no metric shows it.

A stream that counts its own positions goes the whole way, from a sample through sharing and the micro-batches to every
stage and the loss, under all kinds of parallelism at once, and again from groups that a checkpoint had. So nothing but
its line in the table, its producer and its reader is needed for another one. The same processes show that a step whose
first update gives its own old log-probs is the same to the last bit as one with a pass for them. The engine's side is
in tests/rollout/test_answers.py; FP8, whose scales depend on how many passes there were, is not covered.
"""

import dataclasses
from typing import Any

import numpy
import pytest
import torch

from megatron_fipo.policy.feed import Feed
from megatron_fipo.policy.micro_batch import BatchLayout
from megatron_fipo.records import streams
from megatron_fipo.rollout.offers import train_batch
from megatron_fipo.rollout.store import SampleStore
from tests.distributed import run_ranks
from tests.policy.stream_ranks import COUNTING, EACH, FILL, GROUPS, SAMPLES, VOCABULARY, lengths, make_groups, told

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """By rank, and padded or packed, what `both` returns."""
    folder = str(tmp_path_factory.mktemp("streams"))
    arguments = {"folder": folder, "parallel": {"tensor": 2, "pipeline": 2, "context": 2, "sequence": True}}
    return run_ranks("tests.policy.stream_ranks:both", 8, arguments, timeout=300)


def expected(place: int, align: str, slots: int) -> dict[int, int]:
    """The value at each position of a sequence that takes up so many slots, padding included."""
    prompt, response = lengths(place)
    shift = 1 if align == "label" else 0
    tokens = {position: position + shift for position in range(prompt + response - 1)}
    counted = {position: EACH * place + token for position, token in tokens.items() if token >= prompt}
    return {position: counted.get(position, FILL) for position in range(slots)}


def joined(parts: list[list[list[int]]]) -> dict[int, int]:
    """The positions of context-parallel ranks together, none of them twice."""
    pairs = [tuple(pair) for part in parts for pair in part]
    assert len({position for position, _ in pairs}) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize("source", ["sampled", "resumed"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_stream_arrives_whole_on_every_stage_that_reads_it(
    ranks: list[list[dict[str, Any]]], packed: bool, source: str
) -> None:
    results = [rank[packed] for rank in ranks]
    for stream in COUNTING:
        for stage in range(2):
            for tensor in range(2):
                held = [r["seen"][source] for r in results if (r["stage"], r["tensor"]) == (stage, tensor)]
                if not stream.is_read_on({"first"} if stage == 0 else {"last"}):
                    assert not any(stream.name in each for each in held), "the other stage does not make it"
                    continue
                for place in range(GROUPS * SAMPLES):
                    found = joined([each[stream.name][str(place)] for each in held])
                    assert found == expected(place, stream.align, len(found)), (stream, stage, tensor, place)
                    assert len(found) >= sum(lengths(place)) - 1
                    other = {"token": "label", "label": "token"}[stream.align]
                    assert found != expected(place, other, len(found)), "the control: one off would be seen"


def test_every_rank_knows_what_the_policy_was_told(ranks: list[list[dict[str, Any]]]) -> None:
    """As it was sampled, and from a checkpoint's groups."""
    right = [
        [place, lengths(place)[0] + start, lengths(place)[0] + end]
        for place in range(GROUPS * SAMPLES)
        for start, end in told(place)
    ]
    assert len(right) > 6
    assert all(found["told"] == [right, right] for rank in ranks for found in rank)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_first_update_gives_the_old_log_probs_of_a_pass_of_its_own(
    ranks: list[list[dict[str, Any]]], packed: bool
) -> None:
    """Losses, gradient norms, agreement and weights, bit for bit; with a reference's KL where rows are padded."""
    for rank in ranks:
        steps = rank[packed]["steps"]
        assert steps["own"] == steps["apart"] and not steps["own"]["unchanged"]
        assert steps["parts"] == steps["own"], "scored while the others were still sampled"
        metrics = steps["own"]["metrics"]
        assert metrics["updates"] == 3 and metrics["ppo_kl_first"] == 0.0 and metrics["ppo_kl"] != 0.0
        assert metrics["log_prob_diff_mean"] > 0.1 and "log_prob_diff_quarter_4" in metrics
        assert ("reference_kl" in metrics) == (not packed)
        assert steps["own"]["said"], "the comparison is judged where it only warns too"
        wrong = steps["own for all"]
        assert wrong["metrics"]["ppo_kl"] == 0.0 and wrong["weights"] != steps["apart"]["weights"], "the control"


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_what_ends_a_run_does_so_before_an_update(ranks: list[list[dict[str, Any]]], packed: bool) -> None:
    assert all(rank[packed]["steps"]["stopped"]["unchanged"] for rank in ranks)
    assert all(rank[packed]["steps"]["stopped"]["metrics"] == {} for rank in ranks)


def test_records_do_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STREAMS", (*streams.STREAMS, *COUNTING))
    group = make_groups()[0]
    sample = group.samples[0]
    store, algorithm = SampleStore(), dataclasses.replace(_algorithm(), mini_batch_prompts=1)
    batch = train_batch([group], algorithm, store, step=1, weight_version=0)
    feed = Feed(BatchLayout(packed=True, pad_multiple=1), VOCABULARY, torch.device("cpu"))
    found = feed.fetch(batch, [[[0, 1]]], store)
    assert isinstance(found, list), found
    ((micro_batch,),) = found
    records = (group.problem, "text"), (group, "samples"), (sample, "result"), (batch, "rows")
    for record, name in (*records, (micro_batch, "streams"), (sample.result, "reward")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, None)
    with pytest.raises(TypeError):
        sample.streams["token_ids"] = numpy.zeros(1)  # type: ignore[index]
    for array in (*sample.streams.values(), group.problem.token_ids, batch.rows["advantage"]):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    old = torch.zeros(micro_batch.position_ids.shape)
    assert micro_batch.with_stream("old_log_probs", old).streams["old_log_probs"] is old
    assert "old_log_probs" not in micro_batch.streams
    with pytest.raises(ValueError, match="no stream of the trainer's"):
        micro_batch.with_stream("rollout_log_probs", old)
    with pytest.raises(ValueError, match=r"old_log_probs has the shape \[1, 2\]"):
        micro_batch.with_stream("old_log_probs", old[:, :2])


def _algorithm() -> Any:
    from megatron_fipo.config import AlgorithmConfig

    return AlgorithmConfig()
