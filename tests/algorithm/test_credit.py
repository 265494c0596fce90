"""The credit against the paper's formulas written out in fp64, each F_t a sum of its own.

Why: everything FIPO adds is in F_t; a scan that is off by one block, one chunk or one reset still trains, only worse.
Context parallelism is covered with real processes in tests/policy/test_layouts.py; here the carry is checked on
one process by playing every rank in turn. Not covered: the CUDA kernel, see test_triton_scan.py.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.algorithm import credit
from megatron_fipo.algorithm.sequences import SequenceLayout
from megatron_fipo.algorithm.zigzag import zigzag_positions
from megatron_fipo.config import FutureKLConfig
from tests.algorithm.groups import GroupInTurn

C = 10.0
LONGEST = 20_480
ROWS = SequenceLayout()


def plain_future_kl(log_ratio: np.ndarray, takes_part: np.ndarray, decay_rate: float) -> np.ndarray:
    """F_t = Σ_{k≥t} γ^(k−t) M_k Δ_k of one row, each t a sum of its own: O(T²), fp64."""
    values = np.where(takes_part, log_ratio, 0.0)
    discount = (2.0 ** (-1.0 / decay_rate)) ** np.arange(len(values))
    return np.array([values[t:] @ discount[: len(values) - t] for t in range(len(values))])


def plain_weights(future: np.ndarray, log_ratio: np.ndarray, advantage: float, config: FutureKLConfig) -> np.ndarray:
    """f_t of one row from its F_t."""
    weights = np.clip(np.exp(np.minimum(future, 700)), config.band_low, config.band_high)
    held = np.clip(weights, 0.8, 1.0) if config.safety_rule == "clamp" else np.ones_like(weights)
    return np.where((advantage < 0) & (np.exp(log_ratio) > config.safety_thresh), held, weights)


def check_against_the_formulas(config: FutureKLConfig, tokens: int, scale: float, seed: int) -> None:
    """One row of each advantage sign and one without a response; fp64 below 1e-10 and fp32 below 1e-5."""
    generator = torch.Generator().manual_seed(seed)
    # Multiples of 2⁻¹² are the same number in fp32, and none of them lies on a threshold.
    drawn = (torch.randn(3, tokens, generator=generator, dtype=torch.float64) * scale).clamp(-20, 20)
    log_ratio = (drawn * 4096).round() / 4096
    mask = torch.rand(3, tokens, generator=generator) > 0.2
    mask[2] = False
    advantages = torch.tensor([[1.0], [-1.0], [0.5]], dtype=torch.float64)
    takes_part = mask & ((log_ratio <= math.log(C)) | (not config.participation_mask))
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        found = credit.influence_weights(log_ratio.to(dtype), mask, advantages.to(dtype), config, C, ROWS)
        summed = credit.future_kl(torch.where(takes_part, log_ratio, 0.0).to(dtype), config.decay_rate, ROWS)
        assert found.weights.dtype == summed.dtype == dtype
        for row in range(3):
            ratios, part = log_ratio[row].numpy(), takes_part[row].numpy()
            future = plain_future_kl(ratios, part, config.decay_rate)
            # Rounding grows with what is added up, not with what is left when the terms cancel.
            size = np.maximum(plain_future_kl(np.abs(ratios), part, config.decay_rate), 1.0)
            weights = plain_weights(future, ratios, advantages[row].item(), config)
            assert (np.abs(summed[row].double().numpy() - future) / size).max() < bound
            assert (np.abs(found.weights[row].double().numpy() - weights) / size).max() < bound


CASES = {
    "config": st.builds(
        FutureKLConfig,
        decay_rate=st.sampled_from([0.5, 8.0, 32.0, 256.0]),
        band_low=st.sampled_from([0.8, 1.0]),
        safety_thresh=st.sampled_from([1.1, 3.0, 10.0]),
        safety_rule=st.sampled_from(["clamp", "one"]),
        participation_mask=st.booleans(),
    ),
    "scale": st.sampled_from([0.01, 0.3, 3.0, 30.0]),
    "seed": st.integers(0, 10_000),
}


@settings(deadline=None, max_examples=60)
@given(tokens=st.integers(1, 300), **CASES)
def test_matches_the_formulas(config: FutureKLConfig, tokens: int, scale: float, seed: int) -> None:
    check_against_the_formulas(config, tokens, scale, seed)


@pytest.mark.slow
@pytest.mark.matrix
@settings(deadline=None, max_examples=3000)
@given(tokens=st.integers(1, 600), **CASES)
def test_matches_the_formulas_over_thousands_of_cases(
    config: FutureKLConfig, tokens: int, scale: float, seed: int
) -> None:
    check_against_the_formulas(config, tokens, scale, seed)


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(tokens=st.integers(1000, LONGEST), **CASES)
def test_matches_the_formulas_on_long_rows(config: FutureKLConfig, tokens: int, scale: float, seed: int) -> None:
    check_against_the_formulas(config, tokens, scale, seed)


def test_matches_the_formulas_at_full_length() -> None:
    check_against_the_formulas(FutureKLConfig(band_low=0.8, safety_thresh=3.0), LONGEST, 0.3, 0)


def test_a_vanishing_half_life_leaves_the_tokens_own_ratio() -> None:
    log_ratio = torch.randn(2, 50, dtype=torch.float64)
    config = FutureKLConfig(decay_rate=1e-3, participation_mask=False)
    raw = credit.influence_weights(
        log_ratio, torch.ones(2, 50, dtype=torch.bool), torch.ones(2, 1), config, C, ROWS
    ).raw
    torch.testing.assert_close(raw, log_ratio.exp(), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=12),
    decay_rate=st.sampled_from([0.5, 8.0, 32.0, 256.0]),
    seed=st.integers(0, 10_000),
)
def test_packed_sequences_do_not_touch_each_other(lengths: list[int], decay_rate: float, seed: int) -> None:
    """Each as if it were alone, bit for bit the same whatever its neighbours hold."""
    values = torch.randn(1, sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    layout = SequenceLayout(torch.tensor(lengths))
    found = credit.future_kl(values, decay_rate, layout)
    for sequence, summed in zip(values[0].split(lengths), found[0].split(lengths), strict=True):
        expected = plain_future_kl(sequence.numpy(), np.ones(len(sequence), dtype=bool), decay_rate)
        np.testing.assert_allclose(summed.numpy(), expected, rtol=1e-10, atol=1e-10)
    louder = values.clone()
    louder[:, : lengths[0]] = 1e300
    again = credit.future_kl(louder, decay_rate, layout)
    assert torch.equal(again[:, lengths[0] :], found[:, lengths[0] :])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_context_parallel_carry(ranks: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank sees its zigzag part and everyone's chunk heads, and must find the whole sequences' sums."""
    chunks = [16, 16, 16] if not packed else [16, 1, 40]
    lengths = [chunk * 2 * ranks for chunk in chunks]
    values = torch.randn(sum(lengths), dtype=torch.float64)
    whole = credit.future_kl(values[None], 32.0, SequenceLayout(torch.tensor(lengths)))[0]
    starts = np.cumsum([0, *lengths[:-1]])
    held = [
        torch.cat(
            [
                start + zigzag_positions(length // ranks, ranks, torch.device("cpu"))[rank]
                for start, length in zip(starts, lengths, strict=True)
            ]
        )
        for rank in range(ranks)
    ]
    stretches = torch.tensor(chunks).repeat_interleave(2)
    heads = [
        credit.suffix_scan(values[mine], 2 ** (-1 / 32.0), stretches)[stretches.cumsum(0) - stretches].view(-1, 2)
        for mine in held
    ]

    def all_gather(target: list[torch.Tensor], mine: torch.Tensor, group: GroupInTurn) -> None:
        torch.testing.assert_close(mine, heads[group.rank()])
        for slot, head in zip(target, heads, strict=True):
            slot.copy_(head)

    monkeypatch.setattr(credit.torch.distributed, "all_gather", all_gather)
    for rank, mine in enumerate(held):
        group: Any = GroupInTurn(rank, ranks)
        layout = SequenceLayout(torch.tensor(chunks) * 2 if packed else None, group)
        local = credit.future_kl(values[mine].view(1 if packed else 3, -1), 32.0, layout)
        torch.testing.assert_close(local.flatten(), whole[mine], rtol=1e-12, atol=1e-12)


def test_on_policy_weight_is_one() -> None:
    mask = torch.ones(2, 40, dtype=torch.bool)
    found = credit.influence_weights(torch.zeros(2, 40), mask, torch.tensor([[1.0], [-1.0]]), FutureKLConfig(), C, ROWS)
    assert torch.equal(found.weights, torch.ones(2, 40))


@pytest.mark.parametrize(("rule", "expected"), [("clamp", 0.8), ("one", 1.0)])
def test_safety_rule_holds_down_only_negative_advantages(rule: str, expected: float) -> None:
    log_ratio = torch.zeros(2, 3)
    log_ratio[:, 1] = math.log(5.0)  # above the safety threshold
    log_ratio[:, 2] = -10.0  # pulls F below the band
    settings_ = FutureKLConfig(band_low=0.5, band_high=1.2, safety_thresh=3.0, safety_rule=rule)
    weights = credit.influence_weights(
        log_ratio, torch.ones(2, 3, dtype=torch.bool), torch.tensor([[1.0], [-1.0]]), settings_, C, ROWS
    ).weights
    assert weights[0, 1] == 0.5
    assert weights[1, 1] == pytest.approx(expected)
    assert weights[1, 0] == 0.5, "a token below the threshold keeps its weight"


def test_share_of_clipped_weights_grows_with_decay_rate() -> None:
    torch.manual_seed(0)
    log_ratio, mask = torch.randn(8, 2000) * 0.03, torch.ones(8, 2000, dtype=torch.bool)
    shares = []
    for decay_rate in (8.0, 32.0, 128.0):
        config = FutureKLConfig(decay_rate=decay_rate, band_low=0.8)
        raw = credit.influence_weights(log_ratio, mask, torch.ones(8, 1), config, C, ROWS).raw
        shares.append(((raw < 0.8) | (raw > 1.2)).float().mean().item())
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]
