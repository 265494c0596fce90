"""The engine's half of each weight transport, run in every vLLM worker; `weights/transports.py` is the other half.

vLLM's control plane calls, in this order: init_transfer_engine once for each sender of the trainer; then for each
update start_weight_update, update_weights for each bucket, finish_weight_update. In between vLLM's layerwise reload
keeps what has arrived, so the tensors of one layer may come in different buckets.
"""

from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_fipo.errors import WeightsRefused
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.models.parameters import parameters
from megatron_fipo.weights.buckets import checksum, unpack
from megatron_fipo.weights.process_group import TransferGroup, local_address, visit_store
from megatron_fipo.weights.transport_records import (
    BUCKET_FILE,
    BroadcastBucket,
    BucketFile,
    BucketHeader,
    JoinRequest,
    ProcessGroupAddress,
    SharedMemoryAddress,
    from_wire,
)

_T = TypeVar("_T")


class CheckpointEngine(WeightTransferEngine):
    """What all transports share: buckets of Hugging Face tensors, and a check that an update was the whole model."""

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

    def parse_init_info(self, init_dict: dict[str, Any]) -> JoinRequest:
        """What the trainer says of a sender that is to be joined. ValueError for anything else."""
        return from_wire(JoinRequest, init_dict)

    def parse_update_info(self, update_dict: dict[str, Any]) -> BucketHeader:
        """What the trainer says of a bucket. ValueError for anything else."""
        return from_wire(BucketHeader, update_dict)

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
        self._pack_experts()
        self._unfinished = False

    def _refresh_tied_output_layer(self) -> None:
        """Has a tied output layer look at its weights again.

        It shares the embedding's tensor, and vLLM's reload reworks only the layer that a tensor was loaded into. The
        CPU kernels multiply by a packed copy of the weights, which would stay the old one.
        """
        output_layer: Any = getattr(self.model, "lm_head", None)
        if self._tied and self.device.type == "cpu" and output_layer is not None:
            output_layer.quant_method.process_weights_after_loading(output_layer)

    def _pack_experts(self) -> None:
        """Has a layer's experts packed anew: vLLM's CPU kernel multiplies by packed weights, and packs only once."""
        if self.device.type != "cpu":
            return
        for module in self.model.modules():
            kernel: Any = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
            if kernel is not None:
                kernel.fused_experts.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Nothing to release unless a transport says otherwise."""

    def _load(self, tensors: list[tuple[str, Tensor]], header: BucketHeader) -> None:
        names = [name for name, _ in tensors]
        if header.checksums is not None:
            # Of what has arrived, under the name it is loaded by: afterwards vLLM has fused, cut and packed it.
            sent = dict(zip(header.layout.names, header.checksums, strict=True))
            differing = [name for name, tensor in tensors if sent[name] != checksum(tensor)]
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


class ProcessGroupEngine(CheckpointEngine):
    """Receives broadcasts of the trainer's senders."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._groups: dict[int, TransferGroup] = {}

    def init_transfer_engine(self, init_info: JoinRequest) -> None:
        """Joins the group of one sender; blocks until all workers of all servers have."""
        address = expected(ProcessGroupAddress, init_info.address)
        device_of_backend = {"gloo": "cpu", "nccl": "cuda"}
        if self.device.type != device_of_backend[address.backend]:
            raise WeightsRefused(
                f"the trainer sends weights over {address.backend}, but this engine runs on {self.device.type}; "
                "both have to run on GPUs or both on CPUs"
            )
        self._leave(address.sender)
        self._groups[address.sender] = TransferGroup(
            visit_store(address.address, address.port, address.world_size, address.timeout_s),
            local_address(address.address),
            init_info.first_rank + self.parallel_config.rank,
            address.world_size,
            address.backend,
            address.timeout_s,
            self.device,
        )

    def receive_weights(self, update_info: BucketHeader) -> None:
        """Receives one bucket into a buffer of its own, which lives as long as layers wait for more tensors."""
        place = expected(BroadcastBucket, update_info.place)
        buffer = torch.empty(update_info.layout.packed_bytes(), dtype=torch.uint8, device=self.device)
        self._groups[place.sender].broadcast(buffer).wait()
        self._load(list(unpack(buffer, update_info.layout)), update_info)

    def shutdown(self) -> None:
        """Leaves all groups."""
        for sender in list(self._groups):
            self._leave(sender)

    def _leave(self, sender: int) -> None:
        if (group := self._groups.pop(sender, None)) is not None:
            group.abort()


class SharedMemoryEngine(CheckpointEngine):
    """Reads safetensors files that the trainer's senders write on the same machine."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._directories: dict[str, Path] = {}

    def init_transfer_engine(self, init_info: JoinRequest) -> None:
        """Remembers the directory, which has to be visible from here."""
        address = expected(SharedMemoryAddress, init_info.address)
        directory = Path(address.directory)
        if not directory.is_dir():
            raise WeightsRefused(
                f"{directory} does not exist here: rollout.weight_transfer=shared_memory needs the trainer and its "
                "vLLM servers on one machine (process_group does not)"
            )
        self._directories[address.sender] = directory

    def receive_weights(self, update_info: BucketHeader) -> None:
        """Maps one file and loads it."""
        sender = expected(BucketFile, update_info.place).sender
        if sender not in self._directories:
            raise WeightsRefused(f"a bucket is of sender {sender}, which this engine was not told to join")
        with safe_open(self._directories[sender] / BUCKET_FILE, framework="pt", device="cpu") as file:
            self._load([(name, file.get_tensor(name)) for name in update_info.layout.names], update_info)


def expected(kind: type[_T], found: object) -> _T:
    """What the trainer says, if it is of this engine's transport. WeightsRefused if it is of another."""
    if not isinstance(found, kind):
        raise WeightsRefused(
            f"the trainer sends {type(found).__name__} where this engine takes {kind.__name__}: both need the same "
            "rollout.weight_transfer"
        )
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
