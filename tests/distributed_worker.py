"""The process behind tests/distributed.py: imports a function's module, forks the ranks and waits for them.

With CUDA the ranks import it.
"""

import importlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> int:
    """Run the ranks; 1 as soon as one fails, whose number and status are left in the file `failed`."""
    function_name, world_size, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    arguments = json.load(sys.stdin)
    if not _has_cuda():
        _resolve(function_name)
    os.environ |= {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks = {_fork_rank(function_name, arguments, rank, directory): rank for rank in range(world_size)}
    while ranks:
        process_id, wait_status = os.wait()
        rank = ranks.pop(process_id)
        status = os.waitstatus_to_exitcode(wait_status)
        if status != 0:
            (directory / "failed").write_text(f"{rank} {status}")
            return 1
    return 0


def _has_cuda() -> bool:
    """Whether each rank has to import for itself: a process whose libraries have looked at a GPU cannot be forked."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # by which asking is no looking
    import torch

    return torch.cuda.is_available()


def _resolve(function_name: str) -> Callable[..., Any]:
    module, name = function_name.split(":")
    return getattr(importlib.import_module(module), name)


def _fork_rank(function_name: str, arguments: dict[str, Any], rank: int, directory: Path) -> int:
    process_id = os.fork()
    if process_id:
        return process_id
    status = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = os.open(directory / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        result = _resolve(function_name)(**arguments)
        partial = directory / f"rank-{rank}.partial"
        partial.write_text(json.dumps(result))
        partial.rename(directory / f"rank-{rank}.json")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
