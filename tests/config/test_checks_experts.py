"""Why: servers that deal experts where they cannot would sample nonsense, or fail after minutes, far from the key.

Not covered: servers that do deal them, which needs GPUs (tests/gpu/test_weights.py).
"""

from pathlib import Path

import pytest

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config import checks_experts
from megatron_fipo.config.checks import check
from megatron_fipo.config.checks_experts import (
    check_dispatcher,
    check_experts_of_model,
    check_servers_experts,
    check_servers_routes,
)
from megatron_fipo.config.checks_here import check_here_to_sample
from megatron_fipo.config.configure import load_config
from megatron_fipo.engines.server_options import server_arguments
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import read_architecture

TINY_MOE = read_architecture(resolve_embedded("embedded:tiny_moe"))
DEALT = ["experiment=tiny_moe", "rollout.expert_parallel=true"]


def test_one_rank_has_nobody_to_deal_experts_to() -> None:
    with pytest.raises(ConfigError, match=r"^rollout.expert_parallel: .*rollout.tensor_parallel is 1"):
        check(load_config(DEALT), world_size=2, local=False)


def test_replay_needs_several_updates_per_step() -> None:
    """One update per step has no old log-probs but its own: replay would change nothing, and nobody would notice."""
    replayed = ["experiment=tiny_moe", "algorithm.router_replay=trainer", "algorithm.prompts_per_step=16"]
    one, several = (
        check(load_config([*replayed, f"algorithm.mini_batch_prompts={size}"]), world_size=2, local=False)
        for size in (16, 8)
    )
    assert any(text.startswith("algorithm.router_replay: trainer changes nothing with one update") for text in one)
    assert not any("router_replay" in text for text in several)
    replayed[1] = "algorithm.router_replay=rollout"  # the first update replays the engine's
    one = check(load_config([*replayed, "algorithm.mini_batch_prompts=16"]), world_size=2, local=False)
    assert not any("router_replay" in text for text in one)


def test_a_dense_model_has_no_experts_to_deal() -> None:
    config = load_config([*DEALT, "rollout.tensor_parallel=2"])
    check_servers_experts(config, TINY_MOE, has_cuda=True)
    with pytest.raises(ConfigError, match=r"^rollout.expert_parallel: the model has no experts"):
        check_servers_experts(config, read_architecture(resolve_embedded("embedded:tiny")), has_cuda=True)


def test_a_dense_model_has_no_routers_to_freeze() -> None:
    config = load_config([*DEALT[:1], "optimizer.freeze_routers=true", "parallel.expert=1"])
    check_experts_of_model(config, TINY_MOE)
    with pytest.raises(ConfigError, match=r"^optimizer.freeze_routers: the model has no experts"):
        check_experts_of_model(config, read_architecture(resolve_embedded("embedded:tiny")))


@pytest.mark.parametrize("key", ["router_aux_loss_coef", "router_z_loss_coef"])
def test_losses_of_routers_need_routers_that_learn(key: str) -> None:
    """Nothing would read the coefficient otherwise, or only the layers below would learn from it."""
    config = load_config([*DEALT[:1], f"algorithm.{key}=0.01", "parallel.expert=1"])
    check_experts_of_model(config, TINY_MOE)
    with pytest.raises(ConfigError, match=rf"^algorithm.{key}: the model has no experts"):
        check_experts_of_model(config, read_architecture(resolve_embedded("embedded:tiny")))
    frozen = load_config([*DEALT[:1], f"algorithm.{key}=0.01", "optimizer.freeze_routers=true"])
    with pytest.raises(ConfigError, match=rf"^algorithm.{key}: teaches routers, and optimizer.freeze_routers=true"):
        check(frozen, world_size=2, local=False)


def test_cpu_servers_do_not_deal_experts() -> None:
    config = load_config([*DEALT, "rollout.tensor_parallel=2"])
    with pytest.raises(ConfigError, match=r"^rollout.expert_parallel: .*without a GPU"):
        check_servers_experts(config, TINY_MOE, has_cuda=False)
    check_servers_experts(config, TINY_MOE, has_cuda=True)


def test_servers_run_experts_whole_or_cut_evenly() -> None:
    config = load_config([*DEALT[:1], "rollout.quantization=fp8_per_channel"])
    with pytest.raises(ConfigError, match=r"^rollout.quantization: fp8_per_channel of a model with experts needs CUDA"):
        check_servers_experts(config, TINY_MOE, has_cuda=False)
    check_servers_experts(config, TINY_MOE, has_cuda=True)
    for size, problem in (
        (7, "7 does not divide the .* rows of an expert"),
        (16, "16 is more than the model's 8 experts"),
    ):
        config.rollout.tensor_parallel = size
        with pytest.raises(ConfigError, match=rf"^rollout.tensor_parallel: {problem}"):
            check_servers_experts(config, TINY_MOE, has_cuda=True)


def test_an_evaluation_is_checked_too() -> None:
    config = load_config([*DEALT, "rollout.tensor_parallel=2"])
    with pytest.raises(ConfigError, match=r"^rollout.expert_parallel: .*without a GPU"):
        check_here_to_sample(config, resolve_embedded("embedded:tiny_moe"))


def test_fp8_needs_a_dispatcher_that_pads() -> None:
    words = ["experiment=tiny_moe", "parallel.pipeline=1", "parallel.expert=1", "parallel.expert_dispatcher=allgather"]
    check_dispatcher(load_config(words))
    with pytest.raises(ConfigError, match=r"^parallel.expert_dispatcher: allgather cannot pad"):
        check_dispatcher(load_config([*words, "model.fp8=blockwise"]))


def test_routers_are_not_quantised() -> None:
    rollout = load_config(["experiment=tiny_moe", "rollout.quantization=fp8_per_channel"]).rollout
    assert r'--quantization-config={"ignore": ["re:.*mlp\\.gate$"]}' in server_arguments(rollout, Path("model"), seed=0)


def test_servers_are_told() -> None:
    option = "--enable-expert-parallel"
    for overrides, dealt in ((DEALT, True), (DEALT[:1], False)):
        rollout = load_config([*overrides, "rollout.tensor_parallel=2"]).rollout
        assert (option in server_arguments(rollout, Path("model"), seed=0)) == dealt


@pytest.mark.parametrize(
    ("has_cuda", "problem"), [(False, "has no CUDA driver: vLLM's CPU engine"), (True, "has no Triton")]
)
def test_the_engines_choices_need_cuda_and_triton(
    monkeypatch: pytest.MonkeyPatch, has_cuda: bool, problem: str
) -> None:
    """Without them a server would start, sample for a while, and only then refuse."""
    monkeypatch.setattr(checks_experts, "find_spec", lambda name: None)
    config = load_config([*DEALT[:1], "algorithm.router_replay=rollout"])
    with pytest.raises(ConfigError, match=rf"^algorithm.router_replay: is rollout, .*this machine {problem}"):
        check_servers_routes(config, has_cuda)
    check_servers_routes(load_config([*DEALT[:1], "algorithm.router_replay=trainer"]), has_cuda)
    config.rollout.servers, config.rollout.addresses = 0, ["http://elsewhere:8000"]
    check_servers_routes(config, has_cuda)
    monkeypatch.setattr(checks_experts, "find_spec", lambda name: name)
    config.rollout.servers = 1
    check_servers_routes(config, has_cuda=True)


def test_servers_are_told_to_return_their_choices() -> None:
    rollout = load_config(DEALT[:1]).rollout
    for returns in (True, False):
        options = server_arguments(rollout, Path("model"), seed=0, returns_routes=returns)
        assert ("--enable-return-routed-experts" in options) == returns
