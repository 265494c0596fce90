"""Check the section `reward` of a configuration: the rule, which may be a user's own function, and its settings."""

import ast
import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from megatron_fipo.config import Config, RewardConfig
from megatron_fipo.config.code import PROGRAM, SANDBOX_START_S, CodeConfig
from megatron_fipo.config.judge import JUDGE_MARGIN_S, RESPONSE, JudgeConfig
from megatron_fipo.config.loop import SHIPPED_RULES, own_rule
from megatron_fipo.config.patterns import check_pattern
from megatron_fipo.errors import ConfigError, one_line

_FORMS = "package.module:function or path/to/file.py:function"


def reward(config: Config) -> Iterator[str]:
    """Raise ConfigError if the settings of rewards cannot work. Yield a warning for each setting that is not read."""
    settings = config.reward
    own = own_rule(settings.rule)
    if own is not None:
        _check_form(settings.rule, *own)
        if (settings.correct, settings.incorrect) != (1.0, -1.0):
            yield "reward.correct, reward.incorrect: these are not read, since your own rule returns the reward itself"
    elif settings.environment and settings.rule != "judge":
        yield f"reward.environment is not read with reward.rule={settings.rule}, which needs no variables"
    yield from _company(config, is_own=own is not None)
    for name in settings.environment:
        if not name.isidentifier():
            problem = f"{name!r} is not the name of a variable"
            raise ConfigError("reward.environment", problem, "only names; the values are taken from the environment")


def _company(config: Config, *, is_own: bool) -> Iterator[str]:
    settings = config.reward
    if settings.rule == "reasoning_gym" and config.data.source != "reasoning_gym":
        raise ConfigError(
            "reward.rule",
            f"reasoning_gym scores its own problems, not those of data.source={config.data.source}",
            "reward.rule=math_verify or exact_match, or data.source=reasoning_gym",
        )
    if config.data.source == "reasoning_gym" and settings.rule != "reasoning_gym" and not is_own:
        rule = settings.rule
        yield f"reward.rule: {rule} accepts only one answer; reward.rule=reasoning_gym uses the task's own scorer"
    if settings.math_tolerance and settings.rule != "math_verify":
        yield f"reward.math_tolerance is not read with reward.rule={settings.rule}; reward.rule=math_verify does"
    _check_code(settings)
    _check_judge(settings)
    if settings.rule != "judge" and settings.judge != JudgeConfig():
        yield f"reward.judge is not read with reward.rule={settings.rule}; reward.rule=judge does"
    if settings.rule != "code" and settings.code != CodeConfig():
        yield f"reward.code is not read with reward.rule={settings.rule}; reward.rule=code does"
    if settings.correct <= settings.incorrect:
        raise ConfigError(
            "reward.correct",
            f"{settings.correct:g} is not above reward.incorrect {settings.incorrect:g}",
            "a larger reward for right answers",
        )
    if settings.failed_share_stop < settings.failed_share_warn:
        raise ConfigError(
            "reward.failed_share_stop",
            f"{settings.failed_share_stop:g} is below reward.failed_share_warn {settings.failed_share_warn:g}",
            "a limit at or above the warning's",
        )
    buffer = settings.overlong_buffer
    if buffer.enable and buffer.len >= config.rollout.max_response_length:
        raise ConfigError(
            "reward.overlong_buffer.len",
            f"{buffer.len} tokens are not below rollout.max_response_length {config.rollout.max_response_length}",
            "a shorter ramp, or reward.overlong_buffer.enable=false",
        )


def _check_code(settings: RewardConfig) -> None:
    """Check what finds a program in a response, and that its time fits into the time of a check."""
    code = settings.code
    if code.template.count(PROGRAM) != 1:
        problem = f"has {code.template.count(PROGRAM)} places for the program"
        raise ConfigError("reward.code.template", problem, f"a text with one {PROGRAM}, or {PROGRAM} alone")
    if code.pattern is not None:
        check_pattern("reward.code.pattern", code.pattern, "'reward.code.pattern=\"Program: (.+)\"'")
    least = code.total_s + SANDBOX_START_S
    if settings.rule == "code" and settings.timeout_s < least:
        raise ConfigError(
            "reward.timeout_s",
            f"{settings.timeout_s:g} leaves no time for reward.code.total_s={code.total_s:g} and a sandbox's start, "
            "so slow programs would be failed checks and not wrong",
            f"at least {least:g}, or a smaller reward.code.total_s",
        )


