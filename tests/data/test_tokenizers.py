"""Why: a doubled bos, a missing end token or a lost space changes what the model reads without any error.

The Hugging Face and sentencepiece tokenizers are small real ones, built here. The real model's is in
tests/data/test_make_smollm2.py, the embedded task's in tests/data/test_column_sums.py.
"""

import io
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_fipo.config import DataConfig
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


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_a_prompt_is_what_transformers_itself_would_make_of_it(tmp_path, variables):
    thinking = "{{ bos_token }}{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    save_byte_tokenizer(tmp_path, TEMPLATE + thinking)
    ours = load_tokenizer(tmp_path, DataConfig(chat_template_variables=variables))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, **variables)
    assert ours.render(MESSAGES) == text
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False, **variables)
    assert ours.encode(ours.render(MESSAGES)) == ids


def test_without_a_template_the_contents_are_joined_and_the_model_gets_its_bos(tmp_path):
    save_byte_tokenizer(tmp_path, None)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.render(MESSAGES) == "Add.\n1+2=?\n"
    assert tokenizer.encode("  a  b .").count(0) == 1
    assert tokenizer.encode("a")[0] == 0
    assert tokenizer.decode(tokenizer.encode("  a  b .")) == "  a  b ."


def test_decoding_without_the_interpreters_lock_gives_transformers_own_text(tmp_path):
    """Also in several threads at the same time, as verifiers do. Special tokens are left out."""
    save_byte_tokenizer(tmp_path, TEMPLATE)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer._decode_batch is not None, "the control: it is decoded in another way"
    numbers = random.Random(0)
    rows = [[numbers.randrange(tokenizer.size + 3) for _ in range(200)] for _ in range(50)]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    expected = [tokenizer._tokenizer.decode(row, **options) for row in rows]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(tokenizer.decode, rows)) == expected


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


CHAT = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
WORDS = ["solve", "the", "math", "problem", "step", "by", "step", "user", "system", "answer", "is", "two", "add"]


def save_sentencepiece(directory: Path, template: str | None = None, **settings: Any) -> SentencePieceProcessor:
    """A BPE model as Llama's are, with a space put before each text, <|im_start|> of its own and <|im_end|> added."""
    rng, model = random.Random(0), io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(" ".join(rng.choices(WORDS, k=9)) for _ in range(500)),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["<|im_start|>"],
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    processor = SentencePieceProcessor(model_proto=model.getvalue())
    added = {str(processor.get_piece_size()): {"content": "<|im_end|>", "special": True}}
    added[str(processor.get_piece_size() + 1)] = {"content": "<think>", "special": False}
    settings = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "added_tokens_decoder": added} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return processor


@pytest.mark.parametrize("legacy", [None, False, True])
@pytest.mark.parametrize("in_a_file", [True, False])
def test_a_template_beside_a_sentencepiece_model_is_used_and_its_special_tokens_are_one_id_each(
    tmp_path, legacy, in_a_file
):
    settings = {"legacy": legacy, "add_bos_token": True} | ({} if in_a_file else {"chat_template": CHAT})
    processor = save_sentencepiece(tmp_path, CHAT if in_a_file else None, **settings)
    tokenizer = load_tokenizer(tmp_path)
    text = tokenizer.render(MESSAGES)
    assert text == "<s><|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1+2=?\n<|im_end|>\n"
    ids = tokenizer.encode(text)
    start, end = processor.piece_to_id("<|im_start|>"), processor.get_piece_size()
    assert [token for token in ids if token in (start, end)] == [start, end, start, end]
    assert ids[:2] == [1, start] and ids.count(1) == 1
    pieces = "".join(processor.id_to_piece(token) for token in ids[2 : ids.index(end)])
    assert pieces == ("▁" if legacy else "") + "system<0x0A><0x41>dd<0x2E>"
    assert (tokenizer.eos_ids, tokenizer.size) == ([end], end + 2)


def test_sentencepiece_reads_spaces_and_lines_as_itself_and_not_as_transformers_would(tmp_path):
    processor = save_sentencepiece(tmp_path, "{{ messages[0].content }}")
    tokenizer = load_tokenizer(tmp_path)
    for text in ("solve the math problem", "two  spaces\n é ", "is 12 + 7\n\nanswer"):
        rendered = tokenizer.render([{"role": "user", "content": text}])
        assert tokenizer.encode(rendered) == processor.encode(text)
        assert tokenizer.decode(tokenizer.encode(rendered)) == text


def test_added_tokens_are_decoded_unless_they_are_special(tmp_path):
    processor = save_sentencepiece(tmp_path, CHAT)
    tokenizer = load_tokenizer(tmp_path)
    size = processor.get_piece_size()
    ids = tokenizer.encode("add<think>the answer<|im_end|>")
    assert ids[-1] == size and size + 1 in ids
    assert tokenizer.decode([*ids, size + 500]) == "add<think>the answer"


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_a_special_token_that_does_not_exist_is_refused(tmp_path, name):
    """sentencepiece's own </s> was silently used instead, and no chat turn ended."""
    save_sentencepiece(tmp_path, CHAT, **{name: "<|nope|>"})
    with pytest.raises(DataError, match=rf"tokenizer_config\.json: {name} '<\|nope\|>' is not a token"):
        load_tokenizer(tmp_path)


def test_an_end_token_that_tokenizer_json_does_not_have_is_refused(tmp_path):
    """transformers gives it a new id, which may fit into a padded embedding and which the model never samples."""
    save_byte_tokenizer(tmp_path, TEMPLATE)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"eos_token": "<|nope|>"}
    path.write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"eos_token '<\|nope\|>' is not in tokenizer\.json"):
        load_tokenizer(tmp_path)
    path.write_text(json.dumps(settings | {"added_tokens_decoder": {"258": {"content": "<|nope|>", "special": True}}}))
    assert load_tokenizer(tmp_path).eos_ids == [258]


def test_an_added_token_without_a_text_is_refused(tmp_path):
    """It would be found between any two characters."""
    save_sentencepiece(tmp_path, CHAT)
    (tmp_path / "added_tokens.json").write_text('{"": 330}')
    with pytest.raises(DataError, match="empty text"):
        load_tokenizer(tmp_path)


def test_without_a_template_the_name_of_a_special_token_is_text(tmp_path):
    processor = save_sentencepiece(tmp_path)
    text = "add </s> <|im_start|>"
    assert load_tokenizer(tmp_path).encode(text) == processor.encode(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"", "sentencepiece model"),
        ("tokenizer.model", b"not a model", "is not a sentencepiece model"),
        ("tokenizer_config.json", b"{", "cannot be read"),
        ("tokenizer_config.json", b"[]", "is not a JSON object"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}', "added tokens are not a table"),
        ("added_tokens.json", b'{"<a>": "b"}', "added tokens are not a table"),
        ("generation_config.json", b'{"eos_token_id": "2"}', r"eos_token_id is '2', which is not a token id"),
        ("config.json", b'{"eos_token_id": [1, -1]}', r"config\.json: eos_token_id is -1"),
        ("config.json", b'{"eos_token_id": true}', r"config\.json: eos_token_id is True"),
        ("tokenizer.json", b"{}", "transformers cannot read its tokenizer"),
    ],
)
def test_a_damaged_tokenizer_is_one_line(tmp_path, name, content, message):
    save_sentencepiece(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as refusal:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refusal.value)
