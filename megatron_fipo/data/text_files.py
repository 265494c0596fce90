"""Complete a Hugging Face directory, so that transformers and vLLM handle text in the same way as a run.

It needs tokenizer.json beside a sentencepiece model, the chat template, and every token that ends a response in
generation_config.json. Missing files are written; files that are right are not changed.
"""

import logging
import random
from pathlib import Path
from typing import Any

from megatron_fipo.data.chat_templates import TEMPLATE_FILE
from megatron_fipo.data.sentencepiece_models import SentencePieceModel
from megatron_fipo.data.tokenizers import TOKENIZER_FILES, Tokenizer, load_tokenizer
from megatron_fipo.data.vocabulary import read_settings
from megatron_fipo.errors import DataError, one_line
from megatron_fipo.files import write_atomically, write_json_atomically

_READ_FAST = "PreTrainedTokenizerFast"
_SLOW_ALONE = ("auto_map", "add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "sp_model_kwargs")
"""Keys of tokenizer_config.json that tokenizer.json replaces, or that would select other code."""
_JOINED = "{{ messages | map(attribute='content') | join('\\n') }}"
"""How a run renders messages if a model has no chat template."""
_TEXTS = (
    *("12 + 7*(3-1)=?\n", "  two  spaces, and at the end  ", " one", "\n\n\tlines\r\n", "", "Ünïcödé é ﬁ ½ 数学 🙂"),
    *("def f(x):\n    return x ** 2  # 1,000.50\n", "\\frac{1}{2} \\boxed{$42$}", "ﷺ\u200b\u00a0\x00\x07"),
)
_RANDOM_TEXTS, _PIECES_EACH = 200, 40


def complete_text_files(directory: Path) -> None:
    """Write the missing files of a model directory. A directory without a tokenizer is not changed.

    Logs a warning if a tokenizer cannot be expressed as tokenizer.json, or cannot be read. The directory is then not
    changed.
    """
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return
    try:
        tokenizer = load_tokenizer(directory)
        _write_ends(directory, tokenizer)
        if (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").is_file():
            _write_tokenizer_json(directory, tokenizer)
        if tokenizer.template is None:
            _write_template(directory)
    except DataError as error:
        logging.getLogger(__name__).warning("vLLM and transformers may not read it as text: %s", error)


def _write_tokenizer_json(directory: Path, own: Tokenizer) -> None:
    """Write tokenizer.json and the settings to read it. DataError if it would give other ids than `own`."""
    from megatron_fipo.data.tokenizer_json import from_characters, from_sentencepiece

    model, config = directory / "tokenizer.model", directory / "tokenizer_config.json"
    settings, old = read_settings(config), config.read_bytes() if config.is_file() else None
    special = SentencePieceModel(model, settings).special_tokens
    bos = special.get("bos_token") if _begins(settings, directory) else None
    kept = {name: value for name, value in settings.items() if name not in _SLOW_ALONE}
    kept |= special | {"tokenizer_class": _READ_FAST, "clean_up_tokenization_spaces": False}
    problem = ""
    for convert in (from_sentencepiece, from_characters):
        try:
            text = convert(model, settings, bos).to_str(pretty=True)
        except Exception as error:  # the library can raise anything, depending on the model
            problem = problem or one_line(error)
            continue
        write_json_atomically(config, kept)
        write_atomically(directory / "tokenizer.json", text + "\n")
        if (different := _first_difference(own, load_tokenizer(directory), model)) is None:
            return
        problem = problem or f"{different[:80]!r} would have other ids"
        (directory / "tokenizer.json").unlink()
        config.unlink() if old is None else write_atomically(config, old)
    raise DataError(f"{model}: cannot be expressed as tokenizer.json: {problem}")


def _begins(settings: dict[str, Any], directory: Path) -> bool:
    """Return whether a bos token comes before a plain text, decided as in `load_tokenizer`."""
    return bool(settings.get("add_bos_token") or read_settings(directory / "config.json").get("add_bos_token"))


def _first_difference(own: Tokenizer, other: Tokenizer, model: Path) -> str | None:
    """Return a text that the two encode or decode differently, from a few difficult texts and many random ones.

    sentencepiece's unknown token is ignored: other libraries write <unk> for its ⁇ or leave it out, and models do not
    sample it.
    """
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=model.read_bytes())
    pieces = [
        processor.id_to_piece(i).replace("▁", " ")
        for i in range(processor.get_piece_size())
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
    ]
    rng = random.Random(0)
    drawn = ["".join(rng.choices(pieces, k=_PIECES_EACH)) for _ in range(_RANDOM_TEXTS)] if pieces else []
    for text in (*_TEXTS, *drawn):
        ids, others = ([i for i in each.encode(text) if i != processor.unk_id()] for each in (own, other))
        if others != ids or other.decode(ids) != own.decode(ids):
            return text
    return None


def _write_template(directory: Path) -> None:
    """Write a chat template that joins contents, as a run does without one. vLLM's chat interface needs one.

    It is not written if it would give other ids than in a run: some tokenizers put a space before a text, but not after
    bos.
    """
    path, own = directory / TEMPLATE_FILE, load_tokenizer(directory)
    write_atomically(path, ("{{ bos_token }}" if own.encode("") else "") + _JOINED)
    with_template = load_tokenizer(directory)
    messages = [{"role": "user", "content": text} for text in ("What is 1 + 1?", " two  spaces\n")]
    for asked in (messages[:1], messages):
        if with_template.encode(with_template.render(asked)) != own.encode(own.render(asked)):
            path.unlink()
            return


def _write_ends(directory: Path, tokenizer: Tokenizer) -> None:
    """Write every token that ends a response in a run to generation_config.json, so that generation stops there."""
    path = directory / "generation_config.json"
    settings = read_settings(path)
    named = settings.get("eos_token_id")
    if set(named if isinstance(named, list) else [named]) >= set(tokenizer.eos_ids):
        return
    ends = tokenizer.eos_ids
    settings |= {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    write_json_atomically(path, {"pad_token_id": tokenizer.pad_id} | settings)
