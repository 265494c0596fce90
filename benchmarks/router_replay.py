"""Measure what engine and trainer make differently of a mixture of experts, by the ways to replay its routers.

    python -m benchmarks.router_replay [--peak 8] [--rates 1e-6 1e-5]

The model is random, with peaky routers: their weights are multiplied by --peak, so that another expert is another
answer. The engine is transformers in bfloat16, which samples responses and says where it sent each token. The trainer
is the policy in float32, of the same weights, which bfloat16 can hold. The first table is of the same weights; the
second of a step of four updates.
"""

import argparse
import contextlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.first_update import start
from benchmarks.measure import machine
from megatron_fipo.config import Config
from megatron_fipo.config.agreement import Limits
from megatron_fipo.config.configure import load_config
from megatron_fipo.policy import platform
from megatron_fipo.records.routes import RouteFormat
from megatron_fipo.records.streams import OLD_LOG_PROBS, ROLLOUT_LOG_PROBS
from megatron_fipo.rollout.plain_batch import Made, plain_batch

LAYERS, EXPERTS, PER_TOKEN, VOCABULARY = 6, 32, 4, 512
SEQUENCES, PROMPT, RESPONSE, UPDATES = 64, 8, 120, 4
WAYS = ("none", "trainer", "rollout")
EXPERTS_GAIN = 3
"""Experts' weights are multiplied by this: at random ones they hardly add to the residual stream."""
UNMOVED = 1e-30
"""A learning rate at which no weight changes."""


@dataclass(frozen=True)
class Sampled:
    """What the engine sampled."""

    tokens: Tensor
    """[sequences, prompt + response] int64."""
    log_probs: Tensor
    """[sequences, prompt + response] fp32, 0 for the prompt."""
    experts: Tensor
    """[sequences, prompt + response − 1, layers, experts of a token] int64."""


