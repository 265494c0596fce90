"""Every key of config.json is changed, and the result compared with transformers: refused in one line, or the same.

Why: if a key is ignored, another model than the given one is trained without any error. A size that is not checked ends
in a traceback, or takes all memory. Not covered: that the built model computes the same as transformers'
(tests/policy/test_rotary.py and tests/weights/test_reshard.py).
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_fipo.models.families import FAMILIES
from megatron_fipo.models.keys import HARMLESS, HARMLESS_KEYS, REFUSED, UNDERSTOOD
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.models.rope import LinearScaling, Llama3Scaling
from tests.config.published import (
    GEMMA_7B,
    LLAMA3,
    LLAMA_31_8B,
    MISTRAL_7B,
    MISTRAL_NEMO,
    MIXTRAL_8X7B,
    QWEN3_8B,
    QWEN3_30B_A3B,
    QWEN3_235B_A22B,
    QWEN15_MOE,
    QWEN25_32B,
    SMOLLM2,
    TRANSFORMERS_4,
)
from tests.models.small_configs import MODELS, judge, read, transformers_model_config

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, 4, -1, 10**6, 10**12, 10**40),
    *(0.0, 1.0, 1.5, 4.0, 1e-6, -1e-6, math.nan, math.inf, 1e300),
    *("", "4", "silu", "gelu", "gelu_pytorch_tanh", "bfloat16", "int8", "x\ny", "\ud800", "qwen2", "rope"),
    *([], [4], ["full_attention"], ["full_attention", "sliding_attention"], ["full_attention"] * 2),
    *(["Qwen2ForCausalLM"], ["LlamaForCausalLM", "Qwen2ForCausalLM"], "Qwen2ForCausalLM", [[]]),
    *({}, {"rope_type": "default"}, {"quant_method": "fp8"}, {"a": {"b": [1]}}),
)
UNKNOWN = ("a_new_kind_of_attention", "num_hidden_layer", "", "line\nbreak")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "qwen2",
        "qwen3_moe",
        *(pytest.param(name, marks=pytest.mark.matrix) for name in MODELS if name not in ("qwen2", "qwen3_moe")),
    ],
)
def test_every_key_with_every_value_is_refused_or_right(tmp_path: Path, name: str) -> None:
    """About 4,000 files per model. The unchanged file is accepted, so not everything is refused."""
    assert judge(tmp_path, MODELS[name]) is None
    accepted = []
    own = FAMILIES[MODELS[name]["architectures"][0]].keys
    for key in {*UNDERSTOOD, *REFUSED, *own, *UNKNOWN}:
        for value in VALUES:
            refusal = judge(tmp_path, MODELS[name] | {key: value})
            if refusal is None:
                accepted.append(key)
            else:
                assert key in str(refusal) or json.dumps(key) in str(refusal), (key, value, refusal)
    assert not set(accepted) & set(UNKNOWN)
    assert {"num_hidden_layers", "vocab_size", "rms_norm_eps", "eos_token_id", "quantization_config"} <= set(accepted)


@pytest.mark.parametrize("name", MODELS)
def test_a_key_that_is_missing_is_refused_or_defaults_as_in_transformers(tmp_path: Path, name: str) -> None:
    for key in MODELS[name]:
        refusal = judge(tmp_path, {other: value for other, value in MODELS[name].items() if other != key})
        assert refusal is None or key in str(refusal)


ROPE_KEYS: dict[str, tuple[Any, ...]] = {
    "rope_type": ("default", "linear", "llama3", "dynamic", "yarn", "longrope", "proportional", "mrope", 7, None),
    "type": ("default", "linear", "llama3", "mrope"),
    "rope_theta": (10000.0, 500000.0, 0, "1e4", None),
    "factor": (1.0, 2.0, 8, 0.5, "2", None, True),
    "low_freq_factor": (1.0, 2.0, 0),
    "high_freq_factor": (4.0, 1.0),
    "original_max_position_embeddings": (64, 8192, 8192.0, 0),
    "partial_rotary_factor": (1.0, 0.5, 1, True),
    "mrope_section": ([16, 24, 24],),
    "attention_factor": (1.0,),
    "full_attention": ({"rope_type": "default"},),
}
OUTER = {
    "rope_theta": (10000.0, 500000.0),
    "original_max_position_embeddings": (64, 8192),
    "partial_rotary_factor": (1.0, 0.5),
}


def some_of(keys: dict[str, tuple[Any, ...]], likely: tuple[str, ...] = ()) -> st.SearchStrategy[dict[str, Any]]:
    choices = {key: st.sampled_from(values) for key, values in keys.items()}
    needed = {key: choices.pop(key) for key in likely}
    return st.fixed_dictionaries(needed, optional=choices)


VALID = st.one_of(
    st.just({"rope_type": "default"}),
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": st.sampled_from([2.0, 4])}),
    st.just(LLAMA3),
    st.just({key: value for key, value in LLAMA3.items() if not key.startswith("original")}),
)
CHANGED = st.builds(
    lambda valid, changes: {**valid, **changes},
    VALID,
    st.one_of(st.just({}), some_of({key: ROPE_KEYS[key] for key in ("rope_theta", "partial_rotary_factor")})),
)
ROPE = st.one_of(CHANGED, some_of(ROPE_KEYS), st.sampled_from([None, {}, 7, []]))


@settings(deadline=None, max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(MODELS)),
    places=st.fixed_dictionaries({}, optional={"rope_parameters": ROPE, "rope_scaling": ROPE}),
    outer=some_of(OUTER),
)
def test_rotary_keys_in_any_place_are_refused_or_right(
    tmp_path: Path, name: str, places: dict[str, Any], outer: dict[str, Any]
) -> None:
    plain = {key: value for key, value in MODELS[name].items() if "rope" not in key}
    judge(tmp_path, plain | places | outer)


@pytest.mark.parametrize(
    ("changes", "scaling", "theta"),
    [
        ({"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}, Llama3Scaling(8.0, 1.0, 4.0, 8192), 500000.0),
        ({"rope_scaling": LLAMA3, "rope_theta": 500000}, Llama3Scaling(8.0, 1.0, 4.0, 8192), 500000.0),
        ({"rope_scaling": LLAMA3, "rope_parameters": LLAMA3}, Llama3Scaling(8.0, 1.0, 4.0, 8192), 10000.0),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, LinearScaling(2.0), 10000.0),
        ({"rope_scaling": None, "rope_theta": 5e6}, None, 5e6),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 8192}, Llama3Scaling(8, 1, 4, 8192), 1e4),
    ],
)
def test_the_places_that_agree_are_read(tmp_path: Path, changes: dict[str, Any], scaling: Any, theta: float) -> None:
    plain = {key: value for key, value in MODELS["llama"].items() if "rope" not in key}
    found = read(tmp_path, plain | changes)
    assert (found.rope_scaling, found.rope_theta) == (scaling, theta)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3}, "rope_scaling.rope_type"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096}, "original_max_position_embeddings"),
        ({"original_max_position_embeddings": 64}, "original_max_position_embeddings"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 5e5}}, "rope_parameters.rope_theta"),
        # transformers follows rope_scaling, where the base is then 10000.
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_type": "default"}},
            "rope_scaling.rope_theta",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type"),
        ({"rope_parameters": 7}, "rope_parameters = 7"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
        ({"sliding_window": 4096}, "sliding_window"),
    ],
)
def test_rotary_keys_that_are_passed_over_elsewhere_are_named(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    plain = {key: value for key, value in MODELS["llama"].items() if "rope" not in key}
    refusal = judge(tmp_path, plain | changes)
    assert refusal is not None and named in str(refusal)


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("bos_token_id", [1], 1),
        ("attention_dropout", None, 0.5),
        ("initializer_range", 1, 0.02),
        ("activation", "gelu", "swiglu"),
    ],
)
def test_what_transformers_would_refuse_late_is_refused_at_once(
    tmp_path: Path, key: str, value: Any, right: Any
) -> None:
    """Falcon 3's key `activation` only repeats what a Llama does anyway."""
    refusal = judge(tmp_path, MODELS["llama"] | {key: value})
    assert refusal is not None and f"{key} = " in str(refusal)
    assert judge(tmp_path, MODELS["llama"] | {key: right}) is None


