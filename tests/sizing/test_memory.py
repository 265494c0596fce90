"""The memory estimate agrees with the bytes that are really allocated, within 10 %.

The tests use the real Policy of the embedded model on one rank, and the real model of one rank of larger layouts, whose
other ranks are a fake process group.

Why: users decide by this estimate whether to spend a cluster hour. Not covered: Transformer Engine's activations and
the CUDA allocator, which need a GPU; parameter counts, which tests/test_preflight.py compares with the real models.
"""

import pytest

from megatron_fipo.policy import logprobs
from megatron_fipo.sizing import memory
from megatron_fipo.sizing.memory import micro_batches, stage_memory
from tests.distributed import run_ranks
from tests.sizing.allocations import LAYOUT_TOKENS, estimate_config, layout_config

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_estimate_is_within_a_tenth_of_what_is_allocated(dtype: str) -> None:
    config, model_config = estimate_config(dtype)
    (stage,) = stage_memory(config, model_config, data_parallel_size=1)
    (allocated,) = run_ranks("tests.sizing.allocations:allocate", 1, {"dtype": dtype})
    assert stage.parameters == allocated["parameters"]
    for name in ("weights", "gradients", "optimizer", "activations"):
        assert getattr(stage, name) == pytest.approx(allocated[name], rel=0.1), name
    # The control: a layer forgotten, or kept twice, would be seen.
    assert stage.activations * 3 / 4 != pytest.approx(allocated["activations"], rel=0.1)


LAYOUTS = {
    "first stage": (["parallel.tensor=2", "parallel.pipeline=2"], 0),
    "last stage": (["parallel.tensor=2", "parallel.pipeline=2"], 1),
    "whole tokens": (["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=false"], 0),
    "recomputed": (["parallel.tensor=2", "parallel.pipeline=4", "model.recompute=full"], 0),
    "context": (["parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2"], 0),
    "one rank": (["parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false"], 0),
}


@pytest.mark.matrix  # test_expert_memory.py has a rank of a larger layout
@pytest.mark.parametrize("fused", [False, True])
def test_estimate_is_within_a_tenth_of_the_peak_of_a_rank_of_a_larger_layout(fused: bool) -> None:
    """Everything that an update allocates beside weights, gradients and optimizer, operation by operation."""
    (found,) = run_ranks("tests.sizing.allocations:peaks", 1, {"layouts": list(LAYOUTS.values()), "fused": fused})
    for (name, (overrides, stage)), peak in zip(LAYOUTS.items(), found, strict=True):
        config, model_config = layout_config(overrides)
        estimated = stage_memory(config, model_config, data_parallel_size=1)[stage]
        expected = estimated.activations + max(estimated.logits, estimated.working)
        if fused and config.model.recompute != "full":
            # Two tensors less of the feed-forward's width, in bfloat16; layers are two a stage.
            tokens = LAYOUT_TOKENS // config.parallel.context * (config.parallel.pipeline - stage)
            expected -= 2 * model_config.ffn_hidden_size // config.parallel.tensor * 2 * 2 * tokens
        assert expected == pytest.approx(peak, rel=0.1), name
        # The control: nothing of what is counted could be left out.
        assert estimated.activations != pytest.approx(peak, rel=0.02), name


def test_fp32_pieces_are_as_large_as_the_log_probs_have_them() -> None:
    assert memory._LOG_PROB_CHUNK_ELEMENTS == logprobs._CHUNK_ELEMENTS


def test_micro_batches_of_an_update() -> None:
    config, _ = estimate_config("float32")
    config.algorithm.mini_batch_prompts, config.algorithm.samples_per_prompt = 4, 8
    config.parallel.micro_batch_tokens = 100
    assert micro_batches(config, data_parallel_size=2, length=50) == 8
    assert micro_batches(config, data_parallel_size=2, length=1000) == 16
    config.parallel.pipeline, config.parallel.virtual_pipeline = 3, 2
    assert micro_batches(config, data_parallel_size=2, length=50) == 9, "the interleaved schedule wants a multiple"
