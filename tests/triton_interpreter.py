"""Runs a module whose Triton kernels are interpreted on the CPU."""

import os
import subprocess
import sys

from tests.distributed import ROOT


def run_interpreted(module: str) -> float:
    """The number in the last line that the module prints.

    In a process of its own: Triton decides whether to interpret when it is first imported.
    """
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])
