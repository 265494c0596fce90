"""The order of commands that installs this on a machine with GPUs: the one place that has it.

README.md, docs/gpu.md, the files of containers/ and what doctor advises are held to it by tests/test_containers.py.
"""

CONSTRAINED = "pip install -c constraints.txt"
CUDA_INSTALL = (
    f"{CONSTRAINED} torch setuptools packaging ninja",
    f"{CONSTRAINED} --no-build-isolation -e '.[cuda]'",
)
"""torch first: Transformer Engine is compiled against the torch that is installed, so without pip's isolated builds,
and with what its build itself takes."""
