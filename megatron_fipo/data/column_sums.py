"""The embedded task: sums of 3 to 9 digits modulo 10, with solutions in three styles, and its files.

    4+5+8+0=?                                                         the problem
    Answer: 7                                                         a guess
    4+5=9. 9+8=7. 7+0=7. Answer: 7                                    worked steps
    4+5=9. 9+8=7. 7+0=7. Check: 0+8=8. 8+5=3. 3+4=7. Answer: 7        worked steps and a check in reverse

The base model knows all three styles but mostly guesses, so reinforcement learning can find the better ones. It has
also learnt some sums of two digits wrong (DOUBTFUL), so there is something to learn in every step. Everything here is a
function of its seed. To make the files again:

    python -m megatron_fipo.data.column_sums --out megatron_fipo/assets
"""

import argparse
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

from megatron_fipo.files import write_atomically

CHARACTERS = "\n0123456789+=.:; ?ACSacenrskhTotlw"
"""All characters of the task's texts. The tokenizer has one token for each."""
PAD_ID, EOS_ID, BOS_ID, UNKNOWN_ID = range(4)

TRAIN_SIZE, VALIDATION_SIZE = 4000, 256
_SHORTEST, _LONGEST = 3, 9


def _doubtful(seed: int, count: int) -> dict[tuple[int, int], int]:
    """Choose `count` of the 100 ordered pairs of digits, and a wrong sum for each."""
    rng = random.Random(seed)
    pairs = rng.sample([(first, second) for first in range(10) for second in range(10)], count)
    return {(first, second): (first + second + rng.randint(1, 9)) % 10 for first, second in pairs}


DOUBTFUL = _doubtful(seed=0, count=60)
"""Sums that the base model gets wrong half of the time: the pair of digits, and the wrong last digit of its sum."""
_SPACE_PIECE = "\u2581"


def problem(rng: random.Random) -> list[int]:
    """Return the digits of a random problem, 3 to 9 of them."""
    return [rng.randint(0, 9) for _ in range(rng.randint(_SHORTEST, _LONGEST))]


def prompt(digits: Sequence[int]) -> str:
    """Return the problem as text, with a newline: "4+5+8+0=?" for [4, 5, 8, 0]."""
    return "+".join(map(str, digits)) + "=?\n"


def answer(digits: Sequence[int]) -> str:
    """Return the sum modulo 10."""
    return str(sum(digits) % 10)


def solution(digits: Sequence[int], rng: random.Random, style_weights: Sequence[float], wrong: float = 0.0) -> str:
    """Return a solution in a random style. The weights are for guess, worked steps, and worked steps with a check.

    `wrong` is the probability that a sum in DOUBTFUL is written wrong. The next steps continue from the wrong sum. With
    0 the solution is right.
    """
    (style,) = rng.choices(("guess", "steps", "check"), style_weights)
    if style == "guess":
        return f"Answer: {answer(digits)}"
    text, last = _steps(digits, rng, wrong)
    if style == "check":
        check, last = _steps(digits[::-1], rng, wrong)
        text += f"Check: {check}"
    return f"{text}Answer: {last}"


def _steps(digits: Sequence[int], rng: random.Random, wrong: float) -> tuple[str, int]:
    """Return the running sum written out, "4+5=9. 9+8=7. 7+0=7. ", and its last value."""
    total, text = digits[0], ""
    for digit in digits[1:]:
        before, total = total, (total + digit) % 10
        if wrong and (before, digit) in DOUBTFUL and rng.random() < wrong:
            total = DOUBTFUL[before, digit]
        text += f"{before}+{digit}={total}. "
    return text, total


def write_problems(directory: Path, seed: int = 0) -> None:
    """Write tiny_train.jsonl and tiny_validation.jsonl. All problems are distinct, and none is in both files."""
    rng = random.Random(seed)
    distinct: dict[str, str] = {}
    while len(distinct) < TRAIN_SIZE + VALIDATION_SIZE:
        digits = problem(rng)
        distinct.setdefault(prompt(digits), answer(digits))
    rows = [_row(text, truth) for text, truth in distinct.items()]
    # The problems drawn first have the distribution of `problem`. Later there are no unused short sums left.
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "tiny_validation.jsonl", "".join(rows[:VALIDATION_SIZE]).encode())
    write_atomically(directory / "tiny_train.jsonl", "".join(rows[VALIDATION_SIZE:]).encode())


def write_tokenizer(directory: Path) -> None:
    """Write tokenizer.model and tokenizer_config.json into a model directory. A prompt is <bos> and then its text.

    There is one token per character: <pad> 0, <eos> 1, <bos> 2, <unk> 3, then CHARACTERS in order. Texts are not
    normalised, there is no dummy prefix, and no whitespace is removed: decode(encode(text)) == text for every text of
    the task.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    # All characters except the last are user-defined symbols, which keeps their order. sentencepiece's trainer needs at
    # least one character to learn.
    *given, learnt = (_SPACE_PIECE if character == " " else character for character in CHARACTERS)
    SentencePieceTrainer.train(
        sentence_iterator=iter([learnt]),
        model_writer=model,
        model_type="char",
        vocab_size=len(CHARACTERS) + 4,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=PAD_ID,
        eos_id=EOS_ID,
        bos_id=BOS_ID,
        unk_id=UNKNOWN_ID,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=given,
        minloglevel=2,
    )
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "tokenizer.model", model.getvalue())
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    settings = {"add_bos_token": True, "add_eos_token": False, **special}
    write_atomically(directory / "tokenizer_config.json", (json.dumps(settings, indent=2) + "\n").encode())


def _row(text: str, truth: str) -> str:
    row = {
        "data_source": "column_sums",
        "prompt": [{"role": "user", "content": text}],
        "reward_model": {"ground_truth": truth},
    }
    return json.dumps(row, separators=(",", ":")) + "\n"


def main() -> None:
    """Write the problem files, and the tokenizer into the model directory tiny/."""
    parser = argparse.ArgumentParser(description="Make the embedded task's problem files and tokenizer.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write to")
    out = parser.parse_args().out
    write_problems(out)
    write_tokenizer(out / "tiny")


if __name__ == "__main__":
    main()
