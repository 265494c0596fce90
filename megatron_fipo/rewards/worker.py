"""The verifier's child process: reads batches of responses from its socket, writes one verdict a line.

    python -m megatron_fipo.rewards.worker SOCKET_FD RULE MATH_TOLERANCE

A process of its own, not a fork and not multiprocessing's spawn, which would import the trainer's main module and torch
with it. JSON lines both ways. A request is a list of {text, ground_truth, extra}; for each item in turn one line
comes back: {accuracy, answer, outcome}, or {error} where the rule raised.
"""

import ctypes
import json
import logging
import os
import resource
import signal
import socket
import sys
from typing import Any

from megatron_fipo.config.loop import VERIFIER_MEMORY_GIB
from megatron_fipo.rewards.rules import Rule, prepare

_MEMORY_LIMIT_BYTES = VERIFIER_MEMORY_GIB << 30
_PR_SET_PDEATHSIG = 1


def judge(rule: Rule, item: dict[str, Any]) -> dict[str, Any]:
    """One item's result line. Every exception of the rule is reported as such, RecursionError and MemoryError too."""
    try:
        verdict = rule(item["text"], item["ground_truth"], item["extra"])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"accuracy": verdict.accuracy, "answer": verdict.answer, "outcome": verdict.outcome}


def serve(connection: socket.socket, rule: Rule) -> None:
    """Judges until the other end closes."""
    connection.sendall(b'{"ready": true}\n')
    for line in connection.makefile("rb"):
        for item in json.loads(line):
            connection.sendall(json.dumps(judge(rule, item)).encode() + b"\n")


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
            serve(connection, prepare(rule_name, math_tolerance))
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)


if __name__ == "__main__":
    main()
