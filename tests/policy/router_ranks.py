"""What a rank of test_router_replay.py runs: steps whose routers choose otherwise all at once, or are frozen."""

import contextlib
import dataclasses
import hashlib
from typing import Any

import torch

from megatron_fipo.algorithm.losses import LossInputs, TokenLosses
from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config import AlgorithmConfig
from megatron_fipo.config.agreement import Limits
from megatron_fipo.policy import platform
from megatron_fipo.records import routes
from megatron_fipo.records.routes import UNKNOWN_BYTE
from megatron_fipo.rollout.plain_batch import plain_batch

platform.install()

from megatron_fipo.models.model_config import read_architecture  # noqa: E402
from megatron_fipo.policy.agreement import AgreementCheck  # noqa: E402
from megatron_fipo.policy.feed import made_alike  # noqa: E402
from megatron_fipo.policy.model import start_model_parallel  # noqa: E402
from megatron_fipo.policy.step import StepData, score_part, train_step  # noqa: E402
from megatron_fipo.policy.update import Policy, gather_parameters  # noqa: E402
from tests.policy.disturbed_routers import disturb_choices  # noqa: E402
from tests.policy.layouts import UNCLIPPED, make_config  # noqa: E402

MODEL = resolve_embedded("embedded:tiny_moe")


def steps(ways: list[tuple[str, bool, bool]]) -> list[dict[str, float]]:
    """The metrics of a step without any change of weights for each way.

    Args:
        ways: algorithm.router_replay, or two bytes: rollout, as if there were more experts than a byte has, or losses:
            none, with losses of routers, or losses alone: the same where the policy's loss has no token; whether the
            step's first mini-batch has old log-probs before its update; whether routers choose the smallest scores
            from the first update on.
    """
    platform.start_process_group(60)
    found = []
    in_one_byte = routes._IN_ONE_BYTE
    for way, first_known, disturbed in ways:
        replay = {"two bytes": "rollout", "losses": "none", "losses alone": "none"}.get(way, way)
        routes._IN_ONE_BYTE = 1 if way == "two bytes" else in_one_byte
        config = make_config({}, dataclasses.replace(UNCLIPPED, lr=1e-30), "fipo")
        config.algorithm = dataclasses.replace(
            config.algorithm,
            router_replay=replay,
            reference_kl_coef=0.1 * (replay == "rollout"),
            router_aux_loss_coef=0.1 * way.startswith("losses"),
            loss=f"{__file__}:of_no_token" if way == "losses alone" else None,
        )
        if not found:
            start_model_parallel(config.parallel, 0)
        policy = Policy(config, read_architecture(MODEL), str(MODEL), updates=10)
        check = AgreementCheck(Limits(warn=1e9, stop=1e9))
        if not first_known:
            check.judge({"log_prob_diff_mean": 0.0})
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(0, policy.model_config.vocab_size, (20 + i,), generator=generator) for i in range(9)]
        streams = {"token_ids": rows, "rollout_log_probs": [-torch.ones(len(row)) for row in rows]}
        if replay == "rollout":
            streams["routed_experts"] = [drawn_experts(policy, len(row), generator) for row in rows]
        batch = plain_batch(
            streams,
            prompt_lengths=[4] * len(rows),
            advantages=torch.randn(len(rows), generator=generator).tolist(),
            mini_batch_sizes=[3, 3, 3],
        )
        data = StepData([score_part(policy, made_alike(policy, *batch), check, is_first=True)], [])
        if disturbed:
            disturb_choices(policy)
        found.append(train_step(policy, data, check, lambda _: contextlib.nullcontext(), print))
    platform.stop_process_group()
    return found


def of_no_token(inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """A loss that leaves out all tokens."""
    return TokenLosses(inputs.log_probs, torch.zeros_like(inputs.response_mask))


def drawn_experts(policy: Policy, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """What an engine might have chosen, [tokens, bytes] uint8: any experts, and of some tokens it is not known."""
    form = policy.layout.routes
    assert form is not None
    scores = torch.rand(tokens - 1, max(form.layers) + 1, form.number, generator=generator)
    chosen = torch.from_numpy(form.packed(scores.topk(form.per_token).indices.numpy(), tokens))
    return chosen.index_fill(0, torch.arange(2, tokens, 5), UNKNOWN_BYTE)


def weights_after_an_update(parallel: dict[str, Any]) -> list[dict[str, Any]]:
    """Learning, and with routers frozen: this rank's weights after an update, the norm, and which have a gradient."""
    platform.start_process_group(60)
    found = []
    for frozen in (False, True):
        config = make_config(parallel, dataclasses.replace(UNCLIPPED, freeze_routers=frozen), "fipo")
        if not found:
            start_model_parallel(config.parallel, 0)
        policy = Policy(config, read_architecture(MODEL), str(MODEL), updates=10)
        before = _weights(policy)
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(0, policy.model_config.vocab_size, (20 + i,), generator=generator) for i in range(8)]
        batch = plain_batch(
            {"token_ids": rows, "rollout_log_probs": [-torch.ones(len(row)) for row in rows]},
            prompt_lengths=[4] * len(rows),
            advantages=torch.randn(len(rows), generator=generator).tolist(),
        )
        (mini_batch,) = made_alike(policy, *batch)
        metrics = policy.update(mini_batch, policy.log_probs([mini_batch]).streams[0])
        gather_parameters(policy.chunks)
        trained = [name for name, each in _parameters(policy) if each.requires_grad]
        norm = metrics["grad_norm"]
        found.append({"before": before, "after": _weights(policy), "trained": trained, "grad_norm": norm})
    platform.stop_process_group()
    return found


def _parameters(policy: Policy) -> list[tuple[str, torch.Tensor]]:
    return [pair for chunk in policy.chunks for pair in chunk.named_parameters()]


def _weights(policy: Policy) -> dict[str, str]:
    """A digest of each of this rank's weights."""
    return {name: hashlib.sha256(each.detach().numpy().tobytes()).hexdigest() for name, each in _parameters(policy)}
