"""Write docs/configuration.md from the schema and conf/, and docs/models.md from families and the keys of config.json.

So the documentation always agrees with the code.

python tools/reference.py            writes both pages
python tools/reference.py --check    fails if a page is out of date
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from megatron_fipo.config import every_setting, sections
from megatron_fipo.config.configure import configuration_directory, configuration_groups
from megatron_fipo.config.resume import table
from megatron_fipo.models.families import Family, family_modules
from megatron_fipo.models.keys import HARMLESS, REFUSED, UNDERSTOOD
from megatron_fipo.models.rope import KEYS_OF_TYPE

_DOCS = Path(__file__).resolve().parent.parent / "docs"

_HEADER = """\
# Configuration

<!-- Written by tools/reference.py from megatron_fipo/config/ and conf/: change those, then `make format`. -->

A run takes one choice from each group of `conf/`, and an **experiment**, which chooses from the other groups and sets
the sizes. There are four sources of values. Each overrides the ones before it: the schema's defaults, the groups'
files, the experiment's own lines, and single keys on the command line. A group that you name on the command line
replaces the experiment's choice.

```
python -m megatron_fipo.train                                            # experiment=tiny
python -m megatron_fipo.train algorithm=dapo                             # the same run, another algorithm
python -m megatron_fipo.train experiment=fipo_7b optimizer.lr=5e-7       # one key
python -m megatron_fipo.train experiment=fipo_32b --cfg job              # print the configuration and stop
python -m megatron_fipo.train --config-dir my_conf experiment=mine       # my_conf/experiment/mine.yaml
python -m megatron_fipo.train +data.task_options.max_terms=6             # a key of reasoning-gym: with a plus
```

A wrong key, type, value or combination ends the command with exit code 2 and one line that names the key and says what
would be right. `algorithm=fipo` has the influence band of the published 32B run, and `algorithm=fipo_7b` that of the 7B
run. The recipes' "10 warm-up steps" are training steps. `optimizer.warmup_updates` counts optimizer updates, so it is
10 times the number of updates per step.
"""

_MODELS_HEADER = """\
# Models

<!-- Written by tools/reference.py from megatron_fipo/models/families/ and models/keys.py. -->

Give a model by its name on the Hugging Face hub ([getting.md](getting.md)), as a Hugging Face directory, or as a
distributed checkpoint with config.json and tokenizer beside it. Models of the families below are supported. Each
family is declared in one file in `megatron_fipo/models/families/` ([how to add one](adding_a_family.md)).

Every key of config.json is in one of the three lists below. Training, preflight, the planner, `tools/convert_hf.py` and
the vLLM plugin read the file through one module, `megatron_fipo/models/model_config.py`. It refuses, in one line,

* a key that is in none of the lists, since it may change the model. If the model computes the same without the key,
  remove it from the file. If the key should be allowed for everybody, add it to the right list, or to its family's own
  keys;
* a value that is not supported, an impossible size, or a key that occurs twice;
* a rotary embedding that two keys describe differently, since programs differ in which key they follow;
* quantised weights (FP8, AWQ, GPTQ and others), declared by `quantization_config` or by a file such as
  quantize_config.json beside config.json, and adapters (adapter_config.json). The types of the stored tensors are
  checked too.

At the start of a run each rank compares its rotary embedding with that of transformers, at positions over the whole
context. `tools/convert_hf.py --verify` compares logits at such positions ([weights.md](weights.md)).

Any `attention_dropout` is allowed. A run trains without dropout, so that old and new log-probs come from the same
model. `model.max_position_embeddings` raises the context length without changing the rotary embedding, as the 7B recipe
does.

In a **mixture of experts**, a router sends each token to a few experts of a layer. No token is dropped.
`parallel.expert` deals a layer's experts to ranks, across tensor-, context- and data-parallel ones.
`parallel.expert_tensor` cuts each of them. Tensor parallelism needs `parallel.sequence=true` there. Layers without
experts between others (`mlp_only_layers`, `decoder_sparse_step`) are supported, and so is a shared expert for every
token (Qwen2-MoE). `rollout.expert_parallel` deals the experts to a server's GPUs. preflight and planner count experts
by what a rank holds, and by what a token uses ([cluster.md](cluster.md)). `experiment=tiny_moe` trains the included
mixture of experts on a CPU.

`optimizer.freeze_routers=true` keeps routers as they are when the run starts: they get no gradient, have no place in
the optimizer, and are not in `grad_norm`. Choose it when a run starts: a checkpoint of frozen routers has no optimizer
state for them, so no resume can set them free. Routers that choose by a bias, which training moves towards an even
load beside the gradient (`topk_method: noaux_tc`, `use_routing_bias` and others), are in no supported family. A
directory that asks for one is refused by that key, since nothing would keep the bias alike in trainer and servers.

