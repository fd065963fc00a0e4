"""Reward functions with one signature, and the code that runs several of them.

A reward function takes keyword arguments and returns one value per completion:

    def my_reward(*, prompts, completions, completion_ids, **columns) -> list[float | None]

`prompts` and `completions` are texts, `completion_ids` token ids, and every column of the rows comes as a list under
its name; a function's parameters name those that it needs. None means that the reward does not apply to that row. In
training a call gets all completions of one or more prompts, in the main thread.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import math
import os
import re
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.answers import exact_answer
from data.load import import_function

RewardFunction = Callable[..., list[float | None]]
GIVEN = ("prompts", "completions", "completion_ids")  # what a reward gets besides the rows' columns

DEFAULT_TARGET_LENGTH = 128  # tokens
MISSING_STEPS = 10  # as many as skipped optimizer steps in `on_non_finite: skip`


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Which rewards, weighted how."""

    reward_functions: str | list[str] = "exact_answer"
    """Names (exact_answer, rouge_l_precision, length, format) or your own `module:function`; list or comma list."""
    reward_weights: list[float] = field(default_factory=list)
    """One weight per function; empty means 1 each."""

    def __post_init__(self) -> None:
        count = len(self.names)
        if count == 0:
            raise ValueError("reward_functions is empty; name at least one.")
        if len(set(self.names)) < count:
            raise ValueError(f"reward_functions names a function twice: {', '.join(self.names)}.")
        if self.reward_weights and len(self.reward_weights) != count:
            raise ValueError(
                f"reward_weights has {len(self.reward_weights)} values for {count} reward_functions; give one each."
            )
        if self.reward_weights and not (all(map(math.isfinite, self.reward_weights)) and any(self.reward_weights)):
            raise ValueError(f"reward_weights is {self.reward_weights}; give finite numbers that are not all 0.")

    @property
    def names(self) -> list[str]:
        """The functions' names as a list."""
        given = self.reward_functions
        return [part.strip() for part in given.split(",") if part.strip()] if isinstance(given, str) else list(given)


@dataclass(frozen=True)
class RewardResult:
    """The rewards of one batch; rows in the order of the completions."""

    total: list[float]
    """Weighted sum over the functions that apply to the row. NaN where a function failed or none applies: a
    failure is never a reward of zero."""
    by_name: dict[str, list[float | None]]
    """Each function's values, unweighted; None where it does not apply or failed."""
    failed: dict[str, list[int]]
    """Rows for which each function raised or returned no finite number."""
    failure: str | None
    """The first failure's traceback (or sentence), None where nothing failed."""


class MissingRewards:
    """Warns about rewards that failed, and ends a run that gets no rewards: in its first step, or in `MISSING_STEPS`
    steps in a row."""

    def __init__(self) -> None:
        self._steps = 0
        self._rewarded = False

    def check(self, rewards: Sequence[float], failure: str | None) -> None:
        """Call once per step, with the rewards of all processes (NaN: missing) and the first failure among them."""
        any_reward = not all(math.isnan(reward) for reward in rewards)
        self._steps = 0 if any_reward else self._steps + 1
        self._rewarded |= any_reward
        if self._steps == MISSING_STEPS or (self._steps and not self._rewarded):
            since = f" in each of the last {self._steps} steps" if self._steps > 1 else ""
            reason = f"the first failure was:\n{failure}" if failure else "no reward function applies to any row"
            raise RuntimeError(f"all {len(rewards)} rewards are missing{since}; {reason}")
        if failure:
            warnings.warn(f"a reward failed; its rows count as missing:\n{failure}", stacklevel=1)


