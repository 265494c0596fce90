"""Hugging Face → Megatron → Hugging Face on real models and real ranks: the mapping, the offsets and the collectives.

Small random models of every architecture, in every layout of four gloo processes; transformers' logits and mbridge's
mapping are the oracles. Does not cover Transformer Engine's parameters (no GPU here; models/test_parameters.py covers
their names), NCCL, or the way to vLLM.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_fipo.weights.conversion import to_megatron
from tests.distributed import run_ranks
from tests.weights.models import MOE_MODELS, SMALL_MODELS, write_model

pytestmark = pytest.mark.slow

Layouts = list[tuple[int | None, ...]]
"""Tensor, pipeline and virtual pipeline size."""
ONE_OF_EACH = ("qwen2-tied", "qwen3-untied", "llama3-tied")
ON_FOUR: Layouts = [(1, 1, None), (2, 1, None), (4, 1, None), (1, 2, None), (2, 2, None), (1, 4, None), (1, 2, 2)]
ON_EIGHT: Layouts = [(4, 2, None), (2, 4, None), (4, 2, 2)]
ON_SIXTEEN: Layouts = [(4, 4, None)]
KNOWN_TO_MBRIDGE = ("qwen2-untied", "qwen3-untied", "llama-untied", "llama-two-groups")


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {model.name: write_model(model, directory) for model in SMALL_MODELS}


EXPERT_LAYOUTS: Layouts = [(1, 1, None, 2, 1), (2, 1, None, 2, 2), (2, 2, 2, 2, 1)]
"""With the experts' two sizes too, of four ranks."""
MORE_EXPERT_LAYOUTS: Layouts = [
    (1, 1, None),
    (2, 1, None, 2, 1),
    (2, 1, None, 1, 2),
    (2, 1, None, 1, 1),
    (1, 2, None, 2, 1),
]


ONE_OF_EACH_MOE = ("qwen3-moe-dense-between", "qwen2-moe", "mixtral-tied")


@pytest.mark.parametrize(
    ("layouts", "names"),
    [
        (EXPERT_LAYOUTS, ONE_OF_EACH_MOE),
        pytest.param(
            EXPERT_LAYOUTS + MORE_EXPERT_LAYOUTS, [model.name for model in MOE_MODELS], marks=pytest.mark.matrix
        ),
    ],
    ids=["experts", "more experts"],
)
def test_experts_go_there_and_back_over_expert_parallel_ranks(
    tmp_path: Path, layouts: list[tuple[int | None, ...]], names: Sequence[str]
) -> None:
    """Each expert is on one expert-parallel rank, whole or cut; the logits are transformers'."""
    models = [model for model in MOE_MODELS if model.name in names]
    model_dirs = {model.name: write_model(model, tmp_path / "models") for model in models}
    _go_there_and_back(model_dirs, tmp_path, 4, layouts)


@pytest.mark.parametrize(
    ("ranks", "layouts", "names"),
    [
        (4, [(2, 2, 2)], [model.name for model in SMALL_MODELS]),
        (8, ON_EIGHT, ONE_OF_EACH),
        pytest.param(4, ON_FOUR, [model.name for model in SMALL_MODELS], marks=pytest.mark.matrix),
        pytest.param(16, ON_SIXTEEN, ONE_OF_EACH, marks=pytest.mark.matrix),
    ],
)
def test_round_trip_is_exact_and_logits_are_those_of_transformers(
    model_dirs: dict[str, Path], tmp_path: Path, ranks: int, layouts: Layouts, names: Sequence[str]
) -> None:
    _go_there_and_back({name: model_dirs[name] for name in names}, tmp_path, ranks, layouts)


def _go_there_and_back(
    model_dirs: dict[str, Path], tmp_path: Path, ranks: int, layouts: list[tuple[int | None, ...]]
) -> None:
    checkpoints = {name: str(tmp_path / "checkpoints" / name) for name in model_dirs}
    (tmp_path / "checkpoints").mkdir()
    for name, model_dir in model_dirs.items():
        to_megatron(model_dir, Path(checkpoints[name]))
    arguments: dict[str, Any] = {
        "model_dirs": list(map(str, model_dirs.values())),
        "layouts": layouts,
        "target": str(tmp_path),
    }
    arguments["checkpoints"] = checkpoints
    by_rank = run_ranks("tests.weights.ranks:round_trips", ranks, arguments, timeout=300)
    runs = by_rank[0]
    # Two key-value groups do not go on four ranks; all else runs.
    splits_groups = "llama-two-groups" in model_dirs and (4, 1, None) in layouts
    assert len(runs) == len(layouts) * len(model_dirs) - splits_groups
    for run in runs:
        seen = [rank[run] for rank in by_rank]
        assert all(rank["planned"] and rank["announced"] for rank in seen), run
        assert not any(rank["unlike checkpoint"] for rank in seen), run
        errors = [rank["logits"] for rank in seen if rank["logits"] is not None]
        assert errors and max(errors) < (0.5 if "bfloat16" in run else 1e-4), run
        source = model_dirs[max((name for name in model_dirs if run.startswith(name + "-")), key=len)]
        assert_same_tensors(source, tmp_path / run)


