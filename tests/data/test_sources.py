"""Why: data sets have different column names, and files can be damaged in many ways. Each loads correctly or is named.

test_answers.py tests which values are answers, and tests/fuzz tests random damage.
"""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pytest

from megatron_fipo.config import ColumnsConfig, DataConfig, ValidationColumnsConfig
from megatron_fipo.config.configure import load_config
from megatron_fipo.config.data import RECIPE_PROMPT
from megatron_fipo.data.layout import Layout
from megatron_fipo.data.readers import read_rows
from megatron_fipo.data.sources import RawProblem, read_files
from megatron_fipo.errors import DataError
from tests.data.problem_files import FORMATS, row, write

QUESTIONS = ColumnsConfig(prompt="question", answer="answer")


def read(file: str, split: str = "train", **settings: Any) -> list[RawProblem]:
    return list(read_files([file], Layout.of(DataConfig(**settings), split)))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_plain_question_gets_the_recipes_prompt(tmp_path, suffix):
    file = write(tmp_path / f"mine{suffix}", [{"question": "What is 2+2?", "answer": 4}])
    (problem,) = read(file, columns=QUESTIONS)
    (message,) = problem.messages
    assert message["role"] == "user"
    assert message["content"].startswith("Solve the following math problem step by step. The last line of your")
    assert message["content"].endswith(
        '\n\nWhat is 2+2?\n\nRemember to put your answer on its own line after "Answer:".'
    )
    assert (problem.ground_truth, problem.data_source, problem.question) == ("4", "mine", "What is 2+2?")


def test_another_template_or_none_can_be_put_around_a_question(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"question": r"$\frac{1}{2}$ of {question}?\n", "answer": "4"}])
    for template in ("{question}", "Q: {question}\nA: {}"):
        (problem,) = read(file, columns=QUESTIONS, prompt_template=template)
        expected = template.replace("{question}", r"$\frac{1}{2}$ of {question}?\n", 1)
        assert problem.messages == [{"role": "user", "content": expected}]


def test_messages_are_used_as_they_are(tmp_path):
    (problem,) = read(write(tmp_path / "a.jsonl", [row("1+1=?", 2)]))
    assert problem.messages == [{"role": "user", "content": "1+1=?"}]


@pytest.mark.parametrize(
    ("group", "rows", "answers"),
    [
        ("gsm8k", [{"question": "Clips?", "answer": "48/2=24\n#### 1,072"}], ["1072"]),
        ("math", [{"problem": "Half?", "solution": r"It is $\boxed{\frac{1}{2}}$."}], [r"\frac{1}{2}"]),
        ("questions", [{"question": "a?", "answer": 3.0}, {"question": "b?", "answer": 0.5}], ["3", "0.5"]),
        ("dapo_math_17k", [row("1+1=?", "2")], ["2"]),
    ],
)
def test_known_data_sets_load_by_configuration_alone(tmp_path, group, rows, answers):
    config = load_config([f"data={group}"]).data
    for suffix in FORMATS:
        layout = Layout.of(config, "train")
        problems = list(read_files([write(tmp_path / f"a{suffix}", rows)], layout))
        assert [problem.ground_truth for problem in problems] == answers


def test_validation_files_may_have_columns_of_their_own(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"problem": "a?", "solution": r"\boxed{5}", "answer": "5", "subject": "sums"}])
    layout = {"columns": ColumnsConfig("problem", "solution"), "answer_format": "boxed"}
    own = ValidationColumnsConfig(answer="answer", answer_format="plain", source="subject")
    (problem,) = read(file, "validation", validation_columns=own, **layout)
    assert (problem.ground_truth, problem.data_source) == ("5", "sums")
    (problem,) = read(file, "train", validation_columns=own, **layout)
    assert (problem.ground_truth, problem.data_source) == ("5", "a")


def test_nested_columns_and_columns_with_a_dot_in_their_name(tmp_path):
    columns = ColumnsConfig("a.b", "x.y.z")
    for suffix in FORMATS:
        (problem,) = read(write(tmp_path / f"a{suffix}", [{"a": {"b": "q?"}, "x": {"y": {"z": 3}}}]), columns=columns)
        assert (problem.question, problem.ground_truth) == ("q?", "3")
    (problem,) = read(write(tmp_path / "b.jsonl", [{"a.b": "q?", "x": {"y.z": 3}}]), columns=columns)
    assert (problem.question, problem.ground_truth) == ("q?", "3")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_numbers_keep_the_text_of_their_own_type(tmp_path, suffix):
    for kind, value, text in (
        (pa.float32(), 0.1, "0.1"),
        (pa.float16(), 0.5, "0.5"),
        (pa.float64(), 33.0, "33"),
        (pa.uint8(), 200, "200"),
        (pa.decimal128(10, 3), 1.250, "1.25"),
        (pa.dictionary(pa.int8(), pa.string()), "x", "x"),
    ):
        array = pa.array([value]).cast(pa.decimal128(38, 3)).cast(kind) if "decimal" in str(kind) else pa.array([value])
        nested = pa.StructArray.from_arrays([array.cast(kind)], ["ground_truth"])
        for columns, answers in ((["answer"], array.cast(kind)), (["answer", "ground_truth"], nested)):
            table = pa.table({"prompt": ["q?"], "answer": answers})
            file = write(tmp_path / f"a{suffix}", table)
            (problem,) = read(file, columns=ColumnsConfig(answer=".".join(columns)))
            assert problem.ground_truth == text


