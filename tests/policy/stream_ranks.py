"""What the ranks of test_streams.py run: batches with a stream of its own, and a step's updates by both ways."""

import contextlib
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.numpy import save_file

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config.agreement import Limits
from megatron_fipo.errors import FipoError
from megatron_fipo.policy import platform
from megatron_fipo.records import streams
from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.records.sample import Group, RewardResult, Sample
from megatron_fipo.records.segments import segments_around
from megatron_fipo.rollout import saved_groups

platform.install()

from megatron.core import parallel_state  # noqa: E402

from megatron_fipo.models.model_config import read_architecture  # noqa: E402
from megatron_fipo.policy.agreement import AgreementCheck  # noqa: E402
from megatron_fipo.policy.feed import FetchFailed, feed_of  # noqa: E402
from megatron_fipo.policy.micro_batch import MicroBatch, MiniBatch  # noqa: E402
from megatron_fipo.policy.model import start_model_parallel  # noqa: E402
from megatron_fipo.policy.step import StepData, score_part, train_step  # noqa: E402
from megatron_fipo.policy.train_batch import share  # noqa: E402
from megatron_fipo.policy.update import Policy  # noqa: E402
from megatron_fipo.records.rows import TrainBatch  # noqa: E402
from megatron_fipo.rollout.offers import Offers  # noqa: E402
from megatron_fipo.tracking.updates import over_updates  # noqa: E402
from tests.policy.layouts import UNCLIPPED, make_config  # noqa: E402

MODEL = resolve_embedded("embedded:tiny")
VOCABULARY, SAMPLES, GROUPS = 38, 3, 6
FILL, EACH = -1, 1000
COUNTING = tuple(
    streams.Stream(f"count_{align}_{stages}", "int32", align=align, fill=FILL, stages=stages)
    for align, stages in (("token", "all"), ("label", "all"), ("token", "first"), ("label", "last"))
)
"""Streams that count: their value is EACH × the sample's place in the batch + the token's in prompt and response."""


def lengths(place: int) -> tuple[int, int]:
    """Tokens of prompt and response of the sample at a place in the batch."""
    return 3 + place // SAMPLES, 2 + 5 * place % 23


def told(place: int) -> list[tuple[int, int]]:
    """What the policy did not produce of the response at a place in the batch: of every second one, if it is long."""
    return [(1, 3), (5, 6)] if place % 2 and lengths(place)[1] > 6 else []


def make_groups() -> list[Group]:
    """Judged groups whose samples come with the counting streams."""
    drawn, groups = numpy.random.default_rng(0), []
    for number in range(GROUPS):
        samples = []
        for place in range(number * SAMPLES, (number + 1) * SAMPLES):
            prompt, response = lengths(place)
            count = numpy.arange(prompt, prompt + response, dtype=numpy.int32) + numpy.int32(EACH * place)
            given = {stream.name: count for stream in COUNTING}
            given["token_ids"] = drawn.integers(VOCABULARY, size=response, dtype=numpy.int32)
            given["rollout_log_probs"] = -drawn.exponential(size=response).astype(numpy.float32)
            result = RewardResult(float(place % 2), drawn.standard_normal(), "7", "judged")
            segments = segments_around(told(place), response, "made")
            samples.append(Sample(streams.checked(given, "made"), "stop", 0, "text", result, segments))
        ids = prompt_ids(drawn.integers(VOCABULARY, size=lengths(number * SAMPLES)[0]))
        groups.append(Group(Problem(str(number), "", ids, "7", "test"), tuple(samples)))
    return groups


def from_checkpoint(groups: list[Group], folder: str) -> list[Group]:
    """The groups as a resumed run has them."""
    rows, arrays = saved_groups.pack(groups)
    path = Path(folder) / "trainer.safetensors"
    save_file(arrays, path)
    restored = saved_groups.read(path, rows, described_by=path)
    saved_groups.check(restored, path, VOCABULARY)
    return [saved.whole() for saved in saved_groups.unpack(rows, restored, path)]


