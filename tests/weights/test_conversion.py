"""Why: a conversion that drops, misnames or half-writes a tensor is found out weeks later, if at all.

The converter's functions in this process, on small models: bad input, a kill in the middle, a full disk, types, shards.
What Megatron-Core makes of the files is in tests/tools/test_convert_hf.py, more in tests/policy/test_checkpoint.py.
"""

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.serialization import _open_file

from megatron_fipo.errors import WeightError
from megatron_fipo.weights.conversion import differences, to_huggingface, to_megatron
from megatron_fipo.weights.distributed_checkpoint import CheckpointReader
from megatron_fipo.weights.huggingface import HuggingFaceReader
from tests.weights.models import MOE_MODELS, SMALL_MODELS, write_model
from tests.weights.spoil import (
    EMBEDDING,
    NORM,
    garble,
    lose_a_file,
    lose_a_shard,
    misshape,
    mix_types,
    other_architecture,
    plant,
    shorten,
    truncate,
)

NO_MOUNT, CLONE_NEWNS, MS_REC, MS_PRIVATE = 77, 0x20000, 0x4000, 0x40000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {model.name: write_model(model, directory) for model in (*SMALL_MODELS, *MOE_MODELS)}


@pytest.fixture
def model(models: dict[str, Path], tmp_path: Path) -> Path:
    """A model to spoil."""
    return Path(shutil.copytree(models["qwen2-tied"], tmp_path / "model"))


