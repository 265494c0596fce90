"""Judges what a configuration asks of this machine: its memory, its addresses, a directory that can be written."""

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
"""What a rank takes on a CPU at the very least: the libraries' own data, and no model (0.43 GiB with the embedded one).
"""
_RANKS_PER_CORE = 2
"""Trainer processes that a core can serve; with more, each step waits for the machine."""


def check_machine(config: Config) -> list[str]:
    """Raise ConfigError for what this machine has not; a warning for more processes than it can serve.

    Servers, verifiers and files are those of the first rank.
    """
    if os.environ.get("RANK", "0") != "0":
        return []
    _check_directory(Path(config.run.directory))
    if config.rollout.servers:
        check_host(config.rollout.host)
    _check_memory(config)
    return [] if "RANK" in os.environ else list(_crowded(config.parallel))


def has_cuda_driver() -> bool:
    """Whether CUDA's driver can be loaded; asked without torch, which takes seconds to import."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def cuda_devices() -> int:
    """GPUs that a process here can use, as CUDA's driver counts them; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    started = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if started else 0


def _check_directory(path: Path) -> None:
    """A run's directory is there and writable, or can be made."""
    remedy = "a directory that can be written"
    try:
        nearest = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
        if not nearest.is_dir():
            raise ConfigError("run.directory", f"{nearest} is no directory", remedy)
        name_max = os.pathconf(nearest, "PC_NAME_MAX")
    except OSError as error:
        raise ConfigError("run.directory", f"{path} cannot be used: {error.strerror}", remedy) from None
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError("run.directory", f"{nearest} cannot be written", remedy)
    if max(len(os.fsencode(part)) for part in path.absolute().parts) > name_max:
        raise ConfigError("run.directory", f"has a name of more than {name_max} bytes", "shorter names")


def check_host(host: str) -> None:
    """Servers can listen there: binding to it is the one question that the machine answers for certain."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except OSError as error:
        problem = f"{host} is no address of this machine: {error.strerror}"
        raise ConfigError("rollout.host", problem, "127.0.0.1, or another of its addresses") from None


def _crowded(parallel: ParallelConfig) -> Iterator[str]:
    """Processes that this launcher would start here, where they are more than GPUs or cores can serve."""
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
    # Under a launcher the ranks are on as many machines as it knows.
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
            raise ConfigError(key, problem, f"fewer or smaller ones, {int(memory_gib)} GiB in all at most")
