"""A sentencepiece model with support for special tokens inside a text, which sentencepiece itself does not have.

sentencepiece reads the name of a control symbol, such as </s>, as plain text. It does not know the tokens that
tokenizer_config.json or added_tokens.json add to the model's own. Here a rendered chat is split at all of these tokens.
Each of them becomes one id, and sentencepiece encodes the text between them.
"""

import re
from pathlib import Path
from typing import Any

from megatron_fipo.data.vocabulary import read_settings
from megatron_fipo.errors import DataError, one_line

_SPECIAL_TOKENS = ("bos", "eos", "pad", "unk")


class SentencePieceModel:
    """`tokenizer.model` and the tokens that were added to it."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        """`settings` are tokenizer_config.json's. DataError if the model or the added tokens cannot be read."""
        from sentencepiece import SentencePieceProcessor

        try:
            model = path.read_bytes()
            self._model = SentencePieceProcessor(model_proto=model)
            pieces = self._model.get_piece_size() if model else 0
            # transformers' default: a space is added before the text, but not after a special token.
            inner = model if settings.get("legacy") or not pieces else _without_prefix(model)
            self._inner = SentencePieceProcessor(model_proto=inner)
            # Decode all pieces once. A damaged piece would otherwise stop a run later, when the model samples it.
            texts = [self._model.id_to_piece(i) for i in range(pieces)]
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(f"{path}: is not a sentencepiece model ({one_line(error)})") from error
        if not pieces:
            raise DataError(f"{path}: is an empty sentencepiece model")
        self._pieces = pieces
        self.added = _added_tokens(path.parent, settings, pieces)
        """Id → (text, whether it is special) of the tokens that are not the model's own."""
        self._ids = {text: i for i, text in enumerate(texts) if self._model.is_control(i)}
        self._ids |= {text: i for i, (text, _) in self.added.items()}
        names = sorted(self._ids, key=len, reverse=True)
        self._cut = re.compile("|".join(map(re.escape, names))) if names else None
        self.size = max(self._pieces - 1, *self.added) + 1 if self.added else self._pieces
        self.special_tokens = self._named_tokens(settings)
        for name in ("bos", "eos"):
            self._check_exists(path.parent, name)
        self.bos_id, self.eos_id, self.pad_id = (self._id_of(name) for name in ("bos", "eos", "pad"))

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens."""
        return list(self._model.encode(text))

    def encode(self, text: str, *, is_first: bool = True) -> list[int]:
        """Return the ids of a text in which the names of special tokens mean these. `is_first`: no text is before."""
        ids: list[int] = []
        end = 0
        for match in self._cut.finditer(text) if self._cut else ():
            ids += self._between(text[end : match.start()], is_first=is_first and end == 0)
            ids.append(self._ids[match.group()])
            end = match.end()
        return ids + self._between(text[end:], is_first=is_first and end == 0)

    def decode(self, ids: list[int]) -> str:
        """Return the text, without special tokens and without ids that the tokenizer does not have."""
        text = ""
        run: list[int] = []
        for token in ids:
            if token in self.added:
                added, is_special = self.added[token]
                text, run = text + self._model.decode(run) + ("" if is_special else added), []
            # A model's vocabulary may be larger than the tokenizer's, because of padding, and such ids can be sampled.
            elif 0 <= token < self._pieces and not self._model.is_control(token):
                run.append(token)
        return text + self._model.decode(run)

    def _between(self, text: str, is_first: bool) -> list[int]:
        return list((self._model if is_first else self._inner).encode(text)) if text else []

    def _named_tokens(self, settings: dict[str, Any]) -> dict[str, str]:
        """Return the special tokens' names for templates, such as bos_token, with their texts."""
        named = {}
        for name in _SPECIAL_TOKENS:
            configured = settings.get(f"{name}_token")
            text = configured.get("content") if isinstance(configured, dict) else configured
            own = getattr(self._model, f"{name}_id")()
            if isinstance(text, str):
                named[f"{name}_token"] = text
            elif own >= 0:
                named[f"{name}_token"] = self._model.id_to_piece(own)
        return named

    def _check_exists(self, directory: Path, name: str) -> None:
        """Raise DataError if a special token of the configuration does not exist: another id would be used for it."""
        text = self.special_tokens.get(f"{name}_token")
        if text is None or text in self._ids:
            return
        is_text = not any("\ud800" <= char <= "\udfff" for char in text)  # sentencepiece takes no lone surrogates
        if not is_text or self._model.piece_to_id(text) == self._model.unk_id():
            where = f"{directory}/tokenizer_config.json: {name}_token {text[:80]!r}"
            raise DataError(f"{where} is not a token of tokenizer.model, nor added to it")

    def _id_of(self, name: str) -> int:
        """Return the id of a special token as configured, or the model's own; −1 if there is none."""
        return self._ids.get(self.special_tokens.get(f"{name}_token", ""), getattr(self._model, f"{name}_id")())


def _without_prefix(model: bytes) -> bytes:
    """Return the same model without the space before a text."""
    from sentencepiece import sentencepiece_model_pb2 as format_of_models

    proto: Any = format_of_models.ModelProto()  # type: ignore[attr-defined]  # made by protobuf at import
    proto.ParseFromString(model)
    proto.normalizer_spec.add_dummy_prefix = False
    return proto.SerializeToString()


def _added_tokens(directory: Path, settings: dict[str, Any], pieces: int) -> dict[int, tuple[str, bool]]:
    """Id → (text, whether it is special) of the tokens that are not the model's own."""
    added: dict[int, tuple[str, bool]] = {}
    try:
        for text, token in read_settings(directory / "added_tokens.json").items():
            added[int(token)] = (str(text), True)
        for token, entry in settings.get("added_tokens_decoder", {}).items():
            added[int(token)] = (str(entry["content"]), bool(entry.get("special")))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{directory}: its added tokens are not a table of ids and texts ({error})") from error
    if any(not text for text, _ in added.values()):
        raise DataError(f"{directory}: one of its added tokens has an empty text")
    return {token: entry for token, entry in added.items() if token >= pieces}
