"""The recorded values per token are those of the loss, in every layout.

Why: the credit viewer is believed. A value at the wrong token, or a chunk of context parallelism in the wrong place,
would look as convincing as the right one. What is compared with is computed by transformers and, token by token, by the
formulas (algorithm/plain.py). The negative control swaps the chunks of a context-parallel rank.

Not covered: bf16, GPUs.
"""

import base64
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_fipo.records.credit import (
    CLIPPED,
    COUNTS,
    PRODUCED,
    TAKES_PART,
    TokenCredit,
    decode_pieces,
    join_pieces,
)
from tests.algorithm.plain import plain_influence
from tests.distributed import run_ranks
from tests.policy.credit_ranks import LEFT_OUT, UPDATE
from tests.policy.layouts import ALGORITHMS
from tests.policy.test_layouts import TOLD, make_case

pytestmark = pytest.mark.slow

CUT = {"pipeline": 2, "context": 2}
ONE: list[dict[str, Any]] = [{"packing": True}, {"packing": False}]
EIGHT: list[dict[str, Any]] = [
    {**CUT, "packing": True, "data": 2},
    {**CUT, "packing": False, "data": 2},
    {**CUT, "packing": True, "tensor": 2, "sequence": True},
    {**CUT, "packing": True, "data": 2, "sabotage": "chunks"},
]
FIPO = ALGORITHMS["fipo"]


def expected(folder: Path) -> list[dict[str, list[float]]]:
    """What each response's values should be, by transformers and the formulas."""
    import transformers

    model = transformers.Qwen2ForCausalLM(transformers.AutoConfig.from_pretrained(folder / "model")).float()
    model.load_state_dict(load_file(folder / "model" / "model.safetensors"), strict=False)
    data = load_file(folder / "batch.safetensors")
    lengths, prompts = data["lengths"].tolist(), data["prompts"].tolist()
    responses = [length - prompt for length, prompt in zip(lengths, prompts, strict=True)]
    pairs = zip(data["tokens"].split(lengths), data["old_log_probs"].split(responses), strict=True)
    found = []
    for row, (ids, old) in enumerate(pairs):
        with torch.no_grad():
            every = model(ids[None, :-1]).logits[0].log_softmax(-1)[prompts[row] - 1 :]
        delta = every.gather(-1, ids[prompts[row] :, None])[:, 0] - old
        told = [range(start, end) for at, start, end in TOLD if at == row]
        places = [t for t in range(len(delta)) if not any(t + prompts[row] in stretch for stretch in told)]
        advantage = float(data["advantages"][row])
        moved = [delta[t].item() for t in places]
        assert FIPO.future_kl is not None and FIPO.clip_ratio_c is not None
        gamma = 2 ** (-1 / FIPO.future_kl.decay_rate)
        joins = [value <= math.log(FIPO.clip_ratio_c) for value in moved]
        terms = list(zip(places, moved, joins, strict=True))
        found.append(
            {
                "places": places,
                "log_ratio": moved,
                "future_kl": [sum(gamma ** (k - t) * d for k, d, joins in terms if k >= t and joins) for t in places],
                "influence": plain_influence(moved, advantage, FIPO, places),
                "entropy": [-(every[t].exp() * every[t]).sum().item() for t in places],
                "old_log_prob": [old[t].item() for t in places],
                "takes_part": [float(each) for each in joins],
                "clipped": [float(is_clipped(math.exp(value), advantage)) for value in moved],
            }
        )
    return found


def is_clipped(ratio: float, advantage: float) -> bool:
    """PPO's rule: the ratio has gone too far in the direction that the advantage asks for."""
    assert FIPO.clip_ratio_high is not None and FIPO.clip_ratio_low is not None
    return ratio > 1 + FIPO.clip_ratio_high if advantage > 0 else ratio < 1 - FIPO.clip_ratio_low


def worst_difference(credit: TokenCredit, wanted: dict[str, list[float]]) -> tuple[float, str]:
    """The largest difference at a token that the policy produced, over all values and bits, and its column."""
    places = torch.tensor(wanted["places"])
    state = torch.from_numpy(credit.state.copy())
    assert (state & PRODUCED).nonzero()[:, 0].tolist() == wanted["places"]
    assert not (state[(state & PRODUCED) == 0] & (TAKES_PART | COUNTS)).any()
    found = {name: torch.from_numpy(values.copy())[places] for name, values in credit.values.items()}
    found |= {"takes_part": (state[places] & TAKES_PART) > 0, "clipped": (state[places] & CLIPPED) > 0}
    names = [name for name in wanted if name != "places"]
    return max(((found[name].double() - torch.tensor(wanted[name])).abs().max().item(), name) for name in names)


def compare(joined: dict[int, TokenCredit], wanted: list[dict[str, list[float]]]) -> None:
    worst, where = max(worst_difference(credit, wanted[row]) for row, credit in joined.items())
    assert worst < 2e-5, where


@pytest.mark.parametrize(("world_size", "layouts"), [(1, ONE), (8, EIGHT)], ids=["one", "eight"])
def test_recorded_values_are_those_of_the_loss(world_size: int, layouts: list[dict[str, Any]], tmp_path: Path) -> None:
    case = make_case(tmp_path, "tied", TOLD)
    data = load_file(tmp_path / "batch.safetensors")
    arguments = {"model_dir": str(tmp_path / "model"), "batch": str(tmp_path / "batch.safetensors")}
    ranks = run_ranks(
        "tests.policy.credit_ranks:recorded",
        world_size,
        {**arguments, "layouts": layouts},
        300,
        "tests.policy.layouts",
    )
    assert case["loss"] and all(frames == [] for rank in ranks[1:] for frames in rank), "only rank 0 gathers"
    wanted = expected(tmp_path)
    lengths = dict(enumerate((data["lengths"] - data["prompts"]).tolist()))
    for layout, frames in zip(layouts, ranks[0], strict=True):
        pieces = [piece for frame in frames for piece in decode_pieces(base64.b64decode(frame))]
        joined = join_pieces(pieces, lengths)
        assert sorted(joined) == [row for row in lengths if row != LEFT_OUT], "what the batch marks, and no other"
        assert {credit.update for credit in joined.values()} == {UPDATE}
        if "sabotage" in layout:
            # Swapped chunks move the bits of what the policy produced, too.
            with pytest.raises(AssertionError):
                compare(joined, wanted)
        else:
            compare(joined, wanted)
