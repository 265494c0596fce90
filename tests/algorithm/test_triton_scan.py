"""The CUDA kernel of the suffix scan against the torch path, in Triton's interpreter where there is no GPU.

Why: a kernel with a wrong carry is off only beyond its first block. The interpreter runs the kernel's own code on CPU
tensors. Not covered: what the compiler makes of it; tests/gpu/test_kernels.py runs that. Without Triton, which the CPU
environment does not ask for, this is skipped.
"""

from importlib.util import find_spec

import pytest

from tests.triton_interpreter import run_interpreted


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed; it comes with torch for CUDA")
def test_the_kernel_equals_the_torch_path() -> None:
    assert run_interpreted("tests.algorithm.triton_scan_worker") < 1e-5
