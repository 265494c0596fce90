"""What the tests of Transformer Engine's layers share, with a GPU (tests/gpu) and without (tests/te_on_cpu)."""

from typing import Any

from tests.distributed import run_ranks

BF16 = {"layers": "transformer_engine", "dtype": "bfloat16"}
EXACT = {"layers": "transformer_engine", "dtype": "float32"}
SMOOTH = "sapo"
"""FIPO's loss clips: where rounding takes a ratio over a threshold, a token's whole gradient comes or goes."""
UPDATES = 50


def on_one_rank(function: str, model: dict[str, Any], timeout: float = 300, **arguments: Any) -> Any:
    """What "package.module:function" returns on one rank."""
    (found,) = run_ranks(function, 1, {"model": model, "parallel": {}} | arguments, timeout)
    return found


def check_learns_alike(rounded: list[float], exact: list[float]) -> None:
    """Assert that FP8's losses, which rounding must have touched, are within 1 % of bf16's on average."""
    assert exact[-1] < 0.75 * exact[0], "there has to be something to learn"
    differences = [abs(ours - theirs) / theirs for ours, theirs in zip(rounded, exact, strict=True)]
    assert 0 < sum(differences) / len(exact) < 0.01, f"the worst is {max(differences):.3f}"


def check_near(layouts: list[dict[str, Any]], ranks: list[Any]) -> None:
    """Assert that what `updates_under` has returned is within bf16's or FP8's rounding of the reference."""
    for results in ranks:
        for layout, result in zip(layouts, results, strict=True):
            worst, whole = (0.4, 0.2) if "fp8" in layout["model"] else (0.1, 0.04)
            assert result["worst"] < worst, f"{layout}: {result['where']} is off by {result['worst']}"
            assert result["whole"] < whole, layout
