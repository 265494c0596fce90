"""The verifier's child process: reads batches of responses from its socket, writes one verdict a line.

    python -m megatron_fipo.rewards.worker SOCKET_FD RULE MATH_TOLERANCE

A process of its own, not a fork and not multiprocessing's spawn, which would import the trainer's main module and torch
with it. JSON lines both ways. The first one back is {inputs}, what the rule wants to know of a response, or {refused,
remedy}. A request is a list of objects with these inputs; for each in turn one line comes back: {accuracy, answer,
outcome, reward, extra}, or {error, traceback} where the rule raised.
"""

import ctypes
import dataclasses
import json
import logging
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from megatron_fipo.config.loop import VERIFIER_MEMORY_GIB, own_rule
from megatron_fipo.errors import ConfigError, one_line
from megatron_fipo.rewards import own, rules
from megatron_fipo.rewards.rules import Verdict

Judge = Callable[[dict[str, Any]], Verdict]
_MEMORY_LIMIT_BYTES = VERIFIER_MEMORY_GIB << 30
_PR_SET_PDEATHSIG = 1
_LONGEST_TRACEBACK = 8000


def load(rule: str, math_tolerance: float) -> tuple[Judge, tuple[str, ...]]:
    """The rule of a configuration, and the inputs that it wants. Raises ConfigError."""
    if (place := own_rule(rule)) is not None:
        found = own.load(*place)
        return found, found.inputs
    shipped = rules.prepare(rule, math_tolerance)
    return lambda item: shipped(item["response"], item["ground_truth"], item["extra"]), rules.INPUTS


def judge(rule: Judge, item: dict[str, Any]) -> dict[str, Any]:
    """One item's result line. Every exception of the rule is reported as such, RecursionError and MemoryError too."""
    try:
        return dataclasses.asdict(rule(item))
    except own.BadReward as error:
        return {"error": str(error)}
    except (Exception, SystemExit) as error:
        inside = error.__traceback__
        while inside is not None and inside.tb_frame.f_code.co_filename in (__file__, own.__file__):
            inside = inside.tb_next  # these frames are not the rule's
        text = "".join(traceback.format_exception(type(error), error, inside))
        return {"error": one_line(error), "traceback": text[-_LONGEST_TRACEBACK:]}


def serve(connection: socket.socket, rule: Judge) -> None:
    """Judges until the other end closes."""
    for line in connection.makefile("rb"):
        for item in json.loads(line):
            _send(connection, judge(rule, item))


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _tie_life_to_parent() -> None:
    """Dies with the parent even in the middle of a check; the closing socket alone ends only an idle worker."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ctrl-C reaches the whole process group; how the run ends is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main() -> None:
    """Entry point; the file descriptor is inherited from VerifierProcess."""
    descriptor, rule_name, math_tolerance = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    _tie_life_to_parent()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
    logging.disable(logging.CRITICAL)
    with socket.socket(fileno=descriptor) as connection:
        try:
            try:
                rule, inputs = load(rule_name, math_tolerance)
            except ConfigError as error:
                _send(connection, {"refused": error.problem, "remedy": error.remedy})
                return
            _send(connection, {"inputs": inputs})
            serve(connection, rule)
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)


if __name__ == "__main__":
    main()
