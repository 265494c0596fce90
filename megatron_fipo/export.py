"""Write a run's model as a Hugging Face directory that transformers and vLLM read as text.

  megatron-fipo export runs/mine                           its newest checkpoint, to runs/mine/export/step-000024
  megatron-fipo export runs/mine my-model step=20          the checkpoint after step 20, to my-model
  megatron-fipo export runs/mine/checkpoints/step-000020   a checkpoint, a run's or a converted one
  megatron-fipo export runs/mine/huggingface/step-000020   a directory of checkpoint.huggingface_every
  megatron-fipo export runs/mine dtype=bfloat16            weights of another type: float32, bfloat16 or float16
  megatron-fipo export runs/mine push=owner/name           and upload it, to a private repository of the model hub

The hub's token comes from HF_TOKEN, or from `hf auth login`. A target that is not empty is refused. Only one parameter
is in memory at a time. After an interruption, the same command continues. docs/export.md has more.
"""

import difflib
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.errors import FipoError, WeightError, one_line
from megatron_fipo.exporting.progress import progress_bar
from megatron_fipo.policy.checkpoint_places import complete, step_of

OPTIONS = ("step", "dtype", "push")
DTYPES = ("float32", "bfloat16", "float16")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", ".metadata")
"""Every directory with weights has one of these files. Distributed checkpoints have the last one."""


_FOLDERS = ("huggingface", "checkpoints")
"""The directories of a run in which there are models."""


class ExportError(FipoError):
    """The command line names nothing to export, or the hub refuses the upload."""

    exit_code = 2


@dataclass(frozen=True)
class Request:
    """A parsed command line."""

    source: Path
    target: Path | None = None
    step: int | None = None
    dtype: str | None = None
    push: str | None = None


@dataclass(frozen=True)
class Source:
    """Weights to export."""

    directory: Path
    """A distributed checkpoint or a Hugging Face directory."""
    run: Path | None = None
    """The directory of the run that wrote them."""
    step: int | None = None


def main() -> None:
    """Run the command line."""
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    warnings.simplefilter("ignore")  # deprecations inside libraries that a user cannot act on
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        export(parse(sys.argv[1:]))
    except FipoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        sys.exit(130)


def parse(arguments: Sequence[str]) -> Request:
    """Parse the command line. ExportError says what is wrong with it."""
    places: list[Path] = []
    options: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("-"):
            raise ExportError(f"{argument}: no such option; there are {', '.join(f'{name}=…' for name in OPTIONS)}")
        if not (equals and name.isidentifier()):
            places.append(Path(argument).expanduser())
        elif name in OPTIONS and name not in options:
            options[name] = value
        else:
            near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.5)
            instead = f"did you mean {near[0]}?" if near else f"there are {', '.join(OPTIONS)}"
            raise ExportError(f"{name}: is given twice" if name in options else f"{name}: no such option; {instead}")
    if not 1 <= len(places) <= 2:
        raise ExportError(
            f"{len(places)} directories are named; right is a run or a checkpoint, and optionally a target"
        )
    step, dtype, push = (options.get(name) for name in OPTIONS)
    if step is not None and not step.isdecimal():
        raise ExportError(f"step={step}: is not a number of steps")
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"dtype={dtype}: is none of {', '.join(DTYPES)}")
    if push is not None and (push.count("/") != 1 or not all(push.split("/"))):
        raise ExportError(f"push={push}: is not the name of a repository; owner/name is one")
    target = places[1] if len(places) == 2 else None
    return Request(places[0], target, None if step is None else int(step), dtype, push)


def export(request: Request) -> Path:
    """Write the directory, and upload it if requested. Return its path.

    Raises:
        ExportError: there is nothing to export, or the hub refuses the upload; this is checked before the conversion.
        WeightError: the weights do not fit their configuration, or the target cannot be written.
    """
    source = find(request.source, request.step)
    target = request.target or default_target(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target}: exists and is not empty; name another directory to write")
    if not (source.directory / "config.json").is_file():
        raise ExportError(f"{source.directory}: has no config.json, which says what its weights are")
    if request.push:
        from megatron_fipo.exporting.hub_upload import prepare_repository

        prepare_repository(request.push)
    convert(source, target, request.dtype)
    print(f"`vllm serve {target}` and transformers' from_pretrained({str(target)!r}) read it")
    if request.push:
        from megatron_fipo.exporting.hub_upload import upload

        name = "model" if source.step is None else f"step {source.step}"
        print(f"uploaded to {upload(target, request.push, f'Upload {name}')}")
    return target


def find(path: Path, step: int | None = None) -> Source:
    """Find the weights of a run, a checkpoint or a Hugging Face directory: the newest ones, or those of `step`.

    A run's checkpoints are preferred to its Hugging Face directories. ExportError if there are no weights.
    """
    if not path.is_dir():
        raise ExportError(f"{path}: no such directory")
    if any((path / name).is_file() for name in _WEIGHTS):
        found = Source(path, _run_of(path.resolve()), _step(path.resolve()))
        if step not in (None, found.step):
            raise ExportError(f"step={step}: {path} is one model; name its run to choose a step")
        return found
    steps: dict[int, Path] = {}
    for folder in (path, *(path / name for name in _FOLDERS)):
        steps |= {step_of(entry): entry for entry in complete(folder)}
    if not steps:
        raise ExportError(f"{path}: neither a run with a checkpoint, nor a checkpoint, nor a Hugging Face directory")
    chosen = max(steps) if step is None else step
    if chosen not in steps:
        raise ExportError(f"step={step}: {path} has no such checkpoint; it has {', '.join(map(str, sorted(steps)))}")
    return Source(steps[chosen], _run_of(steps[chosen].resolve()), chosen)


def default_target(source: Source) -> Path:
    """Return the default target: export/ in the model's run, or beside the model."""
    if source.run is not None and source.step is not None:
        return source.run / "export" / source.directory.name
    return source.directory.with_name(f"{source.directory.resolve().name}-export")


def convert(source: Source, target: Path, dtype: str | None = None) -> None:
    """Write the directory, with a progress bar. WeightError if it cannot be written."""
    import torch

    from megatron_fipo.data.text_files import complete_text_files
    from megatron_fipo.data.tokenizers import TOKENIZER_FILES
    from megatron_fipo.exporting.model_card import write_card
    from megatron_fipo.weights.conversion import to_huggingface

    def complete(directory: Path) -> None:
        complete_text_files(directory)
        write_card(directory, source.run, source.step)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightError(f"{target} could not be written: {one_line(error)}") from error
    if not any((source.directory / name).is_file() for name in TOKENIZER_FILES):
        logging.warning("%s has no tokenizer: the exported model cannot read or write text", source.directory)
    with progress_bar(f"{source.directory.name} → {target.name}") as progress:
        done = to_huggingface(
            source.directory,
            target,
            source.directory,
            dtype=None if dtype is None else getattr(torch, dtype),
            progress=progress,
            complete=complete,
        )
    if done.not_finite:
        names = ", ".join(done.not_finite)
        logging.warning("%d NaN or infinite values are in %s", sum(done.not_finite.values()), names)
    print(f"{source.directory} → {target}: {done.tensors} tensors, {done.bytes / 2**20:,.1f} MiB")


def _run_of(path: Path) -> Path | None:
    run = path.parent.parent
    return run if path.parent.name in _FOLDERS and (run / "config.yaml").is_file() else None


def _step(path: Path) -> int | None:
    return step_of(path) if path in complete(path.parent) else None


if __name__ == "__main__":
    main()
