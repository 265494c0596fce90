"""What the ranks of test_layouts.py run: one update under a layout, its gradients named as the reference names them."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_fipo.config import (
    AlgorithmConfig,
    Config,
    FutureKLConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicySection,
    RolloutConfig,
)
from megatron_fipo.policy import platform
from megatron_fipo.policy.micro_batch import MicroBatch, MiniBatch, TrainerStreams
from megatron_fipo.records.routes import UNKNOWN_BYTE
from megatron_fipo.rollout.plain_batch import Made, plain_batch

platform.install()

from megatron.core import parallel_state  # noqa: E402

from megatron_fipo.models.model_config import read_architecture  # noqa: E402
from megatron_fipo.policy import model  # noqa: E402
from megatron_fipo.policy.attention import RMSNorm, TorchAttention  # noqa: E402
from megatron_fipo.policy.feed import made_alike  # noqa: E402
from megatron_fipo.policy.model import start_model_parallel  # noqa: E402
from megatron_fipo.policy.update import Policy, gather_parameters  # noqa: E402
from tests.policy.disturbed_routers import disturb_choices, take_newest_choices  # noqa: E402
from tests.weights.whole import stage_tensors  # noqa: E402

ALGORITHMS = {
    "fipo": AlgorithmConfig(
        loss_mode="future_kl",
        clip_ratio_c=3.0,
        future_kl=FutureKLConfig(band_low=0.8, safety_thresh=1.05, decay_rate=4.0),
    ),
    "dapo_with_reference_kl": AlgorithmConfig(loss_mode="vanilla", reference_kl_coef=0.3),
    "dr_grpo": AlgorithmConfig(
        loss_mode="vanilla", loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=20.0, norm_adv_by_std=False
    ),
    "gspo": AlgorithmConfig(loss_mode="gspo", loss_agg_mode="seq-mean-token-mean", clip_ratio_c=None),
    "cispo": AlgorithmConfig(loss_mode="cispo", clip_ratio_c=None),
    "sapo": AlgorithmConfig(loss_mode="sapo", tau_pos=1.0, tau_neg=1.05),
}

WITH_ROUTER_LOSSES = {
    "dapo_and_routers": AlgorithmConfig(loss_mode="vanilla", router_aux_loss_coef=0.5, router_z_loss_coef=0.05),
    "grpo_and_routers": AlgorithmConfig(
        loss_mode="vanilla", loss_agg_mode="seq-mean-token-mean", router_aux_loss_coef=0.5, router_z_loss_coef=0.05
    ),
    "dr_grpo_and_routers": dataclasses.replace(
        ALGORITHMS["dr_grpo"], router_aux_loss_coef=0.5, router_z_loss_coef=0.05
    ),
}
"""For models with experts."""

REFERENCE_SCALE = 0.8
"""The reference policy's log-probs are the old ones times this: the model's own would have no divergence."""

ROLLOUT_REPLAYS = {
    "rollout": "whole",
    "rollout first": "whole",
    "rollout partly": "partly",
    "rollout shifted": "shifted",
    "rollout without": None,
}
"""What samples say of the engine's choices. Routers would choose the smallest scores but where some are not known; in
rollout first the update has no pass before it."""

OVERLAPPED = {"data": 2, "distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}

_SPLIT, _STAGES = {"tensor": 2, "sequence": True, "expert": 2, "data": 2}, {"pipeline": 2, "expert": 2, "data": 2}
FROM_ENGINE: list[dict[str, Any]] = [
    {"expert": 2, "data": 4, "replay": "rollout"},
    {**_SPLIT, "replay": "rollout first"},
    {**_STAGES, "replay": "rollout"},
    {"packing": True, "expert": 2, "context": 2, "data": 2, "replay": "rollout first"},
    {**_STAGES, "packing": True, "virtual_pipeline": 2, "model": {"recompute": "full"}, "replay": "rollout first"},
    {**_SPLIT, "packing": True, "replay": "rollout partly"},
    {"expert": 2, "data": 4, "replay": "rollout without", "sabotage": "own choice"},
    {"packing": True, "expert": 2, "data": 4, "replay": "rollout shifted", "sabotage": "the token before"},
]
"""Layouts in which samples come with transformers' choices of experts."""

