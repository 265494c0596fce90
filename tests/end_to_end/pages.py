"""A page of the documents followed as it stands: its code blocks, and its command as a shell runs it."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def block(page: str, language: str, number: int = 0) -> str:
    """The page's code block of that language and number."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[number]


def run(page: str, directory: Path, overrides: Sequence[str], token: str = "") -> subprocess.CompletedProcess[str]:
    """The page's first command with a few keys more, as a shell in that directory runs it; `token` is for servers."""
    command = " ".join([block(page, "sh").strip(), *map(shlex.quote, overrides)])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "FIPO_ROLLOUT_TOKEN": token}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
