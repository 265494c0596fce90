"""What a run was trained on, in two short hashes, so that a resume notices other problems and other prompts."""

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
    """Hash of all token ids: it also changes with the chat template, its variables and date, and the tokenizer."""

    def difference(self, saved: "Fingerprint") -> str | None:
        """What is different from a checkpoint's problems, in words; None if they are the same, prompts aside."""
        if self.problems == saved.problems:
            return None
        if self.count != saved.count:
            return f"{self.count} training problems, the checkpoint was trained on {saved.count}"
        return (
            f"{self.count} training problems as the checkpoint, but others, in another order or with other answers, "
            "or under another data.prompt_template"
        )


def compare_for_resume(present: Fingerprint, saved: Fingerprint | None, allow_change: bool) -> tuple[bool, str | None]:
    """Whether a run may go on in the checkpoint's order of problems, and a warning where something has changed.

    Args:
        saved: the checkpoint's fingerprint; None from before checkpoints had one.
        allow_change: data.allow_change.

    Raises:
        DataError: the data is another, and that is not allowed.
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
            "the prompts have changed since the checkpoint, the problems have not: another chat template, variable, "
            "date (data.chat_template_date), tokenizer or rollout.max_prompt_length"
        )
    return True, None


class Fingerprinter:
    """Takes problems one after the other."""

    def __init__(self) -> None:
        self._count = 0
        self._problems, self._prompts = hashlib.sha256(), hashlib.sha256()

    def add(self, messages: list[Message], ground_truth: str, token_ids: list[int]) -> None:
        """The next problem."""
        self._count += 1
        texts = [[message["role"], message["content"]] for message in messages]
        # One line a problem: JSON has no line ends of its own here, so that no two sequences look the same.
        self._problems.update(f"{json.dumps([texts, ground_truth])}\n".encode())
        self._prompts.update(f"{token_ids}\n".encode())

    def fingerprint(self) -> Fingerprint:
        """Of all problems so far."""
        return Fingerprint(self._count, self._problems.hexdigest()[:32], self._prompts.hexdigest()[:32])
