"""Why: if a row is silently lost, repeated or misread, a run trains on wrong data for weeks.

The files here have the published columns. test_sources.py tests other columns, formats and damaged files,
test_answers.py answers, and test_hub.py the hub.
"""

from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import DataConfig, ValidationColumnsConfig
from megatron_fipo.config.data import RECIPE_PROMPT
from megatron_fipo.data.column_sums import write_tokenizer
from megatron_fipo.data.problems import ProblemSet, load_problems
from megatron_fipo.data.tokenizers import Tokenizer, load_tokenizer
from megatron_fipo.errors import ConfigError, DataError
from tests.data.problem_files import FORMATS, row, write


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path / "model")
    return load_tokenizer(tmp_path / "model")


def load(tokenizer: Tokenizer, *files: str, overlong: str = "drop", limit: int = 20) -> ProblemSet:
    config = DataConfig(train=list(files), overlong_prompts=overlong)
    return load_problems(config, "train", tokenizer, limit)


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_are_read_deduplicated_and_counted(tmp_path, tokenizer, suffix):
    rows = [row("1+6=?"), row("1+6=?"), row("  "), row("1+6=?", "8"), row("2" * 30), row("3+3=?", "6")]
    loaded = load(tokenizer, write(tmp_path / f"data{suffix}", rows))
    first, second = loaded.problems
    assert (first.text, first.ground_truth, first.data_source) == ("1+6=?", "7", "math_dapo")
    assert first.token_ids.tolist() == tokenizer.encode("1+6=?")
    assert second.ground_truth == "6"
    counts = loaded.counts
    assert (counts.rows, counts.kept, counts.duplicates, counts.conflicting_answers) == (6, 2, 2, 1)
    assert (counts.dropped_empty, counts.dropped_overlong) == (1, 1)


def test_the_same_problem_has_the_same_id_wherever_it_stands(tmp_path, tokenizer):
    one = load(tokenizer, write(tmp_path / "a.jsonl", [row("1+6=?"), row("2+2=?")])).problems
    other = load(tokenizer, write(tmp_path / "b.parquet", [row("2+2=?"), row("1+6=?")])).problems
    assert [problem.id for problem in one] == [problem.id for problem in reversed(other)]
    assert len({problem.id for problem in one}) == 2


def test_files_are_deduplicated_together_and_integer_answers_become_text(tmp_path, tokenizer):
    files = [write(tmp_path / f"{name}.jsonl", [row("1+6=?", 7)]) for name in "ab"]
    loaded = load(tokenizer, *files)
    assert [problem.ground_truth for problem in loaded.problems] == ["7"]
    assert loaded.counts.duplicates == 1


def test_overlong_prompts_are_truncated_on_the_left_or_refused(tmp_path, tokenizer):
    file = write(tmp_path / "long.jsonl", [row("1+2+3+4=?"), row("9+9+9+2+3+4=?")])
    loaded = load(tokenizer, file, overlong="truncate_left", limit=5)
    assert [problem.text for problem in loaded.problems] == ["+3+4=?"[1:], "+3+4=?"[1:]]
    assert all(len(problem.token_ids) == 5 for problem in loaded.problems)
    assert loaded.counts.truncated == 2
    assert len({problem.id for problem in loaded.problems}) == 2
    with pytest.raises(DataError, match=r"row 1.*10 tokens.*max_prompt_length is 5"):
        load(tokenizer, file, overlong="error", limit=5)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (row("1+1=?", None), r"bad\.jsonl, row 2, column reward_model\.ground_truth: the answer is missing"),
        (row("1+1=?", " "), r"row 2, column reward_model\.ground_truth"),
        ({"prompt": [{"role": "user", "content": "1"}]}, r"row 2, column reward_model\.ground_truth"),
        ({"prompt": 3, "reward_model": {"ground_truth": "2"}}, "row 2, column prompt"),
        ({"reward_model": {"ground_truth": "2"}}, "row 2, column prompt"),
    ],
)
def test_a_broken_row_is_named(tmp_path, tokenizer, broken, message):
    with pytest.raises(DataError, match=message):
        load(tokenizer, write(tmp_path / "bad.jsonl", [row("1+6=?"), broken]))


