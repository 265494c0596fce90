"""Reads a pickle of plain records without running what it says.

A pickle is a small program: it may call any function that it names. Here it may name only what its reader lists by
module and name: record classes, enums, and functions known to be harmless. Nothing else is imported or called, and
state is given to instances of those classes alone, so that a pickle cannot change the classes themselves.
"""

import pickle
import reprlib
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, BinaryIO, TypeVar

Record = TypeVar("Record")

# The standard library's in Python: the one in C has no hook for state.
_PYTHON_UNPICKLER: Any = pickle._Unpickler
# Python 3.13 pickles paths under the private module that they are defined in.
_PUBLIC_MODULES = {"pathlib._local": "pathlib"}


# Whoever pickles an object again calls these, also where they are the object's own and not its class's.
_CALLED_BY_PICKLE = frozenset(
    f"__{name}__" for name in ("class", "getnewargs", "getnewargs_ex", "getstate", "reduce", "reduce_ex", "setstate")
)
_NOTHING: Mapping[tuple[str, str], Any] = {}


def read(
    file: BinaryIO,
    kind: type[Record],
    is_allowed: Callable[[str, str], bool],
    instead: Mapping[tuple[str, str], Any] = _NOTHING,
) -> Record:
    """The record of class `kind` in a pickle that any Python from 3.11 on has written.

    Args:
        file: a binary file, read from its present position.
        kind: the class that the pickle has to hold.
        is_allowed: whether the pickle may name `(module, name)`: a class whose constructor does no harm, an enum, or
            such a function.
        instead: what the pickle gets for `(module, name)` in place of what is called so.

    Raises:
        pickle.UnpicklingError: it names something else, is damaged, or holds another kind.
        OSError: the file cannot be read.
    """
    try:
        found = _Unpickler(file, kind, is_allowed, instead).load()
    except (OSError, pickle.UnpicklingError):
        raise
    except Exception as error:  # a damaged one can end in nearly every kind
        raise pickle.UnpicklingError(f"is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(found, kind):
        raise pickle.UnpicklingError(f"holds an object of {type(found).__name__}, not of {kind.__name__}")
    return found


class _Unpickler(_PYTHON_UNPICKLER):
    def __init__(
        self,
        file: BinaryIO,
        kind: type,
        is_allowed: Callable[[str, str], bool],
        instead: Mapping[tuple[str, str], Any],
    ):
        super().__init__(file)
        self._kind, self._is_allowed, self._instead = kind, is_allowed, instead
        self._classes: set[type] = set()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if (module, name) in self._instead:
            return self._instead[module, name]
        module = _PUBLIC_MODULES.get(module, module)
        if not self._is_allowed(module, name):
            raise pickle.UnpicklingError(f"names {module}.{name}, which no {self._kind.__name__.lower()} needs")
        found = super().find_class(module, name)
        if isinstance(found, type) and not issubclass(found, Enum):
            self._classes.add(found)
        return found

    def load_build(self) -> None:
        target = self.stack[-2]
        if type(target) not in self._classes:
            raise pickle.UnpicklingError(f"gives state to an object of {type(target).__name__}, which is no record")
        state = self.stack[-1]
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict) and (found := _CALLED_BY_PICKLE.intersection(part)):
                raise pickle.UnpicklingError(f"gives an object a {min(found)} of its own, which no record needs")
        super().load_build()

    dispatch = _PYTHON_UNPICKLER.dispatch | {pickle.BUILD[0]: load_build}


def _enum_member(*arguments: Any) -> Enum:
    """What a pickle gets for getattr, by which Python 3.11.0 to 3.11.3 pickle an enum's member: that, and no more."""
    match arguments:
        case (type() as enum, str(name)) if issubclass(enum, Enum) and name in enum.__members__:
            return enum.__members__[name]
    raise pickle.UnpicklingError(f"calls getattr{reprlib.repr(arguments)}, which gives no member of an enum")
