"""Why: a resume that goes on from half a state, or from another one, shows nowhere but in what the run learns.

The state of an Experience with the embedded problems, written and read as a checkpoint's, and hundreds of damaged ones.
Whole runs that resume, and the ranks that hear of a refusal, are tests/end_to_end; that a file is the one which was
written (a digit that has become another digit) is not covered here.
"""

import copy
import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from msgspec.structs import replace
from safetensors.numpy import load_file, save, save_file

from megatron_fipo import loop_state
from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config.configure import load_config
from megatron_fipo.errors import DataError, FipoError
from megatron_fipo.experience import Experience
from megatron_fipo.loop_state import LoopState
from megatron_fipo.records.sample import Group, RewardResult, sample_from_lists
from megatron_fipo.records.segments import segments_around
from megatron_fipo.tracking.console import Console

pytestmark = pytest.mark.slow
STEP, VOCABULARY = 3, 38
MUTATIONS = 400


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Experience]:
    model = resolve_embedded("embedded:tiny")
    with pytest.MonkeyPatch.context() as patch, Console(1, 0, enabled=False) as console:
        patch.setenv("FIPO_ROLLOUT_TOKEN", "secret")
        server = ["rollout.servers=0", "rollout.addresses=[http://127.0.0.1:9]"]
        config = load_config([*server, "reward.rule=exact_match", "reward.workers=1"])
        with Experience(config, model, tmp_path_factory.mktemp("run"), console) as experience:
            experience.order.take(5)
            experience.drawn = 5
            yield experience


