"""SFT: maximum likelihood of the target tokens, token by token.

loss = - sum over the step's target tokens of log p(token | what stands before it) / their number.

    accelerate launch loops/sft.py --config configs/sft.yaml                         # a laptop
    accelerate launch --multi_gpu --num_processes 8 loops/sft.py --config my.yaml    # many GPUs

One step: take the step's rows; pack each process's share into flat micro-batches; count the target
tokens once; then, per micro-batch, score the targets, add up the loss, backward; clip, step.

Legend: B sequences, T tokens.
"""

import time
from dataclasses import asdict, dataclass, field

import torch

from configs.loader import dump_config, load_config
from data import batches, pack
from data.chat import EncodeConfig, encode_example, encode_prompt, encode_rows
from data.load import DataConfig, load_rows
from data.rewards import RewardConfig, build_reward_fn
from loops.shared import models, optim, rollout
from loops.shared.metrics import Metrics
from loops.shared.optim import OptimConfig
from loops.shared.policy import check_policy, choose_packing, score
from loops.shared.rollout import RolloutConfig
from loops.shared.run import RunConfig, one_sentence_errors, start_run
from losses.sft import sft_loss


@dataclass(frozen=True, kw_only=True)
class Config:
    """SFT; see the sections for the model, the data, the optimizer and the run."""

    model: models.ModelConfig = field(default_factory=models.ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    batch: batches.BatchConfig = field(default_factory=batches.BatchConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    loss_type: str = "nll"
    """nll, or dft (each token's nll times its own probability)."""
    eval_reward: str | None = None
    """Reward function whose mean over greedy completions of evaluation prompts is eval/accuracy."""

    def __post_init__(self) -> None:
        sft_loss(torch.zeros(1, 1), torch.ones(1, 1), loss_type=self.loss_type)  # or ValueError


def build_microbatches(rows, bins, config, accelerator):
    """Packed micro-batches of this process's share of the rows (numbers of bins: one example, or
    several that stay together); as many on every process."""
    cuts = batches.cut_step(
        [sum(len(example.input_ids) for example in bins[row]) for row in rows],
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        max_rows=config.batch.per_device_train_batch_size,
        max_tokens=config.batch.max_tokens_per_batch,
    )
    microbatches = [[e for place in cut for e in bins[rows[place]]] for cut in cuts]
    return [pack.pack_examples(examples).to(accelerator.device) for examples in microbatches]


@torch.no_grad()
def evaluation_loss(policy, examples, config, accelerator):
    """`eval/loss`: the loss per target token of the evaluation rows."""
    policy.eval()
    metrics, bins = Metrics(), [[example] for example in examples]
    for batch in build_microbatches(range(len(bins)), bins, config, accelerator):
        logprobs, _ = score(policy, batch)  # [B, T]
        loss, _ = sft_loss(logprobs, batch.mask, loss_type=config.loss_type)
        metrics.mean("eval/loss", loss, len(batch.targets))
    policy.train()
    return metrics.reduce(accelerator)


def main(config: Config) -> None:
    """Build everything; per step: batches, update, record; at the end export."""
    tokenizer = models.build_tokenizer(config.model)
    rows, eval_rows = load_rows(config.data, seed=config.run.seed)
    eval_rows, encoding = eval_rows or [], (tokenizer, config.encode)
    examples, *reports = encode_rows(rows, encode_example, *encoding, what="training rows")
    what = "evaluation rows"
    eval_examples, report = encode_rows(eval_rows, encode_example, *encoding, what=what)
    reports.append(report)
    eval_rewards, eval_prompts = {}, []
    if config.eval_reward and eval_rows:
        named = RewardConfig(reward_functions=config.eval_reward)
        eval_rewards["accuracy"] = build_reward_fn(named, eval_rows, key="eval_reward")
        what = "evaluation prompts"
        eval_prompts, report = encode_rows(eval_rows, encode_prompt, *encoding, what=what)
        reports.append(report)

    run = start_run(
        config.run, loop="sft", resolved=dump_config(config), settings=asdict(config),
        expandable_segments=not config.rollout.vllm_in_process or not config.eval_reward,
    )  # fmt: skip
    accelerator = run.accelerator
    run.print_main("\n".join(str(each) for each in reports if each.rows))
    seed = config.run.seed
    place = {"device": accelerator.device, "for_fsdp": run.sharded, "log": run.print_main}
    stops = reports[0].stop_tokens
    policy = models.build_policy(config.model, tokenizer, stops, seed=seed, **place)
    longest = max(len(example.input_ids) for example in examples + eval_examples)
    choose_packing(
        policy, packing=config.batch.packing, compile=config.model.compile,
        print_main=run.print_main,
    )  # fmt: skip
    bins, packed = batches.build_bins(examples, config.batch, seed=seed)
    run.print_main(f"packing_strategy: {packed}")
    rows_per_step = config.batch.rows_per_step(accelerator.num_processes)
    epoch_steps = batches.steps_per_epoch(len(bins), rows_per_step)
    total_steps = config.run.total_steps(epoch_steps)
    optimizer = optim.build_optimizer(policy, config.optim, seed=seed, sharded=run.sharded)
    scheduler = optim.build_schedule(optimizer, config.optim, total_steps)
    engine = None
    if eval_rewards:
        serving = {"autocast": accelerator.autocast, "api_key": run.server_key}
        engine = rollout.build_engine(config.rollout, policy, tokenizer, **serving)
        run.on_end(engine.close)
    policy, optimizer = run.prepare(policy, optimizer)
    first_rows = pack.pack_check([example.input_ids for example in examples[:2]], longest)
    check_policy(
        policy, first_rows, accelerator, longest=longest, print_main=run.print_main,
        setting="max_seq_length",
    )  # fmt: skip
    sizes = {"packing_strategy": packed, "rows_per_step": rows_per_step}
    run.create_folder(total_steps, rows=examples, **sizes)
    start = run.resume(policy, optimizer, scheduler)

    def evaluate() -> dict[str, float]:
        began = time.perf_counter()
        metrics = rollout.greedy_evaluation(
            engine, eval_prompts, eval_rewards, sampling=config.rollout, accelerator=accelerator,
            policy=policy,
        )  # fmt: skip
        metrics |= evaluation_loss(policy, eval_examples, config, accelerator)
        return metrics | {"time/eval": time.perf_counter() - began}

    if start == 0 and eval_examples:
        run.log(evaluate(), 0)

    for step in range(start, total_steps):
        began, metrics = time.perf_counter(), Metrics()
        run.set_phase(step, "the update")
        chosen = batches.rows_of_step(
            step, num_rows=len(bins), rows_per_step=rows_per_step, seed=seed
        )
        microbatches = build_microbatches(chosen, bins, config, accelerator)
        # one denominator for all micro-batches of all processes, counted before the first backward:
        # so the step cannot depend on how its rows are cut and shared out
        num_tokens = sum(example.num_targets for row in chosen for example in bins[row])

        # update
        for batch in microbatches:
            # until the last backward gradients only add up; then DDP exchanges them
            with optim.accumulate(accelerator, policy, last=batch is microbatches[-1]):
                logprobs, entropy = score(policy, batch)  # [B, T], [B, T]
                loss, terms = sft_loss(logprobs, batch.mask, loss_type=config.loss_type)
                # the loss is a sum over tokens; DDP and FSDP average gradients over processes
                accelerator.backward(loss * accelerator.num_processes / num_tokens)
            run.guard.seen(loss, batch.numbers)
            targets = len(batch.targets)
            metrics.means(terms, targets)
            metrics.mean("loss/sft", loss.detach(), targets)
            metrics.mean("policy/entropy", entropy.detach_().sum(), targets)  # frees its graph
            metrics.sum("tokens/loss", targets)
            metrics.sum("tokens/computed", batch.num_tokens)  # with those that are no targets
            del logprobs, loss  # their graph would live through the next forward
        grad_norm = optim.clip_gradients(accelerator, policy, config.optim.max_grad_norm)
        if run.guard.may_step(step + 1, grad_norm):  # NaN or inf: the run ends, or skips the update
            metrics.set("optim/unchanged", optim.take_step(optimizer))
        metrics.set("optim/grad_norm", grad_norm)  # before clipping
        metrics.set("optim/learning_rate", scheduler.get_last_lr()[0])
        scheduler.step()
        optimizer.zero_grad()

        # record
        metrics.set("time/step", time.perf_counter() - began)
        done, numbers = step + 1, run.reduce(metrics)
        if eval_examples and run.eval_due(done):
            numbers |= evaluate()
        run.log(numbers, done)
        if run.save_due(done):
            run.save(policy, optimizer, scheduler, done, epoch=done // epoch_steps)
    run.export(policy, tokenizer, config.model)


if __name__ == "__main__":
    with one_sentence_errors("loops/sft.py") as prints:
        main(load_config(Config, prog="loops/sft.py", prints=prints))
