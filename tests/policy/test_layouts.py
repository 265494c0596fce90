"""One FIPO update under every layout against plain transformers on one process: the loss and every gradient.

Why: a wrong loss scale under context parallelism, an unmarked norm weight or a lost micro-batch all leave the loss
looking right; only gradients show them. Gradient norm, clipping and one Adam step are compared too: a norm that counts
one tensor-parallel rank alone leaves every gradient right. Two negative controls prove that the comparison would see
such a fault. The reference shares no code with it; its loss is the formulas, token by token (algorithm/plain.py).
FIPO runs in every layout, padded and packed; the other losses where sequences are cut, packed and spread over stages.
Qwen2 is the model of them all; families with other norms, activations and windows go through the layouts that cut them.

Not covered: bf16 and FP8, Transformer Engine layers (tests/te_on_cpu, tests/gpu).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_fipo.algorithm.losses import LossInputs
from tests.algorithm.plain import plain_loss
from tests.distributed import run_ranks
from tests.policy.expert_layouts import (
    CUT_OTHERWISE,
    EVERY_EXPERT_LAYOUT,
    EXPERT_LAYOUTS,
    MORE_MOVES,
    MOVES,
    REPLAYED,
    ROUTER_LOSSES,
    Moves,
)
from tests.policy.layouts import ALGORITHMS, FROM_ENGINE, OPTIMIZER, OVERLAPPED, REFERENCE_SCALE, WITH_ROUTER_LOSSES
from tests.policy.plain_routers import routed_experts, router_load, router_losses
from tests.weights.models import by_stored_names

pytestmark = pytest.mark.slow

ONE = [
    {},
    {"micro_batch_tokens": 10_000},
    {"packing": True},
    {"packing": True, "micro_batch_tokens": 10_000},
    {"model": {"recompute": "full"}},
    {"packing": True, "model": {"recompute": "full"}},
    {"sabotage": "normaliser"},
]
TWO = [
    {"tensor": 2},
    {"tensor": 2, "sequence": True},
    {"tensor": 2, "sequence": True, "sabotage": "norm_weight"},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"context": 2},
    {"data": 2},
    {"data": 2, "overlap_grad_reduce": True},
    {"packing": True, "tensor": 2, "sequence": True},
    {"packing": True, "pipeline": 2},
    {"packing": True, "context": 2},
    {"packing": True, "data": 2},
    {"packing": True, "context": 2, "sabotage": "on_policy"},
    *({"context": 2, "algorithm": name} for name in ALGORITHMS),
    {"pipeline": 2, "sabotage": "on_policy"},
    {"data": 2, "distributed_optimizer": True, "compare": "updated"},
    {**OVERLAPPED, "compare": "updated"},
    {**OVERLAPPED, "compare": "updated", "sabotage": "stale"},
    {"tensor": 2, "distributed_optimizer": True, "compare": "updated"},
    {"pipeline": 2, "compare": "updated"},
]
FOUR = [
    {"tensor": 2, "pipeline": 2},
    {"tensor": 2, "context": 2, "sequence": True},
    {"pipeline": 2, "context": 2, "virtual_pipeline": 2},
    {"pipeline": 2, "data": 2},
    {"packing": True, "pipeline": 2, "context": 2, "virtual_pipeline": 2},
    *({"packing": True, "tensor": 2, "context": 2, "sequence": True, "algorithm": name} for name in ALGORITHMS),
]
ALL_AT_ONCE = {"tensor": 2, "pipeline": 2, "context": 2, "sequence": True}
IN_TURNS = [
    *({**ALL_AT_ONCE, "packing": packing, "algorithm": name} for packing in (False, True) for name in ("fipo", "gspo")),
    *({**ALL_AT_ONCE, "packing": packing, "sabotage": "told"} for packing in (False, True)),
]
TOLD = [(1, 12, 15), (1, 20, 21), (3, 6, 8), (3, 15, 30), (6, 10, 12)]
"""Stretches of responses: in the middle, right behind a prompt, of one token, longer than a context-parallel chunk."""
FAMILIES = [
    {"tensor": 2, "context": 2, "sequence": True},
    {"packing": True, "tensor": 2, "context": 2, "sequence": True},
    {"packing": True, "pipeline": 2, "context": 2, "virtual_pipeline": 2},
    {"packing": True, "tensor": 2, "pipeline": 2, "sequence": True, "compare": "updated"},
    {"data": 2, "tensor": 2, "model": {"recompute": "full"}},
]
WITHOUT_ITS_OWN = {"tensor": 2, "pipeline": 2, "sabotage": "family"}

EXPERTS: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "norm_topk_prob": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Qwen2", {"tie_word_embeddings": True}),
    "untied": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "gemma": ("Gemma", {"head_dim": 24, "pad_token_id": None}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 24, **EXPERTS, "num_experts": 8, "num_experts_per_tok": 3}),
    "qwen3_moe_wide": ("Qwen3Moe", {"head_dim": 32, **EXPERTS, "moe_intermediate_size": 32, "num_experts": 4}),
    "qwen3_moe_dense_first": ("Qwen3Moe", {**EXPERTS, "num_experts": 4, "mlp_only_layers": [0, 1]}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
}
"""transformers' class and what sets the model apart. A token for padding would have no gradient in transformers."""


