"""The commands that install this package on a machine with GPUs, in order.

tests/test_containers.py checks that README.md, docs/gpu.md, containers/ and doctor's advice have the same commands.
"""

CONSTRAINED = "pip install -c constraints.txt"
CUDA_INSTALL = (
    f"{CONSTRAINED} torch setuptools packaging ninja",
    f"{CONSTRAINED} --no-build-isolation -e '.[cuda]'",
)
"""torch comes first, since Transformer Engine is compiled against the installed torch. So pip's build isolation is off,
and the packages that the build needs are installed too."""
