"""Why: an engine that quantises has to do it anew in every update, from the same bfloat16 values as at its start:
scales of the old weights would spoil the new ones without an error.

vLLM's FP8 by channel, which it has for CPUs too, through a real update. Not covered: FP8 by tensor and by block
(tests/gpu), and what sampling from FP8 does to learning.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from megatron_fipo.config import RolloutConfig
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.records.sample import Sample
from megatron_fipo.records.streams import ROLLOUT_LOG_PROBS
from megatron_fipo.rollout.generator import EngineGenerator
from megatron_fipo.weights.local_senders import Senders
from megatron_fipo.weights.publisher import WeightPublisher, open_publisher
from tests.rollout.engines import (
    forward_log_probs,
    generate,
    problems,
    rollout_config,
    sampling,
    save_tiny_model,
)
from tests.weights.whole import WholeWeights

pytestmark = pytest.mark.slow

PROMPTS = problems(4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Qwen2ForCausalLM]:
    """One model as saved, and one whose linear layers are three times as large, and their scales with them."""
    directory = tmp_path_factory.mktemp("models")
    small, large = (save_tiny_model(directory / name, seed) for seed, name in enumerate(("small", "large")))
    with torch.no_grad():
        for name, weight in large.named_parameters():
            if "_proj.weight" in name:
                weight.mul_(3)
    return {"small": small.bfloat16(), "large": large.bfloat16()}


@pytest.fixture(scope="module")
def pool(models: dict[str, Qwen2ForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnginePool]:
    directory = tmp_path_factory.mktemp("quantised")
    models["small"].save_pretrained(directory / "model")
    with EnginePool(_config(), directory / "model", directory / "run", seed=0) as pool:
        pool.start()
        pool.wait_ready()
        yield pool


def _config() -> RolloutConfig:
    return rollout_config(dtype="bfloat16", quantization="fp8_per_channel", weight_transfer="shared_memory")


def _responses(client: EngineGenerator) -> list[Sample]:
    """One by one, so that no two of them share a batch and its rounding."""
    groups = [generate(client, [problem], 1, sampling(), [seed])[0] for seed, problem in enumerate(PROMPTS)]
    return [group.samples[0] for group in groups]


def _error(model: Qwen2ForCausalLM, responses: list[Sample]) -> float:
    """Mean difference from bfloat16 log-probs."""
    pairs = zip(PROMPTS, responses, strict=True)
    gaps = [
        forward_log_probs(model, p.token_ids, r).float() - torch.tensor(r.streams[ROLLOUT_LOG_PROBS]) for p, r in pairs
    ]
    return float(torch.cat(gaps).abs().mean())


def _publish(publisher: WeightPublisher, model: Qwen2ForCausalLM, version: int) -> None:
    publisher.publish({0: WholeWeights(list(model.state_dict().items()))}, version)


def test_an_update_quantises_as_the_start_does(
    models: dict[str, Qwen2ForCausalLM], pool: EnginePool, tmp_path: Path
) -> None:
    log = pool.servers[0].log
    assert log is not None and "quantization=fp8_per_channel" in log.path.read_text()
    with EngineGenerator(pool) as client:
        publisher = open_publisher(_config(), client.control, groups={0: True}, senders=Senders(1), run_dir=tmp_path)
        at_start = _responses(client)
        _publish(publisher, models["large"], version=1)
        large = _responses(client)
        _publish(publisher, models["small"], version=2)
        again = _responses(client)
        publisher.close()
    for before, after in zip(at_start, again, strict=True):
        assert dataclasses.replace(after, weight_version=before.weight_version) == before
    # FP8 keeps three bits of a weight: these models are random, and so as far off as any. Another model is further.
    assert 2 * _error(models["large"], large) < _error(models["small"], large)
