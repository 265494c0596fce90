"""Weight updates: from the trainer's ranks, stage after stage, to every vLLM worker, in one session.

Every rank of the trainer calls `push` (SPMD). Three roles, one protocol:

* the *conductor*, a thread on rank 0, drives vLLM's control plane over HTTP and gives each stage its turn;
* the *leader* of each pipeline stage cuts its stream of full tensors into buckets and puts them on a transfer plane,
  gathering the next bucket while the last one travels;
* all other ranks only consume their streams, because they take part in the gathers.

A session begins with joining all engine workers to every stage's plane when servers have come or gone since the last
one, or when that one failed. Messages go through a `Mailbox`. Whatever fails, the conductor ends the session with a
verdict within `rollout.update_timeout_s`, leaders drain their streams so that no gather is left hanging, planes are
closed, which frees engines that wait in them, and every rank raises the same RolloutError. Engines whose update failed
hold unusable weights until another push succeeds.
"""

import asyncio
import collections
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.distributed import Store

from megatron_fipo.config import RolloutConfig
from megatron_fipo.errors import FipoError, RolloutError
from megatron_fipo.weights.buckets import cut_buckets
from megatron_fipo.weights.deadline import Deadline
from megatron_fipo.weights.mailbox import ABORT, Mailbox, SessionAborted, trainer_store
from megatron_fipo.weights.planes import TransferPlane, make_plane

BEGIN, VERDICT, FAILED = "begin", "verdict", "failed"
VERDICT_SLACK_S = 5.0
"""How much longer than rank 0 the other ranks wait, so that its verdict comes before their own deadlines."""
LEADER_WATCH_S = 0.05
CANCEL_TIMEOUT_S = 5.0


class WeightControl(Protocol):
    """vLLM's control plane over all servers at once; every call raises RolloutError when one of them fails."""

    @property
    def roster(self) -> int:
        """Another number whenever servers have come or gone since."""
        ...

    def admit(self) -> None:
        """Before a session: see who is there to get the weights, and wait for those who come back."""
        ...

    @property
    def workers_of_server(self) -> list[int]:
        """Engine workers of each server, in the servers' order."""
        ...

    async def pause(self, deadline: Deadline) -> None: ...

    async def resume(self, deadline: Deadline) -> None: ...

    async def init_weight_transfer_engine(self, info_of_server: list[dict[str, Any]], deadline: Deadline) -> None: ...

    async def start_weight_update(self, deadline: Deadline) -> None: ...

    async def update_weights(self, update_info: dict[str, Any], deadline: Deadline) -> None: ...

    async def finish_weight_update(self, version: int, deadline: Deadline) -> None: ...


@dataclass(frozen=True)
class TransferStats:
    """What one weight update moved, over all stages, and the seconds from pause to resume."""

    tensors: int
    bytes: int
    buckets: int
    checked: int
    """Tensors whose checksums every engine worker has found to be the trainer's."""
    seconds: float


def open_transfer(
    rollout: RolloutConfig,
    control: WeightControl | None,
    *,
    stage: int,
    num_stages: int,
    is_leader: bool,
    run_dir: Path,
) -> "WeightTransfer":
    """This rank's part of all weight updates of a run.

    `control` is given on global rank 0 and None elsewhere. `is_leader` is true on exactly one rank of each of the
    `num_stages` pipeline stages: the one whose stream of tensors is sent.
    """
    plane = make_plane(rollout, stage, run_dir) if is_leader else None
    return WeightTransfer(
        plane,
        control,
        trainer_store(),
        stage=stage,
        num_stages=num_stages,
        bucket_bytes=rollout.bucket_mib << 20,
        timeout_s=rollout.update_timeout_s,
        begin_timeout_s=rollout.start_timeout_s + rollout.update_timeout_s,
        checksum_every=rollout.checksum_every,
    )


