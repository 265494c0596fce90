"""slurm/convert.sh on a real Slurm, in both directions, through sbatch and called directly.

Why: a script that has never run fails when somebody needs the result of a run. Not covered: large models
(tests/weights) and containers.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_fipo.assets import resolve_embedded
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import call, submit

pytestmark = pytest.mark.slow


def test_a_model_goes_to_megatron_and_back_bit_for_bit(cluster: Cluster, tmp_path: Path) -> None:
    model = resolve_embedded("embedded:tiny")
    there, back = tmp_path / "checkpoint", tmp_path / "model"
    for start, arguments in (
        (submit, ["to-megatron", str(model), str(there)]),
        (call, ["to-hf", str(there), str(back), "--model", str(model), "--verify", "tensors"]),
    ):
        job = start(cluster, tmp_path, "convert.sh", arguments, "--open-mode=append")
        job.wait_for("COMPLETED", "FAILED", timeout_s=120)
        assert job.state == "COMPLETED", job.told()
    assert "verified: every tensor is equal, bit for bit" in job.output
    before, after = load_file(model / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_failed_conversion_fails_the_job_and_says_why(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "convert.sh", ["to-megatron", str(tmp_path / "nothing"), str(tmp_path / "target")])
    job.wait_for("COMPLETED", "FAILED", timeout_s=120)
    assert job.state == "FAILED"
    assert f"{tmp_path}/nothing" in job.output and "Traceback" not in job.output
