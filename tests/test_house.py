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
        "tqdm",
        "huggingface_hub",
    },
    "loops": {"torch", "accelerate", "losses", "data", "configs"},
    "launch": {"torch", "accelerate", "transformers", "peft", "safetensors", "yaml", "loops", "configs", "data"},
}
INSIDE_FUNCTIONS = {"bitsandbytes", "torchao", "flash_attn", "vllm", "mlflow", "wandb", "tensorboard", "rouge_score"}
INSIDE_FUNCTIONS |= {"sagemaker", "boto3", "botocore", "moto"}
SHARED = {"__init__", "run", "models", "policy", "attention", "optim", "layers", "weights", "checkpoint", "tracking"}
SHARED |= {"adapters", "reference", "metrics"}
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


LOOPS = ("sft", "dpo", "grpo")


LONG = {"packed_attention", "_explicit", "with_torch", "with_flash_attn"}


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_can_be_read_in_one_sitting(loop):
    """At most 350 lines; SFT and DPO shorter than GRPO; one class, the Config; about 25 names of our own; the algorithm
    stands in one `for` over the steps, of at most 90 lines."""
    text = (HOUSE / f"loops/{loop}.py").read_text()
    lines = {name: len((HOUSE / f"loops/{name}.py").read_text().splitlines()) for name in LOOPS}
    assert lines[loop] <= 350 and max(lines["sft"], lines["dpo"]) < lines["grpo"]
    tree = ast.parse(text)
    assert [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)] == ["Config"]
    assert "functools" not in text
    own = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ROOMS
        for alias in node.names
    ]
    assert len(own) <= 27, f"{len(own)} names of our own: {', '.join(own)}"
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    (steps,) = [node for node in ast.walk(main) if isinstance(node, ast.For) and ast.unparse(node.target) == "step"]
    assert steps.end_lineno - steps.lineno < 90
    for verb in ("accelerator.backward", "optim.clip_gradients", f"{loop}_loss", "score", "scheduler.step"):
        assert f"{verb}(" in ast.unparse(steps), f"{verb} is called outside the loop over the steps"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_no_function_takes_more_than_seven_arguments(path):
    """A loss excepted: its tensors and options are named where it is called. So is what transformers calls."""
    if room_of(path) == "losses":
        return
    for function in functions(path):
        if function.name in LONG:
            continue
        given = function.args
        names = [one.arg for one in given.posonlyargs + given.args + given.kwonlyargs if one.arg not in ("self", "cls")]
        assert len(names) <= 7, f"{function.name} takes {', '.join(names)}"


def test_what_people_read_has_lines_of_at_most_100_columns():
    for path in [*(HOUSE / "losses").glob("*.py"), *(HOUSE / f"loops/{loop}.py" for loop in LOOPS)]:
        assert max(map(len, path.read_text().splitlines()), default=0) <= 100, path


def test_imports_have_no_circle():
    """Also over imports inside functions: a room stands on the floors below it."""
    names = {path: ".".join(path.relative_to(HOUSE).with_suffix("").parts).removesuffix(".__init__") for path in FILES}
    known = set(names.values())
    below: dict[str, set[str]] = {name: set() for name in known}
    for path, name in names.items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            found = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
                found = [one for one in found[:-1] if one in known] or found[-1:]
            below[name] |= {one for one in found if one in known and one != name}

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in clear:
            for one in sorted(below[name]):
                walk(one, (*above, name))
            clear.add(name)

    clear: set[str] = set()
    for name in sorted(known):
        walk(name, ())


def test_the_readme_counts_the_files_and_lines_of_a_step():
    """Five files, of which the loop calls all but itself, or their functions."""
    text = (HOUSE / "README.md").read_text().replace("\n", " ")
    sentence = re.search(r"GRPO is followed in five files, about ([\d,]+) lines together: (.*?)\. One", text)
    files = re.findall(r"`([\w/]+\.py)`", sentence.group(2))
    lines = sum(len((HOUSE / name).read_text().splitlines()) for name in files)
    assert len(files) == 5 and abs(lines - int(sentence.group(1).replace(",", ""))) < 60, lines


def test_only_run_and_launch_read_the_environment():
    for path in FILES:
        if re.search(r"os\.(environ|getenv)", path.read_text()):
            assert path.name in ("run.py", "launcher.py") or room_of(path) == "launch", path


def test_no_drawer_without_a_name():
    assert not [p for p in FILES if p.stem in ("utils", "common", "helpers", "misc")]
