"""The process inside of the sandbox: runs a program on each test, in a child with limits, and tells what came out.

    python -I -S -c THIS_TEXT

Only its text is known there, so it imports the standard library alone. A request comes by standard input: {program,
function, inputs, cpu_s, total_s, memory_bytes, output_bytes, file_bytes, processes}. The first line back is
{ready: true}, which says that the sandbox stands: whatever happens later is the program's doing. Then there is a line
{end, output} for each test. It never knows what outputs are right, so no program can read them.

As process 1 of its namespace it gets no signal that it has not asked for, and ends what a test leaves behind.
"""

import atexit
import bisect
import builtins
import collections
import contextlib
import ctypes
import errno
import functools
import gc
import heapq
import itertools
import json
import math
import os
import random
import re
import resource
import select
import signal
import string
import struct
import sys
import threading
import time
import types
import typing
from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_LONGEST_PIECE = 1 << 16
_KNOWN = (string, re, collections, heapq, bisect, math, random, itertools, functools, typing)
"""Modules that programs may use without an import, and their names too, of which a later module's wins."""
_RECURSION = 50_000
_CLONE_NEWUSER = 0x10000000
_FORBIDDEN = {"x86_64": (0xC000003E, (272, 251)), "aarch64": (0xC00000B7, (97, 30))}
"""By machine: the kernel's number of it, and of the calls unshare and ioprio_set."""
_SET_PRIORITY = {"x86_64": 141, "aarch64": 140}
_OF_ITSELF = {"x86_64": (302, 203, 144, 142, 314), "aarch64": (261, 122, 119, 118, 274)}
"""Calls whose first argument is a process: prlimit64, sched_setaffinity, _setscheduler, _setparam and _setattr."""
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_OTHER_NUMBERS = 0x40000000
"""From here on, the same calls once more, in the x32 form of x86-64."""


def main() -> None:
    """Entry point."""
    request = json.loads(sys.stdin.buffer.read())
    # Otherwise a program, which has the same user, could attach to this process and write its results.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _tell({"ready": True})
    end = time.monotonic() + request["total_s"]
    for test in request["inputs"]:
        left = end - time.monotonic()
        if left <= 0:
            _tell({"end": "total time", "output": ""})
        else:
            _tell(_run(request, test, min(left, 2 * request["cpu_s"] + 1)))


def _tell(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _run(request: dict[str, Any], test: Any, wall_s: float) -> dict[str, Any]:
    """One test's {end, output}; nothing that it has started is left."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        _become_program(request, test, writes)
    os.close(writes)
    watched = os.pidfd_open(child)
    output, end = _watch(reads, watched, time.monotonic() + wall_s, request["output_bytes"])
    status = _end_all(child)
    os.close(reads)
    os.close(watched)
    end = end or _reason(status)
    return {"end": end, "output": output.decode(errors="replace") if end == "exit 0" else ""}


def _watch(reads: int, watched: int, deadline: float, most: int) -> tuple[bytes, str]:
    """What the child writes until it ends, and why it has to be ended: time, output, or empty where it has ended."""
    output, waits_for = b"", [reads, watched]
    while True:
        left = deadline - time.monotonic()
        ready, _, _ = select.select(waits_for, [], [], max(left, 0))
        # Also where something is readable: a program that goes on writing has no more time than another.
        if not ready or left <= 0:
            return output, "time"
        if reads in ready:
            piece = os.read(reads, _LONGEST_PIECE)
            output += piece
            if len(output) > most:
                return output, "output"
            if not piece:
                waits_for.remove(reads)
        else:
            return output, ""


def _reason(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit {code}"
    return "CPU time" if -code in (signal.SIGXCPU, signal.SIGKILL) else f"signal {-code}"


def _end_all(child: int) -> int:
    """Kill the child and all that it has started; returns the child's wait status."""
    with contextlib.suppress(ProcessLookupError):
        if os.getpid() == 1:
            os.kill(-1, signal.SIGKILL)  # everything in the namespace but this process
        else:
            os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ChildProcessError):
        while os.getpid() == 1:
            os.waitpid(-1, 0)
    return status


def _become_program(request: dict[str, Any], test: Any, writes: int) -> None:
    """In the child: never returns."""
    code = 1
    try:
        # Without a namespace of its own, nothing else ends it if this runner is killed.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.setsid()
        request["inputs"].clear()  # neither the memory nor the tests to come are the program's
        is_call = request["function"] is not None
        given = os.memfd_create("input")
        with open(given, "wb", closefd=False) as file:
            file.write(b"" if is_call else test.encode(errors="surrogatepass"))
        os.lseek(given, 0, os.SEEK_SET)
        nowhere = os.open("/dev/null", os.O_WRONLY)
        os.dup2(given, 0)
        os.dup2(nowhere if is_call else writes, 1)
        os.dup2(nowhere, 2)
        os.dup2(writes, 3)
        os.closerange(4 if is_call else 3, 1 << 16)
        _limit(request)
        _filter_calls()
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        # Programs for fast output write to these.
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
        sys.argv = ["program.py"]
        # What Python's module `site` adds, which is left out here since it takes as long as the rest of the start.
        vars(builtins).update(exit=sys.exit, quit=sys.exit)
        code = _execute(request, test)
    except BaseException:  # the program's failure is its exit code
        code = 1
    finally:
        os._exit(code)


