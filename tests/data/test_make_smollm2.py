"""Why: a wrongly dequantised or tokenised model still writes text, but worse text. So the answer itself is compared.

Needs models/smollm2-135m, which tools/make_smollm2.py makes; the download itself is not tested.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.data.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "smollm2-135m"
TOOL = ROOT / "tools" / "make_smollm2.py"
needs_model = [pytest.mark.real, pytest.mark.skipif(not MODEL.is_dir(), reason="run tools/make_smollm2.py first")]


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={"PYTHONPATH": str(ROOT)}
    )


@pytest.mark.slow
def test_help_teaches_and_an_incomplete_directory_is_refused(tmp_path):
    assert "safetensors (538 MB)" in run_tool("--help").stdout
    refused = run_tool("--out", str(tmp_path))
    assert refused.returncode == 1
    assert "remove it and run this again" in refused.stderr


class TestRealModel:
    pytestmark = needs_model

    def test_greedy_answer_is_the_known_one(self):
        import torch
        from transformers import AutoModelForCausalLM

        tokenizer = load_tokenizer(MODEL)
        prompt = tokenizer.encode(tokenizer.render([{"role": "user", "content": "What is 4 + 3?"}]))
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        with torch.inference_mode():
            output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)[0].tolist()
        assert output[-1] in tokenizer.eos_ids
        assert tokenizer.decode(output[len(prompt) :]) == "4 + 3 = 7"

    def test_tokenizer_cuts_digits_off_before_spaces_are_grouped(self):
        tokenizer = load_tokenizer(MODEL)
        assert len(tokenizer.encode("12345")) == 5
        assert len(tokenizer.encode("\n\n3")) == 2
        for text in ("What is 4 + 3?", "  a  b .\n\n 12", "naïve 数"):
            assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_tool_does_nothing_to_a_complete_model(self):
        before = (MODEL / "model.safetensors").stat().st_mtime_ns
        result = run_tool("--out", str(MODEL))
        assert (result.returncode, "nothing to do" in result.stdout) == (0, True)
        assert (MODEL / "model.safetensors").stat().st_mtime_ns == before
