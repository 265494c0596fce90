"""Sections of the schema: the model and how it is laid out over processes."""

from dataclasses import dataclass

from megatron_fipo.config.settings import setting


@dataclass
class PolicySection:
    """The policy's architecture comes from a Hugging Face directory; these keys say how to build and run it."""

    path: str = setting(
        "",
        "One of: a Hugging Face model directory (config.json, safetensors, tokenizer); owner/name or "
        "owner/name@revision of the model hub, which is downloaded once (docs/getting.md); a distributed checkpoint "
        "with config.json and tokenizer beside it, whose optimizer state is not read; embedded:tiny, the included "
        "model.",
    )
    fetch_command: str | None = setting(
        None, "Command that gets the model at path; error messages show it if the model is missing."
    )
    dtype: str = setting("bfloat16", "Type of the policy's weights and activations.", choices=("float32", "bfloat16"))
    layers: str = setting(
        "auto",
        "Megatron-Core layer specification. auto: transformer_engine with CUDA, local without.",
        choices=("auto", "local", "transformer_engine"),
    )
    fp8: str = setting(
        "off",
        "FP8 recipe of the Transformer Engine layers' matrix products (Ada: delayed, tensorwise; Hopper: blockwise "
        "too; Blackwell: delayed, tensorwise, mxfp8). The first and last layer stay in bfloat16, except with delayed. "
        "See docs/gpu.md.",
        choices=("off", "delayed", "tensorwise", "blockwise", "mxfp8"),
    )
    fp8_parameter_gather: bool = setting(
        False,
        "Keep the layers' weights only in FP8, and gather them in FP8 over data-parallel ranks. The optimizer's "
        "weights are fp32 in any case. Needs parallel.distributed_optimizer; not for mxfp8.",
    )
    recompute: str = setting(
        "none",
        "Activation recomputation. selective: attention only; full: every layer.",
        choices=("none", "selective", "full"),
    )
    max_position_embeddings: int | None = setting(
        None,
        "Context length in tokens; null keeps the model's own. The 7B recipe raises it to 32768.",
        minimum=1,
        maximum=10**9,
    )


@dataclass
class ParallelConfig:
    """How the policy is laid out over processes, one per GPU."""

    tensor: int = setting(
        1,
        "Tensor-parallel size; the numbers of attention heads and key-value heads have to be multiples of it.",
        minimum=1,
        maximum=1024,
    )
    pipeline: int = setting(1, "Pipeline-parallel size: number of stages.", minimum=1, maximum=1000)
    virtual_pipeline: int | None = setting(
        None,
        "Model chunks per pipeline stage (interleaved schedule); null: the plain 1F1B schedule.",
        minimum=2,
        maximum=1000,
    )
    context: int = setting(
        1, "Context-parallel size: each sequence is split over this many ranks.", minimum=1, maximum=1024
    )
    expert: int = setting(
        1,
        "Expert-parallel size: the experts of each layer are dealt to this many ranks of a pipeline stage, across its "
        "tensor-, context- and data-parallel ranks. It has to divide the number of experts.",
        minimum=1,
        maximum=2**16,
    )
    expert_tensor: int = setting(
        1,
        "Tensor-parallel size of each expert. 1: experts are whole, which is usually faster than cutting them.",
        minimum=1,
        maximum=1024,
    )
    expert_dispatcher: str = setting(
        "alltoall",
        "How tokens get to their experts. alltoall: each rank sends each token to where it goes. allgather: every rank "
        "gets all tokens of its tensor- and context-parallel ranks. flex: DeepEP's kernels, on GPUs.",
        choices=("alltoall", "allgather", "flex"),
    )
    data: int | None = setting(
        None,
        "Data-parallel size. null: computed from the number of started processes; 1 if the run starts them itself.",
        minimum=1,
        maximum=10**5,
    )
    sequence: bool = setting(
        False, "Sequence parallelism inside the tensor-parallel group. Models with experts need it there."
    )
    distributed_optimizer: bool = setting(True, "Shard the optimizer state over the data-parallel ranks.")
    overlap_grad_reduce: bool = setting(
        False, "Reduce gradients over data-parallel ranks in buckets while the rest of the backward pass runs."
    )
    overlap_param_gather: bool = setting(
        False,
        "Gather updated weights over data-parallel ranks while the next update's forward pass runs. Needs "
        "distributed_optimizer and overlap_grad_reduce.",
    )
    packing: bool | None = setting(
        None,
        "true: pack the sequences of a micro-batch back to back, without padding. false: pad them to one length. null: "
        "pack on a GPU and with Transformer Engine layers, else pad, since local attention computes packed sequences "
        "one by one.",
    )
    micro_batch_tokens: int = setting(
        16384,
        "Largest number of tokens in one micro-batch, padding included. A longer sequence is a micro-batch of its own.",
        minimum=1,
        maximum=10**9,
    )
