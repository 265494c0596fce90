"""The rollout process, as the trainer's rank 0 has it: started, called, watched, ended."""

import asyncio
import contextlib
import selectors
import ssl
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec

from megatron_fipo.engines.descriptors import NoDescriptors
from megatron_fipo.errors import FipoError, RolloutError, RunFailed, WeightsRefused
from megatron_fipo.processes.interrupt import Interrupted
from megatron_fipo.records.rows import StoreAddress
from megatron_fipo.rollout.events import PartReady, Ready, WeightsWanted
from megatron_fipo.rollout_process.call_messages import (
    CALL_PATH,
    OPEN,
    Message,
    MessageReader,
    Noted,
    Opened,
    PhaseBegan,
    PhaseEnded,
    Progressed,
    Refused,
    Returned,
    Warned,
    decode_result,
)
from megatron_fipo.rollout_process.link import Offer, Resumed, RolloutCalls
from megatron_fipo.tracking.console import Console
from megatron_fipo.tracking.validation import ValidationResult
from megatron_fipo.weights.deadline import Deadline
from megatron_fipo.weights.transport_records import BucketHeader, JoinRequest, WorkerPlace

START_TIMEOUT_S, SILENCE_S, CONNECT_S = 120.0, 60.0, 10.0
"""Longest time until the process answers, without a sign of life during a call, and to connect."""
END_TIMEOUT_S, DEATH_GRACE_S = 60.0, 2.0
"""Longest time to end it, and for its exit status after its connection has broken."""


_ROLLOUT_ERRORS = (RolloutError.__name__, NoDescriptors.__name__)