@dataclass(frozen=True)
class RewardFn:
    """What the loops call: `reward_fn(prompts, completions)` runs every function and returns a `RewardResult`."""

    functions: dict[str, RewardFunction] = field(default_factory=dict)
    """By the name they are logged under."""
    weights: list[float] = field(default_factory=list)
    """One per function, in the same order."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> RewardResult:
        """One prompt (`data.chat.Prompt`) and one completion (with `text` and `token_ids`) per row."""
        return compute_rewards(
            self.functions,
            self.weights,
            prompts=[prompt.text for prompt in prompts],
            completions=[completion.text for completion in completions],
            completion_ids=[completion.token_ids for completion in completions],
            columns=[prompt.columns for prompt in prompts],
        )


def build_reward_fn(
    config: RewardConfig, rows: Sequence[dict[str, Any]] = (), *, key: str = "reward_functions"
) -> RewardFn:
    """The config's functions, imported and checked against the columns of `rows` (no check without rows).

    key: the setting that names the functions, for messages. Raises ValueError: an unknown name, a `module:function`
    that cannot be imported, a missing package, an async function, or an argument that is no column of the rows.
    """
    functions: dict[str, RewardFunction] = {}
    for name in config.names:
        if ":" in name:
            function = import_function(name, key=key)
            short = name.partition(":")[2]
            functions[name if short in functions or short in BUILT_IN else short] = function
            continue
        if name not in BUILT_IN:
            raise ValueError(f"{key} names {name}; known are {', '.join(BUILT_IN)} and module:function.")
        if name == "rouge_l_precision" and importlib.util.find_spec("rouge_score") is None:
            raise ValueError(f"{key} names rouge_l_precision, which needs `pip install rouge-score`.")
        functions[name] = BUILT_IN[name]
    for name, function in functions.items():
        _check_function(name, function, rows, key)
    return RewardFn(functions, list(config.reward_weights) or [1.0] * len(functions))


def compute_rewards(
    functions: dict[str, RewardFunction],
    weights: list[float],
    *,
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]],
    columns: list[dict[str, Any]],
) -> RewardResult:
    """Run every function over the whole batch; all four lists have one entry per completion.

    A function that raises or exits, or returns the wrong number of values, fails for all its rows; a value that is no
    finite number fails for its row. Failures stop nothing: they are counted, and the first is kept. Without completions
    no function is called.
    """
    size = len(completions)
    assert len(prompts) == len(completion_ids) == len(columns) == size, "one entry per completion"
    assert len(weights) == len(functions), "one weight per function"
    names = dict.fromkeys(name for row in columns for name in row)
    available: dict[str, Any] = {name: [row.get(name) for row in columns] for name in names}
    available.update(prompts=prompts, completions=completions, completion_ids=completion_ids)

    process = os.getpid()
    total = [math.nan] * size
    broken = [False] * size
    by_name: dict[str, list[float | None]] = {}
    failed: dict[str, list[int]] = {}
    failure: str | None = None
    for (name, function), weight in zip(functions.items(), weights, strict=True):
        values: list[float | None] = [None] * size
        failed_rows = list(range(size))
        try:
            returned = function(**_accepted(name, function, available)) if size else []
            if isinstance(returned, (set, frozenset, Mapping)):
                raise TypeError(f"reward {name} returned a {type(returned).__name__}; return a list in their order")
            if len(returned := list(returned)) != size:
                raise ValueError(f"reward {name} returned {len(returned)} values for {size} completions")
        except BaseException as error:  # a user's code may raise anything, SystemExit too; it is never a reward
            if isinstance(error, KeyboardInterrupt) or os.getpid() != process:  # a child that it forked is to end
                raise
            failure = failure or traceback.format_exc()
            if isinstance(error, TypeError) and "indices must be" in str(error):
                failure += "(prompts and completions are texts here, not lists of messages)\n"
        else:
            failed_rows = []
            for row, value in enumerate(returned):
                try:
                    values[row] = _as_reward(value)
                except Exception as error:  # float() calls the value's __float__
                    failed_rows.append(row)
                    failure = failure or f"reward {name} returned {value!r:.80} for completion {row} of {size}: {error}"
        for row in failed_rows:
            broken[row] = True
        for row, value in enumerate(values):
            if value is not None:
                total[row] = weight * value + (0.0 if math.isnan(total[row]) else total[row])
        by_name[name] = values
        failed[name] = failed_rows
    total = [math.nan if row_broken else value for row_broken, value in zip(broken, total, strict=True)]
    return RewardResult(total, by_name, failed, failure)


def _check_function(name: str, function: RewardFunction, rows: Sequence[dict[str, Any]], key: str) -> None:
    """Raise ValueError where the signature cannot be called with the rows' columns."""
    for one in (function, type(function).__call__):
        if inspect.iscoroutinefunction(one) or inspect.isasyncgenfunction(one):
            raise ValueError(f"{key} names {name}, which is async: call asyncio.run inside a plain function instead.")
    for parameter in _needed(function):
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise ValueError(f"{key} names {name}, which takes {parameter.name} by position: take it by its name.")
        if parameter.name not in GIVEN and rows and not any(parameter.name in row for row in rows):
            columns = ", ".join(dict.fromkeys(column for row in rows for column in row))
            way_out = "name it in field_mapping" + (", or set eval_reward: null" if key == "eval_reward" else "")
            if parameter.name in ("trainer_state", "log_metric", "log_extra"):
                way_out = "rewards get nothing of the trainer, so drop the argument or give it a default"
            raise ValueError(f"{key}: {name} needs the column {parameter.name} and the rows have {columns}; {way_out}.")


