"""Why: a choice that is read as another layer's, or a byte off, sends tokens to experts that exist, and nobody notices.

By hand, for experts in some layers, and for more of them than a byte can number. The way from a server to the trainer
is in tests/rollout/test_routed_experts.py, that the trainer's routers follow in tests/policy/test_layouts.py.
"""

import numpy
import pytest
from msgspec.structs import replace

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.records.routes import UNKNOWN_BYTE, RouteFormat, route_format

SMALL, LARGE = RouteFormat((1, 3), 2, 255), RouteFormat((1, 3), 2, 256)


def test_a_models_format_follows_its_config() -> None:
    found = route_format(read_architecture(resolve_embedded("embedded:tiny_moe")).experts)
    assert found is not None and found.number == 8 and found.width == len(found.layers) * found.per_token
    assert route_format(read_architecture(resolve_embedded("embedded:tiny")).experts) is None


@pytest.mark.parametrize("form", [SMALL, LARGE], ids=["one byte", "two bytes"])
def test_layers_with_experts_are_kept_and_the_last_token_has_none(form: RouteFormat) -> None:
    engines = numpy.arange(3 * 5 * 2, dtype=numpy.uint16).reshape(3, 5, 2)
    bytes_of = form.packed(engines, 4)
    assert bytes_of.shape == (4, form.width) and form.width == 4 * form.item_bytes
    assert form.unpacked(bytes_of)[:3].tolist() == engines[:, [1, 3]].tolist()
    assert (bytes_of[3] == UNKNOWN_BYTE).all() and form.problem(bytes_of) is None
    first, last = form.columns([3])
    assert form.unpacked(bytes_of[:3, first:last]).tolist() == engines[:, [3]].tolist()
    assert form.columns([1, 3]) == (0, form.width) and form.columns([]) == (0, 0)
    assert form.problem(bytes_of[:0]) is None, "a rank of context parallelism may have padding only"


def test_expert_255_is_known_where_it_exists() -> None:
    """In one byte it would be the mark of what is not known."""
    engines = numpy.array([[[0, 0], [255, 254], [0, 0], [1, 255]]])
    assert LARGE.unpacked(LARGE.packed(engines, 2))[0].tolist() == [[255, 254], [1, 255]]
    assert LARGE.problem(LARGE.packed(engines, 2)) is None


@pytest.mark.parametrize("shape", [(2, 5, 2), (4, 5, 2), (3, 3, 2), (3, 5, 3), (3, 10)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"have the shape .*, and should have 3 tokens, at least 4 layers and 2 exp"):
        SMALL.packed(numpy.zeros(shape, numpy.uint8), 4)


@pytest.mark.parametrize("form", [RouteFormat((0,), 2, 8), RouteFormat((0,), 2, 300)], ids=["one byte", "two bytes"])
def test_numbers_that_no_router_chose_are_told(form: RouteFormat) -> None:
    def problem(*experts: int) -> str | None:
        return replace(form, per_token=len(experts)).problem(
            numpy.array([experts], f"<u{form.item_bytes}").view(numpy.uint8)
        )

    unknown = 256**form.item_bytes - 1
    assert problem(form.number - 1, 0) is None and problem(unknown, unknown) is None
    assert problem(0, form.number) == f"has the expert {form.number}; a layer has 0 to {form.number - 1}"
    assert problem(3, 3) == "has a token that goes to one expert twice"
    assert problem(3, unknown) == "has a token some of whose experts are not known"
    assert problem(5, 6, 7, 4, 6, 3) is not None and problem(5, 6, 7, 4, 2, 3) is None, "also where others are between"
