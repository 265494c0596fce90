"""The losses against the published formulas written out token by token, and their known identities.

Why: clipping, dual clip, dropping and aggregation are a page of signs, and a wrong one trains all the same. Gradients
are compared, not only values. Layouts are covered in tests/policy/test_layouts.py.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.algorithm.losses import LOSSES, LossInputs, policy_loss
from megatron_fipo.algorithm.sequences import SequenceLayout
from megatron_fipo.algorithm.statistics import combine, metrics
from megatron_fipo.algorithm.zigzag import zigzag_positions
from megatron_fipo.config import LOSS_SETTINGS, AlgorithmConfig, FutureKLConfig
from tests.algorithm.groups import GroupInTurn
from tests.algorithm.plain import PLAIN, plain_loss

DAPO = AlgorithmConfig(loss_mode="vanilla")
FIPO = AlgorithmConfig(future_kl=FutureKLConfig(band_low=0.8, safety_thresh=3.0))


def random_inputs(seed: int, rows: int = 4, tokens: int = 30, scale: float = 1.0) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)

    def noise() -> torch.Tensor:
        return torch.randn(rows, tokens, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, tokens, (rows,), generator=generator)
    mask = torch.arange(tokens)[None, :] < lengths[:, None]
    old = -noise().abs()
    log_probs, streams = (old + scale * noise()).requires_grad_(), {"old_log_probs": old}
    streams["rollout_log_probs"] = old + 0.01 * noise()
    advantages = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    streams["reference_log_probs"] = old + 0.3 * noise()
    return LossInputs(
        log_probs=log_probs,
        streams=streams,
        advantages=advantages,
        response_mask=mask,
        response_lengths=lengths,
    )


def of_tokens(inputs: LossInputs, chosen: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """What has a value for each token, with those that `chosen` takes of [rows, tokens]."""
    return {
        "log_probs": chosen(inputs.log_probs),
        "response_mask": chosen(inputs.response_mask),
        "streams": {name: chosen(values) for name, values in inputs.streams.items()},
    }


def pack(inputs: LossInputs) -> LossInputs:
    """The same sequences back to back, each with one token of padding where it had any."""
    rows, tokens = inputs.response_mask.shape
    kept = torch.arange(tokens)[None, :] <= inputs.response_lengths[:, None]
    packed = of_tokens(inputs, lambda values: values[kept][None, :])
    advantages = inputs.advantages.expand(rows, tokens)[kept][None, :]
    return dataclasses.replace(inputs, **packed, advantages=advantages, layout=SequenceLayout(kept.sum(1)))


def switches(draw: st.DrawFn) -> AlgorithmConfig:
    """Any loss with any of its settings, those that clip much among them."""
    mode = draw(st.sampled_from(sorted(LOSSES)))
    read = {
        "clip_ratio_low": st.sampled_from([0.0, 0.2, 1.0]),
        "clip_ratio_high": st.sampled_from([0.0, 0.28, 4.0]),
        "clip_ratio_c": st.sampled_from([1.5, 3.0, 10.0]),
        "tau_pos": st.just(1.0),
        "tau_neg": st.sampled_from([1.05, 3.0]),
        "future_kl": st.builds(
            FutureKLConfig,
            decay_rate=st.sampled_from([0.5, 8.0, 32.0, 256.0]),
            band_low=st.sampled_from([0.8, 1.0]),
            safety_thresh=st.sampled_from([1.1, 3.0, 10.0]),
            safety_rule=st.sampled_from(["clamp", "one"]),
            participation_mask=st.booleans(),
            mask_stale=st.booleans(),
            drop_dual_clipped=st.booleans(),
        ),
    }
    chosen = {name: draw(values) if name in LOSS_SETTINGS[mode] else None for name, values in read.items()}
    aggregation = draw(
        st.sampled_from(["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
    )
    return AlgorithmConfig(
        loss_mode=mode,
        loss_agg_mode=aggregation,
        loss_scale_factor=24.0 if aggregation == "seq-mean-token-sum-norm" else None,
        # A correction a token of a ratio a sequence is defined for the token form alone, not for the form as printed.
        tis_cap=draw(st.sampled_from([None, 0.9, 2.0])) if mode != "gspo" else None,
        is_bounds=draw(st.sampled_from([None, [0.99, 1.01], [0.5, 2.0]])) if mode != "gspo" else None,
        reference_kl_coef=draw(st.sampled_from([0.0, 0.1])),
        reference_kl_estimator=draw(st.sampled_from(["k1", "k2", "k3"])),
        **chosen,
    )


def check_against_the_formulas(config: AlgorithmConfig, inputs: LossInputs) -> None:
    expected = plain_loss(inputs, config)
    expected_gradient = torch.zeros_like(inputs.log_probs)
    if expected.requires_grad:
        (expected_gradient,) = torch.autograd.grad(expected, inputs.log_probs)
    for shaped in (inputs, pack(inputs)):
        loss_sum, normaliser, _ = policy_loss(shaped, config)
        loss = loss_sum / normaliser.clamp(min=1)
        (gradient,) = torch.autograd.grad(loss, inputs.log_probs)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


CASES = {
    "config": st.composite(switches)(),
    "seed": st.integers(0, 10_000),
    "scale": st.sampled_from([0.05, 1.0, 4.0, 30.0]),
}


@settings(deadline=None, max_examples=100)
@given(**CASES)
def test_value_and_gradient_match_the_formulas(config: AlgorithmConfig, seed: int, scale: float) -> None:
    check_against_the_formulas(config, random_inputs(seed, scale=scale))


@pytest.mark.slow
@pytest.mark.matrix
@settings(deadline=None, max_examples=2000)
@given(**CASES)
def test_value_and_gradient_match_the_formulas_over_thousands_of_cases(
    config: AlgorithmConfig, seed: int, scale: float
) -> None:
    check_against_the_formulas(config, random_inputs(seed, rows=3, tokens=12, scale=scale))


@pytest.mark.parametrize("mode", sorted(LOSSES))
def test_the_comparison_sees_a_fault(mode: str) -> None:
    """Negative control: with a wrong bound, temperature or weight the formulas no longer agree."""
    config = AlgorithmConfig(
        loss_mode=mode, clip_ratio_high=0.0, tau_pos=1.0, tau_neg=1.05, future_kl=FutureKLConfig(band_low=0.8)
    )
    wrong = dataclasses.replace(config, clip_ratio_high=0.02, tau_pos=1.01)
    inputs = random_inputs(7)
    loss_sum, normaliser, _ = policy_loss(inputs, wrong)
    assert abs(loss_sum / normaliser - plain_loss(inputs, config)) > 1e-6


def test_every_loss_has_a_transcription_and_a_line_in_the_schema() -> None:
    assert set(LOSSES) == set(LOSS_SETTINGS) == set(PLAIN)


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
    reported = metrics(policy_loss(on_policy, config)[2])
    assert reported["ppo_kl"] == 0.0
    assert reported["pg_clipfrac"] == 0.0
    if config is FIPO:
        assert reported["influence_weights_min"] == reported["influence_weights_max"] == 1.0
        assert reported["influence_weights_std"] == 0.0


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_aggregation(mode: str) -> None:
    inputs = random_inputs(3, scale=0.01)
    config = AlgorithmConfig(loss_mode="vanilla", loss_agg_mode=mode, loss_scale_factor=50.0)
    loss_sum, normaliser, _ = policy_loss(inputs, config)
    token = -inputs.advantages * (inputs.log_probs - inputs.old_log_probs).exp()
    rows = (token * inputs.response_mask).sum(1)
    expected = {
        "token-mean": rows.sum() / inputs.response_mask.sum(),
        "seq-mean-token-sum": rows.mean(),
        "seq-mean-token-mean": (rows / inputs.response_lengths).mean(),
        "seq-mean-token-sum-norm": rows.mean() / 50,
    }[mode]
    torch.testing.assert_close(loss_sum / normaliser, expected, rtol=1e-9, atol=1e-9)


def test_the_gradients_known_identities() -> None:
    """On policy every loss has the plain policy gradient −A ∇log π, aggregation apart."""
    inputs = random_inputs(8)
    on_policy = dataclasses.replace(inputs, log_probs=inputs.old_log_probs.clone().requires_grad_())
    expected = -inputs.advantages * inputs.response_mask
    for mode in LOSSES:
        config = AlgorithmConfig(loss_mode=mode, tau_pos=1.0, tau_neg=1.05, future_kl=FutureKLConfig())
        (gradient,) = torch.autograd.grad(policy_loss(on_policy, config)[0], on_policy.log_probs)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12, msg=mode)


def test_truncated_importance_sampling_scales_each_token() -> None:
    inputs = random_inputs(4, scale=0.01)
    plain = policy_loss(inputs, DAPO)[0]
    capped = policy_loss(inputs, dataclasses.replace(DAPO, tis_cap=1e-3))[0]
    torch.testing.assert_close(capped, plain * 1e-3, rtol=1e-9, atol=1e-12)


def test_a_token_outside_of_the_bounds_leaves_the_numerator_and_not_the_mean() -> None:
    """And it credits no token before it, unless mask_stale says otherwise."""
    inputs = random_inputs(4, scale=0.5)
    stale = torch.zeros_like(inputs.response_mask)
    stale[0, inputs.response_mask[0].nonzero()[-1]] = True
    streams = dict(inputs.streams) | {
        "rollout_log_probs": torch.where(stale, inputs.old_log_probs - 3, inputs.old_log_probs)
    }
    inputs = dataclasses.replace(inputs, streams=streams)
    bounded = dataclasses.replace(FIPO, is_bounds=[0.5, 5.0])
    loss, normaliser, statistics = policy_loss(inputs, bounded)
    (gradient,) = torch.autograd.grad(loss, inputs.log_probs)
    assert (gradient[stale] == 0).all() and normaliser == policy_loss(inputs, FIPO)[1]
    reported = metrics(statistics)
    tokens = int(inputs.response_mask.sum())
    assert reported["is_masked"] == pytest.approx(1 / tokens)
    assert reported["is_weight_max"] == pytest.approx(math.exp(3)) and reported["is_weight_min"] == pytest.approx(1)
    total, squares = tokens - 1 + math.exp(3), tokens - 1 + math.exp(6)
    assert reported["is_ess"] == pytest.approx(total**2 / (tokens * squares), rel=1e-5)

    def raw_influence(config: AlgorithmConfig) -> float:
        return metrics(policy_loss(inputs, config)[2])["influence_weights_raw_mean"]

    assert config_without(bounded, "mask_stale") != bounded
    assert raw_influence(config_without(bounded, "mask_stale")) == raw_influence(FIPO) != raw_influence(bounded)


def config_without(config: AlgorithmConfig, name: str) -> AlgorithmConfig:
    """The same with a switch of future_kl off."""
    assert config.future_kl is not None
    return dataclasses.replace(config, future_kl=dataclasses.replace(config.future_kl, **{name: False}))


def test_parts_add_up_to_the_whole() -> None:
    """Statistics and normaliser of two halves, combined, are the whole's: any cut into micro-batches will do."""
    inputs = random_inputs(5)

    def rows(part: slice) -> LossInputs:
        cut = of_tokens(inputs, lambda values: values[part])
        lengths = inputs.response_lengths[part]
        return dataclasses.replace(inputs, **cut, advantages=inputs.advantages[part], response_lengths=lengths)

    whole = policy_loss(inputs, FIPO)[2]
    for name, value in policy_loss(pack(inputs), FIPO)[2].items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6, msg=name)
    halves = combine([policy_loss(rows(slice(0, 2)), FIPO)[2], policy_loss(rows(slice(2, 4)), FIPO)[2]])
    for name, value in whole.items():
        torch.testing.assert_close(halves[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_a_sequence_ratio_is_the_same_when_context_parallelism_cuts_the_row(
    aggregation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank sees its tokens and the whole row's sum, and all of them give the whole row's loss and gradient."""
    whole = random_inputs(9, tokens=32)
    config = AlgorithmConfig(loss_mode="gspo", loss_agg_mode=aggregation, clip_ratio_c=None)
    moved = torch.where(whole.response_mask, (whole.log_probs - whole.old_log_probs).detach(), 0.0)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total, group: total.copy_(moved.sum(1)))

    parts = []
    for rank, columns in enumerate(zigzag_positions(16, 2, torch.device("cpu"))):
        cut = of_tokens(whole, lambda values, columns=columns: values[:, columns])
        parts.append(
            policy_loss(dataclasses.replace(whole, **cut, layout=SequenceLayout(None, GroupInTurn(rank, 2))), config)
        )
    loss_sum, normaliser, _ = policy_loss(whole, config)
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss_sum, rtol=1e-12, atol=1e-12)
    assert parts[0][1] + parts[1][1] == normaliser
    gradients = [torch.autograd.grad(loss, whole.log_probs)[0] for loss in (parts[0][0] + parts[1][0], loss_sum)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_empty_mask_is_no_error() -> None:
    inputs = random_inputs(6)
    empty = dataclasses.replace(
        inputs,
        response_mask=torch.zeros_like(inputs.response_mask),
        response_lengths=torch.zeros_like(inputs.response_lengths),
    )
    loss_sum, normaliser, scalars = policy_loss(empty, FIPO)
    assert loss_sum.item() == 0 and normaliser.item() == 0
    reported = metrics(scalars)
    assert all(math.isfinite(value) for value in reported.values())