# A large eps: the first step of Adam is the gradient's sign otherwise, and so is the rounding of a zero gradient.
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_updates=0, weight_decay=0.1, clip_grad=1.0, eps=1e-2)
UNCLIPPED = dataclasses.replace(OPTIMIZER, clip_grad=0.0)


def make_config(parallel: dict[str, Any], optimizer: OptimizerConfig, algorithm: str, **section: Any) -> Config:
    return Config(
        model=PolicySection(**({"dtype": "float32"} | section)),
        parallel=ParallelConfig(**({"micro_batch_tokens": 80, "distributed_optimizer": False} | parallel)),
        algorithm=(ALGORITHMS | WITH_ROUTER_LOSSES)[algorithm],
        optimizer=optimizer,
        rollout=RolloutConfig(temperature=1.0),
    )


def read_batch(path: str, routes: str | None = None) -> Made:
    """The batch of a file, with the routed experts that it has where `routes` says how: see `_routes`."""
    data = load_file(path)
    lengths, prompts = data["lengths"].tolist(), data["prompts"].tolist()
    responses = [length - prompt for length, prompt in zip(lengths, prompts, strict=True)]
    pairs = zip(prompts, data["old_log_probs"].split(responses), strict=True)
    return plain_batch(
        streams={
            "token_ids": data["tokens"].split(lengths),
            "rollout_log_probs": [torch.nn.functional.pad(values, (prompt, 0)) for prompt, values in pairs],
            **({"routed_experts": _routes(data["routed_experts"], routes).split(lengths)} if routes else {}),
        },
        prompt_lengths=prompts,
        advantages=data["advantages"].tolist(),
        told=data["told"].tolist(),
    )


def _routes(engines: torch.Tensor, how: str) -> torch.Tensor:
    """Routed experts as the engine's (whole), of all tokens but every third, or of the token before each."""
    if how == "partly":
        return engines.index_fill(0, torch.arange(0, len(engines), 3), UNKNOWN_BYTE)
    return engines.roll(1, 0) if how == "shifted" else engines


