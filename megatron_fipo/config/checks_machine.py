"""Check what a configuration requires of this machine: its memory, its addresses, a writable directory."""

import ctypes
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from megatron_fipo.config import Config, ParallelConfig
from megatron_fipo.config.loop import VERIFIER_MEMORY_GIB
from megatron_fipo.errors import ConfigError

_GIB = 1 << 30
_RANK_GIB = 0.4
"""Least memory of a rank on a CPU: the libraries' data without a model (0.43 GiB with the embedded model)."""
_RANKS_PER_CORE = 2
"""Trainer processes that one core can run well. With more processes, every step is slow."""


def check_machine(config: Config) -> list[str]:
    """Raise ConfigError if this machine lacks something. Return a warning if it cannot run so many processes well.

    Only the first rank checks, since it starts the servers and verifiers and writes the files.
    """
    if os.environ.get("RANK", "0") != "0":
        return []
    _check_directory(Path(config.run.directory))
    if config.rollout.servers:
        check_host(config.rollout.host)
    _check_memory(config)
    return [] if "RANK" in os.environ else list(_crowded(config.parallel))


def has_cuda_driver() -> bool:
    """Return whether CUDA's driver can be loaded. This does not import torch, which takes seconds."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def cuda_devices() -> int:
    """Return the number of GPUs that CUDA's driver offers to this process; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    started = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if started else 0


def _check_directory(path: Path) -> None:
    """Check that a run's directory exists and is writable, or can be created."""
    remedy = "a directory that can be written"
    try:
        nearest = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
        if not nearest.is_dir():
            raise ConfigError("run.directory", f"{nearest} is not a directory", remedy)
        name_max = os.pathconf(nearest, "PC_NAME_MAX")
    except OSError as error:
        raise ConfigError("run.directory", f"{path} cannot be used: {error.strerror}", remedy) from None
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError("run.directory", f"{nearest} cannot be written", remedy)
    if max(len(os.fsencode(part)) for part in path.absolute().parts) > name_max:
        raise ConfigError("run.directory", f"has a name of more than {name_max} bytes", "shorter names")


def check_host(host: str) -> None:
    """Check that servers can listen on `host`. Binding a socket to it is the only certain test."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except OSError as error:
        problem = f"{host} is not an address of this machine: {error.strerror}"
        raise ConfigError("rollout.host", problem, "127.0.0.1, or another of its addresses") from None


def _crowded(parallel: ParallelConfig) -> Iterator[str]:
    """Yield a warning if this launcher would start more processes here than the GPUs or cores can run well."""
    ranks, layout = _ranks(parallel), _layout(parallel)
    gpus, cores = cuda_devices(), len(psutil.Process().cpu_affinity() or [0])
    fewer = "parallel.data=null starts one replica" if (parallel.data or 1) > 1 else "a smaller layout starts fewer"
    if gpus and ranks > gpus:
        here = f"this machine has {_counted(gpus, 'GPU')}"
        yield f"parallel: {layout} is {ranks} processes, one per GPU, and {here}; {fewer}"
    elif not gpus and ranks > _RANKS_PER_CORE * cores:
        here = f"this machine has {_counted(cores, 'core')}: steps will be slow"
        yield f"parallel: {layout} is {ranks} processes, and {here}; {fewer}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _ranks(parallel: ParallelConfig) -> int:
    return parallel.tensor * parallel.pipeline * parallel.context * (parallel.data or 1)


def _layout(parallel: ParallelConfig) -> str:
    sizes = (("tensor", parallel.tensor), ("pipeline", parallel.pipeline), ("context", parallel.context))
    return " × ".join(f"{name} {size}" for name, size in (*sizes, ("data", parallel.data or 1)) if size > 1)


def _check_memory(config: Config) -> None:
    memory_gib = psutil.virtual_memory().total / _GIB
    parallel, rollout = config.parallel, config.rollout
    # Under another launcher, the ranks may be on several machines.
    local_ranks = 0 if "RANK" in os.environ else _ranks(parallel)
    caches = 0 if has_cuda_driver() else rollout.servers
    environments = config.environment.workers if config.environment.is_own else 0
    for key, count, each_gib, name in (
        ("reward.workers", config.reward.workers, VERIFIER_MEMORY_GIB, "verifier processes"),
        ("environment.workers", environments, VERIFIER_MEMORY_GIB, "environment processes"),
        ("rollout.cpu_kv_cache_gib", caches, rollout.cpu_kv_cache_gib, "KV caches of servers"),
        ("parallel", local_ranks, _RANK_GIB, f"trainer processes ({_layout(parallel)})"),
    ):
        if count * each_gib > memory_gib:
            problem = f"{count} {name} of {each_gib} GiB each take more than the {memory_gib:.1f} GiB of memory here"
            raise ConfigError(key, problem, f"fewer or smaller ones, at most {int(memory_gib)} GiB in total")
