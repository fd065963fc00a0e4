"""DPO: maximum likelihood of preferences; the policy's log-ratio to a reference is the reward.

As differences from SFT: a row is a pair; its loss looks at sums of log-probabilities, of both
completions, under both models:
-log sigmoid(beta * ((chosen - reference's) - (rejected - reference's))).
Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7.

    accelerate launch loops/dpo.py --config configs/dpo.yaml                         # a laptop
    accelerate launch --multi_gpu --num_processes 8 loops/dpo.py --config my.yaml    # many GPUs

One step: take the step's pairs; pack each process's share into flat micro-batches, a pair's prompt
once; then, per micro-batch, score both completions, compare with the reference's scores (computed
once, before training), add up the loss, backward; clip, step.

Legend: P pairs, B = 2P sequences (chosen and rejected in turn), T tokens.
"""

import time
from dataclasses import asdict, dataclass, field

import torch

from configs.loader import dump_config, load_config
from data import batches, pack
from data.chat import EncodeConfig, encode_pair, encode_prompt, encode_rows
from data.load import DataConfig, load_rows
from data.rewards import RewardConfig, build_reward_fn
from loops.shared import models, optim, rollout
from loops.shared.metrics import Metrics
from loops.shared.optim import OptimConfig
from loops.shared.policy import check_policy, choose_packing, score
from loops.shared.reference import build_reference
from loops.shared.rollout import RolloutConfig
from loops.shared.run import RunConfig, one_sentence_errors, start_run
from losses.dpo import check_options, dpo_loss


