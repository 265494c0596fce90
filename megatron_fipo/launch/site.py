"""Check a site's settings on its login node: `python -m megatron_fipo.launch.site [slurm/site.sh]`.

slurm/site.example.sh explains the settings. Each problem is printed in one line that names the setting and what would
be right. The exit status is then 2. This imports only the standard library, since a login node may have nothing else.
"""

import difflib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_fipo.errors import ConfigError

SITE_VARIABLE = "FIPO_SITE"
_SCHEDULER = ("FIPO_PARTITION", "FIPO_ACCOUNT", "FIPO_QOS", "FIPO_GPUS_PER_NODE", "FIPO_GRES", "FIPO_SBATCH_OPTIONS")
SETTINGS = (
    *_SCHEDULER,
    *("FIPO_MODULES", "FIPO_ACTIVATE", "FIPO_PYTHON"),
    *("FIPO_CONTAINER_IMAGE", "FIPO_CONTAINER_RUNTIME", "FIPO_CONTAINER_MOUNTS"),
    *("FIPO_MODELS", "FIPO_DATA", "FIPO_RUNS", "FIPO_CACHE", "FIPO_NETWORK_INTERFACE", "FIPO_OFFLINE"),
)
"""Every variable that slurm/lib/site.sh reads."""
RUNTIMES = ("pyxis", "apptainer", "singularity")
_SECRET = re.compile(r"^[^#\n]*\b\w*(TOKEN|API_KEY|PASSWORD|SECRET)=", re.MULTILINE)
_TIMEOUT_S = 30.0


def site_file() -> Path | None:
    """Return the file that FIPO_SITE names, or slurm/site.sh of the checkout if it exists."""
    if named := os.environ.get(SITE_VARIABLE):
        return Path(named)
    usual = Path(__file__).resolve().parents[2] / "slurm" / "site.sh"
    return usual if usual.is_file() else None


def site_values(path: Path) -> dict[str, str]:
    """Return the environment after bash has sourced the file. It has no FIPO_ variables except for the file's own.

    Raises:
        ConfigError: the file does not exist, or it fails.
    """
    if not path.exists():
        raise ConfigError(SITE_VARIABLE, f"{path} does not exist", "a copy of slurm/site.example.sh")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FIPO_")}
    ended = _run(["bash", "-c", 'set -a; . "$1" >&2; env -0', "bash", str(path)], kept)
    # The status of its last command is not informative, but bash's error messages name the file.
    if complaints := [line for line in ended.stderr.splitlines() if line.startswith(f"{path}: line ")]:
        raise ConfigError(str(path), f"bash says {complaints[0].removeprefix(f'{path}: ')}", "lines export NAME=VALUE")
    if "\0" not in ended.stdout:
        raise ConfigError(str(path), "it ends the shell that reads it, as `exit` does", "lines export NAME=VALUE")
    pairs = (entry.split("=", 1) for entry in ended.stdout.split("\0") if "=" in entry)
    return dict(pairs)


def site_problems(path: Path) -> Iterator[ConfigError]:
    """Yield the problems of the file's settings, each as an error to print or to raise."""
    try:
        values = site_values(path)
    except ConfigError as error:
        yield error
        return
    if path.is_file() and _SECRET.search(text := path.read_text(errors="replace")) and path.stat().st_mode & 0o077:
        name = _SECRET.search(text)
        remedy = f"chmod 600 {path}, or better a file that HF_TOKEN_PATH names"
        yield ConfigError(str(path), f"others may read the secret in it ({name and name.group().strip()}…)", remedy)
    for judge in (_names, _numbers, _paths, _software, _container, _slurm):
        for setting, problem, remedy in judge(values):
            yield ConfigError(f"{path}: {setting}", problem, remedy)


_Problem = tuple[str, str, str]
"""A setting, what is wrong with it, and what would be right."""


def _names(values: Mapping[str, str]) -> Iterator[_Problem]:
    for name in values:
        if name.startswith("FIPO_") and name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, n=1)
            yield name, "is read by nothing", near[0] if near else "one of the names in slurm/site.example.sh"