def test_a_broken_file_is_named(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"missing\.parquet is not found"):
        load(tokenizer, str(tmp_path / "missing.parquet"))
    (tmp_path / "text.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"is of another format"):
        load(tokenizer, str(tmp_path / "text.csv"))
    (tmp_path / "fake.parquet").write_text("not parquet")
    with pytest.raises(DataError, match="not a parquet file"):
        load(tokenizer, str(tmp_path / "fake.parquet"))
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(DataError, match="row 1: not JSON"):
        load(tokenizer, str(tmp_path / "broken.jsonl"))
    with pytest.raises(DataError, match=r"no column reward_model; it has \['prompt'\]"):
        load(tokenizer, write(tmp_path / "columns.parquet", [{"prompt": row("1")["prompt"]}]))


def test_nothing_left_is_an_error_that_says_where_it_went(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"no train problem is left: rows 1, dropped_empty 1"):
        load(tokenizer, write(tmp_path / "empty.jsonl", [row("")]))
    with pytest.raises(ConfigError, match=r"data\.train"):
        load(tokenizer)


def held_out(tokenizer: Tokenizer, train: str, validation: str, **settings: Any) -> ProblemSet:
    config = DataConfig(train=[train], validation=[validation], **settings)
    return load_problems(config, "train", tokenizer, 400)


@pytest.mark.parametrize("suffix", FORMATS)
def test_problems_of_validation_are_not_trained_on(tmp_path, tokenizer, suffix):
    train = write(tmp_path / f"train{suffix}", [row("1+6=?"), row("1+6=?"), row("2+2=?", "4"), row("3+3=?", "6")])
    validation = write(tmp_path / f"validation{suffix}", [row(" 2+2=? \n", "4"), row("9+9=?")])
    loaded = held_out(tokenizer, train, validation)
    assert [problem.text for problem in loaded.problems] == ["1+6=?", "3+3=?"]
    counts = loaded.counts
    assert (counts.rows, counts.kept, counts.duplicates, counts.dropped_held_out) == (4, 2, 1, 1)
    with pytest.raises(DataError, match="no train problem is left: rows 4, duplicates 1, dropped_held_out 3"):
        held_out(tokenizer, train, train)


def test_a_held_out_problem_is_known_under_another_template_and_other_columns(tmp_path, tokenizer):
    asked = "Find x\nif x+1 = 3."
    train = write(
        tmp_path / "train.jsonl", [row(RECIPE_PROMPT.replace("{question}", asked)), row("Find X if x+1 = 3.")]
    )
    validation = write(tmp_path / "validation.jsonl", [{"problem": "Find  x if x+1 = 3.", "answer": 2}])
    columns = ValidationColumnsConfig(prompt="problem", answer="answer")
    for template in (RECIPE_PROMPT, "{question}", "Q: {question}"):
        loaded = held_out(tokenizer, train, validation, validation_columns=columns, prompt_template=template)
        assert [problem.text for problem in loaded.problems] == ["Find X if x+1 = 3."]
        assert loaded.counts.dropped_held_out == 1


def test_without_validation_its_files_are_not_read(tmp_path, tokenizer):
    config = DataConfig(train=[write(tmp_path / "a.jsonl", [row("1+6=?")])], validation=[str(tmp_path / "none.jsonl")])
    assert load_problems(config, "train", tokenizer, 20, validates=False).counts.kept == 1
    with pytest.raises(DataError, match=r"none\.jsonl is not found"):
        load_problems(config, "train", tokenizer, 20)


def test_conflicting_answers_are_warned_about(tmp_path, tokenizer):
    loaded = load(tokenizer, write(tmp_path / "a.jsonl", [row("1+6=?"), row("1+6=?", "8"), row("1+6=?")]))
    assert len(loaded.warnings) == 1 and "1 train rows repeat a prompt with another answer" in loaded.warnings[0]
    assert load(tokenizer, write(tmp_path / "a.jsonl", [row("1+6=?"), row("1+6=?")])).warnings == []


def test_a_template_that_refuses_a_row_names_it(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem role') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    system = row("1+6=?") | {"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "1"}]}
    file = write(tmp_path / "a.jsonl", [row("1+6=?"), system])
    with pytest.raises(DataError, match=r"a\.jsonl, row 2, prompt: the chat template of .* fails: .*no system role$"):
        load(load_tokenizer(tmp_path), file)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_file_without_rows_is_refused_beside_others_too(tmp_path, tokenizer, suffix):
    empty = write(tmp_path / f"empty{suffix}", [])
    sound = write(tmp_path / "a.jsonl", [row("1+6=?")])
    for files in ([empty], [sound, empty], [empty, sound]):
        with pytest.raises(DataError, match=rf"empty\{suffix}: has no rows"):
            load(tokenizer, *files)


def test_nothing_left_says_whence_and_what_would_be_right(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", [row("1" * 30), row("2" * 30), row(" ")])
    with pytest.raises(
        DataError, match=r"dropped_overlong 2, .*rollout\.max_prompt_length=\d+ or more.* of .*a\.jsonl"
    ):
        load(tokenizer, file)
    file = write(tmp_path / "b.jsonl", [row("1+6=?")])
    with pytest.raises(DataError, match=r"dropped_held_out 1 \(validation asks all of these questions.*b\.jsonl"):
        held_out(tokenizer, file, file)


@pytest.mark.parametrize("spell", [lambda text: text.replace("\n", "\r\n"), lambda text: " ".join(text.split())])
def test_a_held_out_problem_is_known_whatever_spaces_its_template_has(tmp_path, tokenizer, spell):
    own = "Q:\n{question}\n\nThink\nwell."
    asked = RECIPE_PROMPT.replace("{question}", own.replace("{question}", "1+6=?"))
    train = write(tmp_path / "train.jsonl", [row(spell(asked)), row("3+3=?")])
    validation = write(tmp_path / "validation.jsonl", [row("1+6=?")])
    loaded = held_out(tokenizer, train, validation, prompt_template=own)
    assert [problem.text for problem in loaded.problems] == ["3+3=?"]