def test_every_key_is_in_one_list() -> None:
    listed = [*UNDERSTOOD, *REFUSED, *(key for keys in HARMLESS.values() for key in keys)]
    assert len(listed) == len(set(listed))
    assert {model["architectures"][0] for model in MODELS.values()} == FAMILIES.keys(), "each family is tried here"


@pytest.mark.parametrize(("window", "found"), [(8, 8), (None, None), ("lacking", 4096)])
def test_a_window_is_read_or_refused_by_its_name(tmp_path: Path, window: Any, found: int | None) -> None:
    """Mistral's default is 4096. In other families, a window would make it another model."""
    config = {key: value for key, value in MODELS["mistral"].items() if key != "sliding_window"}
    config |= {} if window == "lacking" else {"sliding_window": window}
    assert judge(tmp_path, config) is None and read_architecture(tmp_path).window == found
    for name in ("llama", "gemma"):
        refusal = judge(tmp_path, MODELS[name] | {"sliding_window": 8})
        assert refusal is not None and "sliding_window = 8 is not supported" in str(refusal)
    for name in ("qwen2", "qwen3"):
        refusal = judge(tmp_path, MODELS[name] | {"sliding_window": 8, "use_sliding_window": True})
        assert refusal is not None and "use_sliding_window = true is not supported" in str(refusal)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9 is more than num_experts = 8"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok = 1, and the only score is scaled to 1"),
        ({"mlp_only_layers": [0, 1]}, "mlp_only_layers = [0, 1] leaves none of num_hidden_layers = 2 with experts"),
        ({"decoder_sparse_step": 3}, "decoder_sparse_step = 3 leaves none of num_hidden_layers = 2 with experts"),
        ({"num_local_experts": 4}, "num_local_experts is 4, but num_experts is 8"),
        ({"n_shared_experts": 1}, "n_shared_experts = 1 is a key that is not known"),
    ],
)
def test_experts_that_cannot_be_are_refused_by_their_key(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    refusal = judge(tmp_path, MODELS["qwen3_moe"] | changes)
    assert refusal is not None and said in str(refusal)


def test_dense_families_refuse_experts(tmp_path: Path) -> None:
    refusal = judge(tmp_path, MODELS["qwen3"] | {"num_experts": 8})
    assert refusal is not None and "num_experts = 8 is not supported" in str(refusal)


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Llama", "Mistral", "Gemma", "Qwen3Moe", "Qwen2Moe", "Mixtral"])
def test_what_transformers_writes_is_accepted(tmp_path: Path, kind: str) -> None:
    """This tests all keys of transformers' dictionary, and the file that it saves."""
    found = getattr(transformers, f"{kind}Config")(architectures=[f"{kind}ForCausalLM"], eos_token_id=2)
    assert judge(tmp_path, found.to_dict()) is None
    found.save_pretrained(tmp_path)
    assert read_architecture(tmp_path) == transformers_model_config(found.to_dict())


def test_what_transformers_4_wrote_is_listed() -> None:
    known = {*UNDERSTOOD, *REFUSED, *HARMLESS_KEYS}
    assert [key for key in TRANSFORMERS_4 if key not in known] == []


@pytest.mark.parametrize(
    "config",
    [
        *(QWEN25_32B, QWEN3_8B, LLAMA_31_8B, SMOLLM2, MISTRAL_7B, MISTRAL_NEMO, GEMMA_7B),
        *(QWEN3_30B_A3B, QWEN3_235B_A22B, MIXTRAL_8X7B, QWEN15_MOE),
    ],
    ids=["qwen25", "qwen3", "llama", "smol", "mistral", "nemo", "gemma", "30b-a3b", "235b-a22b", "8x7b", "a2.7b"],
)
def test_published_models_are_accepted(tmp_path: Path, config: dict[str, Any]) -> None:
    """The contents of these models' own config.json, written by transformers 4."""
    assert judge(tmp_path, config) is None


@pytest.mark.parametrize("base", ["qwen3_moe", "another"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("topk_method", "noaux_tc"),
        ("use_routing_bias", True),
        ("use_expert_bias", True),
        ("moe_router_enable_expert_bias", True),
    ],
)
def test_routers_with_a_bias_of_their_own_are_refused_by_name(tmp_path: Path, base: str, key: str, value: Any) -> None:
    """In a family that is there, and in one that is not: the reason is told, not that some key is unknown."""
    other = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"} if base == "another" else {}
    refusal = judge(tmp_path, MODELS["qwen3_moe"] | other | {key: value})
    assert f"{key} = {json.dumps(value)}: a bias chooses this model's experts" in str(refusal)
    off = None if isinstance(value, str) else False
    assert "a bias" not in str(judge(tmp_path, MODELS["qwen3_moe"] | other | {key: off}))
