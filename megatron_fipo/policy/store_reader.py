"""Reads tokens from the store of samples that a batch names, over HTTP; every wait has a deadline."""

import ssl
from collections.abc import Iterator, Sequence

import httpx
import numpy

from megatron_fipo.errors import RolloutError
from megatron_fipo.records.fetch_messages import FETCH_PATH, decode_answer, encode_request
from megatron_fipo.records.rows import StoreAddress
from megatron_fipo.records.streams import carried_streams
from megatron_fipo.records.wire import WireError
from megatron_fipo.weights.deadline import Deadline

ANSWER_BYTES = 4 << 20
"""Most bytes of one answer, unless one piece has more: what store and reader hold beside the tokens themselves."""
SILENCE_S, CONNECT_S = 60.0, 10.0
"""Longest time without a byte from the store, and to connect to it."""


class StoreReader:
    """A connection to a store. A context manager, which closes it."""

    def __init__(self, address: StoreAddress, deadline: Deadline):
        self._deadline, self._url = deadline, address.url
        self._client = httpx.Client(
            base_url=address.url,
            headers={"Authorization": f"Bearer {address.token}"},
            timeout=httpx.Timeout(min(SILENCE_S, deadline.seconds), connect=min(CONNECT_S, deadline.seconds)),
            trust_env=False,
            # It speaks plain HTTP, and reading certificates takes longer than a small step's tokens.
            verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        )

    def __enter__(self) -> "StoreReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    def read(
        self, pieces: numpy.ndarray, names: Sequence[str], columns: tuple[int, int] = (0, 0)
    ) -> dict[str, numpy.ndarray]:
        """These streams of pieces of samples, [tokens of all pieces] each, one piece after the other.

        Args:
            pieces: [m] of PIECE.
            columns: the bytes [start, end) of a token's value that are read of whole streams.

        Raises:
            RolloutError: the store does not answer in time, refuses, or answers with something else.
        """
        streams = {name: carried_streams(columns)[name] for name in names}
        sizes = pieces["end"] - pieces["start"]
        arrays = {
            name: numpy.empty((int(sizes.sum()), *stream.trailing), stream.dtype) for name, stream in streams.items()
        }
        offset = 0
        for part in _parts(sizes, sum(array[:1].nbytes for array in arrays.values())):
            tokens = int(sizes[part].sum())
            try:
                found = decode_answer(self._ask(encode_request(pieces[part], names, columns)), streams, tokens)
            except WireError as error:
                raise RolloutError(f"the answer of the store at {self._url} {error}") from None
            for name, array in arrays.items():
                array[offset : offset + tokens] = found[name]
            offset += tokens
        return arrays

    def _ask(self, request: bytes) -> bytes:
        try:
            with self._client.stream("POST", FETCH_PATH, content=request) as response:
                body = bytearray()
                for chunk in response.iter_raw():
                    body += chunk
                    if self._deadline.passed():
                        raise RolloutError(f"the store at {self._url} took more than {self._deadline.seconds:g} s")
        except httpx.HTTPError as error:
            said = str(error) or type(error).__name__
            raise RolloutError(f"the store at {self._url} does not answer: {said}") from error
        if response.status_code != 200:
            said = bytes(body[:500]).decode(errors="replace")
            raise RolloutError(f"the store at {self._url} refuses with {response.status_code}: {said}")
        return bytes(body)


def _parts(sizes: numpy.ndarray, bytes_per_token: int) -> Iterator[slice]:
    """Pieces of at most ANSWER_BYTES together, or one that has more."""
    start, held = 0, 0
    for place, size in enumerate((sizes * bytes_per_token).tolist()):
        if place > start and held + size > ANSWER_BYTES:
            yield slice(start, place)
            start, held = place, 0
        held += size
    if len(sizes) > start:
        yield slice(start, len(sizes))
