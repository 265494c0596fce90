"""Why: .ci/run tests on the first and the last of these, and one that it overlooks is one that nobody tests.

Folders with stand-ins, beside what the machine has in /usr/bin. Not covered: that the project runs on them (.ci/run).
"""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def put(folder: Path, name: str, version: str, *, runs: bool = True, venv: bool = True) -> str:
    """A stand-in for a Python of that version; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    answer = f"case $2 in *version_info*) echo {version};; *venv*) exit {0 if venv else 1};; esac"
    path.write_text(f"#!/bin/sh\n{answer if runs else 'exit 127'}\n")
    path.chmod(0o755)
    return str(path)


def pythons(*folders: Path) -> tuple[dict[str, str], list[str]]:
    """What is printed, by version, and what is said to be skipped."""
    path = ":".join([*map(str, folders), "/usr/bin", "/bin"])
    ended = subprocess.run(
        [ROOT / ".ci/pythons"], env={"PATH": path}, capture_output=True, text=True, timeout=60, check=True
    )
    lines = [tuple(line.split(" ", 1)) for line in ended.stdout.splitlines()]
    versions = [tuple(map(int, version.split("."))) for version, _ in lines]
    assert versions == sorted(set(versions)), "one of each, the oldest first"
    return dict(lines), ended.stderr.splitlines()


def test_each_version_is_found_once_and_first_on_the_path(tmp_path: Path) -> None:
    first = put(tmp_path / "one", "python3.98", "3.98")
    put(tmp_path / "two", "python3.98", "3.98")
    other = put(tmp_path / "two", "python3.101", "3.101")
    unnumbered = put(tmp_path / "two", "python3", "3.99")
    put(tmp_path / "two", "python3.98-config", "3.97")
    found, skipped = pythons(tmp_path / "one", tmp_path / "two")
    assert {version: found.get(version) for version in ("3.97", "3.98", "3.99", "3.101")} == {
        "3.97": None,
        "3.98": first,
        "3.99": unnumbered,
        "3.101": other,
    }
    assert not [line for line in skipped if str(tmp_path) in line]


def test_what_is_too_old_is_passed_over(tmp_path: Path) -> None:
    names = {"python3.9": "3.9", "python3.10": "3.10", "python3": "3.8"}
    mine = {put(tmp_path, name, version) for name, version in names.items()}
    found, skipped = pythons(tmp_path)
    assert not mine & {*found.values()} and not [line for line in skipped if str(tmp_path) in line]


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    broken = put(tmp_path, "python3.98", "3.98", runs=False)
    bare = put(tmp_path, "python3.99", "3.99", venv=False)
    found, skipped = pythons(tmp_path)
    assert not {"3.98", "3.99"} & found.keys()
    assert f"skipped {broken}: it does not run" in skipped
    assert f"skipped {bare}: it lacks its venv module or its headers" in skipped


def test_what_is_behind_shims_is_found(tmp_path: Path) -> None:
    """pyenv's shims are on the path, whether or not what they stand for is activated."""
    put(tmp_path / "shims", "python3.98", "3.98", runs=False)
    behind = put(tmp_path / "versions/3.98.1/bin", "python3.98", "3.98")
    assert pythons(tmp_path / "shims")[0]["3.98"] == behind


@pytest.mark.skipif(not Path("/usr/bin/python3.11").exists(), reason="no Python 3.11 of the distribution here")
def test_the_distributions_own_is_preferred(tmp_path: Path) -> None:
    put(tmp_path, "python3.11", "3.11")
    found, skipped = pythons(tmp_path)
    named = any("/usr/bin/python3.11:" in line for line in skipped)
    assert named or found["3.11"] == "/usr/bin/python3.11"
