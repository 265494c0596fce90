"""The table of per-token arrays. Whatever carries them, from the engine's answer to the loss, loops over this table.

A new stream is a line here, its producer and its reader. Numpy and plain Python only.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy

from megatron_fipo.records.routes import UNKNOWN_BYTE


@dataclass(frozen=True)
class Stream:
    """One kind of per-token array."""

    name: str
    """Its key in Sample.streams, on the wire, in TrainBatch.streams and in MicroBatch.streams."""
    dtype: Literal["int32", "float32", "uint8"]
    """On the host, on the wire and in checkpoints."""
    align: Literal["label", "token"] = "label"
    """label: a value belongs to predicting its token, and is shifted by one with the labels. token: to the token
    itself."""
    fill: float = 0
    """The value of tokens that have none: the prompt's, and padding."""
    stages: Literal["first", "last", "all"] = "last"
    """The pipeline stages that read it; the others do not make it."""
    source: Literal["engine", "trainer"] = "engine"
    """engine: comes with each sample. trainer: made on the device, and added by MicroBatch.with_stream."""
    device_dtype: str | None = None
    """On the device, where it is another than `dtype`."""
    array: str | None = None
    """The stream whose host arrays it shares; None: its own."""
    whole: bool = False
    """Its arrays begin with the prompt's tokens, a token's value is some bytes, [tokens, bytes], and a sample has it
    only in runs that ask for it."""
    columns: tuple[int, int] = (0, 0)
    """The bytes [start, end) of a token's value that are read of a whole stream: a run's, not the table's."""

    @property
    def host_name(self) -> str:
        """The key of its arrays on the host."""
        return self.array or self.name

    @property
    def trailing(self) -> tuple[int, ...]:
        """The shape of a token's value."""
        return (self.columns[1] - self.columns[0],) if self.whole else ()

    def of(self, columns: tuple[int, int]) -> "Stream":
        """This stream where these columns of it are read, if it is a whole one."""
        return replace(self, columns=columns) if self.whole else self

    def is_read_on(self, stages: Collection[str]) -> bool:
        """Whether a rank that is these pipeline stages (first, last, both or neither) reads it."""
        return self.stages == "all" or self.stages in stages


TOKEN_IDS, ROLLOUT_LOG_PROBS = "token_ids", "rollout_log_probs"
OLD_LOG_PROBS, REFERENCE_LOG_PROBS = "old_log_probs", "reference_log_probs"
LABELS, ROUTED_EXPERTS = "labels", "routed_experts"

STREAMS: tuple[Stream, ...] = (
    Stream(TOKEN_IDS, "int32", align="token", stages="first", device_dtype="int64"),
    Stream(LABELS, "int32", device_dtype="int64", array=TOKEN_IDS),
    Stream(ROLLOUT_LOG_PROBS, "float32"),
    Stream(OLD_LOG_PROBS, "float32", source="trainer"),
    Stream(REFERENCE_LOG_PROBS, "float32", source="trainer"),
    Stream(ROUTED_EXPERTS, "uint8", align="token", fill=UNKNOWN_BYTE, stages="all", whole=True),
)


def sampled_streams() -> dict[str, Stream]:
    """The streams that every sample comes with, by name."""
    return {name: stream for name, stream in carried_streams().items() if not stream.whole}


def carried_streams(columns: tuple[int, int] = (0, 0)) -> dict[str, Stream]:
    """The streams that a sample may come with, by name; of whole ones these columns are read."""
    return {stream.name: stream.of(columns) for stream in STREAMS if stream.source == "engine" and stream.array is None}


def read_only(array: numpy.ndarray) -> numpy.ndarray:
    """A view of the array that cannot be written to."""
    view = array.view()
    view.flags.writeable = False
    return view


def checked(arrays: Mapping[str, numpy.ndarray], what: str) -> Mapping[str, numpy.ndarray]:
    """A sample's streams as read-only views, in the order of the table.

    Raises:
        ValueError: a stream is missing or unknown, has another type or dimension, or lengths differ. `what` begins it.
    """
    table = {name: stream for name, stream in carried_streams().items() if not stream.whole or name in arrays}
    if arrays.keys() != table.keys():
        right = ", ".join(sampled_streams())
        raise ValueError(f"{what} has the streams {', '.join(sorted(arrays))}, and should have {right}")
    for name, stream in table.items():
        if arrays[name].dtype != stream.dtype or arrays[name].ndim != 1 + stream.whole:
            found = f"{arrays[name].dtype} {list(arrays[name].shape)}"
            shape = "two dimensions" if stream.whole else "one dimension"
            raise ValueError(f"{what} has {name} as {found}, and should have {stream.dtype} in {shape}")
    lengths = {name: len(arrays[name]) for name, stream in table.items() if not stream.whole}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise ValueError(f"{what} has {counts}, and should have as many of each")
    for name in table.keys() - lengths.keys():
        if len(arrays[name]) < lengths[TOKEN_IDS]:
            raise ValueError(f"{what} has {name} of {len(arrays[name])} tokens, and {lengths[TOKEN_IDS]} tokens")
    return MappingProxyType({name: read_only(arrays[name]) for name in table})
