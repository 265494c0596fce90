"""One vLLM API server for training: `python -m megatron_fipo.engines.server <options of vLLM's API server>`.

It is vLLM's own server with what a trainer needs always on: every route behind a token (FIPO_ROLLOUT_TOKEN), the
weight transports, token ids in and out, and no process left when its parent is gone. Runs start their own; start
it by hand, or under srun, for `rollout.addresses`.
"""

import os
import sys

from megatron_fipo.engines.access import TOKEN_VARIABLE
from megatron_fipo.engines.cache_counter import count_cache_use
from megatron_fipo.engines.early_server import EARLY_VARIABLE, PARENT_VARIABLE, wait_for_order
from megatron_fipo.engines.engine_process import keep_a_lone_worker_inside
from megatron_fipo.engines.lifeline import bind_descendants
from megatron_fipo.processes.ending import die_with_parent
from megatron_fipo.processes.leftovers import NAMES_VARIABLE, name_shared_memory

USAGE = f"""usage: {TOKEN_VARIABLE}=... megatron-fipo serve --model DIRECTORY --port PORT [vLLM's own options]

A rollout server for runs elsewhere, which name it in rollout.addresses=[http://HOST:PORT]. Every call needs the token
in {TOKEN_VARIABLE}, which runs read from the same variable. `vllm serve --help=all` lists vLLM's options."""
ALWAYS = (
    "--skip-tokenizer-init",
    "--tokens-only",
    "--middleware=megatron_fipo.engines.generate_route.GenerateRoute",
    "--middleware=megatron_fipo.engines.score_route.ScoreRoute",
    "--middleware=megatron_fipo.engines.use_route.UseRoute",
    # The last is the first to see a call: nothing is behind the token's back.
    "--middleware=megatron_fipo.engines.access.RequireToken",
    "--worker-extension-cls=megatron_fipo.engines.vllm_plugin.WorkerExtension",
    "--disable-uvicorn-access-log",
    "--disable-log-stats",
)

# vLLM forks its engine and worker processes, or spawns them; a spawned one imports this module as __mp_main__.
if __name__ == "__mp_main__":
    die_with_parent()
    if names := os.environ.get(NAMES_VARIABLE):
        name_shared_memory(names)
if __name__ in ("__main__", "__mp_main__"):
    bind_descendants()
if __name__ == "__mp_main__":
    count_cache_use()


def main() -> None:
    """Runs the server until it is told to stop."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(USAGE)
        return
    if parent := os.environ.get(PARENT_VARIABLE):
        die_with_parent(int(parent))
    # The routes of weight updates are behind this switch.
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    if os.environ.pop(EARLY_VARIABLE, None) and not wait_for_order():
        return
    if not os.environ.get(TOKEN_VARIABLE):
        sys.exit(f"{TOKEN_VARIABLE} is not set: without a token anyone who reaches the port could change the weights")
    if names := os.environ.get(NAMES_VARIABLE):
        name_shared_memory(names)
    sys.argv[1:] = [*sys.argv[1:], *ALWAYS]
    keep_a_lone_worker_inside()
    count_cache_use()

    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    main()
