"""DPO: maximum likelihood of preferences, the policy's log-ratio to a frozen reference being the reward.

As differences from SFT: a row is a pair; its loss looks at sums of log-probabilities, of both completions, under both
models: -log sigmoid(beta * ((chosen - reference's) - (rejected - reference's))).
Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7.

    accelerate launch loops/dpo.py --config configs/dpo.yaml                                # a laptop
    accelerate launch --multi_gpu --num_processes 8 loops/dpo.py --config my.yaml           # many GPUs

One step: take the step's pairs; pack each process's share into flat micro-batches, a pair's prompt once; then, per
micro-batch, score both completions, compare with the reference's scores (computed once, before training), add up the
loss, backward; clip, step.

Legend: P pairs, B = 2P sequences (chosen and rejected in turn), T tokens.
"""

import hashlib
import time
from dataclasses import asdict, dataclass, field

import torch
from accelerate.utils import broadcast_object_list

from configs.loader import dump_config, load_config
from data.chat import EncodeConfig, encode_pair, encode_prompt, encode_rows
from data.load import DataConfig, load_rows
from data.pack import BatchConfig, cut_step, pack_check, pack_pairs, rows_of_step, steps_per_epoch
from data.rewards import build_judge
from loops.shared.models import (
    ModelConfig,
    build_policy,
    build_reference,
    build_tokenizer,
    parameter_line,
    resolve_dtype,
)  # fmt: skip
from loops.shared.optim import OptimConfig, build_optimizer, build_schedule, clip_gradients, sample_weights
from loops.shared.policy import check_context, choose_packing, score
from loops.shared.rollout import RolloutConfig, build_engine
from loops.shared.rollout.evaluate import greedy_evaluation
from loops.shared.run import RunConfig, add_sums, one_sentence_errors, reduce_sums, start_run
from losses.dpo import dpo_loss

PER_PAIR = ("loss/", "reward/", "policy/chosen", "policy/rejected")  # names of sums that become means over pairs


