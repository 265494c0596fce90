"""Sound model directories, to be copied and spoilt."""

import shutil
from pathlib import Path

import pytest

from megatron_fipo.data.column_sums import write_tokenizer
from tests.data.test_tokenizers import TEMPLATE, save_byte_tokenizer
from tests.weights.models import SmallModel, write_model


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model in one file with a tokenizer.json, and one in shards with a sentencepiece model."""
    directory = tmp_path_factory.mktemp("sound")
    one, shards = (
        write_model(SmallModel(name, kind, heads=4, groups=2, vocab=320, tied=tied), directory)
        for name, kind, tied in (("one-file", "Qwen2", True), ("shards", "Llama", False))
    )
    save_byte_tokenizer(one, TEMPLATE)
    write_tokenizer(shards)
    _in_shards(shards)
    for path in (one, shards):
        shutil.rmtree(path / "reference")
    return [one, shards]


def _in_shards(directory: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="150KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
