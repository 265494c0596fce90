"""Why: a run that resumes must hold exactly what it saved, whichever layers wrote it; and what it cannot find must be
named, not left random.

One rank, bfloat16, the distributed optimizer. Norms with extra state stand for Transformer Engine's, whose checkpoints
have entries that Megatron-Core's own layers neither write nor expect. Resuming a run under another layout, and the data
order, are in tests/end_to_end. Not covered: Transformer Engine itself (tests/gpu).
"""

import json
from pathlib import Path

import pytest

from megatron_fipo.weights.conversion import to_huggingface
from tests.distributed import run_ranks
from tests.weights.models import SMALL_MODELS, write_model

pytestmark = pytest.mark.slow


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
