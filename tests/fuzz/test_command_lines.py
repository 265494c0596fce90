"""Why: whatever a user writes on the command line or into a YAML file, the answer is one line that names the key.

Not covered: Hydra's own flags, whose mistakes argparse answers in its words.
"""

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import Config, every_setting
from megatron_fipo.config.configure import configuration_directory
from megatron_fipo.config.settings import is_in_range
from tests.fuzz.budget import cases, every_case
from tests.fuzz.command_lines import GROUPS, KEYS, LINES, SECTIONS, command_line, entered
from tests.fuzz.mutators import damaged

pytestmark = pytest.mark.slow


def outcome(arguments: list[str]) -> str:
    """ "refused" in one line, or "accepted" with all values in their ranges; anything else fails the test."""
    code, lines, config = entered(arguments)
    others = [line for line in lines if not line.startswith("warning: ")]
    if config is None:
        assert (code, len(others)) == (2, 1), (code, others)
        assert others[0].startswith("error: ") and others[0].isprintable() and len(others[0]) < 2000, others
        # As far as it is a key and as a terminal shows it.
        key = re.split(r"[\\=:…]", others[0].removeprefix("error: "))[0].strip()
        key = re.sub(r"\[\d+\]$", "", key)  # an item of a list
        # Of a file as a whole Hydra says "configuration"; then its name follows.
        said = [*arguments, *KEYS, *SECTIONS, *GROUPS, "command line"]
        is_a_file = key.split("/")[0] in GROUPS or "mine" in others[0] or key.startswith("configuration of ")
        assert is_a_file or any(key in text for text in said), others
        return "refused"
    assert (code, others) == (0, []), (code, others)
    for key, entry in every_setting():
        value = _value(config, key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert is_in_range(value, entry.metadata), (key, value)
    for key, text in (argument.split("=", 1) for argument in arguments if "=" in argument):
        if key in KEYS and re.fullmatch(r"-?[0-9]{1,9}", text) and f"{key}=" not in "".join(arguments[1:]):
            assert float(_value(config, key)) == float(text), (key, text)
    return "accepted"


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name) if value is not None else None
    return value


@cases(seeded=60, campaign=2000)
def test_mistyped_command_lines_are_refused_in_one_line(
    rng: random.Random, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    outcomes: Counter[str] = Counter()
    with every_case() as case:
        for _ in range(count):
            arguments = command_line(rng)
            with case(arguments):
                outcomes[outcome(arguments)] += 1
    assert outcomes["refused"] > count / 2 and outcomes["accepted"] > 0, outcomes


def spoilt_experiment(rng: random.Random) -> bytes:
    """The experiment `tiny`, or a line of it, with damage or with a line that YAML or Hydra takes amiss."""
    sound = (configuration_directory() / "experiment" / "tiny.yaml").read_text()
    if rng.random() < 0.4:
        return damaged(sound.encode(), rng)
    lines = sound.splitlines()
    lines[rng.randrange(len(lines))] = rng.choice(LINES)
    return "\n".join(lines).encode()


@cases(seeded=40, campaign=500)
def test_spoilt_yaml_files_are_refused_in_one_line(rng: random.Random, count: int, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    path = tmp_path / "experiment" / "mine.yaml"
    outcomes: Counter[str] = Counter()
    with every_case() as case:
        for _ in range(count):
            path.write_bytes(spoilt_experiment(rng))
            with case(path.read_bytes()):
                outcomes[outcome([f"--config-dir={tmp_path}", "experiment=mine"])] += 1
    assert outcomes["refused"] > count / 4 and outcomes["accepted"] > 0, outcomes
