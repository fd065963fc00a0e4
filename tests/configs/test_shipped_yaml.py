"""Every config that ships is one that its loop takes, and says what it is."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from configs.loader import dump_config, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml")) + sorted(CONFIGS.glob("recipes/*.yaml"))
RECIPES = sorted(CONFIGS.glob("recipes/*.yaml"))


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def loop_of(path: Path) -> str:
    """The loop named by a leading `# loop: NAME`, else by the file's name."""
    named = re.match(r"# loop: (\w+)", path.read_text())
    return named[1] if named else path.stem


def test_the_configs_of_the_three_loops_ship():
    assert {"sft.yaml", "dpo.yaml", "grpo.yaml"} <= {name_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_shipped_config_loads_with_its_loop(path, tmp_path, capsys):
    """And what it resolves to loads as the same config; nothing in it needs a note."""
    loop = importlib.import_module(f"loops.{loop_of(path)}")
    config = load_config(loop.Config, ["--config", str(path)], prog=loop_of(path))
    assert capsys.readouterr().err == ""
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(loop.Config, ["--config", str(tmp_path / "resolved.yaml")], prog=loop_of(path)) == config


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_key_of_a_shipped_config_has_a_comment(path):
    lines = path.read_text().splitlines()
    bare = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if re.match(r" *\w+: *[^#\s]", line) and " # " not in line and not before.lstrip().startswith("#")
    ]
    assert bare == []


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_says_how_to_start_it_and_what_was_verified(path):
    header = path.read_text().split("\n\n", 1)[0]
    assert "accelerate launch" in header and "# verified: parsed by tests" in header
    assert f"loops/{loop_of(path)}.py --config configs/recipes/{path.name}" in header
