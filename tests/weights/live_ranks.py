"""What the ranks of test_live_update.py run."""

import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from megatron_fipo.config import Config, ParallelConfig
from megatron_fipo.engines.access import TOKEN_VARIABLE
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.policy import platform
from megatron_fipo.policy.model import start_model_parallel
from megatron_fipo.policy.publishing import PolicyPublisher
from megatron_fipo.policy.update import Policy
from megatron_fipo.rollout.generator import EngineGenerator
from megatron_fipo.weights.buckets import Bucket
from tests.rollout.engines import rollout_config

CHANGED = re.compile(r"model\.layers\.1\.mlp\.(experts\.\d+\.)?down_proj\.weight")


def publish(server: dict[str, Any], run_dir: str) -> list[dict[str, Any]]:
    """Load the server's model under its layout, and publish it; what was found.

    Three updates: the right one, one with a tensor that is changed before its checksum is taken, the right one.
    """
    platform.start_process_group(60)
    config = Config()
    config.model.dtype, config.model.layers = "float32", "local"
    # The probe is not tempered, whatever samples are.
    config.rollout.temperature = 0.7
    config.parallel = ParallelConfig(**server["parallel"])
    start_model_parallel(config.parallel, seed=0)
    os.environ[TOKEN_VARIABLE] = server["token"]
    config.rollout = rollout_config(
        servers=0,
        addresses=[server["url"]],
        tensor_parallel=server["workers"],
        weight_transfer="process_group",
        checksum_every=1,
        temperature=0.7,
    )
    model_dir = server["model_dir"]
    policy = Policy(config, read_architecture(model_dir), model_dir, updates=1)
    with ExitStack() as stack:
        control = None
        if dist.get_rank() == 0:
            pool = stack.enter_context(EnginePool(config.rollout, Path(model_dir), Path(run_dir), seed=0))
            pool.wait_ready()
            control = stack.enter_context(EngineGenerator(pool)).control
        warnings: list[str] = []
        publisher = PolicyPublisher(policy, control, Path(run_dir), warnings.append)
        stack.callback(publisher.close)
        found = [_update(publisher, version, warnings) for version in (1, 2, 3)]
    platform.stop_process_group()
    return found


def _update(publisher: PolicyPublisher, version: int, warnings: list[str]) -> dict[str, Any]:
    warnings.clear()
    with ExitStack() as stack:
        for part in publisher._weights.values() if version == 2 else ():
            gather = part.gather
            stack.enter_context(patch.object(part, "gather", lambda index, gather=gather: _changed(gather(index))))
        metrics = publisher.publish(version, lambda: False) | publisher.probe()
    return {"metrics": metrics, "warnings": list(warnings)}


def _changed(bucket: Bucket) -> Bucket:
    return Bucket([(name, tensor * 2 if CHANGED.fullmatch(name) else tensor) for name, tensor in bucket.tensors])
