"""A sentencepiece model as tokenizer.json: what vLLM and transformers read in the place of tokenizer.model.

Both would otherwise make a tokenizer by the model's type, which for many types has other ids. The steps follow
sentencepiece's own: a space before the text, spaces as ▁, then pieces. Whether the result gives the same ids is for the
caller to compare: not every sentencepiece model can be expressed. Language models' can: BPE or unigram, with bytes for
what is unknown or without, a text that is not changed before.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from megatron_fipo.data.sentencepiece_models import SentencePieceModel

_SPACE = "\u2581"


def from_sentencepiece(path: Path, settings: dict[str, Any], bos: str | None) -> Tokenizer:
    """The tokenizer of a tokenizer.model with what was added to it.

    Args:
        settings: tokenizer_config.json's.
        bos: the token that comes before a text, if one does.

    Raises:
        DataError: the model cannot be read.
        Exception: of the tokenizers library, for a model that it does not take.
    """
    proto = _read(path)
    spec = proto.normalizer_spec
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces:
        raise ValueError(f"it changes its text ({spec.name}, whitespace) before it looks for pieces")
    tokenizer = Tokenizer(_model(proto))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    prefix = spec.add_dummy_prefix
    scheme = ("always" if settings.get("legacy") else "first") if prefix else "never"
    # The spaces of the text are ▁ already, so that the first of these sees none, and puts one before any text.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(" ", scheme, False), pre_tokenizers.Metaspace(_SPACE, "never", False)]
    )
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    _add_tokens(tokenizer, proto, SentencePieceModel(path, settings))
    _put_before(tokenizer, bos)
    return tokenizer


def from_characters(path: Path, settings: dict[str, Any], bos: str | None) -> Tokenizer:
    """The same for a model whose pieces are ASCII characters: byte-level, as transformers reads any Qwen's.

    Its class for Qwen2 and Qwen3 takes nothing but the vocabulary from tokenizer.json. It leaves characters out that
    have no piece, where sentencepiece gives its unknown token. ValueError if other pieces are there.
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
    """Those that are found in a text before anything else."""
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
    # Characters are pieces without merges, as BPE's are before the first one.
    merges = (
        generate_merges(ids, vocabulary, _not_merged(proto))
        if proto.trainer_spec.model_type == proto.trainer_spec.BPE
        else []
    )
    return models.BPE(
        ids, merges, unk_token=proto.trainer_spec.unk_piece, fuse_unk=True, byte_fallback=byte_fallback, dropout=None
    )


def _not_merged(proto: Any) -> list[str]:
    """Pieces that are found as a whole or not at all."""
    return [piece.piece for piece in proto.pieces if piece.type != piece.NORMAL]
