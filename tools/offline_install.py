"""The part of an offline bundle that runs on the machine without a network. It needs only Python and pip.

    python3 offline_install.py describe > machine.json        # the input of tools/offline_bundle.py
    python3 bundle/install.py check                           # check that all pieces are complete
    python3 bundle/install.py install --target ~/fipo-site    # then: export PYTHONPATH=~/fipo-site
    python3 bundle/install.py install                         # or into the environment of this Python

Every bundle contains this file as install.py. Pieces that were copied one by one have to be in one folder again. All
wheels are checked before any is installed.
"""

import argparse
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def describe() -> dict[str, Any]:
    """Describe this machine: its Python, processor, C library and installed packages."""
    library, version = platform.libc_ver()
    names = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "libc": f"{library} {version}",
        "installed": {name: version for name, version in sorted(names.items()) if name},
    }


def join(file: dict[str, Any], into: Path) -> Path:
    """Join one wheel from its parts.

    Raises:
        SystemExit: a part is missing, or the wheel is damaged.
    """
    missing = [part for part in file["parts"] if not (HERE / part).is_file()]
    if missing:
        sys.exit(f"{missing[0]} is missing: copy the folder {Path(missing[0]).parent} to {HERE}")
    wheel, found = into / file["wheel"], hashlib.sha256()
    with wheel.open("wb") as whole:
        for part in file["parts"]:
            content = (HERE / part).read_bytes()
            found.update(content)
            whole.write(content)
    if found.hexdigest() != file["sha256"]:
        sys.exit(f"{file['wheel']} is damaged: copy {', '.join(file['parts'])} again")
    return wheel


def install(target: Path | None, only_check: bool) -> None:
    """Check and join the wheels, and install them."""
    manifest = json.loads((HERE / "manifest.json").read_text())
    here = ".".join(platform.python_version_tuple()[:2])
    if here != manifest["python"]:
        sys.exit(f"this is Python {here}, and the wheels are for {manifest['python']}: run install.py by that one")
    with tempfile.TemporaryDirectory() as directory:
        wheels = [join(file, Path(directory)) for file in manifest["files"]]
        print(f"all {len(wheels)} wheels are complete")
        if not only_check and wheels:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            command += ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
            command += ["--upgrade", "--target", str(target)] if target else []
            subprocess.run([*command, *map(str, wheels)], check=True)
            print(f"installed: export PYTHONPATH={target}" if target else "installed")
    for line in manifest["unmet"]:
        print(f"not met: {line}")


def main() -> None:
    """Describe this machine, or install the bundle that contains this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("describe", help="print this machine as JSON")
    commands.add_parser("check", help="install nothing")
    installing = commands.add_parser("install", help="install the wheels beside this file")
    installing.add_argument("--target", type=Path, help="a separate folder, for PYTHONPATH")
    options = parser.parse_args()
    if options.command == "describe":
        print(json.dumps(describe(), indent=1))
    elif not (HERE / "manifest.json").is_file():
        sys.exit(f"{HERE / 'manifest.json'} is missing: run this file inside its bundle")
    else:
        install(getattr(options, "target", None), only_check=options.command == "check")


if __name__ == "__main__":
    main()
