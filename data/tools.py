"""Tools and tool calls as chat templates expect them, and the check that a template renders them."""

from __future__ import annotations

import copy
import json
from typing import Any


def parse_tools(value: Any) -> list[dict[str, Any]] | None:
    """A row's `tools` (a list, or a list as JSON text) as `{"type": "function", "function": {...}}`; None for none."""
    if isinstance(value, str):
        value = _parse_json(value, "tools") if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list):
        raise ValueError(f"tools is a {type(value).__name__}; give a list of tools or one as JSON text.")
    return [_as_function(tool, "tools") for tool in value]


def parse_tool_calls(value: Any) -> list[dict[str, Any]]:
    """An assistant message's `tool_calls`, with arguments that are JSON text parsed to a mapping."""
    if isinstance(value, str):
        value = _parse_json(value, "tool_calls")
    calls = []
    for call in [value] if isinstance(value, dict) else value:
        call = _as_function(call, "tool_calls")
        function = dict(call["function"])
        arguments = function.pop("parameters", None) if function.get("arguments") is None else function["arguments"]
        if isinstance(arguments, str):
            arguments = _parse_json(arguments, f"text of {function['name']}'s arguments") if arguments else {}
        if not isinstance(arguments, dict | None):
            raise ValueError(f"the arguments of {function['name']} are {arguments!r:.80}; give an object.")
        call["function"] = {**function, "arguments": arguments or {}}
        calls.append(call)
    return calls


def with_probe_names(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, list[str]]:
    """Copies in which every tool and every call has a unique name, and those names.

    A template that drops a tool or a call renders without its name; the real name could occur elsewhere in the text.
    """
    messages, tools = copy.deepcopy(messages), copy.deepcopy(tools)
    named = [*(tools or []), *(call for message in messages for call in message.get("tool_calls", []))]
    names = []
    for number, item in enumerate(named):
        item["function"]["name"] = f"probe_{number}_of_plumbline"
        names.append(item["function"]["name"])
    return messages, tools, names


def _as_function(item: Any, key: str) -> dict[str, Any]:
    item = item if not isinstance(item, dict) or "function" in item else {"type": "function", "function": item}
    if not isinstance(item, dict) or not isinstance(item["function"], dict) or "name" not in item["function"]:
        raise ValueError(f"{key} holds {json.dumps(item, default=str)[:80]}, which has no function name.")
    return dict(item)


def _parse_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the {what} is not JSON ({error.msg} at column {error.colno}): {text[:80]!r}.") from error
