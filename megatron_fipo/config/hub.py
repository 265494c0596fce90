"""Why the model hub did not give a repository, in words of ours: its client's are for programmers."""

from megatron_fipo.errors import one_line


def reason(error: Exception, what: str) -> str:
    """What an error of the hub's client says of a repository, `what` of which is a model or a dataset."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    for kind, words in (
        (GatedRepoError, "the hub gives it to those who have accepted its terms there, and `hf auth login`"),
        (RepositoryNotFoundError, f"the hub has no such {what}, or shows it after `hf auth login` alone"),
        (RevisionNotFoundError, f"the hub's {what} has no such revision"),
    ):
        if isinstance(error, kind):
            return words
    cause = _first_cause(error)
    if isinstance(cause, OSError):
        return f"the hub cannot be reached ({cause.strerror or one_line(cause)})"
    return f"the hub's client refuses it ({one_line(cause)})"


def _first_cause(error: BaseException) -> BaseException:
    """The innermost of errors that were raised one over another: what the operating system or the hub said."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error
