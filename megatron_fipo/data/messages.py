"""Chat messages as data sets write them: role and content, or ShareGPT's from and value."""

from typing import Any, TypeGuard

_ROLES = {"human": "user", "gpt": "assistant"}


def role_and_content(message: dict[Any, Any]) -> tuple[Any, Any]:
    """Return the role and the content of a message; of text parts, their joined text. None for a missing one."""
    if "role" not in message and "from" in message and isinstance(message["from"], str):
        return _ROLES.get(message["from"], message["from"]), message.get("value")
    content = message.get("content")
    if isinstance(content, list) and content and all(map(_is_text_part, content)):
        content = "".join(part["text"] for part in content)
    return message.get("role"), content


def are_messages(value: Any) -> TypeGuard[list[dict[Any, Any]]]:
    """Return whether a value looks like a list of chat messages, valid or not."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and _names_a_role(item) for item in value)
    )


def _names_a_role(message: dict[Any, Any]) -> bool:
    return "role" in message or "from" in message


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
