"""Cases that fuzzing has found: each ended in a traceback, in several lines, in nobody's name, or passed unseen.

They are tried in every run, while the random ones differ from campaign to campaign.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_fipo.errors import FipoError
from tests.fuzz.command_lines import entered
from tests.fuzz.model_directories import loaded

pytestmark = pytest.mark.slow

COMMAND_LINES: dict[str, tuple[str, str]] = {
    f"run.steps={'9' * 5000}": ("run.steps", "Exceeds the limit"),
    f"hardware.memory_gb_s={'9' * 400}": ("hardware.memory_gb_s", "too large"),
    f"+model.layers={'9' * 5000}": ("model.layers", "Exceeds the limit"),
    f"run.steps='{'x' * 200_000}'": ("run.steps", "xxx …"),
    "rollout=nan": ("rollout", "not a choice of this group"),
    "model=7": ("model", "not a choice of this group"),
    "parallel=[1,2]": ("parallel", "not a choice of this group"),
    "optimizer=a/../../b": ("optimizer=a/../../b", "there is no such choice"),
    f"data.train={'[' * 60 + ']' * 60}": ("data.train", "a list of texts"),
    "data.train=${run.steps}": ("data.train", "a list of texts"),
    "data.task_options=${run.steps}": ("data.task_options", "is not a dictionary"),
    "algorithm=${oc.select:run.name}": ("algorithm", "not a choice of this group"),
    "experiment=1e300": ("experiment", "not a choice of this group"),
    "algorithm.filter_groups=${..model.path}": ("algorithm.filter_groups", "is not a section"),
    "--no-such-flag": ("command line", "unrecognized arguments: --no-such-flag"),
    "-algorithm=dapo": ("command line", "unrecognized arguments: -algorithm=dapo"),
    "algorithm.future_kl.drop_dual_clipped=2": ("algorithm.future_kl.drop_dual_clipped", "true or false"),
    "run.collective_timeout_s=1e30": ("run.collective_timeout_s", "at most 604,800"),
    "rollout.host=''": ("rollout.host", "127.0.0.1"),
    "run.directory=''": ("run.directory", "runs/mine"),
    "run.name=a\x00b": ("run.name", "cannot be read"),
    '"run.name=\\ud800"': ('"run.name', "cannot be read"),
}


@pytest.mark.parametrize("argument", COMMAND_LINES, ids=lambda text: ascii(text[:40]))
def test_a_command_line(argument: str) -> None:
    key, said = COMMAND_LINES[argument]
    code, lines, config = entered([argument])
    assert (code, config, len(lines)) == (2, None, 1), lines
    assert lines[0].startswith(f"error: {key}") and said in lines[0] and len(lines[0]) < 1500, lines


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("# @package _global_\nrun:\n  name: é\n".encode("latin-1"), "mine.yaml is not UTF-8 text"),
        (b"# @packaglobal_\n", "experiment=mine: Expected header format"),
    ],
)
def test_a_yaml_file(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(content)
    code, lines, _ = entered([f"--config-dir={tmp_path}", "experiment=mine"])
    assert code == 2 and len(lines) == 1 and said in lines[0], lines


def _set(name: str, **settings: object) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return spoil


def _set_tokenizer(**settings: object) -> Callable[[Path], None]:
    return _set("tokenizer_config.json", **settings)


def _tokenizer_without_texts(directory: Path) -> None:
    path = directory / "tokenizer.json"
    tree = json.loads(path.read_text())
    del tree["added_tokens"][0]["content"]
    path.write_text(json.dumps(tree))


def _index_with(name: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        path = directory / "model.safetensors.index.json"
        tree = json.loads(path.read_text())
        tree["weight_map"]["lm_head.weight"] = name
        path.write_text(json.dumps(tree))

    return spoil


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(text) and None


def _piece_of_no_text(directory: Path) -> None:
    path = directory / "tokenizer.model"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"<bos>", b"\x9ebos>", 1))


MODELS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "an added token without a text": ("one-file", _tokenizer_without_texts, "cannot read its tokenizer"),
    "a shard that is no text": ("shards", _index_with("\ud800"), "must map each tensor to a file beside it"),
    "a shard of a long name": ("shards", _index_with("x" * 9999), "must map each tensor to a file beside it"),
    "a shard in another directory": ("shards", _index_with("../x"), "must map each tensor to a file beside it"),
    "a piece that is no text": ("shards", _piece_of_no_text, "is not a sentencepiece model"),
    "a bos token that is no text": ("shards", _set_tokenizer(bos_token="\ud800"), "is not a token of tokenizer.model"),
    "a template that is none": ("one-file", _write("chat_template.jinja", "{% for %}"), "cannot be compiled"),
    "a template that writes nothing": ("one-file", _write("chat_template.jinja", "{{ '' }}"), "writes nothing"),
    "a long id": (
        "one-file",
        _write("generation_config.json", json.dumps({"eos_token_id": "x" * 9999})),
        "not a token id",
    ),
    "an output layer that is not the embedding": (
        "shards",
        _set("config.json", tie_word_embeddings=True),
        "which its config.json ties to it",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_directory(name: str, sound: list[Path], tmp_path: Path) -> None:
    kind, spoil, said = MODELS[name]
    directory = tmp_path / "spoilt-model"
    shutil.copytree(next(path for path in sound if path.name == kind), directory)
    spoil(directory)
    with pytest.raises(FipoError) as refusal:
        loaded(directory)
    message = str(refusal.value)
    assert said in message and "spoilt-model" in message
    assert "\n" not in message and len(message) < 1200


def test_a_length_of_the_tokenizer_that_is_no_number_is_not_read(sound: list[Path], tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(sound[0], directory)
    _set_tokenizer(model_max_length="2048")(directory)
    assert loaded(directory)[1] == loaded(sound[0])[1]
