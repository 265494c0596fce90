"""The CUDA kernel of the suffix scan against the torch path, in Triton's interpreter where there is no GPU.

Why: a kernel with a wrong carry is off only beyond its first block. The interpreter runs the kernel's own code on CPU
tensors. Not covered: what the compiler makes of it; tests/gpu/test_kernels.py runs that. Without Triton, which the CPU
environment does not ask for, this is skipped.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed; it comes with torch for CUDA")
def test_the_kernel_equals_the_torch_path() -> None:
    """In a process of its own: Triton decides whether to interpret when it is first imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.algorithm.triton_scan_worker"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1e-5
