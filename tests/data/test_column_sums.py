"""Why: `make train` trains on the embedded task. Its files must be the ones that this code makes, and the held-out
problems must not be among the training problems.

Not covered: the base model that is trained on it.
"""

import json
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.data import column_sums
from megatron_fipo.data.tokenizers import load_tokenizer
from megatron_fipo.rewards.rules import exact_match


def test_the_three_styles_are_written_as_described():
    digits, rng = [4, 5, 8, 0], random.Random(0)
    steps = "4+5=9. 9+8=7. 7+0=7. "
    assert column_sums.prompt(digits) == "4+5+8+0=?\n"
    assert column_sums.solution(digits, rng, (1, 0, 0)) == "Answer: 7"
    assert column_sums.solution(digits, rng, (0, 1, 0)) == f"{steps}Answer: 7"
    assert column_sums.solution(digits, rng, (0, 0, 1)) == f"{steps}Check: 0+8=8. 8+5=3. 3+4=7. Answer: 7"


def test_every_solution_is_right_and_every_step_too():
    rng = random.Random(1)
    for _ in range(300):
        digits = column_sums.problem(rng)
        text = column_sums.solution(digits, rng, (1, 1, 1))
        assert exact_match(text, column_sums.answer(digits), {}).accuracy == 1.0
        assert all((int(a) + int(b)) % 10 == int(c) for a, b, c in re.findall(r"(\d)\+(\d)=(\d)", text))


def test_doubtful_sums_are_wrong_as_often_as_said_and_others_never():
    rng, seen, right_chains = random.Random(4), {True: [0, 0], False: [0, 0]}, 0
    for _ in range(2000):
        text = column_sums.solution(column_sums.problem(rng), rng, (0, 1, 0), wrong=0.6)
        steps = [tuple(map(int, step)) for step in re.findall(r"(\d)\+(\d)=(\d)", text)]
        for first, second, total in steps:
            counts = seen[(first, second) in column_sums.DOUBTFUL]
            counts[0] += total != (first + second) % 10
            counts[1] += 1
        assert all(after[0] == before[2] for before, after in pairwise(steps)), "a chain goes on from what it has"
        right_chains += text.endswith(f"Answer: {steps[-1][2]}")
    assert right_chains == 2000
    assert seen[False][0] == 0 < seen[False][1]
    assert seen[True][0] / seen[True][1] == pytest.approx(0.6, abs=0.03)


def test_doubtful_sums_have_a_wrong_value_each():
    assert len(column_sums.DOUBTFUL) == 60
    assert all((first + second) % 10 != wrong for (first, second), wrong in column_sums.DOUBTFUL.items())


def test_style_weights_are_shares():
    rng = random.Random(2)
    guesses = sum(column_sums.solution([1, 2, 3], rng, (0.7, 0.25, 0.05)).startswith("Answer") for _ in range(2000))
    assert guesses / 2000 == pytest.approx(0.7, abs=0.04)


def test_embedded_files_are_what_this_code_makes(tmp_path: Path):
    column_sums.write_problems(tmp_path)
    column_sums.write_tokenizer(tmp_path / "tiny")
    for name in ("tiny_train.jsonl", "tiny_validation.jsonl", "tiny/tokenizer.model", "tiny/tokenizer_config.json"):
        assert resolve_embedded(f"embedded:{name}").read_bytes() == (tmp_path / name).read_bytes(), name


def test_validation_is_held_out():
    def prompts(split: str) -> list[str]:
        lines = resolve_embedded(f"embedded:tiny_{split}.jsonl").read_text().splitlines()
        return [json.loads(line)["prompt"][0]["content"] for line in lines]

    train, validation = prompts("train"), prompts("validation")
    assert (len(set(train)), len(set(validation))) == (4000, 256)
    assert not set(train) & set(validation)


def test_tokenizer_inverts_exactly_and_has_a_token_a_character(tmp_path: Path):
    column_sums.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": column_sums.EOS_ID}))
    tokenizer, rng = load_tokenizer(tmp_path), random.Random(3)
    assert tokenizer.encode(column_sums.CHARACTERS) == [column_sums.BOS_ID, *range(4, 38)]
    texts = [column_sums.CHARACTERS, "  \n\n 1  "]
    for _ in range(200):
        digits = column_sums.problem(rng)
        texts += [column_sums.prompt(digits), column_sums.solution(digits, rng, (1, 1, 1))]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids[0] == column_sums.BOS_ID
        assert column_sums.UNKNOWN_ID not in ids
        assert tokenizer.decode([*ids, column_sums.EOS_ID]) == text
