"""The rotary embedding of the model that was built: its stretching, and whether it is transformers'.

Each position turns pairs of a head's values by an angle. A wrong base or stretching shows only between tokens that are
far apart, so that a run on short texts would look sound.
"""

import json
from collections.abc import Iterable, Sequence

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.models.rope import LinearScaling, RopeScaling
from megatron_fipo.policy import platform
from megatron_fipo.weights.ranks import answer_of_rank_0
from megatron_fipo.weights.reshard import gather_texts
from megatron_fipo.weights.transformers_model import rotary_frequencies

RELATIVE_TOLERANCE = 1e-5
"""Of an angle: a few units in the last place of fp32, which devices' powers differ by, are a hundred times smaller."""


def stretch(rotary: RotaryEmbedding, scaling: RopeScaling | None) -> None:
    """Give a plain rotary embedding the frequencies of a stretched one; Megatron-Core's options fix three constants."""
    if isinstance(scaling, LinearScaling):
        rotary.inv_freq = rotary.inv_freq / scaling.factor
    elif scaling is not None:
        rotary.inv_freq = rotary._apply_scaling(
            rotary.inv_freq,
            factor=scaling.factor,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            original_max_position_embeddings=scaling.original_max_position_embeddings,
        )


def probe_positions(model_config: ModelConfig, context: int) -> list[int]:
    """A few positions over `context` tokens: its start, both sides of the original context's end, and its own end.

    As positions of one short causal sequence they put tokens at every kind of distance from one another.
    """
    original = model_config.original_context
    wanted = [*range(8), context // 2, original - 1, original, original + 1, context - 2, context - 1]
    return sorted({position for position in wanted if 0 <= position < context})


def check_rotary_embedding(
    model_chunks: Sequence[GPTModel], model_config: ModelConfig, model_dir: str, context: int
) -> None:
    """Compare the angles of this rank's model with transformers', over the whole context. Every rank calls it.

    Rank 0 asks transformers, so that the other ranks need not import it. Every rank refuses, naming the position, if
    one of them has another rotary embedding or transformers refuses the directory.
    """
    frequencies, scale = answer_of_rank_0(lambda: _expected(model_dir, context - 1))
    expected = torch.tensor(frequencies)
    positions = probe_positions(model_config, context)
    problems = [angle_problem(chunk.rotary_pos_emb, expected, scale, positions) for chunk in model_chunks]
    said = [problem for text in gather_texts(json.dumps(problems), platform.device()) for problem in json.loads(text)]
    if any(said):
        remedy = "a rotary embedding that both compute alike: see its keys in config.json"
        raise ConfigError("model.path", f"{model_dir}: the rotary embedding {next(filter(None, said))}", remedy)


def angle_problem(rotary: RotaryEmbedding, frequencies: Tensor, scale: float, positions: Iterable[int]) -> str:
    """Where the angles are not `frequencies` × position, or a factor on cosine and sine; empty if all is well."""
    if scale != 1.0:
        return f"has a factor of {scale:g} on its cosines in transformers, here none"
    for position in positions:
        found = rotary.get_freqs_non_repeated(1, offset=position)[0].double().cpu()
        wanted = frequencies.double() * position
        if found.shape != wanted.shape:
            return f"turns {len(found)} pairs of a head's values, {len(wanted)} in transformers"
        wrong = ~torch.isclose(found, wanted, rtol=RELATIVE_TOLERANCE, atol=1e-7)
        if wrong.any():
            pair = int(wrong.nonzero()[0])
            here, there = float(found[pair]), float(wanted[pair])
            return f"turns pair {pair} at position {position} by {here:.6g} radians, {there:.6g} in transformers"
    return ""


def _expected(model_dir: str, last: int) -> tuple[list[float], float]:
    frequencies, scale = rotary_frequencies(model_dir, last)
    return frequencies.tolist(), scale
