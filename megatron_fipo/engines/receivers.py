"""The engine's half of each weight-transfer plane, run in every vLLM worker; `weights/planes.py` is the other half.

vLLM's control plane calls, in this order: init_transfer_engine once for each pipeline stage of the trainer; then for
each update start_weight_update, update_weights for each bucket, finish_weight_update. In between vLLM's layerwise
reload keeps what has arrived, so the tensors of one layer may come in different buckets.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngine
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_fipo.errors import WeightsRefused
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.models.parameters import parameters
from megatron_fipo.weights.buckets import BucketLayout, checksum, unpack
from megatron_fipo.weights.process_group import TransferGroup, local_address, visit_store


class CheckpointEngine(WeightTransferEngine):
    """What all planes share: buckets of Hugging Face tensors, and a check that an update was the whole model."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # By the table and not by files: a directory whose weights are for the trainer alone has none for vLLM.
        table = parameters(read_architecture(self.model_config.model))
        self._expected = {name for entry in table.values() for name in entry.names}
        # Checkpoints of models with tied embeddings may hold the output layer or leave it out.
        self._tied = getattr(self.model_config.hf_config, "tie_word_embeddings", False)
        self._optional = {"lm_head.weight"} if self._tied else set()
        self._received: set[str] = set()
        self._unfinished = False

    def start_weight_update(self) -> None:
        """Prepares the model for a whole new set of weights."""
        if self._unfinished:
            # A trainer that failed in mid-update left layers half loaded, and they would count towards this update.
            finalize_layerwise_reload(self.model, self.model_config)
        self._received = set()
        self._unfinished = True
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Takes one bucket."""
        # The base class calls torch.accelerator.synchronize, which fails in a torch without an accelerator.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def finish_weight_update(self) -> None:
        """Puts the new weights into service. WeightError, naming them, if tensors of the model did not come."""
        if missing := sorted(self._expected - self._received - self._optional):
            raise WeightsRefused(f"the update lacks {len(missing)} tensors of the model: {_some(missing)}")
        finalize_layerwise_reload(self.model, self.model_config)
        self._refresh_tied_output_layer()
        self._unfinished = False

    def _refresh_tied_output_layer(self) -> None:
        """Has a tied output layer look at its weights again.

        It shares the embedding's tensor, and vLLM's reload reworks only the layer that a tensor was loaded into. The
        CPU kernels multiply by a packed copy of the weights, which would stay the old one.
        """
        output_layer: Any = getattr(self.model, "lm_head", None)
        if self._tied and self.device.type == "cpu" and output_layer is not None:
            output_layer.quant_method.process_weights_after_loading(output_layer)

    def shutdown(self) -> None:
        """Nothing to release unless a plane says otherwise."""

    def _load(self, tensors: list[tuple[str, Tensor]], checksums: dict[str, int] | None) -> None:
        names = [name for name, _ in tensors]
        if checksums is not None:
            # Of what has arrived, under the name it is loaded by: afterwards vLLM has fused, cut and packed it.
            differing = [name for name, tensor in tensors if checksums.get(name) != checksum(tensor)]
            if differing:
                raise WeightsRefused(
                    f"tensors arrived with another checksum than they were sent with: {_some(differing)}"
                )
        if unknown := sorted(set(names) - self._expected - self._optional):
            raise WeightsRefused(f"the update has tensors that the model has not: {_some(unknown)}")
        if twice := sorted(self._received.intersection(names)):
            raise WeightsRefused(f"the update has tensors twice: {_some(twice)}")
        self._received.update(names)
        load_weights: Any = self.model.load_weights
        load_weights(tensors)


@dataclass
class ProcessGroupInit(WeightTransferInitInfo):
    """Where the leader of pipeline stage `stage` waits, and the rank of this server's first worker."""

    stage: int
    address: str
    port: int
    world_size: int
    backend: str
    timeout_s: float
    first_rank: int


@dataclass
class ProcessGroupUpdate(WeightTransferUpdateInfo):
    """One bucket that the leader of `stage` broadcasts, packed."""

    stage: int
    names: list[str]
    shapes: list[list[int]]
    dtypes: list[str]
    checksums: dict[str, int] | None = None


class ProcessGroupEngine(CheckpointEngine):
    """Receives broadcasts of the trainer's stage leaders."""

    init_info_cls = ProcessGroupInit
    update_info_cls = ProcessGroupUpdate

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._groups: dict[int, TransferGroup] = {}

    def init_transfer_engine(self, init_info: ProcessGroupInit) -> None:
        """Joins the group of one stage leader; blocks until all workers of all servers have."""
        device_of_backend = {"gloo": "cpu", "nccl": "cuda"}
        if self.device.type != device_of_backend[init_info.backend]:
            raise WeightsRefused(
                f"the trainer sends weights over {init_info.backend}, but this engine runs on {self.device.type}; "
                "both have to run on GPUs or both on CPUs"
            )
        self._leave(init_info.stage)
        rank = init_info.first_rank + self.parallel_config.rank
        store = visit_store(init_info.address, init_info.port, init_info.world_size, init_info.timeout_s)
        self._groups[init_info.stage] = TransferGroup(
            store,
            local_address(init_info.address),
            rank,
            init_info.world_size,
            init_info.backend,
            init_info.timeout_s,
            self.device,
        )

    def receive_weights(self, update_info: ProcessGroupUpdate) -> None:
        """Receives one bucket into a buffer of its own, which lives as long as layers wait for more tensors."""
        layout = BucketLayout(update_info.names, update_info.shapes, update_info.dtypes)
        buffer = torch.empty(layout.packed_bytes(), dtype=torch.uint8, device=self.device)
        self._groups[update_info.stage].broadcast(buffer).wait()
        self._load(list(unpack(buffer, layout)), update_info.checksums)

    def shutdown(self) -> None:
        """Leaves all groups."""
        for stage in list(self._groups):
            self._leave(stage)

    def _leave(self, stage: int) -> None:
        if (group := self._groups.pop(stage, None)) is not None:
            group.abort()


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """The directory in which one stage's leader writes its files."""

    directory: str
    first_rank: int


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """One bucket: a safetensors file, and the tensors it must hold in the order to load them."""

    path: str
    names: list[str]
    checksums: dict[str, int] | None = None


class SharedMemoryEngine(CheckpointEngine):
    """Reads safetensors files that the trainer's stage leaders write on the same machine."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._directories: set[Path] = set()

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """Remembers the directory, which has to be visible from here."""
        directory = Path(init_info.directory)
        if not directory.is_dir():
            raise WeightsRefused(
                f"{directory} does not exist here: rollout.weight_transfer=shared_memory needs the trainer and its "
                "vLLM servers on one machine (process_group does not)"
            )
        self._directories.add(directory)

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        """Maps one file and loads it."""
        path = Path(update_info.path)
        if path.parent not in self._directories:
            raise WeightsRefused(f"{path} is in no directory that this engine was told of")
        with safe_open(path, framework="pt", device="cpu") as file:
            self._load([(name, file.get_tensor(name)) for name in update_info.names], update_info.checksums)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
