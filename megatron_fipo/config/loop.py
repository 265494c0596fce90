"""Sections of the schema: the run itself, its rewards, validation and files."""

from dataclasses import dataclass

from megatron_fipo.config.code import CodeConfig
from megatron_fipo.config.judge import GROUND_TRUTH, JudgeConfig
from megatron_fipo.config.settings import LONGEST_WAIT_S, section, setting

VERIFIER_MEMORY_GIB = 4
"""Memory limit of one verifier process. An answer such as 9^(9^9) would take all memory: its check has to fail."""

SHIPPED_RULES = ("exact_match", "math_verify", "reasoning_gym", "code", "judge")
"""Values of `reward.rule` that name a rule of this package."""

_RULES_OF_COLUMNS = ("code",)
"""Those that take what they compare with from the columns of a problem's row."""


def own_rule(rule: str) -> tuple[str, str] | None:
    """Return (module or file, function) for MODULE:FUNCTION or FILE.py:FUNCTION; None for a shipped rule."""
    place, _, function = rule.rpartition(":")
    return None if rule in SHIPPED_RULES else (place, function)


def needs_answer(reward: "RewardConfig") -> bool:
    """Return whether a rule compares with the right answer that data.columns.answer names."""
    if reward.rule == "judge":
        return GROUND_TRUTH in reward.judge.prompt
    return not reads_columns(reward.rule)


def reads_columns(rule: str) -> bool:
    """Return whether a rule may read every column of a problem's row."""
    return rule in _RULES_OF_COLUMNS or own_rule(rule) is not None


@dataclass
class RunConfig:
    """What a run is called, where its files go and how long it lasts."""

    name: str = setting("run", "Short name of the run, used in its directory and its logs.")
    directory: str = setting(
        "runs/${run.name}/${now:%Y%m%d-%H%M%S}",
        "Directory of all the run's files. Set it to be able to resume the run.",
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
        "Resume from a checkpoint even if settings that affect the result of training have changed. The new settings "
        "are saved as config-STEP.yaml.",
    )
    collective_timeout_s: float = setting(
        3600.0,
        "Longest wait for other ranks, in seconds. Waiting for samples does not count.",
        minimum=1,
        maximum=LONGEST_WAIT_S,
    )


@dataclass
class OverlongBufferConfig:
    """Soft penalty on responses that come near the length limit (DAPO, section 3.4)."""

    enable: bool = setting(False, "Subtract the overlong penalty from the reward.")
    len: int = setting(
        4096,
        "Number of tokens before max_response_length over which the penalty grows linearly.",
        minimum=1,
        maximum=10**9,
    )
    penalty_factor: float = setting(1.0, "Penalty at max_response_length.", minimum=0, maximum=1000)


@dataclass
class RewardConfig:
    """How a response is judged."""

    rule: str = setting(
        "exact_match",
        "exact_match: the recipe's string comparison after 'Answer:'; math_verify: mathematical equality by sympy; "
        "reasoning_gym: the task's own scorer; code: tests of a program in a sandbox; judge: a model at an endpoint; "
        "package.module:function or path/to/file.py:function: your own function, which returns the reward "
        "(docs/rewards.md).",
    )
    math_tolerance: float = setting(
        0.0,
        "With rule=math_verify: relative tolerance if the answer or the ground truth is a decimal number, such as "
        "0.333 for 1/3. 0: exact.",
        minimum=0,
        maximum=0.1,
    )
    correct: float = setting(1.0, "Reward of a right answer.", minimum=-1000, maximum=1000)
    incorrect: float = setting(
        -1.0,
        "Reward of a wrong answer. If the check of an answer fails, the answer has no reward.",
        minimum=-1000,
        maximum=1000,
    )
    environment: list[str] = setting(
        [],
        "Names of environment variables that your own rule needs, such as a service's key, or the judge's connection, "
        "such as HTTPS_PROXY. Verifier processes get only these and the ones that Python needs to start.",
    )
    code: CodeConfig = section(CodeConfig)
    judge: JudgeConfig = section(JudgeConfig)
    overlong_buffer: OverlongBufferConfig = section(OverlongBufferConfig)
    workers: int = setting(
        8,
        f"Number of verifier processes. Each may use {VERIFIER_MEMORY_GIB} GiB, and together they have to fit into "
        "memory.",
        minimum=1,
        maximum=1024,
    )
    timeout_s: float = setting(
        10.0,
        "Time limit for the check of one response, in seconds. After it the process is killed and the check has "
        "failed.",
        above=0,
        maximum=3600,
    )
    failed_share_warn: float = setting(
        0.01,
        "Share of failed checks (timeouts and crashes) in a step or a validation above which the run warns.",
        minimum=0,
        maximum=1,
    )
    failed_share_stop: float = setting(
        0.2,
        "Share of failed checks above which the run stops. It always stops if all checks fail.",
        minimum=0,
        maximum=1,
    )


