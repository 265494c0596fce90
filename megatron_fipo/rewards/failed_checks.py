"""What follows when checks fail, by timeout or crash: nothing, a warning, or the end of the run.

A failed check costs a response and is no wrong answer. When many fail, the ones that are left are no fair sample: long
answers time out first, and a broken verifier judges nothing at all.
"""

from collections import Counter
from collections.abc import Sequence

from megatron_fipo.config import RewardConfig
from megatron_fipo.errors import RewardError
from megatron_fipo.records.sample import FAILED_CHECKS, Group


def judge_failed_checks(groups: Sequence[Group], config: RewardConfig, where: str, first: str = "") -> str | None:
    """A warning if more than `reward.failed_share_warn` of the checks of these groups failed, else None.

    Args:
        where: completes "of the checks …", such as "in this step".
        first: what FailureLog.summary says.

    Raises:
        RewardError: more than `reward.failed_share_stop` of them failed, or all.
    """
    outcomes = Counter(result.outcome for group in groups for result in group.results)
    checks, failed = outcomes.total(), sum(outcomes[kind] for kind in FAILED_CHECKS)
    share = failed / checks if checks else 0.0
    if share <= config.failed_share_warn and share < 1:
        return None
    kinds = ", ".join(f"{outcomes[kind]} {kind}" for kind in FAILED_CHECKS if outcomes[kind])
    found = f"{failed} of {checks} checks {where} failed ({kinds}; reward.rule={config.rule})"
    if first:
        found += f", {first}"
    if share == 1:
        raise RewardError(f"{found}; with no verdict there is nothing to train on")
    if share > config.failed_share_stop:
        raise RewardError(
            f"{found}, a larger share than reward.failed_share_stop={config.failed_share_stop:g}: find out why, or "
            f"give slow checks more than reward.timeout_s={config.timeout_s:g}"
        )
    return f"{found}; these responses are left out of training and of the means"
