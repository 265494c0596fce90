"""A sender's part of a weight update, and that of the ranks which gather with it: bucket after bucket by the plan."""

import threading
from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec

from megatron_fipo.errors import RolloutError
from megatron_fipo.weights.buckets import Bucket
from megatron_fipo.weights.deadline import Deadline
from megatron_fipo.weights.mailbox import Mailbox
from megatron_fipo.weights.transports import WeightTransport
from megatron_fipo.weights.update_records import Cue, Join, Opened, Part, Sent, Totals

_T = TypeVar("_T")


class GroupWeights(Protocol):
    """The weights of one sender's group, bucket after bucket."""

    @property
    def buckets(self) -> int:
        """How many there are."""
        ...

    def gather(self, index: int) -> Bucket:
        """One of them, whole. Collective over the group, each bucket once and in order."""
        ...


class Sender:
    """One update on the rank that sends a group's buckets, in the group's turn.

    The next bucket is gathered while the last one travels.
    """

    def __init__(
        self, number: int, transport: WeightTransport, weights: GroupWeights, mailbox: Mailbox, deadline: Deadline
    ):
        self._number, self._transport, self._weights = number, transport, weights
        self._mailbox, self._deadline = mailbox, deadline
        self._next = 0
        self._sends = False
        """Whether engines are served by this sender, as rank 0 says; until then it sends nothing."""

    def begin(self, *, join: bool) -> None:
        """Hear from rank 0 whether this sender sends. If it does, and `join`, have the engine workers join.

        Raises:
            UpdateAborted: rank 0 has given the update up.
        """
        self._sends = self._wait(f"part/{self._number}", Part, "rank 0 to say who sends").sends
        if self._sends and join:
            self._join()

    def _join(self) -> None:
        """Open the transport and wait for the engine workers in it, when it is this sender's turn to."""
        asked = self._wait(f"join/{self._number}", Join, "rank 0 to connect this sender")
        self._mailbox.post(f"opened/{self._number}", Opened(self._transport.open(asked.workers)))
        _run_abandonable(self._transport.join, self._mailbox, self._deadline)
        self._mailbox.post(f"joined/{self._number}", Cue())

    def send(self, *, check: bool) -> None:
        """If engines are served: send each bucket when they have the one before, with checksums if `check`.

        Raises:
            UpdateAborted: rank 0 has given the update up.
        """
        if not self._sends:
            return
        totals = Totals()
        # Before the first bucket this sender's turn, before any other the engines' receipt for the last one.
        cue, what = f"turn/{self._number}", "the turn of this sender"
        for index in range(self._weights.buckets):
            bucket = self._gather(index)
            self._await(cue, what, first=index == 0)
            header = self._transport.send(bucket)
            if check:
                header = msgspec.structs.replace(header, checksums=bucket.checksums())
            self._mailbox.post(f"bucket/{self._number}/{index}", Sent(header))
            count = len(bucket.tensors)
            totals += Totals(count, bucket.nbytes, 1, count if check else 0)
            cue, what = f"received/{self._number}/{index}", f"the engines to take bucket {index}"
            del bucket  # before the next one is gathered
        self._await(cue, what, first=self._weights.buckets == 0)
        self._mailbox.post(f"bucket/{self._number}/{self._weights.buckets}", totals)

    def gather_the_rest(self) -> None:
        """Gather what is left and send nothing, since the group's other ranks go on gathering.

        That is all of it where no engines are served, and what has not been sent after a failure.
        """
        for index in range(self._next, self._weights.buckets):
            self._gather(index)

    def _gather(self, index: int) -> Bucket:
        # After a gather that failed nobody knows where in it the group's other ranks are.
        self._next = self._weights.buckets
        bucket = self._weights.gather(index)
        self._next = index + 1
        return bucket

    def _await(self, cue: str, what: str, *, first: bool) -> None:
        self._wait(cue, Cue, what)
        if not first:
            self._transport.sent()

    def _wait(self, key: str, kind: type[_T], what: str) -> _T:
        return self._mailbox.wait_turn(key, kind, self._deadline, what)


def _run_abandonable(work: Callable[[], None], mailbox: Mailbox, deadline: Deadline) -> None:
    """Runs `work`, which may block outside Python, until it ends, rank 0 gives up or the deadline passes."""
    failures: list[Exception] = []

    def guarded() -> None:
        try:
            work()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=guarded, name="join-weight-transport", daemon=True)
    thread.start()
    while thread.is_alive() and not deadline.passed():
        thread.join(timeout=0.01)
        mailbox.raise_if_aborted()
    if thread.is_alive():
        raise RolloutError(f"the engine workers did not join the weight transport within {deadline.seconds:g} s")
    if failures:
        raise failures[0]
