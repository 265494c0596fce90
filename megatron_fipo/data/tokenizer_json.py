"""Convert a sentencepiece model to tokenizer.json, which vLLM and transformers read instead of tokenizer.model.

Without it, both would make a tokenizer by the model's type, which for many types gives other ids. The steps are the
same as in sentencepiece: a space before the text, spaces as ▁, then pieces. Not every sentencepiece model can be
converted, so the caller has to compare the ids. Usual language models can be: BPE or unigram, with or without bytes for
unknown characters, without normalisation of the text.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from megatron_fipo.data.sentencepiece_models import SentencePieceModel

_SPACE = "\u2581"


def from_sentencepiece(path: Path, settings: dict[str, Any], bos: str | None) -> Tokenizer:
    """Return the tokenizer of a tokenizer.model with its added tokens.

    Args:
        settings: those of tokenizer_config.json.
        bos: the token before a text, if there is one.

    Raises:
        DataError: the model cannot be read.
        Exception: from the tokenizers library, for a model that it does not accept.
    """
    proto = _read(path)
    spec = proto.normalizer_spec
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces:
        raise ValueError(f"it changes its text ({spec.name}, whitespace) before it looks for pieces")
    tokenizer = Tokenizer(_model(proto))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    prefix = spec.add_dummy_prefix
    scheme = ("always" if settings.get("legacy") else "first") if prefix else "never"
    # The spaces of the text are already ▁, so the first of these finds no space, and adds one before every text.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(" ", scheme, False), pre_tokenizers.Metaspace(_SPACE, "never", False)]
    )
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    _add_tokens(tokenizer, proto, SentencePieceModel(path, settings))
    _put_before(tokenizer, bos)
    return tokenizer


def from_characters(path: Path, settings: dict[str, Any], bos: str | None) -> Tokenizer:
    """Return the same for a model whose pieces are ASCII characters: byte-level, as transformers reads Qwen models.

    transformers' class for Qwen2 and Qwen3 reads only the vocabulary from tokenizer.json. It leaves out characters that
    have no piece, where sentencepiece gives its unknown token. ValueError if there are other pieces.
    """
    proto = _read(path)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids: dict[str, int] = {}
    for index, piece in enumerate(proto.pieces):
        text = piece.piece.replace(_SPACE, " ")
        if piece.type in (piece.NORMAL, piece.USER_DEFINED):
            if len(text) != 1 or not text.isascii():
                raise ValueError(f"piece {text[:20]!r} is not an ASCII character")
            ((text, _),) = byte_level.pre_tokenize_str(text)
        ids[text] = index
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    _add_tokens(tokenizer, proto, SentencePieceModel(path, settings))
    _put_before(tokenizer, bos)
    return tokenizer


def _read(path: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2 as format_of_models

    proto: Any = format_of_models.ModelProto()  # type: ignore[attr-defined]  # made by protobuf at import
    proto.ParseFromString(path.read_bytes())
    return proto


def _add_tokens(tokenizer: Tokenizer, proto: Any, own: SentencePieceModel) -> None:
    """Add the tokens that are found in a text before all others."""
    special = set(own.special_tokens.values())
    pieces = [
        AddedToken(piece.piece, normalized=_SPACE in piece.piece, special=piece.type == piece.CONTROL)
        for piece in proto.pieces
        if piece.type == piece.CONTROL or (piece.type == piece.USER_DEFINED and len(piece.piece) > 1)
    ]
    added = [
        AddedToken(text, normalized=False, special=is_special or text in special)
        for _, (text, is_special) in sorted(own.added.items())
    ]
    tokenizer.add_tokens([*pieces, *added])


def _put_before(tokenizer: Tokenizer, bos: str | None) -> None:
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B:1"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )


def _model(proto: Any) -> models.Model:
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    byte_fallback = bool(proto.trainer_spec.byte_fallback)
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        return models.Unigram(vocabulary, unk_id=proto.trainer_spec.unk_id, byte_fallback=byte_fallback)
    from transformers.convert_slow_tokenizer import generate_merges

    ids = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    # Characters are pieces without merges, as in BPE before the first merge.
    merges = (
        generate_merges(ids, vocabulary, _not_merged(proto))
        if proto.trainer_spec.model_type == proto.trainer_spec.BPE
        else []
    )
    return models.BPE(
        ids, merges, unk_token=proto.trainer_spec.unk_piece, fuse_unk=True, byte_fallback=byte_fallback, dropout=None
    )


def _not_merged(proto: Any) -> list[str]:
    """Return the pieces that are never built by merges, only found as a whole."""
    return [piece.piece for piece in proto.pieces if piece.type != piece.NORMAL]
