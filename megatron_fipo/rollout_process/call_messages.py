"""What the rollout process says during a call, on the way to its end: MessagePack, each message behind its length."""

import struct
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import msgspec

from megatron_fipo.rollout_process.link import RolloutCalls

CALL_PATH = "/fipo/rollouts/"
OPEN = "open"
"""The first call; its arguments are the model's and the run's directory."""
LONGEST_MESSAGE = 1 << 26
_LENGTH = struct.Struct("<I")


class Opened(msgspec.Struct, frozen=True, tag="open", forbid_unknown_fields=True):
    """Arguments of the first call."""

    model_dir: str
    run_dir: str


class Warned(msgspec.Struct, frozen=True, tag="warned", forbid_unknown_fields=True):
    """For whoever runs this."""

    text: str


class Noted(msgspec.Struct, frozen=True, tag="noted", forbid_unknown_fields=True):
    """It may interest them."""

    text: str


class PhaseBegan(msgspec.Struct, frozen=True, tag="began", forbid_unknown_fields=True):
    """A part of the step has begun, inside the one before."""

    name: str


class PhaseEnded(msgspec.Struct, frozen=True, tag="ended", forbid_unknown_fields=True):
    """The part that began last has ended."""


class Progressed(msgspec.Struct, frozen=True, tag="progressed", forbid_unknown_fields=True):
    """The part is so far."""

    done: int
    total: int
    unit: str


class Alive(msgspec.Struct, frozen=True, tag="alive", forbid_unknown_fields=True):
    """Nothing to say, but the call goes on."""


class Returned(msgspec.Struct, frozen=True, tag="returned", forbid_unknown_fields=True):
    """The end of a call, and what it returned, encoded."""

    result: bytes


class Refused(msgspec.Struct, frozen=True, tag="refused", forbid_unknown_fields=True):
    """The end of a call that failed: the error's class, its text and its exit code."""

    kind: str
    text: str
    exit_code: int


Heard = Warned | Noted | PhaseBegan | PhaseEnded | Progressed
Message = Heard | Alive | Returned | Refused
METHODS = frozenset(name for name in dir(RolloutCalls) if not name.startswith("_"))


def encode(message: Message) -> bytes:
    """The message behind its length."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


class MessageReader:
    """Turns chunks of bytes, cut anywhere, into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> Iterator[Message]:
        """The messages that `chunk` completes. ValueError for what is none."""
        self._buffer += chunk
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > LONGEST_MESSAGE:
                raise ValueError(f"a message of {length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(memoryview(self._buffer)[_LENGTH.size : end])
            del self._buffer[:end]
            yield msgspec.msgpack.decode(body, type=Message)  # type: ignore[arg-type]


def decode_arguments(name: str, body: bytes) -> list[Any]:
    """A call's arguments, of the types that link.py says. ValueError for any others."""
    types = [kind for key, kind in _hints(name).items() if key != "return"]
    given = msgspec.msgpack.decode(body, type=list[msgspec.Raw])
    return [msgspec.msgpack.decode(each, type=kind) for each, kind in zip(given, types, strict=True)]


def decode_result(name: str, result: bytes) -> Any:
    """What a call returned, of the type that link.py says. ValueError for any other."""
    return msgspec.msgpack.decode(result, type=_hints(name)["return"])


def _hints(name: str) -> dict[str, Any]:
    method: Callable[..., Any] = getattr(RolloutCalls, name)
    return get_type_hints(method)
