"""What the ranks of test_saving.py run."""

import contextlib
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from megatron_fipo.config import Config, ParallelConfig
from megatron_fipo.errors import CheckpointError
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.policy import checkpoint, checkpoint_manifest, checkpoint_places, megatron_versions, platform
from megatron_fipo.policy.model import start_model_parallel
from megatron_fipo.policy.update import Policy
from megatron_fipo.weights.distributed_checkpoint import CheckpointReader
from tests.weights.test_conversion import mount_memory

platform.install()

from megatron.core import dist_checkpointing  # noqa: E402


def _policy(model_dir: str, parallel: dict[str, Any]) -> Policy:
    """A policy whose moments and master weights are random, and differ by rank where ranks hold different ones."""
    config = Config(parallel=ParallelConfig(**parallel))
    config.run.collective_timeout_s = 60.0
    config.model.dtype, config.model.layers = "bfloat16", "local"
    start_model_parallel(config.parallel, seed=0)
    policy = Policy(config, read_architecture(model_dir), model_dir, updates=1)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for value in _state(policy):
        value.copy_(torch.rand(value.shape, generator=generator))
    return policy


def _state(policy: Policy) -> list[torch.Tensor]:
    """The optimizer's own tensors, and the parameters last."""
    held = [
        value
        for part in policy.optimizer.chained_optimizers
        for master, moments in part.optimizer.state.items()
        for value in (master.detach(), moments["exp_avg"], moments["exp_avg_sq"])
    ]
    return held + [parameter.detach() for parameter in policy.chunks[0].parameters()]


def _not_loaded(policy: Policy, saved: Path) -> list[int]:
    """The numbers of the tensors that do not come back from a checkpoint as they are now."""
    before = [value.clone() for value in _state(policy)]
    for value in _state(policy):
        value.fill_(torch.nan)
    checkpoint.load(policy, saved)
    return [
        number
        for number, (old, new) in enumerate(zip(before, _state(policy), strict=True))
        if not torch.equal(old, new)
    ]


def all_together(model_dir: str, directory: str, parallel: dict[str, Any]) -> dict[str, Any]:
    """Everything that takes several ranks, in one launch."""
    platform.start_process_group(60)
    policy = _policy(model_dir, parallel)
    place = Path(directory)

    def save(step: int) -> Path:
        return checkpoint.start_saving(policy, place, step, {"step": step}, 2, Path(model_dir), _write_rollout).finish()

    checkpoint.load(policy, save(1))  # after which ranks agree on what several of them hold
    saved = save(1)
    found: dict[str, Any] = {"differing": _differing(policy, saved, place / "gathered")}
    found["not loaded"] = _not_loaded(policy, saved)
    found["damage"] = _damages(saved)
    found["failures"] = _failures(save, saved, place)
    found["left"] = sorted(path.name for path in place.glob("step-*"))
    found["kept"] = [save(step).name for step in (3, 4)]
    found["left at last"] = sorted(path.name for path in place.glob("step-*"))
    platform.stop_process_group()
    return found


def _differing(policy: Policy, saved: Path, other: Path) -> list[str]:
    """Tensors of `saved` that are not bit for bit those that Megatron-Core saves by itself, gathered from all ranks."""
    state = checkpoint._sharded_state(policy, is_loading=False)
    megatron_versions.dequantise(state)
    other.mkdir(exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(other))
    torch.distributed.barrier()
    ours, theirs = CheckpointReader(saved), CheckpointReader(other)
    assert ours.tensors == theirs.tensors and len([key for key in ours.tensors if "optimizer" in key]) > 20
    return [key for key in ours.tensors if not torch.equal(ours._read(key, ()), theirs._read(key, ()))]


def _write_rollout(directory: Path) -> None:
    """In a folder, as the rollouts' part is."""
    (directory / "rollout").mkdir()
    (directory / "rollout" / "ledger.json").write_text("{}")


