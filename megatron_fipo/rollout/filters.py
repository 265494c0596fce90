"""Which judged groups teach something. A filter gives the reason why a group does not, or None.

Dynamic sampling (DAPO, section 3.2) trains only on prompts whose samples differ in accuracy: a group whose samples are
all right or all wrong has zero advantage everywhere.
"""

from collections.abc import Callable

from megatron_fipo.config import FilterGroupsConfig
from megatron_fipo.records.sample import Group

ALL_RIGHT, ALL_WRONG = "all_right", "all_wrong"
NO_CONTRAST = "no_contrast"
"""Equal fractional accuracies, or fewer than two samples that could be judged."""

GroupFilter = Callable[[Group], str | None]


def group_filter(config: FilterGroupsConfig) -> GroupFilter:
    """The filter that the configuration asks for."""
    return differing_accuracies if config.enable else every_group


def every_group(group: Group) -> str | None:
    """Rejects none."""
    return None


def differing_accuracies(group: Group) -> str | None:
    """Rejects a group whose samples are all equally right.

    Only verdicts count: a sample whose check failed must not make a solved problem look half solved.
    """
    accuracies = [result.accuracy for result in group.results if result.was_judged]
    if len(set(accuracies)) > 1:
        return None
    if len(accuracies) < 2:
        return NO_CONTRAST
    if accuracies[0] >= 1:
        return ALL_RIGHT
    return ALL_WRONG if accuracies[0] <= 0 else NO_CONTRAST
