"""Check token ids against the model's embedding. A larger id is an IndexError on one rank, or garbage over several."""

import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fipo.errors import ConfigError, DataError

_END_FILES = ("generation_config.json", "config.json")


def end_tokens(directory: Path, tokenizer_eos: int | None) -> dict[int, str]:
    """Return the ids that end a response, each with the file that names it; generation_config.json comes first.

    Chat models end turns with more than one token, and name them in different files.

    Raises:
        DataError: a file names something that is not an id, or no file names an id.
    """
    found: dict[int, str] = {}
    for name in _END_FILES:
        configured = read_settings(directory / name).get("eos_token_id")
        for token in configured if isinstance(configured, list) else [configured]:
            if token is None:
                continue
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise DataError(f"{directory / name}: eos_token_id is {reprlib.repr(token)}, which is not a token id")
            found.setdefault(token, name)
    if tokenizer_eos is not None and tokenizer_eos >= 0:
        found.setdefault(tokenizer_eos, "the tokenizer")
    if not found:
        raise DataError(f"{directory}: no eos_token_id in {', '.join(_END_FILES)} or the tokenizer")
    return found


def check_vocabulary(directory: Path, size: int, ends: dict[int, str], vocab_size: int) -> None:
    """Raise ConfigError if the tokenizer, or an end token, has an id for which the embedding has no row.

    `size` is the tokenizer's largest id plus one, `ends` come from `end_tokens`, `vocab_size` is config.json's.
    """
    for token, name in ends.items():
        if token >= vocab_size:
            raise ConfigError(
                "model.path",
                f"{directory}: the end-of-sequence id {token} of {name} is outside the model's {vocab_size} token ids",
                f"an id below vocab_size={vocab_size} of config.json",
            )
    if size > vocab_size:
        raise ConfigError(
            "model.path",
            f"{directory}: the tokenizer has {size} token ids, the model's embedding only {vocab_size}",
            "a tokenizer and a config.json (vocab_size) of one model",
        )


def outside(token_ids: Sequence[int], vocab_size: int) -> int | None:
    """Return an id for which the embedding has no row, if there is one."""
    if not token_ids:
        return None
    least, greatest = min(token_ids), max(token_ids)
    return greatest if greatest >= vocab_size else least if least < 0 else None


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON object from a model directory; empty if there is no such file. DataError if it is not an object."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if not isinstance(settings, dict):
        raise DataError(f"{path}: is not a JSON object")
    return settings
