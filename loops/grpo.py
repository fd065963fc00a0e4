"""GRPO: policy gradient on groups of completions; the group's mean reward replaces the critic.

As differences from PPO: no value network (the advantage of a completion is its reward, less the
mean of its group, over the group's standard deviation); the ratio is clipped per token; the KL to
the reference, if any, is in the loss. DeepSeekMath, https://arxiv.org/abs/2402.03300;
`dapo` https://arxiv.org/abs/2503.14476; `dr_grpo` https://arxiv.org/abs/2503.20783.

    accelerate launch loops/grpo.py --config configs/grpo.yaml                        # a laptop
    accelerate launch --multi_gpu --num_processes 8 loops/grpo.py --config my.yaml    # many GPUs

One step: sample G completions for each of P prompts; reward them; center and scale each group's
rewards; then, per micro-batch, score the tokens, add up the clipped loss, backward; clip, step.

Legend: P prompts, G generations, T tokens, B completions (rows p*G..p*G+G-1 answer prompt p).
"""

import time
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from accelerate.utils import gather_object

from configs.loader import dump_config, load_config
from data import batches, pack
from data.chat import EncodeConfig, encode_prompt, encode_rows
from data.load import DataConfig, load_rows
from data.rewards import (
    MissingRewards,
    RewardConfig,
    build_reward_fn,
    join_results,
    reward_statistics,
)
from loops.shared import models, optim
from loops.shared.optim import OptimConfig
from loops.shared.policy import check_context, choose_packing, score
from loops.shared.rollout import RolloutConfig, build_engine
from loops.shared.rollout.ahead import Ahead, rollout_statistics, rollout_sums, sample_and_judge
from loops.shared.rollout.evaluate import reward_evaluation
from loops.shared.rollout.mismatch import check_sampler
from loops.shared.run import RunConfig, add_sums, one_sentence_errors, reduce_sums, start_run
from losses.grpo import group_advantages, grpo_loss, loss_denominator

PER_TOKEN = "entropy mismatch_kl approx_kl kl clip_low clip_high sampler_weight sampler_capped"


