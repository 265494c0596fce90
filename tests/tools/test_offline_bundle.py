"""Why: a missing wheel of a bundle shows only on the machine without a network, where it cannot be fixed.

Real pip on both sides, over wheels that are made here, since tests have no network. Not covered: wheels for another
platform than this one's, and compiling.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import ROOT

pytestmark = pytest.mark.slow


def make_wheel(folder: Path, name: str, version: str, requires: list[str], content: bytes = b"") -> None:
    """A wheel of one module, which holds its own version, and one file of any content."""
    information = f"{name}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = '{version}'\n")
        wheel.writestr(f"{name}.bin", content)
        wheel.writestr(f"{information}/METADATA", "\n".join(metadata) + "\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def machine() -> dict[str, Any]:
    """Describe this machine, as the other machine would, with two packages that it does not have."""
    described = run(ROOT / "tools/offline_install.py", "describe")
    assert described.returncode == 0, described.stderr
    found: dict[str, Any] = json.loads(described.stdout)
    assert found["installed"]["pytest"] == pytest.__version__
    return found | {"installed": {"there_already": "3.1", "too_old": "1.0", "torch": "2.0"}}


@pytest.fixture(scope="module")
def collected(machine: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The bundle, and what `collect` said."""
    folder = tmp_path_factory.mktemp("offline")
    (folder / "wheels").mkdir()
    needs = [
        "second>=2",
        "there_already>=3",
        "too_old>=2",
        "torch>=3",
        "never; python_version < '3'",
        "more; extra == 'x'",
    ]
    make_wheel(folder / "wheels", "first", "1.0", needs)
    make_wheel(folder / "wheels", "second", "2.5", ["first"], os.urandom(5 << 19))
    make_wheel(folder / "wheels", "too_old", "2.0", [])
    (folder / "machine.json").write_text(json.dumps(machine))
    said = run(
        *(ROOT / "tools/offline_bundle.py", folder / "machine.json", "--into", folder / "bundle"),
        *("--only", "first", "--piece-mib", "1"),
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(folder / "wheels"),
    )
    assert said.returncode == 0, said.stderr
    return folder / "bundle", said.stdout


def test_what_is_lacking_comes_along_and_nothing_else(collected: tuple[Path, str]) -> None:
    bundle, said = collected
    wheels = {file["wheel"] for file in json.loads((bundle / "manifest.json").read_text())["files"]}
    assert wheels == {f"{name}-py3-none-any.whl" for name in ("first-1.0", "second-2.5", "too_old-2.0")}
    assert "not met: first asks for torch>=3, 2.0 is there" in said
    pieces = sorted(path for path in bundle.iterdir() if path.is_dir())
    sizes = [sum(file.stat().st_size for file in piece.iterdir()) for piece in pieces]
    assert len(pieces) >= 3 and max(sizes) <= 1 << 20, "what is too large for a piece is cut"


def test_a_bundle_installs_itself(collected: tuple[Path, str], tmp_path: Path) -> None:
    bundle, _ = collected
    done = run(bundle / "install.py", "install", "--target", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert f"export PYTHONPATH={tmp_path / 'site'}" in done.stdout and "torch>=3" in done.stdout
    code = "import first, second, too_old; print(first.version, second.version, too_old.version)"
    assert run("-c", code, PYTHONPATH=str(tmp_path / "site")).stdout == "1.0 2.5 2.0\n"


def test_what_is_missing_or_damaged_is_named_and_nothing_installed(collected: tuple[Path, str], tmp_path: Path) -> None:
    bundle, _ = collected
    part = next(bundle.glob("piece-*/second-2.5*.01"))
    content = part.read_bytes()
    try:
        part.unlink()
        missing = run(bundle / "install.py", "install", "--target", tmp_path / "site")
        part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        damaged = run(bundle / "install.py", "check")
    finally:
        part.write_bytes(content)
    assert missing.returncode == damaged.returncode == 1 and not (tmp_path / "site").exists()
    assert f"{part.relative_to(bundle)} is missing: copy the folder {part.parent.name} to {bundle}" in missing.stderr
    assert "second-2.5-py3-none-any.whl is damaged" in damaged.stderr
    assert run(bundle / "install.py", "check").returncode == 0, "the control"


def test_another_python_is_refused(collected: tuple[Path, str], tmp_path: Path) -> None:
    bundle, _ = collected
    manifest = json.loads((bundle / "manifest.json").read_text())
    (tmp_path / "install.py").write_bytes((bundle / "install.py").read_bytes())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"python": "3.99"}))
    refused = run(tmp_path / "install.py", "check")
    assert refused.returncode == 1 and "the wheels are for 3.99" in refused.stderr