def both(folder: str, parallel: dict[str, Any]) -> list[dict[str, Any]]:
    """Padded and packed: what this rank saw of the counting streams, and what steps by either way gave."""
    platform.start_process_group(120)
    found = []
    plain = streams.STREAMS
    for packing, algorithm in ((False, "dapo_with_reference_kl"), (True, "fipo")):
        streams.STREAMS = (*plain, *COUNTING)
        layout = {**parallel, "packing": packing}
        config = make_config(layout, UNCLIPPED, algorithm)
        config = dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, mini_batch_prompts=2))
        start_model_parallel(config.parallel, 0)
        first = torch.distributed.get_rank() == 0
        groups = make_groups() if first else []
        offers = Offers(config.algorithm, warn=print) if first else None
        batches = []
        for each in (groups, from_checkpoint(groups, folder) if first else []):
            batches.append(share(offers.offer(each, step=1, weight_version=0) if offers else None))
        policy = Policy(config, read_architecture(MODEL), str(MODEL), updates=10)
        stretches = [batch.told.tolist() for batch in batches]
        seen = {name: _seen(policy, batch) for name, batch in zip(("sampled", "resumed"), batches, strict=True)}
        streams.STREAMS = plain
        steps = {way: _step(config, batches[0], way) for way in ("apart", "own", "own for all", "stopped", "parts")}
        if offers:
            offers.close()
        place = {
            "stage": parallel_state.get_pipeline_model_parallel_rank(),
            "tensor": parallel_state.get_tensor_model_parallel_rank(),
        }
        found.append(place | {"packing": packing, "seen": seen, "steps": steps, "told": stretches})
        parallel_state.destroy_model_parallel()
    platform.stop_process_group()
    return found


def _seen(policy: Policy, batch: TrainBatch) -> dict[str, dict[str, list[list[int]]]]:
    """By stream and sample, position and value of each token that this rank's schedule gets, padding included."""
    found: dict[str, dict[str, list[list[int]]]] = {}
    for mini_batch in _fetched(policy, batch):
        in_loss: list[MicroBatch] = []
        policy.update(mini_batch, policy.log_probs([mini_batch]).streams[0], _spied(policy, in_loss))
        # The last stage's are what its loss got.
        for indices, micro_batch in zip(mini_batch.plan, in_loss or mini_batch, strict=True):
            for stream in COUNTING:
                if stream.name in micro_batch.streams:
                    values = _by_sequence(micro_batch, micro_batch.streams[stream.name])
                    for index, part in zip(indices, values, strict=True):
                        found.setdefault(stream.name, {})[str(index)] = part
    return found


def _fetched(policy: Policy, batch: TrainBatch) -> list[MiniBatch]:
    found = feed_of(policy).fetch(batch, policy.plan(batch))
    assert not isinstance(found, FetchFailed), found
    return found


def _spied(policy: Policy, in_loss: list[MicroBatch]) -> Any:
    def loss(micro_batch: MicroBatch, logits: torch.Tensor) -> Any:
        in_loss.append(micro_batch)
        return policy.policy_loss(micro_batch, logits)

    return loss


def _by_sequence(micro_batch: MicroBatch, values: torch.Tensor) -> list[list[list[int]]]:
    """Pairs of position and value for each sequence of a micro-batch."""
    pairs = torch.stack([micro_batch.position_ids, values.long()], dim=-1)
    if micro_batch.local_lengths is None:
        return pairs.tolist()
    return [part.tolist() for part in pairs[0].split(micro_batch.local_lengths.tolist())]


def _step(config: Any, batch: TrainBatch, way: str) -> dict[str, Any]:
    """A step's metrics and this rank's weights after it; the first old log-probs from a pass apart, or their own."""
    policy = Policy(config, read_architecture(MODEL), str(MODEL), updates=10)
    before = _weights(policy)
    check = AgreementCheck(Limits(warn=1e-9, stop=1e-9 if way == "stopped" else 1e9))
    if way in ("own", "parts"):
        check.judge({"log_prob_diff_mean": 0.0})
    said: list[str] = []
    try:
        if way == "own for all":
            mini_batches = _fetched(policy, batch)
            known = policy.log_probs(mini_batches).streams
            updates = [policy.first_update(*pair)[0] for pair in zip(mini_batches, known, strict=True)]
            metrics = over_updates(updates)
        else:
            data = StepData([], _fetched(policy, batch))
            if way == "parts":  # those of the first update are known before the others are fetched
                first, *others = data.mini_batches
                parts = [score_part(policy, [first], check, is_first=True)]
                parts.append(score_part(policy, others[:1], check, is_first=False))
                data = StepData(parts, others[1:])
            metrics = train_step(policy, data, check, lambda _: contextlib.nullcontext(), said.append)
    except FipoError:
        metrics = {}
    weights = _weights(policy)
    return {"metrics": metrics, "weights": weights, "said": said, "unchanged": weights == before}


def _weights(policy: Policy) -> str:
    """A digest of this rank's weights."""
    digest = hashlib.sha256()
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()
