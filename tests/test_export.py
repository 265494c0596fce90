"""Why: a model that others read as other text, or not at all, is worth nothing to whoever asked for it.

From a run's directory, a checkpoint and a Hugging Face directory; refusals; text by transformers and by vLLM itself,
each from the exported directory alone. Uploading is in tests/exporting, conversion in tests/weights. Does not
cover other architectures than Qwen2, whose tokenizers come with tokenizer.json already.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.cli import COMMANDS
from megatron_fipo.config.configure import load_config
from megatron_fipo.data.tokenizers import load_tokenizer
from megatron_fipo.errors import WeightError
from megatron_fipo.export import ExportError, Request, export, find, parse
from megatron_fipo.tracking.run_files import write_config, write_summary
from megatron_fipo.weights.conversion import differences, to_megatron

TINY = resolve_embedded("embedded:tiny")
TEXTS = ["4+5+8+0=?\n", "1+2+3=?\n1+2", "9+9+9+9+9=?\n9+9=8. ", "7+0+3+1+2+6+5=?\n7+0=7. "]
"""Problems, all but the first with the beginning of a worked solution: the base model itself would guess."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with two checkpoints and a Hugging Face directory, all of the embedded model."""
    run = tmp_path_factory.mktemp("run")
    (run / "checkpoints").mkdir()
    to_megatron(TINY, run / "checkpoints" / "step-000010")
    shutil.copytree(run / "checkpoints" / "step-000010", run / "checkpoints" / "step-000020")
    shutil.copytree(TINY, run / "huggingface" / "step-000005")
    write_config(run, load_config([]))
    write_summary(run, {"steps": 20, "accuracy_before": 0.25, "accuracy_after": 0.75})
    return run


@pytest.fixture(scope="module")
def exported(finished: Path) -> Path:
    return export(Request(finished))


def test_the_newest_checkpoint_becomes_a_directory_with_all_that_text_takes(finished: Path, exported: Path) -> None:
    assert exported == finished / "export" / "step-000020"
    names = {path.name for path in exported.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md", "config.json"} <= names
    assert differences(finished / "checkpoints" / "step-000020", exported) == []
    card = (exported / "README.md").read_text()
    assert "| held-out accuracy, before → after | 0.25 → 0.75 |" in card and "| training steps | 20 |" in card
    assert str(finished) not in card


def test_transformers_alone_reads_the_ids_that_the_run_trained_on(exported: Path) -> None:
    ours, theirs = load_tokenizer(TINY), AutoTokenizer.from_pretrained(exported)
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text)
        chat = theirs.apply_chat_template([{"role": "user", "content": text}], return_dict=False)
        assert chat == ours.encode(text)
        assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == text
    as_it_was = AutoTokenizer.from_pretrained(TINY)
    assert as_it_was.decode(as_it_was.encode(TEXTS[0]), skip_special_tokens=True) != TEXTS[0], "nothing to mend"


@pytest.mark.matrix  # test_live_update.py compares engines too
@pytest.mark.slow
def test_vllm_and_transformers_say_the_same(exported: Path, tmp_path: Path) -> None:
    """vLLM itself, not the run's server: with nothing of this package, as a user serves the directory."""
    expected = greedy_texts(exported)
    assert expected[0].startswith("Answer: ") and all(len(text) > 3 for text in expected)
    command = [sys.executable, "-m", "tests.vllm_texts", str(exported), str(tmp_path / "said.json")]
    done = subprocess.run(
        command,
        input=json.dumps(TEXTS),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["completions"] == expected
    assert said["chats"] == expected


def greedy_texts(directory: Path) -> list[str]:
    command = [sys.executable, "-m", "tests.transformers_texts", str(directory)]
    done = subprocess.run(command, input=json.dumps(TEXTS), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_a_step_a_checkpoint_and_a_hugging_face_directory(finished: Path, tmp_path: Path) -> None:
    checkpoint = finished / "checkpoints" / "step-000010"
    assert find(finished, 10).directory == checkpoint
    assert find(finished, 5).directory == finished / "huggingface" / "step-000005"
    assert (find(checkpoint).run, find(checkpoint).step) == (finished, 10)
    assert find(finished / "huggingface").step == 5
    assert (find(TINY).run, find(TINY).step) == (None, None)
    half = export(Request(finished / "huggingface" / "step-000005", tmp_path / "half", dtype="bfloat16"))
    assert differences(checkpoint, half, torch.bfloat16) == []
    assert (half / "tokenizer.json").is_file() and (half / "README.md").is_file()


def test_a_base_models_card_is_kept_and_its_license_holds(finished: Path, tmp_path: Path) -> None:
    source = finished / "huggingface" / "step-000030"
    shutil.copytree(TINY, source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: other/one\n---\nthe base model's card\n")
    target = export(Request(source, tmp_path / "model"))
    shutil.rmtree(source)
    assert "license: apache-2.0\n" in (target / "README.md").read_text()
    assert "the base model's card" in (target / "README-base.md").read_text()
    assert "other/one" not in (target / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["step=7"], "step=7: RUN has no such checkpoint; it has 5, 10, 20"),
        (["stop=7"], "stop: no such option; did you mean step?"),
        (["token=secret"], "token: no such option; "),
        (["step=x"], "step=x: is not a number of steps"),
        (["step=1", "step=2"], "step: is given twice"),
        (["dtype=int8"], "dtype=int8: is none of float32, bfloat16, float16"),
        (["a", "b"], "3 directories are named"),
        (["RUN/config.yaml"], "RUN/config.yaml: exists and is not empty"),
        (["RUN/huggingface"], "RUN/huggingface: exists and is not empty"),
        (["push=a"], "push=a: is not the name of a repository"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_nothing_is_written(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch, arguments: list[str], said: str
) -> None:
    import megatron_fipo.export as command

    monkeypatch.chdir(tmp_path)
    given = [argument.replace("RUN", str(finished)) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["export", str(finished), *given])
    before = {*finished.rglob("*")}
    with pytest.raises(SystemExit) as end:
        command.main()
    error = capsys.readouterr().err
    assert end.value.code in (1, 2) and error.startswith("error: " + said.replace("RUN", str(finished)))
    assert error.count("\n") == 1 and "secret" not in error
    assert {*finished.rglob("*")} == before and not list(tmp_path.iterdir())


def test_a_directory_without_weights_and_weights_without_a_configuration_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="neither a run with a checkpoint"):
        export(Request(tmp_path))
    with pytest.raises(ExportError, match="no such directory"):
        export(Request(tmp_path / "nowhere"))
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ExportError, match="has no config"):
        export(Request(tmp_path / "model"))
    shutil.copytree(TINY, tmp_path / "other")
    settings = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(settings | {"intermediate_size": 100}))
    with pytest.raises(WeightError, match="does not fit"):
        export(Request(tmp_path / "other", tmp_path / "target"))
    assert not (tmp_path / "target").exists()


def test_options_and_places_come_in_any_order(tmp_path: Path) -> None:
    assert parse(["step=3", "a", "push=o/n", "b"]) == Request(Path("a"), Path("b"), 3, None, "o/n")
    assert parse(["./x=y"]).source == Path("x=y")
    assert COMMANDS["export"][0] == "megatron_fipo.export"