def _damages(saved: Path) -> dict[str, str]:
    """What `verify` says of a checkpoint by what has happened to it: a byte of each file, and other damage."""
    names = sorted(checkpoint_places.files_of(saved))
    harms: dict[str, Callable[[Path], Any]] = {f"changed {name}": lambda path: None for name in names}
    harms |= {"truncated": _cut, "missing": _remove, "extra": _add, "no manifest": _forget, "older": _older}
    harms |= {"link": _link, "pipe": _pipe}
    harms["unharmed"] = lambda _: None
    said: dict[str, str] = {}
    for what, harm in harms.items():
        spoilt = saved.parent / "spoilt"
        if torch.distributed.get_rank() == 0:
            shutil.copytree(saved, spoilt)
            harm(spoilt)
            if what.startswith("changed "):
                _flip(spoilt / what.removeprefix("changed "))
        torch.distributed.barrier()
        try:
            said[what] = checkpoint_manifest.verify(spoilt)
        except CheckpointError as error:
            said[what] = str(error)
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(spoilt)
        torch.distributed.barrier()
    return said


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(directory: Path) -> None:
    os.truncate(directory / "__1_0.distcp", 1000)


def _remove(directory: Path) -> None:
    (directory / "__1_0.distcp").unlink()


def _add(directory: Path) -> None:
    (directory / "inner").mkdir()
    (directory / "inner/other.txt").write_text("")


def _link(directory: Path) -> None:
    """The same bytes, but not in the checkpoint."""
    (directory / "__1_0.distcp").rename(directory.parent / "elsewhere")
    (directory / "__1_0.distcp").symlink_to(directory.parent / "elsewhere")


def _pipe(directory: Path) -> None:
    """Whose reader would wait for ever."""
    (directory / "manifest.json").unlink()
    os.mkfifo(directory / "manifest.json")


def _forget(directory: Path) -> None:
    (directory / "manifest.json").unlink()


def _older(directory: Path) -> None:
    _forget(directory)
    shutil.rmtree(directory / "rollout")


def _failures(save: Callable[[int], Path], saved: Path, place: Path) -> dict[str, Any]:
    """By what happens to one rank while all save: what every rank says, after how long, and what is left."""
    found = {}
    for name, trouble, rank in (("limit", _small_files, 1), ("killed", _killed_writers, 1), ("space", _no_space, 0)):
        started = time.monotonic()
        with trouble() if torch.distributed.get_rank() == rank else contextlib.nullcontext():
            try:
                save(2)
                said = ""
            except CheckpointError as error:
                said = str(error)
        torch.distributed.barrier()
        seconds = time.monotonic() - started
        left = sorted(path.name for path in place.iterdir() if "step" in path.name)
        found[name] = {"said": said, "seconds": seconds, "left": left, "warning": checkpoint_manifest.verify(saved)}
    return found


@contextlib.contextmanager
def _small_files() -> Iterator[None]:
    """No file may grow beyond 20 kB: a disk that is full, to the one that writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def _killed_writers() -> Iterator[None]:
    """Whatever writes is killed, as for lack of memory."""
    from megatron_fipo.policy import checkpoint_files

    write = checkpoint_files._write_item

    def killed(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_files._write_item = killed  # type: ignore[assignment]
    try:
        yield
    finally:
        checkpoint_files._write_item = write


@contextlib.contextmanager
def _no_space() -> Iterator[None]:
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=1000)  # type: ignore[assignment]
    try:
        yield
    finally:
        shutil.disk_usage = usage


def on_a_full_disk(model_dir: str, directory: str) -> dict[str, Any]:
    """Save to a file system of memory until it is full, and once more with space again; nothing if none can be mounted.

    The space is taken after it has been looked for, as other processes do.
    """
    if not mount_memory(Path(directory), "3m"):
        return {}
    platform.start_process_group(60)
    policy = _policy(model_dir, {})
    place = Path(directory, "checkpoints")
    first = checkpoint.start_saving(policy, place, 1, {}, keep=0, model_dir=Path(model_dir)).finish()
    filler = Path(directory, "filler")
    look = shutil.disk_usage

    def take_all(path: Any) -> Any:
        found = look(path)
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        return found

    shutil.disk_usage = take_all  # type: ignore[assignment]
    said = ""
    try:
        checkpoint.start_saving(policy, place, 2, {}, keep=0, model_dir=Path(model_dir)).finish()
    except CheckpointError as error:
        said = str(error)
    shutil.disk_usage = look
    left = sorted(path.name for path in place.iterdir())
    filler.unlink()
    second = checkpoint.start_saving(policy, place, 2, {}, keep=0, model_dir=Path(model_dir)).finish()
    verified = [checkpoint_manifest.verify(path) for path in (first, second)]
    platform.stop_process_group()
    return {"said": said, "left": left, "verified": verified, "newest": checkpoint_places.newest(place).name}
