"""The child's end of a worker process: reads batches of items from its socket, writes an answer a line.

A process of its own, not a fork and not multiprocessing's spawn, which would import the trainer's main module and torch
with it. JSON lines both ways. The first one back is the greeting, or {key, refused, remedy}. A request is a list of
items; for each in turn one line comes back: what the code made of it, or {error, traceback} where it raised.
"""

import ctypes
import json
import logging
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Collection
from typing import Any

from megatron_fipo.errors import ConfigError, one_line

Item = dict[str, Any]
Answer = Callable[[Item], dict[str, Any]]
_PR_SET_PDEATHSIG = 1
_LONGEST_TRACEBACK = 8000


def raised(error: BaseException, ours: Collection[str]) -> dict[str, str]:
    """The answer of code that raised. Frames in our own files, by their `__file__`, are left out of the traceback."""
    inside = error.__traceback__
    while inside is not None and inside.tb_frame.f_code.co_filename in ours:
        inside = inside.tb_next
    text = "".join(traceback.format_exception(type(error), error, inside))
    return {"error": one_line(error), "traceback": text[-_LONGEST_TRACEBACK:]}


def run(descriptor: int, memory_bytes: int, prepare: Callable[[], tuple[dict[str, Any], Answer]]) -> None:
    """Work until the other end closes.

    Args:
        descriptor: of the socket, inherited from WorkerProcess.
        memory_bytes: most that this process may use.
        prepare: gives the greeting and what answers an item, or raises ConfigError.
    """
    _tie_life_to_parent()
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    logging.disable(logging.CRITICAL)
    with socket.socket(fileno=descriptor) as connection:
        try:
            try:
                greeting, answer = prepare()
            except ConfigError as error:
                _send(connection, {"key": error.key, "refused": error.problem, "remedy": error.remedy})
                return
            _send(connection, greeting)
            for line in connection.makefile("rb"):
                for item in json.loads(line):
                    _send(connection, answer(item))
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _tie_life_to_parent() -> None:
    """Dies with the parent even in the middle of its work; the closing socket alone ends only an idle worker."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ctrl-C reaches the whole process group; how the run ends is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
