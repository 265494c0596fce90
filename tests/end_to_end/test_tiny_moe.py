"""Why: experts are dealt to ranks, and each engine has all of them; in the shipped experiment a whole run puts the
two together, with a real vLLM and the task that a run is to learn.

Two steps of `experiment=tiny_moe`, whose two ranks have half of the experts each. Not covered: that it learns, which
takes minutes (docs/quick_start.md has the figures); engines whose experts are dealt to their ranks, which need GPUs.
"""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_fipo.assets import resolve_embedded
from tests.end_to_end import runs

pytestmark = pytest.mark.slow


def test_the_embedded_mixture_of_experts_trains(tmp_path: Path) -> None:
    """Every expert, router and norm of the last weights that engines got differs from the first, and engines agree."""
    runs.run(tmp_path, "experiment=tiny_moe", *runs.SMALL, "checkpoint.huggingface_every=2", "checkpoint.every=2")
    rows = runs.rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert 0 < row["log_prob_diff_mean"] < 1e-4, "experts of trainer and engine differ"
        assert row["grad_norm"] > 0
    assert rows[0]["ppo_kl_first"] == 0
    assert rows[1]["probe_diff_max"] < 1e-4
    before = load_file(resolve_embedded("embedded:tiny_moe") / "model.safetensors")
    after = load_file(tmp_path / "huggingface" / "step-000002" / "model.safetensors")
    assert after.keys() == before.keys()
    same = [name for name, tensor in before.items() if tensor.equal(after[name])]
    assert same == [], "they have not moved"
