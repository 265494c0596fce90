"""What a rollout server says of its cache of keys and values.

Imports neither vLLM nor torch: the trainer reads it here, the route of the server writes it.
"""

import msgspec

USE_PATH = "/fipo/cache_use"


class CacheUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cache of one server's engine."""

    tokens: int
    """That it holds at most."""
    block: int
    """Tokens of one block: a sequence takes whole ones."""
    preemptions: int
    """Sequences that it had no room left for, and that began again later; since the engine's start."""
    peak: float
    """Largest share of it that sequences held, since the last question."""