def test_a_json_number_keeps_its_digits(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "a?", "answer": 0.12345678901234567890}\n{"question": "b?", "answer": 2e3}\n')
    assert [problem.ground_truth for problem in read(str(path), columns=QUESTIONS)] == ["0.1234567890123456789", "2000"]


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    for suffix in FORMATS:
        file = write(tmp_path / f"a{suffix}", [{"question": "a?", "target": "3", "meta": {"x": 1}}])
        with pytest.raises(DataError, match=r"no column prompt; it has \['meta', 'question', 'target'\]"):
            read(file)
        with pytest.raises(DataError, match=r"no column answer; it has \['meta', 'question', 'target'\]"):
            read(file, columns=QUESTIONS)
        with pytest.raises(DataError, match=r"a\.\w+, row 1, column meta\.answer: no column answer; it has \['x'\]"):
            read(file, columns=ColumnsConfig("question", "meta.answer"))
        with pytest.raises(DataError, match=r"row 1, column target\.answer: no column answer in a text"):
            read(file, columns=ColumnsConfig("question", "target.answer"))
        with pytest.raises(DataError, match=r"row 1, column kind: no column kind"):
            read(file, columns=ColumnsConfig("question", "target", "kind"))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "should be a question or a list of chat messages"),
        (3, "not a number"),
        ({"role": "user"}, "not an object"),
        (["a"], "list of chat messages with role and content"),
        ([{"role": "user"}], r"texts role and content; it has \['role'\]"),
        ([{"role": "user", "content": [{"type": "image", "text": "a"}]}], "texts role and content"),
        ([{"role": "wizard", "content": "a"}], "no chat message has the role 'wizard'"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "3"}],
            "ends with the assistant's message",
        ),
        ('[{"role": "user", "content": "a"}]', "is the text of a list of chat messages"),
        ("[{'content': 'a', 'role': 'user'}]", "is the text of a list of chat messages"),
        ("\ud800", "not valid Unicode text"),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode text"),
    ],
)
def test_what_is_no_prompt_is_refused_with_row_and_column(tmp_path, prompt, message):
    file = write(tmp_path / "a.jsonl", [row("1+1=?"), row("1+1=?") | {"prompt": prompt}])
    with pytest.raises(DataError, match=rf"a\.jsonl, row 2, column prompt: .*{message}"):
        read(file)


@pytest.mark.parametrize("answer", [None, True, float("nan"), ["34"], {"a": 1}, '["34"]', "#### 42", " "])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_what_is_no_answer_is_refused_with_row_and_column(tmp_path, suffix, answer):
    file = write(tmp_path / f"a{suffix}", [row("1+1=?"), row("1+1=?", answer)])
    with pytest.raises(DataError, match=rf"a\{suffix}, row 2, column reward_model\.ground_truth: "):
        read(file)


def test_a_null_around_the_answer_is_a_missing_answer(tmp_path):
    for suffix in FORMATS:
        file = write(tmp_path / f"a{suffix}", [row("1+1=?"), row("1+1=?") | {"reward_model": None}])
        with pytest.raises(DataError, match=r"row 2, column reward_model\.ground_truth: the answer is missing"):
            read(file)


def test_a_name_of_the_data_set_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="row 1, column data_source: should be a text, not a number"):
        read(write(tmp_path / "a.jsonl", [row("1+1=?") | {"data_source": 3}]))


