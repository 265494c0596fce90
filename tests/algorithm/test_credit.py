"""The credit against the paper's formula written out as a double loop in fp64.

Why: everything FIPO adds is in F_t; a scan that is off by one block, one chunk or one reset still trains, only worse.
Context parallelism is covered with real processes in tests/policy/test_layouts.py; here the carry is checked on
one process by playing every rank in turn. Not covered: GPU kernels.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.algorithm import credit
from megatron_fipo.algorithm.zigzag import zigzag_positions
from megatron_fipo.config import FutureKLConfig

C = 10.0


def plain_future_kl(log_ratio: torch.Tensor, mask: torch.Tensor, decay_rate: float, takes_part: bool) -> torch.Tensor:
    """F_t = Σ_{k≥t} γ^(k−t) M_k Δ_k, one term at a time."""
    gamma = 2 ** (-1 / decay_rate)
    rows, tokens = log_ratio.shape
    result = torch.zeros_like(log_ratio)
    for row in range(rows):
        for t in range(tokens):
            for k in range(t, tokens):
                if mask[row, k] and (not takes_part or log_ratio[row, k] <= math.log(C)):
                    result[row, t] += gamma ** (k - t) * log_ratio[row, k]
    return result


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 150),
    decay_rate=st.sampled_from([0.5, 8.0, 32.0, 256.0]),
    takes_part=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_matches_the_formula(tokens: int, decay_rate: float, takes_part: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_ratio = torch.randn(2, tokens, generator=generator, dtype=torch.float64) * 2
    mask = torch.rand(2, tokens, generator=generator) > 0.3
    mask[1] = False  # an all-masked row
    settings_ = FutureKLConfig(
        decay_rate=decay_rate, participation_mask=takes_part, band_low=1e-30, band_high=1e30, safety_thresh=1e30
    )
    found = credit.influence_weights(log_ratio, mask, torch.ones(2, 1, dtype=torch.float64), settings_, C)
    expected = plain_future_kl(log_ratio, mask, decay_rate, takes_part)
    torch.testing.assert_close(found.raw.log(), expected, rtol=1e-9, atol=1e-9)


def test_long_rows_agree_with_the_recurrence() -> None:
    values = torch.randn(3, 20_480, dtype=torch.float64)
    gamma = 2 ** (-1 / 32)
    expected, carry = torch.empty_like(values), torch.zeros(3, dtype=torch.float64)
    for t in range(values.shape[1] - 1, -1, -1):
        carry = values[:, t] + gamma * carry
        expected[:, t] = carry
    torch.testing.assert_close(credit.suffix_scan(values, gamma), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(credit.suffix_scan(values.float(), gamma).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("ranks", [2, 4])
def test_context_parallel_carry(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank sees its zigzag part and everyone's chunk heads, and must find the whole row's sums."""
    values = torch.randn(3, 16 * 2 * ranks, dtype=torch.float64)
    whole = credit.future_kl(values, 32.0)
    positions = zigzag_positions(values.shape[1] // ranks, ranks, torch.device("cpu"))
    gamma, length = 2 ** (-1 / 32.0), 16
    heads = [
        credit.suffix_scan(values[:, positions[r]].reshape(6, length), gamma).view(3, 2, length)[:, :, 0]
        for r in range(ranks)
    ]

    class Group:
        """Stands for a process group of which this test is every member in turn."""

        def __init__(self, rank: int):
            self._rank = rank

        def rank(self) -> int:
            return self._rank

        def size(self) -> int:
            return ranks

    def all_gather(target: list[torch.Tensor], mine: torch.Tensor, group: Group) -> None:
        torch.testing.assert_close(mine, heads[group.rank()])
        for slot, head in zip(target, heads, strict=True):
            slot.copy_(head)

    monkeypatch.setattr(credit.torch.distributed, "all_gather", all_gather)
    for rank in range(ranks):
        local = credit.future_kl(values[:, positions[rank]], 32.0, Group(rank))  # type: ignore[arg-type]
        torch.testing.assert_close(local, whole[:, positions[rank]], rtol=1e-12, atol=1e-12)


def test_on_policy_weight_is_one() -> None:
    mask = torch.ones(2, 40, dtype=torch.bool)
    found = credit.influence_weights(torch.zeros(2, 40), mask, torch.tensor([[1.0], [-1.0]]), FutureKLConfig(), C)
    assert torch.equal(found.weights, torch.ones(2, 40))


@pytest.mark.parametrize(("rule", "expected"), [("clamp", 0.8), ("one", 1.0)])
def test_safety_rule_holds_down_only_negative_advantages(rule: str, expected: float) -> None:
    log_ratio = torch.zeros(2, 3)
    log_ratio[:, 1] = math.log(5.0)  # above the safety threshold
    log_ratio[:, 2] = -10.0  # pulls F below the band
    settings_ = FutureKLConfig(band_low=0.5, band_high=1.2, safety_thresh=3.0, safety_rule=rule)
    weights = credit.influence_weights(
        log_ratio, torch.ones(2, 3, dtype=torch.bool), torch.tensor([[1.0], [-1.0]]), settings_, C
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
        raw = credit.influence_weights(log_ratio, mask, torch.ones(8, 1), config, C).raw
        shares.append(((raw < 0.8) | (raw > 1.2)).float().mean().item())
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]
