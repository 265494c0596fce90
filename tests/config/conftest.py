"""Files that a configuration can name."""

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def model_directory(tmp_path: Path):
    """Write a config.json, by default with the sizes of Qwen2.5-0.5B, and return the override that names it."""

    def write(**changes: Any) -> str:
        architecture = {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "vocab_size": 151936,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "num_hidden_layers": 24,
            "max_position_embeddings": 32768,
            **changes,
        }
        (tmp_path / "config.json").write_text(json.dumps(architecture))
        return f"model.path={tmp_path}"

    return write


@pytest.fixture
def tiny_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Return overrides for problem files that exist, so that later checks are reached."""
    path = tmp_path / "problems.jsonl"
    path.touch()
    return [f"data.train=[{path}]", f"data.validation=[{path}]"]