def text_of(rows: list[dict]) -> str:
    return "".join(json.dumps(each) + "\n" for each in rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", text_of([row("é")]).encode("utf-16"), "row 1: not UTF-8 text .*iconv -f UTF-16"),
        ("a.jsonl", text_of([row("1")]).encode() + b'{"prompt": "\xe9"}', "row 2: not UTF-8 text"),
        ("a.jsonl", text_of([row("1")]).encode() + b"\x00\x00", "row 2: not JSON"),
        ("a.jsonl", b"[" * 100_000, "row 1: nested too deeply"),
        (
            "a.jsonl",
            b'{"prompt": "a", "reward_model": {"ground_truth": ' + b"9" * 5000 + b"}}",
            "row 1: cannot be read",
        ),
        ("a.jsonl", b'{"prompt": "a", "x": 1e99999999999999999999}', "row 1: cannot be read .*exponent"),
        ("a.jsonl", b'{"prompt": "a", "prompt": "b"}', "row 1: cannot be read .*'prompt' occurs twice"),
        ("a.jsonl", b"3\n", "row 1: not a JSON object"),
        ("a.json", b'[{"prompt": 1}, 3]', "row 1, column prompt"),
        ("a.json", b'[{"prompt": 1}', "not JSON"),
        ("a.json", b"{", "row 1: not JSON"),
        ("a.jsonl", gzip.compress(text_of([row("1")]).encode()), r"row 1: not UTF-8 text .*name it \.jsonl\.gz"),
        ("a.jsonl.gz", text_of([row("1")]).encode(), "cannot be read .*gzip"),
        ("a.jsonl.gz", gzip.compress(text_of([row("1")]).encode())[:-9], "cannot be read .*(end-of-stream|truncated)"),
        ("a.parquet.gz", b"", "is of another format"),
        ("a.parquet", b"", "not a parquet file"),
        ("a.parquet", text_of([row("1")]).encode(), "not a parquet file"),
        ("a.arrow", b"", "not an Arrow file"),
        ("a.arrow", text_of([row("1")]).encode(), "not an Arrow file"),
    ],
)
def test_a_bad_file_is_one_line_with_file_and_row(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*{message}") as refusal:
        read(str(tmp_path / name))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_truncated_table_is_named_at_every_length(tmp_path, suffix):
    whole = Path(write(tmp_path / f"whole{suffix}", [row(f"{n}+1=?") for n in range(50)])).read_bytes()
    cut = tmp_path / f"cut{suffix}"
    for length in [*range(0, len(whole) - 16, 97), *range(len(whole) - 16, len(whole))]:
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"cut\{suffix}: not ") as refusal:
            read(str(cut))
        assert "\n" not in str(refusal.value)


def test_an_arrow_stream_that_ends_between_two_batches_is_refused(tmp_path):
    """Arrow itself would treat that as the end of the file."""
    table = pa.Table.from_pylist([row("1"), row("2")])
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as sink:
        sink.write_table(table, max_chunksize=1)
    whole = (tmp_path / "a.arrow").read_bytes()
    assert len(read(str(tmp_path / "a.arrow"))) == 2
    (tmp_path / "a.arrow").write_bytes(whole[:-8])
    with pytest.raises(DataError, match=r"a\.arrow: not an Arrow file.*cut off"):
        read(str(tmp_path / "a.arrow"))


def test_a_directory_and_an_unreadable_file_are_named(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(DataError, match=r"a\.jsonl is a directory without a problem file"):
        read(str(tmp_path / "a.jsonl"))
    if os.geteuid():
        (tmp_path / "b.jsonl").touch(mode=0)
        with pytest.raises(DataError, match=r"b\.jsonl: cannot be read"):
            read(str(tmp_path / "b.jsonl"))


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + text_of([row("1")]).encode() + b"\n  \n" + text_of([row("2")]).encode())
    assert [number for number, _ in read_rows(path, ["prompt"], "x")] == [1, 4]


def test_json_lines_in_a_json_file_are_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text_of([row("1"), row("2")]))
    assert [problem.question for problem in read(str(path))] == ["1", "2"]


def test_a_column_that_stands_twice_is_refused(tmp_path):
    table = pa.table([pa.array(["a?"]), pa.array(["b?"]), pa.array(["3"])], names=["question", "question", "answer"])
    with pytest.raises(DataError, match="has the column question 2 times"):
        read(write(tmp_path / "a.parquet", table), columns=QUESTIONS)