def _numbers(values: Mapping[str, str]) -> Iterator[_Problem]:
    gpus, offline = values.get("FIPO_GPUS_PER_NODE", "1"), values.get("FIPO_OFFLINE", "1")
    if not re.fullmatch(r"[1-9]\d{0,2}", gpus):
        yield "FIPO_GPUS_PER_NODE", f"{gpus} is not a number of GPUs", "4 or 8, say"
    if offline not in ("0", "1"):
        yield "FIPO_OFFLINE", f"is {offline}", "1: offline, or 0"


def _paths(values: Mapping[str, str]) -> Iterator[_Problem]:
    for name in ("FIPO_MODELS", "FIPO_DATA", "FIPO_RUNS", "FIPO_CACHE"):
        path = values.get(name)
        if not path:
            continue
        is_written = name in ("FIPO_RUNS", "FIPO_CACHE")
        if not os.path.isabs(path):
            yield name, f"{path} is relative, but jobs start in another directory", "an absolute path"
        elif not os.path.isdir(path):
            yield (
                name,
                f"there is no directory {path}",
                f"mkdir -p {path}" if is_written else "a directory that is there",
            )
        elif is_written and not os.access(path, os.W_OK | os.X_OK):
            yield name, f"{path} cannot be written", "a directory of yours"


def _software(values: Mapping[str, str]) -> Iterator[_Problem]:
    inside = bool(values.get("FIPO_CONTAINER_IMAGE"))
    python, activate, modules = (values.get(f"FIPO_{name}") for name in ("PYTHON", "ACTIVATE", "MODULES"))
    for name, value in (("FIPO_ACTIVATE", activate), ("FIPO_MODULES", modules)):
        if value and inside:
            yield (
                name,
                "is for software of the host, but a container has its own",
                f"unset {name} or FIPO_CONTAINER_IMAGE",
            )
            return
    if modules and (ended := _login(f"module load {modules}")) and (ended.returncode or "ERROR" in ended.stderr):
        yield "FIPO_MODULES", f"module load {modules}: {_last_line(ended)}", "names that `module avail` lists"
    if activate and not os.path.isfile(activate.split()[0]):
        yield "FIPO_ACTIVATE", f"there is no file {activate.split()[0]}", "the bin/activate of an environment"
    if python and not inside and not activate and shutil.which(python) is None:
        yield "FIPO_PYTHON", f"{python} is not a program", "the bin/python of an environment"


def _container(values: Mapping[str, str]) -> Iterator[_Problem]:
    image, runtime = values.get("FIPO_CONTAINER_IMAGE", ""), values.get("FIPO_CONTAINER_RUNTIME", RUNTIMES[0])
    if runtime not in RUNTIMES:
        near = difflib.get_close_matches(runtime, RUNTIMES, n=1)
        yield "FIPO_CONTAINER_RUNTIME", f"{runtime} is not known", near[0] if near else ", ".join(RUNTIMES)
        return
    for mount in filter(None, values.get("FIPO_CONTAINER_MOUNTS", "").split(",")):
        if not os.path.exists(mount.split(":")[0]):
            yield "FIPO_CONTAINER_MOUNTS", f"there is no {mount.split(':')[0]}", "SOURCE:TARGET[,SOURCE:TARGET]"
    if not image:
        for name in ("FIPO_CONTAINER_RUNTIME", "FIPO_CONTAINER_MOUNTS"):
            if values.get(name):
                yield name, "is set, but no image is", "FIPO_CONTAINER_IMAGE"
        return
    if (runtime == "pyxis") == image.endswith(".sif"):
        right = "FIPO_CONTAINER_RUNTIME=apptainer, or a .sqsh" if runtime == "pyxis" else "a .sif"
        if runtime == "pyxis" or image.endswith(".sqsh"):
            yield "FIPO_CONTAINER_IMAGE", f"{runtime} does not read {image}", right
    if image.startswith(("/", ".")) and not os.path.exists(image):
        yield (
            "FIPO_CONTAINER_IMAGE",
            f"there is no {image}",
            "an existing image; containers/README.md explains how to make one",
        )
    if runtime != "pyxis" and shutil.which(runtime) is None:
        yield "FIPO_CONTAINER_RUNTIME", f"{runtime} is not found", f"FIPO_MODULES outside, or {' or '.join(RUNTIMES)}"
    if runtime == "pyxis" and shutil.which("srun") and "--container-image" not in _run(["srun", "--help"]).stdout:
        yield "FIPO_CONTAINER_RUNTIME", "srun has no --container-image: pyxis is not installed", "apptainer, or none"