class RemoteRollouts:
    """Calls to the rollout process. Implements `link.RolloutCalls`; each call raises what it raised there.

    RolloutError too when the process ends, or gives no sign of life. A context manager, which ends it.
    """

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        model_dir: Path,
        run_dir: Path,
        console: Console,
        stops_waiting: Callable[[], bool] = lambda: False,
    ):
        """Have it load the problems, see that rewards can be had, and start servers, without waiting for them.

        `wait` raises Interrupted within seconds of when `stops_waiting` is true.
        """
        self._process, self._console, self._stops_waiting = process, console, stops_waiting
        try:
            self._address = self._wait_started()
            self._call(OPEN, msgspec.msgpack.encode(Opened(str(model_dir), str(run_dir))))
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> "RemoteRollouts":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if self._process.poll() is None:
                self.close()
        except FipoError as error:
            self._console.warn(str(error))
        finally:
            self._end()

    def connect(self) -> None:
        self._ask("connect")

    def make_room(self) -> None:
        self._ask("make_room")

    def replace_failed(self) -> bool:
        return self._ask("replace_failed")

    def begin_batch(self, step: int, weight_version: int) -> None:
        self._ask("begin_batch", step, weight_version)

    def begin_validation(self, step: int) -> None:
        self._ask("begin_validation", step)

    def part(self) -> bytes:
        return self._ask("part")

    def wait(self) -> Ready | PartReady | WeightsWanted:
        return self._ask("wait", breaks=self._stops_waiting)

    def taken(self) -> Offer:
        return self._ask("taken")

    def validated(self) -> ValidationResult:
        return self._ask("validated")

    def give_back(self, reason: str) -> bytes:
        return self._ask("give_back", reason)

    def fetched(self) -> None:
        self._ask("fetched")

    def settle(self, version: int) -> None:
        self._ask("settle", version)

    def break_off(self) -> None:
        self._ask("break_off")

    def record_credit(self, frames: list[bytes]) -> None:
        self._ask("record_credit", frames)

    def busy(self) -> list[tuple[float, float]]:
        return self._ask("busy")

    def end_step(self) -> dict[str, int | float]:
        return self._ask("end_step")

    def snapshot(self) -> int:
        return self._ask("snapshot")

    def write_snapshot(self, number: int, directory: str) -> None:
        self._ask("write_snapshot", number, directory)

    def resume(self, checkpoint: str, step: int) -> Resumed:
        return self._ask("resume", checkpoint, step)

    def close(self) -> None:
        self._ask("close")

    def roster(self) -> int:
        return self._ask("roster")

    def admit(self) -> None:
        self._ask("admit")

    def workers_of_server(self) -> list[tuple[WorkerPlace, ...]]:
        return self._ask("workers_of_server")

    def pause(self, seconds: float) -> None:
        self._ask("pause", seconds)

    def resume_sampling(self, seconds: float) -> None:
        self._ask("resume_sampling", seconds)

    def join_transport(self, requests: list[JoinRequest], seconds: float) -> None:
        self._ask("join_transport", requests, seconds)

    def start_weight_update(self, seconds: float) -> None:
        self._ask("start_weight_update", seconds)

    def update_weights(self, header: BucketHeader, seconds: float) -> None:
        self._ask("update_weights", header, seconds)

    def finish_weight_update(self, version: int, seconds: float) -> None:
        self._ask("finish_weight_update", version, seconds)

    def score(self, token_ids: list[int], seconds: float) -> dict[str, list[float | None]]:
        return self._ask("score", token_ids, seconds)

    def _ask(self, name: str, *arguments: object, breaks: Callable[[], bool] | None = None) -> Any:
        """The answer to one of the calls of link.py. Interrupted as soon as `breaks`, looked at now and then, is true.

        The rollout process breaks off a call whose connection has ended.
        """
        result = self._call(name, msgspec.msgpack.encode(arguments), breaks or (lambda: False))
        try:
            return decode_result(name, result)
        except ValueError as error:
            raise RolloutError(f"the rollout process answered {name} with something else: {error}") from None

    def _call(self, name: str, body: bytes, breaks: Callable[[], bool] = lambda: False) -> bytes:
        """What a call returned. From any thread, and after a fork too: each call has a connection of its own."""
        reader = MessageReader()
        try:
            with (
                _Phases(self._console) as phases,
                httpx.Client(
                    base_url=self._address.url,
                    headers={"Authorization": f"Bearer {self._address.token}"},
                    timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S),
                    trust_env=False,
                    # It speaks plain HTTP: reading certificates would take longer than a call.
                    verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
                ) as client,
                client.stream("POST", CALL_PATH + name, content=body) as response,
            ):
                for chunk in response.iter_raw():
                    for message in reader.feed(chunk):
                        if isinstance(message, Returned):
                            return message.result
                        self._hear(message, phases)
                        if breaks():
                            raise Interrupted
        except httpx.TimeoutException as error:
            raise RolloutError(f"the rollout process gives no sign of life in {name} for {SILENCE_S:g} s") from error
        except (httpx.TransportError, ValueError) as error:
            raise self._lost(name) from error
        raise self._lost(name)

    def _hear(self, message: Message, phases: "_Phases") -> None:
        """Pass on to the console what is said during a call. Raises what has ended it."""
        match message:
            case Warned(text):
                self._console.warn(text)
            case Noted(text):
                self._console.note(text)
            case PhaseBegan(name):
                phases.begin(name)
            case PhaseEnded():
                phases.end()
            case Progressed(done, total, unit):
                self._console.progress(done, total, unit)
            case Refused(kind, text, exit_code):
                raise _error(kind, text, exit_code)

    def _lost(self, name: str) -> RolloutError:
        """Why a call got no answer."""
        grace = Deadline(DEATH_GRACE_S)
        while (code := self._process.poll()) is None and not grace.passed():
            time.sleep(0.02)
        if code is None:
            return RolloutError(f"the rollout process broke off {name} and still runs")
        how = f"by signal {-code}" if code < 0 else f"with exit status {code}"
        return RolloutError(f"the rollout process was ended {how}")

    def _wait_started(self) -> StoreAddress:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(START_TIMEOUT_S):
                raise RolloutError(f"the rollout process did not start within {START_TIMEOUT_S:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._lost(OPEN)
        return msgspec.json.decode(line, type=StoreAddress)

    def _end(self) -> None:
        """See that the process is gone: it ends with its standard input, and is killed if it does not."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class _Phases:
    """Phases of a call that are shown here; those that its end leaves open end with it."""

    def __init__(self, console: Console):
        self._console = console
        self._open: list[ExitStack] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        while self._open:
            self.end()

    def begin(self, name: str) -> None:
        """One more, inside the others."""
        phase = ExitStack()
        phase.enter_context(self._console.phase(name))
        self._open.append(phase)

    def end(self) -> None:
        """The innermost; none where it has ended with the call that it began in."""
        if self._open:
            self._open.pop().close()


class RemoteControl:
    """The servers' control plane through the rollout process, as weight updates and probes want it."""

    def __init__(self, rollouts: RolloutCalls):
        self._rollouts = rollouts

    @property
    def roster(self) -> int:
        return self._rollouts.roster()

    def admit(self) -> None:
        self._rollouts.admit()

    @property
    def workers_of_server(self) -> list[tuple[WorkerPlace, ...]]:
        return self._rollouts.workers_of_server()

    async def pause(self, deadline: Deadline) -> None:
        await asyncio.to_thread(self._rollouts.pause, deadline.remaining())

    async def resume(self, deadline: Deadline) -> None:
        await asyncio.to_thread(self._rollouts.resume_sampling, deadline.remaining())

    async def join_transport(self, request_of_server: list[JoinRequest], deadline: Deadline) -> None:
        await asyncio.to_thread(self._rollouts.join_transport, request_of_server, deadline.remaining())

    async def start_weight_update(self, deadline: Deadline) -> None:
        await asyncio.to_thread(self._rollouts.start_weight_update, deadline.remaining())

    async def update_weights(self, header: BucketHeader, deadline: Deadline) -> None:
        await asyncio.to_thread(self._rollouts.update_weights, header, deadline.remaining())

    async def finish_weight_update(self, version: int, deadline: Deadline) -> None:
        await asyncio.to_thread(self._rollouts.finish_weight_update, version, deadline.remaining())

    async def score(self, token_ids: list[int], deadline: Deadline) -> dict[str, list[float | None]]:
        return await asyncio.to_thread(self._rollouts.score, token_ids, deadline.remaining())


def _error(kind: str, text: str, exit_code: int) -> FipoError:
    """The error that a call has raised, of its class where rank 0 tells it from others."""
    if kind == WeightsRefused.__name__:
        return WeightsRefused(text.removeprefix(WeightsRefused.MARK))
    return RolloutError(text) if kind in _ROLLOUT_ERRORS else RunFailed(text, exit_code)
