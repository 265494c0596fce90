"""Why: values are shown beside texts. A row that belongs to another response, or a token's text that is off by one,
makes the viewer wrong without any error.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from megatron_fipo.config import Config
from megatron_fipo.config.configure import load_config
from megatron_fipo.config.model_places import model_directory
from megatron_fipo.data.tokenizers import load_tokenizer
from megatron_fipo.errors import DataError
from megatron_fipo.records.credit import COUNTS, PRODUCED, VALUES, Piece, encode_pieces
from megatron_fipo.records.sample import Group
from megatron_fipo.rollout.offers import train_batch
from megatron_fipo.rollout.store import SampleStore
from megatron_fipo.rollout_process import credit_log
from megatron_fipo.rollout_process.credit_log import CreditLog, token_texts
from megatron_fipo.tracking.credit_file import CreditResponse, read_credit, recorded_steps
from tests.tracking.groups import make_group


def settings(*overrides: str) -> Config:
    return load_config(["algorithm.prompts_per_step=4", "algorithm.mini_batch_prompts=2", *overrides])


def groups() -> list[Group]:
    """Four of three to five responses; the check of one response timed out."""
    return [make_group(answers, "9", str(place)) for place, answers in enumerate(["919", "T1999", "9911", "199"])]


def recorded(
    directory: Path, config: Config, step: int = 2, make: Callable[[], list[Group]] = groups
) -> list[CreditResponse]:
    """What is in the file after a step whose trainer has each sample's number as every value."""
    log, store = CreditLog(config, directory, lambda ids: "".join(f"<{token}>" for token in ids)), SampleStore()
    log.begin(step)
    rows = log.choose(make())
    batch = train_batch(make(), config.algorithm, store, step, 0, rows)
    assert numpy.flatnonzero(batch.rows["recorded"]).tolist() == rows
    log.mark(make(), rows, batch.rows["sample"].tolist(), batch.rows["advantage"].tolist())
    pieces = []
    for row in batch.rows[batch.rows["recorded"] > 0]:
        tokens = int(row["tokens"] - row["prompt"])
        values = numpy.full((len(VALUES), tokens), row["sample"], numpy.float32)
        state = numpy.full(tokens, PRODUCED | COUNTS, numpy.uint8)
        pieces.append(
            Piece(int(row["sample"]), int(row["mini_batch"]), numpy.arange(tokens, dtype=numpy.int32), values, state)
        )
    path = log.write([encode_pieces(pieces)])
    return read_credit(path)[1] if path is not None else []


def test_a_row_has_its_own_responses_facts(tmp_path: Path) -> None:
    found = recorded(tmp_path, settings("tracking.credit.responses=16"))
    judged = [(group, index) for group in groups() for index, result in enumerate(group.results) if result.was_judged]
    assert len(found) == len(judged) == 14
    for response in found:
        group, index = judged[int(response.credit.values["entropy"][0])]
        assert response.facts["problem"] == group.problem.id and response.facts["index"] == index
        assert response.facts["reward"] == group.results[index].reward
        assert (response.facts["advantage"] > 0) == (response.facts["reward"] > 0)
        assert response.tokens == ["<7>"] * 3 and response.token_ids.tolist() == [7] * 3
        assert response.facts["update"] == int(group.problem.id) // 2


def test_how_many_are_chosen(tmp_path: Path) -> None:
    """Four of a group at most, the last group first, since the first update has Δ = 0."""
    found = recorded(tmp_path, settings("tracking.credit.responses=4"))
    assert {response.facts["problem"] for response in found} == {"3"}
    assert {response.facts["reward"] for response in found} == {-1, 1}
    little = recorded(tmp_path, settings("tracking.credit.responses=8", "tracking.credit.max_tokens=10"))
    assert [response.facts["problem"] for response in little] == ["3"] * 3
    assert recorded(tmp_path, settings("tracking.credit.responses=0")) == []
    assert recorded(tmp_path, settings("tracking.credit.every=3")) == []
    assert len(recorded(tmp_path, settings("tracking.credit.every=3"), step=3)) == 14


def test_an_answer_that_no_file_can_have_is_recorded_with_a_mark(tmp_path: Path) -> None:
    """A reward of the user's own may return half of a surrogate pair, which JSON of a model's text can have."""
    found = recorded(tmp_path, settings("tracking.credit.responses=16"), make=lambda: [make_group("\ud83d9", "9", "0")])
    assert {response.facts["answer"] for response in found} == {"?", "9"}


def test_the_text_of_each_token() -> None:
    tokenizer = load_tokenizer(model_directory("embedded:tiny"))
    ids = tokenizer.encode("4+5+8=?")
    assert "".join(token_texts(ids, tokenizer.decode, {})) == tokenizer.decode(ids)

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    ids = list("a∑é!".encode())
    assert token_texts(ids, decode, {}) == ["a", "", "", "∑", "", "é", "!"]
    broken = [97, 0xE2, 0x88]
    assert "".join(token_texts(broken, decode, {})) == decode(broken), "a character that is cut off is shown too"


def test_other_names_are_no_steps(tmp_path: Path) -> None:
    (tmp_path / "credit").mkdir()
    for name in ("step-000005 (1).parquet", "step-x.parquet", "step-000007.parquet", "step-000006.parquet.partial"):
        (tmp_path / "credit" / name).touch()
    assert recorded_steps(tmp_path) == [7]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "step-000001.parquet"
    save_file({"x": numpy.zeros(3)}, path)
    with pytest.raises(DataError, match="step-000001"):
        read_credit(path)


def test_libraries_are_loaded_beside_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: the first file waited a good half second for pandas, which pyarrow loads, at the end of a step."""
    threads: list[str] = []
    monkeypatch.setattr(credit_log, "warm_up", lambda: threads.append(threading.current_thread().name))
    for responses in (0, 4):
        CreditLog(settings(f"tracking.credit.responses={responses}"), tmp_path, str)
        for thread in threading.enumerate():
            if thread.name == credit_log.WARM_UP:
                thread.join()
        assert threads == [credit_log.WARM_UP] * bool(responses), "without records, nothing is loaded"
