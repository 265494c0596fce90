"""The rule `judge`: asks a model behind an OpenAI-compatible endpoint for a score, with retries and a cache on disk.

What keeps a score from being had raises JudgeError: a failed check, and no wrong answer.
"""

import asyncio
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import httpx

from megatron_fipo.config.judge import JUDGE_MARGIN_S, JudgeConfig
from megatron_fipo.errors import ConfigError, one_line
from megatron_fipo.files import write_atomically
from megatron_fipo.rewards.rules import Verdict

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_WORTH_ANOTHER_TRY = (408, 409, 425, 429)
_PLACEHOLDERS = re.compile(r"\{(prompt|response|ground_truth)\}")
_LONGEST_SHOWN = 200


class JudgeError(Exception):
    """The judge gave no score. Says what it did instead; never holds the key."""


class JudgeRule:
    """Judges responses by the section reward.judge of a configuration, one request at a time."""

    INPUTS: ClassVar = ("ground_truth", "prompt", "response")

    def __init__(self, settings: JudgeConfig, timeout_s: float):
        """`timeout_s`: reward.timeout_s, within which the last attempt has to end. The key's variable is set.

        Raises ConfigError for a key that no header can carry.
        """
        self._settings = settings
        self._timeout_s = max(timeout_s - JUDGE_MARGIN_S, timeout_s / 2)
        key = {} if settings.key_variable is None else {"Authorization": f"Bearer {_key(settings.key_variable)}"}
        self._client = httpx.AsyncClient(headers=key, timeout=None)
        self._runner = asyncio.Runner()

    def __call__(self, item: Mapping[str, Any]) -> Verdict:
        """A response's verdict. Raises JudgeError if there is no score."""
        settings = self._settings
        content = _PLACEHOLDERS.sub(lambda match: item[match[1]], settings.prompt)
        request = {
            "model": settings.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
        }
        reply = self._cached(request)
        is_new = reply is None
        if reply is None:
            reply = self._ask(request)
        score = self._score(reply)
        if is_new:
            self._remember(request, reply)
        share = (score - settings.score_wrong) / (settings.score_right - settings.score_wrong)
        return Verdict(share, "", extra={"judge_score": score, "judge_cached": float(not is_new)})

    def _score(self, reply: str) -> float:
        found = [match[1] for match in re.finditer(self._settings.score_pattern, reply) if match[1] is not None]
        shown = repr(reply[-_LONGEST_SHOWN:])
        if not found:
            raise JudgeError(f"the judge's reply has no score that reward.judge.score_pattern finds; it ends {shown}")
        try:
            score = float(found[-1])
        except ValueError:
            raise JudgeError(f"the judge's score {found[-1][:40]!r} is no number; its reply ends {shown}") from None
        low, high = sorted((self._settings.score_wrong, self._settings.score_right))
        if not low <= score <= high:
            raise JudgeError(f"the judge's score {score:g} is not from {low:g} to {high:g}; its reply ends {shown}")
        return score

    def _ask(self, request: dict[str, Any]) -> str:
        """The reply's text, after as many attempts as there may be."""
        deadline = time.monotonic() + self._timeout_s
        problem = ""
        for attempt in range(1, self._settings.attempts + 1):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            wait_s = min(_FIRST_WAIT_S * 2 ** (attempt - 1), _LONGEST_WAIT_S)
            try:
                return self._runner.run(self._post(request, min(left, self._settings.request_timeout_s)))
            except _Busy as busy:
                problem, wait_s = str(busy), max(wait_s, busy.wait_s)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {one_line(error)}"
            if attempt == self._settings.attempts or time.monotonic() + wait_s >= deadline:
                break
            time.sleep(wait_s)
        raise JudgeError(f"no reply of the judge at {self._settings.url} after {attempt} attempts: {problem}")

    async def _post(self, request: dict[str, Any], timeout_s: float) -> str:
        """One attempt. httpx's own limits are for each connect, write and read; this one is for all of them."""
        url = f"{self._settings.url.rstrip('/')}/chat/completions"
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._client.post(url, json=request)
        except TimeoutError:
            raise httpx.ReadTimeout(f"the reply was not whole after {timeout_s:.3g} s") from None
        body = response.content
        shown = body[:_LONGEST_SHOWN].decode(errors="replace")
        if response.status_code in _WORTH_ANOTHER_TRY or response.status_code >= 500:
            raise _Busy(f"status {response.status_code}, {shown!r}", response.headers.get("retry-after"))
        if response.status_code != 200:
            raise JudgeError(f"the judge at {self._settings.url} refuses: status {response.status_code}, {shown!r}")
        try:
            choice = json.loads(body)["choices"][0]
            content, end = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise JudgeError(f"the judge's reply is no chat completion: {shown!r}") from None
        if not isinstance(content, str):
            raise JudgeError(f"the judge's reply has no text: {shown!r}")
        if end == "length":  # "Score: 1" may be the beginning of "Score: 10"
            limit = f"reward.judge.max_tokens={self._settings.max_tokens}"
            raise JudgeError(f"the judge's reply was cut at {limit}; it ends {content[-_LONGEST_SHOWN:]!r}")
        return content

    def _file(self, request: dict[str, Any]) -> Path | None:
        if self._settings.cache is None:
            return None
        text = json.dumps([self._settings.url, request], sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()
        return Path(self._settings.cache).expanduser() / name[:2] / f"{name}.json"

    def _cached(self, request: dict[str, Any]) -> str | None:
        """The reply to the same request; a file that cannot be read is as none."""
        file = self._file(request)
        if file is None:
            return None
        try:
            reply = json.loads(file.read_text(encoding="utf-8"))["reply"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return reply if isinstance(reply, str) else None

    def _remember(self, request: dict[str, Any], reply: str) -> None:
        """Only replies with a score get here. A full disk costs the cache, not the verdict."""
        file = self._file(request)
        if file is not None:
            with suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, json.dumps({"request": request, "reply": reply}).encode())


def _key(name: str) -> str:
    """Return the key of a variable, without the line's end that a secret's file often has. No error shows it."""
    key = os.environ[name].strip()
    if not key or not key.isascii() or not key.isprintable():
        problem = f"{name} is empty, or has characters that are not printable ASCII"
        raise ConfigError("reward.judge.key_variable", problem, f"export {name}=… again, the key alone")
    return key


class _Busy(Exception):
    """The endpoint may answer later."""

    def __init__(self, problem: str, retry_after: str | None):
        super().__init__(problem)
        self.wait_s = float(retry_after) if retry_after is not None and retry_after.isdecimal() else 0.0