def _needed(function: RewardFunction) -> list[inspect.Parameter]:
    """The parameters that a function cannot be called without."""
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(function).parameters.values()
    return [one for one in parameters if one.default is inspect.Parameter.empty and one.kind not in variable]


def _accepted(name: str, function: RewardFunction, available: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function takes (all of them where it has `**kwargs`), as copies: it may change them."""
    for parameter in _needed(function):
        if parameter.name not in available:
            columns = ", ".join(column for column in available if column not in GIVEN)
            raise ValueError(f"reward {name} needs the column {parameter.name} and the rows have {columns}")
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    names = available if takes_all else [one.name for one in parameters if one.name in available]
    return {name: copy.deepcopy(available[name]) for name in names}


def _as_reward(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str):
        raise TypeError("a text is no number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("it is not finite")
    return number


# Built-in rewards


def rouge_l_precision(
    *,
    completions: list[str],
    reference: list[Any] | None = None,
    completion: list[Any] | None = None,
    answer: list[Any] | None = None,
) -> list[float | None]:
    """Longest common subsequence of words with the reference, over the words of the completion: in [0, 1].

    The reference is the first of the columns `reference`, `completion`, `answer` that a row fills (text, or messages
    whose last one counts); a row without any gives None, an empty completion 0. Words are the runs of a-z and 0-9 in
    lower case, as in the rouge-score package, so other scripts score 0. Lin 2004, ROUGE-L, equation 3.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rewards: list[float | None] = []
    for row, text in enumerate(completions):
        filled = [column[row] for column in (reference, completion, answer) if column and column[row] is not None]
        if not filled:
            rewards.append(None)
            continue
        target = filled[0] if isinstance(filled[0], str) else filled[0][-1]["content"]
        rewards.append(scorer.score(target, text)["rougeL"].precision)
    return rewards


def length(*, completion_ids: list[list[int]], target_length: list[Any] | None = None) -> list[float | None]:
    """`max(0, 1 - |tokens - target| / target)`: 1 at the target, 0 at nothing and from twice the target on.

    The target comes from the column `target_length` (tokens), 128 where the rows have none; the stop token counts.
    """
    targets = target_length or [None] * len(completion_ids)
    rewards: list[float | None] = []
    for ids, target in zip(completion_ids, targets, strict=True):
        target = DEFAULT_TARGET_LENGTH if target is None else target
        rewards.append(max(0.0, 1.0 - abs(len(ids) - target) / target))
    return rewards


_TEXT_WITHOUT_TAGS = r"(?:(?!</?think>|</?answer>).)*"
_THINK_THEN_ANSWER = re.compile(
    rf"\s*<think>{_TEXT_WITHOUT_TAGS}</think>\s*<answer>{_TEXT_WITHOUT_TAGS}</answer>\s*", flags=re.DOTALL
)


def format(*, prompts: list[str], completions: list[str]) -> list[float | None]:
    """1.0 where the completion is exactly `<think>...</think>` and then `<answer>...</answer>`, else 0.0.

    Nothing but white space may stand around the two, and no tag inside them. A prompt that already ends with `<think>`
    counts as the opening tag.
    """
    opened = ["<think>" if prompt.rstrip().endswith("<think>") else "" for prompt in prompts]
    return [float(bool(_THINK_THEN_ANSWER.fullmatch(a + b))) for a, b in zip(opened, completions, strict=True)]


BUILT_IN: dict[str, RewardFunction] = {
    "exact_answer": exact_answer,
    "rouge_l_precision": rouge_l_precision,
    "length": length,
    "format": format,
}
