"""Section of the schema: the environment that answers the policy, turn by turn."""

from dataclasses import dataclass
from typing import Any

from megatron_fipo.config.loop import VERIFIER_MEMORY_GIB
from megatron_fipo.config.settings import setting

SINGLE_TURN = "single_turn"
NAME_KEY = "environment.name"


@dataclass
class EnvironmentConfig:
    """What happens after each turn of the policy. docs/environments.md shows how to write an environment."""

    name: str = setting(
        SINGLE_TURN,
        "single_turn: one response per sample, judged by reward.rule; package.module:function or "
        "path/to/file.py:function: your own function, which makes an environment. The environment may answer the "
        "policy and ask for another turn.",
    )
    options: dict[str, Any] = setting({}, "Parameters of the function that name names, by their names.")
    max_turns: int = setting(
        8, "Largest number of the policy's turns in one sample; single_turn does not read it.", minimum=1, maximum=10**4
    )
    step_timeout_s: float = setting(
        30.0,
        "Time limit for an answer of an environment, in seconds. After it the process is killed, and the sample is "
        "left out as a failed check.",
        above=0,
        maximum=3600,
    )
    attempts: int = setting(
        3,
        "How many times a sample is started if its environment cannot be reset, or is lost because another one in the "
        "same process hung or crashed. After that the sample is left out as a failed check.",
        minimum=1,
        maximum=1000,
    )
    workers: int = setting(
        4,
        "Number of processes for environments. Each process runs the environments of many samples, one call at a time. "
        f"Each may use {VERIFIER_MEMORY_GIB} GiB, and together they have to fit into memory.",
        minimum=1,
        maximum=1024,
    )
    variables: list[str] = setting(
        [],
        "Names of environment variables that an environment needs, such as a service's key. Its processes get only "
        "these and the ones that Python needs to start.",
    )

    @property
    def is_own(self) -> bool:
        """Whether it is the user's own function, whose environments run in processes."""
        return self.name != SINGLE_TURN
