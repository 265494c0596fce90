"""What the ranks of test_live_update.py run."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_fipo.config import Config
from megatron_fipo.engines.access import TOKEN_VARIABLE
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.policy import platform
from megatron_fipo.policy.model import build_model, start_model_parallel
from megatron_fipo.rollout.generator import EngineGenerator
from megatron_fipo.weights.reshard import export, load_into
from megatron_fipo.weights.transfer import open_transfer
from tests.rollout.engines import rollout_config


def push(servers: list[dict[str, Any]], run_dir: str) -> list[int]:
    """Load each server's model in two tensor-parallel halves of two stages, and send it; tensors that were checked."""
    platform.start_process_group(60)
    config = Config()
    config.model.dtype, config.model.layers = "float32", "local"
    config.parallel.tensor = config.parallel.pipeline = 2
    start_model_parallel(config.parallel, seed=0)
    checked = []
    for server in servers:
        model_dir = server["model_dir"]
        model_config = read_architecture(model_dir)
        chunks = build_model(config, model_config)
        load_into(chunks, model_dir, model_config)
        os.environ[TOKEN_VARIABLE] = server["token"]
        rollout = rollout_config(
            servers=0,
            addresses=[server["url"]],
            tensor_parallel=server["workers"],
            weight_transfer="process_group",
            checksum_every=1,
        )
        with ExitStack() as stack:
            control = None
            if dist.get_rank() == 0:
                pool = stack.enter_context(EnginePool(rollout, Path(model_dir), Path(run_dir), seed=0))
                pool.wait_ready()
                control = stack.enter_context(EngineGenerator(pool)).control
            transfer = open_transfer(
                rollout,
                control,
                stage=parallel_state.get_pipeline_model_parallel_rank(),
                num_stages=2,
                is_leader=parallel_state.get_tensor_model_parallel_rank() == 0,
                run_dir=Path(run_dir),
            )
            stack.callback(transfer.close)
            checked.append(transfer.push(export(chunks, model_config), version=1).checked)
    platform.stop_process_group()
    return checked
