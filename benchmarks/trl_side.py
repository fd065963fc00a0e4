"""The other side: one TRL run, timed by step; runs in TRL's own environment and never beside the project's modules.

    python benchmarks/trl_side.py SETTINGS.json OUT.json

A step is timed from the end of the previous step's logging to the end of the optimizer step, which is what `time/step`
of Plumbline's loops spans: making the batch, rollout, forward, backward, clipping, update; no logging. Greedy answers
to held-out problems are sampled and judged after that, outside the clock.
"""

import json
import sys
import time
from pathlib import Path

import reward
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Seconds of every step, and of the rollout within it; accuracy after every `eval_steps`, where there are rows."""

    def __init__(self, settings):
        self.settings = settings
        self.eval_rows = read_rows(settings["job"]["eval_rows"])
        self.began = self.rollout = 0.0
        self.steps = []  # one dict a step
        self.tokens = []  # trained tokens of each micro-batch since the last step

    def on_train_begin(self, args, state, control, model, processing_class, **_):
        if self.eval_rows:  # the other side measures before its first step too, so both have sampled before
            self.accuracy(model, processing_class)

    def on_epoch_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_log(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, model, processing_class, **_):
        step = time.perf_counter() - self.began
        tokens = sum(int(count) for count in self.tokens)
        self.steps.append({"step": step, "rollout": self.rollout, "update": step - self.rollout, "tokens": tokens})
        self.rollout, self.tokens = 0.0, []
        if self.eval_rows and state.global_step % self.settings["eval_steps"] == 0:
            self.steps[-1]["accuracy"] = self.accuracy(model, processing_class)
            control.should_training_stop |= self.steps[-1]["accuracy"] >= self.settings["to_accuracy"]

    @torch.no_grad()
    def accuracy(self, model, tokenizer, batch=256):
        """Share of the evaluation rows whose greedy answer is right."""
        right, length = 0.0, self.settings["job"]["max_completion_length"]
        model.eval()
        for start in range(0, len(self.eval_rows), batch):
            rows = self.eval_rows[start : start + batch]
            asked = tokenizer(
                [row["prompt"] for row in rows], return_tensors="pt", padding=True, padding_side="left"
            ).to(model.device)
            tokens = model.generate(**asked, do_sample=False, max_new_tokens=length)[:, asked["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            right += sum(reward.exact_answer(completions=texts, answer=[row["answer"] for row in rows]))
        model.train()
        return right / len(self.eval_rows)

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


def read_rows(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()] if file else []


def build_trainer(settings):
    """A trainer for `compare.Job` and the options that go with it."""
    job = settings["job"]
    common = {
        "output_dir": settings["output_dir"],
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["rows_per_step"],
        "learning_rate": max(settings["rates"]),
        "seed": job["seed"],
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
    built = trainer(
        model=job["model"],
        args=config(**common | settings["extra"]),
        train_dataset=Dataset.from_list(read_rows(job["rows"])),
        peft_config=lora if settings["lora_r"] else None,
        **({"reward_funcs": getattr(reward, settings["reward"])} if job["loop"] == "grpo" else {}),
    )

    def create_scheduler(num_training_steps, optimizer=None):  # the rates of the other side, step by step
        rates = settings["rates"]
        share = [rate / max(rates) for rate in rates] + [0.0]  # one is asked for after the last step
        built.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or built.optimizer, lambda step: share[step])
        return built.lr_scheduler

    built.create_scheduler = create_scheduler
    return built


if __name__ == "__main__":
    settings = json.loads(Path(sys.argv[1]).read_text())
    trainer, clock = build_trainer(settings), Clock(settings)
    clock.watch(trainer)
    trainer.train()
    Path(sys.argv[2]).write_text(json.dumps(clock.steps))
