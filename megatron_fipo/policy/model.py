"""Megatron-Core's GPTModel from a model's and a run's configuration: this rank's pipeline chunks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import get_te_version

from megatron_fipo.config import Config, ParallelConfig, PolicySection
from megatron_fipo.config.window import check_window, window_in_use
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.family import Family
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.policy import platform
from megatron_fipo.policy.attention import RMSNorm, TorchAttention
from megatron_fipo.policy.precision import check_recipe, check_widths, precision_settings, this_machine
from megatron_fipo.policy.rotary import stretch


def start_model_parallel(parallel: ParallelConfig, seed: int) -> None:
    """Create Megatron-Core's process groups for the layout, over the process group that is already joined."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
    )
    # 0 is Megatron-Core's unset seed.
    model_parallel_cuda_manual_seed(seed + 1)


def wants_transformer_engine(model: PolicySection) -> bool:
    """Whether the configuration asks for Transformer Engine's layers on this device, there or not."""
    return model.layers == "transformer_engine" or (model.layers == "auto" and platform.has_cuda())


def uses_transformer_engine(model: PolicySection) -> bool:
    """Whether the layers are Transformer Engine's.

    Raises:
        ConfigError: they are asked for and not installed, or FP8 is asked for without them, or with a recipe that this
            GPU, this Transformer Engine or this CUDA lacks.
    """
    wanted = wants_transformer_engine(model)
    if wanted and not HAVE_TE:
        raise ConfigError(
            "model.layers", "Transformer Engine is not installed", "install it, or set model.layers=local"
        )
    if model.fp8 != "off" and not wanted:
        raise ConfigError("model.fp8", "needs Transformer Engine layers on CUDA", "set model.fp8=off here")
    if model.fp8 != "off":
        check_recipe(model.fp8, this_machine())
    return wanted


def describe(model: PolicySection) -> str:
    """One line of what the policy computes with here: layers, attention, precision, optimizer.

    Raises:
        ConfigError: as `uses_transformer_engine` does.
    """
    if uses_transformer_engine(model):
        layers = f"Transformer Engine {get_te_version()}, which picks the attention kernel (NVTE_DEBUG=1 shows it)"
    else:
        layers = "Megatron-Core's local ones, attention by torch's scaled_dot_product_attention"
    precision = model.dtype if model.fp8 == "off" else f"{model.dtype} with FP8 {model.fp8}"
    return f"layers: {layers}; precision: {precision}; optimizer: {platform.adam_name()}"


def transformer_config(config: Config, model_config: ModelConfig) -> TransformerConfig:
    """Megatron-Core's configuration of the model, its parallel layout and its precision.

    Raises:
        ConfigError: the FP8 recipe cannot multiply matrices of this model's widths, or Transformer Engine has no
            attention for this type, window and layout.
    """
    model, parallel, family = config.model, config.parallel, model_config.family
    check_widths(config, model_config)
    dtype, window = getattr(torch, model.dtype), window_in_use(config, model_config)
    if wants_transformer_engine(model):
        _check_attention(config, model_config)
    # Keeps 3 tensors of the feed-forward's width for backward and not 5. Compiled, which the CPU is better without.
    fused = wants_transformer_engine(model) or platform.has_cuda()
    return TransformerConfig(
        num_layers=model_config.num_layers,
        hidden_size=model_config.hidden_size,
        ffn_hidden_size=model_config.ffn_hidden_size,
        num_attention_heads=model_config.num_attention_heads,
        num_query_groups=model_config.num_query_groups,
        kv_channels=model_config.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model_config.rms_norm_eps,
        layernorm_zero_centered_gamma=family.zero_centered_norms,
        qk_layernorm=family.qk_norm,
        # Tokens before a query that it attends to, and tokens after it.
        window_size=None if window is None else (window - 1, 0),
        gated_linear_unit=True,
        activation_func=_activation(family, fused),
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        masked_softmax_fusion=False,
        bias_activation_fusion=fused,
        # One kernel for all packed sequences; else every layer waits for their lengths and turns them one by one.
        apply_rope_fusion=HAVE_TE and wants_transformer_engine(model),
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # The values are overwritten, but only here are parameters marked as cut by tensor parallelism, and without the
        # mark the gradient norm counts one rank's part of them.
        perform_initialization=True,
        # One exact token mean over data and context parallelism and micro-batches.
        calculate_per_token_loss=True,
        # Micro-batches differ in length, which pipeline stages have to be told; without a pipeline nobody asks.
        variable_seq_lengths=parallel.expert_dispatcher != "allgather",
        moe_token_dispatcher_type=parallel.expert_dispatcher,
        **_expert_settings(config, model_config),
        **_schedule_settings(parallel),
        **precision_settings(model),
        **_recompute_settings(model),
    )


def _check_attention(config: Config, model_config: ModelConfig) -> None:
    """Raise ConfigError for what Transformer Engine's attention lacks."""
    if config.model.dtype == "float32" and config.parallel.context > 1:
        raise ConfigError(
            "model.dtype",
            "Transformer Engine's attention takes no float32 over context-parallel ranks",
            "model.dtype=bfloat16, model.layers=local or parallel.context=1",
        )
    check_window(config, model_config)


