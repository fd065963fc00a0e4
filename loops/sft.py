"""SFT: maximum likelihood of the target tokens, token by token.

loss = - sum over the step's target tokens of log p(token | what stands before it), over their number.

    accelerate launch loops/sft.py --config configs/sft.yaml                                # a laptop
    accelerate launch --multi_gpu --num_processes 8 loops/sft.py --config my.yaml           # many GPUs

One step: take the step's rows; pack each process's share into flat micro-batches; count the target tokens once;
then, per micro-batch, score the targets, add up the loss, backward; clip, step.

Legend: B sequences, T tokens.
"""

import time
from dataclasses import asdict, dataclass, field

import torch

from configs.loader import dump_config, load_config
from data.chat import EncodeConfig, encode_example, encode_prompt, encode_rows
from data.load import DataConfig, load_rows
from data.pack import BatchConfig, cut_step, pack_check, pack_examples, pack_rows, rows_of_step, steps_per_epoch
from data.rewards import build_judge
from loops.shared.models import ModelConfig, build_policy, build_tokenizer, parameter_line
from loops.shared.optim import OptimConfig, build_optimizer, build_schedule, clip_gradients, sample_weights
from loops.shared.policy import check_context, choose_packing, score
from loops.shared.rollout import RolloutConfig, build_engine
from loops.shared.rollout.evaluate import greedy_evaluation
from loops.shared.run import RunConfig, add_sums, one_sentence_errors, reduce_sums, start_run
from losses.sft import sft_loss


