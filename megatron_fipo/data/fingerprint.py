"""Two short hashes of a run's training problems, by which a resume detects other problems and other prompts."""

import hashlib
import json
from typing import Annotated

from msgspec import Meta, Struct

from megatron_fipo.data.chat_templates import Message
from megatron_fipo.errors import DataError

_Hash = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]


class Fingerprint(Struct, frozen=True, forbid_unknown_fields=True):
    """The training problems of a run, in their order."""

    count: Annotated[int, Meta(ge=1)]
    problems: _Hash
    """Hash of all messages and right answers."""
    prompts: _Hash
    """Hash of all token ids. It also changes with the chat template, its variables and date, and the tokenizer."""

    def difference(self, saved: "Fingerprint") -> str | None:
        """Describe how the problems differ from a checkpoint's; None if they are the same. Prompts may differ."""
        if self.problems == saved.problems:
            return None
        if self.count != saved.count:
            return f"{self.count} training problems, the checkpoint was trained on {saved.count}"
        return (
            f"{self.count} training problems as in the checkpoint, but they, their order, their answers or "
            "data.prompt_template are different"
        )


def compare_for_resume(present: Fingerprint, saved: Fingerprint | None, allow_change: bool) -> tuple[bool, str | None]:
    """Return whether a run may continue in the checkpoint's order of problems, and a warning if something has changed.

    Args:
        saved: the checkpoint's fingerprint; None for a checkpoint of an older version.
        allow_change: data.allow_change.

    Raises:
        DataError: the data has changed, and this is not allowed.
    """
    if saved is None:
        return True, "the checkpoint does not say what data it was trained on: a change would not be noticed"
    change = present.difference(saved)
    if change and not allow_change:
        raise DataError(
            f"data: the problems have changed since the checkpoint: {change} "
            "(resume with the same data, or data.allow_change=true)"
        )
    if change:
        return False, f"the data has changed since the checkpoint: {change}; a new epoch of it begins"
    if present.prompts != saved.prompts:
        return True, (
            "the prompts have changed since the checkpoint, but the problems have not: there is another chat template, "
            "variable, date (data.chat_template_date), tokenizer or rollout.max_prompt_length"
        )
    return True, None


class Fingerprinter:
    """Computes the fingerprint of problems that are added one after the other."""

    def __init__(self) -> None:
        self._count = 0
        self._problems, self._prompts = hashlib.sha256(), hashlib.sha256()

    def add(self, messages: list[Message], ground_truth: str, token_ids: list[int]) -> None:
        """Add the next problem."""
        self._count += 1
        texts = [[message["role"], message["content"]] for message in messages]
        # One line per problem. The JSON contains no line breaks, so different sequences always give different texts.
        self._problems.update(f"{json.dumps([texts, ground_truth])}\n".encode())
        self._prompts.update(f"{token_ids}\n".encode())

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of all problems so far."""
        return Fingerprint(self._count, self._problems.hexdigest()[:32], self._prompts.hexdigest()[:32])
