"""What the GPU tests need by name, and the list of what was not covered at the end.

`make test-gpu` and `python -m pytest tests/gpu` need a CUDA device and torch; a test of something that is not
installed is skipped with the name of what is missing.
"""

import importlib.metadata
import importlib.util
from typing import Any

import pytest

HERE = "tests/gpu/"


def _skip_without(module: str, name: str, consequence: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{name} is not installed: {consequence}")


@pytest.fixture
def transformer_engine() -> None:
    """Skips a test where Transformer Engine is not installed."""
    _skip_without("transformer_engine", "Transformer Engine", "its layers and FP8 are not covered")


@pytest.fixture
def triton() -> None:
    """Skips a test where triton is not installed, which torch for CUDA asks for."""
    _skip_without("triton", "triton", "the credit's kernel is not covered, nor is an update with FIPO's loss")


@pytest.fixture
def vllm_on_gpu() -> None:
    """Skips a test where vLLM's CUDA build is not installed; the CPU build goes by another name."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vLLM's CUDA build is not installed: sampling on a GPU and weight updates to it are not covered")


@pytest.fixture
def two_gpus() -> None:
    """Skips a test where there is only one GPU."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs: nothing between GPUs is covered, NCCL least of all")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was not covered, and what was used where there is a choice."""
    reports = [report for report in terminalreporter.getreports("skipped") if report.nodeid.startswith(HERE)]
    reasons: dict[str, list[str]] = {}
    for report in reports:
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "skipped"
        reasons.setdefault(reason, []).append(report.nodeid.removeprefix(HERE))
    ran = any(report.nodeid.startswith(HERE) for report in terminalreporter.getreports("passed"))
    if ran:
        from megatron_fipo.policy import platform

        platform.install()
        reasons[f"optimizers but {platform.adam_name()}, which a run takes here"] = ["test_policy.py"]
    if not reasons:
        return
    terminalreporter.section("not covered by tests/gpu")
    for reason, tests in reasons.items():
        terminalreporter.write_line(
            f"{reason} ({len(tests)} × {tests[0]} …)" if len(tests) > 1 else f"{reason} ({tests[0]})"
        )
