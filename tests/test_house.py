"""The rules of the house: who may import whom, how long a loop may be, what a GRPO step opens."""

import ast
import re
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[1]
ROOMS = {"losses", "data", "configs", "loops", "launch"}
ALLOWED = {  # room -> what its files may import besides the standard library and the room itself
    "losses": {"torch"},
    "data": {"torch", "datasets", "tokenizers", "rouge_score"},
    "configs": {"jsonargparse", "yaml"},
    "loops/shared": {
        "torch",
        "accelerate",
        "transformers",
        "peft",
        "safetensors",
        "losses",
        "numpy",
        "rich",
        "tqdm",
        "huggingface_hub",
    },
    "loops": {"torch", "accelerate", "losses", "data", "configs"},
    "launch": {"torch", "accelerate", "transformers", "peft", "safetensors", "yaml", "loops", "configs", "data"},
}
INSIDE_FUNCTIONS = {"bitsandbytes", "torchao", "flash_attn", "vllm", "mlflow", "wandb", "tensorboard", "rouge_score"}
INSIDE_FUNCTIONS |= {"sagemaker", "boto3", "botocore", "moto", "pyarrow"}
SHARED = {"__init__", "run", "models", "policy", "attention", "optim", "layers", "weights", "checkpoint", "tracking"}
SHARED |= {"adapters"}
SHARED |= {"sharding", "failures", "launcher", "identity", "run_folder", "checkpoint_files", "optimizer_state"}


def room_of(path: Path) -> str:
    parts = path.relative_to(HOUSE).parts
    return "loops/shared" if parts[:2] == ("loops", "shared") else parts[0]


def imports(path: Path) -> list[tuple[str, bool]]:
    """(imported module, whether at the top of the file) for every import that is no type-checking one."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node) for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test) for node in ast.walk(branch)
    }  # fmt: skip
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, id(node) not in inside))
    return found


pytestmark = pytest.mark.house
FILES = sorted(p for room in ROOMS for p in (HOUSE / room).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_a_file_imports_only_what_its_room_may(path):
    room = room_of(path)
    for module, at_top in imports(path):
        package = module.split(".")[0]
        if package in sys.stdlib_module_names:
            continue
        if package == "loops":
            assert module.startswith("loops.shared") or room == "launch", f"{path.name} imports another loop: {module}"
            assert room in ("loops", "loops/shared", "launch"), f"{path.name} imports {module}"
        elif package in ROOMS:
            assert package == room or package in ALLOWED[room], f"{path.name} imports {module}"
        elif package in INSIDE_FUNCTIONS:
            assert not at_top, f"{path.name} imports {module} at the top: move it into the function that needs it"
        else:
            assert package in ALLOWED[room], f"{path.name} imports {module}"


def test_shared_is_a_closed_list():
    assert {p.stem for p in (HOUSE / "loops/shared").glob("*.py")} == SHARED


@pytest.mark.parametrize("loop", ["sft", "dpo", "grpo"])
def test_a_loop_can_be_read_in_one_sitting(loop):
    """At most 350 lines; SFT and DPO shorter than GRPO; one class, the Config."""
    text = (HOUSE / f"loops/{loop}.py").read_text()
    lines = {name: len((HOUSE / f"loops/{name}.py").read_text().splitlines()) for name in ("sft", "dpo", "grpo")}
    assert lines[loop] <= 350 and max(lines["sft"], lines["dpo"]) < lines["grpo"]
    assert re.findall(r"^class (\w+)", text, re.M) == ["Config"]


def test_only_run_and_launch_read_the_environment():
    for path in FILES:
        if re.search(r"os\.(environ|getenv)", path.read_text()):
            assert path.name in ("run.py", "launcher.py") or room_of(path) == "launch", path


def test_no_drawer_without_a_name():
    assert not [p for p in FILES if p.stem in ("utils", "common", "helpers", "misc")]
