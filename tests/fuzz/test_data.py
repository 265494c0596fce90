"""Why: whatever lies in a problem file, a user reads one line that names it, never a traceback, and never a wrong row.

Rows are mutated as values, files as bytes, in every format. Not covered: damage
that crashes Arrow itself, of which none is known.
"""

import datetime
import json
import random
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from megatron_fipo.config import DataConfig
from megatron_fipo.config.data import ANSWER_FORMATS
from megatron_fipo.data.chat_templates import TEMPLATE_FILE
from megatron_fipo.data.column_sums import write_tokenizer
from megatron_fipo.data.problems import load_problems
from megatron_fipo.data.tokenizers import Tokenizer, load_tokenizer
from megatron_fipo.errors import FipoError
from tests.fuzz.budget import cases, every_case
from tests.fuzz.mutators import damaged, mutate

TEMPLATE = """{%- for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools\\nhere') }}{% endif -%}
{% if m.content == '3' %}{{ 1 / 0 }}{% endif %}{{ m.content }}<eos>{% endfor %}"""

VALUES: list[Any] = [
    *(None, True, False, 0, -7, 34, 10**30, 10**400, 0.5, 33.0, -0.0, 1e300, 5e-324, float("nan"), float("inf")),
    *("", " ", "34", "1,000", "#### 42", "so\n#### 1,000", "####", r"\boxed{\{1\}}", r"\boxed{", '["34"]', "[0, 1]"),
    *("{}", '{"a": 1}', "[" * 5000, "[" * 300 + "]" * 300, "(" * 120 + ")" * 120, "nan", "None", "\ud800", "\x00"),
    *("é\u202e\ufeff", "x" * 20_000, [], ["34"], [34], {}, {"ground_truth": 3}, {"role": "user", "content": "1+1=?"}),
    *([{"role": "user", "content": "1+2=?"}], [{"role": "user", "content": None}], [{"role": 3, "content": "a"}]),
    *([{"role": "tool", "content": "a"}], [{"role": "wizard", "content": "a"}], [{"role": "user"}], [[]], [None]),
    *([{"role": "user", "content": "3"}], [{"role": "assistant", "content": "3"}], [{"role": "user", "content": " "}]),
    *([{"role": "user", "content": [{"type": "text", "text": "3"}]}], [{"role": "user", "content": "\udfff"}]),
]
ARROW_VALUES = [Decimal("1.50"), Decimal("NaN"), b"34", b"\xff", datetime.date(2026, 1, 31), datetime.timedelta(1)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("model")
    write_tokenizer(directory)
    (directory / TEMPLATE_FILE).write_text(TEMPLATE)
    return load_tokenizer(directory)


def sound_row(rng: random.Random, answer_format: str) -> dict[str, Any]:
    question = "+".join(str(rng.randint(0, 9)) for _ in range(rng.randint(2, 5))) + "=?"
    answer = {"plain": "7", "gsm8k": "so\n#### 7", "boxed": r"so \boxed{7}", "pattern": "so: 7"}[answer_format]
    prompt = [{"role": "user", "content": question}]
    return {"data_source": "sums", "prompt": prompt, "reward_model": {"ground_truth": answer}}


def mutated_row(rng: random.Random, answer_format: str, values: list[Any]) -> Any:
    """A sound row with one to three of its parts removed, renamed or replaced."""
    row = sound_row(rng, answer_format)
    for _ in range(rng.randint(1, 3)):
        mutate(rng, row, values, ["x", "", "a.b", "prompt"])
    return row if rng.random() < 0.97 else rng.choice(values)


def outcome(path: Path, tokenizer: Tokenizer, rng: random.Random, answer_format: str) -> str:
    """Loads a file; "refused", or "read" after a look at what was read. Any other exception fails the test."""
    config = DataConfig(
        train=[str(path)],
        answer_format=answer_format,
        answer_pattern="so: (.+)",
        bad_answers=rng.choice(["error", "drop"]),
        overlong_prompts=rng.choice(["drop", "truncate_left", "error"]),
        prompt_template=rng.choice(["{question}", "Q: {question}"]),
    )
    try:
        loaded = load_problems(config, "train", tokenizer, max_prompt_length=rng.choice([10, 64, 64]))
    except FipoError as error:
        message = str(error)
        assert "\n" not in message, f"more than one line: {message}"
        assert len(message) < 1000
        assert path.name in message or message.startswith("no train problem is left: "), message
        return "refused"
    counts = loaded.counts
    dropped = counts.duplicates + counts.dropped_empty + counts.dropped_overlong + counts.dropped_held_out
    dropped += counts.dropped_bad_answers
    assert counts.rows == counts.kept + dropped
    assert counts.kept == len(loaded.problems) > 0
    for problem in loaded.problems:
        assert problem.ground_truth == problem.ground_truth.strip() != ""
        assert problem.ground_truth not in ("True", "False", "nan", "None", "inf")
        assert problem.data_source and problem.text
        assert problem.token_ids.size and all(0 <= token < tokenizer.size for token in problem.token_ids)
        json.dumps(vars(problem) | {"token_ids": problem.token_ids.tolist()}, ensure_ascii=False).encode()
        assert isinstance(json.loads(problem.columns), dict)
    return "read"


@cases(seeded=1600, campaign=2500)
def test_mutated_rows_are_read_or_refused_in_one_line(
    rng: random.Random, count: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    outcomes: Counter[str] = Counter()
    with every_case() as case:
        for _ in range(count):
            answer_format = rng.choice(ANSWER_FORMATS)
            rows = [sound_row(rng, answer_format), mutated_row(rng, answer_format, VALUES)]
            path = tmp_path / f"rows{rng.choice(['.jsonl', '.json'])}"
            if path.suffix == ".json" and rng.random() < 0.7:
                path.write_text(json.dumps(rows), encoding="utf-8")
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            with case(rows):
                outcomes[outcome(path, tokenizer, rng, answer_format)] += 1
    assert min(outcomes["read"], outcomes["refused"]) > count / 10, outcomes


@cases(seeded=400, campaign=1000)
def test_mutated_tables_are_read_or_refused_in_one_line(
    rng: random.Random, count: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    outcomes: Counter[str] = Counter()
    with every_case() as case:
        while outcomes.total() < count:
            answer_format = rng.choice(ANSWER_FORMATS)
            rows = [mutated_row(rng, answer_format, VALUES + ARROW_VALUES)]
            try:
                table = pa.Table.from_pylist(rows)
                path = write_table(table, tmp_path / f"table{rng.choice(['.parquet', '.arrow'])}", rng)
            except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
                continue  # a row that Arrow cannot write
            with case(rows):
                outcomes[outcome(path, tokenizer, rng, answer_format)] += 1
    assert min(outcomes["read"], outcomes["refused"]) > outcomes.total() / 20, outcomes


def write_table(table: pa.Table, path: Path, rng: random.Random) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path, compression=rng.choice(["none", "snappy", "zstd"]))
        return path
    writer: Callable[..., Any] = rng.choice([pa.ipc.new_file, pa.ipc.new_stream])
    with writer(str(path), table.schema) as sink:
        sink.write_table(table)
    return path


@cases(seeded=900, campaign=1500)
def test_damaged_files_are_read_or_refused_in_one_line(
    rng: random.Random, count: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    sound: dict[str, bytes] = {}
    table = pa.Table.from_pylist([sound_row(rng, "plain") for _ in range(20)])
    for suffix in (".parquet", ".arrow"):
        sound[suffix] = write_table(table, tmp_path / f"sound{suffix}", rng).read_bytes()
    sound[".jsonl"] = "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()
    sound[".json"] = json.dumps(table.to_pylist()).encode()
    outcomes: Counter[tuple[str, str]] = Counter()
    with every_case() as case:
        for _ in range(count):
            suffix = rng.choice(list(sound))
            path = tmp_path / f"damaged{suffix}"
            path.write_bytes(damaged(sound[suffix], rng))
            with case(path.read_bytes()):
                outcomes[suffix, outcome(path, tokenizer, rng, "plain")] += 1
    assert all(outcomes[suffix, "refused"] > 20 for suffix in sound), outcomes
