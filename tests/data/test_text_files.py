"""Why: other programs read tokenizer.json. If it gives other ids than in the run, the exported model is useless.

The tests use small real sentencepiece models of the kinds that language models have. tests/test_export.py reads such a
directory by vLLM. Not covered: the published models themselves, which are not available here.
"""

import io
import json
import logging
import random
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.data.text_files import complete_text_files
from megatron_fipo.data.tokenizers import HuggingFaceTokenizer, load_tokenizer
from tests.data.test_tokenizers import CHAT, MESSAGES, WORDS, save_byte_tokenizer, save_sentencepiece

TEXTS = ["solve the math", "  two  spaces\n", " one", "Ünïcödé 数学 🙂", "12 + 7*(3-1)=?", "", "\n\n", "a\tb "]
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def save_model(directory: Path, **changes: object) -> None:
    """Make a sentencepiece model as for Llama, except for `changes` of its training, in a Llama directory."""
    rng, model = random.Random(0), io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 330,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    SentencePieceTrainer.train(
        sentence_iterator=(" ".join(rng.choices([*WORDS, "é", "数学", "7+", "x^2"], k=9)) for _ in range(500)),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings | changes,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    (directory / "config.json").write_text(json.dumps(LLAMA))
    (directory / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "legacy": False}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_type": "unigram"},
        {"add_dummy_prefix": False},
        {"byte_fallback": False, "vocab_size": 60},
        {"model_type": "unigram", "byte_fallback": False, "vocab_size": 60, "add_dummy_prefix": False},
        {"model_type": "char", "byte_fallback": False, "vocab_size": 60},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())) or "llama",
)
def test_a_sentencepiece_model_becomes_a_tokenizer_json_with_the_same_ids(tmp_path: Path, changes: dict) -> None:
    save_model(tmp_path, **changes)
    before = load_tokenizer(tmp_path)
    complete_text_files(tmp_path)
    after = load_tokenizer(tmp_path)
    assert isinstance(after, HuggingFaceTokenizer)
    for text in TEXTS:
        prompt = [{"role": "user", "content": text}]
        assert after.encode(after.render(prompt)) == before.encode(before.render(prompt)), text
    assert (after.ends.keys(), after.pad_id, after.size) == (before.ends.keys(), before.pad_id, before.size)


@pytest.mark.parametrize("legacy", [False, True])
def test_added_and_special_tokens_in_a_chat_are_one_id_each(tmp_path: Path, legacy: bool) -> None:
    save_sentencepiece(tmp_path, CHAT, legacy=legacy, add_bos_token=True)
    before = load_tokenizer(tmp_path)
    complete_text_files(tmp_path)
    after = load_tokenizer(tmp_path)
    text = before.render(MESSAGES) + "add<think>the answer"
    assert after.render(MESSAGES) == before.render(MESSAGES)
    assert after.encode(text) == before.encode(text)
    assert (tmp_path / "chat_template.jinja").read_text() == CHAT


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "changes its text"),
        ({"remove_extra_whitespaces": True}, "changes its text"),
        ({"user_defined_symbols": ["  "]}, "would have other ids"),
    ],
)
def test_a_model_that_cannot_be_expressed_stays_as_it_was_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict, said: str
) -> None:
    save_model(tmp_path, **changes)
    settings = (tmp_path / "tokenizer_config.json").read_bytes()
    with caplog.at_level(logging.WARNING):
        complete_text_files(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    assert (tmp_path / "tokenizer_config.json").read_bytes() == settings
    (record,) = caplog.records
    assert "tokenizer.model: cannot be expressed as tokenizer.json" in record.message and said in record.message
    load_tokenizer(tmp_path)


def test_every_token_that_ends_a_response_ends_a_generation(tmp_path: Path) -> None:
    """transformers and vLLM read only generation_config.json."""
    save_byte_tokenizer(tmp_path, CHAT)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 9}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": 7}))
    complete_text_files(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written == {"pad_token_id": 7, "temperature": 0.6, "eos_token_id": [7, 9, 1]}
    again = (tmp_path / "generation_config.json").stat().st_mtime_ns
    complete_text_files(tmp_path)
    assert (tmp_path / "generation_config.json").stat().st_mtime_ns == again


def test_a_template_that_would_give_other_ids_is_not_written(tmp_path: Path) -> None:
    """Llama's tokenizer puts a space before a text, but not after bos, with which a template begins."""
    save_model(tmp_path)
    complete_text_files(tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()
    shutil.copytree(resolve_embedded("embedded:tiny"), tmp_path / "tiny")
    complete_text_files(tmp_path / "tiny")
    assert (tmp_path / "tiny" / "chat_template.jinja").read_text().startswith("{{ bos_token }}")


def test_a_directory_without_a_tokenizer_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    complete_text_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"] and not caplog.records
    (tmp_path / "tokenizer.model").write_bytes(b"damaged")
    complete_text_files(tmp_path)
    assert "is not a sentencepiece model" in caplog.text
