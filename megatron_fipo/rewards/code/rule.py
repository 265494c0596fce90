"""The rule `code`: finds the program in a response, runs the problem's tests in a sandbox, and counts what passes."""

import json
import re
from contextlib import closing
from typing import Any, ClassVar

from megatron_fipo.config.code import PROGRAM, CodeConfig
from megatron_fipo.rewards.code.sandbox import find_sandbox
from megatron_fipo.rewards.code.tests import passes, read_tests
from megatron_fipo.rewards.extraction import last_code_block
from megatron_fipo.rewards.rules import Verdict


class CodeRule:
    """Judges responses by the section reward.code of a configuration."""

    INPUTS: ClassVar = ("columns", "response")

    def __init__(self, settings: CodeConfig):
        """Tries the sandbox out. Raises ConfigError if there is none."""
        self._settings = settings
        self._sandbox = find_sandbox(settings)

    def __call__(self, item: dict[str, Any]) -> Verdict:
        """A response's verdict: a program that fails in any way is wrong.

        Raises:
            BadTests: the row's tests cannot be used.
            SandboxError, OSError: the sandbox failed, which says nothing about the program.
        """
        tests = read_tests(json.loads(item["columns"]), self._settings.tests)
        program = self._program(item["response"])
        if program is None:
            return Verdict(0.0, "", extra={"tests_passed": 0.0, "first_failure": "no program"})
        passed, first_failure = 0, ""
        with closing(self._sandbox.run(program, tests.function, tests.inputs)) as results:
            for result, expected in zip(results, tests.outputs, strict=True):
                is_right = result.end == "exit 0" and passes(
                    result.output, expected, is_call=tests.function is not None
                )
                passed += is_right
                if not is_right:
                    first_failure = first_failure or ("output" if result.end == "exit 0" else result.end)
                    if not self._settings.partial_credit:
                        break
        share = passed / len(tests.inputs)
        accuracy = share if self._settings.partial_credit else float(share == 1)
        return Verdict(accuracy, "", extra={"tests_passed": share, "first_failure": first_failure})

    def _program(self, response: str) -> str | None:
        """The program in the template; None where the pattern finds none."""
        if self._settings.pattern is None:
            block = last_code_block(response)
            found = response if block is None else block
        else:
            matches = [match[1] for match in re.finditer(self._settings.pattern, response) if match[1] is not None]
            if not matches:
                return None
            found = matches[-1]
        return self._settings.template.replace(PROGRAM, found)
