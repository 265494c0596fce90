"""A verifier process: processes/worker_process.py with a rule in it."""

import json
from dataclasses import asdict

from megatron_fipo.config import RewardConfig
from megatron_fipo.errors import RewardError
from megatron_fipo.processes.worker_process import Job, WorkerProcess


def verifier_process(config: RewardConfig) -> WorkerProcess:
    """One `megatron_fipo.rewards.worker`; its greeting has `inputs`, what the rule wants to know of a response.

    Starting it raises ConfigError where reward.rule cannot be used: no such function, no sandbox; and else RewardError.
    """
    settings = {
        "rule": config.rule,
        "math_tolerance": config.math_tolerance,
        "timeout_s": config.timeout_s,
        "code": asdict(config.code),
        "judge": asdict(config.judge),
    }
    key = config.judge.key_variable if config.rule == "judge" else None
    return WorkerProcess(
        Job(
            name="verifier",
            key="reward.rule",
            code=config.rule,
            module="megatron_fipo.rewards.worker",
            arguments=(json.dumps(settings),),
            variables=[*config.environment, *filter(None, [key])],
            error=RewardError,
            closed="the verifier pool was closed while responses were waiting for their verdict",
        )
    )
