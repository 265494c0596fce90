"""What the trainer and a rollout server say to each other about scoring: a text, and the log-probs of its tokens.

Imports neither vLLM nor torch: the trainer reads these here, the route of the server writes them.
"""

import msgspec

SCORE_PATH = "/fipo/score"


class ScoreRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text whose tokens the engine is to score under its present weights."""

    token_ids: list[int]
    cache_salt: str
    """Requests share cached prefixes only with others of the same salt."""


class ScoreAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """log-probs of every token but the first, each given all before it."""

    log_probs: list[float | None]
    """None: not a number, for which JSON has no form."""
    version: str
    """Of the weights, as the server labels them."""
