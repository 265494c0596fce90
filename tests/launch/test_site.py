"""Each wrong setting of a site is reported in one line, without Slurm.

Why: otherwise a wrong setting is found only after hours in a queue. tests/slurm/test_site.py tests the questions to
Slurm itself. Not covered: real modules, pyxis and Apptainer, which are not installed here. Programs with these names
replace them.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo import doctor
from megatron_fipo.config.configure import load_config
from megatron_fipo.launch.site import RUNTIMES, SETTINGS, SITE_VARIABLE, site_problems

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has bash, and the programs of tmp_path/bin."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "env", "mkdir"):
        (programs / name).symlink_to(shutil.which(name) or name)
    monkeypatch.setenv("PATH", str(programs))


def problems(tmp_path: Path, *lines: str) -> list[str]:
    path = tmp_path / "site.sh"
    path.write_text("".join(f"export {line}\n" for line in lines))
    return [str(problem).removeprefix(f"{path}: ") for problem in site_problems(path)]


def program(tmp_path: Path, name: str, script: str = "") -> None:
    path = tmp_path / "bin" / name
    path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
    path.chmod(0o755)


def test_the_example_names_every_setting_and_the_library_reads_each() -> None:
    """The example that users copy, the library and the check have the same list of names."""
    example = (ROOT / "slurm" / "site.example.sh").read_text()
    library = (ROOT / "slurm" / "lib" / "site.sh").read_text() + (ROOT / "slurm" / "lib" / "launch.sh").read_text()
    for text, others in ((example, {"FIPO_SITE"}), (library, {"FIPO_SITE", "FIPO_ROOT"})):
        named = set(re.findall(r"\bFIPO_[A-Z_]+[A-Z]\b", text)) - {"FIPO_ADDRESSES", "FIPO_ROLLOUT_TOKEN"}
        assert named - others == set(SETTINGS), named ^ set(SETTINGS)
    assert all(runtime in example for runtime in RUNTIMES)


def test_the_example_with_all_of_its_lines_is_bash(tmp_path: Path) -> None:
    example = (ROOT / "slurm" / "site.example.sh").read_text()
    active = re.sub(r"^# (export .*)$", r"\1", example, flags=re.MULTILINE)
    assert active.count("\nexport ") > 20
    (tmp_path / "site.sh").write_text(active)
    told = [str(problem) for problem in site_problems(tmp_path / "site.sh")]
    assert told and not any("bash says" in text or "is read by nothing" in text for text in told), told


def test_a_site_file_that_ends_its_shell_is_refused(tmp_path: Path) -> None:
    (tmp_path / "site.sh").write_text("export FIPO_RUNS=/nowhere\nexit 0\n")
    assert ["it ends the shell that reads it" in str(problem) for problem in site_problems(tmp_path / "site.sh")] == [
        True
    ]


def test_a_sound_site_has_no_problems(tmp_path: Path) -> None:
    image = tmp_path / "image.sif"
    image.touch()
    program(tmp_path, "apptainer")
    lines = [f"FIPO_CONTAINER_IMAGE={image}", "FIPO_CONTAINER_RUNTIME=apptainer", f"FIPO_RUNS={tmp_path}"]
    assert problems(tmp_path, *lines, f"FIPO_MODELS={tmp_path}", "FIPO_OFFLINE=0", "NCCL_IB_HCA=mlx5_0,mlx5_1") == []
    assert problems(tmp_path) == []


@pytest.mark.parametrize(
    ("lines", "setting", "right"),
    [
        (["FIPO_PARTITON=gpu"], "FIPO_PARTITON: is read by nothing", "FIPO_PARTITION"),
        (["FIPO_OFFLINE=yes"], "FIPO_OFFLINE: is yes", "1: offline, or 0"),
        (["FIPO_MODELS=models"], "FIPO_MODELS: models is relative", "an absolute path"),
        (["FIPO_DATA=/nowhere/at/all"], "FIPO_DATA: there is no directory /nowhere/at/all", "that is there"),
        (["FIPO_RUNS=/nowhere/runs"], "FIPO_RUNS: there is no directory", "mkdir -p /nowhere/runs"),
        (["FIPO_PYTHON=/nowhere/python"], "FIPO_PYTHON: /nowhere/python is not a program", "bin/python"),
        (["FIPO_ACTIVATE='/nowhere/activate fipo'"], "FIPO_ACTIVATE: there is no file /nowhere/activate", "activate"),
        (["FIPO_MODULES=cuda/13"], "FIPO_MODULES: module load cuda/13: ", "module avail"),
        (["FIPO_CONTAINER_RUNTIME=aptainer"], "FIPO_CONTAINER_RUNTIME: aptainer is not known", "apptainer"),
        (["FIPO_CONTAINER_RUNTIME=apptainer"], "FIPO_CONTAINER_RUNTIME: is set, but no", "FIPO_CONTAINER_IMAGE"),
        (["FIPO_CONTAINER_IMAGE=/nowhere.sqsh"], "FIPO_CONTAINER_IMAGE: there is no /nowhere.sqsh", "containers/"),
        (["FIPO_CONTAINER_IMAGE=x/y.sif"], "FIPO_CONTAINER_IMAGE: pyxis does not read x/y.sif", "=apptainer"),
        (
            ["FIPO_CONTAINER_IMAGE=x.sqsh", "FIPO_CONTAINER_RUNTIME=singularity"],
            "FIPO_CONTAINER_IMAGE: singularity does not read x.sqsh",
            "a .sif",
        ),
        (
            ["FIPO_CONTAINER_IMAGE=docker://x", "FIPO_CONTAINER_RUNTIME=apptainer"],
            "FIPO_CONTAINER_RUNTIME: apptainer is not found",
            "pyxis or apptainer",
        ),
        (
            ["FIPO_CONTAINER_IMAGE=nvcr.io#x", "FIPO_CONTAINER_MOUNTS=/nowhere:/x"],
            "FIPO_CONTAINER_MOUNTS: there is no /nowhere",
            "SOURCE:TARGET",
        ),
        (
            ["FIPO_CONTAINER_IMAGE=nvcr.io#x", "FIPO_MODULES=cuda"],
            "FIPO_MODULES: is for software of the host",
            "unset FIPO_MODULES",
        ),
        (["FIPO_RUNS=$(nonsense)"], "bash says line 1: nonsense: command not found", "NAME=VALUE"),
    ],
)
def test_each_wrong_setting_is_one_line(tmp_path: Path, lines: list[str], setting: str, right: str) -> None:
    told = problems(tmp_path, *lines)
    found = [text for text in told if text.startswith(setting)]
    assert len(found) == 1 and right in found[0] and "\n" not in found[0], told


def test_srun_without_pyxis_is_told(tmp_path: Path) -> None:
    program(tmp_path, "srun", "echo --nodes=N")
    (told,) = problems(tmp_path, "FIPO_CONTAINER_IMAGE=nvcr.io#x")
    assert "pyxis is not installed" in told
    program(tmp_path, "srun", "echo --container-image=[USER@][REGISTRY#]IMAGE")
    assert problems(tmp_path, "FIPO_CONTAINER_IMAGE=nvcr.io#x") == [], "the control"


def test_a_secret_that_others_may_read_is_told(tmp_path: Path) -> None:
    """The value of the secret is not shown."""
    (told,) = problems(tmp_path, "HF_TOKEN=hf_verysecret")
    assert "chmod 600" in told and "verysecret" not in told
    assert problems(tmp_path, "HF_TOKEN_PATH=/home/me/.token") == [], "the control"
    (tmp_path / "site.sh").write_text("export HF_TOKEN=hf_verysecret\n")
    (tmp_path / "site.sh").chmod(0o600)
    assert list(site_problems(tmp_path / "site.sh")) == []


def test_doctor_and_the_check_by_itself_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "site.sh"
    path.write_text("export FIPO_MODELS=/nowhere\n")
    monkeypatch.setenv(SITE_VARIABLE, str(path))
    (found,) = doctor.site()
    assert found.what == f"site: {path}: FIPO_MODELS" and found.mend and found.is_needed
    command = [sys.executable, "-m", "megatron_fipo.launch.site"]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"error: {path}: FIPO_MODELS: there is no directory /nowhere")
    path.write_text("")
    assert [finding.mend for finding in doctor.site()] == [""], "the control"


def test_models_and_problems_are_where_the_site_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(["experiment=fipo_7b"])
    assert (config.model.path, config.data.train) == ("models/Qwen2.5-Math-7B", ["data/dapo-math-17k.parquet"])
    monkeypatch.setenv("FIPO_MODELS", "/shared/models")
    monkeypatch.setenv("FIPO_DATA", "/shared/data")
    config = load_config(["experiment=fipo_7b"])
    assert config.model.path == "/shared/models/Qwen2.5-Math-7B"
    assert config.data.train + config.data.validation == [
        f"/shared/data/{name}.parquet" for name in ("dapo-math-17k", "aime-2024", "aime-2025")
    ]
