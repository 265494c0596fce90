"""The tokens of a step's samples, where they were sampled, until the step is done. Imports no torch."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy

from megatron_fipo.records.streams import TOKEN_IDS, Stream, carried_streams


class NotHere(LookupError):
    """What was asked for is not in the store; the message is for the one who asked."""


@dataclass(frozen=True, eq=False)
class _Held:
    prompt: numpy.ndarray
    streams: Mapping[str, numpy.ndarray]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.streams[TOKEN_IDS])


class SampleStore:
    """Samples by number. Arrays are shared with the samples, not copied; any thread may read."""

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """Samples that are here."""
        return len(self._held)

    def put(self, prompt: numpy.ndarray, streams: Mapping[str, numpy.ndarray]) -> int:
        """Keep a sample: its prompt, [prompt] int32, and `Sample.streams`. Its number, which no other ever has."""
        number = next(self._numbers)
        self._held[number] = _Held(prompt, streams)
        return number

    def drop(self, numbers: Iterable[int]) -> None:
        """Forget samples; those that are not here are no error."""
        for number in numbers:
            self._held.pop(number, None)

    def read(
        self, pieces: numpy.ndarray, names: Sequence[str], columns: tuple[int, int] = (0, 0)
    ) -> dict[str, numpy.ndarray]:
        """These streams of pieces of samples, [tokens of all pieces] each, one piece after the other.

        A prompt's tokens have the stream's fill, but for their ids and for whole streams. A sample that came without a
        whole stream has its fill at all tokens.

        Args:
            pieces: [m] of PIECE.
            columns: the bytes [start, end) of a token's value that are wanted of whole streams.

        Raises:
            NotHere: a sample, a stream, or tokens or columns of a sample are not here.
        """
        table = carried_streams(columns)
        if unknown := [name for name in names if name not in table]:
            raise NotHere(f"samples have no {unknown[0]}; they have {', '.join(table)}")
        listed = [(self._sample(number, start, end), start, end) for number, start, end in pieces.tolist()]
        total = sum(end - start for _, start, end in listed)
        arrays = {name: numpy.empty((total, *table[name].trailing), table[name].dtype) for name in names}
        for name, out in arrays.items():
            offset = 0
            for held, start, end in listed:
                _copy(held, table[name], start, end, out[offset : offset + end - start])
                offset += end - start
        return arrays

    def _sample(self, number: int, start: int, end: int) -> _Held:
        held = self._held.get(number)
        if held is None:
            raise NotHere(f"sample {number} is not in the store")
        if not 0 <= start < end <= len(held):
            raise NotHere(f"sample {number} has {len(held)} tokens, and {start} to {end} were asked for")
        return held


def _copy(held: _Held, stream: Stream, start: int, end: int, out: numpy.ndarray) -> None:
    """Tokens [start, end) of prompt and response to `out`, [end − start, …]."""
    if stream.whole:
        _copy_whole(held, stream, start, end, out)
        return
    prompt = len(held.prompt)
    of_prompt = max(0, min(end, prompt) - start)
    if of_prompt:
        out[:of_prompt] = held.prompt[start : start + of_prompt] if stream.name == TOKEN_IDS else stream.fill
    if end > prompt:
        out[of_prompt:] = held.streams[stream.name][max(0, start - prompt) : end - prompt]


def _copy_whole(held: _Held, stream: Stream, start: int, end: int, out: numpy.ndarray) -> None:
    """The columns of a whole stream's tokens [start, end) to `out`, [end − start, columns]; its fill without any."""
    if (values := held.streams.get(stream.name)) is None:
        out[:] = stream.fill
        return
    first, last = stream.columns
    if not 0 <= first <= last <= values.shape[1]:
        raise NotHere(f"{stream.name} has {values.shape[1]} bytes a token, and {first} to {last} were asked for")
    out[:] = values[start:end, first:last]
