"""The command that a user typed, which ranks are told, and what to type so that a run goes on."""

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
"""Stands for the command where a run was started from Python."""


def typed_command() -> list[str]:
    """What was typed to start this run: that of whoever started this process, if it was one of ours."""
    told = os.environ.get(_VARIABLE)
    return json.loads(told) if told else [program(), "train", *sys.argv[1:]]


def environment(command: Sequence[str]) -> dict[str, str]:
    """What tells a process of ours the command that was typed."""
    return {_VARIABLE: json.dumps(list(command))}


def program() -> str:
    """How this package's command can be typed here."""
    installed = shutil.which("megatron-fipo")
    if installed and Path(installed).parent == Path(sys.executable).parent:
        return "megatron-fipo"
    return f"{sys.executable} -m megatron_fipo"


def going_on(run_directory: Path) -> str:
    """What to type so that the run in this directory goes on."""
    first, *others = typed_command()
    if first == FROM_PYTHON:
        return f"{FROM_PYTHON} with config.run.directory = {str(run_directory)!r}"
    overrides = [text for text in others if not text.startswith("run.directory=")]
    return f"{first} {shlex.join([*overrides, override('run.directory', str(run_directory))])}"


def override(key: str, text: str) -> str:
    """A key of the configuration with a text as its value, quoted for Hydra where that has to be."""
    if _PLAIN.fullmatch(text):
        return f"{key}={text}"
    quoted = text.replace("'", "\\'")
    return f"{key}='{quoted}'"
