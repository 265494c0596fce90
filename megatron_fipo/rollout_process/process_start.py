"""Starts the rollout process, before rank 0 imports what it needs itself."""

import os
import subprocess
import sys

import msgspec

from megatron_fipo.config import Config
from megatron_fipo.engines.early_server import PARENT_VARIABLE


def start_rollout_process(config: Config) -> "subprocess.Popen[bytes]":
    """Start the rollout process of a run, which begins to import what it needs; in the main thread."""
    process = subprocess.Popen(
        # The run's directory is for whoever lists processes.
        [sys.executable, "-m", "megatron_fipo.rollout_process.process", config.run.directory],
        env=os.environ | {PARENT_VARIABLE: str(os.getpid())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # a terminal's Ctrl-C is rank 0's to hear
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(config) + b"\n")
    process.stdin.flush()
    return process
