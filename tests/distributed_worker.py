"""The process behind tests/distributed.py: imports a module once, and forks ranks from itself at every request.

With CUDA the ranks import it. A request is a line of JSON on standard input. The answers, on what was standard output,
are lines too: `ready` once, and for each request the number of the process group of its ranks, and its exit status.
"""

import contextlib
import importlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve requests until there are no more."""
    # Whatever an import prints is output, and no answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if not _has_cuda():
        importlib.import_module(sys.argv[1])
    print("ready", file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        process_id = os.fork()
        if process_id == 0:
            os.setpgid(0, 0)
            answers.close()
            os._exit(_run_to_the_end(**request))
        with contextlib.suppress(OSError):  # it has done so itself, or ended
            os.setpgid(process_id, process_id)
        print(process_id, file=answers)
        _, status = os.waitpid(process_id, 0)
        print(os.waitstatus_to_exitcode(status), file=answers)


def _has_cuda() -> bool:
    """Whether each rank has to import for itself: a process whose libraries have looked at a GPU cannot be forked."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # by which asking is no looking
    import torch

    return torch.cuda.is_available()


def _run_to_the_end(function: str, world_size: int, arguments: dict[str, Any], directory: str) -> int:
    """Run the ranks; 1 as soon as one fails, whose number and status are left in the file `failed`."""
    os.environ |= {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks = {_fork_rank(function, arguments, rank, Path(directory)): rank for rank in range(world_size)}
    while ranks:
        process_id, wait_status = os.wait()
        rank = ranks.pop(process_id)
        status = os.waitstatus_to_exitcode(wait_status)
        if status != 0:
            Path(directory, "failed").write_text(f"{rank} {status}")
            return 1
    return 0


def _resolve(function_name: str) -> Callable[..., Any]:
    module, name = function_name.split(":")
    return getattr(importlib.import_module(module), name)


def _fork_rank(function: str, arguments: dict[str, Any], rank: int, directory: Path) -> int:
    process_id = os.fork()
    if process_id:
        return process_id
    status = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(directory / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        result = _resolve(function)(**arguments)
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
    main()