@dataclass(frozen=True, kw_only=True)
class Config:
    """SFT; see the sections for the model, the data, the optimizer and the run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    loss_type: str = "nll"
    """nll, or dft (each token's nll times its own probability)."""
    eval_reward: str | None = None
    """Reward function whose mean over greedy completions of the evaluation prompts is `eval/accuracy`."""

    def __post_init__(self) -> None:
        sft_loss(torch.zeros(1, 1), torch.ones(1, 1), loss_type=self.loss_type)  # refuses what it does not know


def build_microbatches(rows, bins, config, accelerator):
    """Packed micro-batches of this process's share of the rows (numbers of bins: one example, or several that stay
    together); as many on every process."""
    cuts = cut_step(
        [sum(len(example.input_ids) for example in bins[row]) for row in rows],
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        max_rows=config.batch.per_device_train_batch_size,
        max_tokens=config.batch.max_tokens_per_batch,
    )
    return [pack_examples([e for place in cut for e in bins[rows[place]]]).to(accelerator.device) for cut in cuts]


def score_batch(policy, batch, config, packing):
    """Loss and sums of metrics of one micro-batch, for training and evaluation alike."""
    scores = score(policy, batch, packing=packing)
    loss, terms = sft_loss(scores.logprobs, batch.mask, loss_type=config.loss_type)  # [B, T], [B, T]
    terms["loss/sft"] = loss.detach()
    terms["policy/entropy"] = scores.entropy.detach().sum()
    terms["tokens/computed"] = batch.num_tokens
    terms["tokens/loss"] = len(batch.targets)
    return loss, terms


def train_step(policy, optimizer, scheduler, microbatches, denominator, config, accelerator, packing, guard):
    """One optimizer step; returns sums of metrics over this process's tokens.

    denominator: target tokens of the whole step, over all processes.
    """
    sums = {}
    for batch in microbatches:
        loss, terms = score_batch(policy, batch, config, packing)
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
    """The step's metrics from its global sums: losses and entropy are means over target tokens."""
    metrics = {name: value for name, value in total.items() if name.startswith(("time/", "optim/", "tokens/"))}
    for name in ("loss/sft", "loss/nll", "policy/entropy"):
        metrics[name] = total[name] / max(total["tokens/loss"], 1)
    return metrics


@torch.no_grad()
def evaluate(policy, engine, examples, prompts, judges, config, accelerator, packing):
    """Loss on the evaluation rows and, where a judge is given, accuracy of greedy completions."""
    began = time.perf_counter()
    policy.eval()
    sums = {}
    for batch in build_microbatches(range(len(examples)), [[e] for e in examples], config, accelerator):
        add_sums(sums, score_batch(policy, batch, config, packing)[1])
    policy.train()
    total = reduce_sums(accelerator, sums)
    settings = {"sampling": config.rollout.sampling(), "accelerator": accelerator}
    metrics = greedy_evaluation(engine, prompts, judges, policy=policy, **settings)
    metrics["eval/loss"] = total["loss/sft"] / max(total["tokens/loss"], 1)
    return metrics | {"time/eval": time.perf_counter() - began}


def main(config: Config) -> None:
    """Build everything, train, export."""
    tokenizer = build_tokenizer(config.model)
    rows, eval_rows = load_rows(config.data, seed=config.run.seed)
    examples, report = encode_rows(rows, encode_example, tokenizer, config.encode, what="training rows")
    eval_examples, _ = encode_rows(eval_rows or [], encode_example, tokenizer, config.encode, what="evaluation rows")
    judges = {"accuracy": build_judge(config.eval_reward, eval_rows)} if config.eval_reward and eval_rows else {}
    eval_prompts, _ = encode_rows(
        eval_rows if judges else [], encode_prompt, tokenizer, config.encode, what="evaluation prompts"
    )

    run = start_run(config.run, loop="sft", resolved=dump_config(config), settings=asdict(config))
    accelerator = run.accelerator
    run.say(str(report))
    policy = build_policy(
        config.model, tokenizer, seed=config.run.seed, device=accelerator.device, for_fsdp=run.sharded
    )
    run.say(parameter_line(policy))
    longest = max(len(example.input_ids) for example in examples + eval_examples)
    check_context(policy, longest, setting="max_seq_length", say=run.say)
    first = pack_check([example.input_ids for example in examples[:2]], longest)
    packing = choose_packing(policy, first, wanted=config.batch.packing, compile=config.model.compile, say=run.say)
    bins, packed = pack_rows(examples, config.batch, seed=config.run.seed)
    run.say(f"packing_strategy: {packed}")
    rows_per_step = config.batch.rows_per_step(accelerator.num_processes)
    epoch_steps = steps_per_epoch(len(bins), rows_per_step)
    total_steps = config.run.total_steps(epoch_steps)
    optimizer = build_optimizer(policy, config.optim, seed=config.run.seed, sharded=run.sharded)
    scheduler = build_schedule(optimizer, config.optim, total_steps)
    engine = build_engine(config.rollout, policy, tokenizer, autocast=accelerator.autocast) if judges else None
    policy, optimizer = run.prepare(policy, optimizer, None, engine)
    run.open(total_steps, rows=examples, packing_strategy=packed, rows_per_step=rows_per_step)
    start = run.load(policy, optimizer, scheduler)
    if start == 0 and eval_examples:
        run.log(evaluate(policy, engine, eval_examples, eval_prompts, judges, config, accelerator, packing), 0)

    for step in range(start, total_steps):
        began = time.perf_counter()
        rows = rows_of_step(step, num_rows=len(bins), rows_per_step=rows_per_step, seed=config.run.seed)
        denominator = sum(sum(example.is_target[1:]) for row in rows for example in bins[row])
        microbatches = build_microbatches(rows, bins, config, accelerator)
        run.at(step, "the update")
        sums = train_step(
            policy, optimizer, scheduler, microbatches, denominator, config, accelerator, packing, run.guard
        )
        sums["time/step"] = time.perf_counter() - began
        metrics = step_metrics(run.reduce(sums))

        done, last = step + 1, step + 1 == total_steps
        if eval_examples and run.due(done, config.run.eval_steps, last):
            metrics |= evaluate(policy, engine, eval_examples, eval_prompts, judges, config, accelerator, packing)
        run.log(metrics, done)
        if run.saves(done, last):
            run.save(policy, optimizer, scheduler, done, epoch=done // epoch_steps)
    run.finish(policy, tokenizer, merge=config.model.exports_merged)


if __name__ == "__main__":
    with one_sentence_errors("loops/sft.py") as prints:
        main(load_config(Config, prog="loops/sft.py", prints=prints))
