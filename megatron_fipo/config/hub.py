"""Explain to the user why a repository of the hub cannot be read. The client's own messages are for programmers."""

from megatron_fipo.errors import one_line


def reason(error: Exception, what: str) -> str:
    """Return the reason for an error of the hub's client. `what` is "model" or "dataset"."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    for kind, words in (
        (GatedRepoError, "the hub requires that you accept its terms there, and then `hf auth login`"),
        (RepositoryNotFoundError, f"the hub has no such {what}, or shows it only after `hf auth login`"),
        (RevisionNotFoundError, f"the hub's {what} has no such revision"),
    ):
        if isinstance(error, kind):
            return words
    cause = _first_cause(error)
    if isinstance(cause, OSError):
        return f"the hub cannot be reached ({cause.strerror or one_line(cause)})"
    return f"the hub's client refuses it ({one_line(cause)})"


def _first_cause(error: BaseException) -> BaseException:
    """Return the first of a chain of exceptions: the error of the operating system or of the hub."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error
