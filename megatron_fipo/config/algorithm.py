"""Sections of the schema: loss, credit, batch sizes and optimizer."""

from dataclasses import dataclass
from typing import Any

from megatron_fipo.config.settings import section, setting


@dataclass
class FutureKLConfig:
    """The influence weight f_t of FIPO (paper, equations 6 to 9; docs/algorithm.md)."""

    decay_rate: float = setting(
        32.0, "Half-life τ of the discount in tokens: γ = 2^(−1/τ).", minimum=0.01, maximum=10**9
    )
    band_low: float = setting(
        1.0, "Lower bound of the influence weight (1.0 in the 32B run, 0.8 in the 7B run).", minimum=0, maximum=1000
    )
    band_high: float = setting(1.2, "Upper bound of the influence weight.", minimum=0, maximum=1000)
    safety_thresh: float = setting(
        10.0,
        "If the advantage is negative and the token's ratio is above this, the weight is limited (safety_rule).",
        above=0,
        maximum=10**6,
    )
    safety_rule: str = setting(
        "clamp",
        "How the weight is limited. clamp: to [0.8, 1.0], as in the released code; one: to exactly 1, as in the paper.",
        choices=("clamp", "one"),
    )
    participation_mask: bool = setting(
        True, "Exclude tokens with a ratio above clip_ratio_c from the sum (false: ablation)."
    )
    mask_stale: bool = setting(
        True, "Exclude tokens outside of algorithm.is_bounds from the sum (false: ablation). Without bounds: no effect."
    )
    drop_dual_clipped: bool = setting(
        True, "Exclude a response with more than one dual-clipped token, as the released code does."
    )


@dataclass
class FilterGroupsConfig:
    """Dynamic sampling: train only on prompts whose samples differ in accuracy."""

    enable: bool = setting(True, "Drop groups whose samples are all right or all wrong, and sample more prompts.")
    max_num_gen_batches: int = setting(
        10,
        "Largest number of generation batches per step. After them the step trains on the groups it has, with a "
        "warning. Without generation batches: so many times prompts_per_step rejected groups; with "
        "rollout.max_off_policy_steps=k, (k + 1) times as many in one step end the run.",
        minimum=1,
        maximum=10**4,
    )
    surplus: str = setting(
        "carry",
        "What happens to groups beyond the batch. carry: the next step trains on them; drop: they are dropped, as in "
        "the released code. Both are counted.",
        choices=("carry", "drop"),
    )
    over_sampling: float | None = setting(
        None,
        "null: whole generation batches, each sampled to its end. 1 or more: a rejected group is replaced at once, and "
        "for each group that the step lacks, this many are being sampled. Groups that are not needed are stopped; "
        "their prompts come first in the next step. With rollout.max_off_policy_steps, null is 1.",
        minimum=1,
        maximum=100,
    )


