"""What tests/test_export.py runs by itself: a model directory's greedy answers to texts, by vLLM alone.

python -m tests.vllm_texts DIRECTORY FILE writes {"completions": [...], "chats": [...]} of the texts on stdin.
"""

import json
import os
import sys

if __name__ == "__main__":
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams

    texts = json.load(sys.stdin)
    engine = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256)
    greedy = SamplingParams(temperature=0.0, max_tokens=120)
    completions = [output.outputs[0].text for output in engine.generate(texts, greedy, use_tqdm=False)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    replies = [output.outputs[0].text for output in engine.chat(chats, greedy, use_tqdm=False)]
    with open(sys.argv[2], "w") as file:
        json.dump({"completions": completions, "chats": replies}, file)
