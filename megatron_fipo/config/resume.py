"""Which settings may change when a run resumes from a checkpoint: one table of free keys.

All other settings affect the result of training. A resume is refused if a key that is not in the table has changed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict
from fnmatch import fnmatchcase
from typing import Any

from megatron_fipo.config import Config, every_setting, sections

FREE: dict[str, tuple[str, ...]] = {
    "every layout computes the same gradients": ("parallel.*", "model.recompute", "model.layers"),
    "describes the machines; training does not read it": ("cluster.*", "hardware.*"),
    "the run's directory and name": ("run.name", "run.directory"),
    "the run's length; it may change only with optimizer.schedule=constant": ("run.steps",),
    "how a run resumes": ("run.resume", "run.resume_changed", "data.allow_change", "checkpoint.in_flight"),
    "deadlines: late work is repeated or left out, or the run ends": (
        "*_timeout_s",
        "rollout.max_restarts",
        "environment.attempts",
    ),
    "servers: the seed of a request determines its tokens, whichever server answers": (
        *("rollout.servers", "rollout.addresses", "rollout.host", "rollout.tensor_parallel", "rollout.max_num_seqs"),
        *("rollout.gpu_memory_utilization", "rollout.shared_gpu", "rollout.cpu_*", "rollout.enforce_eager"),
    ),
    "how many tokens are sampled again if a server is lost; other tokens do not depend on it": (
        "rollout.stream_tokens",
    ),
    "how weights are sent; they arrive bit for bit": (
        *("rollout.weight_transfer", "rollout.bucket_mib", "rollout.checksum_every", "rollout.kv_on_update"),
    ),
    "limits that warn or end a run": ("rollout.log_prob_diff_*", "reward.failed_share_*"),
    "the processes that judge and answer": (
        *("reward.workers", "reward.code.sandbox", "environment.workers"),
        *("reward.judge.url", "reward.judge.cache", "reward.judge.attempts", "reward.judge.key_variable"),
    ),
    "the problems themselves are compared, not where they are": ("data.train",),
    "how often and how the run validates and saves": (
        *("validation.every", "checkpoint.every", "checkpoint.keep", "checkpoint.asynchronous", "checkpoint.verify"),
        *("checkpoint.on_error", "checkpoint.huggingface_every"),
    ),
    "what is written besides the model": ("tracking.*",),
    "how to get missing files; the files themselves are compared": ("model.fetch_command", "data.fetch_command"),
    "read by another command only": ("evaluation.*",),
}
"""The free keys, by the reason why they may change."""

_UNTOLD = ("run.directory", "run.resume", "run.resume_changed", "rollout.servers", "rollout.addresses")
"""Free keys that often differ between starts, and whose changes are not reported."""

_BEFORE = {"algorithm.tis_cap": "algorithm.importance_sampling_cap"}
"""Keys that have been renamed, with their old names."""


def is_free(key: str) -> bool:
    """Return whether a key may change when a run resumes."""
    return any(fnmatchcase(key, pattern) for patterns in FREE.values() for pattern in patterns)


def changes(old: Mapping[str, Any], new: Config) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ, each with its old and its new value.

    `old` is the configuration that the run has saved, as a tree. A key that it lacks had its default. The keys of
    `_UNTOLD` are left out. A section that is null in only one of the two counts as one key.
    """
    present = asdict(new)
    found: dict[str, tuple[Any, Any]] = {}
    for key, entry in every_setting():
        default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
        before, after = _at(old, key, _at(old, _BEFORE.get(key, key), default)), _at(present, key, None)
        if before != after and key not in _UNTOLD:
            found[key] = (before, after)
    for name, _ in sections():
        before, after = ("set" if _at(tree, name, "") is not None else None for tree in (old, present))
        if before != after:
            found = {key: pair for key, pair in found.items() if not key.startswith(f"{name}.")} | {
                name: (before, after)
            }
    return found


def refused(changed: Mapping[str, tuple[Any, Any]], new: Config) -> list[str]:
    """Return those of `changes` with which a run may not resume, as "key: old → new"."""
    why = {"run.steps": f", over which optimizer.schedule={new.optimizer.schedule} changes the learning rate"}
    return [
        f"{key}: {_shown(before)} → {_shown(after)}{why.get(key, '')}"
        for key, (before, after) in changed.items()
        if not _may_change(key, new)
    ]


def _may_change(key: str, new: Config) -> bool:
    if key == "run.steps":
        return new.optimizer.schedule == "constant"
    return is_free(key) or (key.startswith("data.") and new.data.allow_change)


def _at(tree: Any, key: str, default: Any) -> Any:
    for name in key.split("."):
        if tree is None:  # a section that is null
            return None
        if not isinstance(tree, Mapping) or name not in tree:
            return default
        tree = tree[name]
    return tree


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    text = " ".join(text.split()) or "empty"
    return text if len(text) <= 60 else f"{text[:60]} …"


def table() -> Iterator[tuple[str, list[str]]]:
    """Yield each reason of `FREE` with the schema's keys to which it applies."""
    keys = [key for key, _ in every_setting()]
    for reason, patterns in FREE.items():
        yield reason, [key for key in keys if any(fnmatchcase(key, pattern) for pattern in patterns)]
