"""The environments of all samples, in processes that can be killed, each call under a deadline.

An environment stays in one process from its reset to its end. A call that hangs has the process killed; that, and a
crash, cost the sample whose call it was. The others of that process go on from the state that they told last, or begin
again.
"""

import itertools
import json
import queue
import threading
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.config import EnvironmentConfig
from megatron_fipo.config.environment import NAME_KEY
from megatron_fipo.environments.protocol import Task
from megatron_fipo.errors import RolloutError
from megatron_fipo.processes.worker_process import Job, WorkerDied, WorkerHung, WorkerProcess

_CLOSED = "the environments were closed while samples were waiting for them"


class EnvironmentFailed(Exception):
    """A call to a sample's environment came to nothing."""

    def __init__(self, outcome: str, error: str, traceback: str = ""):
        super().__init__(error)
        self.outcome = outcome
        """timeout or crash."""
        self.error, self.traceback = error, traceback


class EnvironmentLost(EnvironmentFailed):
    """By no fault of its own, an environment has gone with its process; the sample may begin again."""


@dataclass(frozen=True)
class _Call:
    episode: int
    item: dict[str, Any]
    answer: "Future[dict[str, Any]]"


@dataclass(frozen=True)
class _Held:
    """Where an environment stood after its last answer."""

    life: int
    """Of its process."""
    task: dict[str, Any]
    state: dict[str, Any] | None


def environment_process(config: EnvironmentConfig, model_dir: Path | None, vocab_size: int) -> WorkerProcess:
    """One `megatron_fipo.environments.worker`; without a model, one that only imports.

    Starting it raises ConfigError where environment.name is a function that cannot be used, and else RolloutError.
    """
    return WorkerProcess(
        Job(
            name="environment",
            key=NAME_KEY,
            code=config.name,
            module="megatron_fipo.environments.worker",
            arguments=(config.name, json.dumps(config.options), str(model_dir or ""), str(vocab_size)),
            variables=config.variables,
            error=RolloutError,
            closed=_CLOSED,
        )
    )


class EnvironmentPool:
    """`config.workers` processes and a thread for each. Use as a context manager, or call `close`."""

    def __init__(self, config: EnvironmentConfig, model_dir: Path, vocab_size: int):
        """Starts the processes in the background."""
        self._workers = [
            _Worker(environment_process(config, model_dir, vocab_size), config.step_timeout_s, index)
            for index in range(config.workers)
        ]
        self._numbers = itertools.count()

    def __enter__(self) -> "EnvironmentPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def wait_started(self) -> None:
        """Waits for the first process, at most the two minutes that it has, and closes the pool if it cannot start.

        Raises:
            ConfigError: environment.name is a function that cannot be used.
            RolloutError: the process does not come up.
        """
        try:
            self._workers[0].started.result()
        except Exception:
            self.close()
            raise

    def open(self) -> "PooledEnvironment":
        """An environment for one sample; `reset` makes it."""
        number = next(self._numbers)
        return PooledEnvironment(self._workers[number % len(self._workers)], number)

    def close(self) -> None:
        """Ends every process and thread; unfinished calls raise RolloutError. May be called twice."""
        for worker in self._workers:
            worker.retire()
        for worker in self._workers:
            worker.thread.join()


class PooledEnvironment:
    """One sample's environment. Futures raise EnvironmentFailed, and RolloutError or ConfigError for the whole pool."""

    def __init__(self, worker: "_Worker", episode: int):
        self._worker, self._episode = worker, episode

    def reset(self, task: Task) -> "Future[dict[str, Any]]":
        """Gives {context, state}."""
        return self._worker.ask(self._episode, {"call": "reset", "task": asdict(task)})

    def step(self, action: dict[str, Any]) -> "Future[dict[str, Any]]":
        """Gives {context, state} or {verdict}. `action` has the fields of Action but for its text."""
        return self._worker.ask(self._episode, {"call": "step", "action": action})

    def close(self) -> None:
        """The sample has ended; waits for nothing."""
        self._worker.ask(self._episode, {"call": "close"})


class _Worker:
    """One process, and the thread that alone speaks with it."""

    def __init__(self, process: WorkerProcess, timeout_s: float, index: int):
        self.started: Future[None] = Future()
        self._process, self._timeout_s = process, timeout_s
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._held: dict[int, _Held] = {}
        self._closed = False
        self.thread = threading.Thread(target=self._serve, name=f"environment-{index}", daemon=True)
        self.thread.start()

    def ask(self, episode: int, item: dict[str, Any]) -> "Future[dict[str, Any]]":
        """The answer to a call, in its turn."""
        call = _Call(episode, item | {"episode": episode}, Future())
        self._calls.put(call)
        return call.answer

    def retire(self) -> None:
        """From any thread: ends the process, and the thread after the call that it is in."""
        self._closed = True
        self._process.retire()
        self._calls.put(None)

    def _serve(self) -> None:
        try:
            self._process.ensure_started()
            self.started.set_result(None)
        except Exception as error:  # whoever waits must hear of it, whatever it is
            self.started.set_exception(error)
        while (call := self._calls.get()) is not None:
            if not call.answer.set_running_or_notify_cancel():
                continue
            try:
                call.answer.set_result(self._close(call) if call.item["call"] == "close" else self._answer(call))
            except Exception as error:
                call.answer.set_exception(error)
        self._process.kill()

    def _answer(self, call: _Call) -> dict[str, Any]:
        if self._closed:
            raise RolloutError(_CLOSED)
        self._process.ensure_started()
        held = self._held.get(call.episode)
        if held is not None and held.life != self._process.lives:
            self._restore(call, held)
        answer = self._exchange(call.item)
        task = call.item["task"] if held is None else held.task
        self._held[call.episode] = _Held(self._process.lives, task, answer["state"])
        return answer

    def _restore(self, call: _Call, held: _Held) -> None:
        """Bring an environment back whose process was killed for another one."""
        if held.state is None:
            raise EnvironmentLost("crash", "the environment was lost with its process, and had told no state")
        self._exchange({"call": "restore", "episode": call.episode, "task": held.task, "state": held.state})

    def _close(self, call: _Call) -> dict[str, Any]:
        """Forget an environment. One that fails at its end has cost nothing."""
        held = self._held.pop(call.episode, None)
        if held is not None and held.life == self._process.lives and not self._closed:
            try:
                self._exchange(call.item)
            except EnvironmentFailed as error:
                return {"error": error.error}
        return {}

    def _exchange(self, item: dict[str, Any]) -> dict[str, Any]:
        name = item["call"]
        try:
            self._process.send([item], self._timeout_s)
            (answer,) = self._process.receive(self._timeout_s)
        except WorkerHung:
            self._process.kill()
            error = f"no answer to {name} within environment.step_timeout_s={self._timeout_s:g}"
            raise EnvironmentFailed("timeout", error) from None
        except WorkerDied:
            self._process.kill()
            if self._closed:
                raise RolloutError(_CLOSED) from None
            raise EnvironmentFailed("crash", f"the environment's process ended in {name}") from None
        if "error" in answer:
            raise EnvironmentFailed("crash", f"{name}: {answer['error']}", answer.get("traceback", ""))
        return answer
