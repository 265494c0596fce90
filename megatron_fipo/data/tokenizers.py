"""Convert text to token ids and back, by a sentencepiece `tokenizer.model` or a Hugging Face tokenizer."""

from pathlib import Path
from typing import Any, Protocol

from megatron_fipo.config import DataConfig
from megatron_fipo.data.chat_templates import ChatTemplate, Message, find_template
from megatron_fipo.data.sentencepiece_models import SentencePieceModel
from megatron_fipo.data.vocabulary import end_tokens, read_settings
from megatron_fipo.errors import ConfigError, DataError, one_line

_NO_LIMIT = 1 << 40
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


class Tokenizer(Protocol):
    """The interface of tokenizers that the loop uses."""

    ends: dict[int, str]
    """Every token that ends a response, with the file that names it. The model's own is first. Never empty."""
    pad_id: int
    size: int
    """The largest token id plus one."""
    template: ChatTemplate | None

    @property
    def eos_ids(self) -> list[int]:
        """The ids in `ends`."""

    def render(self, messages: list[Message]) -> str:
        """Return the prompt as the model reads it: by the chat template, up to the reply, or as the joined contents.

        DataError if the template fails on these messages.
        """

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a rendered prompt. A bos token is added only without a chat template, if expected."""

    def encode_inside(self, text: str) -> list[int]:
        """Token ids of a text that goes on from other tokens: no bos token. Special tokens go by their names."""

    def decode(self, ids: list[int]) -> str:
        """Return the exact text, without special tokens. Several threads call this at the same time."""


def load_tokenizer(model_dir: str | Path, data: DataConfig | None = None) -> Tokenizer:
    """Load the tokenizer of a Hugging Face model directory. `data` has the variables and the date of its chat template.

    A directory without tokenizer.json is read by sentencepiece itself. transformers would make a tokenizer from
    tokenizer.model by the model's type, which for many types gives other ids.

    Raises:
        DataError: there is no tokenizer, it cannot be read, or nothing names an end-of-sequence token.
        ConfigError: data.chat_template_variables does not fit the template, or there is no template.
    """
    directory = Path(model_dir)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(f"{directory}: no {', '.join(TOKENIZER_FILES)} in the model directory")
    data = data or DataConfig()
    if (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").is_file():
        return SentencePieceTokenizer(directory, data)
    return HuggingFaceTokenizer(directory, data)


class _ModelTokenizer:
    """The common part of both kinds: the model's end tokens and its chat template."""

    def __init__(self, directory: Path, data: DataConfig, eos: int | None, pad: int | None, special: dict[str, Any]):
        self.ends = end_tokens(directory, eos)
        self.pad_id = self.eos_ids[0] if pad is None or pad < 0 else pad
        source = find_template(directory, read_settings(directory / "tokenizer_config.json"))
        if source is None and data.chat_template_variables:
            raise ConfigError(
                "data.chat_template_variables", f"{directory} has no chat template to read them", "leave them out"
            )
        self.template: ChatTemplate | None = None
        if source is not None:
            self.template = ChatTemplate(
                source, directory, special, data.chat_template_variables, data.chat_template_date
            )

    @property
    def eos_ids(self) -> list[int]:
        return list(self.ends)

    def render(self, messages: list[Message]) -> str:
        if self.template:
            return self.template.render(messages)
        return "\n".join(message["content"] for message in messages)


class SentencePieceTokenizer(_ModelTokenizer):
    """A sentencepiece model, with a chat template or without."""

    def __init__(self, directory: Path, data: DataConfig):
        settings = read_settings(directory / "tokenizer_config.json")
        self._model = SentencePieceModel(directory / "tokenizer.model", settings)
        special = self._model.special_tokens
        super().__init__(directory, data, self._model.eos_id, self._model.pad_id, special)
        self.size = self._model.size
        wants_bos = settings.get("add_bos_token") or read_settings(directory / "config.json").get("add_bos_token")
        self._prefix = [self._model.bos_id] if wants_bos and not self.template else []

    def encode(self, text: str) -> list[int]:
        # Only a template writes special tokens. In a plain text their names are ordinary text.
        return self._model.encode(text) if self.template else self._prefix + self._model.encode_plain(text)

    def encode_inside(self, text: str) -> list[int]:
        return self._model.encode(text, is_first=False)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class HuggingFaceTokenizer(_ModelTokenizer):
    """Any tokenizer that transformers' AutoTokenizer reads."""

    def __init__(self, directory: Path, data: DataConfig):
        from transformers import AutoTokenizer, TokenizersBackend

        try:
            # The run checks the prompt's length itself. transformers would warn by the value in the file.
            tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, model_max_length=_NO_LIMIT)
            is_stored = tokenizer.eos_token is None or _is_stored(directory, tokenizer.eos_token)
        except DataError:
            raise
        except Exception as error:  # from several libraries, depending on the files
            raise DataError(f"{directory}: transformers cannot read its tokenizer ({one_line(error)})") from error
        self._tokenizer = tokenizer
        # The same text as transformers' own decode, but only batches are decoded without the interpreter's lock.
        plain = isinstance(tokenizer, TokenizersBackend) and type(tokenizer)._decode is TokenizersBackend._decode
        self._decode_batch = tokenizer.backend_tokenizer.decode_batch if plain else None
        if not is_stored:
            raise DataError(
                f"{directory}/tokenizer_config.json: eos_token {tokenizer.eos_token[:80]!r} is not in tokenizer.json"
            )
        special = dict(tokenizer.special_tokens_map)
        super().__init__(directory, data, tokenizer.eos_token_id, tokenizer.pad_token_id, special)
        self.size = max(tokenizer.get_vocab().values(), default=-1) + 1
        # A chat template writes the bos token itself. Without a template, the tokenizer knows whether the model expects
        # it.
        self._prefix = [] if self.template else [i for i in tokenizer.encode("") if i == tokenizer.bos_token_id]

    def encode(self, text: str) -> list[int]:
        return self._prefix + self.encode_inside(text)

    def encode_inside(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: list[int]) -> str:
        if self._decode_batch is not None:
            return str(self._decode_batch([ids], skip_special_tokens=True)[0])
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _is_stored(directory: Path, token: str) -> bool:
    """Return whether the files give the token an id. If not, transformers adds one, on which no model was trained."""
    from tokenizers import Tokenizer as StoredTokenizer

    path = directory / "tokenizer.json"
    if not path.is_file() or StoredTokenizer.from_file(str(path)).token_to_id(token) is not None:
        return True
    added = read_settings(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
    named = {entry.get("content") for entry in added.values() if isinstance(entry, dict)}
    return token in named or token in read_settings(directory / "added_tokens.json")
