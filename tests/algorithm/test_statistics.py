"""Statistics that add up, and the quantiles that come of histograms.

Why: a metric that depends on how the batch was cut cannot be compared between two layouts. Not covered: the collective
itself; tests/policy/test_layouts.py compares every rank's metrics.
"""

import pytest
import torch

from megatron_fipo.algorithm.statistics import combine, from_vector, metrics, part_means, ratio_histograms, to_vector

TOKENS = {"count/tokens": torch.tensor(1.0)}


def drawn(scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(6, 5000) * scale,
        torch.tensor([1.0, -2.0, 0.5, -0.1, 0.0, 3.0])[:, None],
        torch.rand(6, 5000) > 0.3,
    )


@pytest.mark.parametrize("scale", [1e-4, 0.02, 1.0, 8.0])
def test_quantiles_are_those_of_the_tokens_up_to_a_bin(scale: float) -> None:
    log_ratio, advantages, mask = drawn(scale)
    found = metrics(TOKENS | ratio_histograms(log_ratio, advantages, mask))
    for name, rows in (("positive", advantages > 0), ("negative", advantages < 0)):
        taken = log_ratio[mask & rows]
        for percent in (1, 10, 50, 90, 99):
            exact = torch.quantile(taken, percent / 100).item()
            quantile = torch.tensor(found[f"ratio_{name}_q{percent:02d}"]).log().item()
            assert quantile == pytest.approx(exact, rel=0.06, abs=1e-4)


def test_an_unchanged_policy_has_quantiles_of_exactly_one() -> None:
    _, advantages, mask = drawn(1.0)
    found = metrics(TOKENS | ratio_histograms(torch.zeros(6, 5000), advantages, mask))
    assert {value for name, value in found.items() if name.startswith("ratio_")} == {1.0}


def test_a_sign_without_tokens_is_left_out() -> None:
    log_ratio, _, mask = drawn(1.0)
    found = metrics(TOKENS | ratio_histograms(log_ratio, torch.ones(6, 1), mask))
    assert any(name.startswith("ratio_positive") for name in found)
    assert not any(name.startswith("ratio_negative") for name in found)


def test_a_cut_and_the_wire_change_nothing() -> None:
    log_ratio, advantages, mask = drawn(0.5)
    whole = ratio_histograms(log_ratio, advantages, mask) | {"max/x": torch.tensor(3.0)}
    parts = [
        ratio_histograms(log_ratio[rows], advantages[rows], mask[rows]) | {"max/x": torch.tensor(top)}
        for rows, top in ((slice(0, 2), 3.0), (slice(2, 6), -1.0))
    ]
    sent = [from_vector(to_vector(part), part) for part in parts]
    combined = combine(sent)
    assert all(torch.equal(combined[name], value.double()) for name, value in whole.items())


def test_means_of_parts_have_their_own_counts() -> None:
    """Three parts of different sizes over two micro-batches; the empty one is left out."""
    values = torch.tensor([[1.0, 2.0, 3.0, 10.0]])
    first = torch.tensor([[True, True, False, False]])
    parts = {"a": first, "b": ~first & (values < 5), "none": torch.zeros_like(first)}
    found = metrics(TOKENS | combine([part_means(values, parts), part_means(values + 1, parts)]))
    assert (found["a"], found["b"]) == (2.0, 3.5)
    assert "none" not in found
