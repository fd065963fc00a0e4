"""FSDP2: what settings mean, what a run gets, and that adapters, 4-bit bases and sampling survive it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from data.batches import BatchConfig
from data.chat import Example
from data.pack import pack_examples
from loops import sft
from loops.shared.models import ModelConfig, build_policy, build_tokenizer
from loops.shared.optim import OptimConfig, build_optimizer, build_schedule, clip_gradients
from loops.shared.policy import check_policy, choose_packing, is_packed, score
from loops.shared.reference import build_reference
from loops.shared.rollout import RolloutConfig, build_engine
from loops.shared.sharding import build_accelerator, is_sharded, prepare, read_launcher_sharding, read_sharding
from loops.shared.weights import export_model
from losses.sft import sft_loss
from tests.loops.test_models import save_model

HOUSE = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("fsdp", "further", "expected"),
    [
        ("", {}, None),
        ("no_shard", {}, None),
        ("full_shard auto_wrap", {}, {}),
        ("full_shard auto_wrap offload", {}, {"cpu_offload": True}),
        ("shard_grad_op", {}, {"reshard_after_forward": False}),
        ("hybrid_shard", {}, {"dp_replicate_size": 0}),
        ({"sharding_strategy": "HYBRID_SHARD_ZERO2"}, {}, {"dp_replicate_size": 0, "reshard_after_forward": False}),
        ({"fsdp_version": 2, "fsdp_reshard_after_forward": "false"}, {}, {"reshard_after_forward": False}),
        ({"dp_replicate_size": 2, "fsdp_offload_params": True}, {}, {"dp_replicate_size": 2, "cpu_offload": True}),
        (
            "full_shard auto_wrap",
            {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "forward_prefetch": True},
            {"layer_classes": ("LlamaDecoderLayer",), "forward_prefetch": True},
        ),
        (
            "full_shard auto_wrap",
            {"backward_prefetch": "backward_pre", "cpu_ram_efficient_loading": "true", "activation_checkpointing": 1},
            {"cpu_ram_efficient_loading": True, "activation_checkpointing": True},
        ),
    ],
)
def test_settings_of_both_generations_mean_the_same_thing(fsdp, further, expected):
    sharding = read_sharding(fsdp, further, False)
    if expected is None:
        assert sharding is None
        return
    plain = read_sharding("full_shard", {}, False)
    for name, value in vars(sharding).items():
        assert value == expected.get(name, getattr(plain, name)), name


def test_settings_without_an_equivalent_are_named():
    given = {"use_orig_params": True, "fsdp_version": 1, "backward_prefetch": "backward_post", "min_num_params": 1000}
    ignored = read_sharding("full_shard auto_wrap", given, False).ignored
    for word in ("use_orig_params", "fsdp_version 1", "backward_post", "min_num_params"):
        assert any(word in sentence for sentence in ignored), word
    assert len(ignored) == 4


@pytest.mark.parametrize(
    ("fsdp", "further", "word"),
    [
        ("full_shrad", {}, "full_shrad"),
        ({"reshard_after_foward": True}, {}, "reshard_after_forward"),
        ({"sharding_strategy": "MOST"}, {}, "sharding_strategy"),
        ({"offload_params": "perhaps"}, {}, "offload_params"),
        ("", {"forward_prefetch": True}, "fsdp_config"),
    ],
)
def test_unknown_settings_are_refused_by_name(fsdp, further, word):
    with pytest.raises(ValueError, match=word):
        read_sharding(fsdp, further, False)


def test_the_launchers_environment_is_understood():
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}
    # the launcher sets these for everyone, asked or not
    asked |= {"FSDP_USE_ORIG_PARAMS": "true", "FSDP_SYNC_MODULE_STATES": "true", "FSDP_SHARDING_STRATEGY": "1"}
    sharding = read_launcher_sharding(asked | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"})
    assert not sharding.reshard_after_forward and sharding.dp_replicate_size == 2 and not sharding.ignored
    assert read_launcher_sharding({}) is None
    old = read_launcher_sharding(
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}
    )
    assert not old.reshard_after_forward and "fsdp_version 1" in old.ignored[0]


def test_copies_must_divide_the_processes():
    with pytest.raises(ValueError, match="dp_replicate_size"):
        build_accelerator(
            read_sharding({"dp_replicate_size": 3}, {}, False),
            precision="no",
            on_cpu=True,
            processes=4,
            per_machine=4,
        )


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        (["--config_file", "launch/cpu_fsdp2.yaml", "LOOP", "--fsdp", "full_shard"], ["config", "launcher's file"]),
    ],
)
def test_a_launcher_that_says_it_twice_is_an_error(launcher, words, tmp_path):
    loop = ["loops/sft.py", "--config", "configs/sft.yaml", "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    at = launcher.index("LOOP") if "LOOP" in launcher else len(launcher)
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher[:at], *loop, *launcher[at + 1 :]]
    command[1:3] = ["-c", "from accelerate.commands.accelerate_cli import main; main()", "launch"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["accelerate", "launch", *command[4:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HOUSE, env=environment)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    (sentence,) = {line for line in done.stderr.splitlines() if line.startswith("loops/sft.py: error:")}
    assert all(word in sentence for word in words)


VARIANTS = {  # name -> settings of the model, all trained for three steps on one process and on two shards
    "full-tied": {"lora_r": 0},
    "lora-checkpointed": {"lora_r": 4, "gradient_checkpointing": True},
    "dora": {"lora_r": 4, "use_dora": True},
    "saved-modules": {"lora_r": 4, "modules_to_save": "norm"},
    "qlora": {"lora_r": 4, "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "continued": {"lora_r": 4},
}
# AdamW's g / (|g| + epsilon) is the sign of a gradient that is rounding alone, another one on another CPU: with a wide
# epsilon the update is continuous.
OPTIM = dict(learning_rate=5e-3, adam_epsilon=1e-4)
EXAMPLES = [Example([(3 * i + j) % 60 + 2 for j in range(4 + i)], [True] * (4 + i)) for i in range(6)]


def train_variant(name, folder, accelerator, sharding):
    """Losses of three steps, the loss afterwards, the same of the exported folder read by plain peft, and sizes."""
    sharded, base = is_sharded(accelerator), str(folder / "model")
    settings = dict(VARIANTS[name])
    config = ModelConfig(model_id=str(folder / "adapter") if name == "continued" else base, **settings)
    tokenizer = build_tokenizer(config)
    policy = build_policy(config, tokenizer, seed=3, device="cpu", for_fsdp=sharded)
    choose_packing(policy, packing=True, compile=False, print_main=print)
    reference = build_reference(policy)
    optimizer = build_optimizer(policy, OptimConfig(**OPTIM))
    scheduler = build_schedule(optimizer, OptimConfig(**OPTIM), 3)
    policy, optimizer = prepare(accelerator, policy, optimizer, reference=reference, sharding=sharding)
    check = {"longest": 9, "setting": "max_seq_length", "print_main": print, "reference": reference}
    check_policy(policy, pack_examples(EXAMPLES[:2]), accelerator, **check)
    assert is_packed(policy) and is_packed(reference.model)
    loop = sft.Config(batch=BatchConfig(per_device_train_batch_size=3))
    count = sum(len(example.input_ids) - 1 for example in EXAMPLES)
    batch = pack_examples(EXAMPLES)
    losses, references = [], []
    for _ in range(3):
        micro = sft.build_microbatches(range(6), [[e] for e in EXAMPLES], loop, accelerator)
        total = 0.0
        for part in micro:
            loss, _ = sft_loss(score(policy, part).logprobs, part.mask)
            accelerator.backward(loss * accelerator.num_processes / count)
            total = total + loss.detach()
        clip_gradients(accelerator, policy, loop.optim.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(total, "sum").item() / count)
        with torch.no_grad(), reference.active() as model:  # the start again, whatever was trained since
            references.append(-score(model, batch).logprobs.sum().item() / count)
    policy.eval()
    with torch.no_grad():
        after = -score(policy, batch).logprobs.sum().item() / count
    # sampling: processes with other numbers of prompts, one with none
    engine = build_engine(RolloutConfig(engine="transformers"), accelerator.unwrap_model(policy), tokenizer)
    prompts = [[5, 6, 7], [8, 9]] if accelerator.is_main_process else []
    sampling = RolloutConfig(max_completion_length=6)
    drawn = engine.sample(prompts, n=2, sampling=sampling, seed=1, prompt_numbers=list(range(len(prompts))))
    quantised = [
        m.base_layer for m in policy.modules() if type(getattr(m, "base_layer", None)).__name__ == "Linear4bit"
    ]
    packed = [layer.weight for layer in quantised]
    held = [p.to_local() if isinstance(p, DTensor) else p for p in packed]
    export = folder / f"export-{name}-{accelerator.num_processes}"
    export_model(accelerator.unwrap_model(policy), tokenizer, export, merge=False, card={})
    accelerator.wait_for_everyone()
    result = {
        "losses": losses,
        "references": references,
        "after": after,
        "tokens": [[c.token_ids for c in group] for group in drawn],
        "packed_bytes": sum(p.numel() * p.element_size() for p in held),
    }
    if accelerator.is_main_process:
        with safe_open(next(export.glob("*.safetensors")), "pt") as file:
            result["keys"] = sorted(file.keys())
        if settings.get("load_in_4bit"):
            plain = build_policy(ModelConfig(**{**settings, "model_id": str(export)}), None, seed=0, device="cpu")
        elif settings["lora_r"]:
            plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), export)
        else:
            plain = AutoModelForCausalLM.from_pretrained(export)
        plain.eval()
        with torch.no_grad():
            result["reloaded"] = -score(plain, batch).logprobs.sum().item() / count
    return result


def on_shards(folder, processes, fsdp, variants, precision):
    torch.set_num_threads(1)
    sharding = read_sharding(fsdp, {}, False)
    accelerator = build_accelerator(
        sharding, precision=precision, on_cpu=True, processes=processes, per_machine=processes
    )
    results = {}
    for name in variants:
        results[name] = train_variant(name, Path(folder), accelerator, sharding)
        accelerator.free_memory()
    if accelerator.is_main_process:
        Path(folder, f"{processes}.json").write_text(json.dumps(results))


def start(folder, processes, fsdp="full_shard", variants=tuple(VARIANTS), precision="no"):
    arguments = (str(folder), processes, fsdp, variants, precision)
    code = (
        "from accelerate import debug_launcher; from tests.loops.test_sharding import on_shards;"
        f"debug_launcher(on_shards, {arguments!r}, num_processes={processes})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HOUSE)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{processes}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny tied model, and an adapter on it that has been trained a little."""
    folder = tmp_path_factory.mktemp("sharding")
    base = save_model(folder / "model")
    config = ModelConfig(model_id=base, lora_r=4)
    policy = build_policy(config, None, seed=1, device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    export_model(policy, build_tokenizer(config), folder / "adapter", merge=False, card={})
    return folder


@pytest.fixture(scope="module")
def one(folder):
    return start(folder, 1)


@pytest.fixture(scope="module")
def two(folder):
    return start(folder, 2)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_sharded_policy_trains_samples_and_exports_like_a_whole_one(name, one, two):
    """Losses, the reference's score and sampled tokens as on one process; the export has every key and reloads."""
    assert two[name]["losses"] == pytest.approx(one[name]["losses"], abs=2e-5)
    assert one[name]["losses"][2] < one[name]["losses"][0] - 0.05  # it trains
    assert two[name]["references"] == pytest.approx(one[name]["references"], abs=2e-5)
    assert max(two[name]["references"]) - min(two[name]["references"]) < 2e-5  # the reference stays
    assert two[name]["tokens"] == one[name]["tokens"] and len(one[name]["tokens"]) == 2
    assert two[name]["keys"] == one[name]["keys"]
    assert two[name]["reloaded"] == pytest.approx(two[name]["after"], abs=2e-5)


def test_a_four_bit_base_is_split_exactly_in_half(one, two):
    """Two layers of 64 x (64 + 32 + 32 + 64 + 3 x 128) weights, two in a byte; half of the bytes on each of two."""
    whole = 2 * 64 * (64 + 32 + 32 + 64 + 3 * 128) // 2
    assert one["qlora"]["packed_bytes"] == whole
    assert two["qlora"]["packed_bytes"] == whole // 2


def test_offload_and_loading_on_one_process_change_no_number(folder, one):
    fsdp = {"offload_params": True, "cpu_ram_efficient_loading": True, "activation_checkpointing": True}
    other = start(folder, 2, fsdp, ("full-tied", "lora-checkpointed"))
    for name in ("full-tied", "lora-checkpointed"):
        assert other[name]["losses"] == pytest.approx(one[name]["losses"], abs=2e-5)
        assert other[name]["tokens"] == one[name]["tokens"]
        assert other[name]["reloaded"] == pytest.approx(other[name]["after"], abs=2e-5)


def test_bf16_keeps_outputs_and_reductions_in_fp32(folder, one):
    """Losses near those in fp32, and not on bf16's grid (8 bits: steps of 0.016 at 4)."""
    other = start(folder, 2, "full_shard", ("full-tied", "lora-checkpointed"), "bf16")
    for name in ("full-tied", "lora-checkpointed"):
        assert other[name]["losses"] == pytest.approx(one[name]["losses"], abs=0.05)
        assert any(loss != torch.tensor(loss).bfloat16().item() for loss in other[name]["losses"])


LAUNCH_FILES = {  # file -> (processes, what it shards)
    "cpu_ddp.yaml": (2, None),
    "cpu_fsdp2.yaml": (2, {}),
    "laptop.yaml": (1, None),
    "one_gpu.yaml": (1, None),
    "gpu8_ddp.yaml": (8, None),
    "gpu8_fsdp2.yaml": (8, {"cpu_ram_efficient_loading": True}),
    "gpu8_offload.yaml": (8, {"cpu_ram_efficient_loading": True, "cpu_offload": True}),
    "hybrid_2_nodes.yaml": (16, {"cpu_ram_efficient_loading": True, "dp_replicate_size": 2}),
}


def test_every_launch_file_ships_with_its_meaning():
    assert {path.name for path in (HOUSE / "launch").glob("*.yaml")} == set(LAUNCH_FILES)


@pytest.mark.parametrize("name", LAUNCH_FILES)
def test_a_launch_file_means_to_the_loops_what_it_says(name):
    """Through accelerate's own parser and the environment that its launcher makes. (A port that another run on this
    machine has taken is refused there, and no part of the meaning.)"""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    options = ["--config_file", str(HOUSE / "launch" / name), "--main_process_port", "0"]
    arguments = launch_command_parser().parse_args([*options, "loops/sft.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    processes, expected = LAUNCH_FILES[name]
    assert arguments.num_processes == processes
    sharding = read_launcher_sharding(prepare_multi_gpu_env(arguments) if processes > 1 else {})
    if expected is None:
        assert sharding is None
        return
    plain = read_sharding("full_shard", {}, False)
    for key, value in vars(sharding).items():
        assert value == expected.get(key, getattr(plain, key)), key