LOSS_SETTINGS: dict[str, tuple[str, ...]] = {
    "future_kl": ("clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "future_kl"),
    "vanilla": ("clip_ratio_low", "clip_ratio_high", "clip_ratio_c"),
    "gspo": ("clip_ratio_low", "clip_ratio_high"),
    "cispo": ("clip_ratio_low", "clip_ratio_high"),
    "sapo": ("tau_pos", "tau_neg"),
}
"""Each loss_mode with the loss settings that it reads. These have to be set, and all other loss settings null."""


@dataclass
class AlgorithmConfig:
    """Loss, advantages and batch sizes."""

    name: str = setting(
        "fipo", "Label in logs, plots and comparisons. It does not choose the algorithm: algorithm=NAME does."
    )
    loss_mode: str = setting(
        "future_kl",
        "The policy loss, a function in megatron_fipo/algorithm/losses.py. vanilla: GRPO, Dr. GRPO and DAPO.",
        choices=tuple(LOSS_SETTINGS),
    )
    loss: str | None = setting(
        None,
        "A policy loss of your own instead of loss_mode: package.module:function or path/to/file.py:function "
        "(docs/adding_a_loss.md). It may read every setting of this section.",
    )
    loss_options: dict[str, Any] = setting({}, "Parameters of the function that loss names, by their names.")
    loss_agg_mode: str = setting(
        "token-mean",
        "How token losses are combined into one number over the mini-batch. seq-mean-token-sum-norm (Dr. GRPO): the "
        "mean over responses of their sums, each divided by loss_scale_factor.",
        choices=("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"),
    )
    loss_scale_factor: float | None = setting(
        None,
        "The constant length of seq-mean-token-sum-norm, in tokens; null with the other modes.",
        minimum=1,
        maximum=10**9,
    )
    clip_ratio_low: float | None = setting(
        0.2, "ε_low: the ratio is clipped below at 1 − ε_low. null where the loss does not clip.", minimum=0, maximum=1
    )
    clip_ratio_high: float | None = setting(
        0.28,
        "ε_high: the ratio is clipped above at 1 + ε_high. null where the loss does not clip.",
        minimum=0,
        maximum=10**6,
    )
    clip_ratio_c: float | None = setting(
        10.0,
        "Dual-clip constant c for negative advantages. null where the loss has no dual clip.",
        above=1,
        maximum=10**6,
    )
    tau_pos: float | None = setting(
        None,
        "Temperature of SAPO's gate with a positive advantage; null for the other losses.",
        minimum=0.001,
        maximum=1000,
    )
    tau_neg: float | None = setting(
        None,
        "Temperature of SAPO's gate with a negative or no advantage; null for the other losses.",
        minimum=0.001,
        maximum=1000,
    )
    future_kl: FutureKLConfig | None = setting(None, "Settings of loss_mode=future_kl; null for the other losses.")
    norm_adv_by_std: bool = setting(True, "Divide the group advantage by the group's standard deviation.")
    prompts_per_step: int = setting(
        512, "Prompts that one step trains on, each with its group of responses.", minimum=1, maximum=10**6
    )
    samples_per_prompt: int = setting(
        16, "Responses sampled per prompt (the prompt's group).", minimum=2, maximum=10**4
    )
    mini_batch_prompts: int = setting(
        64, "Prompts per optimizer update; prompts_per_step has to be a multiple of it.", minimum=1, maximum=10**6
    )
    generation_batch_prompts: int | None = setting(
        None, "Prompts per generation batch of dynamic sampling; null: prompts_per_step.", minimum=1, maximum=10**6
    )
    filter_groups: FilterGroupsConfig = section(FilterGroupsConfig)
    tis_cap: float | None = setting(
        None,
        "Truncated importance sampling: multiply each token's loss by min(π_trainer_old / π_engine, cap). null: off.",
        minimum=0.001,
        maximum=10**6,
    )
    is_bounds: list[float] | None = setting(
        None,
        "[low, high]: a token whose π_trainer_old / π_engine is outside adds nothing to the loss; the mean still "
        "counts it. null: off.",
    )
    reference_kl_coef: float = setting(
        0.0,
        "β: adds β · KL(π ‖ π_start) to the loss of each token. 0: off. Otherwise each trainer process keeps two "
        "copies of its weights in host memory, and log-probs take twice as long.",
        minimum=0,
        maximum=1000,
    )
    reference_kl_estimator: str = setting(
        "k3",
        "How this KL is estimated from one token, with d = log π_start − log π. k1: −d; k2: d²/2; k3: exp(d) − 1 − d, "
        "as in GRPO.",
        choices=("k1", "k2", "k3"),
    )
    router_replay: str = setting(
        "none",
        "Models with experts (docs/models.md). trainer: in updates a token goes to the experts that it went to when "
        "its old log-prob was computed, so that ratios change by the weights alone. rollout: there and in updates it "
        "goes to the experts that the engine sent it to, which needs servers with CUDA and Triton. none: to those of "
        "its present scores.",
        choices=("none", "trainer", "rollout"),
    )
    router_aux_loss_coef: float = setting(
        0.0,
        "Models with experts: adds this times the loss for an even load of the experts at each router "
        "(docs/models.md). Above 0 a step's first mini-batch, too, has a forward pass before the first update.",
        minimum=0,
        maximum=1000,
    )
    router_z_loss_coef: float = setting(
        0.0,
        "Models with experts: adds this times the squared logsumexp of the scores at each router, which keeps them "
        "small.",
        minimum=0,
        maximum=1000,
    )

    @property
    def adds_router_losses(self) -> bool:
        """Whether routers have losses of their own beside the policy's."""
        return self.router_aux_loss_coef > 0 or self.router_z_loss_coef > 0


@dataclass
class OptimizerConfig:
    """Adam, with Megatron-Core's learning rate schedule, weight decay and gradient clipping."""

    lr: float = setting(1e-6, "Peak learning rate.", above=0, maximum=1)
    schedule: str = setting(
        "constant", "Decay after warm-up, over run.steps.", choices=("constant", "linear", "cosine")
    )
    min_lr: float = setting(0.0, "Learning rate at the end of the decay.", minimum=0, maximum=1)
    warmup_updates: int = setting(10, "Optimizer updates of linear warm-up from 0.", minimum=0, maximum=10**9)
    weight_decay: float = setting(
        0.1, "Decoupled weight decay; not applied to biases and norms.", minimum=0, maximum=10
    )
    clip_grad: float = setting(1.0, "Largest global gradient norm; 0: no clipping.", minimum=0, maximum=10**9)
    beta1: float = setting(0.9, "Adam's first-moment decay.", minimum=0, maximum=1)
    beta2: float = setting(0.999, "Adam's second-moment decay.", minimum=0, maximum=1)
    eps: float = setting(1e-8, "Adam's denominator constant.", minimum=1e-20, maximum=1)
    freeze_routers: bool = setting(
        False,
        "Models with experts: routers keep the weights that the run starts with, and grad_norm is without them.",
    )
