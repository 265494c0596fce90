"""Sections of the schema: the run itself, its rewards, validation and files."""

from dataclasses import dataclass

from megatron_fipo.config.settings import LONGEST_WAIT_S, section, setting

VERIFIER_MEMORY_GIB = 4
"""Most memory of one verifier process. An answer such as 9^(9^9) asks for all there is: the check must fail then."""

SHIPPED_RULES = ("exact_match", "math_verify", "reasoning_gym")
"""Values of `reward.rule` that are no function of the user's."""


def own_rule(rule: str) -> tuple[str, str] | None:
    """(module or file, function) of a rule such as MODULE:FUNCTION or FILE.py:FUNCTION; None for a shipped one."""
    place, _, function = rule.rpartition(":")
    return None if rule in SHIPPED_RULES else (place, function)


@dataclass
class RunConfig:
    """What a run is called, where its files go and how long it lasts."""

    name: str = setting("run", "Short name of the run, used in its directory and its logs.")
    directory: str = setting(
        "runs/${run.name}/${now:%Y%m%d-%H%M%S}", "Directory of all the run's files. Give a fixed one to resume from it."
    )
    seed: int = setting(0, "Seed of data order, sampling and initialisation.", minimum=0, maximum=10**9)
    steps: int = setting(1, "Training steps in total, including those before a resume.", minimum=0, maximum=10**9)
    resume: str = setting(
        "auto",
        "auto: continue from the newest complete checkpoint in run.directory if there is one. "
        "never: refuse a directory that already holds a run.",
        choices=("auto", "never"),
    )
    resume_changed: bool = setting(
        False,
        "Resume from a checkpoint although settings that decide what is trained have changed. The new settings are "
        "kept as config-STEP.yaml.",
    )
    collective_timeout_s: float = setting(
        3600.0, "Longest wait for other ranks, sampling excluded, in seconds.", minimum=1, maximum=LONGEST_WAIT_S
    )


@dataclass
class OverlongBufferConfig:
    """Soft penalty on responses that come near the length limit (DAPO, section 3.4)."""

    enable: bool = setting(False, "Subtract the overlong penalty from the reward.")
    len: int = setting(
        4096, "Length of the penalty's ramp up to max_response_length, in tokens.", minimum=1, maximum=10**9
    )
    penalty_factor: float = setting(1.0, "Penalty at max_response_length.", minimum=0, maximum=1000)


@dataclass
class RewardConfig:
    """How a response is judged."""

    rule: str = setting(
        "exact_match",
        "exact_match: the recipe's 'Answer: …' string comparison; math_verify: mathematical equality by sympy; "
        "reasoning_gym: the task's own scorer; package.module:function or path/to/file.py:function: a function of "
        "yours, whose value is the reward (docs/rewards.md).",
    )
    math_tolerance: float = setting(
        0.0,
        "With rule=math_verify: relative tolerance where the answer or the ground truth is a decimal number, such as "
        "0.333 for 1/3. 0: exact.",
        minimum=0,
        maximum=0.1,
    )
    correct: float = setting(1.0, "Reward of a right answer.", minimum=-1000, maximum=1000)
    incorrect: float = setting(
        -1.0, "Reward of a wrong answer. An answer that could not be judged has no reward.", minimum=-1000, maximum=1000
    )
    environment: list[str] = setting(
        [],
        "Names of environment variables that a rule of yours needs, such as a service's key. Verifier processes get "
        "only these and what Python needs to start.",
    )
    overlong_buffer: OverlongBufferConfig = section(OverlongBufferConfig)
    workers: int = setting(
        8,
        f"Verifier processes. Each may use {VERIFIER_MEMORY_GIB} GiB, and all together this machine's memory.",
        minimum=1,
        maximum=1024,
    )
    timeout_s: float = setting(
        10.0,
        "Longest check of one response, in seconds. After that its process is killed and the check counts as failed.",
        above=0,
        maximum=3600,
    )
    failed_share_warn: float = setting(
        0.01,
        "Share of a step's or a validation's checks that may fail (time out or crash) without a warning.",
        minimum=0,
        maximum=1,
    )
    failed_share_stop: float = setting(
        0.2,
        "Share of failed checks above which the run stops. If all fail, it stops in any case.",
        minimum=0,
        maximum=1,
    )


@dataclass
class ValidationConfig:
    """Accuracy on held-out problems: avg@k, cons@k, pass@k."""

    every: int = setting(
        5,
        "Validate every so many steps, and before the first and after the last; 0: never.",
        minimum=0,
        maximum=10**9,
    )
    samples: int = setting(32, "Responses per problem: k.", minimum=1, maximum=10**4)
    temperature: float = setting(1.0, "Sampling temperature; 0: greedy.", minimum=0, maximum=100)
    top_p: float = setting(0.7, "Nucleus (top-p).", above=0, maximum=1)


@dataclass
class EvaluationConfig:
    """What `megatron-fipo evaluate` reads besides model, data.validation, validation, rollout and reward."""

    directory: str | None = setting(
        None,
        "Directory of an evaluation's files; a stopped evaluation resumes from it. null: a directory named by the "
        "model and all settings that matter, in runs/evaluations, or in evaluations/ of the run that made the model.",
    )


@dataclass
class CheckpointConfig:
    """When the run's state is saved."""

    every: int = setting(5, "Save every so many steps, and after the last; 0: never.", minimum=0, maximum=10**9)
    keep: int = setting(2, "Number of newest checkpoints to keep; 0: all.", minimum=0, maximum=10**9)
    asynchronous: bool = setting(
        True,
        "Train on while a checkpoint is written. This takes its size in memory; it counts when it is complete.",
    )
    verify: bool = setting(True, "Resume only from a checkpoint in which the checksum of every file is right.")
    on_error: str = setting(
        "stop",
        "When a checkpoint cannot be written. stop: end the run with one line. warn: continue without it.",
        choices=("stop", "warn"),
    )
    in_flight: str = setting(
        "keep",
        "At a resume, what was sampled for later steps. keep: they train on it. discard: its prompts come next and are "
        "sampled anew, such as under a shorter rollout.max_response_length. Both are counted.",
        choices=("keep", "discard"),
    )
    huggingface_every: int = setting(
        0,
        "Every so many steps, and after the last, also write a Hugging Face directory, "
        "run.directory/huggingface/step-…, kept as long as its checkpoint. A multiple of checkpoint.every; 0: never.",
        minimum=0,
        maximum=10**9,
    )


@dataclass
class TrackingConfig:
    """What the run writes besides metrics.jsonl and summary.json, which it always writes."""

    tensorboard: bool = setting(True, "Write TensorBoard event files.")
    samples_per_step: int = setting(
        8, "Rollouts kept per step as readable text, with their rewards.", minimum=0, maximum=10**6
    )
    samples_per_validation: int = setting(
        32, "Rollouts of held-out problems kept per validation, in the same form.", minimum=0, maximum=10**6
    )