def _limit(request: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_CPU: int(request["cpu_s"] + 0.999),
        resource.RLIMIT_AS: request["memory_bytes"],
        resource.RLIMIT_FSIZE: request["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if os.getppid() == 1:
        # The kernel counts the processes of this user namespace, and the parent is one of them.
        limits[resource.RLIMIT_NPROC] = request["processes"] + 1
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
    # Deep recursion through code in C, such as a cache, takes stack. What the program starts gives each thread address
    # space for as much, so it may not be all.
    stack, hard = max(request["memory_bytes"] // 4, 8 << 20), resource.getrlimit(resource.RLIMIT_STACK)[1]
    if hard != resource.RLIM_INFINITY:
        stack = min(stack, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, hard))


def _filter_calls() -> None:
    """From here on, refuse system calls by which a program could harm the runner or get capabilities.

    The kernel lets it change limits and priority of a process of the same user, as the runner is; and all capabilities
    come with a user namespace. A kernel without filters, or another machine, goes without.
    """
    program = _call_filter(os.uname().machine, os.getpid())
    if program:
        libc, code = ctypes.CDLL(None), ctypes.create_string_buffer(program)
        header = struct.pack("HP", len(program) // 8, ctypes.addressof(code))
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0)


def _call_filter(machine: str, itself: int) -> bytes:
    """The filter as the kernel's instructions of 8 bytes: code, jumps if true and if false, operand. Empty: none."""
    if machine not in _CLONE:
        return b""
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    number, kind, first, second = 0, 4, 16, 24  # places in what the filter reads; of arguments, the lower halves
    refuse, unknown, allow = (
        (end, 0, 0, value) for value in (0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x7FFF0000)
    )
    architecture, forbidden = _FORBIDDEN[machine]
    found = [(load, 0, 0, kind), (equal, 1, 0, architecture), refuse, (load, 0, 0, number)]
    found += [(at_least, 0, 1, _OTHER_NUMBERS), refuse]
    for call in forbidden:
        found += [(equal, 0, 1, call), refuse]
    for call in _OF_ITSELF[machine]:  # where the process is 0, it is the caller
        found += [(equal, 0, 5, call), (load, 0, 0, first), (equal, 2, 0, 0), (equal, 1, 0, itself), refuse, allow]
    # Of a process, not a group or a user, and of the caller itself: os.nice.
    found += [(equal, 0, 6, _SET_PRIORITY[machine]), (load, 0, 0, first), (equal, 0, 2, 0)]
    found += [(load, 0, 0, second), (equal, 1, 0, 0), refuse, allow]
    # A filter cannot read where clone3 has its flags. Without it, the C library takes clone.
    found += [(equal, 0, 1, _CLONE3), unknown]
    found += [(equal, 0, 3, _CLONE[machine]), (load, 0, 0, first), (any_bit, 0, 1, _CLONE_NEWUSER), refuse, allow]
    return b"".join(struct.pack("HBBI", *each) for each in found)


def _execute(request: dict[str, Any], test: Any) -> int:
    """Run the program; a call's result goes to descriptor 3. Returns the exit code."""
    # A call's module has another name: what its program does as the main one, such as reading its input, is no part.
    module = types.ModuleType("__main__" if request["function"] is None else "program")
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    names = vars(module)
    names.update(_known_names())
    sys.setrecursionlimit(_RECURSION)
    code: Any = 0
    try:
        exec(compile(request["program"], "program.py", "exec"), names)
        if request["function"] is not None:
            owner = names.get("Solution")
            call = names[request["function"]] if owner is None else getattr(owner(), request["function"])
            result = json.dumps(call(*test)).encode()
            while result:
                result = result[os.write(3, result) :]
    except SystemExit as error:
        code = error.code
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    _finish(names)
    return code if isinstance(code, int) else int(code is not None)


def _known_names() -> dict[str, Any]:
    """What is there without an import, as in LiveCodeBench: starter code has `List[int]` of typing, for example."""
    names: dict[str, Any] = {}
    for module in _KNOWN:
        public = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
        # A function of the language is not replaced: math.pow has no third argument.
        names |= {name: getattr(module, name) for name in public if not hasattr(builtins, name)}
    return names | {module.__name__: module for module in _KNOWN} | {"sys": sys}


def _finish(names: dict[str, Any]) -> None:
    """Write out what the program has in buffers, in the order in which Python ends."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    names.clear()  # closes its files
    gc.collect()
    for stream in (sys.stdout, sys.__stdout__):
        if stream is not None and not stream.closed:
            stream.flush()


if __name__ == "__main__":
    main()
