"""What the trainer's ranks say to each other in a weight update: typed records, which travel as JSON."""

import msgspec

from megatron_fipo.weights.transport_records import BucketHeader, TransportAddress


class Published(msgspec.Struct, frozen=True):
    """What one weight update moved, over all senders, and the seconds from pause to resume."""

    tensors: int
    bytes: int
    buckets: int
    checked: int
    """Tensors whose checksums every engine worker has found to be the trainer's."""
    seconds: float

    def metrics(self) -> dict[str, float]:
        """For the row of the step that the weights are of."""
        return {
            "weights_bytes": float(self.bytes),
            "weights_checked": float(self.checked),
            "seconds_engines_paused": self.seconds,
        }


class Begin(msgspec.Struct, frozen=True):
    """Rank 0 begins an update, or says why it cannot."""

    join: bool
    """Whether engine workers have to join the senders' transports first."""
    error: str | None = None


class Join(msgspec.Struct, frozen=True):
    """Rank 0 to a sender: open your transport for so many engine workers."""

    workers: int


class Part(msgspec.Struct, frozen=True):
    """Rank 0 to a sender: what it has to do in this update."""

    sends: bool
    """False: no engine is beside it, and it only gathers."""


class Opened(msgspec.Struct, frozen=True):
    """A sender's answer: where its transport can be joined."""

    address: TransportAddress


class Cue(msgspec.Struct, frozen=True):
    """That something has happened which its key names."""


class Sent(msgspec.Struct, frozen=True, tag="sent"):
    """A sender has put a bucket on its way."""

    header: BucketHeader


class Totals(msgspec.Struct, frozen=True, tag="totals"):
    """A sender has sent all of its buckets, and what was in them."""

    tensors: int = 0
    bytes: int = 0
    buckets: int = 0
    checked: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            self.tensors + other.tensors,
            self.bytes + other.bytes,
            self.buckets + other.buckets,
            self.checked + other.checked,
        )


class Failure(msgspec.Struct, frozen=True):
    """What has gone wrong on a rank."""

    error: str


class Verdict(msgspec.Struct, frozen=True):
    """How an update has ended, for every rank: one of the two is given."""

    published: Published | None = None
    error: str | None = None
    refused: bool = False
    """The error is that engines refused a tensor, as others would: another try would end the same way."""
