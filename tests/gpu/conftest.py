"""What the GPU tests skip by name."""

import importlib.util

import pytest


@pytest.fixture
def transformer_engine() -> None:
    """Skips a test where Transformer Engine is not installed."""
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed: its layers and FP8 are not covered")
