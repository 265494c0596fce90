"""When failed checks are passed over, warned about, or end the run.

Why: a verifier that judges nothing would otherwise train on the few responses it got to. Not covered: that a check
fails at all (test_pool.py).
"""

import pytest

from megatron_fipo.config import RewardConfig
from megatron_fipo.errors import RewardError
from megatron_fipo.rewards.failed_checks import judge_failed_checks
from tests.tracking.groups import make_group

CONFIG = RewardConfig(failed_share_warn=0.1, failed_share_stop=0.5)


@pytest.mark.parametrize("answers", ["", "9", "9999999999", "T999999999"])
def test_few_failures_say_nothing(answers: str) -> None:
    groups = [make_group(answers, "9")] if answers else []
    assert judge_failed_checks(groups, CONFIG, "in this step") is None


def test_more_than_the_first_limit_warns() -> None:
    warning = judge_failed_checks([make_group("TTC", "9"), make_group("9999999", "9")], CONFIG, "in this step")
    assert warning is not None
    assert "3 of 10 checks in this step failed (2 timeout, 1 crash" in warning


def test_more_than_the_second_limit_ends_the_run() -> None:
    with pytest.raises(RewardError, match=r"6 of 10 checks in this step failed .* reward\.failed_share_stop=0\.5"):
        judge_failed_checks([make_group("TTTTCC9999", "9")], CONFIG, "in this step")
    assert judge_failed_checks([make_group("TTTTC99999", "9")], CONFIG, "in this step"), "the limit itself only warns"
    never = RewardConfig(failed_share_stop=1.0)
    assert judge_failed_checks([make_group("TTTTTTTTC9", "9")], never, "in this step"), "1 goes on with one verdict"


def test_checks_that_all_fail_end_the_run_and_name_the_first_failure() -> None:
    never = RewardConfig(rule="mine.py:score", failed_share_stop=1.0)
    first = "the first: KeyError: 'x'; runs/a/reward_failures.jsonl has its traceback"
    message = (
        r"2 of 2 checks in this step failed \(2 crash; reward\.rule=mine\.py:score\), the first: KeyError: 'x'; runs/a/"
    )
    with pytest.raises(RewardError, match=message):
        judge_failed_checks([make_group("CC", "9")], never, "in this step", first)
