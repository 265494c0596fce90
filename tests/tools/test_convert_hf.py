"""Why: users share models by this tool, and a run's checkpoints are useless if no other program can read them.

The command line as a user calls it, on what a parallel training run wrote, and for Megatron-Core to load; its memory.
Bad inputs, kills and full disks are in tests/weights/test_conversion.py. Does not cover Transformer Engine.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.usage import run_measured
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.models.parameters import parameters
from megatron_fipo.weights.huggingface import TensorInfo
from megatron_fipo.weights.huggingface_writer import HuggingFaceWriter
from tests.distributed import ROOT, run_ranks
from tests.weights.models import SMALL_MODELS, write_model

TIED, UNTIED = SMALL_MODELS[0], SMALL_MODELS[1]


def convert(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/convert_hf.py", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_a_training_checkpoint_becomes_the_model_it_came_from(tmp_path: Path) -> None:
    """Two tensor ranks pad its 61 tokens to 62, and the last stage has a copy of the tied embedding."""
    model, target = write_model(TIED, tmp_path), tmp_path / "converted"
    arguments = {"model_dir": str(model), "directory": str(tmp_path / "checkpoints"), "tensor": 2, "pipeline": 2}
    saved = run_ranks("tests.tools.ranks:save_training_checkpoint", 4, arguments, timeout=120)[0]
    result = convert("to-hf", saved, target, "--verify")
    assert result.returncode == 0, result.stderr
    assert "every tensor is equal, bit for bit" in result.stdout and "logits of Megatron-Core" in result.stdout
    assert (target / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()

    again = convert("to-hf", saved, target, "--model", model)
    assert (
        again.returncode == 1 and again.stderr == f"error: {target} exists and is not empty; choose a new directory\n"
    )


@pytest.mark.slow
def test_megatron_core_loads_what_is_written(tmp_path: Path) -> None:
    """--verify loads the checkpoint with Megatron-Core, as a run does, and compares logits with transformers."""
    model = write_model(UNTIED, tmp_path)
    there = convert("to-megatron", model, tmp_path / "megatron", "--dtype", "bfloat16", "--verify")
    assert there.returncode == 0, there.stderr
    found = re.search(r"differ by ([0-9.e-]+) at most", there.stdout)
    assert found and float(found[1]) < 1e-3


@pytest.mark.slow
def test_the_plan_has_every_tensor_and_refuses_what_does_not_divide(tmp_path: Path) -> None:
    model = write_model(UNTIED, tmp_path)
    result = convert("plan", model, "--tensor", "2", "--pipeline", "2", "--servers", "2", "--server-tensor", "2")
    lines = result.stdout.splitlines()
    model_config = read_architecture(model)
    names = [name for entry in parameters(model_config).values() for name in entry.names]
    assert [line.split()[0] for line in lines[: len(names)]] == names
    workers = "workers 0.0,0.1,1.0,1.1"
    assert lines[0] == f"model.embed_tokens.weight  6144 bytes  ranks 0,1  ->  {workers}"
    assert f"model.norm.weight  96 bytes  ranks 2  ->  {workers}" in lines
    assert lines[-1].startswith("each worker: receives ")

    refused = convert("plan", model, "--tensor", "3")
    assert refused.returncode == 2
    assert "3 does not divide the model's 4 attention heads and 4 key-value groups" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_memory_is_a_few_tensors_and_not_the_model(tmp_path: Path) -> None:
    """256 MiB of weights, the largest tensor 4 MiB. benchmarks/weights.py does the same with 2 GB."""
    small, large = write_model(UNTIED, tmp_path), tmp_path / "large"
    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((small / "config.json").read_text())
    config |= {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 16}
    config |= {"num_key_value_heads": 16, "vocab_size": 2048, "torch_dtype": "bfloat16"}
    config["layer_types"] = ["full_attention"] * 12
    (source / "config.json").write_text(json.dumps(config))
    table = parameters(read_architecture(source)).values()
    infos = [
        TensorInfo(name, shape, torch.bfloat16)
        for entry in table
        for name, shape in zip(entry.names, entry.shapes, strict=True)
    ]
    with HuggingFaceWriter(source, large, infos) as writer:
        for info in infos:
            writer.add(info.name, torch.zeros(info.shape, dtype=info.dtype))
        writer.close()
    assert sum(info.nbytes for info in infos) > 240 << 20
    idle = _peak_bytes("to-megatron", small, tmp_path / "small-megatron")
    assert _peak_bytes("to-megatron", large, tmp_path / "megatron") - idle < 100 << 20
    assert _peak_bytes("to-hf", tmp_path / "megatron", tmp_path / "back") - idle < 100 << 20


def _peak_bytes(*arguments: str | Path) -> int:
    """Peak resident memory of a conversion."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = run_measured([sys.executable, "tools/convert_hf.py", *arguments], 200, cwd=ROOT, env=environment)
    assert ended.returncode == 0, ended.stderr
    return ended.peak_bytes
