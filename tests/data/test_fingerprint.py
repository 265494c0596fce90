"""Why: a run that resumes with other data would show no error, and its curves would mix two data sets.

tests/rollout/test_training_rollouts.py tests what the loop does if the data differ.
"""

from pathlib import Path

import pytest
from msgspec.json import decode, encode

from megatron_fipo.config import DataConfig
from megatron_fipo.data.column_sums import write_tokenizer
from megatron_fipo.data.fingerprint import Fingerprint, compare_for_resume
from megatron_fipo.data.problems import load_problems
from megatron_fipo.data.tokenizers import load_tokenizer
from megatron_fipo.errors import DataError
from tests.data.problem_files import FORMATS, row, write

ROWS = [row("1+6=?"), row("2+2=?", "4"), row("3+3=?", "6")]


@pytest.fixture
def load(tmp_path: Path):
    write_tokenizer(tmp_path / "model")

    def fingerprint(
        rows: list[dict], suffix: str = ".jsonl", template: str | None = None, limit: int = 20
    ) -> Fingerprint:
        path = tmp_path / "model" / "chat_template.jinja"
        path.unlink(missing_ok=True)
        if template is not None:
            path.write_text(template)
        config = DataConfig(train=[write(tmp_path / f"a{suffix}", rows)], overlong_prompts="truncate_left")
        return load_problems(config, "train", load_tokenizer(tmp_path / "model"), limit).fingerprint

    return fingerprint


def test_the_same_problems_have_the_same_fingerprint_in_every_format(load) -> None:
    known = load(ROWS)
    assert all(load(ROWS, suffix) == known for suffix in FORMATS)
    assert load([*ROWS, ROWS[0]]) == known
    assert decode(encode(known), type=Fingerprint) == known
    assert known.difference(known) is None


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (ROWS[:2], "2 training problems, the checkpoint was trained on 3"),
        (ROWS[::-1], "3 training problems as in the checkpoint, but they, their order, their answers or"),
        ([*ROWS[:2], row("3+3=?", "7")], "their answers or data.prompt_template"),
        ([*ROWS[:2], row("3+4=?", "6")], "in the checkpoint, but they"),
    ],
)
def test_other_problems_answers_and_orders_differ(load, rows: list[dict], words: str) -> None:
    assert words in (load(rows).difference(load(ROWS)) or "")


def test_other_prompts_of_the_same_problems_are_told_apart(load) -> None:
    known = load(ROWS)
    for other in (load(ROWS, template="{{ messages[0].content }}:"), load(ROWS, limit=3)):
        assert other.problems == known.problems and other.prompts != known.prompts
        assert other.difference(known) is None


def test_a_resume_goes_on_refuses_or_warns() -> None:
    known = Fingerprint(3, "a", "b")
    assert compare_for_resume(known, known, allow_change=False) == (True, None)
    goes_on, warning = compare_for_resume(known, Fingerprint(3, "a", "c"), allow_change=False)
    assert goes_on and "the prompts have changed since the checkpoint" in str(warning)
    other = Fingerprint(4, "c", "c")
    with pytest.raises(
        DataError, match=r"3 training problems, the checkpoint was trained on 4 .*data\.allow_change=true"
    ):
        compare_for_resume(known, other, allow_change=False)
    goes_on, warning = compare_for_resume(known, other, allow_change=True)
    assert not goes_on and "a new epoch of it begins" in str(warning)
    goes_on, warning = compare_for_resume(known, None, allow_change=False)
    assert goes_on and "does not say what data" in str(warning)