def _check_judge(settings: RewardConfig) -> None:
    """Check where the judge is, what it is asked, and what its scores mean."""
    judge = settings.judge
    check_pattern("reward.judge.score_pattern", judge.score_pattern, "such as 'Score: ([0-9]+)'")
    if RESPONSE not in judge.prompt:
        raise ConfigError("reward.judge.prompt", "has no place for the response", f"a text with {RESPONSE}")
    if judge.score_wrong == judge.score_right:
        problem = f"{judge.score_right:g} is reward.judge.score_wrong too"
        raise ConfigError("reward.judge.score_right", problem, "two scores that differ")
    if settings.rule != "judge":
        return
    if re.match(r"(\w+://)?[^/?#]*@", judge.url):  # messages quote the URL, so this one does not
        problem = "has a user or a password, which messages would show"
        raise ConfigError("reward.judge.url", problem, "the URL without them, and the key by reward.judge.key_variable")
    if not judge.url.startswith(("http://", "https://")):
        raise ConfigError("reward.judge.url", f"{judge.url!r} is no URL", "such as http://judge:8000/v1")
    if not judge.model:
        raise ConfigError("reward.judge.model", "is empty", "the name of a model at reward.judge.url")
    if judge.key_variable is not None and not judge.key_variable.isidentifier():
        problem = "what is given is not the name of a variable"
        raise ConfigError("reward.judge.key_variable", problem, "the name alone; the key is taken from the environment")
    if judge.request_timeout_s + JUDGE_MARGIN_S > settings.timeout_s:
        raise ConfigError(
            "reward.timeout_s",
            f"{settings.timeout_s:g} leaves no time for reward.judge.request_timeout_s={judge.request_timeout_s:g}",
            f"at least {judge.request_timeout_s + JUDGE_MARGIN_S:g}, and more for further attempts",
        )


def check_reward_here(settings: RewardConfig) -> None:
    """Raise ConfigError if a rule's file lacks the function, or a variable is not set. Only the first rank checks.

    The file is only parsed here. launch/first_look.py imports it.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    own = own_rule(settings.rule)
    if own is not None and own[0].endswith(".py"):
        check_function("reward.rule", *own)
    if settings.rule == "judge" and settings.judge.key_variable not in (None, *os.environ):
        name = settings.judge.key_variable
        raise ConfigError("reward.judge.key_variable", f"{name} is not set", f"export {name}=…, or null for no key")
    for name in settings.environment:
        if name not in os.environ:
            raise ConfigError("reward.environment", f"{name} is not set", f"export {name}=…, or leave it out")


def _check_form(rule: str, place: str, function: str) -> None:
    if place and function.isidentifier():
        if place.endswith(".py") or all(part.isidentifier() for part in place.split(".")):
            return
        raise ConfigError("reward.rule", f"{place} is neither a module nor a file that ends in .py", _FORMS)
    if rule.endswith(".py"):
        names = _functions("reward.rule", rule) if os.path.isfile(rule) else []
        remedy = " or ".join(f"{rule}:{name}" for name in names[:5]) or f"{rule}:FUNCTION"
        raise ConfigError("reward.rule", f"{rule} does not name a function of that file", remedy)
    near = get_close_matches(rule, SHIPPED_RULES, n=1)
    suggestion = f"did you mean {near[0]}? " if near else ""
    known = f"{suggestion}{', '.join(SHIPPED_RULES)}, {_FORMS}"
    raise ConfigError("reward.rule", f"{rule[:200]!r} is not a rule", known)


def check_function(key: str, place: str, function: str) -> None:
    """Raise ConfigError unless the file `place` may have the function; it is read, and not run."""
    if not os.path.isfile(os.path.expanduser(place)):
        raise ConfigError(key, f"{place} is not found from {os.getcwd()}", f"the file's path: {_FORMS}")
    tree = _parsed(key, place)
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
    if function not in names and "*" not in names:
        known = ", ".join(_functions(key, place)) or "none"
        raise ConfigError(key, f"{place} has no function {function}", f"its functions: {known}")


def _functions(key: str, place: str) -> list[str]:
    """Return the names of the functions at the top level of a file."""
    return [node.name for node in _parsed(key, place).body if isinstance(node, ast.FunctionDef)]


def _parsed(key: str, place: str) -> ast.Module:
    try:
        return ast.parse(Path(os.path.expanduser(place)).read_bytes())
    except SyntaxError as error:
        raise ConfigError(key, f"{place}, line {error.lineno}: {error.msg}", "a file of Python") from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(key, f"{place} cannot be read: {one_line(error)}", "a file of Python") from None
