"""What a vLLM server is to its run: one of seven states, and which of them may follow which."""

import enum
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from megatron_fipo.engines.server_log import ServerLog
from megatron_fipo.engines.use_messages import CacheUse
from megatron_fipo.weights.transport_records import WorkerPlace


class State(enum.Enum):
    """Where a server stands. Only its pool moves it."""

    STARTING = "starting"
    """It has not answered yet."""
    SERVING = "serving"
    """It samples."""
    AWAITING_WEIGHTS = "awaiting weights"
    """It answers, but has not the weights to sample from: it was started again, or an update is under way."""
    LOST = "lost"
    """It has failed, and nothing has been done about it yet."""
    RESTARTING = "restarting"
    """One of ours that has been started again, and does not answer yet."""
    AWAY = "away"
    """Somebody else's that has failed. It is taken back when it answers."""
    GIVEN_UP = "given up"
    """It has failed too often, or for good."""


TRANSITIONS = {
    State.STARTING: {State.SERVING},
    State.SERVING: {State.AWAITING_WEIGHTS, State.LOST},
    State.AWAITING_WEIGHTS: {State.SERVING, State.LOST},
    State.LOST: {State.RESTARTING, State.AWAY, State.GIVEN_UP},
    State.RESTARTING: {State.SERVING, State.AWAITING_WEIGHTS, State.LOST, State.GIVEN_UP},
    State.AWAY: {State.SERVING, State.AWAITING_WEIGHTS, State.GIVEN_UP},
    State.GIVEN_UP: set[State](),
}
"""The states that may follow each."""
IN_SERVICE = frozenset({State.SERVING, State.AWAITING_WEIGHTS})
"""States in which a server answers calls."""
RETURNING = frozenset({State.RESTARTING, State.AWAY})
"""States in which it is asked whether it answers again."""


@dataclass(eq=False)
class Server:
    """One vLLM API server. `process` and `log` are None when somebody else started it."""

    url: str
    process: subprocess.Popen[bytes] | None = None
    log: ServerLog | None = None
    command: list[str] = field(default_factory=list)
    """Options that it was started with, and"""
    environment: dict[str, str] = field(default_factory=dict)
    """its environment: what it is started with again."""
    workers: tuple[WorkerPlace, ...] = ()
    """Where its engine's workers run, known from when it first answers."""
    cache: CacheUse | None = None
    """What its engine's cache holds, likewise; None where it does not say."""
    segments: set[Path] = field(default_factory=set)
    """Shared memory of its processes, which outlives them if they are killed."""
    state: State = State.STARTING
    reason: str = ""
    """Why it was lost last."""
    life: int = 0
    """How often it has been lost. Who was told of a failure late finds out that it was an earlier life's."""
    losses: int = 0
    """How often it was lost since the last step that it took part in."""
    bad_answers: int = 0
    """Answers, one after the other, that were not what was asked for."""

    def enter(self, state: State) -> None:
        """Be in another state. AssertionError if it may not follow this one."""
        assert state in TRANSITIONS[self.state], f"{self.url}: {state} cannot follow {self.state}"
        self.state = state

    def failure(self) -> str | None:
        """What happened to it, with the end of its log; None while it runs, or when that cannot be known."""
        if self.process is None or self.log is None or self.process.poll() is None:
            return None
        code = self.process.returncode
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"the vLLM server at {self.url} {how}; {self.log.excerpt()}"
