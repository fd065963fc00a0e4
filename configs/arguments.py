"""A command line as (key, value) pairs. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

COMMAND_LINE = "the command line"
OPTIONS = {  # option of every command -> what it needs
    "config": "the path of a YAML or JSON file",
    "channels": "KEY=FOLDER",
    "print_config": "",
}


def split_arguments(
    argv: Sequence[str], positional: Sequence[str] = ()
) -> tuple[list[tuple[str, Any]], dict[str, list[str]]]:
    """(key, value) pairs of a command line, and the values of the options that are no keys (`OPTIONS`).

    A bare `--key` is True; several values (`--key a b`) are a list. `positional`: keys of the words in front of all.
    """
    leading = list(takewhile(lambda word: not word.startswith("-"), argv[: len(positional)]))
    pairs: list[tuple[str, Any]] = list(zip(positional, leading, strict=False))
    options: dict[str, list[str]] = {}
    position = len(leading)
    while position < len(argv):
        written, has_value, value = argv[position].partition("=")
        if not written.startswith("--"):
            raise ValueError(
                f"{COMMAND_LINE}: `{argv[position]}` has no key in front of it: write `--config FILE` or `--key value`."
            )
        values = [value] if has_value else []
        position += 1
        while not has_value and position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        key = written[2:].replace("-", "_")
        if key not in OPTIONS:
            pairs.append((key, values if len(values) > 1 else values[0] if values else True))
        elif OPTIONS[key] and not values:
            raise ValueError(f"{COMMAND_LINE}: `--{key}` needs {OPTIONS[key]}.")
        else:
            options.setdefault(key, []).extend(values)
    return pairs, options


def join_arguments(pairs: Sequence[tuple[str, Any]]) -> list[str]:
    """The words of a command line that `split_arguments` reads as these pairs."""
    words = []
    for key, value in pairs:
        words += (
            [f"--{key}", *value] if isinstance(value, list) else [f"--{key}" if value is True else f"--{key}={value}"]
        )
    return words
