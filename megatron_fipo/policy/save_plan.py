"""What each rank has to write of a checkpoint: Megatron-Core's plan of it, without its files, processes and queues."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async, state_dict_saver
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from megatron_fipo.policy import megatron_versions
from megatron_fipo.policy.host_memory import own_memory

FILES_A_RANK = 2
"""As many processes write at a time: making a file's pickles and checksums keeps one busy."""
_OVERHEAD = 2048
"""Bytes around each tensor, at most: a zip archive's records, and its line in the metadata."""

Item = tuple[Any, Any]
"""torch's WriteItem, and its tensor on the CPU or its BytesIO."""


@dataclass(frozen=True)
class SavePlan:
    """This rank's part of a checkpoint."""

    files: tuple[tuple[Item, ...], ...]
    """Per file to write, what goes into it."""
    common: bytes | None
    """What is in common.pt, of Megatron-Cores that have one; on rank 0."""
    collector: "_Collector"
    metadata: Metadata | None
    """On rank 0."""

    @property
    def nbytes(self) -> int:
        """What it takes on disk, a little more than exactly."""
        sizes = [_nbytes(data) + _OVERHEAD for items in self.files for _, data in items]
        return sum(sizes) + len(self.common or b"")

    def write_metadata(self, results: list[list[WriteResult]]) -> None:
        """Write the file that says where all ranks' tensors lie; on rank 0."""
        assert self.metadata is not None
        self.collector.finish(self.metadata, results)


class _Collector(filesystem_async.FileSystemWriterAsync):  # type: ignore[misc]
    """Collects what Megatron-Core plans to write, on the CPU, and writes nothing before `finish`."""

    def __init__(self, directory: Path):
        super().__init__(str(directory), thread_count=FILES_A_RANK)
        self.files: tuple[tuple[Item, ...], ...] = ()

    def take_files(self) -> tuple[tuple[Item, ...], ...]:
        """The files to write, which are no longer kept here."""
        files, self.files = self.files, ()
        return files

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan  # makes no directory

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        buckets = filesystem_async._split_by_size_and_type(FILES_A_RANK, plan.items)
        self.files = tuple(
            tuple((item, _on_cpu(planner.resolve_data(item))) for item in bucket) for bucket in buckets if bucket
        )
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def make_plan(state: dict[str, Any], directory: Path) -> SavePlan:
    """The plan for a sharded state dict; every rank calls this together, and none writes.

    Tensors that are on the CPU are the state's own and not copies.
    """
    sharded, common = save_preprocess(state)
    content = megatron_versions.keep_common(sharded, common)
    keyed, _, _ = torch_strategies._replace_state_dict_keys_with_sharded_keys(sharded, True)
    tensors = torch_strategies.mcore_to_pyt_state_dict(keyed)
    planner = torch_strategies.MCoreSavePlanner(
        dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
    )
    collector = _Collector(directory)
    (_, metadata, _), *_ = state_dict_saver.save_state_dict_async_plan(tensors, collector, planner=planner)
    return SavePlan(collector.take_files(), content, collector, metadata)


def _on_cpu(data: Any) -> Any:
    return own_memory(data.detach().to("cpu", non_blocking=True)) if isinstance(data, torch.Tensor) else data


def _nbytes(data: Any) -> int:
    return int(data.nbytes) if isinstance(data, torch.Tensor) else len(data.getbuffer())