**Losses of routers.** Nothing balances the experts by default. `algorithm.router_aux_loss_coef` adds a loss for an even
load (Switch Transformers), `algorithm.router_z_loss_coef` one for small scores (ST-MoE). With E experts, q an expert's
share of the load (summing to 1), p a token's softmax over all scores s, a token adds for each layer

    router_aux_loss_coef · E · Σ q p  +  router_z_loss_coef · (log Σ exp s)²

to its loss. It has the weight that `algorithm.loss_agg_mode` gives each token. The sum is over response tokens, and is
divided by what the policy's loss is divided by: where that leaves out responses (`responses_dropped`), by fewer tokens.
The load is that of all the step's responses, by the experts that they go to before its first update. So gradients are
the same in every layout. Megatron-Core's own losses are means of a micro-batch, and depend on the layout; transformers
takes all layers together, on another scale. With the first loss a step's first mini-batch, too, has a forward pass
before the updates: by a count of passes (not measured), with one update per step a quarter of the time of log-probs and
update. `router_aux_loss` (1 if even) and `router_z_loss` are reported without their coefficients, and are not in
`loss`.

**Router replay.** A router takes the largest scores, so a small change of the weights can send a token to other
experts, and its log-prob jumps. With `algorithm.router_replay=trainer` the pass that computes old log-probs records
the experts of each token, and the updates of the step use the same ones: ratios and Δ change by the weights alone.
Routers still learn, by the scores of these experts. It works in every layout, packed or padded, and with
recomputation. The first update of a step computes its own old log-probs, and needs no record. With one update per
step there is nothing to replay, and the run warns. A record takes 2 bytes per token, layer and expert of a token in
the ranks' host memory, which preflight shows. Differences between engine and trainer are not replayed:
`log_prob_diff_mean` has them. `python -m benchmarks.router_replay` shows what replay does to ratios and f of a random
model, with tables in benchmarks/README.md.

With `algorithm.router_replay=rollout` a token goes to the experts that the engine sent it to, in the passes that
compute old and reference log-probs and in all updates, the first one too. Prompts and what an environment said are
replayed as well. Where the engine has no choice the trainer's router chooses, and updates replay that: only the last
sampled token, which is no input of the model, and samples of a checkpoint from before. `router_mismatch` is the share
of choices that trainer and engine would make differently. Choices arrive with the end of a response, from the server
that ended it. If a server was lost before, the next one has read all tokens again, and its choices count. A response
without choices, or with an expert that the model does not have, is refused.

A token's choices take 1 byte (2 with more than 255 experts) for each layer and expert of a token, 384 bytes in a
Qwen3-30B-A3B, beside the 8 bytes of its other values: on the way from the server, in the rollout process, in a
checkpoint's samples in flight, and on the way to the ranks, where each pipeline stage reads its own layers. preflight
counts the host memory of the trainer's nodes. A server keeps them too, for each token that its cache has room for.
vLLM returns them only with CUDA, Triton and its second model runner (`--enable-return-routed-experts`), so that other
machines are refused before a run starts. Servers in `rollout.addresses` have to be started with this option. The
trainer's half is compared with transformers on CPUs; vLLM's half has not run yet (tests/gpu/test_runs.py).

