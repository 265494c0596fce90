"""A directory that holds no model, or one that a run would misread, is refused in one line.

Why: a quantised model or an adapter alone loads as another model than the one meant. Keys of config.json:
test_model_config.py.
"""

from pathlib import Path

import pytest

from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import QUANTIZATION_FILES, read_architecture
from tests.models.small_configs import MODELS, judge, read


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[]", "is not JSON of the right kind"),
        (b"[" * 200_000, "is nested too deeply"),
        (b'{"vocab_size": 5, "vocab_size": 6}', "vocab_size is there twice"),
        (b'{"architectures": ["Qwen2ForCausalLM"]}', "hidden_size is missing"),
        (b" " * (9 << 20), "has more than 8 MiB"),
        (b'{"architectures": [' + b"[" * 900 + b"]" * 900 + b"]}", "hidden_size is missing"),
        (b'{"x": ' + b"9" * 5000 + b"}", "architectures is missing"),
    ],
)
def test_what_is_no_config_json_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        read_architecture(tmp_path)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_directory_without_config_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        read_architecture(tmp_path)


@pytest.mark.parametrize("name", QUANTIZATION_FILES)
def test_quantised_directories_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"is quantised: it holds {name}"):
        read(tmp_path, MODELS["qwen2"])


def test_a_directory_with_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds adapter_config\.json"):
        read(tmp_path, MODELS["qwen2"])


@pytest.mark.parametrize("method", ["fp8", "awq", "gptq", "bitsandbytes", "compressed-tensors", "mxfp4"])
def test_a_quantisation_config_is_refused(tmp_path: Path, method: str) -> None:
    refusal = judge(tmp_path, MODELS["qwen2"] | {"quantization_config": {"quant_method": method}})
    assert refusal is not None and "quantization_config" in str(refusal) and "quantised" in str(refusal)
