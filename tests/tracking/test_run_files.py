"""The run's own files: configuration without passwords, environment, summary, readable samples."""

import dataclasses
import json
import re

import yaml

from megatron_fipo.config import Config
from megatron_fipo.config.configure import load_config
from megatron_fipo.records.segments import segments_around
from megatron_fipo.tracking.rollout_log import log_rollouts
from megatron_fipo.tracking.run_files import distinguishing, set_aside, write_config, write_environment
from tests.tracking.groups import make_group


def test_config_holds_every_key_and_no_password(tmp_path):
    config = Config()
    config.rollout.addresses = ["http://me:secret@node1:8000", "http://node2:8000"]
    write_config(tmp_path, config)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["rollout"]["addresses"] == ["http://***@node1:8000", "http://node2:8000"]
    assert written["algorithm"]["clip_ratio_high"] == config.algorithm.clip_ratio_high
    assert written["algorithm"]["future_kl"] is None


def test_environment_names_the_versions(tmp_path):
    write_environment(tmp_path, world_size=4)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["world_size"] == 4
    assert re.match(r"\d+\.\d+", environment["packages"]["torch"])


def test_recorded_steps_of_a_run_that_begins_again_are_set_aside(tmp_path):
    """Otherwise its page would be of the newest of them, which may be another run's."""
    assert set_aside(tmp_path) == []
    (tmp_path / "credit").mkdir()
    assert set_aside(tmp_path) == [], "an empty directory is nobody's"
    (tmp_path / "credit" / "step-000090.parquet").touch()
    (kept,) = set_aside(tmp_path)
    assert kept.name.startswith("credit-") and not (tmp_path / "credit").exists()


def test_logged_rollouts_show_worst_and_best(tmp_path):
    groups = [make_group("7777778" + "9", "9", name=f"p{index}") for index in range(10)]
    path = log_rollouts(tmp_path, 12, groups, count=6, decode=str)
    assert path == tmp_path / "samples" / "step-000012.txt"
    rows = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["problem"] for row in rows] == ["p0"] * 4 + ["p9"] * 2
    assert [row["reward"] for row in rows] == [-1, -1, -1, 1, -1, 1]
    assert (
        rows[3] | {"step": 12, "response": "I say 9", "length": 3, "finish_reason": "stop", "weight_version": 4}
        == rows[3]
    )
    text = path.read_text()
    assert "problem p0 (toy) · right answer 9 · 1 of 8 right" in text and "I say 9" in text


def test_logged_rollouts_run_no_escape_sequence(tmp_path):
    group = make_group("9", "9")
    group = group.with_texts(["\x1b[2Jgone\x9b31m\r"])
    text = log_rollouts(tmp_path, 1, [group], count=1, decode=str).read_text()
    assert "\\x1b[2Jgone\\x9b31m\\r" in text and "\x1b" not in text


def test_turns_are_shown_one_by_one(tmp_path):
    """What the policy was told is not shown as if it had said it; the text and its length for rewards stay whole."""
    group = make_group("9", "9", lengths=[6])
    (sample,) = group.samples
    told = dataclasses.replace(sample, segments=segments_around([(2, 5)], 6, "made"))
    path = log_rollouts(tmp_path, 1, [dataclasses.replace(group, samples=(told,))], count=1, decode=str)
    row = json.loads(path.with_suffix(".jsonl").read_text())
    assert [turn["by"] for turn in row["turns"]] == ["policy", "environment", "policy"]
    assert [turn["text"] for turn in row["turns"]] == ["[7, 7]", "[7, 7, 7]", "[7]"]
    assert (row["length"], row["context_length"], row["response"]) == (3, 3, "I say 9")
    text = path.read_text()
    assert "3 tokens in 2 turns · told 3 tokens" in text and "[7, 7]\n-- told:\n[7, 7, 7]\n--\n[7]\n" in text
    path = log_rollouts(tmp_path, 2, [group], count=1, decode=str)
    assert "turns" not in path.read_text() and "turns" not in json.loads(path.with_suffix(".jsonl").read_text())


def test_nothing_to_keep(tmp_path):
    assert log_rollouts(tmp_path, 1, [make_group("9", "9")], count=0, decode=str) is None
    assert log_rollouts(tmp_path, 1, [], count=8, decode=str) is None
    assert not (tmp_path / "samples").exists()


def test_logged_rollouts_of_held_out_problems_have_a_file_of_their_own(tmp_path):
    """With one response per problem as many problems are kept as rollouts are asked for."""
    groups = [make_group("9", "9", name=f"p{index}") for index in range(10)]
    path = log_rollouts(tmp_path, 0, groups, count=5, decode=str, of="validation")
    assert path == tmp_path / "samples" / "validation-000000.txt"
    assert len(path.with_suffix(".jsonl").read_text().splitlines()) == 5
    assert log_rollouts(tmp_path, 0, groups, count=99, decode=str) == tmp_path / "samples" / "step-000000.txt"


def test_a_summary_tells_recipes_apart():
    """What a reader of many runs needs: the recipe's name alone is not enough when its keys were changed."""
    fipo, other = (distinguishing(load_config([f"algorithm={name}"])) for name in ("fipo", "fipo_7b"))
    assert (fipo["algorithm"], other["algorithm"]) == ("fipo", "fipo_7b")
    assert (fipo["future_kl"]["band_low"], other["future_kl"]["band_low"]) == (1.0, 0.8)
    changed = distinguishing(load_config(["algorithm=fipo", "algorithm.future_kl.decay_rate=8", "optimizer.lr=1e-5"]))
    assert {key for key in fipo if fipo[key] != changed[key]} == {"future_kl", "lr"}
    assert json.loads(json.dumps(fipo)) == fipo
