"""Text to token ids and back, for models with a sentencepiece `tokenizer.model` and for Hugging Face tokenizers."""

import json
from pathlib import Path
from typing import Any, Protocol

from megatron_fipo.errors import DataError

Message = dict[str, str]
"""One chat message: {"role": …, "content": …}."""


class Tokenizer(Protocol):
    """What the loop needs of a tokenizer."""

    eos_ids: list[int]
    """Every token that ends a response, the model's own first; never empty."""
    pad_id: int

    def render(self, messages: list[Message]) -> str:
        """The prompt as the model reads it: the chat template with the reply opened, or the contents joined."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered prompt. Only models without a chat template get a bos token, if they want one."""

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens, otherwise exactly as it was."""


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face model directory. DataError if it has none, or no end-of-sequence token."""
    directory = Path(model_dir)
    settings = _read_json(directory / "tokenizer_config.json")
    has_fast_tokenizer = (directory / "tokenizer.json").is_file()
    if (directory / "tokenizer.model").is_file() and not has_fast_tokenizer and "chat_template" not in settings:
        return SentencePieceTokenizer(directory)
    if not has_fast_tokenizer and not settings:
        raise DataError(
            f"{directory}: no tokenizer.json, tokenizer.model or tokenizer_config.json in the model directory"
        )
    return HuggingFaceTokenizer(directory)


class SentencePieceTokenizer:
    """A bare sentencepiece model without a chat template."""

    def __init__(self, directory: Path):
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        self.eos_ids = _end_ids(directory, self._model.eos_id())
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_ids[0]
        configured = (
            _read_json(directory / name).get("add_bos_token") for name in ("tokenizer_config.json", "config.json")
        )
        self._prefix = [self._model.bos_id()] if any(configured) else []

    def render(self, messages: list[Message]) -> str:
        return _join(messages)

    def encode(self, text: str) -> list[int]:
        return self._prefix + self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        # A model's vocabulary may be padded beyond the tokenizer's, and such an id can be sampled.
        known = [i for i in ids if i < self._model.get_piece_size() and not self._model.is_control(i)]
        return self._model.decode(known)


class HuggingFaceTokenizer:
    """Anything transformers' AutoTokenizer reads."""

    def __init__(self, directory: Path):
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        self.eos_ids = _end_ids(directory, self._tokenizer.eos_token_id)
        pad_id = self._tokenizer.pad_token_id
        self.pad_id = self.eos_ids[0] if pad_id is None else pad_id
        # A chat template writes its own bos; without one, the tokenizer knows whether the model expects it.
        bos_id = self._tokenizer.bos_token_id
        self._prefix = [] if self._tokenizer.chat_template else [i for i in self._tokenizer.encode("") if i == bos_id]

    def render(self, messages: list[Message]) -> str:
        if not self._tokenizer.chat_template:
            return _join(messages)
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def encode(self, text: str) -> list[int]:
        return self._prefix + self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _join(messages: list[Message]) -> str:
    return "\n".join(message["content"] for message in messages)


def _end_ids(directory: Path, tokenizer_eos: int | None) -> list[int]:
    """The union of what the model's files name as end of sequence: chat models end turns with more than one token."""
    ids: list[int | None] = []
    for name in ("generation_config.json", "config.json"):
        configured = _read_json(directory / name).get("eos_token_id")
        ids += configured if isinstance(configured, list) else [configured]
    known = dict.fromkeys(i for i in [*ids, tokenizer_eos] if i is not None and i >= 0)
    if not known:
        raise DataError(f"{directory}: no eos_token_id in generation_config.json, config.json or the tokenizer")
    return list(known)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
