"""Parameters whose storage is away in host memory (policy/offload.py), as whoever only reads them sees them.

A parameter cannot simply show its copy on the host: a change of its device cuts it off from the hooks by which
Megatron-Core collects gradients. So the copy is an attribute, and readers ask here.
"""

from torch import Tensor

_COPY = "in_host_memory"


def put_away(parameter: Tensor, copy: Tensor) -> None:
    """`copy` has the values from here on."""
    setattr(parameter, _COPY, copy)


def brought_back(parameter: Tensor) -> None:
    """The parameter has its values itself again."""
    delattr(parameter, _COPY)


def readable(parameter: Tensor) -> Tensor:
    """The parameter, or its copy while it is away."""
    return getattr(parameter, _COPY, parameter)
