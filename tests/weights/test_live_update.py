"""Why: between a trainer in shards and an engine in other shards lie a gather, a broadcast and vLLM's own cut, and
whatever one of them mixes up is a policy that nobody trained.

Megatron-Core in two tensor-parallel halves of two pipeline stages, on four real ranks; vLLM with one worker and with
two. What fails in an update, and shared memory, are in test_transfer.py; the other layouts in test_reshard.py.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import Qwen2ForCausalLM

from megatron_fipo.rollout.client import RolloutClient
from megatron_fipo.rollout.service import RolloutService
from tests.distributed import run_ranks
from tests.rollout.engines import CACHED_PROMPT, log_prob_error, problems, rollout_config, sampling, save_tiny_model

pytestmark = pytest.mark.slow

WARM = problems(4, length=CACHED_PROMPT)
COLD = problems(5, length=CACHED_PROMPT)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Qwen2ForCausalLM]]:
    directory = tmp_path_factory.mktemp("models")
    return directory, [save_tiny_model(directory / str(seed), seed) for seed in range(2)]


@pytest.fixture(scope="module")
def services(models: tuple[Path, list[Qwen2ForCausalLM]]) -> Iterator[dict[int, RolloutService]]:
    """By number of workers, with the first model."""
    directory, _ = models
    started: dict[int, RolloutService] = {}
    try:
        for workers in (1, 2):
            config = rollout_config(tensor_parallel=workers, weight_transfer="process_group")
            started[workers] = RolloutService(config, directory / "0", directory / f"run{workers}", seed=0)
            started[workers].start()
        for service in started.values():
            service.wait_ready()
        yield started
    finally:
        for service in started.values():
            service.close()


def _errors(client: RolloutClient, model: Qwen2ForCausalLM) -> tuple[float, float]:
    """Largest difference from the model's log-probs, on prompts that were sampled from before and on others."""
    errors = []
    for prompts in (WARM, COLD):
        groups = client.generate(prompts, 2, sampling(), range(len(prompts)))
        pairs = [(group.problem.token_ids, response) for group in groups for response in group.responses]
        errors.append(max(log_prob_error(model, prompt, response) for prompt, response in pairs))
    return errors[0], errors[1]


def test_engines_hold_what_the_trainer_holds_in_shards(
    models: tuple[Path, list[Qwen2ForCausalLM]], services: dict[int, RolloutService], tmp_path: Path
) -> None:
    directory, (old, new) = models
    clients = {workers: RolloutClient(service) for workers, service in services.items()}
    for client in clients.values():
        groups = client.generate(WARM, 2, sampling(), range(len(WARM)))
        assert max(log_prob_error(old, g.problem.token_ids, r) for g in groups for r in g.responses) < 1e-4
    servers = [
        {
            "url": service.servers[0].url,
            "token": service.headers["Authorization"].removeprefix("Bearer "),
            "workers": workers,
        }
        for workers, service in services.items()
    ]
    arguments = {"model_dir": str(directory / "1"), "servers": servers, "run_dir": str(tmp_path)}
    checked = run_ranks("tests.weights.live_ranks:push", 4, arguments, timeout=180)
    assert checked == [[len(new.state_dict())] * 2] * 4
    for client in clients.values():
        warm, cold = _errors(client, new)
        assert warm < 1e-4 and cold < 1e-4
        assert min(_errors(client, old)) > 0.5, "the two models are too alike to tell"
        client.close()
