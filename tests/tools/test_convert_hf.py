"""The converter as a user runs it: on what a parallel training run wrote, round trip, and on what does not fit.

Does not cover memory, resuming or checkpoints of Transformer Engine layers.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import ROOT, run_ranks
from tests.weights.models import SMALL_MODELS, write_model

pytestmark = pytest.mark.slow

TIED, UNTIED = SMALL_MODELS[0], SMALL_MODELS[1]


def convert(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/convert_hf.py", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_training_checkpoint_becomes_the_model_it_came_from(tmp_path: Path) -> None:
    """Two tensor ranks pad its 61 tokens to 62, and the last stage has a copy of the tied embedding."""
    model, target = write_model(TIED, tmp_path), tmp_path / "converted"
    arguments = {"model_dir": str(model), "directory": str(tmp_path / "checkpoints"), "tensor": 2, "pipeline": 2}
    saved = run_ranks("tests.tools.ranks:save_training_checkpoint", 4, arguments, timeout=120)[0]
    result = convert("to-hf", saved, target, "--model", model)
    assert result.returncode == 0, result.stderr
    assert (target / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()

    again = convert("to-hf", saved, target, "--model", model)
    assert again.returncode == 1 and f"{target} exists and is not empty" in again.stderr


def test_there_and_back_and_into_another_model(tmp_path: Path) -> None:
    model, other = write_model(UNTIED, tmp_path), write_model(TIED, tmp_path)
    there = convert("to-megatron", model, tmp_path / "megatron")
    assert there.returncode == 0, there.stderr
    back = convert("to-hf", tmp_path / "megatron", tmp_path / "back", "--model", model)
    assert back.returncode == 0, back.stderr
    assert (tmp_path / "back/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()

    wrong = convert("to-hf", tmp_path / "megatron", tmp_path / "wrong", "--model", other)
    assert wrong.returncode == 1
    bias = "decoder.layers.self_attention.linear_qkv.bias"
    assert f"{bias}: (4, 144) in the checkpoint, (4, 96) by the configuration" in wrong.stderr
    assert "output_layer.weight: left over, shape (64, 48)" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert not list(tmp_path.glob("*wrong*")), "nothing half-written is left"


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    model = write_model(TIED, tmp_path)
    result = convert("to-hf", model, tmp_path / "target", "--model", model)
    assert result.returncode == 1 and "is not a distributed checkpoint" in result.stderr
