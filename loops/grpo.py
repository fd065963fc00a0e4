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

import torch
from accelerate.utils import gather_object

from configs.loader import dump_config, load_config
from data import batches, chat, pack
from data.load import DataConfig, load_rows
from data.rewards import MissingRewards, RewardConfig, build_reward_fn
from loops.shared import models, optim, rollout
from loops.shared.metrics import Metrics
from loops.shared.optim import OptimConfig
from loops.shared.policy import check_policy, choose_packing, score
from loops.shared.reference import build_reference
from loops.shared.rollout import RolloutConfig
from loops.shared.run import RunConfig, one_sentence_errors, start_run
from losses.grpo import check_options, group_advantages, grpo_loss, loss_denominator


@dataclass(frozen=True, kw_only=True)
class Config:
    """GRPO; see the sections for the model, the data, the optimizer and the run."""

    model: models.ModelConfig = field(default_factory=models.ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encode: chat.EncodeConfig = field(default_factory=chat.EncodeConfig)
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
    ref_update: str = "none"
    """none: the reference stays the start policy; ema: every ref_model_sync_steps steps it moves
    towards the policy by ref_model_mixup_alpha; sync: it becomes the policy then. Needs
    beta above 0."""
    ref_model_mixup_alpha: float = 0.6
    """Weight of the policy in the reference's new weights (ema); the rest is its own old ones."""
    ref_model_sync_steps: int = 512
    """Steps between two updates of the reference (ema and sync)."""
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
        if self.ref_update not in ("none", "ema", "sync"):
            raise ValueError(f"ref_update is {self.ref_update!r}; give none, ema or sync.")
        if self.ref_update != "none" and not self.beta:
            raise ValueError(
                f"ref_update is {self.ref_update} and beta 0, which builds no reference; set beta "
                "above 0, or ref_update: none."
            )
        scale = str(self.scale_rewards).lower()
        scale = {"true": "group", "false": "none"}.get(scale, scale)  # older names, as in TRL
        object.__setattr__(self, "scale_rewards", scale)
        group_advantages(torch.zeros(2), 2, scale=scale)  # raises for an unknown name
        check_options(
            self.loss_type, self.importance_sampling_level, self.kl_estimator, self.epsilon,
            self.epsilon_high, self.beta, self.delta,
        )  # fmt: skip

    def prompts(self, num_processes: int) -> int:
        """Prompts of one step over all processes; completions are rounded up to whole groups."""
        rows, generations = self.batch.rows_per_step(num_processes), self.rollout.num_generations
        return self.prompts_per_step or -(-rows // generations)


def in_loss(r, config):
    """Whether the tokens of rollout r are trained on; its reward always counts in its group."""
    return not (config.mask_truncated_completions and r.completion.finish_reason == "length")


def build_microbatches(rollouts, advantages, config, accelerator):
    """Packed micro-batches of this process's rollouts; as many on every process.

    What has no gradient is not computed: completions outside the loss and, where beta is 0, those
    without an advantage. advantages: [B].
    """
    kept = [b for b, r in enumerate(rollouts) if in_loss(r, config)]
    kept = [b for b in kept if advantages[b] != 0 or config.beta != 0]
    cuts = batches.cut_microbatches(
        [len(rollouts[b].completion.token_ids) for b in kept],
        prompts=[rollouts[b].prompt.prompt_ids for b in kept],
        max_rows=config.batch.per_device_train_batch_size,
        max_tokens=config.batch.max_tokens_per_batch,
    )
    # every process runs the same number of forwards: where it has fewer batches, empty ones
    counts = accelerator.gather(torch.tensor([max(1, len(cuts))], device=accelerator.device))
    microbatches = []
    for number in range(int(counts.max())):
        rows = [kept[i] for i in cuts[number]] if number < len(cuts) else []
        own = [rollouts[b] for b in rows]
        batch = pack.pack_completions(
            [r.prompt.prompt_ids for r in own],  # one object per group: packed once
            [r.completion.token_ids for r in own],
            is_target=[r.sampled for r in own],
            numbers=[r.prompt.number for r in own],
        ).to(accelerator.device)
        sampler_logprobs = batch.to_padded([r.completion.logprobs for r in own])  # [B, T]
        own_advantages = advantages[rows].to(accelerator.device)  # [B]
        microbatches.append(rollout.Microbatch(batch, own_advantages, sampler_logprobs))
    return microbatches


def main(config: Config) -> None:
    """Build everything; per step: rollouts, rewards, update, record; at the end export."""
    tokenizer = models.build_tokenizer(config.model)
    rows, eval_rows = load_rows(config.data, seed=config.run.seed)
    reward_fn = build_reward_fn(config.reward, rows)
    eval_rows = eval_rows or []
    key = "reward_functions on the evaluation rows"
    eval_rewards = {"reward": build_reward_fn(config.reward, eval_rows, key=key)}
    if config.eval_reward:
        named = RewardConfig(reward_functions=config.eval_reward)
        eval_rewards["accuracy"] = build_reward_fn(named, eval_rows, key="eval_reward")
    encoding = (chat.encode_prompt, tokenizer, config.encode)
    prompts, *reports = chat.encode_rows(rows, *encoding, what="training prompts")
    eval_prompts, *more = chat.encode_rows(eval_rows, *encoding, what="evaluation prompts")

    run = start_run(
        config.run, loop="grpo", resolved=dump_config(config), settings=asdict(config),
        expandable_segments=not config.rollout.vllm_in_process)  # fmt: skip
    accelerator, say = run.accelerator, run.print_main
    say("\n".join(str(each) for each in reports + more if each.rows))
    seed = config.run.seed
    place = {"device": accelerator.device, "for_fsdp": run.sharded, "log": run.print_main}
    stops = reports[0].stop_tokens
    policy = models.build_policy(config.model, tokenizer, stops, seed=seed, **place)
    longest = max(len(p.prompt_ids) for p in prompts + eval_prompts)
    longest += config.rollout.max_completion_length
    choose_packing(
        policy, packing=config.batch.packing, compile=config.model.compile,
        print_main=say,
    )  # fmt: skip
    reference = None
    if config.beta:
        reference = build_reference(
            policy, accelerator.autocast, ref_update=config.ref_update,
            mixup_alpha=config.ref_model_mixup_alpha, sync_steps=config.ref_model_sync_steps,
        )  # fmt: skip
    rows_per_step = config.prompts(accelerator.num_processes)
    epoch_steps = batches.steps_per_epoch(len(prompts), rows_per_step)
    total_steps = config.run.total_steps(epoch_steps)
    optimizer = optim.build_optimizer(policy, config.optim, seed=seed, sharded=run.sharded)
    scheduler = optim.build_schedule(optimizer, config.optim, total_steps)
    serving = {"autocast": accelerator.autocast, "api_key": run.server_key}
    engine = rollout.build_engine(config.rollout, policy, tokenizer, **serving)
    run.on_end(engine.close)
    policy, optimizer = run.prepare(policy, optimizer, reference)
    first_rows = pack.pack_check([prompt.prompt_ids for prompt in prompts[:2]], longest)
    check_policy(
        policy, first_rows, accelerator, longest=longest, print_main=say, reference=reference,
        setting="max_completion_length or max_seq_length",
    )  # fmt: skip
    run.create_folder(total_steps, rows=prompts, rows_per_step=rows_per_step)
    start = run.resume(policy, optimizer, scheduler)
    engine.sync(policy)
    G, depth = config.rollout.num_generations, config.rollout.async_level
    temperature, cap = config.rollout.temperature, config.importance_sampling_cap
    off_policy = engine.is_off_policy and cap > 0  # sampled by other kernels or older weights

    def prompts_of(step: int) -> tuple[list[int], list[chat.Prompt]]:
        """This process's prompts of a step: their places in it, and the prompts."""
        chosen = batches.rows_of_step(
            step, num_rows=len(prompts), rows_per_step=rows_per_step, seed=seed
        )
        places = batches.share_of_rank(
            [len(prompts[row].prompt_ids) for row in chosen],
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        return places, [prompts[chosen[place]] for place in places]

    def sample(step: int) -> list[rollout.Rollout]:
        """This process's rollouts of a step; no exchange with others, so it may run in a thread."""
        places, asked = prompts_of(step)
        early = None if depth else reward_fn  # rewards run in the main thread
        return rollout.sample_rollouts(
            engine, asked, early, n=G, sampling=config.rollout, seed=seed + 1_000_003 * step,
            prompt_numbers=places,  # noise belongs to the place in the step, not to the process
        )  # fmt: skip

    def evaluate() -> dict[str, float]:
        return rollout.reward_evaluation(
            engine, eval_prompts, eval_rewards, sampling=config.rollout, accelerator=accelerator
        )

    if start == 0 and eval_prompts:
        run.log(evaluate(), 0)
    ready = rollout.load_rollouts(run.extra(), lambda step: prompts_of(step)[1], engine)
    coming = rollout.prefetch(sample, range(start, total_steps), engine, depth=depth, ready=ready)
    missing = MissingRewards()
    for step in range(start, total_steps):
        began, metrics = time.perf_counter(), Metrics()
        run.set_phase(step, "the rollout")
        rollouts = next(coming)  # B of this process, group by group
        engine.sleep()

        # rewards; exchanged, so that scale_rewards: batch means the batch of all processes
        run.set_phase(step, "the rewards")
        rewarding = time.perf_counter()
        rollout.compute_rewards(rollouts, reward_fn)
        metrics.set("time/reward", time.perf_counter() - rewarding)
        rollout.add_rollout_metrics(metrics, rollouts, G)
        num_tokens = sum(sum(r.sampled) for r in rollouts if in_loss(r, config))
        metrics.sum("tokens/loss", num_tokens)
        failure = next((r.failure for r in rollouts if r.failure), None)
        own = ([r.reward for r in rollouts], num_tokens, failure)
        totals, counts, failures = zip(*gather_object([own]), strict=True)  # one per process
        rewards = torch.tensor(sum(totals, []), dtype=torch.float64)  # [B of the step]
        missing.check(rewards.tolist(), next(filter(None, failures), None))

        # advantages: (reward - mean of its group) / (standard deviation of its group + 1e-4)
        advantages = group_advantages(rewards, G, scale=config.scale_rewards).float()
        sizes = [len(total) for total in totals]
        own_advantages = advantages.split(sizes)[accelerator.process_index]  # [B]
        microbatches = build_microbatches(rollouts, own_advantages, config, accelerator)
        # one denominator for all micro-batches of all processes, before the first backward
        denominator = loss_denominator(
            config.loss_type,
            num_tokens=sum(counts),
            num_sequences=len(rewards),
            max_completion_length=config.rollout.max_completion_length,
        )

        # update
        run.set_phase(step, "the update")
        updating = time.perf_counter()
        for _ in range(config.num_iterations):
            for mb in microbatches:
                # until the last backward gradients only add up; then DDP exchanges them
                with optim.accumulate(accelerator, policy, last=mb is microbatches[-1]):
                    if reference is not None and mb.ref_logprobs is None:
                        mb.ref_logprobs = reference.logprobs(mb.batch, temperature)  # [B, T]
                    logprobs, entropy = score(policy, mb.batch, temperature)  # [B, T], [B, T]
                    if mb.old_logprobs is None:  # nothing was updated since sampling
                        mb.old_logprobs = logprobs.detach()
                    loss, terms = grpo_loss(  # eq. 3 of the paper; a sum over tokens
                        logprobs, mb.old_logprobs, mb.advantages, mb.batch.mask,
                        ref_logprobs=mb.ref_logprobs, beta=config.beta,
                        kl_estimator=config.kl_estimator, loss_type=config.loss_type,
                        importance_sampling_level=config.importance_sampling_level,
                        epsilon=config.epsilon, epsilon_high=config.epsilon_high,
                        delta=config.delta, importance_sampling_cap=cap or 1.0,
                        sampler_logprobs=mb.sampler_logprobs if off_policy else None,
                    )  # fmt: skip
                    # DDP and FSDP average gradients over processes
                    accelerator.backward(loss * accelerator.num_processes / denominator)
                run.guard.seen(loss, mb.batch.numbers)
                metrics.sum("loss/policy", loss.detach() / denominator / config.num_iterations)
                rollout.add_update_metrics(metrics, mb, terms, entropy)
                del logprobs, loss  # their graph would live through the next forward
            grad_norm = optim.clip_gradients(accelerator, policy, config.optim.max_grad_norm)
            if run.guard.may_step(step + 1, grad_norm):  # NaN or inf: the run ends, or skips it
                metrics.set("optim/unchanged", optim.take_step(optimizer))
            optimizer.zero_grad()
        metrics.set("optim/grad_norm", grad_norm)  # before clipping
        metrics.set("optim/learning_rate", scheduler.get_last_lr()[0])
        scheduler.step()  # once per step: warmup_steps and max_steps count the same thing
        if reference is not None:
            reference.update(policy, step + 1)  # nothing with ref_update: none
        metrics.set("time/update", time.perf_counter() - updating)
        metrics.set("time/sync", engine.sync(policy).seconds)

        # record
        metrics.set("time/step", time.perf_counter() - began)
        done, numbers = step + 1, run.reduce(metrics)
        numbers["tokens/per_second"] = numbers["tokens/completions"] / numbers["time/step"]
        if eval_prompts and run.eval_due(done):
            numbers |= evaluate()
        run.log(numbers, done)
        run.show_completions(rollouts, own_advantages.tolist(), done)
        if config.rollout.check_due(step, first=step == start):  # after its numbers are logged
            rollout.check_sampler(microbatches, policy, accelerator, config.rollout.max_mismatch)
        if run.save_due(done):
            waiting = rollout.rollouts_to_save(ready, engine)
            run.save(policy, optimizer, scheduler, done, epoch=done // epoch_steps, extra=waiting)
    run.export(policy, tokenizer, config.model)


if __name__ == "__main__":
    with one_sentence_errors("loops/grpo.py") as prints:
        main(load_config(Config, prog="loops/grpo.py", prints=prints))
