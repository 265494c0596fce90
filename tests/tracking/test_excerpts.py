"""Why: the report shows responses from files that a person may have removed or changed, and goes on without them."""

import json
from dataclasses import replace

import pytest

from megatron_fipo.tracking.excerpts import excerpts
from megatron_fipo.tracking.rollout_log import log_rollouts
from tests.tracking.groups import make_group


def test_they_are_from_the_first_the_middle_and_the_last_step(tmp_path):
    assert excerpts(tmp_path) == []
    for step in range(1, 12):
        log_rollouts(tmp_path, step, [make_group("9887", "9")], 4, str)
    shown = excerpts(tmp_path)
    assert [row["step"] for row in shown] == [1, 1, 6, 6, 11, 11]
    assert [row["accuracy"] for row in shown] == [0, 1] * 3 and shown[1]["text"] == "I say 9"


def test_one_step_is_shown_once_and_a_long_response_is_cut(tmp_path):
    log_rollouts(tmp_path, 1, [make_group("9", "9").with_texts(["x" * 5000])], 4, str)
    (row,) = excerpts(tmp_path)
    assert row["text"] == "x" * 3000 + "\n… and 2000 more characters"


def test_a_broken_file_is_left_out(tmp_path):
    for step in (1, 2, 3):
        log_rollouts(tmp_path, step, [make_group("98", "9")], 4, str)
    (tmp_path / "samples" / "step-000001.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "samples" / "step-000002.jsonl").write_bytes(b"\xff")
    assert [row["step"] for row in excerpts(tmp_path)] == [3, 3]


def test_half_of_a_surrogate_pair_is_kept(tmp_path):
    """Why: a reward that reads JSON can return one, and the step that wanted to write it ended the run."""
    half = chr(0xD800)
    group = make_group("9", "9").with_texts([f"I say {half}"])
    results = [replace(result, answer=half, extra={half: "é"}) for result in group.results]
    with pytest.raises(UnicodeEncodeError):
        half.encode()  # the control
    log_rollouts(tmp_path, 1, [group.with_results(results)], 4, str)
    row = json.loads((tmp_path / "samples" / "step-000001.jsonl").read_text(encoding="utf-8"))
    assert (row["answer"], row["response"], row["extra"]) == (half, f"I say {half}", {half: "é"})
    assert r"answer \ud800" in (tmp_path / "samples" / "step-000001.txt").read_text(encoding="utf-8")
