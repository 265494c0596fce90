"""The losses against the published formulas written out token by token, and their known identities.

Why: clipping, dual clip, dropping and aggregation are a page of signs, and a wrong one trains all the same. Gradients
are compared, not only values. Layouts are covered in tests/policy/test_layouts.py.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.algorithm.losses import LossInputs, policy_loss
from megatron_fipo.algorithm.statistics import combine, metrics
from megatron_fipo.config import AlgorithmConfig, FutureKLConfig

DAPO = AlgorithmConfig(loss_mode="vanilla")
FIPO = AlgorithmConfig(future_kl=FutureKLConfig(band_low=0.8, safety_thresh=3.0))


def random_inputs(seed: int, rows: int = 4, tokens: int = 30, scale: float = 1.0) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)

    def noise() -> torch.Tensor:
        return torch.randn(rows, tokens, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, tokens, (rows,), generator=generator)
    mask = torch.arange(tokens)[None, :] < lengths[:, None]
    old = -noise().abs()
    return LossInputs(
        log_probs=(old + scale * noise()).requires_grad_(),
        old_log_probs=old,
        rollout_log_probs=old + 0.01 * noise(),
        advantages=torch.randn(rows, 1, generator=generator, dtype=torch.float64),
        response_mask=mask,
        response_lengths=lengths,
    )


def plain_fipo(inputs: LossInputs, config: AlgorithmConfig) -> torch.Tensor:
    """FIPO.md's section 1, one token at a time, differentiable."""
    kl = config.future_kl
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(inputs.log_probs.shape[0]):
        length, advantage = int(inputs.response_lengths[row]), float(inputs.advantages[row])
        delta = [(inputs.log_probs[row, t] - inputs.old_log_probs[row, t]).clamp(-20, 20) for t in range(length)]
        losses, dual_clipped = [], 0
        for t in range(length):
            weight = 1.0
            if kl is not None:
                gamma = 2 ** (-1 / kl.decay_rate)
                future = sum(
                    gamma ** (k - t) * float(delta[k]) for k in range(t, length) if float(delta[k]) <= math.log(10.0)
                )
                weight = min(max(math.exp(future), kl.band_low), kl.band_high)
                if advantage < 0 and math.exp(float(delta[t])) > kl.safety_thresh:
                    weight = min(max(weight, 0.8), 1.0)
            ratio, weighted = delta[t].exp(), advantage * weight
            loss = torch.maximum(-weighted * ratio, -weighted * ratio.clamp(0.8, 1.28))
            if weighted < 0 and float(loss) > -weighted * 10.0:
                loss, dual_clipped = torch.tensor(-weighted * 10.0, dtype=torch.float64), dual_clipped + 1
            losses.append(loss)
        if kl is None or not kl.drop_dual_clipped or dual_clipped <= 1:
            total, count = total + sum(losses), count + length
    return total / max(count, 1)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.05, 1.0, 4.0]), fipo=st.booleans())
def test_value_and_gradient_match_the_formula(seed: int, scale: float, fipo: bool) -> None:
    config = FIPO if fipo else DAPO
    inputs = random_inputs(seed, scale=scale)
    loss_sum, normaliser, _ = policy_loss(inputs, config)
    loss = loss_sum / max(int(normaliser), 1)
    (gradient,) = torch.autograd.grad(loss, inputs.log_probs)
    expected = plain_fipo(inputs, config)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    if expected.requires_grad:
        (expected_gradient,) = torch.autograd.grad(expected, inputs.log_probs)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


def test_band_of_one_is_dapo_bit_for_bit() -> None:
    inputs = random_inputs(1, scale=0.5)
    kl = FutureKLConfig(band_low=1.0, band_high=1.0, drop_dual_clipped=False)
    fipo = policy_loss(inputs, AlgorithmConfig(future_kl=kl))
    dapo = policy_loss(inputs, DAPO)
    assert torch.equal(fipo[0], dapo[0])
    assert torch.equal(fipo[1], dapo[1])
    wider = AlgorithmConfig(future_kl=FutureKLConfig(drop_dual_clipped=False))
    assert not torch.equal(policy_loss(inputs, wider)[0], dapo[0])


@pytest.mark.parametrize("config", [FIPO, DAPO], ids=["fipo", "dapo"])
def test_first_update_has_no_kl(config: AlgorithmConfig) -> None:
    inputs = random_inputs(2)
    on_policy = dataclasses.replace(inputs, log_probs=inputs.old_log_probs.clone().requires_grad_())
    reported = metrics({name: value.item() for name, value in policy_loss(on_policy, config)[2].items()})
    assert reported["ppo_kl"] == 0.0
    assert reported["pg_clipfrac"] == 0.0
    if config is FIPO:
        assert reported["influence_weights_min"] == reported["influence_weights_max"] == 1.0
        assert reported["influence_weights_std"] == 0.0


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_aggregation(mode: str) -> None:
    inputs = random_inputs(3, scale=0.01)
    loss_sum, normaliser, _ = policy_loss(inputs, AlgorithmConfig(loss_mode="vanilla", loss_agg_mode=mode))
    token = -inputs.advantages * (inputs.log_probs - inputs.old_log_probs).exp()
    rows = (token * inputs.response_mask).sum(1)
    expected = {
        "token-mean": rows.sum() / inputs.response_mask.sum(),
        "seq-mean-token-sum": rows.mean(),
        "seq-mean-token-mean": (rows / inputs.response_lengths).mean(),
    }[mode]
    torch.testing.assert_close(loss_sum / normaliser, expected, rtol=1e-9, atol=1e-9)


def test_truncated_importance_sampling_scales_each_token() -> None:
    inputs = random_inputs(4, scale=0.01)
    plain = policy_loss(inputs, DAPO)[0]
    capped = policy_loss(inputs, dataclasses.replace(DAPO, importance_sampling_cap=1e-3))[0]
    torch.testing.assert_close(capped, plain * 1e-3, rtol=1e-9, atol=1e-12)


def test_parts_add_up_to_the_whole() -> None:
    """Statistics and normaliser of two halves, combined, are the whole's: any cut into micro-batches will do."""
    inputs = random_inputs(5)

    def rows(part: slice) -> LossInputs:
        tensors = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs) if f.name != "context_group"}
        return LossInputs(**{name: tensor[part] for name, tensor in tensors.items()})

    whole = policy_loss(inputs, FIPO)[2]
    halves = combine([policy_loss(rows(slice(0, 2)), FIPO)[2], policy_loss(rows(slice(2, 4)), FIPO)[2]])
    for name, value in whole.items():
        torch.testing.assert_close(halves[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_empty_mask_is_no_error() -> None:
    inputs = random_inputs(6)
    empty = dataclasses.replace(
        inputs,
        response_mask=torch.zeros_like(inputs.response_mask),
        response_lengths=torch.zeros_like(inputs.response_lengths),
    )
    loss_sum, normaliser, scalars = policy_loss(empty, FIPO)
    assert loss_sum.item() == 0 and normaliser.item() == 0
    reported = metrics({name: value.item() for name, value in scalars.items()})
    assert all(math.isfinite(value) for value in reported.values())