@pytest.fixture(scope="module", params=["tied", pytest.param("untied", marks=pytest.mark.matrix)])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A random model with non-trivial norms and biases, a batch of uneven sequences, and the reference gradients."""
    folder = tmp_path_factory.mktemp(request.param)
    return make_case(folder, request.param, told=[])


def make_case(folder: Path, name: str, told: list[tuple[int, int, int]]) -> dict[str, Any]:
    """As `case`; the stretches `told` (sequence, start, end) were not produced by the policy."""
    torch.manual_seed(0)
    kind, settings = MODELS[name]
    model = _random_model(kind, settings)
    model.save_pretrained(folder / "model")
    lengths = torch.tensor([9, 31, 14, 40, 22, 5, 17, 28, 12])
    prompts = torch.tensor([3, 5, 2, 6, 9, 1, 4, 7, 11])
    tokens = [torch.randint(0, 75, (int(length),)) for length in lengths]
    advantages = torch.randn(len(tokens))
    inputs = _reference_inputs(model, tokens, prompts.tolist(), advantages, told)
    has_experts = "num_experts_per_tok" in settings
    routers = router_load(model, tokens, prompts.tolist()) if has_experts else {}
    losses = {name: plain_loss(inputs, algorithm) for name, algorithm in ALGORITHMS.items()}
    of_routers: dict[str, Any] = {}
    reported = {name: loss.item() for name, loss in losses.items()}
    for name, algorithm in WITH_ROUTER_LOSSES.items() if has_experts else ():
        added, aux_loss, z_loss = router_losses(model, tokens, prompts.tolist(), algorithm)
        of_routers[name] = {"router_aux_loss": aux_loss.item(), "router_z_loss": z_loss.item()}
        of_policy = plain_loss(inputs, algorithm)
        losses[name], reported[name] = of_policy + added, of_policy.item()
    norms = {}
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, loss in reversed(losses.items()):  # FIPO's gradients are left in place, for a step of Adam
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True
        ):
            parameter.grad = gradient.contiguous()
        gradients = by_stored_names(kind, [(key, p.grad) for key, p in zip(names, parameters, strict=True)])
        assert all(gradient.any() for gradient in gradients.values()), "each expert has to have tokens"
        save_file(gradients, folder / f"{name}.safetensors")
        norms[name] = torch.nn.utils.get_total_norm([p.grad for p in parameters]).item()
    responses = (lengths - prompts).tolist()
    old = torch.cat([row[:count] for row, count in zip(inputs.old_log_probs, responses, strict=True)])
    batch = {
        "tokens": torch.cat(tokens),
        "lengths": lengths,
        "prompts": prompts,
        "advantages": advantages,
        "old_log_probs": old.float(),
        "told": torch.tensor(told, dtype=torch.int64).view(-1, 3),
        "log_probs": torch.cat([row[:count] for row, count in zip(inputs.log_probs, responses, strict=True)]).detach(),
        **({"routed_experts": routed_experts(model, tokens)} if has_experts else {}),
    }
    save_file(batch, folder / "batch.safetensors")
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=OPTIMIZER.clip_grad)
    assert norms["fipo"] > OPTIMIZER.clip_grad, "the clipping has to have something to do"
    _adam(model).step()
    updated = by_stored_names(kind, [(name, p.detach().contiguous()) for name, p in model.named_parameters()])
    save_file(updated, folder / "updated.safetensors")
    return {"folder": folder, "loss": reported, "grad_norm": norms, "routers": routers, "of_routers": of_routers}


def _random_model(kind: str, settings: dict[str, Any]) -> Any:
    """transformers' model with non-trivial norms and biases."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=75,  # not a multiple of two, so tensor parallelism pads it
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        **settings,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def _adam(model: Any) -> torch.optim.AdamW:
    """torch's own, set as OPTIMIZER says: no decay of biases and norms."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps)


def _reference_inputs(
    model: Any,
    tokens: list[torch.Tensor],
    prompts: list[int],
    advantages: torch.Tensor,
    told: list[tuple[int, int, int]],
) -> LossInputs:
    width = max(len(row) - prompt for row, prompt in zip(tokens, prompts, strict=True))
    log_probs, mask = [], torch.zeros(len(tokens), width, dtype=torch.bool)
    for row, (ids, prompt) in enumerate(zip(tokens, prompts, strict=True)):
        found = model(ids[None, :-1]).logits[0].log_softmax(-1).gather(-1, ids[1:, None])[prompt - 1 :, 0]
        log_probs.append(torch.nn.functional.pad(found, (0, width - len(found))))
        mask[row, : len(found)] = True
    for row, start, end in told:
        mask[row, start - prompts[row] : end - prompts[row]] = False
    stacked = torch.stack(log_probs)
    old = (stacked.detach() + torch.randn_like(stacked) * 0.3) * mask
    streams = {"old_log_probs": old, "rollout_log_probs": old, "reference_log_probs": old * REFERENCE_SCALE}
    return LossInputs(stacked, streams, advantages[:, None], mask, mask.sum(1))


def updates_under(
    case: dict[str, Any],
    world_size: int,
    layouts: list[dict[str, Any]],
    module: str = "tests.policy.layouts",
    timeout: float = 120,
) -> list[Any]:
    """By rank and layout, what `one_update` returns; `module` is where the ranks find it."""
    folder: Path = case["folder"]
    return run_ranks(
        f"{module}:one_update",
        world_size,
        {
            "model_dir": str(folder / "model"),
            "batch": str(folder / "batch.safetensors"),
            "folder": str(folder),
            "layouts": layouts,
        },
        timeout,
    )


def check_gradients(case: dict[str, Any], layouts: list[dict[str, Any]], ranks: list[Any]) -> None:
    """Assert that what `updates_under` has returned is the reference's, or with a sabotage far from it."""
    for index, layout in enumerate(layouts):
        sabotage, algorithm = layout.get("sabotage"), layout.get("algorithm", "fipo")
        results = [rank[index] for rank in ranks]
        worst = max(results, key=lambda result: result["worst"])
        if sabotage == "on_policy":
            assert all(result["metrics"]["ppo_kl"] == 0.0 for result in results)
        elif sabotage:
            assert "replay" not in layout or "rollout" not in layout["replay"] or worst["log_probs"] > 1e-3
            assert worst["worst"] > 1e-3, f"{layout}: the comparison does not see the fault"
        else:
            assert worst["worst"] < 1e-5, f"{layout}: {worst['where']} is off by {worst['worst']}"
            assert all(result["log_probs"] < 1e-4 for result in results), layout
            for result in results:
                assert result["metrics"]["loss"] == pytest.approx(case["loss"][algorithm], rel=1e-5), layout
                assert result["metrics"]["grad_norm"] == pytest.approx(case["grad_norm"][algorithm], rel=1e-5), layout
                assert result["metrics"] == results[0]["metrics"], "every rank reports the same"