def assert_same_tensors(source: Path, target: Path) -> None:
    """Bit for bit, names and types included; and the files beside them."""
    expected = load_file(source / "model.safetensors")
    files = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: tensor for file in sorted(set(files.values())) for name, tensor in load_file(target / file).items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), f"{target.name}: {name}"
    for name in ("config.json", "generation_config.json"):
        assert json.loads((target / name).read_text()) == json.loads((source / name).read_text())


def test_mbridge_maps_alike(model_dirs: dict[str, Path]) -> None:
    pytest.importorskip("mbridge")
    arguments = {"model_dirs": [str(path) for name, path in model_dirs.items() if name in KNOWN_TO_MBRIDGE]}
    (differences,) = run_ranks("tests.weights.ranks:differences_from_mbridge", 1, arguments, timeout=90)
    assert differences == {name: [] for name in KNOWN_TO_MBRIDGE}


def damaged(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> str:
    """A copy of a model with its tensors changed."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return str(target)


def test_what_does_not_fit_is_named_on_every_rank(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    good = model_dirs["qwen2-tied"]
    norm, down, bias = (
        "model.norm.weight",
        "model.layers.3.mlp.down_proj.weight",
        "model.layers.2.self_attn.k_proj.bias",
    )
    embedding = "model.embed_tokens.weight"

    def several(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[norm]
        tensors["model.layers.4.input_layernorm.weight"] = torch.zeros(48)
        tensors[down] = tensors[down].T.contiguous()

    def not_numbers(tensors: dict[str, torch.Tensor]) -> None:
        tensors[norm][5] = torch.nan
        tensors[bias][:] = torch.inf
        tensors[embedding][60, :3] = -torch.inf

    changes: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
        "several": several,
        "not numbers": not_numbers,
        "tied twice": lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}),
        "tied but different": lambda tensors: tensors.update({"lm_head.weight": tensors[embedding] + 1}),
        "old buffers": lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}),
    }
    dirs = {name: damaged(good, tmp_path / name, change) for name, change in changes.items()}
    dirs |= {"good": str(good), "other node": str(good), "other model": str(model_dirs["llama-untied"])}
    arguments = {"model_dirs": dirs, "second_rank": {"other node": str(tmp_path / "absent")}, "target": str(tmp_path)}
    first, second = run_ranks("tests.weights.ranks:errors", 2, arguments, timeout=120)

    raised = first.keys() - {"not numbers"}
    assert all(first[case] == second[case] for case in raised), "every rank raises the same"
    assert all(first[case] == "" for case in ("good", "tied twice", "old buffers"))
    several_lines = first["several"].splitlines()
    assert several_lines[0] == "3 problems with the weights:"
    assert f"  {norm}: missing from {dirs['several']}; expected shape (48,)" in several_lines
    assert f"  {down}: (80, 48) in {dirs['several']}, (48, 80) by its config.json" in several_lines
    assert "model.layers.4.input_layernorm.weight: left over" in first["several"]
    assert "it differs from model.embed_tokens.weight" in first["tied but different"]
    assert "absent has neither" in first["other node"] and first["other node"].endswith("(rank 1)")
    assert f"{bias}: missing" in first["other model"] and "it differs from" in first["other model"]
    width = load_file(good / "model.safetensors")[bias].numel()
    assert first["not numbers"].startswith(f"{1 + width + 3} NaN or infinite values in the loaded weights")
    assert f"1 in {norm}" in first["not numbers"] and f"3 in {embedding}" in first["not numbers"]
    assert "decoder.layers.0.mlp.linear_fc1.weight: twice on pipeline stage 0" in first["layer twice"]
    assert "decoder.layers.1.mlp.linear_fc1.weight: on no rank" in first["layer twice"]
    assert "decoder.layers.0.self_attention.extra: in the Megatron model, but no rule" in first["unknown parameter"]
    assert "exists and is not empty" in first["target not empty"]
    assert "occupied/file/target could not be written: [Errno 20] Not a directory" in first["target not writable"]
    assert "half could not be written" in first["no config.json"]
    assert "half full could not be written: [Errno 27] File too large" in first["disk full"]
    assert not list(tmp_path.glob("*half*")) and not list(tmp_path.glob(".half*")), "nothing half-written is left"
