"""Why: the recipe's experiments need three files, and one command has to get all of them.

The tests use a hub on loopback, with rows like those of the real data sets. Not covered: whether the real ones exist.
"""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config.configure import load_config
from megatron_fipo.data.problems import load_problems
from megatron_fipo.data.tokenizers import load_tokenizer
from tests.fake_hub import FakeHub, fake_hub

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def serve(hub: FakeHub, folder: Path) -> None:
    for repository, name in (
        ("BytedTsinghua-SIA/DAPO-Math-17k", "dapo-math-17k"),
        ("BytedTsinghua-SIA/AIME-2024", "aime-2024"),
    ):
        row = {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": f"{name}: 1+2=?"}],
            "reward_model": {"ground_truth": "3", "style": "rule"},
        }
        path = folder / name / "data" / f"{name}.parquet"
        path.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
        hub.repositories[repository] = folder / name
    (folder / "aime25").mkdir()
    (folder / "aime25" / "test.jsonl").write_text(json.dumps({"problem": "4+5=?", "answer": "009", "id": "0"}) + "\n")
    hub.repositories["math-ai/aime25"] = folder / "aime25"


def fetch(hub: FakeHub, place: Path) -> subprocess.CompletedProcess[str]:
    environment = hub.environment(place / "home") | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tools" / "fetch_recipe_data.py"]
    return subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, timeout=120)


def test_the_files_of_the_recipe_are_made_once_and_read_by_its_configuration(tmp_path: Path, monkeypatch) -> None:
    with fake_hub() as hub:
        serve(hub, tmp_path / "served")
        done = fetch(hub, tmp_path)
        assert done.returncode == 0, done.stderr
        hub.requests.clear()
        assert fetch(hub, tmp_path).returncode == 0 and hub.requests == []
    monkeypatch.chdir(tmp_path)
    config = load_config(["data=dapo_math_17k"]).data
    tokenizer = load_tokenizer(resolve_embedded("embedded:tiny"))
    found = {problem.data_source: problem for problem in load_problems(config, "validation", tokenizer, 4096).problems}
    assert found["aime-2025"].ground_truth == "9" and "4+5=?" in found["aime-2025"].text
    assert len(load_problems(config, "train", tokenizer, 4096).problems) == 1


def test_a_data_set_that_is_gone_is_one_line_and_what_was_fetched_stays(tmp_path: Path) -> None:
    with fake_hub() as hub:
        serve(hub, tmp_path / "served")
        del hub.repositories["math-ai/aime25"]
        done = fetch(hub, tmp_path)
    assert done.returncode == 2 and "math-ai/aime25: test.jsonl cannot be fetched" in done.stderr.splitlines()[-1]
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"dapo-math-17k.parquet", "aime-2024.parquet"}
