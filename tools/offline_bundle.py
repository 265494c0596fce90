"""Collect the wheels that a machine without a network lacks, in pieces that can be copied to it one by one.

    python3 offline_install.py describe > machine.json             # on that machine; needs no other file
    python tools/offline_bundle.py machine.json --into bundle      # on a machine with a network, in this environment
    python3 bundle/install.py install --target ~/fipo-site         # on that machine, with all pieces in one folder

Packages that are installed there and meet their requirement are kept; torch and its CUDA libraries are always kept. All
others are collected in the version of constraints.txt. Unmet requirements are listed, here and by install.py.
"""

import argparse
import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from offline_install import describe
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


class Collection:
    """The wheels for one machine, and unmet requirements."""

    def __init__(self, machine: dict[str, Any], folder: Path, without: list[str]):
        self.machine = machine
        self.folder = folder
        self.installed = {canonicalize_name(name): version for name, version in machine["installed"].items()}
        self.without = {canonicalize_name(name) for name in without}
        self.python = ".".join(machine["python"].split(".")[:2])
        self.environment: dict[str, Any] = {
            **default_environment(),
            "python_version": self.python,
            "python_full_version": machine["python"],
            "platform_machine": machine["machine"],
        }
        self.pins = self._read_pins()
        self.wheels: dict[str, Path] = {}
        self.unmet: list[str] = []

    def _read_pins(self) -> dict[str, str]:
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
        return {canonicalize_name(pin.name): str(pin.specifier) for pin in pins if self._applies(pin)}

    def _applies(self, requirement: Requirement, extras: frozenset[str] = frozenset()) -> bool:
        marker = requirement.marker
        return marker is None or any(
            marker.evaluate({**self.environment, "extra": extra}) for extra in (extras or {""})
        )

    def add(self, asker: str, requirements: list[str], extras: frozenset[str] = frozenset()) -> None:
        """Collect the packages that these requirements need, and their own requirements in turn."""
        queue = [(asker, Requirement(text), extras) for text in requirements]
        seen: set[tuple[str, frozenset[str]]] = set()
        while queue:
            asker, requirement, of_extras = queue.pop(0)
            name, wanted = canonicalize_name(requirement.name), frozenset(requirement.extras)
            if not self._applies(requirement, of_extras | {""}) or (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            if self._comes_along(name, requirement, asker):
                if name not in self.wheels:
                    self.wheels[name] = self._fetch(name, self.pins.get(name, str(requirement.specifier)))
                queue += [(name, Requirement(need), wanted) for need in requirements_of(self.wheels[name])]

    def _comes_along(self, name: str, requirement: Requirement, asker: str) -> bool:
        there = self.installed.get(name)
        if there is not None and requirement.specifier.contains(there, prereleases=True):
            return False
        if name in self.without:
            found = f"{there} is there" if there else "which is left out"
            self.unmet.append(f"{asker} asks for {requirement.name}{requirement.specifier}, {found}")
            return False
        return True

    def _fetch(self, name: str, version: str) -> Path:
        """Return one wheel for the machine: downloaded, or built here if there is only source."""
        print(f"{name}{version}", flush=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        with tempfile.TemporaryDirectory(dir=self.folder) as directory:
            target = ["--only-binary=:all:", "--python-version", self.python, "--implementation", "cp"]
            target += [option for tag in self._platforms() for option in ("--platform", tag)]
            download = [*pip, "download", "--no-deps", *target, "-d", directory, f"{name}{version}"]
            if subprocess.run(download, capture_output=True, check=False).returncode == 0:
                (wheel,) = Path(directory).glob("*.whl")
                return wheel.rename(self.folder / wheel.name)
            build = [*pip, "wheel", "--no-deps", "--no-binary", name, "-w", directory, f"{name}{version}"]
            built = subprocess.run(build, capture_output=True, text=True, check=False)
            wheels = list(Path(directory).glob("*.whl"))
            if built.returncode != 0 or not wheels:
                sys.exit(f"{name}{version}: there is no wheel of it, and pip built none: {built.stderr.strip()[-300:]}")
            if not wheels[0].name.endswith("-none-any.whl") and not self._is_like_here():
                sys.exit(
                    f"{name}{version} has to be compiled: run this by Python {self.python} on a machine with "
                    f"{self.machine['machine']} and {self.machine['libc']} or an older one, or use --without {name}"
                )
            return wheels[0].rename(self.folder / wheels[0].name)

    def _platforms(self) -> list[str]:
        """Return the tags of wheels that run there, the newest C library first."""
        _, version = self.machine["libc"].split()
        newest = int(version.split(".")[1])
        tags = [f"manylinux_2_{minor}_{self.machine['machine']}" for minor in range(newest, 4, -1)]
        return [*tags, f"manylinux2014_{self.machine['machine']}", f"manylinux1_{self.machine['machine']}"]

    def _is_like_here(self) -> bool:
        """Return whether code compiled here runs there: the same Python and processor, and no older C library there."""
        here = describe()
        (library, version), (there, newer) = (side["libc"].split() for side in (here, self.machine))
        same = here["python"].split(".")[:2] == self.python.split(".") and here["machine"] == self.machine["machine"]
        return same and library == there and Version(version) <= Version(newer)


def requirements_of(wheel: Path) -> list[str]:
    """Return the requirements in a wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []


def pack(wheels: list[Path], folder: Path, piece_bytes: int) -> dict[str, Any]:
    """Move the wheels into pieces of at most `piece_bytes`, cutting larger wheels into parts. Return the manifest."""
    files: list[dict[str, Any]] = []
    piece, filled = 1, 0
    for wheel in sorted(wheels, key=lambda wheel: -wheel.stat().st_size):
        parts: list[str] = []
        for part in _parts(wheel, piece_bytes):
            if filled and filled + len(part) > piece_bytes:
                piece, filled = piece + 1, 0
            place = folder / f"piece-{piece:02}" / f"{wheel.name}.{len(parts):02}"
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(part)
            filled += len(part)
            parts.append(str(place.relative_to(folder)))
        with wheel.open("rb") as file:
            files.append(
                {"wheel": wheel.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest(), "parts": parts}
            )
        wheel.unlink()
    return {"pieces": piece, "files": files}


def _parts(wheel: Path, size: int) -> Iterator[bytes]:
    with wheel.open("rb") as file:
        while part := file.read(size):
            yield part


def collect(options: argparse.Namespace) -> None:
    """Write the bundle's pieces, manifest and installer."""
    machine = json.loads(options.machine.read_text())
    folder: Path = options.into
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    collection = Collection(machine, folder, options.without)
    if not options.only:
        needs = importlib.metadata.requires("megatron_fipo") or []
        collection.add("megatron_fipo", needs, frozenset(options.extra))
    collection.add("the command line", [*(options.only or []), *options.also])
    manifest = pack(list(collection.wheels.values()), folder, options.piece_mib * MIB)
    manifest |= {"python": collection.python, "unmet": collection.unmet}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.copy(ROOT / "tools" / "offline_install.py", folder / "install.py")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{len(collection.wheels)} wheels, {size / MIB:.0f} MiB in {manifest['pieces']} pieces in {folder}")
    for line in collection.unmet:
        print(f"not met: {line}")


def main() -> None:
    """Collect the packages that a described machine lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", type=Path, help="the output of `offline_install.py describe` on that machine")
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER", help="a new one")
    parser.add_argument("--extra", nargs="*", default=[], choices=["cuda", "dev"], help="of setup.py")
    parser.add_argument(
        "--also", nargs="*", default=[], metavar="REQUIREMENT", help="requirements in addition to the project's own"
    )
    parser.add_argument("--only", nargs="+", metavar="REQUIREMENT", help="requirements instead of the project's own")
    parser.add_argument(
        "--without", nargs="*", default=["torch", "triton"], help="never collected (default: %(default)s)"
    )
    parser.add_argument("--piece-mib", type=int, default=60, help="largest piece (default: %(default)s)")
    collect(parser.parse_args())


if __name__ == "__main__":
    main()
