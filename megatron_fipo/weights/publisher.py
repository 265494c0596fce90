"""Weight updates: from the trainer's ranks, sender after sender, to every vLLM worker.

Where every rank shares its GPU or its machine with engines, each of these has a sender of its own, and all of them send
the same buckets at the same time (local_senders.py, everywhere.py).

Every rank of the trainer calls `publish` (SPMD). Who sends what is the plan's to say (transfer_plan.py). Three roles:

* the *conductor*, a thread on rank 0, drives vLLM's control plane over HTTP and gives each sender its turn;
* a *sender* puts the buckets of its group on a transport, gathering the next while the last one travels;
* the other ranks of a sender's group take part in its gathers. All other ranks wait for the verdict.

A rank may be in two groups, one that sends experts and one that sends the rest.

An update begins with joining all engine workers to every sender's transport when servers have come or gone since the
last one, or when that one failed. Messages go through a `Mailbox`. Whatever fails, the conductor ends the update with a
verdict within `rollout.update_timeout_s`, the senders' groups gather to the end so that no gather is left hanging,
transports are closed, which frees engines that wait in them, and every rank raises the same error. Engines that have
not failed stay paused until another update succeeds: half-loaded weights must not sample.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from torch.distributed import Store

from megatron_fipo.config import RolloutConfig
from megatron_fipo.errors import FipoError, RolloutError, WeightError
from megatron_fipo.weights.conductor import COME, FAILED, LEAVE, VERDICT, Conductor, Update, WeightControl
from megatron_fipo.weights.deadline import Deadline
from megatron_fipo.weights.local_senders import Senders
from megatron_fipo.weights.mailbox import Mailbox, UpdateAborted, trainer_store
from megatron_fipo.weights.sender import GroupWeights, Sender
from megatron_fipo.weights.transports import WeightTransport, make_transport
from megatron_fipo.weights.update_records import Begin, Cue, Failure, Published, Verdict

BEGIN = "begin"
VERDICT_SLACK_S = 5.0
"""How much longer than rank 0 the other ranks wait, so that its verdict comes before their own deadlines."""
CANCEL_TIMEOUT_S = 5.0


class SharedGpu(Protocol):
    """What a rank does on a GPU that it shares with engines, each of which has the rest of it in turns."""

    rank: int
    ranks: int

    def come(self) -> None:
        """Have the weights on the GPU, where engines have their weights too, and nothing else."""

    def leave(self) -> None:
        """Free the GPU. Collective work under the new weights comes before that."""


def open_publisher(
    rollout: RolloutConfig,
    control: WeightControl | None,
    *,
    groups: Mapping[int, bool],
    senders: Senders,
    run_dir: Path,
    shared_gpu: SharedGpu | None = None,
) -> "WeightPublisher":
    """This rank's part of all weight updates of a run.

    Args:
        control: given on global rank 0, None elsewhere.
        groups: by the numbers of the senders whose weights this rank gathers, out of `senders`, whether it sends.
        run_dir: the run's directory, by whose name what is left of a killed run is found.
    """
    # Senders of the same buckets on several machines have one number to the engines.
    numbers = {number: number if senders.places is None else 0 for number in groups}
    return WeightPublisher(
        {
            number: make_transport(rollout, numbers[number], run_dir) if sends else None
            for number, sends in groups.items()
        },
        control,
        trainer_store(),
        senders=senders,
        timeout_s=rollout.update_timeout_s,
        begin_timeout_s=rollout.start_timeout_s + rollout.update_timeout_s,
        checksum_every=rollout.checksum_every,
        shared_gpu=shared_gpu,
    )


class WeightPublisher:
    """See the module's description. Not thread-safe; calls must come in the same order on every rank."""

    def __init__(
        self,
        transports: Mapping[int, WeightTransport | None],
        control: WeightControl | None,
        store: Store,
        *,
        senders: Senders,
        timeout_s: float,
        begin_timeout_s: float,
        checksum_every: int = 0,
        shared_gpu: SharedGpu | None = None,
    ):
        """`transports` has the numbers of this rank's groups, with a transport where it is the sender.

        `timeout_s` is for an update from when rank 0 begins it.
        `begin_timeout_s` is for the other ranks until then. Versions that are multiples of `checksum_every` are sent
        with checksums; 0 is never. `shared_gpu` is given on every rank or on none.
        """
        self._shared_gpu = shared_gpu
        self._transports, self._control, self._store = dict(transports), control, store
        self._senders = senders
        self._timeout_s, self._begin_timeout_s = timeout_s, begin_timeout_s
        self._checksum_every = checksum_every
        self._updates = 0
        self._joined_roster: int | None = None

    def publish(self, weights: Mapping[int, GroupWeights], version: int) -> Published:
        """Hand the weights to all engines as `version`, by which their responses are labelled from then on.

        Args:
            weights: of each of this rank's groups.

        Raises, on every rank alike; it may be called again then:
            RolloutError: engines failed, or the deadline has passed.
            WeightError: engines refused a tensor, which it names. They would again.
        """
        mailbox = Mailbox(self._store, f"update{self._updates}")
        self._updates += 1
        try:
            verdict = self._update(mailbox, weights, version)
            if verdict.error is not None:
                raise (WeightError if verdict.refused else RolloutError)(verdict.error)
        except BaseException:
            self._joined_roster = None
            self.close()
            raise
        assert verdict.published is not None
        return verdict.published

    def close(self) -> None:
        """Releases the transports; the next update would open them again."""
        for transport in self._transports.values():
            if transport is not None:
                transport.close()

    def _update(self, mailbox: Mailbox, weights: Mapping[int, GroupWeights], version: int) -> Verdict:
        """One update on this rank, up to its verdict."""
        what = f"weight update {version}"
        begin = self._begin(mailbox, what)
        if begin.error is not None:
            return Verdict(error=begin.error)
        conductor = None
        if self._control is not None:
            sharing = self._shared_gpu.ranks if self._shared_gpu else 0
            update = Update(self._control, mailbox, self._senders, Deadline(self._timeout_s), sharing)
            conductor = Conductor(what, mailbox, update.conduct(version, join=begin.join))
            conductor.start()
        late = Deadline(self._timeout_s + VERDICT_SLACK_S)
        check = self._checksum_every > 0 and version % self._checksum_every == 0
        try:
            if self._shared_gpu is None:
                self._take_part(mailbox, late, weights, join=begin.join, check=check)
            elif self._comes(mailbox, late, self._shared_gpu):
                self._take_part(mailbox, late, weights, join=begin.join, check=check)
                self._leaves(mailbox, late, self._shared_gpu)
            return mailbox.wait(VERDICT, Verdict, late, f"rank 0's verdict on {what}")
        except BaseException:
            if conductor is not None:
                conductor.cancel()
            raise
        finally:
            if conductor is not None:
                conductor.join(timeout=CANCEL_TIMEOUT_S)

    def _begin(self, mailbox: Mailbox, what: str) -> Begin:
        """What rank 0 finds before an update, on every rank."""
        if self._control is None:
            # Rank 0 may be busy, with servers that are still starting.
            return mailbox.wait(BEGIN, Begin, Deadline(self._begin_timeout_s), f"rank 0 to begin {what}")
        try:
            self._control.admit()
            begin = Begin(join=self._control.roster != self._joined_roster)
            self._joined_roster = self._control.roster
        except FipoError as error:
            begin = Begin(join=False, error=str(error))
        mailbox.post(BEGIN, begin)
        return begin

    def _take_part(
        self, mailbox: Mailbox, deadline: Deadline, weights: Mapping[int, GroupWeights], *, join: bool, check: bool
    ) -> None:
        senders = {
            number: Sender(number, transport, weights[number], mailbox, deadline)
            for number, transport in sorted(self._transports.items())
            if transport is not None
        }
        for number, sender in senders.items():  # all of them before any has its turn
            self._or_report(mailbox, f"sender {number}", partial(sender.begin, join=join))
        # In the groups' order: whoever waits in a gather waits for ranks that come to it next.
        for number in sorted(self._transports):
            if number in senders:
                self._or_report(mailbox, f"sender {number}", partial(senders[number].send, check=check))
                self._or_report(mailbox, f"sender {number}", senders[number].gather_the_rest)
            else:
                self._or_report(mailbox, f"sender {number}", partial(_gather_all, weights[number]))

    def _comes(self, mailbox: Mailbox, deadline: Deadline, shared: SharedGpu) -> bool:
        """Have this rank's weights where engines have made room for them; False if rank 0 has given up before.

        The same on every rank, since ranks that come gather together.
        """
        came: list[bool] = []

        def come() -> None:
            mailbox.wait_for_all(COME, Cue, deadline, "the engines to make room for the weights")
            came.append(True)
            shared.come()

        self._or_report(mailbox, f"rank {shared.rank}", come)
        return bool(came)

    def _leaves(self, mailbox: Mailbox, deadline: Deadline, shared: SharedGpu) -> None:
        """Free this rank's GPU for the engines' caches."""

        def leave() -> None:
            mailbox.wait_for_all(LEAVE, Cue, deadline, "the engines to have all weights")
            shared.leave()
            mailbox.post(f"left/{shared.rank}", Cue())

        self._or_report(mailbox, f"rank {shared.rank}", leave)

    def _or_report(self, mailbox: Mailbox, who: str, work: Callable[[], None]) -> None:
        """Runs this rank's part; a failure goes to rank 0, whose verdict raises it on every rank."""
        try:
            work()
        except UpdateAborted:
            return
        except Exception as error:
            text = str(error) if isinstance(error, FipoError) else f"{type(error).__name__}: {error}"
            mailbox.post(FAILED, Failure(f"{who}: {text}"))


def _gather_all(weights: GroupWeights) -> None:
    """What the ranks of a sender's group do that send nothing."""
    for index in range(weights.buckets):
        weights.gather(index)