A **sliding window** (Mistral's `sliding_window`, for all layers) is computed exactly, in padded and packed
micro-batches and over context-parallel ranks. A token attends to that many tokens, including itself. The window has no
effect if no sequence of the run, prompt plus response, is longer. Transformer Engine does not support a window over
context-parallel ranks, so this combination is refused. Local layers make a mask of one byte per pair of tokens of a
sequence. Qwen's window, `use_sliding_window`, applies to only some of the layers. vLLM does not support this, so it is
refused.

**Gemma** means the first Gemma. Its released config.json says gelu and means the tanh approximation. transformers and
vLLM read it in this way. Gemma 2 and 3 are refused, since Megatron-Core does not support all that they need: two rotary
bases, norms after attention and feed-forward, and capped logits. In a **Mistral** directory the Hugging Face files are
read. params.json and consolidated.safetensors beside them are not read.

The tests compare each family's logits and gradients with transformers on a CPU, over tensor, sequence, pipeline,
context and data parallelism. In the tests, vLLM on a CPU serves Qwen2, Llama, Mistral and Gemma, with live weight
updates. Mistral and Gemma have not yet run on CUDA.
"""


def models() -> str:
    """Return the page about models and the keys of config.json."""
    return "\n".join([_MODELS_HEADER, *_families(), *_model_keys()])


def _families() -> Iterator[str]:
    yield "## Families\n\n| architecture | what it is | keys of its own, or with other values |\n| --- | --- | --- |"
    for module in family_modules():
        family: Family = module.FAMILY
        keys = "; ".join(f"`{key}`: {kind.expected}" for key, kind in family.keys.items()) or "none"
        yield f"| `{family.architecture}` | {module.__doc__} | {keys} |"
    yield ""


def _model_keys() -> Iterator[str]:
    yield "## Understood\n\n| key | value |\n| --- | --- |"
    yield from (f"| `{key}` | {kind.expected} |" for key, kind in UNDERSTOOD.items())
    yield "\nInside `rope_parameters`, or `rope_scaling` as transformers 4 wrote it:\n"
    yield "| rope_type | keys besides `rope_theta` |\n| --- | --- |"
    for kind, keys in KEYS_OF_TYPE.items():
        yield f"| `{kind}` | {', '.join(f'`{key}`' for key in keys) or 'none'} |"
    yield "\n## Refused, except for values that have no effect\n\n| key | allowed values |\n| --- | --- |"
    yield from (f"| `{key}` | {kind.expected} |" for key, kind in REFUSED.items())
    yield "\n## Harmless\n"
    for reason, keys in HARMLESS.items():
        yield f"* {reason}: {', '.join(f'`{key}`' for key in keys)}."


def reference() -> str:
    """Return the page about the keys of conf/."""
    return "\n".join([_HEADER, "## Groups\n", *_groups(), "\n## Keys", *_keys(), *_free()])


def _free() -> Iterator[str]:
    yield "\n## What may change when a run resumes\n"
    yield "All other keys affect the result of training and may not change ([runs.md](runs.md)).\n"
    yield "| keys | why |\n| --- | --- |"
    for reason, keys in table():
        yield f"| {', '.join(f'`{key}`' for key in keys)} | {reason} |"


def _groups() -> Iterator[str]:
    yield "| group | choice | what it is |\n| --- | --- | --- |"
    for group in configuration_groups():
        for path in sorted((configuration_directory() / group).glob("*.yaml")):
            yield f"| `{group}` | `{path.stem}` | {_first_comment(path)} |"


def _first_comment(path: Path) -> str:
    """Return the description of a file: its first comment that is not a directive of Hydra."""
    comments = (line[2:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    return next(comment for comment in comments if not comment.startswith("@"))


def _keys() -> Iterator[str]:
    settings = list(every_setting())
    for name, kind in sections():
        doc = " ".join((kind.__doc__ or "").split())
        yield f"\n### {name}\n\n{doc}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |"
        for key, entry in settings:
            if key.rpartition(".")[0] == name:
                yield f"| `{key}` | {_type(entry)} | {_default(entry)} | {_meaning(entry)} |"


def _type(entry: Field) -> str:
    kinds = [kind for kind in get_args(entry.type) if kind is not NoneType]
    if NoneType in get_args(entry.type):
        return f"{kinds[0].__name__} or null"
    return str(entry.type) if kinds else getattr(entry.type, "__name__", str(entry.type))


def _default(entry: Field) -> str:
    value: Any = entry.default if entry.default is not MISSING else entry.default_factory()  # type: ignore[misc]
    if value is None:
        return "`null`"
    text = str(value).lower() if isinstance(value, bool) else str(value).replace("\n", "\\n")
    return f"`{text}`" if text else "empty"


def _meaning(entry: Field) -> str:
    limits = entry.metadata
    ranges = [
        f"{words} {limits[name]:,}"
        for name, words in (("minimum", "≥"), ("above", ">"), ("maximum", "≤"))
        if limits[name] is not None
    ]
    if limits["choices"]:
        ranges.append("one of " + ", ".join(f"`{choice}`" for choice in limits["choices"]))
    doc = limits["doc"].replace("|", "\\|")
    return f"{doc} ({'; '.join(ranges)})" if ranges else doc


def main() -> None:
    """Write the pages, or with --check compare them with the existing files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if a page is out of date")
    only_check = parser.parse_args().check
    for path, page in ((_DOCS / "configuration.md", reference()), (_DOCS / "models.md", models())):
        if not only_check:
            path.write_text(page + "\n", encoding="utf-8")
            print(f"wrote {path}")
        elif not path.is_file() or path.read_text(encoding="utf-8") != page + "\n":
            sys.exit(f"error: {path} is out of date (python tools/reference.py writes it)")


if __name__ == "__main__":
    main()
