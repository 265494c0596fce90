"""The table of per-token arrays. Whatever carries them, from the engine's answer to the loss, loops over this table.

A new stream is a line here, its producer and its reader. Numpy and plain Python only.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy


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

    @property
    def host_name(self) -> str:
        """The key of its arrays on the host."""
        return self.array or self.name

    def is_read_on(self, stages: Collection[str]) -> bool:
        """Whether a rank that is these pipeline stages (first, last, both or neither) reads it."""
        return self.stages == "all" or self.stages in stages


TOKEN_IDS, ROLLOUT_LOG_PROBS = "token_ids", "rollout_log_probs"
OLD_LOG_PROBS, REFERENCE_LOG_PROBS = "old_log_probs", "reference_log_probs"
LABELS = "labels"

STREAMS: tuple[Stream, ...] = (
    Stream(TOKEN_IDS, "int32", align="token", stages="first", device_dtype="int64"),
    Stream(LABELS, "int32", device_dtype="int64", array=TOKEN_IDS),
    Stream(ROLLOUT_LOG_PROBS, "float32"),
    Stream(OLD_LOG_PROBS, "float32", source="trainer"),
    Stream(REFERENCE_LOG_PROBS, "float32", source="trainer"),
)


def sampled_streams() -> dict[str, Stream]:
    """The streams that every sample comes with, by name."""
    return {stream.name: stream for stream in STREAMS if stream.source == "engine" and stream.array is None}


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
    table = sampled_streams()
    if arrays.keys() != table.keys():
        raise ValueError(f"{what} has the streams {', '.join(sorted(arrays))}, and should have {', '.join(table)}")
    for name, stream in table.items():
        if arrays[name].dtype != stream.dtype or arrays[name].ndim != 1:
            found = f"{arrays[name].dtype} {list(arrays[name].shape)}"
            raise ValueError(f"{what} has {name} as {found}, and should have {stream.dtype} in one dimension")
    lengths = {name: len(arrays[name]) for name in table}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise ValueError(f"{what} has {counts}, and should have as many of each")
    return MappingProxyType({name: read_only(arrays[name]) for name in table})
