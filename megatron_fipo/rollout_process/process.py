"""The rollout process: servers, verifiers, collector and the store of samples, beside the trainer's rank 0.

Rank 0 starts it before it imports torch itself, and gives it the configuration on its standard input, which stays open:
its end is rank 0's end. The kernel ends this process with rank 0 too, and servers and verifiers with this one, so
nothing stays behind however either ends. It needs no torch.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time

import msgspec

from megatron_fipo.config import Config
from megatron_fipo.engines.early_server import PARENT_VARIABLE, start_early
from megatron_fipo.processes.ending import die_with_parent, terminate_on_sigterm
from megatron_fipo.processes.interrupt import CtrlC

LEAVE_S = 30.0
"""Longest time between rank 0's end and this process's."""


def main() -> None:
    """Be the rollout process until rank 0 closes it or ends."""
    die_with_parent(int(os.environ.pop(PARENT_VARIABLE)))
    terminate_on_sigterm()
    CtrlC(is_led=True).begin()  # a Ctrl-C is rank 0's to hear
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=Config)
    threading.Thread(target=_end_with_rank_0, name="lifeline", daemon=True).start()
    start_early(config.rollout)
    # After the server's process has begun, whose start takes longest.
    from megatron_fipo.rollout.store_server import TokenServer
    from megatron_fipo.rollout_process.calls import Desk

    desk = Desk(config)
    listener = socket.create_server(("127.0.0.1", 0))
    server = TokenServer(desk, listener, f"127.0.0.1:{listener.getsockname()[1]}", name="calls")
    # Whatever else prints goes where rank 0's own output goes.
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        answer.write(msgspec.json.encode(server.address) + b"\n")
    desk.run()
    server.close()


def _end_with_rank_0() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):  # not sys.stdin, whose lock this thread would hold when the interpreter ends
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEAVE_S)
    os._exit(1)


if __name__ == "__main__":
    main()
