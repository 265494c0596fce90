"""What tests/test_export.py runs by itself: a model directory's greedy answers to texts, by transformers alone.

python -m tests.transformers_texts DIRECTORY prints the answers to the texts on stdin, a JSON list. In a process of its
own: a trainer's settings of torch, which another test may have made, give transformers other logits.
"""

import json
import sys

if __name__ == "__main__":
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    answers = []
    for text in json.load(sys.stdin):
        asked = tokenizer(text, return_tensors="pt")
        answered = model.generate(**asked, max_new_tokens=120, do_sample=False)[0, asked["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(answered, skip_special_tokens=True))
    print(json.dumps(answers))
