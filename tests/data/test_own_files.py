"""A newcomer's files, as in docs/data.md: each is read with the keys beside it, in every format.

Why: most people's first file is not DAPO-Math-17k. If the keys do not fit the columns of a row, the error has to name
keys that do. The test uses the proposed keys. Not covered: rows that are refused with any keys (test_sources.py,
test_answers.py), and a training run (tests/end_to_end/test_own_reward.py).
"""

import functools
import gzip
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fipo.config import Config
from megatron_fipo.config.checks import check
from megatron_fipo.config.configure import load_config
from megatron_fipo.data.column_sums import write_tokenizer
from megatron_fipo.data.problems import ProblemSet, load_problems
from megatron_fipo.data.tokenizers import load_tokenizer
from megatron_fipo.errors import DataError
from tests.data.problem_files import FORMATS, row, write

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
EXAMPLES = re.findall(r"^\| .*?`(\{.*\})` \| `(data[^`]*)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
LIKELY = re.compile(r"; likely ([^;]*)")


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path / "model")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("my_reward.py").write_text("def score(response, columns):\n    return 1.0\n")


@functools.cache  # composing takes half a second
def compose(keys: str) -> Config:
    return load_config(["data.validation=[]", "validation.every=0", *shlex.split(keys)])


def load(keys: str, file: str = "train.jsonl") -> ProblemSet:
    """Return the training problems of a command line, which also has to pass the checks before a run."""
    config = compose(keys)
    config = replace(config, data=replace(config.data, train=[file]))
    check(config, local=True)
    return load_problems(config.data, "train", load_tokenizer(Path("../model")), 2000, validates=False)


def test_the_page_has_the_examples() -> None:
    assert len(EXAMPLES) == 13


