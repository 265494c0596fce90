"""Group runs that differ only in their seed, and name each group by the settings that distinguish it."""

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fipo.comparison.runs import Run
from megatron_fipo.errors import DataError

WITHOUT_EFFECT = (
    *("run.name", "run.directory", "run.seed", "run.resume*", "run.collective_timeout_s"),
    *("checkpoint.*", "tracking.*", "evaluation.*", "cluster.*", "hardware.*", "validation.every"),
    *("rollout.servers", "rollout.addresses", "rollout.host", "rollout.*timeout_s", "rollout.max_restarts"),
    *("rollout.weight_transfer", "rollout.bucket_mib", "rollout.checksum_every", "rollout.log_prob_diff_*"),
    *("rollout.gpu_memory_utilization", "rollout.cpu_*", "reward.workers", "reward.failed_share_*"),
)
"""Keys that do not change what is trained, as shell patterns."""

_FIRST = ("algorithm.name", "model.path")
"""Keys that stand for many others. They come first in the name of a group."""


@dataclass(frozen=True)
class Group:
    """Runs of one configuration."""

    name: str
    runs: list[Run]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]


@dataclass(frozen=True)
class Grouping:
    """All groups, and the keys in which they differ."""

    groups: list[Group]
    differences: dict[str, list[Any]]
    """Each key that is not the same in all groups, with its values in the order of the groups."""
    notes: list[str]
    """Notes about these runs for the reader of the comparison."""


def group_runs(runs: Sequence[Run], ignore: Sequence[str] = ()) -> Grouping:
    """Group runs, in the given order. `ignore` has further keys, or patterns, that do not distinguish groups."""
    keys = sorted({key for run in runs for key in run.settings})
    keys = [key for key in keys if not any(fnmatch.fnmatchcase(key, p) for p in (*WITHOUT_EFFECT, *ignore))]
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(json.dumps([run.settings.get(key) for key in keys], default=str), []).append(run)
    together = [sorted(found, key=lambda run: run.seed) for found in members.values()]
    values = {key: [found[0].settings.get(key) for found in together] for key in keys}
    differences = {key: found for key, found in values.items() if any(value != found[0] for value in found)}
    names = _names(differences, together)
    if len({run.is_evaluation for run in runs}) > 1:
        raise DataError("runs and evaluations cannot be compared with each other: give directories of one kind")
    groups = [Group(name, found) for name, found in zip(names, together, strict=True)]
    return Grouping(groups, differences, _notes(groups))


def _names(differences: dict[str, list[Any]], together: list[list[Run]]) -> list[str]:
    """Return names made of as few keys as distinguish the groups."""
    if len(together) == 1:
        settings = together[0][0].settings
        return [str(settings["model.path"] if together[0][0].is_evaluation else settings["algorithm.name"])]
    parts: list[list[str]] = [[] for _ in together]
    order = sorted(differences, key=lambda key: (key not in _FIRST, key.count("."), key))
    last_parts = [key.rpartition(".")[2] for key in order]
    for key, last_part in zip(order, last_parts, strict=True):
        before = len({tuple(part) for part in parts})
        values = [_shown(value) for value in differences[key]]
        short = last_part if last_parts.count(last_part) == 1 else key
        said = values if key in _FIRST else [f"{short}={value}" for value in values]
        longer = [[*part, text] for part, text in zip(parts, said, strict=True)]
        if len({tuple(part) for part in longer}) > before:
            parts = longer
        if len({tuple(part) for part in parts}) == len(parts):
            break
    return [", ".join(part) for part in parts]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"...{text[-57:]}"  # the end of a path is more informative


def _notes(groups: Sequence[Group]) -> list[str]:
    notes = []
    for group in groups:
        for seed in sorted({seed for seed in group.seeds if group.seeds.count(seed) > 1}):
            count = group.seeds.count(seed)
            notes.append(f"{group.name}: {count} runs have the seed {seed}; they count as one seed, with their mean")
        for run in group.runs:
            if not run.is_finished:
                wanted = run.settings["run.steps"]
                notes.append(f"{run.directory.name} ({group.name}) has {run.last_step} of {wanted} steps")
            if not run.validations:
                notes.append(f"{run.directory.name} ({group.name}) has no validation and is in no score")
    commits = {run.commit for group in groups for run in group.runs if run.commit}
    if len(commits) > 1:
        notes.append(f"these runs were made by {len(commits)} versions of the source: see their environment.json")
    return notes
