"""Upload a model directory to the model hub. The token comes from HF_TOKEN or a login, never from a command line."""

from pathlib import Path

from megatron_fipo.errors import FipoError, one_line

_REMEDY = "`hf auth login`, or HF_TOKEN in the environment, gives a token that may write"


class UploadError(FipoError):
    """The hub cannot be reached, or refuses. Says why."""


def prepare_repository(name: str) -> None:
    """Create a private repository if there is none. If the hub refuses, it does so before the conversion."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
    except Exception as error:  # the client raises exceptions of several libraries
        raise UploadError(f"push={name}: the hub cannot be reached or refuses: {one_line(error)}; {_REMEDY}") from error


def upload(directory: Path, name: str, message: str) -> str:
    """Upload all files of a model directory as one commit. Return the address of the repository."""
    from huggingface_hub import HfApi

    try:
        HfApi().upload_folder(repo_id=name, folder_path=directory, commit_message=message)
    except Exception as error:
        again = f"`hf upload {name} {directory}` tries it again"
        raise UploadError(
            f"push={name}: {directory} is written, but not uploaded: {one_line(error)}; {again}"
        ) from error
    return f"{HfApi().endpoint}/{name}"
