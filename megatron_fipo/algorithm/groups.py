"""Dynamic sampling (DAPO, section 3.2): train only on prompts whose samples differ in accuracy.

A group whose samples are all right or all wrong has zero advantage everywhere and so teaches nothing. One step asks for
generation batches until it has enough groups that do:

    sampling = DynamicSampling(config.algorithm.filter_groups, prompts_per_step)
    while sampling.needs_more():
        sampling.add(judged_groups_of_one_generation_batch)
    selection = sampling.take()

Differs from the released code: the surplus may be carried to the next step, and a step that cannot fill its batch
trains on what it has (`Selection.gave_up`) where the released code ends the run.
"""

from dataclasses import dataclass

from megatron_fipo.config import FilterGroupsConfig
from megatron_fipo.records.sample import Group


@dataclass
class SamplingCounts:
    """What became of a step's groups: carried_in + generated = trained + the four dropped kinds + carried_out."""

    num_gen_batches: int = 0
    generated: int = 0
    carried_in: int = 0
    trained: int = 0
    dropped_all_right: int = 0
    dropped_all_wrong: int = 0
    dropped_no_contrast: int = 0
    """Equal fractional accuracies, or fewer than two responses that could be judged."""
    dropped_surplus: int = 0
    carried_out: int = 0


@dataclass
class Selection:
    """The groups that one step trains on."""

    groups: list[Group]
    """At most prompts_per_step, oldest first; fewer, possibly none, when `gave_up`."""
    gave_up: bool
    """max_num_gen_batches were sampled and the batch is still not full."""
    counts: SamplingCounts


class DynamicSampling:
    """Collects the groups of one step after the other; between steps it holds only the surplus carried over."""

    def __init__(self, config: FilterGroupsConfig, prompts_per_step: int):
        self._config = config
        self._prompts_per_step = prompts_per_step
        self._kept: list[Group] = []
        self._counts = SamplingCounts()

    def needs_more(self) -> bool:
        """Whether to sample another generation batch: the step is not full, and has not used up its batches."""
        batches_left = self._counts.num_gen_batches < self._config.max_num_gen_batches
        return len(self._kept) < self._prompts_per_step and batches_left

    def add(self, groups: list[Group]) -> None:
        """Takes one judged generation batch. Give its groups in the order of their prompts, so that a run repeats."""
        self._counts.num_gen_batches += 1
        self._counts.generated += len(groups)
        for group in groups:
            reason = _reason_to_drop(group) if self._config.enable else None
            if reason is None:
                self._kept.append(group)
            else:
                setattr(self._counts, reason, getattr(self._counts, reason) + 1)

    def take(self) -> Selection:
        """Ends the step: its groups and its counts. The surplus stays for the next step, or is dropped."""
        counts = self._counts
        groups, surplus = self._kept[: self._prompts_per_step], self._kept[self._prompts_per_step :]
        self._kept = surplus if self._config.surplus == "carry" else []
        counts.trained = len(groups)
        counts.carried_out = len(self._kept)
        counts.dropped_surplus = len(surplus) - len(self._kept)
        self._counts = SamplingCounts(carried_in=len(self._kept))
        return Selection(groups, gave_up=len(groups) < self._prompts_per_step, counts=counts)

    def carried(self) -> list[Group]:
        """Between two steps: the groups carried over, for a checkpoint."""
        return list(self._kept)

    def carry(self, groups: list[Group]) -> None:
        """Inverse of `carried`, so that a resumed run trains on them too."""
        self._kept = list(groups)
        self._counts = SamplingCounts(carried_in=len(groups))


def _reason_to_drop(group: Group) -> str | None:
    """The count under which a group is dropped, or None to keep it.

    Only verdicts count: a response whose check failed must not make a solved problem look half solved.
    """
    accuracies = [result.accuracy for result in group.results if result.was_judged]
    if len(set(accuracies)) > 1:
        return None
    if len(accuracies) < 2:
        return "dropped_no_contrast"
    if accuracies[0] >= 1:
        return "dropped_all_right"
    return "dropped_all_wrong" if accuracies[0] <= 0 else "dropped_no_contrast"
