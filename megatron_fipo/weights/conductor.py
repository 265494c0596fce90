"""Rank 0's part of a weight update: it drives vLLM's control plane, gives each sender its turn, and ends the update.

It runs in a thread with an event loop of its own, since rank 0 may be a sender too. Whatever happens, it posts a
verdict.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Coroutine
from typing import Any, Protocol

from megatron_fipo.errors import FipoError, RolloutError, WeightsRefused
from megatron_fipo.weights.deadline import Deadline
from megatron_fipo.weights.local_senders import Senders, joined_address, joined_header
from megatron_fipo.weights.mailbox import Mailbox
from megatron_fipo.weights.transport_records import BucketHeader, JoinRequest, WorkerPlace
from megatron_fipo.weights.update_records import Cue, Failure, Join, Opened, Part, Published, Sent, Totals, Verdict

VERDICT, FAILED = "verdict", "failed"
COME, LEAVE = "come", "leave"
"""Rank 0 to all ranks that share their GPUs with the engines: there is room for the weights; room is needed."""
SENDER_WATCH_S = 0.05


class WeightControl(Protocol):
    """vLLM's control plane over all servers at once; every call raises FipoError when one of them fails."""

    @property
    def roster(self) -> int:
        """Another number whenever servers have come or gone since."""
        ...

    def admit(self) -> None:
        """Before an update: see who is there to get the weights, and wait for those who come back."""
        ...

    @property
    def workers_of_server(self) -> list[tuple[WorkerPlace, ...]]:
        """Where the engine workers of each server run, in the servers' order."""
        ...

    async def pause(self, deadline: Deadline) -> None: ...

    async def resume(self, deadline: Deadline) -> None: ...

    async def join_transport(self, request_of_server: list[JoinRequest], deadline: Deadline) -> None: ...

    async def start_weight_update(self, deadline: Deadline) -> None: ...

    async def update_weights(self, header: BucketHeader, deadline: Deadline) -> None: ...

    async def finish_weight_update(self, version: int, deadline: Deadline) -> None: ...


class Update:
    """What rank 0 does in one update, step by step."""

    def __init__(
        self, control: WeightControl, mailbox: Mailbox, senders: Senders, deadline: Deadline, sharing_ranks: int = 0
    ):
        """`sharing_ranks`: how many ranks share their GPUs with the engines, all or none."""
        self._control, self._mailbox, self._senders, self._deadline = control, mailbox, senders, deadline
        self._sharing_ranks = sharing_ranks

    async def conduct(self, version: int, *, join: bool) -> Published:
        """The whole update, `join` with engine workers joining the senders' transports first.

        FipoError, or anything else, as soon as one step fails.
        """
        workers = self._control.workers_of_server
        turns = [self._senders.of_servers(turn, workers) for turn in self._senders.turns]
        for sender in range(self._senders.count):
            serves = any(sender in found for turn in turns for found in turn)
            self._mailbox.post(f"part/{sender}", Part(serves))
        to_join = turns if join else []
        if not self._sharing_ranks:  # the engines still sample
            for turn in to_join:
                await self._join(turn, workers)
        started = time.monotonic()
        await self._control.pause(self._deadline)
        if self._sharing_ranks:
            self._mailbox.post(COME, Cue())
            for turn in to_join:
                await self._join(turn, workers)
        await self._control.start_weight_update(self._deadline)
        totals = Totals()
        for turn in turns:
            totals += await self._turn(sorted({sender for senders in turn for sender in senders}))
        await self._control.finish_weight_update(version, self._deadline)
        if self._sharing_ranks:
            await self._see_the_trainer_out()
        await self._control.resume(self._deadline)
        seconds = time.monotonic() - started
        return Published(totals.tensors, totals.bytes, totals.buckets, totals.checked, seconds)

    async def _see_the_trainer_out(self) -> None:
        """Have all ranks free their GPUs for the engines' caches."""
        self._mailbox.post(LEAVE, Cue())
        for rank in range(self._sharing_ranks):
            await self._take(f"left/{rank}", Cue, f"rank {rank} of the trainer to free its GPU")

    async def _join(self, of_servers: list[tuple[int, ...]], workers_of_server: list[tuple[WorkerPlace, ...]]) -> None:
        """Connect each server with the senders that serve it in one turn."""
        senders = sorted({sender for found in of_servers for sender in found})
        workers = sum(map(len, workers_of_server))
        for sender in senders:
            self._mailbox.post(f"join/{sender}", Join(workers))
        opened = {
            sender: await self._take(f"opened/{sender}", Opened, f"sender {sender} to open its transport")
            for sender in senders
        }
        requests, first_rank = [], 1
        for found, places in zip(of_servers, workers_of_server, strict=True):
            address = joined_address([opened[sender].address for sender in found])
            requests.append(JoinRequest(address, first_rank))
            first_rank += len(places)
        await self._control.join_transport(requests, self._deadline)
        for sender in senders:
            await self._take(f"joined/{sender}", Cue, f"sender {sender} to join its transport")

    async def _turn(self, senders: list[int]) -> Totals:
        """Hands every bucket that these senders announce to the engines; what one of them has sent, as the others."""
        for sender in senders:
            self._mailbox.post(f"turn/{sender}", Cue())
        index = 0
        while True:
            messages: list[Sent | Totals] = [
                await self._take(
                    f"bucket/{sender}/{index}",
                    Sent | Totals,  # type: ignore[arg-type]
                    f"bucket {index} of sender {sender}",
                )
                for sender in senders
            ]
            if isinstance(messages[0], Totals):
                return messages[0]
            header = joined_header([message.header for message in messages if isinstance(message, Sent)])
            await self._control.update_weights(header, self._deadline)
            for sender in senders:
                self._mailbox.post(f"received/{sender}/{index}", Cue())
            index += 1

    async def _take(self, key: str, kind: type[Any], what: str) -> Any:
        return await self._mailbox.take(key, kind, self._deadline, what)


class Conductor(threading.Thread):
    """Runs an update's coroutine to its verdict, which it posts."""

    def __init__(self, what: str, mailbox: Mailbox, conduct: Coroutine[Any, Any, Published]):
        super().__init__(name="weight-conductor", daemon=True)
        self._what, self._mailbox, self._conduct = what, mailbox, conduct
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None

    def run(self) -> None:
        """See the class."""
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._judge())

    def cancel(self) -> None:
        """Ends the update early, for a rank 0 that was interrupted: the other ranks get a verdict all the same."""
        # The loop is closed when the update has ended by itself.
        if self._task is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._task.cancel)

    async def _judge(self) -> None:
        self._task = asyncio.current_task()
        try:
            verdict = Verdict(published=await self._conduct_unless_a_sender_fails())
        except asyncio.CancelledError:
            verdict = Verdict(error=f"{self._what}: rank 0 was stopped")
        except FipoError as error:
            verdict = Verdict(error=f"{self._what}: {error}", refused=isinstance(error, WeightsRefused))
        except Exception as error:
            verdict = Verdict(error=f"{self._what}: {type(error).__name__} on rank 0: {error}")
        if verdict.error is not None:
            self._mailbox.abort()
        self._mailbox.post(VERDICT, verdict)

    async def _conduct_unless_a_sender_fails(self) -> Published:
        """The coroutine's result; RolloutError as soon as a sender reports a failure, engines waiting for it or not."""
        work = asyncio.ensure_future(self._conduct)
        try:
            while not (await asyncio.wait({work}, timeout=SENDER_WATCH_S))[0]:
                if (message := self._mailbox.peek(FAILED, Failure)) is not None:
                    raise RolloutError(message.error)
            return work.result()
        finally:
            work.cancel()
