"""Parse command lines with flags. An error is one line that says what is wrong and names the nearest flag."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_fipo.errors import FipoError


class Parser(argparse.ArgumentParser):
    """argparse's parser, but a mistake is reported in one line, with status 2, as for every other command."""

    def __init__(self, command: str, description: str | None, examples: str):
        """`command` is the word after megatron-fipo. The texts are printed as they are."""
        super().__init__(
            prog=f"megatron-fipo {command}",
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """End the process. For the first argument that was not understood, suggest the nearest flag."""
        unknown = re.search(r"unrecognized arguments: (-\S+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1, cutoff=0.5) if unknown else []
        meant = f"did you mean {near[0]}? " if near else ""
        self.exit(2, f"error: {self.prog}: {message} ({meant}{self.prog} --help has examples)\n")


def exit_code_of(action: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Run `action` with the options. Return 0, or the exit code of a FipoError, which is printed in one line."""
    try:
        action(options)
    except FipoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the output has gone
    return 0
