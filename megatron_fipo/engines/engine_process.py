"""A CPU engine of one worker as one process, forked from its API server.

vLLM spawns a CPU engine, and the engine its worker: each imports vLLM anew, after the other, and the two hand every
step through shared memory that they watch in busy loops. With CUDA it forks the engine and keeps a lone worker inside.
Here a CPU engine does the same: a server starts in half the processor time, samples in three quarters of it, and takes
two thirds of the memory.
"""

import os
from typing import Any


def keep_a_lone_worker_inside() -> None:
    """Have an engine that this process starts be so, if it runs on a CPU with one worker."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    platform: Any = type(current_platform)
    settle = platform.check_and_update_config

    def settle_and_keep(config: Any) -> None:
        # "uni" is what vLLM chooses for one worker; its CPU platform makes "mp" of it, to bind the worker to cores
        # through its environment. Ours are bound to none, and their number of threads is in the server's environment.
        chosen = config.parallel_config.distributed_executor_backend
        settle(config)
        if chosen == "uni":
            config.parallel_config.distributed_executor_backend = chosen
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    platform.check_and_update_config = staticmethod(settle_and_keep)
