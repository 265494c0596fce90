"""Why: what `to-megatron` writes has to be a model to train, and not only one to look at.

A run from a converted checkpoint beside one from the Hugging Face directory it was made of, real vLLM in both: its
server starts without weights and has to get all of them from the trainer. Layouts and architectures are in
tests/weights/test_reshard.py, which loads both bit for bit alike.
"""

from pathlib import Path

import pytest

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.weights.conversion import to_megatron
from tests.end_to_end import runs
from tests.end_to_end.runs import SMALL

# A killed run's resume compares its weights with converted ones in every `make test`.
pytestmark = [pytest.mark.slow, pytest.mark.matrix]


def test_a_run_from_a_converted_checkpoint_is_the_run_from_its_source(tmp_path: Path) -> None:
    source, checkpoint = resolve_embedded("embedded:tiny"), tmp_path / "checkpoint"
    to_megatron(source, checkpoint)
    assert not list(checkpoint.glob("*.safetensors"))
    for name, model in (("source", source), ("converted", checkpoint)):
        runs.run(tmp_path / name, *SMALL, f"model.path={model}")
    expected, found = runs.rows(tmp_path / "source"), runs.rows(tmp_path / "converted")
    assert runs.prompts(tmp_path / "converted", 1) == runs.prompts(tmp_path / "source", 1)
    for row, other in zip(expected, found, strict=True):
        assert other["ppo_kl_first"] == 0.0
        assert 0 < other["log_prob_diff_mean"] < 1e-4, "the engine has not got the trainer's weights"
        for name in ("grad_norm", "entropy", "reward_mean", "response_length_mean"):
            assert other[name] == pytest.approx(row[name], rel=1e-6), (row["step"], name)
