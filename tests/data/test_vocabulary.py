"""Why: an id outside the embedding raises an error in one layout, and trains on another rank's rows in another."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.data.column_sums import EOS_ID, write_tokenizer
from megatron_fipo.data.tokenizers import load_tokenizer
from megatron_fipo.data.vocabulary import check_vocabulary, outside
from megatron_fipo.errors import ConfigError

SIZE = 38


def check(directory: Path, vocab_size: int, **files: dict[str, Any]) -> None:
    write_tokenizer(directory)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(directory)
    check_vocabulary(directory, tokenizer.size, tokenizer.ends, vocab_size)


def test_a_tokenizer_that_fits_is_accepted(tmp_path: Path) -> None:
    check(tmp_path, SIZE)
    check(tmp_path, SIZE + 100, config={"eos_token_id": [EOS_ID, SIZE + 99]})


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_sizes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.path: .*tokenizer has {SIZE} token ids.* only {SIZE - 1}"):
        check(tmp_path, SIZE - 1)


@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_an_end_token_outside_the_embedding_is_refused_with_its_file(tmp_path: Path, file: str) -> None:
    with pytest.raises(ConfigError, match=rf"end-of-sequence id {SIZE} of {file}\.json is outside the model's {SIZE}"):
        check(tmp_path, SIZE, **{file: {"eos_token_id": [EOS_ID, SIZE]}})


def test_the_tokenizers_own_end_token_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"end-of-sequence id {EOS_ID} of the tokenizer is outside"):
        check(tmp_path, EOS_ID)


def test_ids_outside() -> None:
    assert outside([0, 5, 37], SIZE) is None
    assert outside([], SIZE) is None
    assert outside([3, 38, 5], SIZE) == 38
    assert outside([3, -1], SIZE) == -1
