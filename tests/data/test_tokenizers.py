"""Why: a doubled bos, a missing end token or a lost space changes what the model reads without any error.

The Hugging Face tokenizer is a small real one, built here. The real model's is in tests/data/test_make_smollm2.py, the
embedded task's in tests/data/test_column_sums.py.
"""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_fipo.data.column_sums import BOS_ID, EOS_ID, PAD_ID, write_tokenizer
from megatron_fipo.data.tokenizers import load_tokenizer
from megatron_fipo.errors import DataError

MESSAGES = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+2=?\n"}]
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}<s>assistant:"


def save_byte_tokenizer(directory: Path, chat_template: str | None) -> None:
    """A byte-level tokenizer with <s> and </s>, which puts <s> before every text when asked for special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(["<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    fast.save_pretrained(directory)


def test_a_chat_template_is_applied_and_nothing_added_to_it(tmp_path):
    save_byte_tokenizer(tmp_path, TEMPLATE)
    tokenizer = load_tokenizer(tmp_path)
    text = tokenizer.render(MESSAGES)
    assert text == "<s>system:Add.</s><s>user:1+2=?\n</s><s>assistant:"
    ids = tokenizer.encode(text)
    assert (ids.count(0), ids.count(1)) == (3, 2)
    assert tokenizer.decode(ids) == "system:Add.user:1+2=?\nassistant:"


def test_without_a_template_the_contents_are_joined_and_the_model_gets_its_bos(tmp_path):
    save_byte_tokenizer(tmp_path, None)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.render(MESSAGES) == "Add.\n1+2=?\n"
    assert tokenizer.encode("  a  b .").count(0) == 1
    assert tokenizer.encode("a")[0] == 0
    assert tokenizer.decode(tokenizer.encode("  a  b .")) == "  a  b ."


def test_end_tokens_are_the_union_of_what_the_files_say(tmp_path):
    save_byte_tokenizer(tmp_path, TEMPLATE)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == [7, 9, 1]
    assert tokenizer.pad_id == 7


def test_sentencepiece_model(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ([EOS_ID], PAD_ID)
    ids = tokenizer.encode("1+2=?\n")
    assert ids[0] == BOS_ID
    beyond_the_vocabulary = 60
    assert tokenizer.decode([PAD_ID, *ids, beyond_the_vocabulary, EOS_ID]) == "1+2=?\n"


def test_sentencepiece_without_add_bos_token_gets_none(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert BOS_ID not in load_tokenizer(tmp_path).encode("1+2=?\n")


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
