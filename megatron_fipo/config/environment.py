"""Section of the schema: what a response answers to, turn by turn."""

from dataclasses import dataclass
from typing import Any

from megatron_fipo.config.loop import VERIFIER_MEMORY_GIB
from megatron_fipo.config.settings import setting

SINGLE_TURN = "single_turn"
NAME_KEY = "environment.name"


@dataclass
class EnvironmentConfig:
    """What happens after the policy has spoken. docs/environments.md shows how to write one."""

    name: str = setting(
        SINGLE_TURN,
        "single_turn: one response per sample, judged by reward.rule; package.module:function or "
        "path/to/file.py:function: a function of yours that makes an environment, which may answer the policy and have "
        "it speak again.",
    )
    options: dict[str, Any] = setting({}, "Parameters of that function, by their names.")
    max_turns: int = setting(
        8, "Most times that the policy speaks in one sample; single_turn does not read it.", minimum=1, maximum=10**4
    )
    step_timeout_s: float = setting(
        30.0,
        "Longest answer of an environment, in seconds. After that its process is killed, and the sample is left out as "
        "one whose check failed.",
        above=0,
        maximum=3600,
    )
    attempts: int = setting(
        3,
        "How often a sample is begun where its environment cannot be reset, or is lost with the process of another one "
        "that hung or crashed. After that it is left out as one whose check failed.",
        minimum=1,
        maximum=1000,
    )
    workers: int = setting(
        4,
        "Processes in which environments run, each those of many samples, one call at a time. Each may use "
        f"{VERIFIER_MEMORY_GIB} GiB, and all together this machine's memory.",
        minimum=1,
        maximum=1024,
    )
    variables: list[str] = setting(
        [],
        "Names of environment variables that an environment needs, such as a service's key. Its processes get only "
        "these and what Python needs to start.",
    )

    @property
    def is_own(self) -> bool:
        """Whether it is a function of the user's, whose environments have processes."""
        return self.name != SINGLE_TURN
