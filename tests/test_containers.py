"""The images' files and the order in which a GPU machine is installed.

Why: the order is in five places that users read, and a Dockerfile is code that nothing here can run. Not covered: the
build itself, which needs NVIDIA's registry; hadolint, shellcheck and the package's own build stand in for it.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo import doctor
from megatron_fipo.command_line.installation import CUDA_INSTALL
from tests.test_packaging import distribution, pins

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "containers" / "Dockerfile").read_text()
DEFINITION = (ROOT / "containers" / "apptainer.def").read_text()


def section(name: str) -> list[str]:
    """The lines of one section of Apptainer's definition."""
    _, _, rest = DEFINITION.partition(f"\n%{name}\n")
    body = re.split(r"^%\w+$", rest, maxsplit=1, flags=re.MULTILINE)[0]
    return [line.strip() for line in body.splitlines() if line.strip()]


def copied() -> set[str]:
    lines = re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE)
    return {source for line in lines for source in line.split()[:-1]}


@pytest.mark.parametrize(
    "text",
    [(ROOT / "README.md").read_text(), (ROOT / "docs" / "gpu.md").read_text(), DOCKERFILE, DEFINITION],
    ids=["README.md", "docs/gpu.md", "Dockerfile", "apptainer.def"],
)
def test_the_order_of_the_installation_is_the_same_everywhere(text: str) -> None:
    """Each command as it is, the first first, and no other way to install the extra."""
    places = [text.index(command) for command in CUDA_INSTALL]
    assert places == sorted(places)
    installs = re.findall(r"pip install .*\[cuda\][^\n]*", text)
    assert installs and all(line.startswith(CUDA_INSTALL[1]) for line in installs), installs


def test_doctor_advises_the_same_order() -> None:
    assert " && ".join(CUDA_INSTALL) in doctor.OPTIONAL["transformer-engine"]


def test_what_the_commands_name_is_pinned_and_torch_is_first() -> None:
    words = [word for command in CUDA_INSTALL for word in shlex.split(command)[2:]]
    named = [word for word in words if not word.startswith(("-", ".")) and word != "constraints.txt"]
    assert named[0] == "torch" and "setuptools" in named
    for python in ("3.11", "3.12", "3.13"):
        assert {distribution(name) for name in named} <= pins(python).keys()
    assert "--no-build-isolation" in words[words.index("--no-build-isolation") :], "the control"


def test_both_images_have_the_same_steps() -> None:
    base = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)
    assert base == re.findall(r"^From: (\S+)$", DEFINITION, re.MULTILINE) and base[0].endswith("-py3")
    assert {line.split()[0] for line in section("files")} == copied()
    script = section("post")
    commands = [part.strip() for run in re.findall(r"^RUN (.*)$", DOCKERFILE, re.MULTILINE) for part in run.split("&&")]
    assert [line for line in script if not line.startswith(("set ", "export ", "cd "))] == commands
    settings = re.search(r"^ENV (.*?)(?<!\\)$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert settings is not None
    exported = [word for line in script if line.startswith("export ") for word in line.split()[1:]]
    assert settings[1].replace("\\", "").split() == exported


def test_what_is_copied_is_enough_to_build_the_package(tmp_path: Path) -> None:
    """As setup.py sees it in the image: no file of the checkout is missing there."""
    for name in copied():
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    command = [sys.executable, "setup.py", "-q", "egg_info"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, check=True)
    sources = (tmp_path / "megatron_fipo.egg-info" / "SOURCES.txt").read_text()
    assert "megatron_fipo/cli.py" in sources and "conf/config.yaml" in sources


def test_the_dockerfile_passes_hadolint() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    ended = subprocess.run([hadolint, "-"], input=DOCKERFILE, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (0, "")
    bad = DOCKERFILE.replace("FROM nvcr.io/nvidia/pytorch:26.07-py3", "FROM nvcr.io/nvidia/pytorch:latest")
    ended = subprocess.run([hadolint, "-"], input=bad, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0 and "DL3007" in ended.stdout, "the control"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", ["post", "environment", "test"])
def test_apptainers_scripts_pass_shellcheck(name: str) -> None:
    script = "\n".join(["#!/bin/sh", *section(name), ""])
    ended = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stdout