def test_the_recipes_prompt_is_recognised_around_a_question(tmp_path):
    file = write(tmp_path / "a.jsonl", [row(RECIPE_PROMPT.replace("{question}", "What is\n 2+2?"))])
    for template in (RECIPE_PROMPT, "{question}", "Q: {question}"):
        assert [problem.same_question(template) for problem in read(file)] == ["What is 2+2?"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"prompt": 1}, {"prompt": 1, "prompt": 2}]', "row 2: cannot be read .*'prompt' occurs twice"),
        (b'[{"prompt": 1}, {"prompt": ' + b"9" * 5000 + b"}]", "row 2: cannot be read .*digits"),
        (b'[{"prompt": 1}, ' + b"[" * 100_000, "row 2: nested too deeply"),
        (b'[{"prompt": 1}, {"prompt"', "row 2: not JSON"),
        (b'[{"prompt": 1} {"prompt": 2}]', "row 1: not JSON .*an array of objects"),
        (b'[{"prompt": 1}, ]', "row 2: not JSON"),
        (b'[{"prompt": 1}] x', "more text after the array of 1 rows"),
        (b"[[1]]", "row 1: not a JSON object .* but a list"),
        (b"[null]", "row 1: not a JSON object .* but null"),
        (b'{\n "data": []\n}', "row 1: not JSON .*should have an array of objects, or one object per line"),
    ],
)
def test_a_bad_element_of_an_array_has_a_row(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.json.*{message}"):
        list(read_rows(tmp_path / "a.json", ["prompt"], "x"))


def test_an_array_in_a_file_of_lines_is_told_its_ending(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'[{"prompt": 1}]')
    with pytest.raises(DataError, match=r"row 1: .* but a list; a file that is an array ends in \.json"):
        list(read_rows(tmp_path / "a.jsonl", ["prompt"], "x"))


def test_an_array_is_read_whatever_spaces_it_has(tmp_path):
    path = tmp_path / "a.json"
    for text in ('[{"a": 1},{"a": 2}]', ' [\r\n {"a": 1}\n , \t{"a": 2} ]\n\n'):
        path.write_text(text)
        assert list(read_rows(path, ["a"], "x")) == [(1, {"a": 1}), (2, {"a": 2})]
    path.write_text("[ ]")
    assert list(read_rows(path, ["a"], "x")) == []


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_value_that_arrow_cannot_read_has_row_and_column(tmp_path, suffix):
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    not_utf8 = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"1\xff2")])
    too_long = pa.array([1, 2**62, 1], pa.duration("s"))
    for answers, row_number in ((not_utf8, 2), (too_long, 2)):
        file = write(tmp_path / f"a{suffix}", pa.table({"question": ["a?", "b?", "c?"], "answer": answers}))
        with pytest.raises(DataError, match=rf"a\{suffix}, row {row_number}, column answer: cannot be read"):
            read(file, columns=QUESTIONS)


def test_a_map_is_an_object_and_a_dictionary_of_floats_keeps_their_digits(tmp_path):
    answers = pa.array([[("ground_truth", "3")]], pa.map_(pa.string(), pa.string()))
    file = write(tmp_path / "a.parquet", pa.table({"question": ["a?"], "answer": answers}))
    assert read(file, columns=ColumnsConfig("question", "answer.ground_truth"))[0].ground_truth == "3"
    with pytest.raises(DataError, match="row 1, column answer: is an object"):
        read(file, columns=QUESTIONS)
    narrow = pa.array([0.1], pa.float32()).dictionary_encode()
    file = write(tmp_path / "a.arrow", pa.table({"question": ["a?"], "answer": narrow}))
    assert read(file, columns=QUESTIONS)[0].ground_truth == "0.1"


def test_names_that_no_file_has_are_named(tmp_path):
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, message in (
        (f"{tmp_path}/{'x' * 300}.jsonl", "is not found"),
        ("~no_such_user/a.jsonl", "~no_such_user/a.jsonl is not found"),
        (f"{tmp_path}/a\x00b.jsonl", r"a\\x00b\.jsonl is not found"),
        (f"{tmp_path}/loop.jsonl", "is not a regular file"),
        (f"{tmp_path}/pipe.jsonl", "is not a regular file"),
    ):
        with pytest.raises(DataError, match=message):
            read(name)


def test_names_of_files_and_columns_stay_in_one_short_line(tmp_path):
    (tmp_path / "a\n\x1b[31m.jsonl").write_text("x")
    with pytest.raises(DataError, match=r"a\\n\\x1b\[31m\.jsonl, row 1") as refusal:
        read(str(tmp_path / "a\n\x1b[31m.jsonl"))
    assert str(refusal.value).isprintable()
    file = write(tmp_path / "a.jsonl", [{f"column_{n:03}{'x' * 1000}": n for n in range(500)}])
    with pytest.raises(DataError, match=r"'column_019x+…'\] and 480 more$") as refusal:
        read(file)
    assert len(str(refusal.value)) < 2000


@pytest.mark.parametrize(
    "text", ['[{"name": "a", "role": "user", "content": "x"}]', '{"role": "user", "content": "x"}', "{'content': 'x'}"]
)
def test_chat_messages_as_text_are_no_question(tmp_path, text):
    with pytest.raises(DataError, match="row 1, column question: is the text of a list of chat messages"):
        read(write(tmp_path / "a.jsonl", [{"question": text, "answer": 3}]), columns=QUESTIONS)
    file = write(tmp_path / "b.jsonl", [{"question": "{1, 2} has the content: how many?", "answer": 2}])
    assert read(file, columns=QUESTIONS)[0].question == "{1, 2} has the content: how many?"
