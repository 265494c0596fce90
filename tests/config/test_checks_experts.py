"""Why: servers that deal experts where they cannot would sample nonsense, or fail after minutes, far from the key.

Not covered: servers that do deal them, which needs GPUs (tests/gpu/test_weights.py).
"""

from pathlib import Path

import pytest

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config.checks import check
from megatron_fipo.config.checks_experts import check_experts_here, check_experts_of_model
from megatron_fipo.config.configure import load_config
from megatron_fipo.engines.server_options import server_arguments
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import read_architecture

DEALT = ["experiment=tiny_moe", "rollout.expert_parallel=true"]


def test_one_rank_has_nobody_to_deal_experts_to() -> None:
    with pytest.raises(ConfigError, match=r"^rollout.expert_parallel: .*rollout.tensor_parallel is 1"):
        check(load_config(DEALT), world_size=2, local=False)


def test_a_dense_model_has_no_experts_to_deal() -> None:
    config = load_config([*DEALT, "rollout.tensor_parallel=2"])
    check_experts_of_model(config, read_architecture(resolve_embedded("embedded:tiny_moe")))
    with pytest.raises(ConfigError, match=r"^rollout.expert_parallel: the model has no experts"):
        config.parallel.expert = 1
        check_experts_of_model(config, read_architecture(resolve_embedded("embedded:tiny")))


def test_cpu_servers_do_not_deal_experts() -> None:
    config = load_config([*DEALT, "rollout.tensor_parallel=2"])
    with pytest.raises(ConfigError, match=r"^rollout.expert_parallel: .*without a GPU"):
        check_experts_here(config, has_cuda=False)
    check_experts_here(config, has_cuda=True)


def test_servers_are_told() -> None:
    option = "--enable-expert-parallel"
    for overrides, dealt in ((DEALT, True), (DEALT[:1], False)):
        rollout = load_config([*overrides, "rollout.tensor_parallel=2"]).rollout
        assert (option in server_arguments(rollout, Path("model"), seed=0)) == dealt