@dataclass
class ValidationConfig:
    """Accuracy on held-out problems: avg@k, cons@k, pass@k."""

    every: int = setting(
        5,
        "Number of steps between validations. The run also validates before the first and after the last step. 0: "
        "never.",
        minimum=0,
        maximum=10**9,
    )
    samples: int = setting(32, "Responses per problem: k.", minimum=1, maximum=10**4)
    temperature: float = setting(1.0, "Sampling temperature; 0: greedy.", minimum=0, maximum=100)
    top_p: float = setting(0.7, "Nucleus (top-p).", above=0, maximum=1)


@dataclass
class EvaluationConfig:
    """Settings of `megatron-fipo evaluate`, besides model, data.validation, validation, rollout and reward."""

    directory: str | None = setting(
        None,
        "Directory of an evaluation's files; a stopped evaluation resumes from it. null: a directory named by the "
        "model and a hash of its settings, in runs/evaluations or in evaluations/ of the run that made the model.",
    )


@dataclass
class CheckpointConfig:
    """When and how the run's state is saved."""

    every: int = setting(
        5,
        "Number of steps between checkpoints. The run also saves after the last step. 0: never.",
        minimum=0,
        maximum=10**9,
    )
    keep: int = setting(2, "Number of newest checkpoints to keep; 0: all.", minimum=0, maximum=10**9)
    asynchronous: bool = setting(
        True,
        "Continue training while a checkpoint is written. This takes up to the checkpoint's size in host memory.",
    )
    verify: bool = setting(True, "Check the checksum of every file of a checkpoint before resuming from it.")
    on_error: str = setting(
        "stop",
        "When a checkpoint cannot be written. stop: end the run with one line. warn: continue without it.",
        choices=("stop", "warn"),
    )
    in_flight: str = setting(
        "keep",
        "What a resume does with samples for later steps. keep: train on them. discard: sample their prompts again, "
        "before all others, for example with a shorter rollout.max_response_length. Both are counted.",
        choices=("keep", "discard"),
    )
    huggingface_every: int = setting(
        0,
        "Number of steps after which a Hugging Face directory is written too, and after the last step, to "
        "run.directory/huggingface/step-…. It is kept as long as its checkpoint. A multiple of checkpoint.every; "
        "0: never.",
        minimum=0,
        maximum=10**9,
    )


@dataclass
class CreditConfig:
    """Values per token as the loss used them, in credit/step-….parquet, for `megatron-fipo inspect RUN --credit`."""

    responses: int = setting(
        16,
        "About how many responses per step are recorded: up to four of a group. 0: none.",
        minimum=0,
        maximum=10**4,
    )
    every: int = setting(1, "Number of steps after which a step is recorded.", minimum=1, maximum=10**9)
    max_tokens: int = setting(
        2**17,
        "Largest number of response tokens that are recorded in a step, about 40 bytes each in the file. Responses "
        "that do not fit are left out.",
        minimum=1,
        maximum=10**6,
    )


@dataclass
class TrackingConfig:
    """What the run writes in addition to metrics.jsonl and summary.json."""

    to: list[str] = setting(
        ["tensorboard"],
        "Where the numbers of metrics.jsonl and validation.jsonl go too. tensorboard: event files in the run's "
        "directory; wandb: Weights & Biases; mlflow: the server of MLFLOW_TRACKING_URI, or files in the run's "
        "directory; trackio: its database on this machine, or a Space of the hub. []: nowhere. A tracker that fails "
        "never stops the run (docs/report.md).",
        choices=("tensorboard", "wandb", "mlflow", "trackio"),
    )
    project: str = setting("megatron_fipo", "Project of wandb and trackio, experiment of mlflow.")
    offline: bool = setting(
        False, "With wandb: upload nothing. `wandb sync` does so later, from wandb/ in the run's directory."
    )
    reflection_markers: list[str] = setting(
        [r"\bwait\b", r"\bhmm\b", r"let me think", r"on second thought"],
        "Patterns of a response that reflects, as regular expressions without groups and without repeats other than ?, "
        "so that they take linear time; letters of either case. Each step says the share of responses with one.",
    )
    verification_markers: list[str] = setting(
        [r"\bcheck\b", r"\bverify", r"let's confirm", r"double-check", r"\bcheck:"], "Likewise: it checks itself."
    )
    backtracking_markers: list[str] = setting(
        [r"that's wrong", r"try another", r"start over", r"go back", r"\bmistake\b", r"\bactually,"],
        "Likewise: it gives up a way and tries another one.",
    )
    samples_per_step: int = setting(
        8,
        "Number of rollouts per step that are written as readable text, with their rewards.",
        minimum=0,
        maximum=10**6,
    )
    samples_per_validation: int = setting(
        32, "Number of rollouts per validation that are written in the same form.", minimum=0, maximum=10**6
    )
    credit: CreditConfig = section(CreditConfig)
