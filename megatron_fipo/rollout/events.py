"""What sampling tells the trainer when it is asked to go on. Calls go down only: sampling never calls the trainer.

Rank 0 hears an event first; `weights.ranks` tells it to the others, as JSON.
"""

import msgspec


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """All is sampled that was asked for."""


class WeightsWanted(msgspec.Struct, frozen=True, tag="weights_wanted"):
    """No server is left that samples. These start again, or may come back; they need weights."""

    servers: tuple[str, ...]


class BrokenOff(msgspec.Struct, frozen=True, tag="broken_off"):
    """Ctrl-C has ended the sampling before its end."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Why there will be no samples, and the exit code that goes with it."""

    message: str
    exit_code: int


Event = Ready | WeightsWanted | BrokenOff | Failed
