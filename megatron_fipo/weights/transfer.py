"""Weight updates: from the trainer's ranks, stage after stage, to every vLLM worker, in one session.

Every rank of the trainer calls `connect` and `push` (SPMD). Three roles, one protocol:

* the *conductor*, a thread on rank 0, drives vLLM's control plane over HTTP and gives each stage its turn;
* the *leader* of each pipeline stage cuts its stream of full tensors into buckets and puts them on a transfer plane,
  gathering the next bucket while the last one travels;
* all other ranks only consume their streams, because they take part in the gathers.

Messages go through a `Mailbox`. Whatever fails, the conductor ends the session with a verdict within
`rollout.update_timeout_s`, leaders drain their streams so that no gather is left hanging, and every rank raises the
same RolloutError. An engine whose update failed holds unusable weights: the run has to end.
"""

import asyncio
import collections
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
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
    def workers_of_server(self) -> list[int]:
        """Engine workers of each server, in the servers' order."""
        ...

    async def pause(self, deadline: Deadline) -> None: ...

    async def resume(self, deadline: Deadline) -> None: ...

    async def init_weight_transfer_engine(self, info_of_server: list[dict[str, Any]], deadline: Deadline) -> None: ...

    async def start_weight_update(self, deadline: Deadline) -> None: ...

    async def update_weights(self, update_info: dict[str, Any], deadline: Deadline) -> None: ...

    async def finish_weight_update(self, version: int, deadline: Deadline) -> None: ...

    async def reset_prefix_cache(self, deadline: Deadline) -> None: ...


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

    def connect(self) -> None:
        """Joins all engine workers to every stage's plane, once a run. Raises RolloutError on every rank."""
        self._run_session("connecting the weight planes", self._conduct_connect, self._lead_connect, ())

    def push(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> TransferStats:
        """Sends this rank's stream of (Hugging Face name, full tensor) to all engines as weight version `version`.

        Streams of ranks that lead no stage are consumed and not sent. Afterwards the engines' prefix caches are empty
        and responses carry `version`. Raises RolloutError on every rank, and consumes every stream even then; for a
        tensor that arrived with another checksum it names the tensor.
        """
        stream = iter(tensors)
        check = self._checksum_every > 0 and version % self._checksum_every == 0
        stats = self._run_session(
            f"weight update {version}",
            lambda mailbox, deadline: self._conduct_push(mailbox, deadline, version),
            lambda mailbox, deadline: self._lead_push(mailbox, deadline, stream, check),
            stream,
        )
        return TransferStats(**stats)

    def close(self) -> None:
        """Releases the plane; nothing can be pushed afterwards."""
        if self._plane is not None:
            self._plane.close()

    def _run_session(
        self,
        what: str,
        conduct: Callable[[Mailbox, Deadline], Coroutine[Any, Any, dict[str, Any]]],
        lead: Callable[[Mailbox, Deadline], None],
        stream: Iterable[Any],
    ) -> dict[str, Any]:
        """One session on this rank, up to its verdict, which it returns."""
        mailbox = Mailbox(self._store, f"session{self._sessions}")
        self._sessions += 1
        conductor = None
        if self._control is not None:
            deadline = Deadline(self._timeout_s)
            conductor = _Conductor(what, mailbox, lambda: conduct(mailbox, deadline))
            conductor.start()
            mailbox.post(BEGIN, {})
        else:
            # Rank 0 may be busy, with servers that are still starting.
            mailbox.wait(BEGIN, Deadline(self._begin_timeout_s), f"rank 0 to begin {what}")
        late = Deadline(self._timeout_s + VERDICT_SLACK_S)
        try:
            if self._plane is not None:
                _run_or_report(mailbox, self._stage, lambda: lead(mailbox, late))
            # What is left of the stream, so that no other rank waits in a gather for this one.
            _run_or_report(mailbox, self._stage, lambda: collections.deque(stream, maxlen=0))
            verdict = mailbox.wait(VERDICT, late, f"rank 0's verdict on {what}")
        except BaseException:
            if conductor is not None:
                conductor.cancel()
            raise
        finally:
            if conductor is not None:
                conductor.join(timeout=CANCEL_TIMEOUT_S)
        if (error := verdict.pop("error")) is not None:
            raise RolloutError(error)
        return verdict

    # --- conductor: rank 0 only -----------------------------------------------------------------------------------

    async def _conduct_connect(self, mailbox: Mailbox, deadline: Deadline) -> dict[str, Any]:
        assert self._control is not None
        for stage in range(self._num_stages):
            mailbox.post(f"turn/{stage}", {"workers": sum(self._control.workers_of_server)})
            info = await mailbox.take(f"plane/{stage}", deadline, f"the leader of pipeline stage {stage}")
            infos, first_rank = [], 1
            for workers in self._control.workers_of_server:
                infos.append({**info, "first_rank": first_rank})
                first_rank += workers
            await self._control.init_weight_transfer_engine(infos, deadline)
            await mailbox.take(f"joined/{stage}", deadline, f"the leader of pipeline stage {stage} to join its group")
        return {}

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
        # Cached keys and values are those of the old weights.
        await self._control.reset_prefix_cache(deadline)
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

    def _lead_connect(self, mailbox: Mailbox, deadline: Deadline) -> None:
        assert self._plane is not None
        workers = mailbox.wait_turn(f"turn/{self._stage}", deadline, "rank 0 to connect this pipeline stage")["workers"]
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

    def __init__(self, what: str, mailbox: Mailbox, conduct: Callable[[], Coroutine[Any, Any, dict[str, Any]]]):
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
        work = asyncio.ensure_future(self._conduct())
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
