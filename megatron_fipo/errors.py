"""Errors for the user: one line that says what is wrong and what would be right."""


class FipoError(Exception):
    """A failure with a message for the user. Entry points print it without a traceback and exit with `exit_code`."""

    exit_code = 1


class ConfigError(FipoError):
    """A configuration that cannot run. Names the key, what is wrong with it and what would be right."""

    exit_code = 2

    def __init__(self, key: str, problem: str, remedy: str):
        self.key, self.problem, self.remedy = key, problem, remedy
        super().__init__(_printable(f"{key}: {problem} ({remedy})"))


class DataError(FipoError):
    """A file that cannot be used. Names the file, the row and the column or key."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(_printable(message))


class RefusedOnRank0(FipoError):
    """An error of rank 0, raised on the other ranks with the same text and exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class RunFailed(FipoError):
    """The reason why a run's processes ended, as one of them has reported it, with its exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class WeightError(FipoError):
    """A checkpoint or a transfer with tensors that do not fit. Names the tensors."""


class CheckpointError(FipoError):
    """A checkpoint that cannot be written, or is damaged. Names the file."""

    def __init__(self, message: str):
        super().__init__(_printable(message))


class WeightsRefused(WeightError):
    """An engine's refusal of wrong tensors. Every other engine would refuse them too.

    The trainer receives it as the text of an HTTP answer. `MARK` in the text distinguishes it from other failures.
    """

    MARK = "weights refused: "

    def __init__(self, problem: str):
        super().__init__(self.MARK + problem)


class RolloutError(FipoError):
    """vLLM servers failed or missed a deadline. Says which server and what was waited for."""


class RewardError(FipoError):
    """No response could be judged, since no verifier process can be started. Says why."""


def _printable(message: str) -> str:
    """Return the message as one line without control characters, whatever file names, columns and rows contain."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)


def one_line(error: BaseException) -> str:
    """Return the type and the text of another library's error in one short line, for a message of ours."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:300]} …"
