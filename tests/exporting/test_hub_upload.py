"""Why: an upload that fails after an hour of conversion, or that shows a token, costs more than it saves.

`export push=` against a hub on loopback, by huggingface_hub's own client. Does not cover Xet, by which the real hub
takes large files.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config.configure import load_config
from megatron_fipo.tracking.run_files import write_config
from tests.fake_hub import TOKEN, FakeHub, fake_hub

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(resolve_embedded("embedded:tiny"), tmp_path / "run" / "huggingface" / "step-000003")
    write_config(tmp_path / "run", load_config([]))
    return tmp_path / "run"


def push(hub: FakeHub, run: Path, token: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_fipo", "export", str(run), "push=me/model"]
    given = hub.environment(run.parent / "home", token) | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=given, cwd=run.parent, capture_output=True, text=True, timeout=120)


def test_a_model_with_its_card_goes_to_a_private_repository(run: Path) -> None:
    with fake_hub() as hub:
        done = push(hub, run, TOKEN)
        assert done.returncode == 0 and f"uploaded to {hub.url}/me/model" in done.stdout, done.stderr
    uploaded = hub.uploaded["me/model"]
    assert uploaded.pop("visibility") == b"private"
    written = run / "export" / "step-000003"
    assert uploaded == {path.name: path.read_bytes() for path in written.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= uploaded.keys()
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("token", "environment"),
    [("", {}), ("hf_wrong", {}), (TOKEN, {"HF_HUB_OFFLINE": "1"}), (TOKEN, {"HF_ENDPOINT": "http://127.0.0.1:9"})],
)
def test_a_hub_that_refuses_does_so_before_anything_is_converted(
    run: Path, token: str, environment: dict[str, str]
) -> None:
    with fake_hub() as hub:
        done = push(hub, run, token, **environment)
    assert done.returncode == 1 and done.stderr.startswith("error: push=me/model: the hub cannot be reached or refuses")
    assert done.stderr.count("\n") == 1 and "HF_TOKEN" in done.stderr and TOKEN not in done.stderr
    assert not (run / "export").exists()