@pytest.mark.parametrize(("world_size", "layouts"), [(1, ONE), (2, TWO), (4, FOUR)], ids=["one", "two", "four"])
def test_gradients_equal_the_reference(case: dict[str, Any], world_size: int, layouts: list[dict[str, Any]]) -> None:
    check_gradients(case, layouts, updates_under(case, world_size, layouts))


def test_gradients_of_samples_in_turns_equal_the_reference(tmp_path: Path) -> None:
    """What a policy was told is in no loss, no count and no F. The control trains on it, and has to show.

    GSPO reads lengths of responses, which are cut over ranks here.
    """
    case = make_case(tmp_path, "tied", TOLD)
    check_gradients(case, IN_TURNS, updates_under(case, 8, IN_TURNS, timeout=300))


@pytest.mark.parametrize(
    ("case", "layouts"),
    [
        ("mistral", [*FAMILIES, WITHOUT_ITS_OWN]),
        ("gemma", [*FAMILIES, WITHOUT_ITS_OWN]),
        *(pytest.param(name, FAMILIES, marks=pytest.mark.matrix) for name in ("qwen3", "llama")),
    ],
    indirect=["case"],
)
def test_gradients_of_other_families_equal_the_reference(case: dict[str, Any], layouts: list[dict[str, Any]]) -> None:
    """The negative control takes away what sets the family apart: the window, and the 1 that norms add."""
    check_gradients(case, layouts, updates_under(case, 4, layouts))