@dataclass(frozen=True, kw_only=True)
class Config:
    """GRPO; see the sections for the model, the data, the optimizer and the run."""

    model: models.ModelConfig = field(default_factory=models.ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    batch: batches.BatchConfig = field(default_factory=batches.BatchConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    prompts_per_step: int = 0
    """Prompts of a step over all processes; 0: the batch section's rows / num_generations."""
    loss_type: str = "dapo"
    """dapo (mean over tokens), grpo (mean of sequences' means), dr_grpo (over a fixed length)."""
    importance_sampling_level: str = "token"
    """token, or sequence (GSPO: one length-normalised ratio a completion)."""
    epsilon: float = 0.2
    """Ratios below 1 - epsilon are clipped, and above 1 + epsilon unless epsilon_high is given."""
    epsilon_high: float | None = None
    """Upper clip (clip-higher of DAPO, e.g. 0.28)."""
    beta: float = 0.0
    """Weight of the KL to the reference model; 0 builds no reference."""
    kl_estimator: str = "k3"
    """k2 or k3 (http://joschu.net/blog/kl-approx.html); k1 has no gradient, so it needs beta 0."""
    delta: float | None = None
    """Cap of the ratio where the advantage is negative (two-sided clip), above 1 + epsilon_high."""
    importance_sampling_cap: float = 2.0
    """Tokens of another engine or older weights weigh min(policy / sampler, this); 0: all 1."""
    scale_rewards: str | bool = "group"
    """Advantages are divided by the standard deviation of their group, of the whole batch, or by
    none (true and false are older spellings of group and none)."""
    num_iterations: int = 1
    """Updates on one set of rollouts; max_steps, warmup_steps and other steps count the sets."""
    mask_truncated_completions: bool = False
    """Leave completions cut at max_completion_length out of the loss, not of their group's mean."""
    eval_reward: str | None = "exact_answer"
    """Reward function whose mean over greedy completions of evaluation prompts is eval/accuracy."""

    def __post_init__(self) -> None:
        self.batch.refuse_bins()
        if self.rollout.temperature <= 0:
            raise ValueError(f"temperature is {self.rollout.temperature}; give a value above 0.")
        if self.rollout.num_generations < 2:
            raise ValueError("num_generations is below 2; a group needs at least two completions.")
        restrictions = self.rollout.restrictions
        if self.num_iterations > 1 and restrictions:
            what = f"num_iterations above 1 with {restrictions[0]}"
            raise ValueError(f"{what} would bias the importance ratios; drop one of them.")
        lowest = {"num_iterations": 1, "prompts_per_step": 0, "importance_sampling_cap": 0}
        for name, least in lowest.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}; give {least} or more.")
        if self.kl_estimator == "k1" and self.beta:
            raise ValueError(f"kl_estimator is k1 and beta {self.beta}: no gradient; use k3 or k2.")
        scale = str(self.scale_rewards).lower()
        scale = {"true": "group", "false": "none"}.get(scale, scale)  # as TRL had it
        object.__setattr__(self, "scale_rewards", scale)
        group_advantages(torch.zeros(2), 2, scale=scale)  # these refuse what they do not know
        zero = torch.zeros(1, 1)
        self.loss(zero, zero, torch.zeros(1), torch.ones(1, 1), ref_logprobs=zero, sampled=zero)

    def loss(self, logprobs, old_logprobs, advantages, mask, *, ref_logprobs, sampled):
        """`losses.grpo.grpo_loss` with this config's settings; advantages are [B], all else [B, T].

        sampled: the sampler's log-probabilities, None where the policy itself sampled.
        """
        names = "loss_type importance_sampling_level epsilon epsilon_high beta kl_estimator delta"
        settings = {name: getattr(self, name) for name in names.split()}
        settings["ref_logprobs"] = ref_logprobs
        if self.importance_sampling_cap and sampled is not None:
            settings["sampler_logprobs"] = sampled
            settings["importance_sampling_cap"] = self.importance_sampling_cap
        return grpo_loss(logprobs, old_logprobs, advantages, mask, **settings)

    def prompts(self, num_processes: int) -> int:
        """Prompts of one step over all processes; completions are rounded up to whole groups."""
        rows, generations = self.batch.rows_per_step(num_processes), self.rollout.num_generations
        return self.prompts_per_step or -(-rows // generations)


def sample_batch(step, groups, prompts, engine, reward_fn, config, accelerator):
    """Sample and reward this process's share of a step; it exchanges nothing with other processes,
    so it may run while another step trains. groups: completions sampled before a resume."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    size, seed = config.prompts(processes), config.run.seed
    judges = groups is not None or not config.rollout.async_level  # not in the thread: see `Ahead`
    rows = batches.rows_of_step(step, num_rows=len(prompts), rows_per_step=size, seed=seed)
    lengths = [len(prompts[row].prompt_ids) for row in rows]
    places = batches.share_of_rank(lengths, rank=rank, num_processes=processes)
    return sample_and_judge(
        engine,
        [prompts[rows[place]] for place in places],
        reward_fn if judges else None,
        n=config.rollout.num_generations,
        sampling=config.rollout,
        seed=seed + 1_000_003 * step,
        prompt_numbers=places,  # noise belongs to the place in the step, whichever process samples
        groups=groups,
    )


def compare_rewards(share, config, accelerator, guard):
    """(completions [B], their rewards, advantages [B], sums) of this process, from all rewards."""
    completions = [completion for group in share.groups for completion in group]  # B
    result = join_results(share.verdicts)
    totals = gather_object([result.total])  # one list a process
    everywhere = torch.tensor(sum(totals, []), dtype=torch.float64)
    guard.check(result, any_reward=not everywhere.isnan().all())
    G = config.rollout.num_generations
    advantages = group_advantages(everywhere, G, scale=config.scale_rewards).float()
    advantages = advantages.split([len(total) for total in totals])[accelerator.process_index]
    sums = result.metrics() | rollout_sums(share, result.total)
    sums["tokens/loss"] = sum(len(c.token_ids) for c in completions if in_loss(c, config))
    sums["time/rollout"], sums["time/reward"] = share.seconds
    return completions, result, advantages, sums


def in_loss(completion, config):
    """Whether a completion's tokens are trained on."""
    return not (config.mask_truncated_completions and completion.finish_reason == "length")


def build_microbatches(prompts, completions, advantages, config, accelerator):
    """Packed micro-batches (batch, advantages [B], sampler's log-probabilities [B, T]); as many on
    every process. What has no gradient is not computed: completions outside the loss and, where
    beta is 0, those without an advantage."""
    asked = [prompt for prompt in prompts for _ in range(config.rollout.num_generations)]  # B
    kept = [b for b, completion in enumerate(completions) if in_loss(completion, config)]
    kept = [b for b in kept if advantages[b] != 0 or config.beta != 0]
    cuts = batches.cut_microbatches(
        [len(completions[b].token_ids) for b in kept],
        prompts=[asked[b].prompt_ids for b in kept],
        max_rows=config.batch.per_device_train_batch_size,
        max_tokens=config.batch.max_tokens_per_batch,
    )
    microbatches = []
    for number in range(max(1, *gather_object([len(cuts)]))):  # every process runs a forward
        rows = [kept[i] for i in cuts[number]] if number < len(cuts) else []
        answers = [completions[b] for b in rows]
        batch = pack.pack_completions(
            [asked[b].prompt_ids for b in rows],
            [c.token_ids for c in answers],
            numbers=[asked[b].number for b in rows],
        ).to(accelerator.device)
        sampled = batch.to_padded([c.logprobs for c in answers])
        microbatches.append((batch, advantages[rows].to(accelerator.device), sampled))
    return microbatches


def train_step(
    policy, reference, optimizer, scheduler, microbatches, denominator, config, accelerator,
    packing, guard, *, off_policy=False,
):  # fmt: skip
    """`num_iterations` updates on one set of rollouts, all at the step's learning rate: (sums of
    metrics, log-probabilities [B, T] before). off_policy: the engine's own word."""
    sums, old, frozen = {}, {}, {}
    settings = {"temperature": config.rollout.temperature, "packing": packing}
    for iteration in range(config.num_iterations):
        for number, (batch, advantages, sampled) in enumerate(microbatches):
            if reference is not None and number not in frozen:
                with accelerator.autocast(), reference.active() as model:
                    frozen[number] = score(model, batch, **settings).logprobs
            scores = score(policy, batch, **settings)
            if iteration == 0:  # no update since sampling: this pass scores the policy that sampled
                old[number] = scores.logprobs.detach()
            more = {"ref_logprobs": frozen.get(number), "sampled": sampled if off_policy else None}
            loss, terms = config.loss(scores.logprobs, old[number], advantages, batch.mask, **more)
            # DDP and FSDP average over processes
            accelerator.backward(loss * accelerator.num_processes / denominator)
            guard.seen(loss, batch.numbers)
            gap = (old[number] - sampled)[batch.mask]
            terms["loss/policy"] = loss.detach() / denominator / config.num_iterations
            terms["policy/entropy"] = scores.entropy.detach().sum()
            terms["policy/mismatch_kl"] = (gap.expm1() - gap).sum()
            terms["policy/mismatch_max"] = gap.abs().max() if len(gap) else 0.0
            terms["tokens/scored"] = len(gap)
            terms["tokens/computed"] = batch.num_tokens
            add_sums(sums, terms)
        max_norm = config.optim.max_grad_norm
        sums["optim/grad_norm"] = optim.clip_gradients(accelerator, policy, max_norm)
        sums["optim/learning_rate"] = scheduler.get_last_lr()[0]
        if guard.may_step(scheduler.last_epoch + 1, sums["optim/grad_norm"]):
            before = optim.sample_weights(optimizer)
            optimizer.step()
            sums["optim/unchanged"] = (optim.sample_weights(optimizer) == before).double().mean()
        optimizer.zero_grad()
    scheduler.step()  # once per step: warmup_steps and max_steps count the same thing
    return sums, old


def step_metrics(total):
    """The step's metrics from its global sums: means over scored tokens, groups or completions."""
    kept = ("loss/", "time/", "optim/", "tokens/")
    kept += ("policy/",) if total["tokens/scored"] else ()  # no value is better than a wrong 0
    metrics = {name: value for name, value in total.items() if name.startswith(kept)}
    per_token = [f"policy/{name}" for name in PER_TOKEN.split() if f"policy/{name}" in metrics]
    metrics |= {name: total[name] / total["tokens/scored"] for name in per_token}
    metrics |= reward_statistics(total) | rollout_statistics(total)
    metrics["tokens/per_second"] = total["tokens/completions"] / total["time/step"]
    return metrics


def main(config: Config) -> None:
    """Build everything, train, export."""
    tokenizer = models.build_tokenizer(config.model)
    rows, eval_rows = load_rows(config.data, seed=config.run.seed)
    reward_fn = build_reward_fn(config.reward, rows)
    eval_rows, encoding = eval_rows or [], (encode_prompt, tokenizer, config.encode)
    key = "reward_functions on the evaluation rows"
    eval_rewards = {"reward": build_reward_fn(config.reward, eval_rows, key=key)}
    if config.eval_reward:
        named = RewardConfig(reward_functions=config.eval_reward)
        eval_rewards["accuracy"] = build_reward_fn(named, eval_rows, key="eval_reward")
    prompts, *reports = encode_rows(rows, *encoding, what="training prompts")
    eval_prompts, *more = encode_rows(eval_rows, *encoding, what="evaluation prompts")

    run = start_run(
        config.run, loop="grpo", resolved=dump_config(config), settings=asdict(config),
        expandable_segments=config.rollout.engine != "vllm")  # fmt: skip
    accelerator, say = run.accelerator, run.print_main
    say("\n".join(str(each) for each in reports + more if each.rows))
    seed = config.run.seed
    place = {"device": accelerator.device, "for_fsdp": run.sharded, "log": run.print_main}
    policy = models.build_policy(config.model, tokenizer, reports[0].stop_tokens, seed=seed, **place)
    longest = max(len(p.prompt_ids) for p in prompts + eval_prompts)
    longest += config.rollout.max_completion_length
    check_context(policy, longest, setting="max_completion_length or max_seq_length", say=say)
    first = pack.pack_check([prompt.prompt_ids for prompt in prompts[:2]], longest)
    wanted, compiled = config.batch.packing, config.model.compile
    packing = choose_packing(policy, first, wanted=wanted, compile=compiled, say=say)
    reference = models.build_reference(policy) if config.beta else None
    rows_per_step = config.prompts(accelerator.num_processes)
    epoch_steps = batches.steps_per_epoch(len(prompts), rows_per_step)
    total_steps = config.run.total_steps(epoch_steps)
    optimizer = optim.build_optimizer(policy, config.optim, seed=seed, sharded=run.sharded)
    scheduler = optim.build_schedule(optimizer, config.optim, total_steps)
    serving = {"autocast": accelerator.autocast, "api_key": run.server_key}
    engine = build_engine(config.rollout, policy, tokenizer, **serving)
    run.on_end(engine.close)
    policy, optimizer = run.prepare(policy, optimizer, reference)
    run.create_folder(total_steps, rows=prompts, rows_per_step=rows_per_step)
    start = run.resume(policy, optimizer, scheduler)
    engine.sync(policy)
    settings = {"sampling": config.rollout, "accelerator": accelerator}
    if start == 0 and eval_prompts:
        run.log(reward_evaluation(engine, eval_prompts, eval_rewards, **settings), 0)

    given = {"config": config, "accelerator": accelerator}
    sample = partial(sample_batch, prompts=prompts, engine=engine, reward_fn=reward_fn, **given)
    level, guard = config.rollout.async_level, MissingRewards()
    ahead = Ahead(sample, engine, level=level, last=total_steps - 1, record=run.extra())
    try:
        for step in range(start, total_steps):
            began = time.perf_counter()
            run.set_phase(step, "the rollout")
            share = ahead.take(step)
            engine.sleep()
            run.set_phase(step, "the rewards")
            judged = compare_rewards(share, config, accelerator, guard)
            asked, (completions, result, advantages, sums) = share.prompts, judged
            microbatches = build_microbatches(asked, completions, advantages, config, accelerator)
            counts = reduce_sums(accelerator, sums)
            denominator = loss_denominator(
                config.loss_type,
                num_tokens=counts["tokens/loss"],
                num_sequences=counts["rollout/completions"],
                max_completion_length=config.rollout.max_completion_length,
            )
            run.set_phase(step, "the update")
            updating = time.perf_counter()
            sums, old = train_step(
                policy, reference, optimizer, scheduler, microbatches, denominator, config,
                accelerator, packing, run.guard, off_policy=engine.is_off_policy,
            )  # fmt: skip
            sums["time/update"] = time.perf_counter() - updating
            sums["time/sync"] = engine.sync(policy).seconds
            sums["time/step"] = time.perf_counter() - began
            metrics = step_metrics(counts | run.reduce(sums))

            done = step + 1
            if eval_prompts and run.eval_due(done):
                metrics |= reward_evaluation(engine, eval_prompts, eval_rewards, **settings)
            run.log(metrics, done)
            run.show_completions(asked, completions, result, advantages.tolist(), done)
            if config.rollout.check_due(step, first=step == start):  # after its numbers are logged
                check_sampler(microbatches, old, policy, accelerator, config.rollout.max_mismatch)
            if run.save_due(done):
                epoch, extra = done // epoch_steps, ahead.record()
                run.save(policy, optimizer, scheduler, done, epoch=epoch, extra=extra)
    except BaseException:
        engine.close()  # ends the rollout under way, which would be waited for
        raise
    finally:
        ahead.close()
    run.export(policy, tokenizer, config.model)


if __name__ == "__main__":
    with one_sentence_errors("loops/grpo.py") as prints:
        main(load_config(Config, prog="loops/grpo.py", prints=prints))