def make_model(directory: Path, peak: float) -> Any:
    """Save a random Qwen3-MoE in float32, and return it."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN,
        norm_topk_prob=True,
        initializer_range=0.05,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    model = transformers.Qwen3MoeForCausalLM(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                weight.mul_(peak)
            elif ".mlp.experts." in name:
                weight.mul_(EXPERTS_GAIN)
    model.bfloat16().float().save_pretrained(directory)
    return model


@torch.no_grad()
def sample(model: Any) -> Sampled:
    """Sample with the model in bfloat16; its log-probs and choices are those of one pass over whole sequences."""
    engine = model.bfloat16().eval()
    prompts = torch.randint(0, VOCABULARY, (SEQUENCES, PROMPT))
    tokens = engine.generate(prompts, do_sample=True, top_k=0, max_new_tokens=RESPONSE, min_new_tokens=RESPONSE)
    found = engine(tokens[:, :-1], output_router_logits=True)
    log_probs = found.logits.float().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    log_probs[:, : PROMPT - 1] = 0
    chosen = [scores.topk(PER_TOKEN).indices.view(SEQUENCES, -1, PER_TOKEN) for scores in found.router_logits]
    return Sampled(tokens, torch.nn.functional.pad(log_probs, (1, 0)), torch.stack(chosen, dim=2))


def make_batch(sampled: Sampled, way: str, updates: int) -> Made:
    """Return the engine's sequences as a batch, with random advantages."""
    form = RouteFormat(tuple(range(LAYERS)), PER_TOKEN, EXPERTS)
    streams = {"token_ids": list(sampled.tokens), "rollout_log_probs": list(sampled.log_probs)}
    if way == "rollout":
        width = sampled.tokens.shape[1]
        streams["routed_experts"] = [torch.from_numpy(form.packed(each.numpy(), width)) for each in sampled.experts]
    generator = torch.Generator().manual_seed(1)
    return plain_batch(
        streams,
        prompt_lengths=[PROMPT] * SEQUENCES,
        advantages=torch.randn(SEQUENCES, generator=generator).tolist(),
        mini_batch_sizes=[SEQUENCES // updates] * updates,
    )


def configured(way: str, rate: float) -> Config:
    """Return FIPO's published settings on one rank, with a way to replay and a constant learning rate."""
    band = ["algorithm.future_kl.band_low=0.8", "algorithm.future_kl.band_high=1.2"]  # symmetric, to see the spread
    words = ["parallel=single", "algorithm=fipo", f"algorithm.router_replay={way}", "rollout.temperature=1", *band]
    config = load_config(words)
    optimizer = replace(config.optimizer, lr=rate, min_lr=0.0, schedule="constant", warmup_updates=0)
    return replace(config, optimizer=optimizer)


def of_the_same_weights(model: Path, sampled: Sampled, way: str) -> str:
    """Return cells: routings that differ, |Δ log-prob| to the engine's, and f if old log-probs were the engine's."""
    from megatron_fipo.policy.feed import made_alike

    policy = _policy(model, way, UNMOVED)
    assert policy.layout.packed, "_differing reads packed sequences"
    (mini_batch,) = made_alike(policy, *make_batch(sampled, way, 1))
    found = policy.log_probs([mini_batch])
    differences = policy.agreement(found.differences)
    engines = [{OLD_LOG_PROBS: micro_batch.streams[ROLLOUT_LOG_PROBS]} for micro_batch in mini_batch]
    influence = policy.update(mini_batch, engines, routes=found.routes[0])
    routers = policy.routing.statistics.metrics()
    exact = policy.update(mini_batch, found.streams[0], routes=found.routes[0])
    mismatch = routers.get("router_mismatch", _differing(sampled, mini_batch.plan, found.routes[0]))
    return (
        f"{mismatch:.4f} | {differences['log_prob_diff_mean']:.4f} | {differences['log_prob_diff_max']:.3f} | "
        f"{_influence(influence)} | {_influence(exact)}"
    )


def _differing(sampled: Sampled, plan: Any, routes: Any) -> float:
    """Return the share of response tokens and layers whose experts were others; sequences of one length are packed."""
    same = []
    for places, chosen in zip(plan, routes[0], strict=True):
        trainers = chosen.view(LAYERS, len(places), -1, PER_TOKEN).permute(1, 2, 0, 3)
        engines = sampled.experts[list(places)]
        pair = [each[:, PROMPT - 1 : engines.shape[1]].sort(-1).values for each in (trainers, engines)]
        same.append((pair[0] == pair[1]).all(-1).flatten())
    return 1 - torch.cat(same).double().mean().item()


def of_a_step(model: Path, sampled: Sampled, way: str, rate: float) -> str:
    """Return cells of a step of several updates: routings that change, how far ratios move, and f."""
    from megatron_fipo.policy.agreement import AgreementCheck
    from megatron_fipo.policy.feed import made_alike
    from megatron_fipo.policy.step import StepData, train_step

    policy = _policy(model, way, rate)
    data = StepData([], made_alike(policy, *make_batch(sampled, way, UPDATES)))
    check = AgreementCheck(Limits(warn=1e9, stop=1e9))
    found = train_step(policy, data, check, lambda _: contextlib.nullcontext(), lambda _: None)
    changed = f"{found['router_changed']:.4f}" if "router_changed" in found else "–"
    spread = " … ".join(f"{found[f'ratio_positive_{quantile}']:.3f}" for quantile in ("q01", "q99"))
    return f"{changed} | {spread} | {found['pg_clipfrac']:.4f} | {_influence(found)}"


def _policy(model: Path, way: str, rate: float) -> Any:
    from megatron_fipo.models.model_config import read_architecture
    from megatron_fipo.policy.update import Policy

    return Policy(configured(way, rate), read_architecture(model), str(model), updates=1000)


def _influence(found: dict[str, float]) -> str:
    at_bounds = found["influence_clipfrac_low"] + found["influence_clipfrac_high"]
    return f"{found['influence_weights_std']:.4f} ({100 * at_bounds:.1f} %)"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=8.0)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-6, 1e-5])
    options = parser.parse_args()
    start()
    with tempfile.TemporaryDirectory(prefix="routers-") as directory:
        model = Path(directory)
        sampled = sample(make_model(model, options.peak))
        print(f"{machine()}; {SEQUENCES} responses of {RESPONSE} tokens, routers × {options.peak:g}\n")
        print("| router_replay | routings that differ | |Δ log-prob| | largest | f by the engine's log-probs | f |")
        print("|---|---|---|---|---|---|")
        for way in WAYS[1:]:  # without replay the pass is the same as with the trainer's
            print(f"| {way} | {of_the_same_weights(model, sampled, way)} |", flush=True)
        print("\n| rate | router_replay | routings that change | ratio, 1 % … 99 % | clipped | f |")
        print("|---|---|---|---|---|---|")
        for rate in options.rates:
            for way in WAYS:
                print(f"| {rate:g} | {way} | {of_a_step(model, sampled, way, rate)} |", flush=True)
    platform.stop_process_group()


if __name__ == "__main__":
    main()
