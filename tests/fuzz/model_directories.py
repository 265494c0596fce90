"""Reads a model directory as the start of a run does, and spoils one."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import torch

from megatron_fipo.data.tokenizers import load_tokenizer
from megatron_fipo.data.vocabulary import check_vocabulary
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.models.parameters import parameters
from megatron_fipo.weights.source import check_source, open_source
from megatron_fipo.weights.transformers_model import transformers_config
from tests.fuzz.mutators import mutate, spoil_file, spoil_json
from tests.models.test_model_config import VALUES as CONFIG_VALUES

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


def loaded(directory: Path) -> tuple[dict[str, torch.Tensor], list[int]]:
    """What a run reads of a model directory at its start, in its order: all weights, and the tokens of a prompt."""
    model_config = read_architecture(directory)
    tokenizer = load_tokenizer(directory)
    check_vocabulary(directory, tokenizer.size, tokenizer.ends, model_config.vocab_size)
    prompt = tokenizer.encode(tokenizer.render([{"role": "user", "content": "1+2=?"}]))
    tokenizer.decode([*prompt, 0, model_config.vocab_size - 1, model_config.vocab_size + 5])
    check_source(directory, model_config)
    transformers_config(directory)
    tensors: dict[str, torch.Tensor] = {}
    with open_source(directory) as reader:
        for parameter in parameters(model_config).values():
            for name, part in zip(
                parameter.names, reader.sources(parameter) if parameter.exported else (), strict=False
            ):
                tensors[name] = part[...] if isinstance(part, torch.Tensor) else part[:]
    return tensors, prompt


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
