"""Config files as text: YAML and JSON read, YAML written, one value as the type of its field."""

from __future__ import annotations

import ast
import json
import os
import re
from argparse import ArgumentError
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, set_loader


def read_file(path: str) -> list[tuple[str, Any]]:
    """The top-level pairs of a YAML file, or of a JSON file such as SageMaker's hyperparameters.json."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            content = json.loads(text, object_pairs_hook=_unique)
        else:
            content = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise ValueError(f"{path}: the config file cannot be read: {error.strerror}; give an existing path.") from None
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}: the YAML cannot be read: {error.problem}{line}.") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: the file cannot be read: {error}.") from None
    if not isinstance(content, dict | None):
        raise ValueError(f"{path}: the file holds a {type(content).__name__}: write `key: value` lines.")
    return list((content or {}).items())


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML that `read_file` reads back as equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def expanded(path: str, where: str) -> str:
    """A path with `~` and `$NAME` as a shell reads them; ValueError, beginning with `where`, for an unset variable."""
    found = os.path.expanduser(os.path.expandvars(path))
    if unset := re.search(r"\$\w+|\$\{\w+\}", found):
        raise ValueError(f"{where} is {path}, and {unset[0]} is not set in the environment: set it, or write the path.")
    return found


def typed(value: Any, type_: Any, where: str) -> Any:
    """`value` as the field's type; text may be JSON, Python or YAML. `where` begins the error."""
    members = get_args(type_) if get_origin(type_) in (Union, UnionType) else (type_,)
    if value is None and NoneType in members:
        return None
    plain = value
    if bool in members:
        plain = {"1": True, "0": False, "on": True, "off": False}.get(str(value).lower(), value)
    elif isinstance(value, str | list) and str not in members:
        containers = {get_origin(member) or member: get_args(member) for member in members}
        if list in containers:
            if isinstance(value, str) and not value.lstrip().startswith("["):
                plain = [value] if str in containers[list] else value.split(",")
        elif dict in containers and not str(value).lstrip().startswith("{"):
            plain = _read_pairs(value, where, as_text=bool(containers[dict])) or value
    if (
        isinstance(plain, str)
        and plain.lstrip().startswith("{")
        and dict in [get_origin(one) or one for one in members]
    ):
        with suppress(yaml.YAMLError):
            plain = _read_or_keep(plain) if _read_or_keep(plain) != plain else yaml.load(plain, Loader=_Loader)
    parser = ArgumentParser(parser_mode="literal", exit_on_error=False)
    parser.add_argument("--value", type=type_)
    try:
        if plain is None:
            raise ArgumentError(None, "jsonargparse would let null stand for any type")
        return parser.parse_object({"value": plain}).value
    except ArgumentError:
        given = "empty" if value is None else "true or has no value" if value is True else repr(value)
        raise ValueError(f"{where} is {given}: it must be {in_words(type_)}.") from None


def _read_pairs(value: str | list[Any], where: str, as_text: bool) -> dict[str, Any] | None:
    """`a=b c=d` of a command line, or `a=b,c=d` as the SageMaker toolkit writes it; None for anything else."""
    words = re.split(r",(?=[^,=]+=)", value) if isinstance(value, str) else map(str, value)
    pairs = [word.partition("=") for word in words]
    if not all(equals for _, equals, _ in pairs):
        return None
    found: dict[str, Any] = {}
    for name, _, text in pairs:
        if name in found:
            raise ValueError(f"{where} gives {name} twice: keep one of them.")
        found[name] = text if as_text else _read_or_keep(text)
    return found


def in_words(type_: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}
    words |= {
        str: "text (in quotes where it looks like something else)",
        dict: "a mapping of names to values, as in '{name: value}'",
    }
    if type_ in words:
        return words[type_]
    if get_origin(type_) in (Union, UnionType):
        return " or ".join(in_words(member) for member in get_args(type_))
    if get_origin(type_) is list:
        return f"a list, each item {in_words(get_args(type_)[0])}"
    return words.get(get_origin(type_), str(type_).removeprefix("typing."))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"`{key}` stands there twice, keep one")
    return dict(pairs)


def _read_literal(text: str) -> Any:
    """A value inside text, as JSON or Python writes it. YAML would take `### Question` for an empty document."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError):
            continue
    raise ValueError("neither JSON nor a Python literal")


def _read_or_keep(text: str) -> Any:
    try:
        return _read_literal(text)
    except ValueError:
        return {"true": True, "false": False}.get(text.lower(), text)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars (1e-6 is a number; no, off and 2024-01-01 are text), and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        first: dict[str, int] = {}
        for key, _ in node.value:
            name = str(key.value)
            if name in first:
                what = f"`{name}` stands there twice in line {first[name]} and"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            first[name] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or `_Loader` would not read as text."""


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", [*"-+0123456789"]),
    "float": (r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", [*"-+.0123456789"]),
    "merge": (r"<<", ["<"]),
}
_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
set_loader("literal", _read_literal, exceptions=(ValueError,))