def _slurm(values: Mapping[str, str]) -> Iterator[_Problem]:
    if shutil.which("sinfo") is None or not any(values.get(name) for name in _SCHEDULER):
        return  # this is not a login node, or no setting concerns Slurm
    asked = _run(["sinfo", "--noheader", "--format=%R|%G"])
    if asked.returncode != 0:
        yield "Slurm", f"sinfo: {_last_line(asked)}", "a login node, or SLURM_CONF of the cluster"
        return
    gres: dict[str, list[str]] = {}
    for line in asked.stdout.splitlines():
        name, _, resources = line.partition("|")
        gres.setdefault(name, []).append(resources)
    partition = values.get("FIPO_PARTITION")
    if partition and (unknown := [name for name in partition.split(",") if name not in gres]):
        near = difflib.get_close_matches(unknown[0], gres, n=1)
        yield "FIPO_PARTITION", f"sinfo knows no {unknown[0]}", near[0] if near else f"one of {', '.join(gres)}"
        return
    found = list(_gpus(values, [text for name in (partition or ",".join(gres)).split(",") for text in gres[name]]))
    yield from found or _submission(values)


def _gpus(values: Mapping[str, str], resources: list[str]) -> Iterator[_Problem]:
    """Compare the GPUs per node with those of the partition's nodes."""
    number, kind = values.get("FIPO_GPUS_PER_NODE", "1"), values.get("FIPO_GRES", "gpu")
    wanted = int(number) if number.isdecimal() else 1
    plain = (re.sub(r"\(.*?\)", "", text) for text in resources)
    counts = [
        (name, int(count))
        for text in plain
        for name, _, count in (entry.rpartition(":") for entry in text.split(","))
        if name.startswith("gpu") and count.isdecimal()
    ]
    here = sorted({f"{name}:{count}" for name, count in counts}) or ["none"]
    fitting = [count for name, count in counts if name == kind or name.startswith(f"{kind}:")]
    if not fitting:
        yield "FIPO_GRES" if "FIPO_GRES" in values else "FIPO_PARTITION", f"no node has {kind}", ", ".join(here)
    elif wanted > max(fitting):
        yield "FIPO_GPUS_PER_NODE", f"no node has {wanted} GPUs", f"{max(fitting)}; sinfo has {', '.join(here)}"


def _submission(values: Mapping[str, str]) -> Iterator[_Problem]:
    """Ask Slurm itself about a job with these options: the account, the QoS and what else the site checks."""
    options = [
        f"--{option}={values[name]}"
        for option, name in (("partition", "FIPO_PARTITION"), ("account", "FIPO_ACCOUNT"), ("qos", "FIPO_QOS"))
        if values.get(name)
    ]
    gpus = values.get("FIPO_GPUS_PER_NODE", "1")
    options.append(f"--gres={values['FIPO_GRES']}:{gpus}" if "FIPO_GRES" in values else f"--gpus-per-node={gpus}")
    options += values.get("FIPO_SBATCH_OPTIONS", "").split()
    asked = _run(["sbatch", "--test-only", "--nodes=1", *options, "--output=/dev/null", "--wrap=true"])
    if asked.returncode != 0:
        settings = ", ".join(name for name in _SCHEDULER if values.get(name)) or "Slurm"
        yield settings, f"sbatch {' '.join(options)}: {_last_line(asked)}", "options that sbatch takes"


def _login(command: str) -> subprocess.CompletedProcess[str]:
    return _run(["bash", "-lc", command])


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer in {_TIMEOUT_S:g} s")


def _last_line(ended: subprocess.CompletedProcess[str]) -> str:
    lines = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
    return lines[-1] if lines else f"exit status {ended.returncode}"


def main() -> None:
    """Print each problem. SystemExit with 2 if there is one."""
    path = Path(sys.argv[1]) if sys.argv[1:] else site_file()
    if path is None:
        sys.exit("error: there is no slurm/site.sh, and FIPO_SITE is not set (a copy of slurm/site.example.sh)")
    problems = list(site_problems(path))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        sys.exit(ConfigError.exit_code)


if __name__ == "__main__":
    main()
