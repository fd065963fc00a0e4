"""Settings as one frozen dataclass: defaults < `--config` files, in their order < command line.

A layer (one file, or the command line) is read into `{leaf name: typed value}`, the layers are merged, and the
dataclasses check the result. jsonargparse gives values their types (`configs/text.py`) and writes the help; other
projects' names for our keys are in `configs/spellings.py`. Errors are one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import difflib
import re
import sys
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from configs.arguments import COMMAND_LINE, split_arguments
from configs.channels import use_channels
from configs.spellings import COMPUTED, MEANS, NOTES, OVERRIDES, REFUSED, RENAMED, SECTION_VALUES, Values
from configs.text import dump_yaml, expanded, read_file, typed

ConfigType = TypeVar("ConfigType")
PATHS = (
    *("output_dir", "results_dir", "resume_from", "model_id", "tokenizer_id", "dataset_name", "eval_dataset_name"),
    "sync_dir",
)


@dataclass(frozen=True)
class Leaf:
    """One key: the section it lives in ("" for the algorithm's own fields), its type and its default."""

    section: str
    type: Any
    default: Any


def load_config(
    config_class: type[ConfigType],
    argv: list[str] | None = None,
    *,
    prog: str,
    also_in_files: tuple[type, ...] = (),
    prints: bool = True,
    positional: Sequence[str] = (),
) -> ConfigType:
    """The config that `argv` (default: this process's arguments) asks for.

    `config_class` is a frozen dataclass with a default for every field; fields that are dataclasses are sections.
    Files may hold the keys of the classes `also_in_files`, which do nothing here. Words in front of all keys are the
    values of the keys `positional`.
    `--channels KEY=FOLDER` has a SageMaker job's folders take the place of what the files name (`configs/channels.py`).
    `--help` and `--print_config` print and exit 0. Unknown keys, wrong types, unreadable files and every `ValueError`
    of a `__post_init__` exit 2 with one sentence that names the file or the command line, the key and what to change
    (on stderr, where this process `prints`, and as the exit's context).
    """
    argv = sys.argv[1:] if argv is None else argv
    leaves = find_leaves(config_class)
    if "--help" in argv or "-h" in argv:
        print(format_help(config_class, prog, positional), end="")
        raise SystemExit(0)
    notes: list[str] = []
    try:
        arguments, options = split_arguments(argv, positional)
        ignored = {name: leaf for other in also_in_files for name, leaf in find_leaves(other).items()}
        ignored = {name: leaf for name, leaf in ignored.items() if name not in leaves}
        values: Values = {}
        origin: dict[str, str] = {}
        files = [(path, read_file(path)) for path in options.get("config", [])]
        for source, pairs in [*files, (COMMAND_LINE, arguments)]:
            others = {} if source == COMMAND_LINE else ignored
            layer = _read_layer(_flatten(pairs, source, {**leaves, **others}), source, values, leaves, others, notes)
            values = {**_without_replaced(values, layer, leaves), **layer}
            origin.update(dict.fromkeys(layer, source))
        folders = dict(pair.split("=", 1) for pair in options.get("channels", []))
        found, replaced = use_channels(values, folders)
        notes += replaced
        config = _build(config_class, {**values, **found}, {**origin, **dict.fromkeys(found, "the channels")}, leaves)
    except ValueError as error:
        if prints:
            print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    for note in notes if prints else []:
        print(f"{prog}: {note}.", file=sys.stderr)
    if "print_config" in options:
        print(dump_config(config), end="")
        raise SystemExit(0)
    return config


def dump_config(config: Any) -> str:
    """YAML of a config, by section; loading it with `--config` gives an equal config."""
    return dump_yaml(asdict(config))


def flat_values(config: Any) -> Values:
    """Leaf name -> value, sections opened: what the trackers show."""
    flat: Values = {}
    for field in fields(config):
        value = getattr(config, field.name)
        flat.update(flat_values(value) if is_dataclass(value) else {field.name: value})
    return flat


def find_leaves(config_class: type) -> dict[str, Leaf]:
    """Leaf name -> `Leaf`, over all sections. Names are unique, so that a section may be left out."""
    hints, defaults = get_type_hints(config_class), flat_values(config_class())
    sections = [name for name, type_ in hints.items() if is_dataclass(type_)]
    leaves = {name: Leaf("", hints[name], defaults[name]) for name in hints if name not in sections}
    for section in sections:
        for name, type_ in get_type_hints(hints[section]).items():
            assert name not in leaves and name not in sections, f"{config_class.__name__} has two keys named {name}"
            leaves[name] = Leaf(section, type_, defaults[name])
    return leaves


def format_help(config_class: type, prog: str, positional: Sequence[str] = ()) -> str:
    """Every key with its docstring, type and default, grouped by section."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    leaves = find_leaves(config_class)
    other = [f"{name} -> {key}" for name, key in RENAMED.items() if key in leaves]
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s "
        + "".join(f"[{name.upper()}] " for name in positional)
        + "[--config FILE ...] [--KEY VALUE ...] [--print_config] [--help]",
        description="Defaults < --config files (YAML or JSON), in their order < keys given here. A key may be written "
        "with hyphens\nand without its section: --optim.learning_rate 1e-5 and --learning-rate=1e-5 mean the same.\n"
        "--print_config prints all settings as YAML and stops.",
        epilog="also understood: " + ", ".join([*other, *COMPUTED]) if "model_id" in leaves else None,
        formatter_class=_HelpFormatter,
        add_help=False,
    )
    parser.add_class_arguments(config_class)
    parser.set_defaults({f"{leaf.section}.{name}".lstrip("."): leaf.default for name, leaf in leaves.items()})
    sections = {leaf.section for leaf in leaves.values()}
    for action in parser._actions:
        if action.dest in sections:
            action.help = SUPPRESS  # jsonargparse's `--optim FILE`, which is not offered here
    return parser.format_help()


def _flatten(pairs: list[tuple[str, Any]], source: str, leaves: dict[str, Leaf]) -> list[tuple[str, Any]]:
    """Sections opened (`model: {lora_r: 8}` -> `model.lora_r`) and hyphens turned into underscores."""
    sections = {leaf.section for leaf in leaves.values()}
    flat: list[tuple[str, Any]] = []
    for written, value in pairs:
        key = str(written).replace("-", "_")
        if key not in sections:
            flat.append((key, value))
        elif isinstance(value, dict):
            flat += [(f"{key}.{str(name).replace('-', '_')}", inner) for name, inner in value.items()]
        elif isinstance(value, str) and key in SECTION_VALUES:
            flat.append((f"{key}.{SECTION_VALUES[key]}", value))
        elif value is not None:
            raise ValueError(f"{source}: `{key}` is a section, not a value: give its keys, as in `{key}.name: value`.")
    return flat


def _read_layer(
    pairs: list[tuple[str, Any]],
    source: str,
    below: Values,
    leaves: dict[str, Leaf],
    ignored: dict[str, Leaf],
    notes: list[str],
) -> Values:
    """Keys as written -> `{leaf: typed value}`.

    Two names for one key are refused in a file; on the command line the last one counts, and a list is given once.
    Raises ValueError with all errors of the layer.
    """
    layer: Values = {}
    computed: Values = {}
    spelled: dict[str, str] = {}
    wrong: list[str] = []

    def put(name: str, value: Any, written: str) -> None:
        if name in ignored:
            return
        if name not in leaves:
            wrong.append(f"unknown key `{written}`: this loop has no `{name}`")
        elif name in spelled and source != COMMAND_LINE and written not in OVERRIDES:
            wrong.append(f"`{spelled[name]}` and `{written}` both set `{name}`: keep one of them")
        elif spelled.get(name) == written and source == COMMAND_LINE and re.search("list|dict", str(leaves[name].type)):
            wrong.append(f"`{written}` is given twice: write its values after one, `--{name} a b`")
        else:
            spelled[name] = written
            value = MEANS.get(name, {}).get("null" if value is None else str(value), value)
            layer[name] = typed(value, leaves[name].type, f"`{written}`")
            if name in PATHS and isinstance(layer[name], str):
                layer[name] = expanded(layer[name], f"`{written}`")

    def read(written: str, value: Any) -> None:
        section, _, key = written.rpartition(".")
        name = key if key in leaves or key in ignored else RENAMED.get(key, key)
        leaf = leaves.get(name) or ignored.get(name)
        if name == "warmup_steps" and "warmup_ratio" in leaves and re.fullmatch(r"0?\.\d+", str(value)):
            put("warmup_ratio", value, written)  # transformers 5 allows a part of all steps there
            value = 0
        if leaf and section in ("", leaf.section):
            put(name, value, written)
        elif key in REFUSED:
            wrong.append(f"`{key}` {REFUSED[key]}")
        elif key in COMPUTED and name not in leaves:
            computed[key] = typed(value, COMPUTED[key][0], f"`{written}`")
        elif key not in NOTES and not key.startswith("sagemaker_"):  # the SageMaker toolkit's own hyperparameters
            wrong.append(f"unknown key `{written}`: {_advice(key, leaves)}")
        if key in NOTES and name not in leaves:
            notes.append(f"{source}: `{key}` {NOTES[key]}")

    def compute(key: str) -> None:
        current = {**{name: leaf.default for name, leaf in leaves.items()}, **below, **layer}
        for name, value in COMPUTED[key][1]({**layer, **computed}, current).items():
            put(name, value, key)

    def attempt(function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except ValueError as error:
            wrong.append(str(error).rstrip("."))

    for pair in pairs:
        attempt(read, *pair)
    for key in computed:
        attempt(compute, key)
    if wrong:
        text = "; ".join(dict.fromkeys(wrong))
        raise ValueError(f"{source}: {text}" + ("" if text.endswith("?") else "."))
    return layer


# Key -> the keys whose values in lower layers belong to its old value, so they are dropped with it.
GO_WITH = {"learning_rate": ("min_learning_rate",), "reward_functions": ("reward_weights",)}
GO_WITH |= {"warmup_ratio": ("warmup_steps",)}


def _without_replaced(below: Values, layer: Values, leaves: dict[str, Leaf]) -> Values:
    """The values of the lower layers that a layer keeps.

    A layer that names a data set drops all that lower layers say about rows (templates, columns, splits, evaluation
    set): the whole section of `dataset_name`, and no key outside of it. The same for `GO_WITH`.
    """
    replaced = {name for key, names in GO_WITH.items() if key in layer for name in names}
    if "dataset_name" in layer:
        replaced |= {name for name in below if leaves[name].section == leaves["dataset_name"].section}
    return {name: value for name, value in below.items() if name not in replaced}


def _build(
    config_class: type[ConfigType], values: Values, origin: dict[str, str], leaves: dict[str, Leaf]
) -> ConfigType:
    """The values over the defaults; a `ValueError` of a dataclass also says where the keys that it names come from."""
    default: Any = config_class()
    chosen: dict[str, Values] = {leaf.section: {} for leaf in leaves.values()}
    for name, value in values.items():
        chosen[leaves[name].section][name] = value
    try:
        own = chosen.pop("", {})
        sections = {key: replace(getattr(default, key), **inside) for key, inside in chosen.items()}
        return replace(default, **own, **sections)
    except ValueError as error:
        named = [name for name in dict.fromkeys(re.findall(r"\w+", str(error))) if name in values]
        where = f" ({', '.join(f'{name} from {origin[name]}' for name in named)})" if named else ""
        raise ValueError(f"{str(error).rstrip('.')}{where}.") from error


def _advice(key: str, leaves: dict[str, Leaf]) -> str:
    if key in leaves:
        return f"its name is `{'.'.join(filter(None, [leaves[key].section, key]))}`"
    known = [*leaves, *(name for name in RENAMED if RENAMED[name] in leaves), *COMPUTED]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    return f"did you mean `{near[0]}`?" if near else "see --help for all keys"


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """jsonargparse's defaults and types, the description's own lines."""
