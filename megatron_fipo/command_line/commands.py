"""The command that a user typed, which ranks are told, and the command that resumes a run."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

_VARIABLE = "FIPO_COMMAND"
_PLAIN = re.compile(r"[\w./-]+")
FROM_PYTHON = "run(config)"
"""Shown instead of a command if a run was started from Python."""


def typed_command() -> list[str]:
    """Return the command that the user typed to start this run. A process of ours passes it to those that it starts."""
    told = os.environ.get(_VARIABLE)
    return json.loads(told) if told else [program(), "train", *sys.argv[1:]]


def environment(command: Sequence[str]) -> dict[str, str]:
    """Return the environment variables that tell a process of ours which command was typed."""
    return {_VARIABLE: json.dumps(list(command))}


def program() -> str:
    """Return how to call this package's command on this machine."""
    installed = shutil.which("megatron-fipo")
    if installed and Path(installed).parent == Path(sys.executable).parent:
        return "megatron-fipo"
    return f"{sys.executable} -m megatron_fipo"


def going_on(run_directory: Path) -> str:
    """Return the command that resumes the run in this directory."""
    first, *others = typed_command()
    if first == FROM_PYTHON:
        return f"{FROM_PYTHON} with config.run.directory = {str(run_directory)!r}"
    overrides = [text for text in others if not text.startswith("run.directory=")]
    return f"{first} {shlex.join([*overrides, override('run.directory', str(run_directory))])}"


def override(key: str, text: str) -> str:
    """Return an override that sets a key to a text, quoted for Hydra if necessary."""
    if _PLAIN.fullmatch(text):
        return f"{key}={text}"
    quoted = text.replace("'", "\\'")
    return f"{key}='{quoted}'"
