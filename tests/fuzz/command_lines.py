"""Command lines as users mistype them, and what the entry point makes of one."""

import contextlib
import io
import random
import sys
from unittest import mock

from megatron_fipo.config import Config, every_setting
from megatron_fipo.config.configure import configuration_groups, run_with_config

KEYS = [key for key, _ in every_setting()]
GROUPS = configuration_groups()
SECTIONS = sorted({key.rpartition(".")[0] for key in KEYS})

NUMBERS = [
    *(
        "0",
        "-0",
        "-0.0",
        "1",
        "-1",
        "2",
        "7",
        "0.5",
        "1.5",
        "-1.5",
        "1e-300",
        "1e300",
        "1e30",
        "1e10",
        "1e400",
        "-1e400",
    ),
    *("nan", "inf", "-inf", ".inf", "1_000", "0x10", "1e3", "007", "65536", "4294967296", "9223372036854775808"),
    *("1" + "0" * 30, "-1" + "0" * 30, "9" * 400, "9" * 5000, "1." + "0" * 400 + "1", "٣", "½"),
]
TEXTS = [
    *("", "''", '""', "null", "None", "true", "false", "yes", "~", "???", "a", "a b", "'a b'", "a\\nb", '"a\nb"', "\t"),
    *("/", "/dev/null", "/proc/x", "..", "a/../../b", "~", "~nobody/x", "a\x00b", "\x1b[31m", "é", "\u202e", "\ud800"),
    *(
        "x" * 300,
        "'" + "x" * 200_000 + "'",
        "a=b",
        "'a=b'",
        "a,b",
        "[]",
        "[a,b]",
        "[a,,b]",
        "[",
        "]",
        "[[[]]]",
        "{",
        "}",
    ),
    *(
        "{}",
        "{a:1}",
        "{a:{b:[1,{c:null}]}}",
        "[" * 200,
        "[" * 60 + "]" * 60,
        "{a:" * 60 + "1" + "}" * 60,
        "'",
        '"',
        "\\",
    ),
    *(
        "http://a:1",
        "[http://a:99999]",
        "[http://a:0]",
        "['http://[::1]:80']",
        "[http://a:1,http://a:1]",
        "[ftp://a:1]",
    ),
    *("127.0.0.1", "0.0.0.0", "::", "::1", "256.1.1.1", "localhost", "abc", "192.0.2.1", "224.0.0.1", "127.1"),
    *("embedded:tiny", "embedded:../../etc", "embedded:", "[embedded:tiny_train.jsonl]", "[1,2]", "[null]", "[a.csv]"),
    *("{question}", "'{question}'", "'{question} {question}'", "2026-01-31", "'2026-13-01'", "@", "!", "#", "&a", "*a"),
    *("choice(1,2)", "range(1,3)", "glob(*)", "sort(3,1)", "shuffle(a,b)", "int(a)", "float(x)", "cast(1)", "${"),
]
INTERPOLATIONS = [
    *(
        "${run.steps}",
        "${run.name}",
        "${nope}",
        "${run.nope}",
        "${run}",
        "${oc.env:NOPE}",
        "${oc.env:HOME}",
        "${now:%Y}",
    ),
    *("${oc.decode:'['}", "${oc.create:1}", "${oc.select:run.name}", "${oc.dict.keys:run}", "${nope:1}", "${}", "${a"),
    *("${${run.name}}", "a${run.steps}b", "${.steps}", "${..model.path}", "${hydra:job.name}", "${now:%}", "${now:}"),
]
VALUES = NUMBERS + TEXTS + INTERPOLATIONS
LINES = [
    *("  - override /model: nope", "  - override /nope: tiny", "  - nope", "  - mine", "  - experiment: mine", "  - 7"),
    *("  - override /model: [tiny, tiny]", "defaults: 7", "defaults:", "run: 7", "run: [1]", "run: null", "run: &a"),
    *("  steps: !!python/object/apply:os.getpid []", "  steps: !nope 3", "  steps: *nope", "\tsteps: 3", "  steps: {"),
    *("  steps: 3\n  steps: 4", "  1: 2", "  ? [a, b]\n  : c", "  null: 3", "a: b: c", "- a", "---", "...", "  <<: 7"),
    *(
        "%YAML 9.9",
        "@",
        "`",
        "nope: 1",
        "  nope: 1",
        "  steps: .nan",
        "  steps: 1e999",
        "  name: 2026-01-31",
        "  a.b: 1",
    ),
    *("# @package nope", "# @package _group_", "# @package a.b", "  steps: ${nope}", "  steps: ???", "  name: yes"),
    *("  - override hydra/launcher: nope", "searchpath: [pkg://nope]", "model: {path: [1]}", "hydra: {run: {dir: x}}"),
    *("algorithm: {future_kl: 3}", "  name: 0x1f", "  name: 2026-01-31"),
]


def command_line(rng: random.Random) -> list[str]:
    """One to three overrides, most of a real key with a value that it hardly can have."""
    start = [rng.choice([f"experiment={name}" for name in ("fipo_32b", "fipo_7b", "one_gpu")])] * (rng.random() < 0.2)
    return start + [_override(rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]


def _override(rng: random.Random) -> str:
    kind = rng.random()
    key, value = rng.choice(KEYS), rng.choice(VALUES)
    if kind < 0.70:
        return f"{key}={value}"
    if kind < 0.80:
        return f"{rng.choice(['+', '++', '~', '~~', '+++', '-', ' '])}{key}{rng.choice(['=', ''])}{value}"
    if kind < 0.86:
        return f"{rng.choice(GROUPS + SECTIONS)}={value}"
    if kind < 0.92:
        return f"{rng.choice(['', '+', '~'])}{_misspelt(rng, key)}={value}"
    if kind < 0.96:
        return f"+{rng.choice(['data.task_options', 'data.chat_template_variables'])}.{rng.choice('abc')}={value}"
    return _damaged(rng, f"{key}={value}")


def _misspelt(rng: random.Random, key: str) -> str:
    place = rng.randrange(len(key))
    return rng.choice([key[:place] + key[place + 1 :], key[:place] + rng.choice("x._-@/ :") + key[place:], key.upper()])


def _damaged(rng: random.Random, text: str) -> str:
    """Some characters of a short override replaced by ones that mean something to Hydra or to a terminal."""
    characters = list(text[:60])
    for _ in range(rng.randint(1, 4)):
        characters[rng.randrange(len(characters))] = rng.choice("={}[](),:'\"$\\~+-@ \t\n#%*\x00\x7fé")
    return "".join(characters).lstrip("-")


def entered(arguments: list[str], *, local: bool = True) -> tuple[int, list[str], Config | None]:
    """Exit code, lines on both streams, and the configuration that an entry point was entered with, if it was."""
    reached: list[Config] = []
    out = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["train", *arguments]),
        contextlib.redirect_stderr(out),
        contextlib.redirect_stdout(out),
    ):
        try:
            run_with_config(reached.append, local=local)
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
    return code, out.getvalue().splitlines(), reached[0] if reached else None