@dataclass(frozen=True, kw_only=True)
class Config:
    """DPO; see the sections for the model, the data, the optimizer and the run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
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
    """Score all pairs under the reference once, before training, and keep the numbers in the run folder; false: in
    every step, with the reference model held in memory."""
    eval_reward: str | None = None
    """Reward function whose mean over greedy completions of the evaluation prompts is `eval/accuracy`."""

    def __post_init__(self) -> None:
        self.batch.refuse_bins()
        settings = {"beta": self.beta, "loss_type": self.loss_type, "label_smoothing": self.label_smoothing}
        dpo_loss(*torch.zeros(4, 1), **settings, chosen_lengths=torch.ones(1), rejected_lengths=torch.ones(1))


def build_microbatches(rows, pairs, frozen, config, accelerator):
    """Packed micro-batches of this process's share of the rows (numbers of pairs); as many on every process.

    Each is (batch, reference's log-probabilities [B] out of `frozen` [pairs, 2], or None where that is None).
    """
    cuts = cut_step(
        [pairs[row].num_tokens for row in rows],
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        max_rows=config.batch.per_device_train_batch_size,
        max_tokens=config.batch.max_tokens_per_batch,
    )
    microbatches = []
    for cut in cuts:
        chosen = [rows[place] for place in cut]
        batch = pack_pairs([pairs[row] for row in chosen]).to(accelerator.device)
        microbatches.append((batch, None if frozen is None else frozen[chosen].flatten()))
    return microbatches


def reference_logps(reference, batch, accelerator, packing):
    """Log-probability of each completion under the reference: [B], sums over its tokens."""
    with accelerator.autocast(), reference.active() as model:
        return score(model, batch, packing=packing).logprobs.sum(dim=1)


def fingerprint(pairs, config, accelerator):
    """Digest of all that decides the reference's scores, and of nothing that only costs time or memory."""
    model = config.model
    names = ["model_id", "revision", "from_scratch", "load_in_8bit", "load_in_4bit"]
    names += (
        ["bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant"] if model.load_in_4bit else []
    )
    source = [getattr(model, name) for name in names] + [config.run.seed if model.from_scratch else None]
    source += [resolve_dtype(model, accelerator.device), accelerator.mixed_precision]
    digest = hashlib.sha256(repr(source).encode())
    for pair in pairs:  # without its number, which is for messages
        digest.update(repr((pair.prompt_ids, pair.completions())).encode())
    return digest.hexdigest()


def precompute(reference, pairs, file, config, accelerator, packing):
    """`reference_logps` of all pairs, [pairs, 2], kept in `file` under their `fingerprint`.

    A file that is there is taken if its fingerprint and, recomputed, its first pairs agree; otherwise ValueError.
    """
    mark = fingerprint(pairs, config, accelerator)
    known = torch.load(file, weights_only=True) if accelerator.is_main_process and file.exists() else None
    (known,) = broadcast_object_list([known])  # of the first process's disk: others may see an older one, or none
    wanted = range(len(pairs) if known is None else min(len(pairs), 4 * accelerator.num_processes))
    table = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for batch, places in build_microbatches(
        wanted, pairs, torch.arange(2 * len(pairs)).view(-1, 2), config, accelerator
    ):
        table.view(-1)[places] = reference_logps(reference, batch, accelerator, packing).double().cpu()
    table = accelerator.reduce(table.to(accelerator.device), "sum")
    if known is None:
        if accelerator.is_main_process:
            torch.save({"fingerprint": mark, "logps": table.cpu()}, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
        return table
    stored = known["logps"].to(table)
    near = 1.0 if accelerator.mixed_precision != "no" or next(reference.model.parameters()).itemsize < 4 else 0.01
    if known["fingerprint"] != mark or not torch.allclose(stored[wanted], table[wanted], rtol=1e-3, atol=near):
        raise ValueError(
            f"{file} was computed from another model, other pairs or settings; delete it to compute it again."
        )
    return stored


def score_batch(policy, reference, batch, frozen, config, accelerator, packing):
    """Loss and sums of metrics of one micro-batch, for training and evaluation alike."""
    if frozen is None:
        frozen = reference_logps(reference, batch, accelerator, packing)
    scores = score(policy, batch, packing=packing)
    logps, lengths = scores.logprobs.sum(dim=1), batch.mask.sum(dim=1)  # [B], [B]
    frozen = frozen.to(logps)
    loss, terms = dpo_loss(
        logps[0::2],  # [P]
        logps[1::2],
        frozen[0::2],
        frozen[1::2],
        beta=config.beta,
        loss_type=config.loss_type,
        label_smoothing=config.label_smoothing,
        chosen_lengths=lengths[0::2],
        rejected_lengths=lengths[1::2],
    )
    terms["loss/dpo"] = loss.detach()
    terms["policy/entropy"] = scores.entropy.detach().sum()
    terms["pairs"] = len(logps) // 2
    terms["tokens/computed"] = batch.num_tokens
    terms["tokens/loss"] = len(batch.rows)  # what both completions begin with counts in both
    return loss, terms


def train_step(policy, reference, optimizer, scheduler, microbatches, denominator, config, accelerator, packing, guard):
    """One optimizer step; returns sums of metrics over this process's pairs.

    denominator: pairs of the whole step, over all processes.
    """
    sums = {}
    for batch, frozen in microbatches:
        loss, terms = score_batch(policy, reference, batch, frozen, config, accelerator, packing)
        accelerator.backward(loss * accelerator.num_processes / denominator)  # DDP and FSDP average over processes
        guard.seen(loss, batch.numbers)
        add_sums(sums, terms)
    sums["optim/grad_norm"] = clip_gradients(accelerator, policy, config.optim.max_grad_norm)
    sums["optim/learning_rate"] = scheduler.get_last_lr()[0]
    if guard.may_step(scheduler.last_epoch + 1, sums["optim/grad_norm"]):
        before = sample_weights(optimizer)
        optimizer.step()
        sums["optim/unchanged"] = (sample_weights(optimizer) == before).double().mean()
    scheduler.step()
    optimizer.zero_grad()
    return sums


def step_metrics(total):
    """The step's metrics from its global sums: means over pairs, the entropy over target tokens."""
    metrics = {name: value for name, value in total.items() if name.startswith(("time/", "optim/", "tokens/"))}
    metrics |= {name: value / max(total["pairs"], 1) for name, value in total.items() if name.startswith(PER_PAIR)}
    metrics["policy/entropy"] = total["policy/entropy"] / max(total["tokens/loss"], 1)
    return metrics


@torch.no_grad()
def evaluate(policy, reference, frozen, engine, pairs, prompts, judges, config, accelerator, packing):
    """Loss and reward accuracy on the evaluation pairs and, where a judge is given, accuracy of greedy completions."""
    began = time.perf_counter()
    policy.eval()
    sums = {}
    for batch, logps in build_microbatches(range(len(pairs)), pairs, frozen, config, accelerator):
        add_sums(sums, score_batch(policy, reference, batch, logps, config, accelerator, packing)[1])
    policy.train()
    total = reduce_sums(accelerator, sums)
    settings = {"sampling": config.rollout.sampling(), "accelerator": accelerator}
    metrics = greedy_evaluation(engine, prompts, judges, policy=policy, **settings)
    metrics["eval/loss"] = total["loss/dpo"] / max(total["pairs"], 1)
    metrics["eval/reward_accuracy"] = total["reward/accuracy"] / max(total["pairs"], 1)  # margin > 0
    metrics["eval/reward_margin"] = total["reward/margin"] / max(total["pairs"], 1)
    return metrics | {"time/eval": time.perf_counter() - began}


def main(config: Config) -> None:
    """Build everything, train, export."""
    tokenizer = build_tokenizer(config.model)
    rows, eval_rows = load_rows(config.data, seed=config.run.seed)
    pairs, report = encode_rows(rows, encode_pair, tokenizer, config.encode, what="training rows")
    eval_pairs, _ = encode_rows(eval_rows or [], encode_pair, tokenizer, config.encode, what="evaluation rows")
    judges = {"accuracy": build_judge(config.eval_reward, eval_rows)} if config.eval_reward and eval_rows else {}
    eval_prompts, _ = encode_rows(
        eval_rows if judges else [], encode_prompt, tokenizer, config.encode, what="evaluation prompts"
    )

    run = start_run(config.run, loop="dpo", resolved=dump_config(config), settings=asdict(config))
    accelerator = run.accelerator
    run.say(str(report))
    policy = build_policy(
        config.model, tokenizer, seed=config.run.seed, device=accelerator.device, for_fsdp=run.sharded
    )
    run.say(parameter_line(policy))
    longest = max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs + eval_pairs)
    check_context(policy, longest, setting="max_seq_length", say=run.say)
    first = pack_check([pair.prompt_ids + pair.chosen_ids for pair in pairs[:2]], longest)
    packing = choose_packing(policy, first, wanted=config.batch.packing, compile=config.model.compile, say=run.say)
    reference = build_reference(policy)
    rows_per_step = config.batch.rows_per_step(accelerator.num_processes)
    epoch_steps = steps_per_epoch(len(pairs), rows_per_step)
    total_steps = config.run.total_steps(epoch_steps)
    optimizer = build_optimizer(policy, config.optim, seed=config.run.seed, sharded=run.sharded)
    scheduler = build_schedule(optimizer, config.optim, total_steps)
    engine = build_engine(config.rollout, policy, tokenizer, autocast=accelerator.autocast) if judges else None
    policy, optimizer = run.prepare(policy, optimizer, reference, engine)
    run.open(total_steps, rows=pairs, rows_per_step=rows_per_step)
    frozen = eval_frozen = None
    if config.precompute_ref_log_probs:  # of the start policy, so before a checkpoint is read
        began = time.perf_counter()
        frozen = precompute(reference, pairs, run.folder / "reference_train.pt", config, accelerator, packing)
        eval_frozen = precompute(reference, eval_pairs, run.folder / "reference_eval.pt", config, accelerator, packing)
        run.pending["time/reference"] = time.perf_counter() - began
        reference = None  # a copy's memory is free again
    start = run.load(policy, optimizer, scheduler)
    evaluation = (reference, eval_frozen, engine, eval_pairs, eval_prompts, judges, config, accelerator, packing)
    if start == 0 and eval_pairs:
        run.log(evaluate(policy, *evaluation), 0)

    for step in range(start, total_steps):
        began = time.perf_counter()
        rows = rows_of_step(step, num_rows=len(pairs), rows_per_step=rows_per_step, seed=config.run.seed)
        microbatches = build_microbatches(rows, pairs, frozen, config, accelerator)
        run.at(step, "the update")
        sums = train_step(
            policy, reference, optimizer, scheduler, microbatches, len(rows), config, accelerator, packing, run.guard
        )
        sums["time/step"] = time.perf_counter() - began
        metrics = step_metrics(run.reduce(sums))

        done, last = step + 1, step + 1 == total_steps
        if eval_pairs and run.due(done, config.run.eval_steps, last):
            metrics |= evaluate(policy, *evaluation)
        run.log(metrics, done)
        if run.saves(done, last):
            run.save(policy, optimizer, scheduler, done, epoch=done // epoch_steps)
    run.finish(policy, tokenizer, merge=config.model.exports_merged)


if __name__ == "__main__":
    with one_sentence_errors("loops/dpo.py") as prints:
        main(load_config(Config, prog="loops/dpo.py", prints=prints))