@pytest.mark.parametrize(("text", "keys"), EXAMPLES, ids=range(1, len(EXAMPLES) + 1))
def test_each_row_is_read_with_its_keys_in_every_format(text: str, keys: str) -> None:
    example = json.loads(text)
    for suffix in FORMATS:
        (problem,) = load(keys, write(Path(f"train{suffix}"), [example])).problems
        assert problem.ground_truth == ("" if "answer=null" in keys else "3")
        assert "1+2=?" in problem.text and problem.data_source == "train"
        assert json.loads(problem.columns) == example
    Path("zipped.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert load(keys, "zipped.jsonl.gz").problems[0].ground_truth == problem.ground_truth


@pytest.mark.parametrize(("text", "keys"), EXAMPLES, ids=range(1, len(EXAMPLES) + 1))
def test_the_keys_that_a_refusal_names_read_the_row(text: str, keys: str) -> None:
    """For recognisable columns. The user has to give a pattern, and to say that there are no answers."""
    for suffix in FORMATS:
        file = write(Path(f"train{suffix}"), [json.loads(text)])
        try:
            load("data=tiny", file)
        except DataError as error:
            refusal = str(error)
        assert "it has [" in refusal and "\n" not in refusal
        likely = LIKELY.search(refusal)
        if "answer=null" in keys:
            assert likely is None and refusal.endswith("a reward of your own does not need: data.columns.answer=null")
        elif "meta.truth" in keys:
            assert likely is not None and likely[1] == "data.columns.prompt=task.question", "truth is no usual name"
        else:
            assert likely is not None, refusal
            answer = load(likely[1], file).problems[0].ground_truth
            assert answer == "3" or "answer_pattern" in keys


def test_a_validation_file_with_other_columns_is_told_its_own_keys() -> None:
    write(Path("train.jsonl"), [{"question": "1+1=?", "answer": 2}])
    write(Path("test.jsonl"), [{"problem": "1+2=?", "solution": r"\boxed{3}"}])
    keys = "data=questions data.validation=[test.jsonl] validation.every=1"
    config = load_config(["data.train=[train.jsonl]", *shlex.split(keys)])
    tokenizer = load_tokenizer(Path("../model"))
    with pytest.raises(DataError, match=r"likely data\.validation_columns\.prompt=problem") as refusal:
        load_problems(config.data, "validation", tokenizer, 2000)
    likely = LIKELY.search(str(refusal.value))
    assert likely is not None
    config = load_config(["data.train=[train.jsonl]", *shlex.split(f"{keys} {likely[1]}")])
    assert load_problems(config.data, "validation", tokenizer, 2000).problems[0].ground_truth == "3"


def test_the_defaults_validation_file_that_stays_behind_is_named() -> None:
    write(Path("train.jsonl"), [{"question": "1+1=?", "answer": 2}])
    keys = ["data.columns.prompt=question", "data.columns.answer=answer"]
    config = load_config(["data.train=[train.jsonl]", *keys])
    with pytest.raises(DataError, match=r"tiny_validation\.jsonl: is the embedded task's .*or validation\.every=0"):
        load_problems(config.data, "train", load_tokenizer(Path("../model")), 2000)


def test_rows_of_windows_and_of_other_programs_are_read() -> None:
    rows = [{"question": "1+1=?", "answer": 2}, {"question": "1+2=?", "answer": 3}]
    text = "\r\n".join(map(json.dumps, rows))
    Path("crlf.jsonl").write_bytes(text.encode())
    Path("mark.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    Path("lines.json").write_text("\n".join(map(json.dumps, rows)))
    Path("indented.json").write_text(json.dumps(rows, indent=2))
    for file in ("crlf.jsonl", "mark.jsonl", "lines.json", "indented.json"):
        assert [problem.ground_truth for problem in load("data=questions", file).problems] == ["2", "3"]


def test_bad_answers_are_refused_or_dropped_and_counted() -> None:
    rows = [{"question": "1+1=?", "answer": ""}, {"question": "1+2=?", "answer": 3}, {"question": "1+3=?"}]
    write(Path("train.jsonl"), rows)
    with pytest.raises(DataError, match=r"row 1, column answer: the answer is missing.*data\.bad_answers=drop"):
        load("data=questions")
    write(Path("train.jsonl"), [rows[1], rows[2]])
    with pytest.raises(DataError, match=r"row 2, column answer: no column answer; .*data\.bad_answers=drop"):
        load("data=questions")
    write(Path("train.jsonl"), [rows[2]])
    with pytest.raises(DataError, match=r"row 1, column answer: no column answer") as refusal:
        load("data=questions")
    assert "data.bad_answers" not in str(refusal.value), "here it is the key that is wrong, of every row"
    write(Path("train.jsonl"), rows)
    loaded = load("data=questions data.bad_answers=drop")
    assert [problem.ground_truth for problem in loaded.problems] == ["3"]
    assert (loaded.counts.rows, loaded.counts.dropped_bad_answers) == (3, 2)
    write(Path("train.jsonl"), rows[:1])
    with pytest.raises(
        DataError, match=r"no train problem is left: rows 1, dropped_bad_answers 1 \(data.bad_answers=error"
    ):
        load("data=questions data.bad_answers=drop")


def test_a_list_of_answers_and_one_around_the_rows_are_told_the_way_in() -> None:
    write(Path("train.jsonl"), [{"question": "1+2=?", "answer": ["3", "three"]}])
    with pytest.raises(DataError, match=r"is a list; data\.columns\.answer=answer\.0 is the first of 2"):
        load("data=questions")
    with pytest.raises(DataError, match="no element 2 in a list of 2"):
        load("data=questions data.columns.answer=answer.2")
    Path("train.jsonl").write_text(json.dumps({"data": [{"question": "1+2=?", "answer": 3}]}))
    with pytest.raises(DataError, match=r"jq \.data FILE > rows\.json"):
        load("data=questions")


def test_answers_as_long_as_solutions_are_warned_about() -> None:
    write(
        Path("train.jsonl"), [{"question": "1+2=?", "answer": "We think. " * 50}, {"question": "1+1=?", "answer": "2"}]
    )
    (warning,) = load("data=questions").warnings
    assert warning.startswith("1 of 2 train answers have more than 300 characters")
    write(Path("train.jsonl"), [{"question": "1+1=?", "answer": "2"}])
    assert load("data=questions").warnings == []


def test_other_messages_than_a_completion_are_no_answer() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "3"}]
    write(Path("train.jsonl"), [{"prompt": "1+2=?", "completion": messages}])
    with pytest.raises(DataError, match=r"is 2 chat messages \(user, assistant\); a completion is one"):
        load("data.columns.answer=completion")
    write(Path("train.jsonl"), [{"messages": messages}])
    with pytest.raises(DataError, match=r"assistant's message.*data\.columns\.answer=messages reads the answer"):
        load("data.columns.prompt=messages data.columns.answer=missing")


def test_a_content_in_text_parts_is_their_text() -> None:
    prompt = row([{"type": "text", "text": "1+"}, {"type": "text", "text": "2=?"}])  # type: ignore[arg-type]
    write(Path("train.jsonl"), [prompt])
    assert load("data=tiny").problems[0].text.endswith("1+2=?")
