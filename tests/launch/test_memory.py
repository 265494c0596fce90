"""The memory estimate against bytes that the real Policy of the embedded model allocates on one rank, within 10%.

Why: an estimate that nobody compares with reality decides whether a cluster hour is spent. Not covered: Transformer
Engine's activations and the CUDA allocator, which need a GPU; several ranks, whose parameter counts
tests/test_preflight.py takes from the real models.
"""

import pytest

from megatron_fipo.launch.memory import micro_batches, stage_memory
from tests.distributed import run_ranks
from tests.launch.allocations import estimate_config

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_estimate_is_within_a_tenth_of_what_is_allocated(dtype: str) -> None:
    config, geometry = estimate_config(dtype)
    (stage,) = stage_memory(config, geometry, data_parallel_size=1)
    (allocated,) = run_ranks("tests.launch.allocations:allocate", 1, {"dtype": dtype})
    assert stage.parameters == allocated["parameters"]
    for name in ("weights", "gradients", "optimizer", "activations"):
        assert getattr(stage, name) == pytest.approx(allocated[name], rel=0.1), name
    # The control: a layer forgotten, or kept twice, would be seen.
    assert stage.activations * 3 / 4 != pytest.approx(allocated["activations"], rel=0.1)


def test_micro_batches_of_an_update() -> None:
    config, _ = estimate_config("float32")
    config.algorithm.mini_batch_prompts, config.algorithm.samples_per_prompt = 4, 8
    config.parallel.micro_batch_tokens = 100
    assert micro_batches(config, data_parallel_size=2, length=50) == 8
    assert micro_batches(config, data_parallel_size=2, length=1000) == 16
    config.parallel.pipeline, config.parallel.virtual_pipeline = 3, 2
    assert micro_batches(config, data_parallel_size=2, length=50) == 9, "the interleaved schedule wants a multiple"
