"""Why: whatever a user writes on the command line or into a YAML file, the answer is one line that names the key.

Not covered: Hydra's own flags, whose mistakes argparse answers in its words.
"""

import random
from collections import Counter
from pathlib import Path

import pytest

from megatron_fipo.config import every_setting
from megatron_fipo.config.settings import is_in_range
from tests.fuzz.budget import cases, one_case
from tests.fuzz.command_lines import GROUPS, KEYS, SECTIONS, command_line, entered

pytestmark = pytest.mark.slow


def outcome(arguments: list[str]) -> str:
    """ "refused" in one line, or "accepted" with all values in their ranges; anything else fails the test."""
    code, lines, config = entered(arguments)
    others = [line for line in lines if not line.startswith("warning: ")]
    if config is None:
        assert (code, len(others)) == (2, 1), (code, others)
        assert others[0].startswith("error: ") and others[0].isprintable() and len(others[0]) < 2000, others
        named = [*KEYS, *SECTIONS, *GROUPS, *(argument[:20] for argument in arguments)]
        assert any(name in others[0] for name in named) or "configuration" in others[0], others
        return "refused"
    assert (code, others) == (0, []), (code, others)
    for key, entry in every_setting():
        value: object = config
        for name in key.split("."):
            value = getattr(value, name) if value is not None else None
        kinds = {int, float, bool, str} & {type(value)}
        assert not kinds or isinstance(value, bool | str) or is_in_range(value, entry.metadata), (key, value)
    return "accepted"


@cases(seeded=150, campaign=2000)
def test_mistyped_command_lines_are_refused_in_one_line(
    rng: random.Random, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        arguments = command_line(rng)
        with one_case(arguments):
            outcomes[outcome(arguments)] += 1
    assert outcomes["refused"] > count / 2 and outcomes["accepted"] > count / 50, outcomes