@pytest.mark.parametrize(
    "moves", [MOVES, pytest.param(MORE_MOVES, marks=pytest.mark.matrix)], ids=["moves", "more moves"]
)
def test_a_checkpoint_resumes_under_another_layout_of_experts(tmp_path: Path, moves: Moves) -> None:
    """As if there had been no break: the same gradient norm, rate and weights.

    Experts over ranks have an optimizer of their own, so that another layout has another number of them; a moment or a
    step that is lost lets a run go another way, without any error. One pipeline stage of the model has no experts.
    """
    case = make_case(tmp_path, "qwen3_moe_dense_first", [])
    arguments = {
        "model_dir": str(case["folder"] / "model"),
        "batch": str(case["folder"] / "batch.safetensors"),
        "directory": str(tmp_path / "checkpoints"),
        "moves": moves,
    }
    by_rank = run_ranks("tests.policy.expert_ranks:resume", 4, arguments, 300, worker_of="tests.policy.layouts")
    for move, found in zip(moves, zip(*by_rank, strict=True), strict=True):
        for rank in found:
            through, resumed = rank["through"], rank["resumed"]
            assert resumed["grad_norm"] == pytest.approx(through["grad_norm"], rel=1e-5), move
            assert resumed["rate"] == through["rate"], move
            assert rank["worst"] < 1e-4, move
    found = {rank[0][when]["optimizers"] for rank in by_rank for when in ("through", "resumed")}
    assert found == {1, 2}, "the first move is to another number of optimizers"


@pytest.mark.parametrize(
    ("case", "layouts"),
    [
        ("qwen3_moe", [*EXPERT_LAYOUTS, *REPLAYED, *FROM_ENGINE, *ROUTER_LOSSES]),
        pytest.param("qwen3_moe", EVERY_EXPERT_LAYOUT, marks=pytest.mark.matrix),
        pytest.param("qwen3_moe_dense_first", [FROM_ENGINE[2], *ROUTER_LOSSES], marks=pytest.mark.matrix),
        pytest.param("qwen2_moe", [*EXPERT_LAYOUTS, *CUT_OTHERWISE], marks=pytest.mark.matrix),
        pytest.param("mixtral", [*EXPERT_LAYOUTS, *CUT_OTHERWISE, *ROUTER_LOSSES], marks=pytest.mark.matrix),
    ],
    indirect=["case"],
)
def test_gradients_of_experts_equal_the_reference(case: dict[str, Any], layouts: list[dict[str, Any]]) -> None:
    """Every expert and router, over expert-parallel ranks. One control has the experts' gradients summed over too few
    ranks, others have routers that score the wrong experts.

    Replayed, the experts are transformers' whatever routers would choose, so that ratios are exactly 1 where the
    weights are the same. Its controls let routers choose, or give a recomputation the newest micro-batch's choice. The
    load of experts is that of transformers, over all ranks.
    """
    ranks = updates_under(case, 4, layouts, timeout=300)
    check_gradients(case, layouts, ranks)
    for index, layout in enumerate(layouts):
        replay = layout.get("replay")
        if layout.get("sabotage") in (None, "on_policy"):
            share = 0.0 if replay in ("undisturbed", "rollout partly") else 1.0
            changed = {} if replay in (None, "rollout first") else {"router_changed": share}
            if layout in FROM_ENGINE:
                changed["router_mismatch"] = share
            expected = {**case["routers"], **changed, **case["of_routers"].get(layout.get("algorithm"), {})}
            for found in (rank[index]["routers"] for rank in ranks):
                assert found == pytest.approx({**expected, "router_tokens_dropped": 0.0}), layout


def test_updates_one_after_the_other_learn_alike_with_overlap() -> None:
    """An update's forward pass gathers what the one before has left to it: stale weights would show in the second."""
    model = {"dtype": "float32", "layers": "local"}
    losses = [
        run_ranks("tests.policy.training:losses", size, {"model": model, "parallel": parallel, "updates": 4})
        for size, parallel in ((1, {}), (2, OVERLAPPED))
    ]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)
    assert losses[0][0][3] < 0.99 * losses[0][0][0], "the updates have to change something"
