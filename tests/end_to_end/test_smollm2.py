"""A real language model end to end: SmolLM2-135M-Instruct on reasoning-gym's chain_sum, on the CPU.

Why: the embedded model is small and ours; a published one brings its own tokenizer, chat template, 30 layers, a head
count that divides by three and a vocabulary of 49,152. `make test-real` makes its directory and runs this, about ten
minutes on two cores.
"""

from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.end_to_end import runs

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

MODEL = runs.ROOT / "models" / "smollm2-135m"
QUESTIONS = ("What is 4 + 3?", "Name the capital of France.", "Write one sentence about the sea.")


@pytest.mark.parametrize("layout", ["pp2", "tp3"])
def test_five_steps(layout: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    settings = {"pp2": [], "tp3": ["parallel.tensor=3", "parallel.pipeline=1"]}[layout]
    runs.run(tmp_path, "experiment=smollm2_135m", f"model.path={MODEL}", *settings, timeout_s=1500)
    rows = runs.rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        assert row["ppo_kl_first"] == 0.0
        assert 0 < row["log_prob_diff_mean"] < 1e-4, "trainer and engine disagree on the sampled tokens"
        assert row["weight_version"] == row["step"] - 1
        assert -1 <= row["reward_mean"] <= 1
    text = (tmp_path / "samples" / "step-000001.txt").read_text()
    assert "<|im_start|>" in text and "reward" in text

    import subprocess
    import sys

    converted = tmp_path / "converted"
    command = [sys.executable, "tools/convert_hf.py", "to-hf", tmp_path / "checkpoints" / "step-000005", converted]
    subprocess.run([*map(str, command), "--model", str(MODEL)], cwd=runs.ROOT, check=True, timeout=300)
    before, after = load_file(MODEL / "model.safetensors"), load_file(converted / "model.safetensors")
    assert before.keys() == after.keys()
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert not same, f"training left {same} as they were"
    assert all(torch.allclose(before[name], after[name], atol=1e-2) for name in before)


def test_greedy_continuation_equals_transformers() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    prompts, expected = [], []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
        whole = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, pad_token_id=0)
        prompts.append(ids)
        expected.append(whole[0, len(ids) :].tolist())
    (found,) = run_ranks(
        "tests.end_to_end.greedy:continue_greedily",
        1,
        {"model_dir": str(MODEL), "prompts": prompts, "tokens": 16},
        timeout=600,
    )
    # transformers stops at the end of a turn.
    assert [ids[: len(stop)] for ids, stop in zip(found, expected, strict=True)] == expected
    assert "4 + 3 = 7" in tokenizer.decode(expected[0])
