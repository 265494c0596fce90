"""Which nodes are called bad, and why, and how nvidia-smi's output is read.

Why: a bad node that is not found costs the whole job an hour. Only nvidia-smi is replaced: by a script on PATH that
prints what the real one is known to print, and checks how it is called. Not covered: a real driver. tests/slurm runs
the check on real nodes, which have no driver.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.launch.node_check import judge

ROOT = Path(__file__).resolve().parents[2]
QUERY = "--query-gpu=name,driver_version,ecc.errors.uncorrected.volatile.total --format=csv,noheader"
WELL = "NVIDIA H100 80GB HBM3, 550.54.15, 0\n"


def node(gpus: int = 8, driver: str = "550.1", torch: str = "2.13.0", errors: str = "0") -> dict[str, Any]:
    gpu = {"name": "H100", "driver": driver, "errors": errors}
    return {"gpus": [gpu] * gpus, "trouble": "", "python": "3.11.9", "packages": {"torch": torch}}


def test_alike_nodes_are_good() -> None:
    assert judge({"a": node(), "b": node(), "c": node(errors="[N/A]")}, 8) == {}
    assert judge({"a": node(gpus=0), "b": node(gpus=0)}, 8) == {}, "a cluster without GPUs"


def test_each_bad_node_is_named_with_its_reason() -> None:
    bad = judge(
        {
            "good1": node(),
            "good2": node(),
            "good3": node(),
            "mute": None,
            "short": node(gpus=7),
            "broken": node(errors="3"),
            "old": node(driver="470.2"),
            "other": node(torch="2.12.0"),
        },
        8,
    )
    assert bad.keys() == {"mute", "short", "broken", "old", "other"}
    assert "shared storage" in bad["mute"]
    assert bad["short"] == "has 7 GPUs, not 8"
    assert bad["broken"].startswith("uncorrected memory errors of GPU 0: 3, 1: 3")
    assert "470.2" in bad["old"] and "550.1" in bad["old"]
    assert "2.12.0" in bad["other"]


def look(directory: Path, prints: str, status: int = 0) -> dict[str, Any]:
    """Return what `node_check look` writes if nvidia-smi has this output and exit status."""
    programs, facts = directory / "bin", directory / "facts"
    programs.mkdir(exist_ok=True)
    facts.mkdir(exist_ok=True)
    (directory / "prints").write_text(prints)
    script = f'#!/bin/sh\n[ "$*" = "{QUERY}" ] || exit 2\ncat {directory}/prints\nexit {status}\n'
    (programs / "nvidia-smi").write_text(script)
    (programs / "nvidia-smi").chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    subprocess.run(
        [sys.executable, "-m", "megatron_fipo.launch.node_check", "look", str(facts)],
        env={**os.environ, "PATH": path, "SLURMD_NODENAME": "node7", "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=60,
    )
    return json.loads((facts / "node7.json").read_text())


def verdict(directory: Path, prints: str, status: int = 0) -> str:
    """Return why a node of two GPUs is bad, compared with two good nodes; '' if it is good."""
    good = look(directory, WELL * 2)
    return judge({"a": good, "b": good, "node7": look(directory, prints, status)}, 2).get("node7", "")


def test_a_healthy_node(tmp_path: Path) -> None:
    facts = look(tmp_path, WELL * 8)
    assert facts["gpus"] == [{"name": "NVIDIA H100 80GB HBM3", "driver": "550.54.15", "errors": "0"}] * 8
    assert facts["trouble"] == ""
    assert "torch" in facts["packages"]
    assert verdict(tmp_path, WELL * 2) == ""


@pytest.mark.parametrize(
    ("prints", "status", "reason"),
    [
        (WELL, 0, "has 1 GPUs, not 2"),
        (WELL + "NVIDIA H100 80GB HBM3, 550.54.15, 2\n", 0, "uncorrected memory errors of GPU 1: 2"),
        (
            WELL + "NVIDIA H100 80GB HBM3, 550.54.15, [Unknown Error]\n",
            0,
            "uncorrected memory errors of GPU 1: [Unknown Error]",
        ),
        (
            "Unable to determine the device handle for GPU0000:CB:00.0: Unknown Error\n" + WELL,
            0,
            "nvidia-smi: Unable to determine the device handle for GPU0000:CB:00.0: Unknown Error (exit status 0)",
        ),
        ("No devices were found\n", 6, "nvidia-smi: No devices were found (exit status 6)"),
        (
            "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.54\n",
            18,
            "nvidia-smi: Failed to initialize NVML: Driver/library version mismatch "
            "NVML library version: 550.54 (exit status 18)",
        ),
        (
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
            "NVIDIA driver is installed and running.\n\n",
            9,
            "nvidia-smi: NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that "
            "the latest NVIDIA driver is installed and running. (exit status 9)",
        ),
    ],
)
def test_an_ill_node_says_what_the_driver_says(tmp_path: Path, prints: str, status: int, reason: str) -> None:
    assert verdict(tmp_path, prints, status) == reason


def test_another_driver_is_named(tmp_path: Path) -> None:
    other = "NVIDIA H100 80GB HBM3, 535.230.02, 0\n"
    reason = verdict(tmp_path, other * 2)
    assert reason.startswith("driver: NVIDIA H100 80GB HBM3 535.230.02, but most nodes have")
    assert verdict(tmp_path, "NVIDIA A10G, 550.54.15, [N/A]\n" * 2).startswith("driver: NVIDIA A10G 550.54.15")
