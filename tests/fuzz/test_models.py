"""Why: a model directory comes from elsewhere, half downloaded or edited by hand. A run that starts from it reads what
the directory says, or names the file in one line; never a traceback, a hang or less than all weights.

Files are spoilt one at a time: as JSON, as bytes, or with something else in their place. Not covered: what servers make
of such a directory, and tensors whose values are wrong, which no format shows.
"""

import json
import random
import shutil
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.config.model_config import read_architecture
from megatron_fipo.data.column_sums import write_tokenizer
from megatron_fipo.data.tokenizers import load_tokenizer
from megatron_fipo.data.vocabulary import check_vocabulary
from megatron_fipo.errors import FipoError, WeightError
from megatron_fipo.weights.architectures import parameters
from megatron_fipo.weights.source import check_source, open_source
from megatron_fipo.weights.transformers_model import transformers_config
from tests.config.test_model_config import VALUES as CONFIG_VALUES
from tests.data.test_tokenizers import TEMPLATE, save_byte_tokenizer
from tests.fuzz.budget import cases, one_case
from tests.fuzz.mutators import mutate, spoil_file, spoil_json
from tests.weights.models import SmallModel, write_model

pytestmark = pytest.mark.slow

HEADER_VALUES: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1,
        4,
        2**31,
        2**63,
        2**64,
        10**30,
        0.5,
        "",
        "F32",
        "F16",
        "BF16",
        "F8_E4M3",
        "I64",
        "BOOL",
        "x",
    ),
    *(
        [],
        [0],
        [1, 1],
        [-1, 4],
        [2**40, 2**40],
        [0, 0],
        [0, 4],
        [4, 0],
        [2**63, 2**64],
        {},
        {"a": "b"},
        {"dtype": "F32"},
    ),
]
TOKEN_VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 257, 10**6, 2**31, 2**40, 10**30, 0.5, "", "x", "<s>", "</s>", "BPE", "Unigram"),
    *(
        "WordLevel",
        "\ud800",
        "\x00",
        "(?<!a",
        "[" * 500,
        "{{",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ messages * 100000 }}",
        "x" * 9999,
    ),
    *([], [[]], [0], ["<s>"], {}, {"type": "x"}, {"content": "<s>"}, {"type": "Replace", "pattern": {"Regex": "("}}),
    *({"type": "Sequence", "normalizers": []}, {"type": "ByteLevel"}, {"type": "Split", "pattern": {"Regex": "(a"}}),
]
NAMES = ["", "x", "dtype", "content", "type", "__metadata__", "model.norm.weight", "lm_head.weight", "eos_token", "id"]


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


def loaded(directory: Path) -> tuple[dict[str, torch.Tensor], list[int]]:
    """What a run reads of a model directory at its start, in its order: all weights, and the tokens of a prompt."""
    geometry = read_architecture(directory)
    tokenizer = load_tokenizer(directory)
    check_vocabulary(directory, tokenizer.size, tokenizer.ends, geometry.vocab_size)
    prompt = tokenizer.encode(tokenizer.render([{"role": "user", "content": "1+2=?"}]))
    tokenizer.decode([*prompt, 0, geometry.vocab_size - 1, geometry.vocab_size + 5])
    check_source(directory, geometry)
    transformers_config(directory)
    tensors: dict[str, torch.Tensor] = {}
    with open_source(directory) as reader:
        for parameter in parameters(geometry).values():
            for name, part in zip(
                parameter.names, reader.sources(parameter) if parameter.exported else (), strict=False
            ):
                tensors[name] = part[...] if isinstance(part, torch.Tensor) else part[:]
    return tensors, prompt


def outcome(directory: Path) -> str:
    """ "refused", naming a file of the directory or a tensor, or "read" whole."""
    try:
        tensors, prompt = loaded(directory)
    except FipoError as error:
        lines = str(error).splitlines()
        # Several tensors are a list of them.
        assert len(lines) == 1 or isinstance(error, WeightError), lines
        assert all(len(line) < 1200 and line.isprintable() for line in lines), lines
        assert directory.name in str(error), lines
        return "refused"
    assert all(type(token) is int and token >= 0 for token in prompt)
    assert len(tensors) > 30 and all(tensor.dtype.is_floating_point for tensor in tensors.values())
    return "read"


def spoil_header(rng: random.Random, path: Path) -> str:
    """Change the JSON header of a safetensors file, or the length before it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    if rng.random() < 0.15:
        path.write_bytes(
            struct.pack("<Q", rng.choice([0, 1, 7, length - 1, length + 1, 10**8, 2**63, 2**64 - 1])) + content[8:]
        )
        return f"{path.name}: another length"
    mutate(rng, header, HEADER_VALUES, NAMES)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = text[:-1] + b"," + text[1:]  # every key twice
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return f"{path.name}: {text[:1000]!r}"


def spoil(rng: random.Random, directory: Path) -> str:
    """Spoil one file of a model directory; what was done."""
    path = rng.choice(sorted(directory.iterdir()))
    if path.suffix == ".safetensors":
        return (spoil_header if rng.random() < 0.7 else spoil_file)(rng, path)
    if path.name == "config.json":
        return spoil_json(rng, path, CONFIG_VALUES, NAMES)
    if path.suffix == ".json":
        values = [*TOKEN_VALUES, *(other.name for other in directory.iterdir()), "../x", "/etc/passwd"]
        return spoil_json(rng, path, values, NAMES)
    return spoil_file(rng, path)


@cases(seeded=300, campaign=3000)
def test_spoilt_model_directories_are_read_or_refused(
    rng: random.Random, count: int, sound: list[Path], tmp_path: Path
) -> None:
    outcomes: Counter[str] = Counter()
    for directory in sound:
        assert outcome(directory) == "read", "the control"
    for number in range(count):
        directory = tmp_path / f"spoilt-{number}"
        shutil.copytree(rng.choice(sound), directory)
        with one_case(spoil(rng, directory)):
            outcomes[outcome(directory)] += 1
        shutil.rmtree(directory)
    assert outcomes["refused"] > count / 3 and outcomes["read"] > count / 20, outcomes
