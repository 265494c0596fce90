"""Command lines with flags, refused in one line: what is wrong, and the nearest flag that there is."""

import argparse
import difflib
import re
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's parser, of which a mistake is one line and status 2, as of every other command."""

    def error(self, message: str) -> NoReturn:
        """End the process. The first argument that was not understood is answered by the nearest flag."""
        unknown = re.search(r"unrecognized arguments: (-\S+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1, cutoff=0.5) if unknown else []
        meant = f"did you mean {near[0]}? " if near else ""
        self.exit(2, f"error: {self.prog}: {message} ({meant}{self.prog} --help has examples)\n")
