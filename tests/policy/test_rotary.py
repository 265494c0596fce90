"""The rotary embedding over the whole context, and the probes that tell which kind of layer is another one.

Why: a wrong base or stretching is nearly right between tokens that are close, so that short tests and short runs pass.
The positions here reach the end of a context of 131,072, in sequences of a dozen tokens. Does not cover Transformer
Engine's fused rotation, which takes its angles from the same module.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.policy.rotary import probe_positions
from tests.distributed import run_ranks
from tests.weights.models import LLAMA3_ROPE, SmallModel, write_model

CONTEXT = 131072
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1000000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": LLAMA3_ROPE,
    "llama3, other constants": LLAMA3_ROPE
    | {"low_freq_factor": 2.0, "high_freq_factor": 5.0, "original_max_position_embeddings": 4096},
}
NAMED = {
    "stretched": ("the whole context", "layer 0", "the rotary embedding's stretching"),
    "other base": ("the first positions", "layer 0", "rotary embedding's base"),
    "other query norm": ("the first positions", "layer 1", "query and key projections, their norms"),
    "other epsilon": ("one token", "layer 2", "norm"),
    "other embedding": ("one token", "the embedding", "embedding"),
    "other output": ("one token", "output layer", "output layer"),
}
"""What is changed in a built model: the first probe that fails, the first layer that differs, what is suspected."""


def small(directory: Path, name: str, rope: dict[str, Any], kind: str = "Llama") -> str:
    extra = {"rope_parameters": rope, "max_position_embeddings": CONTEXT, "head_dim": 16}
    return str(write_model(SmallModel(name, kind, heads=4, groups=2, vocab=61, tied=False, extra=extra), directory))


def refused_by_transformers(directory: str) -> str:
    refused = f"{directory}-refused"
    shutil.copytree(directory, refused)
    config = json.loads(Path(refused, "config.json").read_text())
    Path(refused, "config.json").write_text(json.dumps(config | {"use_cache": "perhaps"}))
    assert read_architecture(refused) == read_architecture(directory), "the key changes nothing that we compute"
    return refused


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("models")
    right = {name: small(directory, name, rope) for name, rope in KINDS.items()}
    spoilt = small(directory, "qwen3", KINDS["default"], "Qwen3")
    refused = refused_by_transformers(spoilt)
    arguments = {"right": right, "spoilt": dict.fromkeys(NAMED, spoilt), "refused": refused, "context": CONTEXT}
    return run_ranks("tests.policy.rotary_ranks:compare", 1, arguments, timeout=200)[0]


def test_positions_reach_over_the_whole_context(tmp_path: Path) -> None:
    model_config = read_architecture(small(tmp_path, "llama3", LLAMA3_ROPE))
    found = probe_positions(model_config, CONTEXT)
    assert {0, 1, 8191, 8192, 8193, CONTEXT - 1} <= set(found) and len(found) < 20
    assert probe_positions(model_config, 3) == [0, 1, 2]
    assert probe_positions(model_config, 2 * CONTEXT)[-1] == 2 * CONTEXT - 1, "raised by the configuration"


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_logits_and_angles_agree_over_the_whole_context(found: dict[str, Any], name: str) -> None:
    """Every bit of the frequencies is transformers', and logits are equal within 1e-4 of the largest."""
    start, probe, same_frequencies = found[name]
    assert (start, probe) == ("", "") and same_frequencies


@pytest.mark.slow
@pytest.mark.parametrize("change", NAMED)
def test_what_is_another_model_is_named(found: dict[str, Any], change: str) -> None:
    """Negative controls of the probes."""
    probe, layer, suspect = NAMED[change]
    pattern = f"logits of a probe of {probe} differ by .*, values from {layer} on; suspected: .*{suspect}"
    assert re.search(pattern, found[change][1]), found[change][1]


@pytest.mark.slow
@pytest.mark.parametrize("change", NAMED)
def test_the_start_of_a_run_notices_another_rotary_embedding(found: dict[str, Any], change: str) -> None:
    """And nothing else, since it costs a moment and no forward pass."""
    start = found[change][0]
    if change in ("stretched", "other base"):
        assert re.search(r"the rotary embedding turns pair \d+ at position \d+ by \S+ radians, \S+ in tr", start), start
    else:
        assert start == ""


@pytest.mark.slow
def test_other_ways_of_rotating_are_noticed(found: dict[str, Any]) -> None:
    assert "turns 8 pairs of a head's values, 4 in transformers" in found["fewer pairs"]
    assert "has a factor of 1.2 on its cosines in transformers" in found["a factor"]


@pytest.mark.slow
def test_what_transformers_refuses_is_one_line(found: dict[str, Any]) -> None:
    assert re.search(r"transformers refuses .*config\.json: .*use_cache", found["refused"])
    assert "\n" not in found["refused"]


@pytest.mark.slow
def test_every_rank_raises_what_one_rank_finds(tmp_path: Path) -> None:
    """Or the others would wait for it in the next collective."""
    directory = small(tmp_path, "model", KINDS["default"])
    arguments = {"directory": directory, "refused": refused_by_transformers(directory), "context": CONTEXT}
    first, second = run_ranks("tests.policy.rotary_ranks:spoil_last_rank", 2, arguments)
    assert first == second and "the rotary embedding turns pair" in first[0] and "use_cache" in first[1]
