"""Small random models of each architecture, made with transformers."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKENS = 11
"""Length of the two sequences whose logits lie beside each model."""


@dataclass(frozen=True)
class SmallModel:
    """What sets one test model apart from the others."""

    name: str
    kind: str
    """Prefix of transformers' classes: Qwen2, Llama, Gemma …"""
    heads: int
    groups: int
    vocab: int
    tied: bool
    dtype: str = "float32"
    extra: dict[str, Any] = field(default_factory=dict)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SMALL_MODELS = (
    SmallModel("qwen2-tied", "Qwen2", heads=8, groups=4, vocab=61, tied=True),
    SmallModel("qwen2-untied", "Qwen2", heads=4, groups=4, vocab=64, tied=False),
    SmallModel("qwen2-bfloat16", "Qwen2", heads=4, groups=4, vocab=61, tied=False, dtype="bfloat16"),
    SmallModel("qwen3-untied", "Qwen3", heads=8, groups=4, vocab=61, tied=False, extra={"head_dim": 16}),
    SmallModel("qwen3-tied", "Qwen3", heads=4, groups=4, vocab=50, tied=True, extra={"head_dim": 8}),
    SmallModel("llama-untied", "Llama", heads=12, groups=4, vocab=62, tied=False),
    SmallModel(
        "llama3-tied",
        "Llama",
        heads=16,
        groups=4,
        vocab=64,
        tied=True,
        extra={"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 131072, "head_dim": 8},
    ),
    SmallModel("llama-two-groups", "Llama", heads=6, groups=2, vocab=61, tied=False),
    SmallModel("mistral-window", "Mistral", heads=8, groups=4, vocab=61, tied=False, extra={"sliding_window": 5}),
    SmallModel("gemma-tied", "Gemma", heads=4, groups=4, vocab=61, tied=True, extra={"head_dim": 16}),
)

_MOE: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
MOE_MODELS = (
    SmallModel("qwen3-moe", "Qwen3Moe", heads=8, groups=4, vocab=61, tied=False, extra={**_MOE, "num_experts": 8}),
    SmallModel(
        "qwen3-moe-dense-between",
        "Qwen3Moe",
        heads=4,
        groups=4,
        vocab=50,
        tied=True,
        extra={**_MOE, "num_experts": 4, "mlp_only_layers": [2], "norm_topk_prob": True, "head_dim": 16},
    ),
    SmallModel(
        "qwen3-moe-bfloat16",
        "Qwen3Moe",
        heads=8,
        groups=4,
        vocab=61,
        tied=False,
        dtype="bfloat16",
        extra={**_MOE, "num_experts": 6, "num_experts_per_tok": 3, "decoder_sparse_step": 2},
    ),
    SmallModel(
        "qwen2-moe",
        "Qwen2Moe",
        heads=4,
        groups=4,
        vocab=61,
        tied=False,
        extra={**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 40},
    ),
    SmallModel("mixtral", "Mixtral", heads=8, groups=4, vocab=62, tied=False, extra={"num_local_experts": 4}),
    SmallModel("mixtral-tied", "Mixtral", heads=4, groups=4, vocab=64, tied=True, extra={"num_local_experts": 2}),
)
"""With a mixture of experts, in every layer or between dense ones, with and without one that all tokens go to."""


def by_stored_names(kind: str, named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Tensors by the names in a model's file: transformers joins a layer's experts in memory, and renames Mixtral's."""
    parts = ("w1", "w3", "w2") if kind == "Mixtral" else ("gate_proj", "up_proj", "down_proj")
    found: dict[str, Any] = {}
    for name, tensor in named:
        if kind == "Mixtral":
            name = name.replace(".mlp.", ".block_sparse_moe.")
        prefix, _, part = name.rpartition(".")
        if not prefix.endswith(".experts"):
            found[name] = tensor
            continue
        for expert, whole in enumerate(tensor):
            pieces = zip(parts[:2], whole.chunk(2), strict=True) if part == "gate_up_proj" else [(parts[2], whole)]
            found |= {f"{prefix}.{expert}.{piece}.weight": value.contiguous() for piece, value in pieces}
    return found


def write_model(model: SmallModel, directory: Path) -> Path:
    """Save the model under `directory`/name, with reference.safetensors: tokens and transformers' logits in fp32."""
    import torch
    import transformers
    from safetensors.torch import save_file

    torch.manual_seed(sum(map(ord, model.name)))
    settings = {"max_position_embeddings": 64, **model.extra}
    config = getattr(transformers, f"{model.kind}Config")(
        vocab_size=model.vocab,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=model.heads,
        num_key_value_heads=model.groups,
        tie_word_embeddings=model.tied,
        initializer_range=0.2,
        eos_token_id=2,
        **settings,
    )
    network = getattr(transformers, f"{model.kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name or name.endswith("bias"):  # ones and zeros would hide a mix-up
                parameter.add_(torch.randn_like(parameter) * 0.2)
    path = directory / model.name
    network.to(getattr(torch, model.dtype)).save_pretrained(path)
    tokens = torch.randint(0, model.vocab, (2, TOKENS))
    with torch.no_grad():
        logits = network.float()(tokens).logits
    (path / "reference").mkdir()
    save_file({"tokens": tokens, "logits": logits.contiguous()}, path / "reference" / "reference.safetensors")
    return path
