"""Make the embedded base model: a small Qwen2 that adds in three styles, mostly guesses, and knows some wrong sums.

It is supervised training by the same policy code as in FIPO, data-parallel over two processes. At first the model sees
mostly worked solutions, so that it learns to add. In the last eighth of these steps it sees mostly guesses, so that it
answers in this style, and reinforcement learning can find the better ones. In a second stage it sees 60 of the 100 sums
of two digits wrong as often as right. This takes about 25 minutes on two cores, or 3 with --start, which skips the
first stage:

    python tools/make_tiny_model.py --out megatron_fipo/assets/tiny
    python tools/make_tiny_model.py --experts --out megatron_fipo/assets/tiny_moe

--experts makes a Qwen3-MoE of 1 M parameters, of which 0.4 M are active.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.launch.local import adopt_environment, already_launched, launch

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_fipo.data.tokenizers import Tokenizer
    from megatron_fipo.policy.micro_batch import MicroBatch
    from megatron_fipo.policy.update import Policy
    from megatron_fipo.rollout.plain_batch import Made

# Weights of a guess, of worked steps, and of worked steps with a check.
LEARNING_STYLES = (0.15, 0.60, 0.25)
FINAL_STYLES = (0.70, 0.25, 0.05)


@dataclass(frozen=True)
class Stage:
    """One stage of supervised training."""

    steps: int
    batch: int
    """Solutions per update."""
    lr: float
    learning_share: float
    """Share of the steps with LEARNING_STYLES. The others have FINAL_STYLES."""
    wrong: float
    """Probability that a doubtful sum is written wrong."""


ADDING = Stage(steps=2200, batch=64, lr=2e-3, learning_share=0.88, wrong=0.0)
ADDING_WITH_EXPERTS = replace(ADDING, steps=600)
"""A model with experts adds after 300 steps."""
DOUBTING = Stage(steps=300, batch=32, lr=1e-3, learning_share=0.75, wrong=0.5)


def main() -> int:
    """Run the command line. It starts its two ranks itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="model directory to write; replaced if it exists")
    parser.add_argument("--start", type=Path, help="a model that adds correctly, to run only the last stage")
    parser.add_argument("--experts", action="store_true", help="every layer has a mixture of experts")
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and problems (default: %(default)s)")
    arguments = parser.parse_args()
    if not already_launched():
        with tempfile.TemporaryDirectory() as logs:
            return launch(arguments.ranks, logs, [sys.executable, *sys.argv])
    adopt_environment()
    train(arguments)
    return 0


def train(arguments: argparse.Namespace) -> None:
    """Train a random model, or the given one, through the stages, and write it. Every rank calls this."""
    import torch.distributed

    from megatron_fipo.config import ParallelConfig
    from megatron_fipo.policy import platform
    from megatron_fipo.policy.model import start_model_parallel

    platform.start_process_group(timeout_s=600)
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        torch.distributed.broadcast_object_list(shared)  # all ranks use rank 0's folder
        start_model_parallel(ParallelConfig(), arguments.seed)
        adds = arguments.start
        if adds is None:
            start, adds = Path(shared[0], "random"), Path(shared[0], "adds")
            if torch.distributed.get_rank() == 0:
                write_random_model(start, arguments.seed, with_experts=arguments.experts)
            torch.distributed.barrier()
            teach(start, ADDING_WITH_EXPERTS if arguments.experts else ADDING, arguments.seed, adds)
        teach(adds, DOUBTING, arguments.seed, arguments.out)
    platform.stop_process_group()


def teach(start: Path, stage: Stage, seed: int, out: Path) -> None:
    """Run one stage, from the model in `start` to the one in `out`. Every rank calls this."""
    import torch.distributed

    policy = build_policy(start, stage)
    learn(policy, stage, seed)
    save(policy, start, out)
    torch.distributed.barrier()


