"""Why: a checkpoint comes from elsewhere, and a pickle runs whatever it can name; but what any Python from 3.11 on has
written has to be read.

Pickles as each Python writes them, from 3.11.2 to 3.13, and such as nobody should write, by hand where no Python would.
Real checkpoints are in test_conversion.py and tests/tools. Not covered: tensors, which torch.load reads.
"""

import contextlib
import io
import pickle
from dataclasses import dataclass
from enum import Enum, IntEnum
from pathlib import PurePosixPath
from typing import Any

import pytest

from megatron_fipo.weights import plain_pickle


class Colour(Enum):
    RED = "red"
    CRIMSON = "red"  # an alias

    def shout(self) -> str:
        return self.value.upper()


class Level(IntEnum):
    LOW = 1


@dataclass
class Entry:
    colour: Any
    level: Any = Level.LOW
    place: Any = None


class Slotted:
    __slots__ = ("value",)


def upper(text: str) -> str:
    return text.upper()


HERE = __name__
ALLOWED = {(HERE, name) for name in ("Colour", "Entry", "Level", "Slotted", "upper")}
ALLOWED |= {("pathlib", "PosixPath"), ("pathlib", "PurePosixPath")}


def read(data: bytes, kind: type = Entry) -> Any:
    return plain_pickle.read(io.BytesIO(data), kind, lambda module, name: (module, name) in ALLOWED)


class Call:
    """Pickles as the call of a function, or of what another call gives."""

    def __init__(self, function: Any, *arguments: Any):
        self._parts = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._parts

    def __call__(self) -> None:
        """Makes the object callable, which pickle asks of a function."""


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "written",
    [
        lambda member: member,  # as this Python does
        lambda member: Call(type(member), member.value),  # as most do
        lambda member: Call(getattr, type(member), member.name),  # as 3.11.2 does
    ],
    ids=["here", "value", "name"],
)
def test_members_of_enums_are_read_however_they_are_written(written: Any, protocol: int) -> None:
    data = pickle.dumps(Entry(written(Colour.RED), written(Level.LOW)), protocol)
    found = read(data)
    assert found == Entry(Colour.RED, Level.LOW) and found.colour is Colour.RED and found.level is Level.LOW


def test_an_alias_is_its_member() -> None:
    assert read(pickle.dumps(Entry(Call(getattr, Colour, "CRIMSON")))).colour is Colour.RED


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_are_read_under_both_modules_that_name_them(module: str) -> None:
    """Python 3.13 has moved the class, and an older one has no such module."""
    data = pickle.dumps(Entry(None, place=PurePosixPath("a/b")), 3)
    own = PurePosixPath.__module__.encode() + b"\nPurePosixPath\n"
    assert own in data
    assert read(data.replace(own, f"{module}\nPurePosixPath\n".encode())).place == PurePosixPath("a/b")


@pytest.mark.parametrize(
    "call",
    [
        Call(getattr, Entry, "__init__"),
        Call(getattr, Entry(None), "colour"),
        Call(getattr, Slotted, "value"),
        Call(getattr, upper, "__globals__"),
        Call(getattr, "text", "upper"),
        Call(getattr, Colour.RED, "shout"),
        Call(getattr, Colour, "shout"),
        Call(getattr, Colour, "mro"),
        Call(getattr, Colour, "__class__"),
        Call(getattr, Colour, "__members__"),
        Call(getattr, Colour, "_member_map_"),
        Call(getattr, Colour, "GREEN"),
        Call(getattr, Colour, "RED.shout"),
        Call(getattr, Colour, 1),
        Call(getattr, Colour, "GREEN", "default"),
        Call(getattr, Colour, "RED", "default"),
        Call(getattr, Colour),
        Call(getattr),
        Call(getattr, Call(getattr, Colour, "RED"), "shout"),
        Call(getattr, Call(getattr, Colour, "__class__"), "__call__"),
        Call(Call(getattr, Entry, "__init__"), "self"),
        Call(getattr, getattr, "__self__"),
    ],
)
def test_getattr_gives_members_of_listed_enums_and_nothing_else(call: Call) -> None:
    with pytest.raises(pickle.UnpicklingError, match="gives no member of an enum"):
        read(pickle.dumps(Entry(call)))