def _expert_settings(config: Config, model_config: ModelConfig) -> dict[str, Any]:
    """The mixture of experts: no token is dropped, and losses of routers are ours (router_losses.py)."""
    parallel, experts = config.parallel, model_config.experts
    if experts is None:
        return {}
    with_te = wants_transformer_engine(config.model)
    shared = experts.shared_ffn_hidden_size
    return {
        "num_moe_experts": experts.number,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        # A list has each layer saved by itself, since they are not alike.
        "moe_layer_freq": 1 if experts.everywhere else [int(is_sparse) for is_sparse in experts.layers],
        "moe_shared_expert_intermediate_size": shared or None,
        "moe_shared_expert_gate": shared > 0,
        "moe_router_topk": experts.per_token,
        # A softmax over the chosen scores alone is the one over all of them, scaled to a sum of 1.
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": with_te,
        "moe_permute_fusion": with_te,
        "moe_router_padding_for_quantization": config.model.fp8 != "off",
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }


def _activation(family: Family, fused: bool) -> Callable[..., torch.Tensor]:
    if family.activation == "silu":
        return torch.nn.functional.silu
    # Megatron-Core's fused kernel of this name is the approximation by tanh; by itself the function is not.
    return torch.nn.functional.gelu if fused else partial(torch.nn.functional.gelu, approximate="tanh")


def _schedule_settings(parallel: ParallelConfig) -> dict[str, Any]:
    if parallel.virtual_pipeline is None:
        return {}
    # Batched sends of the interleaved schedule mix up their messages under gloo, in silence.
    return {"overlap_p2p_comm": True, "batch_p2p_comm": False}


def _recompute_settings(model: PolicySection) -> dict[str, Any]:
    if model.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if model.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def build_model(config: Config, model_config: ModelConfig, device: torch.device | None = None) -> list[GPTModel]:
    """This rank's pipeline chunks with random weights; `weights.reshard.load_into` fills them.

    Returns:
        One model, or `parallel.virtual_pipeline` of them, on `device` or else this rank's.
    """
    megatron = transformer_config(config, model_config)
    with_te = uses_transformer_engine(config.model)
    stages = range(config.parallel.virtual_pipeline) if config.parallel.virtual_pipeline else [None]
    place = device or platform.device()
    return [_build_chunk(config, model_config, megatron, with_te, stage).to(place) for stage in stages]


def context_length(config: Config, model_config: ModelConfig) -> int:
    """Tokens of the longest sequence of a run: the model's own context, or what the configuration raises it to."""
    return config.model.max_position_embeddings or model_config.max_position_embeddings


def _build_chunk(
    config: Config, model_config: ModelConfig, megatron: TransformerConfig, with_te: bool, virtual_stage: int | None
) -> GPTModel:
    chunk = GPTModel(
        megatron,
        _layer_specifications(megatron, model_config, with_te, virtual_stage),
        vocab_size=model_config.padded_vocab_size(config.parallel.tensor),
        max_sequence_length=context_length(config, model_config),
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual_stage),
        share_embeddings_and_output_weights=model_config.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=model_config.rope_theta,
        vp_stage=virtual_stage,
    )
    stretch(chunk.rotary_pos_emb, model_config.rope_scaling)
    _mark_experts(chunk, config.parallel)
    if model_config.family.scaled_embedding and chunk.pre_process:
        # Rounded to the weights' type first, as transformers and vLLM have it.
        scale = torch.tensor(model_config.hidden_size**0.5, device="cpu").to(megatron.params_dtype).item()
        chunk.embedding.register_forward_hook(lambda module, inputs, embedded: embedded * scale)
    return chunk


def _mark_experts(chunk: GPTModel, parallel: ParallelConfig) -> None:
    """Have the experts' gradients summed over all ranks that have the same experts.

    Megatron-Core marks them itself where experts are dealt to ranks. Where they are not, but tensor parallelism cuts
    the rest of the model otherwise, ranks of one tensor-parallel group have the same experts, and each sees a part of
    the tokens; without the mark the loss is right and the experts' gradients are not.
    """
    if parallel.expert_tensor == parallel.tensor:
        return
    for name, parameter in chunk.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False


def _layer_specifications(
    megatron: TransformerConfig, model_config: ModelConfig, with_te: bool, virtual_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    build = _te_layer if with_te else _local_layer
    experts = model_config.experts
    if with_te and (experts is None or experts.everywhere):
        return build(megatron, experts is not None)
    first, count = (
        get_transformer_layer_offset(megatron, virtual_stage),
        get_num_layers_to_build(megatron, virtual_stage),
    )
    sparse = experts.layers[first : first + count] if experts else (False,) * count
    kinds = {is_sparse: build(megatron, is_sparse) for is_sparse in set(sparse)}
    norm = TENorm if with_te else RMSNorm
    return TransformerBlockSubmodules(layer_specs=[kinds[is_sparse] for is_sparse in sparse], layer_norm=norm)


def _te_layer(megatron: TransformerConfig, is_sparse: bool) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=megatron.num_moe_experts if is_sparse else None,
        moe_grouped_gemm=is_sparse,
        qk_layernorm=megatron.qk_layernorm,
    )


def _local_layer(megatron: TransformerConfig, is_sparse: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=megatron.num_moe_experts if is_sparse else None,
        normalization="RMSNorm",
        qk_layernorm=megatron.qk_layernorm,
    )
    if is_sparse:
        # Saved as Transformer Engine saves it, which has this norm by itself before a router.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = TorchAttention
    if megatron.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer
