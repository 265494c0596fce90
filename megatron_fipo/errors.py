"""The errors a user is meant to read: one line that says what is wrong and what would be right."""


class FipoError(Exception):
    """A failure with a message for the user; entry points print it without a traceback and exit with `exit_code`."""

    exit_code = 1


class ConfigError(FipoError):
    """A configuration that cannot run. Names the key, what is wrong with it and what would be right."""

    exit_code = 2

    def __init__(self, key: str, problem: str, remedy: str):
        self.key, self.problem, self.remedy = key, problem, remedy
        super().__init__(_printable(f"{key}: {problem} ({remedy})"))


class DataError(FipoError):
    """A file that was given and cannot be used. Names the file, the row and the column or key."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(_printable(message))


class RefusedOnRank0(FipoError):
    """What rank 0 refused, on the other ranks: its text and its exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class RunFailed(FipoError):
    """Why a run's processes ended, as one of them told it: its text and its exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class WeightError(FipoError):
    """A checkpoint or a transfer whose tensors do not fit. Names the tensors."""


class CheckpointError(FipoError):
    """A checkpoint that cannot be written, or is not what was written. Names the file."""

    def __init__(self, message: str):
        super().__init__(_printable(message))


class WeightsRefused(WeightError):
    """What an engine says of tensors that are not what they should be. Another engine would say the same.

    It reaches the trainer as the text of an HTTP answer, in which `MARK` tells it from an engine's own failure.
    """

    MARK = "weights refused: "

    def __init__(self, problem: str):
        super().__init__(self.MARK + problem)


class RolloutError(FipoError):
    """vLLM servers failed or missed a deadline. Says which server and what was waited for."""


class RewardError(FipoError):
    """Responses could not be judged at all: no verifier process can be started. Says why."""


def _printable(message: str) -> str:
    """One line that no terminal takes for commands, whatever stands in file names, columns and rows."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)


def one_line(error: BaseException) -> str:
    """Another library's error for a message of ours: its kind and its text, in one line and not too long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:300]} …"
