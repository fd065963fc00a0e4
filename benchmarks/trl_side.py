"""The other side: one TRL run, timed by step; runs in TRL's own environment and never beside the project's modules.

    python benchmarks/trl_side.py SETTINGS.json OUT.json

A step is timed from the end of the previous step's logging to the end of the optimizer step, which is what `time/step`
of Plumbline's loops spans: making the batch, rollout, forward, backward, clipping, update; no logging.
"""

import json
import sys
import time
from pathlib import Path

import trl
from datasets import Dataset
from peft import LoraConfig
from reward import fingerprint
from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Seconds of every step, and of the rollout within it."""

    def __init__(self):
        self.began = self.rollout = 0.0
        self.steps = []  # one dict a step
        self.tokens = []  # trained tokens of each micro-batch since the last step

    def on_epoch_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_log(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        step = time.perf_counter() - self.began
        tokens = sum(int(count) for count in self.tokens)
        self.steps.append({"step": step, "rollout": self.rollout, "update": step - self.rollout, "tokens": tokens})
        self.rollout, self.tokens = 0.0, []

    def watch(self, trainer):
        """Time the trainer's sampling and scoring of completions, and count the tokens that its loss sees."""
        compute_loss = trainer.compute_loss

        def counting(model, inputs, *args, **kwargs):
            if "labels" in inputs:  # SFT
                self.tokens.append((inputs["labels"][:, 1:] != -100).sum())
            else:
                self.tokens.append(inputs["completion_mask"].sum())
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = counting
        if isinstance(trainer, trl.GRPOTrainer):
            sample = trainer._generate_and_score_completions

            def timed(inputs):
                began = time.perf_counter()
                result = sample(inputs)
                self.rollout += time.perf_counter() - began
                return result

            trainer._generate_and_score_completions = timed
        trainer.add_callback(self)


def build_trainer(settings):
    """A trainer for `compare.Job` and the options that go with it."""
    job = settings["job"]
    common = {
        "output_dir": settings["output_dir"],
        "max_steps": settings["steps"],
        "per_device_train_batch_size": job["rows_per_step"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": settings["device"] == "cpu",
        "bf16": settings["device"] == "cuda",
        "gradient_checkpointing": settings["gradient_checkpointing"],
        "model_init_kwargs": {"dtype": settings["torch_dtype"]},
    }
    if job["loop"] == "grpo":
        trainer, config = trl.GRPOTrainer, trl.GRPOConfig
        common |= {name: job[name] for name in ("num_generations", "max_completion_length")}
    else:
        trainer, config = (trl.SFTTrainer, trl.SFTConfig) if job["loop"] == "sft" else (trl.DPOTrainer, trl.DPOConfig)
        common["max_length"] = job["max_seq_length"]
    if job["loop"] == "dpo":
        common["precompute_ref_log_probs"] = False
    lora = LoraConfig(r=settings["lora_r"], lora_alpha=settings["lora_alpha"], target_modules="all-linear")
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    return trainer(
        model=job["model"],
        args=config(**common | settings["extra"]),
        train_dataset=Dataset.from_list(rows),
        peft_config=lora if settings["lora_r"] else None,
        **({"reward_funcs": fingerprint} if job["loop"] == "grpo" else {}),
    )


if __name__ == "__main__":
    trainer, clock = build_trainer(json.loads(Path(sys.argv[1]).read_text())), Clock()
    clock.watch(trainer)
    trainer.train()
    Path(sys.argv[2]).write_text(json.dumps({"steps": clock.steps, "version": trl.__version__}))