def named(module: str, name: str) -> bytes:
    """A pickle, in the protocol whose names may have dots, of what lies there."""
    return pickle.PROTO + b"\4" + b"".join(pickle.dumps(part, 4)[11:-2] for part in (module, name)) + b"\x93."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("posix", "system"),
        ("torch", "storage"),
        ("torch", "storage.os.system"),
        ("torch.storage", "os"),
        ("builtins", "eval"),
        ("builtins", "getattr.__self__"),
        ("builtins", "type"),
        ("enum", "Enum"),
        ("enum", "EnumType"),
        ("operator", "attrgetter"),
        (HERE, "Enum"),
        (HERE, "Entry.__init__"),
        (HERE, "Entry.__init__.__globals__"),
        (HERE, "Colour.RED"),
        (HERE, "Colour.shout"),
        ("pathlib._local", "os"),
        ("pathlib._local", "PosixPath.open"),
        ("no.such.module", "name"),
    ],
)
def test_what_is_not_listed_cannot_be_named(module: str, name: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=f"names .*{name}, which no entry needs"):
        read(named(module, name))


def test_what_is_listed_can_be_named_and_called() -> None:
    """The control of the tests above: neither refuses everything."""
    assert read(named(HERE, "upper"), object) is upper
    assert read(pickle.dumps(Entry(Call(upper, "quiet")))).colour == "QUIET"


def given_state(target: Any, state: Any) -> bytes:
    """A pickle of `target` that is given `state`."""
    return pickle.dumps(target, 3)[:-1] + pickle.dumps(state, 3)[2:-1] + pickle.BUILD + pickle.STOP


@pytest.mark.parametrize("state", [{"colour": 1}, (None, {"colour": 1})], ids=["dictionary", "slots"])
@pytest.mark.parametrize("target", [Entry, Colour, Call(getattr, Colour, "RED"), upper, getattr, [], "text"])
def test_classes_functions_and_members_cannot_be_changed(target: Any, state: Any) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"gives state to an object of \w+, which is no record"):
        read(given_state(target, state), object)
    assert not any(hasattr(known, "colour") for known in (Entry, Colour, Colour.RED, upper))


@pytest.mark.parametrize("name", ["__class__", "__getstate__", "__reduce__", "__reduce_ex__", "__setstate__"])
@pytest.mark.parametrize("slots", [False, True])
def test_a_record_gets_nothing_that_pickle_would_call(name: str, slots: bool) -> None:
    """A layer's extra state is pickled again for the layer, and pickle calls an object's own `__reduce_ex__`."""
    state = {name: upper}
    with pytest.raises(pickle.UnpicklingError, match=f"gives an object a {name} of its own, which no record needs"):
        read(given_state(Entry(None), (None, state) if slots else state))


def test_records_get_their_state() -> None:
    assert read(given_state(Entry(None), {"colour": 1})) == Entry(1)
    slotted = Slotted()
    slotted.value = 2
    assert read(pickle.dumps(slotted), Slotted).value == 2


def test_another_kind_is_refused() -> None:
    with pytest.raises(pickle.UnpicklingError, match="holds an object of list, not of Entry"):
        read(pickle.dumps([Entry(None)]))


def test_damage_is_one_kind_of_error() -> None:
    """Cut short anywhere, or with any byte lost."""
    whole = pickle.dumps(Entry(Call(getattr, Colour, "RED"), 2**70, PurePosixPath("a/b")))
    for place in range(len(whole)):
        with pytest.raises(pickle.UnpicklingError):
            read(whole[:place])
        with contextlib.suppress(pickle.UnpicklingError):  # what is left may be a pickle
            read(whole[:place] + whole[place + 1 :])
