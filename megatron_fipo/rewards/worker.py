"""The verifier's child process: judges responses by a rule; processes/worker_child.py reads and answers.

    python -m megatron_fipo.rewards.worker SOCKET_FD SETTINGS

SETTINGS are the rule, and the settings that rules read, as JSON. The greeting is {inputs}, what the rule wants to know
of a response. An item has these inputs; the answer is {accuracy, answer, outcome, reward, extra}, or {error, traceback}
where the rule raised.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

from megatron_fipo.config.code import CodeConfig
from megatron_fipo.config.judge import JudgeConfig
from megatron_fipo.config.loop import VERIFIER_MEMORY_GIB, own_rule
from megatron_fipo.processes import worker_child
from megatron_fipo.rewards import own, rules
from megatron_fipo.rewards.rules import Verdict

Judge = Callable[[dict[str, Any]], Verdict]


def load(settings: dict[str, Any]) -> tuple[Judge, tuple[str, ...]]:
    """The rule of a configuration, and the inputs that it wants. Raises ConfigError."""
    rule = settings["rule"]
    if (place := own_rule(rule)) is not None:
        found = own.load(*place)
        return found, found.inputs
    if rule == "code":
        from megatron_fipo.rewards.code.rule import CodeRule

        return CodeRule(CodeConfig(**settings["code"])), CodeRule.INPUTS
    if rule == "judge":
        from megatron_fipo.rewards.judge import JudgeRule

        return JudgeRule(JudgeConfig(**settings["judge"]), settings["timeout_s"]), JudgeRule.INPUTS
    shipped = rules.prepare(rule, settings["math_tolerance"])
    return lambda item: shipped(item["response"], item["ground_truth"], item["extra"]), rules.INPUTS


def judge(rule: Judge, item: dict[str, Any]) -> dict[str, Any]:
    """One item's answer. Every exception of the rule is reported as such, RecursionError and MemoryError too."""
    try:
        return dataclasses.asdict(rule(item))
    except own.BadReward as error:
        return {"error": str(error)}
    except (Exception, SystemExit) as error:
        return worker_child.raised(error, (__file__, own.__file__))


def main() -> None:
    """Entry point; the file descriptor is inherited from the parent."""
    descriptor, settings = int(sys.argv[1]), json.loads(sys.argv[2])

    def prepare() -> tuple[dict[str, Any], worker_child.Answer]:
        rule, inputs = load(settings)
        return {"inputs": inputs}, lambda item: judge(rule, item)

    worker_child.run(descriptor, VERIFIER_MEMORY_GIB << 30, prepare)


if __name__ == "__main__":
    main()
