"""Why: a run that resumes must hold exactly what it saved, whichever layers wrote it; and what it cannot find must be
named, not left random.

One rank, bfloat16, the distributed optimizer. Norms with extra state stand for Transformer Engine's, whose checkpoints
have entries that Megatron-Core's own layers neither write nor expect. Resuming a run under another layout, and the data
order, are in tests/end_to_end. Between two versions of Megatron-Core only where OTHER_STACK names a Python that has the
other one. Not covered: Transformer Engine itself (tests/te_on_cpu, tests/gpu).
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from megatron_fipo.weights.conversion import to_huggingface
from tests.distributed import ROOT, run_ranks
from tests.weights.models import SMALL_MODELS, write_model

pytestmark = pytest.mark.slow

ALONE = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""What a rank without others finds in its environment."""


def test_extra_state_is_kept_where_it_is_wanted_and_not_missed(tmp_path: Path) -> None:
    model = write_model(next(model for model in SMALL_MODELS if model.name == "qwen3-tied"), tmp_path)
    arguments = {"model_dir": str(model), "directory": str(tmp_path / "checkpoints")}
    (seen,) = run_ranks("tests.policy.checkpoints:save_and_load", 1, arguments, timeout=120)
    kinds = ("RMSNorm", "NormWithExtraState")
    for written in kinds:
        for loading in kinds:
            assert seen[f"{written} to {loading}"] == []
        # The converter passes extra state over, and a checkpoint is a model by itself.
        checkpoint = Path(seen[written])
        to_huggingface(checkpoint, tmp_path / f"from {written}", checkpoint)
        assert json.loads((tmp_path / f"from {written}/config.json").read_text())["dtype"] == "bfloat16"
    assert b"final_layernorm._extra_state" in Path(seen["NormWithExtraState"], ".metadata").read_bytes()
    assert b"final_layernorm._extra_state" not in Path(seen["RMSNorm"], ".metadata").read_bytes()
    assert seen["rates"] == [3e-3, 3e-3], "a resumed run has the learning rate of its configuration, not of its past"
    assert "it lacks extra_layer.bias, extra_layer.weight" in seen["other model"]
    assert seen["noted"] == version("megatron-core")
    assert "Megatron-Core 99.1.0 wrote it" in seen["newer version"] and "install 99.1 or newer" in seen["newer version"]


@pytest.mark.skipif("OTHER_STACK" not in os.environ, reason="OTHER_STACK names no Python with another Megatron-Core")
def test_an_older_megatron_cores_checkpoints_load_bit_for_bit_and_a_newer_ones_are_refused(tmp_path: Path) -> None:
    model = str(write_model(next(model for model in SMALL_MODELS if model.name == "qwen3-tied"), tmp_path))

    def run(function: str, python: str, **arguments: str) -> Any:
        given = json.dumps({"model_dir": model, "seed": 1} | arguments)
        command = (
            f"import json; from tests.policy import checkpoints; print(json.dumps(checkpoints.{function}(**{given})))"
        )
        ended = subprocess.run(
            [python, "-c", command], cwd=ROOT, env=ALONE, capture_output=True, text=True, timeout=120, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout.splitlines()[-1])

    here, there = sys.executable, os.environ["OTHER_STACK"]
    found = []
    for name, writer, reader in (("here", here, there), ("there", there, here)):
        saved = run("save_one", writer, directory=str(tmp_path / name))
        found.append(run("load_one", reader, saved=saved))
    older, newer = sorted(found, key=lambda result: Version(result["version"]))
    assert Version(older["version"]) < Version(newer["version"])
    assert newer["differing"] == []
    assert f"Megatron-Core {newer['version']} wrote it, and {older['version']}" in older["refusal"]
