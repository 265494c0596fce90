"""Why: `with torch.device("meta")` after `install` once built models in real memory, 122 GB of them in a test.

Not covered: the other redirects, which every test of the policy's layouts goes through.
"""

import subprocess
import sys

import pytest

BUILD = """
import torch
{before}
with torch.device("meta"):
    print({{getattr(torch, name)(3).device.type for name in ("empty", "zeros", "ones")}})
"""
INSTALL = "from megatron_fipo.policy import platform; platform.install()"
REPLACE = """
for name in ("empty", "zeros", "ones"):
    setattr(torch, name, lambda size, made=getattr(torch, name): made(size))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("before", "device"), [(INSTALL, "meta"), (REPLACE, "cpu")], ids=["install", "control"])
def test_the_meta_device_still_holds_after_an_install(before: str, device: str) -> None:
    """In a process of its own, since torch notes its factories once. The control replaces them as `install` did."""
    command = [sys.executable, "-W", "ignore", "-c", BUILD.format(before=before)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.strip() == str({device})