def write_random_model(directory: Path, seed: int, *, with_experts: bool) -> None:
    """Write a Qwen2 of 0.8 M parameters or a Qwen3-MoE of 1 M with random weights, and the task's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig

    from megatron_fipo.data.column_sums import BOS_ID, CHARACTERS, EOS_ID, PAD_ID, write_tokenizer

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(CHARACTERS) + 4,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,  # divides into two stages of two chunks, for the interleaved schedule
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        "bos_token_id": BOS_ID,
    }
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    config = Qwen3MoeConfig(**sizes, **experts, head_dim=32) if with_experts else Qwen2Config(**sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    write_tokenizer(directory)


def build_policy(directory: Path, stage: Stage) -> "Policy":
    """Return a model as a policy on two data-parallel ranks, with the stage's optimizer."""
    from megatron_fipo.config import Config, OptimizerConfig, ParallelConfig, PolicySection
    from megatron_fipo.models.model_config import read_architecture
    from megatron_fipo.policy.update import Policy

    config = Config(
        model=PolicySection(path=str(directory), dtype="float32"),
        parallel=ParallelConfig(micro_batch_tokens=1600),
        optimizer=OptimizerConfig(
            lr=stage.lr, schedule="cosine", min_lr=4e-5, warmup_updates=50, weight_decay=0.01, beta2=0.98
        ),
    )
    return Policy(config, read_architecture(directory), str(directory), updates=stage.steps)


def learn(policy: "Policy", stage: Stage, seed: int) -> None:
    """Do supervised updates on random problems, which are the same on every rank."""
    import torch
    import torch.distributed
    from rich.progress import track

    from megatron_fipo.data.tokenizers import load_tokenizer
    from megatron_fipo.policy.feed import made_alike

    def cross_entropy(batch: "MicroBatch", logits: "Tensor") -> "tuple[Tensor, Tensor, dict[str, Tensor]]":
        log_probs, _ = policy.label_log_probs(batch, logits)
        loss = -log_probs[batch.response_mask].sum()
        tokens = batch.response_mask.sum().to(torch.int32)
        counts = {"count/tokens": tokens, "count/normaliser": tokens, "count/loss": loss.detach()}
        return loss, tokens, {name: value.float() for name, value in counts.items()}

    tokenizer = load_tokenizer(policy.config.model.path)
    rng, held_out = random.Random(seed), held_out_prompts()
    first = torch.distributed.get_rank() == 0
    for step in track(range(stage.steps), "supervised training", disable=not first):
        styles = LEARNING_STYLES if step < stage.learning_share * stage.steps else FINAL_STYLES
        (mini_batch,) = made_alike(policy, *draw(tokenizer, rng, styles, stage, held_out))
        metrics = policy.update(mini_batch, loss=cross_entropy)
        if first and (step % 100 == 99 or step == 0):
            print(f"step {step + 1:5d}  loss {metrics['loss']:.4f}", flush=True)


def held_out_prompts() -> set[str]:
    """Return the validation problems, which the base model must not see."""
    lines = resolve_embedded("embedded:tiny_validation.jsonl").read_text().splitlines()
    return {json.loads(line)["prompt"][0]["content"] for line in lines}


def draw(
    tokenizer: "Tokenizer", rng: random.Random, styles: tuple[float, ...], stage: Stage, held_out: set[str]
) -> "Made":
    """Return solved random problems as one mini-batch."""
    import torch

    from megatron_fipo.data.column_sums import EOS_ID, problem, prompt, solution
    from megatron_fipo.rollout.plain_batch import plain_batch

    prompts, rows = [], []
    while len(rows) < stage.batch:
        digits = problem(rng)
        if prompt(digits) in held_out:
            continue
        question = tokenizer.encode(prompt(digits))
        worked = tokenizer.encode(prompt(digits) + solution(digits, rng, styles, stage.wrong))
        prompts.append(len(question))
        rows.append(torch.tensor([*worked, EOS_ID]))
    return plain_batch(
        streams={"token_ids": rows, "rollout_log_probs": [torch.zeros(len(row)) for row in rows]},
        prompt_lengths=prompts,
        advantages=[0.0] * stage.batch,
    )


def save(policy: "Policy", start: Path, out: Path) -> None:
    """Write the trained model, tokenizer and configuration, replacing existing files."""
    import torch.distributed

    from megatron_fipo.weights.reshard import save_huggingface

    fresh = out.with_name(f".{out.name}.new")
    save_huggingface(policy.chunks, policy.model_config, start, fresh)
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(out, ignore_errors=True)
        fresh.rename(out)
        print(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(main())
