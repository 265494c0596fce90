"""Why: a notebook runs the configuration that it has, whatever is in sys.argv, and gets its result as a value.

Not covered: what a run is (end_to_end/), and a Ctrl-C that arrives while Jupyter prints.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import nbformat
import pytest
from nbclient import NotebookClient

import megatron_fipo
from megatron_fipo import FipoError, load_config, read_run, run
from megatron_fipo.config import Config
from megatron_fipo.config.resolved import read, write
from megatron_fipo.errors import ConfigError, DataError
from megatron_fipo.runs.result import RunResult

ROOT = Path(__file__).resolve().parents[1]


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Neither does asking for the library."""
    script = (
        "import sys, megatron_fipo; assert 'hydra' not in sys.modules; megatron_fipo.run, dir(megatron_fipo);"
        "print(sorted({'torch', 'vllm', 'transformers', 'megatron.core'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "[]\n"
    with pytest.raises(AttributeError, match="has no attribute 'runn'"):
        megatron_fipo.runn  # noqa: B018


def test_a_configuration_is_judged_when_it_is_loaded_and_again_when_it_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.stepz: there is no such key"):
        load_config(["run.stepz=1"])
    with pytest.raises(ConfigError, match=r"algorithm\.mini_batch_prompts: 5 does not divide"):
        load_config(["algorithm.mini_batch_prompts=5"])
    config = load_config([f"run.directory={tmp_path / 'run'}"])
    config.model.path = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"model\.path: there is no directory"):
        run(config)
    config.run.steps = "3"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"run\.steps: Expected int, got str"):
        run(config)
    assert not (tmp_path / "run").exists()


def test_what_a_launcher_refuses_is_raised_with_its_reason(tmp_path: Path) -> None:
    """And printed by nobody."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    said: list[str] = []
    with pytest.raises(FipoError, match=r"^run\.resume: never, but .* holds a run \(another") as raised:
        run(load_config([f"run.directory={tmp_path}", "run.resume=never"]), echo=said.append)
    assert raised.value.exit_code == 2
    assert said == []


@pytest.mark.parametrize("overrides", [[], ["experiment=fipo_32b"], ["algorithm=dapo", "data=chain_sum"]])
def test_ranks_read_what_was_written(tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(overrides)
    config.data.prompt_template = 'a ${b} "{question}" \\ ä\n\t: # \x85 %'
    write(tmp_path / "config.yaml", config)
    assert read(tmp_path / "config.yaml") == config
    assert (tmp_path / "config.yaml").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {steps: many}", r"run\.steps: Expected int, got str"),
        ("[1]", "is not a configuration"),
        ("{", "cannot be read"),
    ],
)
def test_what_ranks_cannot_read_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read(tmp_path / "config.yaml")


def test_a_result_is_what_the_files_say_and_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no run"):
        read_run(tmp_path)
    write(tmp_path / "config.yaml", Config())
    assert read_run(tmp_path) == RunResult(tmp_path, MappingProxyType({}), (), (), ())
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward_mean": 0.5}\n')
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step-000001.jsonl").write_text('{"step": 1, "reward": 1.0}\n')
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    (tmp_path / "summary.json").write_text('{"steps": 1}')
    result = read_run(tmp_path)
    assert result.finished and result.metrics[0]["reward_mean"] == 0.5
    assert [row["reward"] for row in result.samples(1)] == [1.0] == [row["reward"] for row in result.samples()]
    assert [path.name for path in result.checkpoints] == ["step-000001"]
    with pytest.raises(TypeError):
        result.metrics[0]["reward_mean"] = 1  # type: ignore[index]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert not read_run(tmp_path).finished, "it has gone on since"


@pytest.mark.matrix  # tests of this file call what it calls
@pytest.mark.slow
def test_the_notebook_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a real kernel: two runs after one another, and a refusal."""
    # Jupyter keeps its own files in the home directory.
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "docs" / "library.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear them before a commit"
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )
    assert "run directory: " in said and "Traceback" not in said
    first, second = (read_run(tmp_path / "runs" / name) for name in ("notebook", "notebook-dapo"))
    assert [row["step"] for row in first.metrics] == [1, 2] and first.finished and first.checkpoints
    assert "influence_weights_mean" in first.metrics[0]
    assert [row["step"] for row in second.metrics] == [1] and "influence_weights_mean" not in second.metrics[0]
