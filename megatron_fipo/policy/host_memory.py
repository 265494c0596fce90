"""Page-locked host memory for what is moved off the GPU: copies to and from it run beside computation.

torch's own page-locked allocations are rounded up to a power of two, which would waste up to half of a node's memory
here. These are exact. A forked process does not get them: the driver writes to them whenever it likes.
"""

import logging
import mmap

import psutil
import torch
from torch import Tensor

from megatron_fipo.errors import ConfigError

_GIB = 1 << 30

logger = logging.getLogger(__name__)

_reserved: set[int] = set()
"""Addresses of all that was reserved; it lives as long as the process."""


def reserve(nbytes: int) -> Tensor:
    """Memory for the rest of the process's life, uint8 [nbytes]; page-locked where there is CUDA.

    If the driver cannot lock so much, it is ordinary memory, to which copies are slower: a warning says so.

    Raises:
        ConfigError: so much is not free.
    """
    free = psutil.virtual_memory().available
    if nbytes > free:
        raise ConfigError(
            "rollout.shared_gpu",
            f"{nbytes / _GIB:.1f} GiB of weights and optimizer state have to be in host memory while servers sample, "
            f"and {free / _GIB:.1f} GiB are free here",
            "more nodes, or rollout.shared_gpu=false",
        )
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    reserved = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes)
    _reserved.add(reserved.untyped_storage().data_ptr())
    if torch.cuda.is_available():
        failure = torch.cuda.cudart().cudaHostRegister(reserved.data_ptr(), nbytes, 0)
        if int(failure) != 0:
            logger.warning(
                "CUDA cannot page-lock %.1f GiB of host memory (error %d; ulimit -l?): offloading is slow",
                nbytes / _GIB,
                int(failure),
            )
    return reserved


def own_memory(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it if it lies in reserved memory, which a forked process could not read."""
    return tensor.clone() if tensor.untyped_storage().data_ptr() in _reserved else tensor
