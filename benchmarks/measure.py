"""Times, peak memory and the line that says where they were measured; shared by the tables."""

import ctypes
import datetime
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def seconds(function: Callable[[], object], least: float = 1.0) -> float:
    """Median time of one call, over as many calls as fit into `least` seconds, three at least unless one takes longer.

    CPU time of this process on the CPU, so that neighbours on the machine do not count; the device's time on CUDA.
    """
    times: list[float] = []
    while sum(times) < least or (len(times) < 3 and times[0] < least):
        times.append(once(function))
    return statistics.median(times)


def once(function: Callable[[], object]) -> float:
    """Time of one call in seconds, by the clock of `seconds`."""
    if not torch.cuda.is_available():
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(function: Callable[[], object]) -> int:
    """Most memory that one call holds beyond what was held before: resident memory on Linux, allocations on CUDA."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device() -> torch.device:
    """Where the tables are measured: CUDA if there is any."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """One line for benchmarks/README.md: processor, threads, torch, date."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = f"{models[0].partition(': ')[2] if models else platform.processor()}, {torch.get_num_threads()} thread"
    return f"{name}; torch {torch.__version__}; {datetime.date.today().isoformat()}"