@pytest.fixture(scope="module")
def saved(run: Experience, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's two files, with three groups that were carried over."""
    run.sampling.carry([group(run, number) for number in range(3)])
    directory = tmp_path_factory.mktemp("saved") / "step-000003"
    write(directory, LoopState(step=STEP, seconds=1.5, results={"accuracy_before": None}, experience=run.state()))
    return directory


def group(run: Experience, number: int) -> Group:
    """A group as sampling and judging leave it; its log-probs are fp32, as an engine's."""
    drawn = random.Random(number)
    samples, results = [], []
    for length in (1, drawn.randint(2, 9)):
        token_ids = [drawn.randrange(VOCABULARY) for _ in range(length)]
        log_probs = numpy.float32([-drawn.random() for _ in range(length)]).tolist()
        sample = sample_from_lists(token_ids, log_probs, "stop", STEP - 1)
        segments = segments_around([(1, length - 1)] if length > 3 else [], length, "made")
        text = run.tokenizer.decode(token_ids) + "é"
        samples.append(dataclasses.replace(sample, text=text, segments=segments))
        extra: dict[str, float | str] = {"steps": 2.0, "why": "é"} if length > 1 else {}
        results.append(RewardResult(float(length > 1), drawn.random(), "é7", "judged", extra))
    return Group(run.problems[number], tuple(samples)).with_results(results)


def write(directory: Path, state: LoopState[Group]) -> None:
    directory.mkdir()
    content, arrays = loop_state.encode(state)
    (directory / "trainer.json").write_text(json.dumps(content | {"megatron_core": "0.16.1"}))
    save_file(arrays, directory / "trainer.safetensors")


def resume(run: Experience, directory: Path) -> LoopState[Group]:
    return run.resume(directory / "trainer.json", directory / "trainer.safetensors", STEP)


def test_a_state_comes_back_bit_for_bit(run: Experience, saved: Path) -> None:
    before = run.state()
    state = resume(run, saved)
    assert state.experience == before == run.state() and len(before.kept) == 3
    assert (state.step, state.seconds, state.results) == (STEP, 1.5, {"accuracy_before": None})
    tokens = sum(len(sample) for group in before.kept for sample in group.samples)
    arrays = load_file(saved / "trainer.safetensors")
    assert arrays["response_token_ids"].nbytes == arrays["response_log_probs"].nbytes == 4 * tokens


def test_without_groups_the_arrays_are_empty(run: Experience, tmp_path: Path) -> None:
    empty = LoopState(step=STEP, seconds=0.0, results={}, experience=replace(run.state(), kept=[]))
    write(tmp_path / "step-000003", empty)
    assert (
        loop_state.read(
            tmp_path / "step-000003/trainer.json", tmp_path / "step-000003/trainer.safetensors", step=STEP, vocab_size=1
        )
        == empty
    )


def test_a_state_in_json_alone_is_read(run: Experience, saved: Path, tmp_path: Path) -> None:
    """Checkpoints had no arrays before, and no fingerprint of the data in the beginning."""
    found = resume(run, saved).experience
    assert any(sample.told for group in found.kept for sample in group.samples)
    expected = replace(found, kept=[of_one_turn(group) for group in found.kept])
    directory = old(expected, tmp_path / "step-000003")
    assert resume(run, directory).experience == expected
    content = json.loads((directory / "trainer.json").read_text())
    response = content["experience"]["sampling"]["kept"][1]["responses"][0]
    for key, value, words in (
        ("token_ids", [VOCABULARY], "is 38 at"),
        ("token_ids", [2**40], "cannot be read"),
        ("token_ids", [1, 2], "2 token_ids, 1 rollout_log_probs"),
        ("token_ids", "x", "kept[1].responses[0].token_ids"),
        ("log_probs", [1e300], "is inf at"),
        ("weight_version", 9, "kept[1].responses[0].weight_version is 9"),
    ):
        right = response[key]
        response[key] = value
        (directory / "trainer.json").write_text(json.dumps(content))
        assert words in refusal(run, directory) and "trainer.json" in refusal(run, directory)
        response[key] = right
    del content["experience"]["data"]
    (directory / "trainer.json").write_text(json.dumps(content))
    assert resume(run, directory).experience == replace(expected, data=None)


def of_one_turn(group: Group) -> Group:
    samples = tuple(dataclasses.replace(sample, segments=()) for sample in group.samples)
    return dataclasses.replace(group, samples=samples)


def test_a_row_from_before_there_were_segments_is_one_action(run: Experience, saved: Path, tmp_path: Path) -> None:
    found = resume(run, saved).experience
    directory = shutil.copytree(saved, tmp_path / saved.name)
    content = json.loads((directory / "trainer.json").read_text())
    told = [row.pop("told", []) for group in content["experience"]["kept"] for row in group["responses"]]
    assert any(told)
    (directory / "trainer.json").write_text(json.dumps(content))
    assert resume(run, directory).experience == replace(found, kept=[of_one_turn(group) for group in found.kept])


def old(state: Any, directory: Path) -> Path:
    """The state as it was written before arrays had a file."""
    directory.mkdir()
    kept = [
        {
            "problem": vars(group.problem) | {"token_ids": group.problem.token_ids.tolist()},
            "responses": [
                {
                    "token_ids": each.token_ids.tolist(),
                    "log_probs": each.streams["rollout_log_probs"].tolist(),
                    "finish_reason": each.finish_reason,
                    "weight_version": each.weight_version,
                }
                for each in group.samples
            ],
            "judgements": [vars(result) for result in group.results],
            "text": [each.text for each in group.samples],
        }
        for group in state.kept
    ]
    plain = json.loads(
        json.dumps(loop_state.encode(LoopState(step=STEP, seconds=1.5, results={}, experience=state))[0])
    )
    del plain["format"], plain["experience"]["kept"]
    plain["experience"]["sampling"] = {"kept": kept, "counts": {"carried_in": 3}}
    (directory / "trainer.json").write_text(json.dumps(plain | {"megatron_core": "0.16.1"}))
    return directory


def refusal(run: Experience, directory: Path) -> str:
    """What is said instead of going on: one line of the project's own."""
    with pytest.raises(FipoError) as refused:
        resume(run, directory)
    assert "\n" not in str(refused.value)
    return str(refused.value)


JSON_FAULTS: dict[str, tuple[str, Any, str]] = {
    "position beyond the data": ("experience.order.position", 4001, "order.position is 4001, and should be at most"),
    "negative position": ("experience.order.position", -1, "`int` >= 0 - at `$.experience.order.position`"),
    "position of another type": (
        "experience.order.position",
        "5",
        "Expected `int`, got `str` - at `$.experience.order",
    ),
    "true as a number": ("experience.drawn", True, "Expected `int`, got `bool` - at `$.experience.drawn`"),
    "other data of equal size": ("experience.data.problems", "0" * 32, "experience.data: the problems have changed"),
    "no fingerprint": ("experience.data", None, "experience.data is null, and should be"),
    "a garbled fingerprint": ("experience.data.prompts", "x", "at `$.experience.data.prompts`"),
    "two sizes": ("experience.data.count", 5, "data.count is 5, and should be experience.order.size, 4000"),
    "another seed": ("experience.order.seed", 1, "order.seed is 1, and this run's is 0"),
    "another step": ("step", 4, "step is 4, and should be 3 in step-000003"),
    "an unknown result": ("results.accurcy_before", 1.0, "^(accuracy|response_length)_(before|after)"),
    "an unknown key": ("experience.order.x", 1, "unknown field `x` - at `$.experience.order`"),
    "a format of the future": ("format", 3, "Invalid enum value 3 - at `$.format`"),
    "more tokens than there are": ("experience.kept.2.responses.0.tokens", 2, "response_token_ids is I32 of shape"),
    "no response": ("experience.kept.0.responses", [], "length >= 1 - at `$.experience.kept[0].responses`"),
    "a future version": ("experience.kept.1.responses.1.weight_version", 4, "kept[1].responses[1].weight_version is 4"),
    "a count beyond counting": ("experience.drawn", 2**63, "<= 4611686018427387904 - at `$.experience.drawn`"),
    "an epoch beyond counting": ("experience.order.epoch", 2**63, "<= 4611686018427387904 - at `$.experience.order"),
    "more seconds than there were": ("seconds", 1e300, "`float` <= 1000000000000.0 - at `$.seconds`"),
    "a reward that overflows": (
        "experience.kept.0.responses.0.reward",
        1e300,
        "at `$.experience.kept[0].responses[0].r",
    ),
    "context at the end": ("experience.kept.0.responses.0.told", [[0, 1]], "responses[0].told of problem "),
    "an outcome that is none": ("experience.kept.1.responses.1.outcome", "ok", "kept[1].responses[1].outcome`"),
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_a_fault_in_the_json_names_its_key(fault: str, run: Experience, saved: Path, tmp_path: Path) -> None:
    key, value, words = JSON_FAULTS[fault]
    directory = shutil.copytree(saved, tmp_path / saved.name)
    content = json.loads((directory / "trainer.json").read_text())
    *parents, last = key.split(".")
    place = content
    for name in parents:
        place = place[int(name) if name.isdigit() else name]
    place[last] = value
    (directory / "trainer.json").write_text(json.dumps(content))
    said = refusal(run, directory)
    assert words in said
    assert str(directory / ("trainer.safetensors" if fault.startswith("more tokens") else "trainer.json")) in said


ARRAY_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "one token less": (
        lambda arrays: arrays.update(response_token_ids=arrays["response_token_ids"][1:]),
        "response_token_ids is I32 of shape",
    ),
    "log-probs in fp64": (
        lambda arrays: arrays.update(response_log_probs=arrays["response_log_probs"].astype(numpy.float64)),
        "response_log_probs is F64 of shape",
    ),
    "two dimensions": (
        lambda arrays: arrays.update(response_text=arrays["response_text"][None]),
        "response_text is U8 of shape [1, ",
    ),
    "a tensor is lacking": (lambda arrays: arrays.pop("prompt_token_ids"), "and should have prompt_token_ids,"),
    "a tensor too many": (lambda arrays: arrays.update(x=arrays["response_text"]), "response_token_ids, x, and should"),
    "an unknown token": (
        lambda arrays: arrays["response_token_ids"].__setitem__(1, VOCABULARY),
        "response_token_ids is 38 at 1, and should be 0 to 37",
    ),
    "a negative token": (
        lambda arrays: arrays["prompt_token_ids"].__setitem__(0, -1),
        "prompt_token_ids is -1 at 0, and should be 0 to 37",
    ),
    "no number": (
        lambda arrays: arrays["response_log_probs"].__setitem__(2, numpy.nan),
        "response_log_probs is nan at 2, and should be a finite number",
    ),
    "no text": (lambda arrays: arrays["response_text"].__setitem__(0, 255), "response_text is not UTF-8 at 0"),
}


@pytest.mark.parametrize("fault", ARRAY_FAULTS)
def test_a_fault_in_the_arrays_names_its_tensor(fault: str, run: Experience, saved: Path, tmp_path: Path) -> None:
    change, words = ARRAY_FAULTS[fault]
    directory = shutil.copytree(saved, tmp_path / saved.name)
    arrays = {name: array.copy() for name, array in load_file(saved / "trainer.safetensors").items()}
    change(arrays)
    save_file(arrays, directory / "trainer.safetensors")
    said = refusal(run, directory)
    assert words in said and str(directory / "trainer.safetensors") in said


def test_a_group_longer_than_the_configurations_limits_is_refused(
    run: Experience, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.config.rollout, "max_response_length", 1)
    assert "before rollout.max_response_length=1: resume with at least " in refusal(run, saved)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(run: Experience) -> None:
    for attribute, value in (("reward", float("nan")), ("accuracy", float("inf"))):
        whole = group(run, 0)
        first, *others = whole.results
        broken = whole.with_results([dataclasses.replace(first, **{attribute: value}), *others])
        experience = replace(run.state(), kept=[broken])
        with pytest.raises(DataError, match=f"{broken.problem.id} has accuracy .*; finite numbers can be saved"):
            loop_state.encode(LoopState(step=STEP, seconds=0.0, results={}, experience=experience))


def without_empty(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object as it is written: what a reward of the user's own did not say is left out, and what was not told."""
    left_out = [("told", [])] if "text" in dict(pairs) else [("told", []), ("extra", {})]
    return {name: value for name, value in pairs if (name, value) not in left_out}


@pytest.mark.parametrize("kind", ["value", "key", "bytes", "tensors", "tensor bytes"])
def test_whatever_happens_to_the_files_is_refused_in_one_line_or_loaded_as_it_stands(
    kind: str, run: Experience, saved: Path, tmp_path: Path
) -> None:
    """Nothing that stands in the files is passed over or taken for something else, and no other error is raised."""
    directory = shutil.copytree(saved, tmp_path / saved.name)
    json_file, arrays_file = directory / "trainer.json", directory / "trainer.safetensors"
    outcomes = {"refused": 0, "loaded": 0}
    for seed in range(MUTATIONS):
        drawn = random.Random(f"{kind} {seed}")
        text, arrays = (saved / "trainer.json").read_bytes(), (saved / "trainer.safetensors").read_bytes()
        if kind in ("value", "key"):
            content = json.loads(text)
            (change_value if kind == "value" else change_key)(content, drawn)
            text = json.dumps(content).encode()
        elif kind == "bytes":
            text = change_bytes(text, drawn)
        elif kind == "tensors":
            arrays = save(change_tensors(load_file(saved / "trainer.safetensors"), drawn))
        else:
            arrays = change_bytes(arrays, drawn)
        json_file.write_bytes(text)
        arrays_file.write_bytes(arrays)
        try:
            state = resume(run, directory)
        except FipoError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error) and str(directory) in str(error), seed
            continue
        outcomes["loaded"] += 1
        again, arrays_again = loop_state.encode(state)
        before = json.loads(text, strict=False, object_pairs_hook=without_empty)
        assert again == {key: value for key, value in before.items() if key != "megatron_core"}, seed
        # Other prompts of the same problems are warned about, and the fingerprint is then that of the present ones.
        assert replace(run.state(), data=state.experience.data) == state.experience, seed
        found = load_file(arrays_file)
        assert found.keys() == arrays_again.keys()
        assert all(found[name].tobytes() == array.tobytes() for name, array in arrays_again.items()), seed
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
