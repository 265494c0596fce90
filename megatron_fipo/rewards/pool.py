"""The verifier pool: judges groups in killable processes, each response under its own deadline.

A check that hangs is killed and one that crashes its process is noticed; either way the process is restarted, the other
responses go on, and the response's outcome is `timeout` or `crash`, counted, and not a wrong answer.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from typing import Any

from megatron_fipo.algorithm.advantages import overlong_penalty
from megatron_fipo.config import RewardConfig
from megatron_fipo.errors import RewardError
from megatron_fipo.processes.worker_process import WorkerDied, WorkerHung, WorkerProcess
from megatron_fipo.records.problem import Problem
from megatron_fipo.records.sample import Group, RewardResult, Sample
from megatron_fipo.rewards.failures import LONGEST_NOTED, Failure, FailureLog
from megatron_fipo.rewards.process import verifier_process

# Large enough that one message serves several short checks, small enough that a group with slow checks spreads out.
_BATCH = 8

Decode = Callable[[list[int]], str]
"""Token ids to text. Called in several threads at the same time."""


class _Ticket:
    """A group on its way through the pool; resolves its future when the last verdict is in."""

    def __init__(self, group: Group, decode: Decode | None):
        self.group = group
        self.samples = list(group.samples)
        """With their texts, once they are decoded."""
        self.future: Future[Group] = Future()
        self._decode = decode
        self._results: dict[int, RewardResult] = {}
        self._lock = threading.Lock()

    def decode(self, indices: range) -> None:
        """Give these samples their texts."""
        if self._decode is None:
            return
        for index in indices:
            sample = self.samples[index]
            self.samples[index] = replace(sample, text=self._decode(sample.token_ids.tolist()))

    def settle(self, index: int, result: RewardResult) -> None:
        with self._lock:
            self._results[index] = result
            complete = len(self._results) == len(self.group.samples)
        if complete:
            results = [self._results[i] for i in range(len(self._results))]
            self.future.set_result(replace(self.group, samples=tuple(self.samples)).with_results(results))

    def fail(self, error: BaseException) -> None:
        with self._lock:
            if not self.future.done():
                self.future.set_exception(error)


class RewardPool:
    """`config.workers` verifier processes and a thread for each. Use as a context manager, or call `close`."""

    def __init__(self, config: RewardConfig, max_response_length: int, failures: FailureLog | None = None):
        """Starts the processes in the background.

        Args:
            max_response_length: in tokens, for the overlong penalty.
            failures: where checks that fail are noted.
        """
        self._config = config
        self.failures = failures or FailureLog()
        self._max_response_length = max_response_length
        self._queue: queue.SimpleQueue[tuple[_Ticket, range] | None] = queue.SimpleQueue()
        self._closed = False
        self._processes = [verifier_process(config) for _ in range(config.workers)]
        self._first_start: Future[None] = Future()
        self._threads = [
            threading.Thread(target=self._supervise, args=(process,), name=f"verifier-{index}", daemon=True)
            for index, process in enumerate(self._processes)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def wait_started(self) -> None:
        """Waits for the first process, at most the two minutes that it has, and closes the pool if it cannot start.

        Raises:
            ConfigError: reward.rule is a function that cannot be used.
            RewardError: the process does not come up.
        """
        try:
            self._first_start.result()
        except Exception:
            self.close()
            raise

    def submit(self, group: Group, decode: Decode | None = None) -> Future[Group]:
        """Judges a group in the background; the future gives the same group with a result in each sample.

        A sample that has a result keeps its environment's verdict, to which the overlong penalty is added.
        The samples get their texts by `decode`, in a verifier's thread, or have them already. From asyncio: `await
        asyncio.wrap_future(pool.submit(group))`.
        The future raises RewardError if no verifier can be started, or the pool is closed first, and ConfigError if
        reward.rule is a function that cannot be used.
        """
        if self._closed:
            raise RewardError("the verifier pool is closed")
        ticket = _Ticket(group, decode)
        if not group.samples:
            ticket.future.set_result(group)
        for start in range(0, len(group.samples), _BATCH):
            self._queue.put((ticket, range(start, min(start + _BATCH, len(group.samples)))))
        return ticket.future

    def close(self) -> None:
        """Ends every process and thread; unfinished futures raise RewardError. May be called twice."""
        self._closed = True
        for process in self._processes:
            process.retire()
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _supervise(self, process: WorkerProcess) -> None:
        """One thread's life: feeds one process until the pool closes."""
        # Start-up runs ahead of the first response; if it fails, whoever submits one is told.
        failure = None
        try:
            process.ensure_started()
        except Exception as error:  # one that cannot even be made, too: `wait_started` must hear of it
            failure = error
        if process is self._processes[0]:
            self._first_start.set_exception(failure) if failure else self._first_start.set_result(None)
        while (work := self._queue.get()) is not None:
            ticket, indices = work
            try:
                ticket.decode(indices)
                self._judge_batch(process, ticket, indices)
            except Exception as error:
                ticket.fail(error)
        process.kill()

    def _judge_batch(self, process: WorkerProcess, ticket: _Ticket, indices: range) -> None:
        pending: deque[int] = deque()
        for index in indices:
            if (given := ticket.group.samples[index].result) is not None:
                self._settle(ticket, index, asdict(given))
            else:
                pending.append(index)
        while pending:
            process.ensure_started()
            try:
                items = [
                    _item(ticket.group.problem, ticket.samples[index], process.greeting["inputs"]) for index in pending
                ]
                process.send(items, self._config.timeout_s)
                while pending:
                    for result in process.receive(self._config.timeout_s):
                        self._settle(ticket, pending.popleft(), result)
            except WorkerHung:
                process.kill()
                error = f"no verdict within reward.timeout_s={self._config.timeout_s:g}"
                self._settle(ticket, pending.popleft(), {"outcome": "timeout", "error": error})
            except WorkerDied:
                process.kill()
                if self._closed:
                    raise RewardError("the verifier pool was closed while it judged a response") from None
                self._settle(ticket, pending.popleft(), {"error": "the verifier process ended in the check"})

    def _settle(self, ticket: _Ticket, index: int, result: dict[str, Any]) -> None:
        outcome = result.get("outcome", "crash")
        accuracy, answer, extra = result.get("accuracy", 0.0), result.get("answer", ""), result.get("extra", {})
        if "error" in result:
            self.failures.add(_failure(ticket.group.problem, ticket.samples[index], outcome, result))
        reward = self._reward(accuracy, result.get("reward"), ticket.group.samples[index].actions)
        ticket.settle(index, RewardResult(accuracy, reward, answer, outcome, extra))

    def _reward(self, accuracy: float, reward: float | None, length: int) -> float:
        """The rule's own reward, or incorrect … correct by accuracy, linear in between; then the overlong penalty."""
        config = self._config
        if reward is None:
            share = min(max(accuracy, 0.0), 1.0)
            reward = config.incorrect + share * (config.correct - config.incorrect)
        if config.overlong_buffer.enable:
            reward += overlong_penalty(
                length,
                max_response_length=self._max_response_length,
                buffer_length=config.overlong_buffer.len,
                penalty_factor=config.overlong_buffer.penalty_factor,
            )
        return reward


def _item(problem: Problem, sample: Sample, inputs: Sequence[str]) -> dict[str, Any]:
    """What a rule is told of a response: no more than it wants, since the ids of a long one are many."""
    values = {
        "response": sample.text,
        "token_ids": sample.token_ids.tolist() if "token_ids" in inputs else None,
        "ground_truth": problem.ground_truth,
        "columns": problem.columns,
        "data_source": problem.data_source,
        "prompt": problem.text,
        "finish_reason": sample.finish_reason,
        "extra": problem.extra,
    }
    return {name: values[name] for name in inputs}


def _failure(problem: Problem, sample: Sample, outcome: str, result: dict[str, Any]) -> Failure:
    return Failure(
        problem=problem.id,
        data_source=problem.data_source,
        ground_truth=problem.ground_truth[-LONGEST_NOTED:],
        response=sample.text[-LONGEST_NOTED:],
        outcome=outcome,
        error=result["error"],
        traceback=result.get("traceback", ""),
    )
