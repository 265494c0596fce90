"""Why: a resume that goes on from half a state, or from another one, shows nowhere but in what the run learns.

Hundreds of random changes to the files of one state; chosen ones are test_loop_state.py.
"""

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
from msgspec import to_builtins
from msgspec.structs import replace
from safetensors.numpy import load_file, save

from megatron_fipo import loop_state
from megatron_fipo.errors import FipoError
from megatron_fipo.rollout import snapshot
from megatron_fipo.rollout.ledger import Ends, StepCounts
from megatron_fipo.rollout.training_rollouts import TrainingRollouts
from tests.loop_state.states import SAMPLES, resume

pytestmark = pytest.mark.slow
MUTATIONS = 400


def without_empty(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object as it is written: what a reward of the user's own did not say is left out, and what was not told."""
    left_out = [("told", [])] if "text" in dict(pairs) else [("told", []), ("extra", {})]
    return {name: value for name, value in pairs if (name, value) not in left_out}


def as_written(text: bytes) -> Any:
    """What a JSON file says, with the counts of nothing that it may leave out."""
    content = json.loads(text, strict=False, object_pairs_hook=without_empty)
    for key, counts in (("ends", Ends()), ("step", StepCounts())):
        if isinstance(content.get(key), dict):
            content[key] = to_builtins(counts) | content[key]
    if isinstance(content.get("order"), dict):
        content["order"] = {"returned": []} | content["order"]
    content.pop("megatron_core", None)
    return content


@pytest.mark.parametrize("kind", ["value", "key", "bytes", "tensors", "tensor bytes"])
def test_whatever_happens_to_the_files_is_refused_in_one_line_or_loaded_as_it_stands(
    kind: str, run: TrainingRollouts, saved: Path, tmp_path: Path
) -> None:
    """Nothing that stands in the files is passed over or taken for something else, and no other error is raised."""
    directory = shutil.copytree(saved, tmp_path / saved.name)
    json_names, array_names = ("trainer.json", "rollout/ledger.json"), (SAMPLES, SAMPLES.replace("00000", "00001"))
    whole = {name: (saved / name).read_bytes() for name in (*json_names, *array_names)}
    outcomes = {"refused": 0, "loaded": 0}
    for seed in range(MUTATIONS):
        drawn = random.Random(f"{kind} {seed}")
        of_json = kind in ("value", "key", "bytes")
        name = drawn.choices(json_names, weights=(1, 4))[0] if of_json else drawn.choice(array_names)
        content = whole[name]
        if kind in ("value", "key"):
            value = json.loads(content)
            (change_value if kind == "value" else change_key)(value, drawn)
            content = json.dumps(value).encode()
        elif kind == "tensors":
            content = save(change_tensors(load_file(saved / name), drawn))
        else:
            content = change_bytes(content, drawn)
        files = whole | {name: content}
        for each, data in files.items():
            (directory / each).write_bytes(data)
        try:
            state = resume(run, directory)
        except FipoError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error) and str(directory) in str(error), seed
            continue
        outcomes["loaded"] += 1
        content_again = loop_state.content(state.step, state.seconds, state.results)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(snapshot, "_BYTES_PER_FILE", 150)
            again = snapshot.encode(state.rollout)
        assert content_again == as_written(files["trainer.json"]), seed
        assert json.loads(json.dumps(again.ledger)) == as_written(files["rollout/ledger.json"]), seed
        # Other prompts of the same problems are warned about, and the fingerprint is then that of the present ones.
        assert replace(run.snapshot(), data=state.rollout.data) == state.rollout, seed
        for each, arrays in zip(array_names, again.files, strict=True):
            found = load_file(directory / each)
            assert found.keys() == arrays.keys()
            assert all(found[key].tobytes() == array.tobytes() for key, array in arrays.items()), seed
    assert outcomes["refused"] > MUTATIONS / 10, outcomes
    assert outcomes["loaded"] > 0, f"the control: a harmless change is none to refuse ({outcomes})"


ODD_VALUES = (None, True, False, -1, 0, 1, 2**31, 2**63, 10**22, 0.5, -0.5, 1e308, float("nan"), float("-inf"), "", "x")
ODD_VALUES += ([], {}, [1], {"x": 1}, "0", "judged", "stop", "timeout")


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every container and key in a JSON value."""
    if not isinstance(content, dict | list):
        return []
    keys = list(content) if isinstance(content, dict) else range(len(content))
    return [place for key in keys for place in ((content, key), *places(content[key]))]


def change_value(content: Any, drawn: random.Random) -> None:
    """Another value at some place, or one from elsewhere, or a number that is one off."""
    container, key = drawn.choice(places(content))
    value = container[key]
    if isinstance(value, int) and drawn.random() < 0.3:
        container[key] = value + drawn.choice([-1, 1])
    elif drawn.random() < 0.2:
        other, name = drawn.choice(places(content))
        container[key] = copy.deepcopy(other[name])
    else:
        container[key] = copy.deepcopy(drawn.choice(ODD_VALUES))


def change_key(content: Any, drawn: random.Random) -> None:
    """A key or an element removed, added, doubled, renamed, or moved to the end."""
    container, key = drawn.choice(places(content))
    if isinstance(container, list):
        value = container.pop(key)
        container += drawn.choice([[], [value, value], [value]])
        return
    value = container.pop(key)
    match drawn.randrange(4):
        case 1:
            container |= {key: value, drawn.choice(["x", key.upper(), f"{key}_"]): value}
        case 2:
            container[key[:-1]] = value
        case 3:
            container[key] = value


def change_bytes(data: bytes, drawn: random.Random) -> bytes:
    """A file cut short, with other bytes somewhere, with more at its end, or empty."""
    place, changed = drawn.randrange(min(len(data), drawn.choice([9, 400, len(data)]))), bytearray(data)
    match drawn.randrange(5):
        case 0:
            return data[:place]
        case 1:
            return data + drawn.choice([b"\0", b" ", b"\n", b"{}", data])
        case 2:
            del changed[place : place + drawn.choice([1, 8])]
        case 3:
            changed[place:place] = drawn.choice([b"\0", b" ", b'"', b"[" * 5000, b"\xff", b"1"])
        case 4:
            changed[place] = drawn.randrange(256)
    return bytes(changed)


def change_tensors(arrays: dict[str, Any], drawn: random.Random) -> dict[str, Any]:
    """A tensor of another type, shape, length, name or value, one too many, or one too few."""
    name = drawn.choice(sorted(arrays))
    array = arrays.pop(name)
    match drawn.randrange(6):
        case 0:
            array = array.astype(drawn.choice([numpy.int64, numpy.float16, numpy.float64, numpy.uint8, numpy.int32]))
        case 1:
            array = drawn.choice([array[None], array[:, None], array[:-1], array[:0], numpy.append(array, array[:1])])
        case 2:
            arrays[drawn.choice(["x", f"{name}s", "response_reward"])] = array
        case 3:
            name = drawn.choice(["x", name.upper()])
        case 4:
            array = array.copy()
            array[drawn.randrange(len(array))] = drawn.choice([0, 1, 37, 38, 255 if array.dtype == numpy.uint8 else -1])
        case 5:
            return arrays
    return arrays | {name: array}
