"""Which nodes are called bad, and why. Not covered: nvidia-smi itself; tests/slurm runs the check on real nodes."""

from typing import Any

from megatron_fipo.launch.node_check import judge


def node(gpus: int = 8, driver: str = "550.1", torch: str = "2.13.0", errors: str = "0") -> dict[str, Any]:
    gpu = {"name": "H100", "driver": driver, "errors": errors}
    return {"gpus": [gpu] * gpus, "python": "3.11.9", "packages": {"torch": torch}}


def test_alike_nodes_are_good() -> None:
    assert judge({"a": node(), "b": node(), "c": node(errors="[N/A]")}, 8) == {}
    assert judge({"a": node(gpus=0), "b": node(gpus=0)}, 8) == {}, "a cluster without GPUs"


def test_each_bad_node_is_named_with_its_reason() -> None:
    bad = judge(
        {
            "good1": node(),
            "good2": node(),
            "good3": node(),
            "mute": None,
            "short": node(gpus=7),
            "broken": node(errors="3"),
            "old": node(driver="470.2"),
            "other": node(torch="2.12.0"),
        },
        8,
    )
    assert bad.keys() == {"mute", "short", "broken", "old", "other"}
    assert "shared storage" in bad["mute"]
    assert bad["short"] == "has 7 GPUs, not 8"
    assert "uncorrected memory errors" in bad["broken"]
    assert "470.2" in bad["old"] and "550.1" in bad["old"]
    assert "2.12.0" in bad["other"]
