"""Why: `model.path=owner/name` has to download once, only the needed files and no pickles, and fail in one line.

The tests use a hub on loopback, by real HTTP and huggingface_hub's own client, in separate processes, since the client
reads its settings when it is imported. tests/end_to_end/test_train.py has a whole run of a downloaded model. Not
covered: the storage from which the real hub sends large files (Xet).
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config import checks_here
from megatron_fipo.config.configure import load_config
from megatron_fipo.config.model_places import hub_id, model_directory
from megatron_fipo.errors import ConfigError
from tests.config.judging import SERVER, judge
from tests.fake_hub import FakeHub, fake_hub

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A hub with owner/small, which also has files that a run must not download, and owner/old with only pickles."""
    tiny = shutil.copytree(resolve_embedded("embedded:tiny"), tmp_path / "served")
    (tiny / "pytorch_model.bin").write_bytes(b"a pickle")
    (tiny / "original").mkdir()
    (tiny / "original" / "consolidated.safetensors").write_bytes(b"the same weights")
    old = shutil.copytree(tiny, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors"))
    with fake_hub() as running:
        running.repositories |= {"owner/small": tiny, "owner/old": old}
        yield running


def call(hub: FakeHub, home: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code`, with all names of model_places, in a process that uses `hub` as the model hub."""
    lines = f"from megatron_fipo.config.model_places import *\n{code}"
    given = hub.environment(home) | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, "-c", lines], env=given, cwd=home.parent, capture_output=True, text=True, timeout=120
    )


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stdout
    return done.stderr.splitlines()[-1].removeprefix("megatron_fipo.errors.ConfigError: ")


@pytest.mark.slow
def test_a_model_is_fetched_once_without_pickles_and_found_without_a_network(hub: FakeHub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = call(hub, home, "print(fetch_config('owner/small'))")
    assert hub.downloads("owner/small") == ["config.json"], "enough to judge a configuration, and for preflight"
    assert Path(done.stdout.strip(), "config.json").is_file()
    done = call(hub, home, "print(fetch_model('owner/small'))")
    directory = Path(done.stdout.strip())
    assert {path.name for path in directory.iterdir()} == {
        path.name for path in resolve_embedded("embedded:tiny").iterdir()
    }
    assert "Fetching" in done.stderr, "a progress bar"
    assert hub.downloads("owner/small").count(WEIGHTS) == 1
    hub.requests.clear()
    again = call(hub, home, "print(fetch_model('owner/small')); print(model_directory('owner/small'))")
    offline = call(hub, home, "print(fetch_model('owner/small'))", HF_HUB_OFFLINE="1")
    assert [*again.stdout.split(), offline.stdout.strip()] == [str(directory)] * 3
    assert hub.requests == []


@pytest.mark.slow
def test_several_processes_at_once_fetch_each_file_once(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    code = "from megatron_fipo.config.model_places import *; print(fetch_model('owner/small'))"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT), "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert len({out for out, _ in said}) == 1 and said[0][0].strip()
    assert hub.downloads("owner/small").count(WEIGHTS) == 1
    assert "Fetching" not in said[1][1] + said[2][1], "one bar, on the terminal's rank"


@pytest.mark.slow
def test_a_broken_off_download_is_finished(hub: FakeHub, tmp_path: Path) -> None:
    served = hub.repositories["owner/small"]
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (served / "model.safetensors.index.json").write_text(json.dumps(index))
    (served / WEIGHTS).rename(served / "model-1.safetensors")
    assert "no complete safetensors" in refusal(call(hub, tmp_path / "home", "fetch_model('owner/small')"))
    shutil.copy(served / "model-1.safetensors", served / "model-2.safetensors")
    shutil.rmtree(tmp_path / "home")
    done = call(hub, tmp_path / "home", "print(fetch_model('owner/small'))")
    (Path(done.stdout.strip()) / "model-2.safetensors").unlink()
    assert call(hub, tmp_path / "home", "print(fetch_model('owner/small'))").stdout == done.stdout
    assert (Path(done.stdout.strip()) / "model-2.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "environment", "said"),
    [
        ("owner/none", {}, "the hub has no such model, or shows it only after `hf auth login`"),
        ("owner/old", {}, "owner/old has no complete safetensors"),
        ("owner/small", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set (`hf download owner/small` where there is a"),
        ("owner/small", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached ("),
    ],
)
def test_what_cannot_be_fetched_is_one_line(
    hub: FakeHub, tmp_path: Path, path: str, environment: dict[str, str], said: str
) -> None:
    text = refusal(call(hub, tmp_path / "home", f"fetch_model({path!r})", **environment))
    assert text.startswith("model.path: ") and said in text and str(tmp_path / "home") in text


@pytest.mark.slow
def test_a_hub_out_of_reach_is_said_at_once(hub: FakeHub, tmp_path: Path) -> None:
    """The client's own download of a single file would try six times, for 25 seconds, with two lines each time."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    refused = call(hub, tmp_path / "home", "fetch_config('owner/small')", **nowhere)
    assert "the hub cannot be reached (" in refusal(refused) and "Retrying" not in refused.stderr


@pytest.mark.slow
def test_preflight_and_planner_need_config_json_alone(hub: FakeHub, tmp_path: Path) -> None:
    code = "from megatron_fipo.sizing.estimate import model_directory as g\nprint(g('owner/small')[0])"
    done = call(hub, tmp_path / "home", code)
    assert Path(done.stdout.strip(), "config.json").is_file(), done.stderr
    assert hub.downloads("owner/small") == ["config.json"]


def test_what_is_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("Qwen/Qwen2.5-0.5B-Instruct") == ("Qwen/Qwen2.5-0.5B-Instruct", None)
    assert hub_id("owner/name@refs/pr/1") == ("owner/name", "refs/pr/1")
    for path in (
        "embedded:tiny",
        "/a/b",
        "./a/b",
        "~/a",
        "a",
        "a/b/c",
        "models/mine",
        "../a/b",
        "a/b@",
        "",
        "a/b@../c",
        "a--b/c",
        "é/b",
        f"a/{'x' * 95}",
    ):
        assert hub_id(path) is None, path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub_id("owner/name") is None and model_directory("owner/name") == Path("owner/name")


@pytest.mark.parametrize(
    ("overrides", "key", "said"),
    [
        (["experiment=smollm2_135m"], "model.path", "`make models/smollm2-135m` gets it"),
        (["experiment=fipo_7b", SERVER], "data.train", "tools/fetch_recipe_data.py --out data` gets"),
        (
            ["experiment=fipo_7b", "data=tiny", SERVER],
            "model.path",
            "`hf download Qwen/Qwen2.5-Math-7B --local-dir models/",
        ),
        (
            ["experiment=fipo_32b", "data=tiny", SERVER],
            "model.path",
            "`hf download Qwen/Qwen2.5-32B --local-dir models/",
        ),
        (["model.path=nowhere"], "model.path", "owner/name of a model of the hub"),
        (["model.path=owner/nowhere"], "model.path", "HF_HUB_OFFLINE is set"),
    ],
)
def test_an_experiment_says_which_command_gets_what_it_lacks(
    overrides: list[str], key: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FIPO_ROLLOUT_TOKEN", "secret")
    monkeypatch.setattr(checks_here, "has_cuda_driver", lambda: True)
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as refused:
        judge(*overrides, local=True)
    assert refused.value.key == key and said in refused.value.remedy + refused.value.problem


def test_the_command_of_an_experiment_makes_the_directory_that_it_names() -> None:
    for experiment in ("smollm2_135m", "fipo_7b", "fipo_32b"):
        model = load_config([f"experiment={experiment}"]).model
        assert model.fetch_command is not None and model.fetch_command.split()[-1] == model.path