@pytest.fixture(scope="module")
def checkpoint(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("checkpoints") / "qwen2-tied"
    to_megatron(models["qwen2-tied"], target)
    return target


def nothing_but(directory: Path, *names: str) -> bool:
    return sorted(path.name for path in directory.iterdir()) == sorted(names)


def in_child(work: Callable[[], object]) -> int:
    """Run it in a forked process; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def mount_memory(directory: Path, size: str) -> bool:
    """Mount a file system in memory on `directory`, for this process alone; whether that is allowed."""
    libc = ctypes.CDLL(None)
    if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
        return False
    return libc.mount(b"none", str(directory).encode(), b"tmpfs", 0, f"size={size}".encode()) == 0


def test_keys_are_those_of_transformer_engine(models: dict[str, Path], tmp_path: Path) -> None:
    """What its layers ask a checkpoint for, norms within the linear layers and extra state beside them."""
    to_megatron(models["qwen3-untied"], tmp_path / "checkpoint")
    norms = {"self_attention.q_layernorm", "self_attention.k_layernorm"}
    linear = {"self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"}
    expected = {f"decoder.layers.{name}.weight" for name in norms | linear}
    expected |= {f"decoder.layers.{name}.layer_norm_weight" for name in ("self_attention.linear_qkv", "mlp.linear_fc1")}
    expected |= {f"decoder.layers.{name}._extra_state/shard_{layer}_4" for name in linear for layer in range(4)}
    expected |= {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}
    metadata = CheckpointReader(tmp_path / "checkpoint")._metadata
    assert metadata.state_dict_metadata.keys() == expected


def test_experts_lie_in_rows_where_megatron_puts_them(models: dict[str, Path], tmp_path: Path) -> None:
    """Stacked over layers and experts, or over experts alone where only some layers have any."""
    to_megatron(models["qwen3-moe"], tmp_path / "alike")
    to_megatron(models["qwen3-moe-dense-between"], tmp_path / "unlike")
    alike, unlike = CheckpointReader(tmp_path / "alike"), CheckpointReader(tmp_path / "unlike")
    assert alike.tensors["decoder.layers.mlp.experts.linear_fc1.weight"].shape == (4, 8, 48, 48)
    assert alike.tensors["decoder.layers.pre_mlp_layernorm.weight"].shape == (4, 48)
    assert unlike.tensors["decoder.layers.3.mlp.experts.linear_fc2.weight"].shape == (4, 48, 24)
    assert unlike.tensors["decoder.layers.2.mlp.linear_fc1.layer_norm_weight"].shape == (48,)
    objects = alike._metadata.state_dict_metadata.keys(), unlike._metadata.state_dict_metadata.keys()
    assert "decoder.layers.mlp.experts.linear_fc1._extra_state/shard_3.7_4.8" in objects[0]
    assert "decoder.layers.3.self_attention.linear_qkv._extra_state/shard_0_1" in objects[1]


@pytest.mark.parametrize("name", [model.name for model in (*SMALL_MODELS, *MOE_MODELS)])
def test_there_and_back_gives_the_same_file(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    model = models[name]
    to_megatron(model, tmp_path / "megatron")
    assert differences(tmp_path / "megatron", model) == []
    # The checkpoint carries the configuration along, so that it is complete by itself.
    to_huggingface(tmp_path / "megatron", tmp_path / "back", tmp_path / "megatron")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / file).read_text()) == json.loads((model / file).read_text())
    assert nothing_but(tmp_path, "megatron", "back")


def test_configuration_and_tokenizer_come_along_and_other_weights_do_not(model: Path, tmp_path: Path) -> None:
    """Of a sentencepiece model and of a tokenizers one, both ways."""
    carried = (
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "merges.txt",
        "chat_template.jinja",
        "LICENSE",
    )
    for name in (*carried, "pytorch_model.bin", "trainer.json"):
        (model / name).write_bytes(name.encode() * 3)
    to_megatron(model, tmp_path / "megatron")
    to_huggingface(tmp_path / "megatron", tmp_path / "back", tmp_path / "megatron")
    for target in (tmp_path / "megatron", tmp_path / "back"):
        assert all((target / name).read_bytes() == name.encode() * 3 for name in carried), target
        assert not (target / "pytorch_model.bin").exists() and not (target / "trainer.json").exists()
    assert not list((tmp_path / "back").glob("*.distcp")) and not (tmp_path / "back/metadata.json").exists()


def test_types_are_cast_and_shards_are_cut_at_their_size(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    done = to_huggingface(checkpoint, tmp_path / "half", model, dtype=torch.bfloat16, max_shard_bytes=10_000)
    sources = load_file(model / "model.safetensors")
    index = json.loads((tmp_path / "half/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == sources.keys() and done.tensors == len(sources)
    assert index["metadata"]["total_size"] == done.bytes == sum(tensor.numel() * 2 for tensor in sources.values())
    for file in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "half" / file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 10_000
        assert all(torch.equal(tensor, sources[name].bfloat16()) for name, tensor in tensors.items())
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    assert differences(checkpoint, tmp_path / "half", torch.bfloat16) == []


def test_a_difference_of_one_bit_is_named(model: Path, checkpoint: Path) -> None:
    """The negative control of --verify."""
    tensors = load_file(model / "model.safetensors")
    tensors[NORM].view(torch.int32)[7] ^= 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert differences(checkpoint, model) == [NORM]


@pytest.mark.parametrize("direction", ["to megatron", "to hf"])
def test_a_killed_conversion_is_taken_up(model: Path, checkpoint: Path, tmp_path: Path, direction: str) -> None:
    target = tmp_path / "target"

    def convert(progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        if direction == "to hf":
            return to_huggingface(checkpoint, target, model, max_shard_bytes=10_000, progress=progress).taken_up
        return to_megatron(model, target, progress=progress).taken_up

    def kill_in_the_middle(done: int, total: int) -> None:
        if done > total / 2:
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(lambda: convert(kill_in_the_middle)) == -signal.SIGKILL
    assert not target.exists() and (tmp_path / ".target.partial").exists()
    with (tmp_path / ".target.partial/journal.jsonl").open("a") as journal:
        journal.write('{"file": "mod')  # as a kill in the middle of a line leaves it
    assert convert() > 0
    assert differences(*((checkpoint, target) if direction == "to hf" else (target, model))) == []
    assert nothing_but(tmp_path, "model", "target")


def test_what_was_made_from_another_source_is_not_taken_up(model: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_megatron(model, tmp_path / "target", progress=stop)
    tensors = load_file(model / "model.safetensors")
    tensors[EMBEDDING] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert to_megatron(model, tmp_path / "target").taken_up == 0
    assert differences(tmp_path / "target", model) == []


def test_two_conversions_to_one_target_do_not_mix(model: Path, tmp_path: Path) -> None:
    def convert_again(done: int, total: int) -> None:
        with pytest.raises(WeightError, match="another process is writing"):
            to_megatron(model, tmp_path / "target")

    to_megatron(model, tmp_path / "target", progress=convert_again)
    assert differences(tmp_path / "target", model) == []


@pytest.mark.parametrize("direction", ["to megatron", "to hf"])
def test_a_full_disk_is_an_error_that_leaves_nothing(
    model: Path, checkpoint: Path, tmp_path: Path, direction: str
) -> None:
    """A limit on the size of files stands in for the disk: the same failing write, without a disk to fill."""

    def convert() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(WeightError, match=r"target could not be written: .*"):
            if direction == "to hf":
                to_huggingface(checkpoint, tmp_path / "target", model)
            else:
                to_megatron(model, tmp_path / "target")

    assert in_child(convert) == 0
    assert nothing_but(tmp_path, "model")


@pytest.mark.parametrize("direction", ["to megatron", "to hf"])
def test_a_disk_that_fills_up_meanwhile_is_an_error_that_leaves_nothing(
    model: Path, checkpoint: Path, tmp_path: Path, direction: str
) -> None:
    """A real one: 4 MiB of memory mounted where only a child process sees it."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def fill(done: int, total: int) -> None:
        with contextlib.suppress(OSError), (disk / "other").open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def convert() -> None:
        if not mount_memory(disk, "4m"):
            os._exit(NO_MOUNT)
        with pytest.raises(WeightError, match=r"target could not be written: .*No space left"):
            if direction == "to hf":
                to_huggingface(checkpoint, disk / "target", model, max_shard_bytes=10_000, progress=fill)
            else:
                to_megatron(model, disk / "target", progress=fill)
        assert nothing_but(disk, "other")
        with pytest.raises(WeightError, match=r"target (could not be written|takes)"):
            to_megatron(model, disk / "target")
        assert nothing_but(disk, "other")

    status = in_child(convert)
    if status == NO_MOUNT:
        pytest.skip("no file system can be mounted here")
    assert status == 0


def test_too_little_space_is_noticed_before_writing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(WeightError, match=r"target takes 0.00 GiB, but 0.00 GiB are free there"):
        to_megatron(model, tmp_path / "target")
    assert nothing_but(tmp_path, "model")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (truncate, [r"model.safetensors is damaged or cut short"]),
        (lose_a_shard, [r"model-00002-of-00002.safetensors is missing, although model.safetensors.index.json names"]),
        (
            misshape,
            [
                r"norm.weight: \(47,\) in .*, \(48,\) by its config.json",
                r"layers.1.input_layernorm.weight: missing",
                r"layers.9.input_layernorm.weight: left over in .*, shape \(48,\)",
            ],
        ),
        (mix_types, [r"mixes the types float16, float32; choose one with --dtype"]),
        (other_architecture, [r"architecture MambaForCausalLM is not supported"]),
    ],
)
def test_a_spoilt_directory_is_refused(
    model: Path, tmp_path: Path, spoil: Callable[[Path], None], said: list[str]
) -> None:
    spoil(model)
    for line in said:
        with pytest.raises(Exception, match=line):
            to_megatron(model, tmp_path / "target")
    assert nothing_but(tmp_path, "model")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shorten, r"__0_2.distcp is damaged or cut short, at decoder.layers"),
        (lose_a_file, r"__0_2.distcp is missing, although .metadata names it"),
        (garble, r"is not a distributed checkpoint, or is damaged"),
        (plant(os.system, "touch harm-was-done"), r"names posix.system, which no metadata needs"),
        (plant(_open_file, "harm-was-done", "wb"), r"names torch.serialization._open_file, which no metadata needs"),
    ],
)
def test_a_spoilt_checkpoint_is_refused(
    model: Path, checkpoint: Path, tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    spoilt = Path(shutil.copytree(checkpoint, tmp_path / "spoilt"))
    spoil(spoilt)
    with pytest.raises(WeightError, match=said):
        to_huggingface(spoilt, tmp_path / "target", model)
    assert nothing_but(tmp_path, "model", "spoilt")
    assert not Path("harm-was-done").exists()


def test_a_checkpoint_of_another_model_is_refused_by_name(
    models: dict[str, Path], checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(WeightError) as raised:
        to_huggingface(checkpoint, tmp_path / "target", models["llama-untied"])
    said = str(raised.value)
    assert "decoder.layers.self_attention.linear_qkv.bias: left over, shape (4, 96)" in said
    assert "output_layer.weight: missing, shape (62, 48) is expected" in said
    assert "embedding.word_embeddings.weight: (61, 48) in the checkpoint, (62, 48) by the configuration" in said
    assert nothing_but(tmp_path)


def test_not_finite_values_are_converted_and_counted(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[NORM][5] = torch.nan
    tensors[EMBEDDING][60, :3] = -torch.inf
    save_file(tensors, model / "model.safetensors")
    assert to_megatron(model, tmp_path / "megatron").not_finite == {NORM: 1, EMBEDDING: 3}
    assert to_huggingface(tmp_path / "megatron", tmp_path / "back", model).not_finite == {NORM: 1, EMBEDDING: 3}
    assert differences(tmp_path / "megatron", model) == []


def test_an_occupied_target_is_left_alone(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target/file").touch()
    for convert in (
        lambda target: to_megatron(model, target),
        lambda target: to_huggingface(checkpoint, target, model),
    ):
        with pytest.raises(WeightError, match="exists and is not empty"):
            convert(tmp_path / "target")
    assert nothing_but(tmp_path, "model", "target") and nothing_but(tmp_path / "target", "file")


def test_a_tensor_in_pieces_with_a_hole_is_refused(checkpoint: Path) -> None:
    reader = CheckpointReader(checkpoint)
    key = "decoder.layers.mlp.linear_fc2.weight"
    reader._metadata.state_dict_metadata[key].chunks.pop()
    assert reader._read(key, (0,)).shape == (48, 80)
    with pytest.raises(WeightError, match=r"linear_fc2.weight has 0 of 3840 values in its chunks"):
        reader._read(key, (3,))


def test_a_detached_tensor_outlives_its_reader(model: Path) -> None:
    with HuggingFaceReader(model) as reader:
        tensor = reader.detached_tensor(NORM)
    assert torch.equal(tensor, load_file(model / "model.safetensors")[NORM])
