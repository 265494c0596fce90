"""torch's dtypes by their names, as other processes say them."""

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """What other processes, and Hugging Face's files, call the dtype ("bfloat16")."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype called `name` ("bfloat16"); ValueError for anything else, since names come from another process."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no torch dtype")
    return dtype
