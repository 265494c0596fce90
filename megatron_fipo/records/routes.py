"""The experts that an engine sent tokens to, as bytes: how they travel from a server to the trainer's routers.

A token's value is a number for each of its experts in each layer that has experts, in the order of the layers. A token
that the engine has sampled last was never an input of it, and has none: its bytes are all UNKNOWN_BYTE.
"""

import msgspec
import numpy

from megatron_fipo.models.experts import Experts

UNKNOWN_BYTE = 255
_IN_ONE_BYTE = 255
"""Most experts of a layer whose numbers fit into a byte, and leave one number free for what is not known."""


class RouteFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model's routed experts look like. The same in a request to a server as in the trainer."""

    layers: tuple[int, ...]
    """Those that have experts, from 0, in order."""
    per_token: int
    """Experts of a token in a layer."""
    number: int
    """Experts of a layer."""

    @property
    def item_bytes(self) -> int:
        """Bytes of one number, little-endian."""
        return 1 if self.number <= _IN_ONE_BYTE else 2

    @property
    def layer_bytes(self) -> int:
        """Bytes of a token's experts in one layer."""
        return self.per_token * self.item_bytes

    @property
    def width(self) -> int:
        """Bytes of a token's value."""
        return len(self.layers) * self.layer_bytes

    def columns(self, layers: list[int]) -> tuple[int, int]:
        """The bytes [start, end) of a token's value from the first of these layers to the last; (0, 0) of none.

        Args:
            layers: some of `self.layers`, from 0, of the whole model.
        """
        places = [self.layers.index(layer) for layer in layers]
        return (min(places) * self.layer_bytes, (max(places) + 1) * self.layer_bytes) if places else (0, 0)

    def packed(self, experts: numpy.ndarray, tokens: int) -> numpy.ndarray:
        """What an engine returns, as bytes of so many tokens, [tokens, width] uint8.

        Args:
            experts: [tokens − 1, layers of the model, experts of a token] of an integer type.

        Raises:
            ValueError: it has another shape.
        """
        shape = experts.shape
        if len(shape) != 3 or shape[0] != tokens - 1 or shape[1] <= max(self.layers) or shape[2] != self.per_token:
            right = f"{tokens - 1} tokens, at least {max(self.layers) + 1} layers and {self.per_token} experts of each"
            raise ValueError(f"the engine's routed experts have the shape {list(shape)}, and should have {right}")
        bytes_of = numpy.full((tokens, self.width), UNKNOWN_BYTE, numpy.uint8)
        chosen = experts[:, list(self.layers)].astype(f"<u{self.item_bytes}", order="C")
        bytes_of[: len(chosen)] = chosen.view(numpy.uint8).reshape(len(chosen), self.width)
        return bytes_of

    def unpacked(self, values: numpy.ndarray) -> numpy.ndarray:
        """The inverse for some or all columns: [tokens, layers, experts of a token] of an unsigned type."""
        numbers = numpy.ascontiguousarray(values).view(f"<u{self.item_bytes}")
        return numbers.reshape(len(values), numbers.shape[1] // self.per_token, self.per_token)

    def problem(self, values: numpy.ndarray) -> str | None:
        """What is wrong with the numbers of some or all columns, in words; None if nothing is.

        Args:
            values: [tokens, bytes] uint8.
        """
        experts = self.unpacked(values)
        unknown = numpy.iinfo(experts.dtype).max
        beyond = experts[(experts >= self.number) & (experts != unknown)]
        if beyond.size:
            return f"has the expert {beyond[0]}; a layer has 0 to {self.number - 1}"
        in_order = numpy.sort(experts, axis=-1)
        if ((in_order[..., 1:] == in_order[..., :-1]) & (in_order[..., 1:] != unknown)).any():
            return "has a token that goes to one expert twice"
        if ((experts == unknown).any(-1) != (experts == unknown).all(-1)).any():
            return "has a token some of whose experts are not known"
        return None


def route_format(experts: Experts | None) -> RouteFormat | None:
    """What routed experts of a model look like; None for a model without experts."""
    if experts is None:
        return None
    layers = tuple(layer for layer, is_sparse in enumerate(experts.layers) if is_sparse)
    return RouteFormat(layers, experts.per_token, experts.number)
