"""The policy's state on the GPU or in host memory, for a GPU that trainer and engine use in turns.

Storages are moved and not tensors, so that Megatron-Core's many views of them (parameters, buckets, the optimizer's
shards) stay what they are. While a storage is away, the optimizer's tensors show its copy in host memory, and
weights/away.py has that of a parameter, so that a checkpoint can be written from there.

Gradients are not moved: each update begins by zeroing them, so Megatron-Core frees their buffers. Its own offloading of
optimizer state copies to fresh pageable memory every time, tensor by tensor, and waits for each copy.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor, UntypedStorage, nn

from megatron_fipo.policy import platform
from megatron_fipo.policy.host_memory import reserve
from megatron_fipo.weights.away import brought_back, put_away, readable

_ALIGNMENT = 512
"""Bytes that each storage's place in host memory begins at a multiple of."""


class _Part:
    """Storages that are moved together, with the tensors that show them."""

    def __init__(self) -> None:
        self._storages: dict[int, UntypedStorage] = {}
        self._tensors: list[tuple[Tensor, int]] = []
        self._host: dict[int, Tensor] = {}
        self._at_home: list[Tensor] = []
        self._away: list[Tensor] = []
        self._sizes: dict[int, int] = {}
        self.is_away = False
        self.is_copied = False
        """Whether host memory has the present values."""

    def add(self, tensor: Tensor) -> None:
        """One more tensor. Before anything is moved."""
        storage = tensor.untyped_storage()
        if not storage.nbytes() or any(known is tensor for known, _ in self._tensors):
            return
        self._storages.setdefault(storage.data_ptr(), storage)
        self._tensors.append((tensor, storage.data_ptr()))

    def has(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage is one of these."""
        return tensor.untyped_storage().data_ptr() in self._storages

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the storages take."""
        return sum(_aligned(storage.nbytes()) for storage in self._storages.values())

    def settle(self, memory: Tensor) -> None:
        """Get `nbytes` of host memory, uint8."""
        start = 0
        for key, storage in self._storages.items():
            self._sizes[key] = storage.nbytes()
            self._host[key] = memory[start : start + storage.nbytes()]
            start += _aligned(storage.nbytes())
        for tensor, key in self._tensors:
            self._at_home.append(tensor.detach())
            host = self._host[key]
            first = (host.storage_offset() + tensor.storage_offset() * tensor.itemsize) // tensor.itemsize
            shown = torch.empty(0, dtype=tensor.dtype)
            self._away.append(shown.set_(host.untyped_storage(), first, tensor.size(), tensor.stride()))

    @torch.no_grad()
    def copy_out(self) -> None:
        """Copy to host memory what is not there yet; done when the stream is."""
        if self.is_copied:
            return
        self.is_copied = True
        for key, storage in self._storages.items():
            self._host[key].copy_(_as_bytes(storage), non_blocking=True)

    def leave(self) -> None:
        """Free the storages, whose copies are done."""
        for (tensor, _), away in zip(self._tensors, self._away, strict=True):
            if isinstance(tensor, nn.Parameter):
                put_away(tensor, away)
            else:
                tensor.data = away
        for storage in self._storages.values():
            storage.resize_(0)
        self.is_away = True

    def allocate(self) -> None:
        """Have the storages again, without their values."""
        for key, storage in self._storages.items():
            storage.resize_(self._sizes[key])
        for (tensor, _), at_home in zip(self._tensors, self._at_home, strict=True):
            if isinstance(tensor, nn.Parameter):
                brought_back(tensor)
            else:
                tensor.data = at_home
        self.is_away = False

    @torch.no_grad()
    def copy_in(self) -> None:
        """Copy the values back; done when the stream is."""
        for key, storage in self._storages.items():
            _as_bytes(storage).copy_(self._host[key], non_blocking=True)


class Offload:
    """Weights, gradients and optimizer state of this rank: on the GPU at first. Each method does what is left to do.

    On a CPU everything is done as on a GPU, by copies between two places of its memory.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], optimizer: Any):
        self._chunks = chunks
        self._weights, self._optimizer = _Part(), _Part()
        for tensor in _weights(chunks):
            self._weights.add(tensor)
        for tensor in _optimizer_tensors(optimizer):
            # Without a master copy the optimizer works on the weights themselves.
            (self._weights if self._weights.has(tensor) else self._optimizer).add(tensor)
        memory = reserve(self._weights.nbytes + self._optimizer.nbytes)
        self._weights.settle(memory[: self._weights.nbytes])
        self._optimizer.settle(memory[self._weights.nbytes :])
        self._stream = torch.cuda.Stream() if platform.has_cuda() else None
        self._gradients_away = False

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that this rank's state takes."""
        return self._weights.nbytes + self._optimizer.nbytes

    def leave(self) -> None:
        """Free the GPU of everything; the values are in host memory then."""
        parts = [part for part in (self._weights, self._optimizer) if not part.is_away]
        with self._beside():
            for part in parts:
                part.copy_out()
        if self._stream is not None:
            self._stream.synchronize()
        for part in parts:
            part.leave()
        if not self._gradients_away:
            for chunk in self._chunks:
                chunk.offload_grad_buffers(synchronize=False, empty_cache=False)
            self._gradients_away = True
        platform.release_memory()

    def bring_weights(self) -> None:
        """Have the weights on the GPU, for a forward pass or a weight update."""
        if self._weights.is_away:
            self._weights.allocate()
            with self._beside():
                self._weights.copy_in()
            self.wait()

    def bring_all(self) -> None:
        """Have everything on the GPU; the optimizer's state may still be on its way, until `wait` is called."""
        self.bring_weights()
        self._weights.is_copied = self._optimizer.is_copied = False  # an update may follow
        if self._gradients_away:
            for chunk in self._chunks:
                chunk.restore_grad_buffers(synchronize=False)
            self._gradients_away = False
        if self._optimizer.is_away:
            self._optimizer.allocate()
            with self._beside():
                self._optimizer.copy_in()

    def show(self, state: dict[str, Any]) -> None:
        """Have a sharded state dict hold copies in host memory of parameters that are away."""

        def shown(entry: Any) -> Any:
            if isinstance(entry, ShardedTensor | ShardedTensorFactory) and isinstance(entry.data, Tensor):
                entry.data = readable(entry.data)
            return entry

        dict_list_map_inplace(shown, state)

    def wait(self) -> None:
        """Have what is computed from here on wait for what is on its way."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Within it, copies run beside what is computed later, and after what was computed before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield


def _weights(chunks: Iterable[DistributedDataParallel]) -> Iterator[Tensor]:
    """The parameters, but for those in FP8, whose bytes are in tensors of their own and stay where they are."""
    return (parameter for chunk in chunks for parameter in chunk.parameters() if not is_float8tensor(parameter))


def _optimizer_tensors(optimizer: Any) -> Iterator[Tensor]:
    """Master weights and moments."""
    device = platform.device().type
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.device.type == device)


def _as_bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
