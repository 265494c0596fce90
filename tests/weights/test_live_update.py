"""Why: between a trainer in shards and an engine in other shards lie a gather, a broadcast and vLLM's own cut, and
whatever one of them mixes up is a policy that nobody trained.

Megatron-Core in two tensor-parallel halves of two pipeline stages, on four real ranks; vLLM with one worker, which
serves a Mistral with a window shorter than its prompts, and with two, which serve a Gemma. A Qwen3 with experts, which
lie on two ranks of two tensor-parallel halves, goes to one worker, which joins a layer's experts. What fails in an
update, shared memory, and two workers in every `make test` are in test_transfer.py, with Qwen2; the other layouts in
test_reshard.py. The probe that ends an update is compared on the way; its negative control is a tensor that the trainer
itself sends changed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.rollout.generator import EngineGenerator
from tests.distributed import run_ranks
from tests.engines.tokens import token_of
from tests.rollout.engines import (
    CACHED_PROMPT,
    generate,
    log_prob_error,
    problems,
    rollout_config,
    sampling,
    save_tiny_model,
)
from tests.weights.models import by_stored_names

pytestmark = pytest.mark.slow

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"kind": "Mistral", "sliding_window": 24},
    "gemma": {"kind": "Gemma", "head_dim": 32},
    "qwen3_moe": {"kind": "Qwen3Moe", "head_dim": 32, **EXPERTS},
}
WORKERS = {"mistral": 1, "gemma": 2, "qwen3_moe": 1}
"""Of the server of each."""
STAGES = {"tensor": 2, "pipeline": 2}
LAYOUTS = {
    "mistral": STAGES,
    "gemma": STAGES,
    "qwen3_moe": {"tensor": 2, "sequence": True, "expert": 2, "data": 2},
}

WARM = problems(4, length=CACHED_PROMPT)
COLD = problems(5, length=CACHED_PROMPT)


@dataclass(frozen=True)
class Served:
    """A model's server, and the old and the new model."""

    name: str
    pool: EnginePool
    models: list[PreTrainedModel]
    directory: Path
    """The new model's files."""


@pytest.fixture(
    scope="module",
    params=["mistral", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("gemma", "qwen3_moe"))],
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that has the old model."""
    name, directory = request.param, tmp_path_factory.mktemp("models")
    models = [save_tiny_model(directory / f"{seed}", seed, **MODELS[name]) for seed in range(2)]
    config = rollout_config(tensor_parallel=WORKERS[name], weight_transfer="process_group")
    with EnginePool(config, directory / "0", directory / "run", seed=0) as pool:
        pool.start()
        pool.wait_ready()
        yield Served(name, pool, models, directory / "1")


def _errors(client: EngineGenerator, model: PreTrainedModel) -> tuple[float, float]:
    """Largest difference from the model's log-probs, on prompts that were sampled from before and on others."""
    errors = []
    for prompts in (WARM, COLD):
        groups = generate(client, prompts, 2, sampling(), range(len(prompts)))
        pairs = [(group.problem.token_ids, response) for group in groups for response in group.samples]
        errors.append(max(log_prob_error(model, prompt, response) for prompt, response in pairs))
    return errors[0], errors[1]


def test_engines_hold_what_the_trainer_holds_in_shards(served: Served, tmp_path: Path) -> None:
    pool, (old, new), client = served.pool, served.models, EngineGenerator(served.pool)
    groups = generate(client, WARM, 2, sampling(), range(len(WARM)))
    assert max(log_prob_error(old, g.problem.token_ids, r) for g in groups for r in g.samples) < 1e-4
    server = {
        "url": pool.servers[0].url,
        "token": token_of(pool),
        "workers": WORKERS[served.name],
        "parallel": LAYOUTS[served.name],
        "model_dir": str(served.directory),
    }
    arguments = {"server": server, "run_dir": str(tmp_path)}
    for updates in run_ranks("tests.weights.live_ranks:publish", 4, arguments, timeout=120):
        # A tied one counts once, and each expert's by itself.
        named = by_stored_names(MODELS[served.name]["kind"], new.named_parameters())
        right, changed, again = (update["metrics"] for update in updates)
        assert right["weights_checked"] == len(named)
        assert right["weights_bytes"] == sum(tensor.nbytes for tensor in named.values())
        # The probe: the trainer's log-probs against each engine's, which no checksum can tell of.
        assert 0 < right["probe_diff_max"] < 1e-4 and 0 < again["probe_diff_max"] < 1e-4
        assert changed["weights_checked"] == len(named) and changed["probe_diff_max"] > 0.05
        assert not updates[0]["warnings"] and not updates[2]["warnings"]
        (warning,) = updates[1]["warnings"]
        assert f"the engine at {server['url']} are not the trainer's" in warning
    warm, cold = _errors(client, new)
    assert warm < 1e-4 and cold < 1e-4
    assert min(_errors(client, old)) > 0.5, "the two models are too alike to tell"
    client.close()
