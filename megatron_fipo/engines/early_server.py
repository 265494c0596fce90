"""A server process that imports vLLM, which takes most of its start, before it is known what it will serve.

The rollout process starts it while rank 0 imports torch and Megatron-Core: both are then done in the time of one.
Until it is told what to serve it makes no file, takes no port, and ends with the process that started it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_fipo.config import RolloutConfig
from megatron_fipo.config.checks_machine import has_cuda_driver
from megatron_fipo.engines.server_options import server_environment

EARLY_VARIABLE = "FIPO_EARLY_SERVER"
PARENT_VARIABLE = "FIPO_PARENT_PID"
"""The process with which a server ends."""
_waiting: list[subprocess.Popen[bytes]] = []


def start_early(config: RolloutConfig) -> None:
    """Start the first server's process of a run, where it is to run on this machine's CPU; in the main thread."""
    if config.addresses or has_cuda_driver():
        return
    environment = server_environment(config, None) | {EARLY_VARIABLE: "1", PARENT_VARIABLE: str(os.getpid())}
    _waiting.append(
        subprocess.Popen(
            [sys.executable, "-m", "megatron_fipo.engines.server"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    )


def take_early(arguments: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes] | None:
    """The process that waits, told what to serve; None if there is none, or if it has failed."""
    if not _waiting:
        return None
    process = _waiting.pop()
    assert process.stdin is not None
    order = {"arguments": arguments, "environment": environment, "log": str(log)}
    try:
        with process.stdin as pipe:
            pipe.write(json.dumps(order).encode() + b"\n")
    except OSError:  # it has ended, and one that is started in its place will say why
        return None
    return process if process.poll() is None else None


def wait_for_order() -> bool:
    """In the process: import vLLM, then become the server that it is told to be. False if it is told nothing."""
    import vllm.entrypoints.launchers.api_server.routers
    import vllm.v1.engine.async_llm
    import vllm.v1.worker.cpu_worker  # noqa: F401

    line = sys.stdin.readline()
    if not line:
        return False
    order: dict[str, Any] = json.loads(line)
    with open(order["log"], "ab") as log, open(os.devnull) as nothing:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        os.dup2(nothing.fileno(), 0)
    os.environ.update(order["environment"])
    sys.argv[1:] = order["arguments"]
    return True