@dataclass(frozen=True, kw_only=True)
class Config:
    """DPO; see the sections for the model, the data, the optimizer and the run."""

    model: models.ModelConfig = field(default_factory=models.ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    batch: batches.BatchConfig = field(default_factory=batches.BatchConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    loss_type: str = "sigmoid"
    """sigmoid, ipo, hinge or another of `losses.dpo.LOSS_TYPES`."""
    beta: float = 0.1
    """Strength of the pull towards the reference: rewards are beta times log-ratios."""
    label_smoothing: float = 0.0
    """Share of preferences taken to be wrong (conservative DPO), from 0 to below 0.5."""
    precompute_ref_log_probs: bool = True
    """Score all pairs under the reference once, before training, and keep the numbers in the run
    folder; false: in every step, with the reference model held in memory."""
    ref_update: str = "none"
    """none: the reference stays the start policy; ema: every ref_model_sync_steps steps it moves
    towards the policy by ref_model_mixup_alpha; sync: it becomes the policy then. Needs
    precompute_ref_log_probs: false."""
    ref_model_mixup_alpha: float = 0.6
    """Weight of the policy in the reference's new weights (ema); the rest is its own old ones."""
    ref_model_sync_steps: int = 512
    """Steps between two updates of the reference (ema and sync)."""
    eval_reward: str | None = None
    """Reward function whose mean over greedy completions of evaluation prompts is eval/accuracy."""

    def __post_init__(self) -> None:
        self.batch.refuse_bins()
        if self.ref_update not in ("none", "ema", "sync"):
            raise ValueError(f"ref_update is {self.ref_update!r}; give none, ema or sync.")
        if self.ref_update != "none" and self.precompute_ref_log_probs:
            raise ValueError(
                f"ref_update is {self.ref_update} and precompute_ref_log_probs true, which scores "
                "with the start policy; set precompute_ref_log_probs: false, or ref_update: none."
            )
        check_options(self.beta, self.loss_type, self.label_smoothing)


def build_microbatches(rows, pairs, config, accelerator):
    """Packed micro-batches of this process's share of the rows (numbers of pairs); as many on every
    process. Each is (batch, numbers of its pairs).
    """
    cuts = batches.cut_step(
        [pairs[row].num_tokens for row in rows],
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        max_rows=config.batch.per_device_train_batch_size,
        max_tokens=config.batch.max_tokens_per_batch,
    )
    microbatches = []
    for cut in cuts:
        chosen = [rows[place] for place in cut]
        batch = pack.pack_pairs([pairs[row] for row in chosen]).to(accelerator.device)
        microbatches.append((batch, chosen))
    return microbatches


@torch.no_grad()
def evaluation_metrics(policy, reference, microbatches, config, accelerator):
    """Loss, and accuracy and margin of the rewards, on evaluation pairs."""
    policy.eval()
    metrics = Metrics()
    for batch, rows in microbatches:
        ref_logps = reference.sequence_logprobs(batch, rows, "eval")  # [B]
        logps = score(policy, batch).logprobs.sum(dim=1)  # [B]
        lengths = batch.mask.sum(dim=1)
        loss, terms = dpo_loss(
            logps[0::2], logps[1::2], *ref_logps.to(logps).view(-1, 2).unbind(1), beta=config.beta,
            loss_type=config.loss_type, label_smoothing=config.label_smoothing,
            chosen_lengths=lengths[0::2], rejected_lengths=lengths[1::2],
        )  # fmt: skip
        metrics.mean("eval/loss", loss, len(logps) // 2)
        metrics.mean("eval/reward_accuracy", terms["reward/accuracy"], len(logps) // 2)
        metrics.mean("eval/reward_margin", terms["reward/margin"], len(logps) // 2)
    policy.train()
    return metrics.reduce(accelerator)


def main(config: Config) -> None:
    """Build everything; per step: batches, update, record; at the end export."""
    tokenizer = models.build_tokenizer(config.model)
    rows, eval_rows = load_rows(config.data, seed=config.run.seed)
    eval_rows, encoding = eval_rows or [], (tokenizer, config.encode)
    pairs, *reports = encode_rows(rows, encode_pair, *encoding, what="training rows")
    eval_pairs, report = encode_rows(eval_rows, encode_pair, *encoding, what="evaluation rows")
    reports.append(report)
    eval_rewards, eval_prompts = {}, []
    if config.eval_reward and eval_rows:
        named = RewardConfig(reward_functions=config.eval_reward)
        eval_rewards["accuracy"] = build_reward_fn(named, eval_rows, key="eval_reward")
        what = "evaluation prompts"
        eval_prompts, report = encode_rows(eval_rows, encode_prompt, *encoding, what=what)
        reports.append(report)

    run = start_run(
        config.run, loop="dpo", resolved=dump_config(config), settings=asdict(config),
        expandable_segments=not config.rollout.vllm_in_process or not config.eval_reward,
    )  # fmt: skip
    accelerator = run.accelerator
    run.print_main("\n".join(str(each) for each in reports if each.rows))
    seed = config.run.seed
    place = {"device": accelerator.device, "for_fsdp": run.sharded, "log": run.print_main}
    stops = reports[0].stop_tokens
    policy = models.build_policy(config.model, tokenizer, stops, seed=seed, **place)
    every = pairs + eval_pairs
    longest = max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in every)
    choose_packing(
        policy, packing=config.batch.packing, compile=config.model.compile,
        print_main=run.print_main,
    )  # fmt: skip
    reference = build_reference(
        policy, accelerator.autocast, ref_update=config.ref_update,
        mixup_alpha=config.ref_model_mixup_alpha, sync_steps=config.ref_model_sync_steps,
    )  # fmt: skip
    rows_per_step = config.batch.rows_per_step(accelerator.num_processes)
    epoch_steps = batches.steps_per_epoch(len(pairs), rows_per_step)
    total_steps = config.run.total_steps(epoch_steps)
    optimizer = optim.build_optimizer(policy, config.optim, seed=seed, sharded=run.sharded)
    scheduler = optim.build_schedule(optimizer, config.optim, total_steps)
    engine = None
    if eval_rewards:
        serving = {"autocast": accelerator.autocast, "api_key": run.server_key}
        engine = rollout.build_engine(config.rollout, policy, tokenizer, **serving)
        run.on_end(engine.close)
    policy, optimizer = run.prepare(policy, optimizer, reference)
    first_rows = pack.pack_check([pair.prompt_ids + pair.chosen_ids for pair in pairs[:2]], longest)
    check_policy(
        policy, first_rows, accelerator, longest=longest, print_main=run.print_main,
        reference=reference, setting="max_seq_length",
    )  # fmt: skip
    run.create_folder(total_steps, rows=pairs, rows_per_step=rows_per_step)
    if config.precompute_ref_log_probs:  # of the start policy, so before a checkpoint is read
        began = time.perf_counter()

        def precompute(split: str, given: list) -> None:
            mark = reference.fingerprint(given, config.model, seed, accelerator)

            def cut(chosen):
                return build_microbatches(chosen, given, config, accelerator)

            reference.precompute(split, len(given), cut, run.folder, mark, accelerator)

        precompute("train", pairs)
        precompute("eval", eval_pairs)
        run.pending["time/reference"] = time.perf_counter() - began
        reference.release()  # a copy's memory is free again
    start = run.resume(policy, optimizer, scheduler)

    def evaluate() -> dict[str, float]:
        began, everything = time.perf_counter(), range(len(eval_pairs))
        metrics = rollout.greedy_evaluation(
            engine, eval_prompts, eval_rewards, sampling=config.rollout, accelerator=accelerator,
            policy=policy,
        )  # fmt: skip
        microbatches = build_microbatches(everything, eval_pairs, config, accelerator)
        metrics |= evaluation_metrics(policy, reference, microbatches, config, accelerator)
        return metrics | {"time/eval": time.perf_counter() - began}

    if start == 0 and eval_pairs:
        run.log(evaluate(), 0)

    for step in range(start, total_steps):
        began, metrics = time.perf_counter(), Metrics()
        run.set_phase(step, "the update")
        chosen = batches.rows_of_step(
            step, num_rows=len(pairs), rows_per_step=rows_per_step, seed=seed
        )
        microbatches = build_microbatches(chosen, pairs, config, accelerator)

        # update; the denominator is the number of pairs of the step, over all processes
        for mb in microbatches:
            batch, numbers_of_pairs = mb
            # until the last backward gradients only add up; then DDP exchanges them
            with optim.accumulate(accelerator, policy, last=mb is microbatches[-1]):
                ref_logps = reference.sequence_logprobs(batch, numbers_of_pairs)  # [B]
                logprobs, entropy = score(policy, batch)  # [B, T], [B, T]
                logps, lengths = logprobs.sum(dim=1), batch.mask.sum(dim=1)  # [B], [B]
                ref_logps = ref_logps.to(logps)
                loss, terms = dpo_loss(  # eq. 7 of the paper; a sum over pairs
                    logps[0::2],  # [P] of the policy, chosen
                    logps[1::2],  # [P] rejected
                    ref_logps[0::2],
                    ref_logps[1::2],
                    beta=config.beta,
                    loss_type=config.loss_type,
                    label_smoothing=config.label_smoothing,
                    chosen_lengths=lengths[0::2],
                    rejected_lengths=lengths[1::2],
                )
                # DDP and FSDP average gradients over processes
                accelerator.backward(loss * accelerator.num_processes / len(chosen))
            run.guard.seen(loss, batch.numbers)
            metrics.means(terms, len(logps) // 2)
            metrics.mean("loss/dpo", loss.detach(), len(logps) // 2)
            metrics.mean("policy/entropy", entropy.detach_().sum(), len(batch.rows))
            metrics.sum("tokens/loss", len(batch.rows))  # a shared beginning counts in both
            metrics.sum("tokens/computed", batch.num_tokens)
            del logprobs, logps, loss  # their graph would live through the next forward
        grad_norm = optim.clip_gradients(accelerator, policy, config.optim.max_grad_norm)
        if run.guard.may_step(step + 1, grad_norm):  # NaN or inf: the run ends, or skips the update
            metrics.set("optim/unchanged", optim.take_step(optimizer))
        metrics.set("optim/grad_norm", grad_norm)  # before clipping
        metrics.set("optim/learning_rate", scheduler.get_last_lr()[0])
        scheduler.step()
        optimizer.zero_grad()
        reference.update(policy, step + 1)  # nothing with ref_update: none

        # record
        metrics.set("time/step", time.perf_counter() - began)
        done, numbers = step + 1, run.reduce(metrics)
        if eval_pairs and run.eval_due(done):
            numbers |= evaluate()
        run.log(numbers, done)
        if run.save_due(done):
            run.save(policy, optimizer, scheduler, done, epoch=done // epoch_steps)
    run.export(policy, tokenizer, config.model)


if __name__ == "__main__":
    with one_sentence_errors("loops/dpo.py") as prints:
        main(load_config(Config, prog="loops/dpo.py", prints=prints))