class WeightTransfer:
    """See the module's description. Not thread-safe; calls must come in the same order on every rank."""

    def __init__(
        self,
        plane: TransferPlane | None,
        control: WeightControl | None,
        store: Store,
        *,
        stage: int,
        num_stages: int,
        bucket_bytes: int,
        timeout_s: float,
        begin_timeout_s: float,
        checksum_every: int = 0,
    ):
        """`timeout_s` is for a session from when rank 0 begins it, `begin_timeout_s` for the other ranks until then.

        Versions that are multiples of `checksum_every` are sent with checksums; 0 is never.
        """
        self._plane, self._control, self._store = plane, control, store
        self._stage, self._num_stages = stage, num_stages
        self._bucket_bytes = bucket_bytes
        self._timeout_s, self._begin_timeout_s = timeout_s, begin_timeout_s
        self._checksum_every = checksum_every
        self._sessions = 0
        self._joined_roster: int | None = None

    def push(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> TransferStats:
        """Sends this rank's stream of (Hugging Face name, full tensor) to all engines as weight version `version`.

        Streams of ranks that lead no stage are consumed and not sent. Afterwards the engines' prefix caches are empty
        and responses carry `version`. Raises RolloutError on every rank, and consumes every stream even then; for a
        tensor that arrived with another checksum it names the tensor. It may be called again after an error.
        """
        stream = iter(tensors)
        mailbox = Mailbox(self._store, f"session{self._sessions}")
        self._sessions += 1
        try:
            verdict = self._run_session(mailbox, stream, version)
            if (error := verdict.pop("error")) is not None:
                raise RolloutError(error)
        except BaseException:
            self._joined_roster = None
            self.close()
            raise
        return TransferStats(**verdict)

    def close(self) -> None:
        """Releases the plane; the next push would open it again."""
        if self._plane is not None:
            self._plane.close()

    def _run_session(self, mailbox: Mailbox, stream: Iterator[tuple[str, Tensor]], version: int) -> dict[str, Any]:
        """One session on this rank, up to its verdict, which it returns."""
        what = f"weight update {version}"
        conductor = None
        if self._control is not None:
            try:
                self._control.admit()
            except FipoError as error:
                mailbox.post(BEGIN, {"error": str(error)})
                raise
            begin = {"join": self._control.roster != self._joined_roster}
            self._joined_roster = self._control.roster
            conductor = _Conductor(what, mailbox, self._conduct(mailbox, version, join=begin["join"]))
            conductor.start()
            mailbox.post(BEGIN, begin)
        else:
            # Rank 0 may be busy, with servers that are still starting.
            begin = mailbox.wait(BEGIN, Deadline(self._begin_timeout_s), f"rank 0 to begin {what}")
            if "error" in begin:
                raise RolloutError(begin["error"])
        late = Deadline(self._timeout_s + VERDICT_SLACK_S)
        check = self._checksum_every > 0 and version % self._checksum_every == 0
        try:
            if self._plane is not None:
                lead = functools.partial(self._lead, mailbox, late, stream, join=begin["join"], check=check)
                _run_or_report(mailbox, self._stage, lead)
            # What is left of the stream, so that no other rank waits in a gather for this one.
            _run_or_report(mailbox, self._stage, lambda: collections.deque(stream, maxlen=0))
            return mailbox.wait(VERDICT, late, f"rank 0's verdict on {what}")
        except BaseException:
            if conductor is not None:
                conductor.cancel()
            raise
        finally:
            if conductor is not None:
                conductor.join(timeout=CANCEL_TIMEOUT_S)

    # --- conductor: rank 0 only -----------------------------------------------------------------------------------

    async def _conduct(self, mailbox: Mailbox, version: int, *, join: bool) -> dict[str, Any]:
        deadline = Deadline(self._timeout_s)
        if join:
            await self._conduct_join(mailbox, deadline)
        return await self._conduct_push(mailbox, deadline, version)

    async def _conduct_join(self, mailbox: Mailbox, deadline: Deadline) -> None:
        assert self._control is not None
        for stage in range(self._num_stages):
            mailbox.post(f"join/{stage}", {"workers": sum(self._control.workers_of_server)})
            info = await mailbox.take(f"plane/{stage}", deadline, f"the leader of pipeline stage {stage}")
            infos, first_rank = [], 1
            for workers in self._control.workers_of_server:
                infos.append({**info, "first_rank": first_rank})
                first_rank += workers
            await self._control.init_weight_transfer_engine(infos, deadline)
            await mailbox.take(f"joined/{stage}", deadline, f"the leader of pipeline stage {stage} to join its group")

    async def _conduct_push(self, mailbox: Mailbox, deadline: Deadline, version: int) -> dict[str, Any]:
        assert self._control is not None
        started = time.monotonic()
        await self._control.pause(deadline)
        await self._control.start_weight_update(deadline)
        totals = _no_totals()
        for stage in range(self._num_stages):
            for key, value in (await self._conduct_stage(mailbox, deadline, stage)).items():
                totals[key] += value
        await self._control.finish_weight_update(version, deadline)
        await self._control.resume(deadline)
        return asdict(TransferStats(**totals, seconds=time.monotonic() - started))

    async def _conduct_stage(self, mailbox: Mailbox, deadline: Deadline, stage: int) -> dict[str, int]:
        """Hands every bucket that the stage's leader announces to the engines; returns the leader's totals."""
        assert self._control is not None
        mailbox.post(f"turn/{stage}", {})
        index = 0
        while True:
            key = f"bucket/{stage}/{index}"
            message = await mailbox.take(key, deadline, f"bucket {index} of pipeline stage {stage}")
            if "totals" in message:
                return message["totals"]
            await self._control.update_weights(message, deadline)
            mailbox.post(f"received/{stage}/{index}", {})
            index += 1

    # --- leader: one rank of each stage ---------------------------------------------------------------------------

    def _lead(
        self, mailbox: Mailbox, deadline: Deadline, tensors: Iterable[tuple[str, Tensor]], *, join: bool, check: bool
    ) -> None:
        if join:
            self._lead_join(mailbox, deadline)
        self._lead_push(mailbox, deadline, tensors, check)

    def _lead_join(self, mailbox: Mailbox, deadline: Deadline) -> None:
        assert self._plane is not None
        workers = mailbox.wait_turn(f"join/{self._stage}", deadline, "rank 0 to connect this pipeline stage")["workers"]
        mailbox.post(f"plane/{self._stage}", self._plane.open(workers))
        _run_abandonable(self._plane.join, mailbox, deadline)
        mailbox.post(f"joined/{self._stage}", {})

    def _lead_push(
        self, mailbox: Mailbox, deadline: Deadline, tensors: Iterable[tuple[str, Tensor]], check: bool
    ) -> None:
        assert self._plane is not None
        totals = _no_totals()
        # Before the first bucket the stage's turn, before any other the engines' receipt for the last one.
        cue, what = f"turn/{self._stage}", "the turn of this pipeline stage"
        for bucket in cut_buckets(tensors, self._bucket_bytes):
            self._await_cue(mailbox, deadline, cue, what, first=totals["buckets"] == 0)
            index = totals["buckets"]
            message = self._plane.send(bucket)
            if check:
                message["checksums"] = bucket.checksums()
                totals["checked"] += len(bucket.tensors)
            mailbox.post(f"bucket/{self._stage}/{index}", message)
            cue, what = f"received/{self._stage}/{index}", f"the engines to take bucket {index}"
            totals["buckets"] += 1
            totals["tensors"] += len(bucket.tensors)
            totals["bytes"] += sum(tensor.nbytes for _, tensor in bucket.tensors)
        self._await_cue(mailbox, deadline, cue, what, first=totals["buckets"] == 0)
        mailbox.post(f"bucket/{self._stage}/{totals['buckets']}", {"totals": totals})

    def _await_cue(self, mailbox: Mailbox, deadline: Deadline, cue: str, what: str, *, first: bool) -> None:
        assert self._plane is not None
        mailbox.wait_turn(cue, deadline, what)
        if not first:
            self._plane.sent()


class _Conductor(threading.Thread):
    """Runs the conductor's coroutine on an event loop of its own and posts the verdict, whatever happens."""

    def __init__(self, what: str, mailbox: Mailbox, conduct: Coroutine[Any, Any, dict[str, Any]]):
        super().__init__(name="weight-conductor", daemon=True)
        self._what, self._mailbox, self._conduct = what, mailbox, conduct
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None

    def run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._judge())

    def cancel(self) -> None:
        """Ends the session early, for a rank 0 that was interrupted: the other ranks get a verdict all the same."""
        # The loop is closed when the session has ended by itself.
        if self._task is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._task.cancel)

    async def _judge(self) -> None:
        self._task = asyncio.current_task()
        try:
            verdict = {"error": None, **await self._conduct_unless_leader_fails()}
        except asyncio.CancelledError:
            verdict = {"error": f"{self._what}: rank 0 was stopped"}
        except FipoError as error:
            verdict = {"error": f"{self._what}: {error}"}
        except Exception as error:
            verdict = {"error": f"{self._what}: {type(error).__name__} on rank 0: {error}"}
        if verdict["error"] is not None:
            self._mailbox.post(ABORT, {})
        self._mailbox.post(VERDICT, verdict)

    async def _conduct_unless_leader_fails(self) -> dict[str, Any]:
        """The coroutine's result; RolloutError as soon as a leader reports a failure, engines waiting for it or not."""
        work = asyncio.ensure_future(self._conduct)
        try:
            while not (await asyncio.wait({work}, timeout=LEADER_WATCH_S))[0]:
                if (message := self._mailbox.peek(FAILED)) is not None:
                    raise RolloutError(message["error"])
            return work.result()
        finally:
            work.cancel()


def _no_totals() -> dict[str, int]:
    return {"tensors": 0, "bytes": 0, "buckets": 0, "checked": 0}


def _run_or_report(mailbox: Mailbox, stage: int, work: Callable[[], object]) -> None:
    """Runs this rank's part; a failure goes to rank 0, whose verdict raises it on every rank."""
    try:
        work()
    except SessionAborted:
        return
    except Exception as error:
        text = str(error) if isinstance(error, FipoError) else f"{type(error).__name__}: {error}"
        mailbox.post(FAILED, {"error": f"pipeline stage {stage}: {text}"})


def _run_abandonable(work: Callable[[], None], mailbox: Mailbox, deadline: Deadline) -> None:
    """Runs `work`, which may block outside Python, until it ends, rank 0 gives up or the deadline passes."""
    failures: list[Exception] = []

    def guarded() -> None:
        try:
            work()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=guarded, name="join-weight-plane", daemon=True)
    thread.start()
    while thread.is_alive() and not deadline.passed():
        thread.join(timeout=0.01)
        mailbox.raise_if_aborted()
    if thread.is_alive():
        raise RolloutError(f"the engine workers did not join the weight plane within {deadline.seconds:g} s")
    if failures:
        raise failures[0]