def one_update(model_dir: str, batch: str, folder: str, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Under each layout in turn: score, one update; the worst relative error and the metrics, on this rank.

    What is compared are gradients, before clipping, or (compare=updated) the parameters after clipping and one step.
    """
    platform.start_process_group(60)
    results = []
    for layout in layouts:
        settings = dict(layout)
        sabotage, section = settings.pop("sabotage", None), settings.pop("model", {})
        algorithm = settings.pop("algorithm", "fipo")
        compare, replay = settings.pop("compare", algorithm), settings.pop("replay", None)
        config = make_config(settings, OPTIMIZER if compare == "updated" else UNCLIPPED, algorithm, **section)
        if replay:
            source = "rollout" if replay.startswith("rollout") else "trainer"
            config.algorithm = dataclasses.replace(config.algorithm, router_replay=source)
        start_model_parallel(config.parallel, 0)
        results.append(_run(config, model_dir, batch, f"{folder}/{compare}.safetensors", sabotage, replay))
        parallel_state.destroy_model_parallel()
    platform.stop_process_group()
    return results


def mean_of_means(policy: Policy, micro_batch: MicroBatch, logits: torch.Tensor) -> Any:
    """The published code's loss: a mean a micro-batch, and then over these."""
    loss_sum, normaliser, statistics = policy.policy_loss(micro_batch, logits)
    return loss_sum / normaliser, torch.ones_like(normaliser), statistics


def _run(
    config: Config, model_dir: str, batch: str, reference: str, sabotage: str | None, replay: str | None
) -> dict[str, Any]:
    with _experts_unmarked() if sabotage == "expert_mark" else contextlib.nullcontext():
        policy = Policy(config, read_architecture(model_dir), model_dir, updates=10)
    _break(policy, sabotage)
    from_engine = replay is not None and replay.startswith("rollout")
    how = ROLLOUT_REPLAYS[replay] if replay is not None and from_engine else None
    if from_engine and how != "partly":
        disturb_choices(policy)
    data, store = read_batch(batch, how)
    if sabotage == "told":
        data = dataclasses.replace(data, told=data.told[:0])
    (mini_batch,) = made_alike(policy, data, store)
    known = policy.log_probs([mini_batch])
    with _local_sums() if sabotage == "local load" else contextlib.nullcontext():
        policy.routing.losses.share_load()
    (found_streams,), (routes,) = known.streams, known.routes
    log_probs = _log_prob_error(known.streams[0], mini_batch, batch)
    if replay not in (None, "undisturbed") and not from_engine:
        disturb_choices(policy)
    if replay in ("own choice", "rollout first"):
        routes = None
    if replay == "newest":
        take_newest_choices(policy)
    on_policy = policy.update(mini_batch, found_streams, routes=routes) if sabotage == "on_policy" else None
    engine = [micro_batch.streams.get("rollout_log_probs") for micro_batch in mini_batch]
    given = [
        {"old_log_probs": values, "reference_log_probs": values * REFERENCE_SCALE}
        for values in engine
        if values is not None  # on the last pipeline stage
    ]
    loss = partial(mean_of_means, policy) if sabotage == "normaliser" else None
    metrics = on_policy or policy.update(mini_batch, given, loss, routes)
    if sabotage != "stale":
        gather_parameters(policy.chunks)
    expected = {name: tensor.to(platform.device()) for name, tensor in load_file(reference).items()}
    if config.optimizer is UNCLIPPED:
        with torch.no_grad():
            for chunk in policy.chunks:
                for parameter in chunk.parameters():
                    parameter.copy_(parameter.main_grad)
    found = stage_tensors(policy.chunks, policy.model_config)
    errors = {name: _relative_error([found[name]], [expected[name]]) for name in found}
    return {
        "metrics": metrics,
        "routers": policy.routing.statistics.metrics(),
        "worst": max(errors.values()),
        "where": max(errors, key=errors.__getitem__),
        "log_probs": log_probs,
        "whole": _relative_error(list(found.values()), [expected[name] for name in found]),
    }


def _break(policy: Policy, sabotage: str | None) -> None:
    """Have a built policy compute something else, where the sabotage is of its parameters or modules."""
    if sabotage == "norm_weight":
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                parameter.sequence_parallel = False
    if sabotage == "router":
        with torch.no_grad():
            for name, parameter in (pair for chunk in policy.chunks for pair in chunk.named_parameters()):
                if name.endswith("mlp.router.weight"):
                    parameter.copy_(parameter.roll(1, 0))  # each token goes to the next expert
    if sabotage == "family":
        for module in (module for chunk in policy.chunks for module in chunk.modules()):
            if isinstance(module, TorchAttention):
                module.window = None
            elif isinstance(module, RMSNorm):
                module.zero_centered = False


def _log_prob_error(found: TrainerStreams, mini_batch: MiniBatch, batch: str) -> float:
    """The largest difference of a response's log-prob from the reference model's; 0 but on the last stage."""
    data, worst = load_file(batch), 0.0
    lengths, prompts = data["lengths"].tolist(), data["prompts"].tolist()
    responses = [length - prompt for length, prompt in zip(lengths, prompts, strict=True)]
    expected = data["log_probs"].split(responses)
    for streams, micro_batch in zip(found, mini_batch, strict=False):
        parts = [_by_sequence(micro_batch, each) for each in (micro_batch.position_ids, streams["old_log_probs"])]
        for place, positions, log_probs in zip(micro_batch.places, *parts, strict=False):
            label = positions + 1 - prompts[place]
            is_response = (label >= 0) & (label < responses[place])
            errors = log_probs[is_response] - expected[place][label[is_response]]
            worst = max([worst, *errors.abs().tolist()])
    return worst


def _by_sequence(micro_batch: MicroBatch, values: torch.Tensor) -> Sequence[torch.Tensor]:
    """The values of each sequence of a micro-batch, padding included."""
    return values.unbind() if micro_batch.local_lengths is None else values[0].split(micro_batch.local_lengths.tolist())


@contextlib.contextmanager
def _experts_unmarked() -> Iterator[None]:
    """Within it, models are built with experts' gradients that are summed as the others are."""
    mark, model._mark_experts = model._mark_experts, lambda chunk, parallel: None
    try:
        yield
    finally:
        model._mark_experts = mark


@contextlib.contextmanager
def _local_sums() -> Iterator[None]:
    """Within it, every sum over ranks is this rank's own part."""
    sum_up, torch.distributed.all_reduce = torch.distributed.all_reduce, lambda values: None  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.distributed.all_reduce = sum_up


def _relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Of all the tensors as one vector."""
    differences = [ours - theirs for ours, theirs in zip(found, expected, strict=True)]
    return (torch.nn.utils.get_total_norm(differences) / torch.nn.utils.get_total_norm(expected)).item()
