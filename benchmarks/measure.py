"""Measure times and peak memory, and describe the machine, for all benchmarks."""

import ctypes
import datetime
import platform
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch


def seconds(function: Callable[[], object], least: float = 1.0) -> float:
    """Return the median time of one call, over as many calls as fit into `least` seconds.

    There are at least three calls, unless one takes longer. On a CPU this is the CPU time of this process, so that
    other processes do not count. With CUDA it is the device's time.
    """
    times: list[float] = []
    while sum(times) < least or (len(times) < 3 and times[0] < least):
        times.append(once(function))
    return statistics.median(times)


def once(function: Callable[[], object]) -> float:
    """Return the time of one call in seconds, measured as in `seconds`."""
    if not torch.cuda.is_available():
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def in_pairs(step: Callable[[bool], object], count: int) -> str:
    """Return cells of a table: median seconds of step(False) and of step(True), and the second by the first, quartiles.

    There are `count` pairs, of which the first warms up; which of the two comes first changes from pair to pair.
    """
    times: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(count):
        for which in (True, False) if pair % 2 else (False, True):
            times[which].append(once(partial(step, which)))
    without, with_it = (times[which][1:] for which in (False, True))
    low, middle, high = statistics.quantiles([one / other for one, other in zip(with_it, without, strict=True)], n=4)
    medians = f"{statistics.median(without):.3f} | {statistics.median(with_it):.3f}"
    return f"{medians} | {middle:.3f} ({low:.3f} … {high:.3f})"


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the peak memory of one call, in addition to what was held before: resident memory, or CUDA allocations."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present value
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device() -> torch.device:
    """Return the device of the measurements: CUDA if there is a GPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """Return one line for benchmarks/README.md: processor, threads, torch, date."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = f"{models[0].partition(': ')[2] if models else platform.processor()}, {torch.get_num_threads()} thread"
    return f"{name}; torch {torch.__version__}; {datetime.date.today().isoformat()}"
