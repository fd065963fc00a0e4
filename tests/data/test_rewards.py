"""A reward is a number that was earned; what failed or does not apply is never a zero."""

import json
import math
import sys
from pathlib import Path

import pytest

from data.answers import exact_answer, parse_number
from data.load import DataConfig, convert_rows
from data.rewards import (
    MissingRewards,
    RewardConfig,
    build_reward_fn,
    compute_rewards,
    format,
    length,
    rouge_l_precision,
)

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")


def compute(functions: dict, completions: list[str], weights=None, columns=None):
    size = len(completions)
    return compute_rewards(
        functions,
        weights or [1.0] * len(functions),
        prompts=["p"] * size,
        completions=completions,
        completion_ids=[[1, 2]] * size,
        columns=columns or [{}] * size,
    )


@pytest.mark.parametrize(
    "same", ["1000", "1,000", "1000.0", "1000.", "$1,000.00", "\\$1000", "1000%", " +1000\n", "1e3"]
)
def test_one_number_in_all_its_spellings(same):
    assert parse_number(same) == 1000
    assert exact_answer(completions=[f"so #### {same}"], answer=["... #### 1,000"]) == [1.0]


@pytest.mark.parametrize("text", ["72 apples", "1,00", "1,2,3", "", "-", "1e", "1/2", "__import__('os')", "1000.0.0"])
def test_what_is_no_number_is_not_read_as_one(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("<think>3</think>\n<answer>72</answer>", 1.0),
        ("<answer>71</answer> no: <answer>72</answer>", 1.0),  # the last one counts
        ("<answer>72</answer> no: <answer>71</answer>", 0.0),
        ("<think>#### 72</think> 71", 0.0),  # thoughts are no answers
        ("24 + 48 = 72\n#### 72\n", 1.0),
        ("#### 72 apples", 0.0),
        ("so \\boxed{72} it is, 71 not", 1.0),
        ("\\boxed{\\text{72}}", 0.0),
        ("She has 48 and 24, in all 72.", 1.0),
        ("72 or 71", 0.0),
        ("100-72", 1.0),  # a minus between two numbers is no sign
        ("it is -72", 0.0),
        ("", 0.0),
        ("<answer>", 0.0),
        ("no idea", 0.0),
    ],
)
def test_the_final_answer_counts(completion, right):
    assert exact_answer(completions=[completion], answer=["#### 72"]) == [right]
    assert exact_answer(completions=[completion], answer=[72]) == [right]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("The answer is \u22125.", -5),
        ("it is \u20135", "-5"),
        ("that is -\u00a35", "-5"),
        ("The answer is 1.2e3", "1200"),
        ("so $1.2 \\times 10^{3}$.", "1200"),
        ("about 1.2 x 10**3", "1200"),
        ("It is **3**", "3"),
        ("\\boxed{1.2 \\times 10^3}", 1200.0),
        ("10000000000000000", 1e16),
        ("0.00001", 1e-05),
        ("#### **42**", "42"),
        ("<answer>**42**</answer>", "42"),
        ("**#### 42**", "42"),
        ("#### `42`.", "42"),
        ("<answer>**Paris**</answer>", "Paris"),
        ("1{,}234", "1234"),
        ("10,\\!080", "10,080"),
        ("10080", "10,\\!080"),
        ("10\u202f080", "10080"),
        ("#### x = 5", "5"),
        ("$1,234.50.", "1234.5"),
        ("12.0", "12"),
        ("45^\\circ", "45"),
        ("the answer is...5", "5"),
        ("5\\,cm", "5"),
        ("\u7b54\u6848\u662f72\u3002", "72"),
        ("x = - 5", "-5"),
        ("The answer is - 5.", "-5"),
        ("\\boxed{- 5}", "-5"),
        ("it falls by minus 5", "-5"),
        ("that is -\u00a55", "-5"),
        ("a loss: - $5", "-5"),
        ("$1.2 \\times 10^{-3}$", "0.0012"),
    ],
)
def test_a_number_is_read_however_it_is_written(completion, answer):
    assert exact_answer(completions=[completion], answer=[answer]) == [1.0]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("The answer is \u22125.", "5"),
        ("The answer is 1.2e3", "3"),
        ("so $1.2 \\times 10^{3}$.", "3"),
        ("So the probability is 1/2.", "2"),
        ("So the probability is 1 / 2.", "2"),
        ("1 1/2 cups", "2"),
        ("it is $\\frac{1}{2}$.", "2"),
        ("it is $\\frac12$.", "12"),
        ("$5\\sqrt{2}$", "2"),
        ("$5\\pi$", "5"),
        ("5 \u03c0", "5"),
        ("2^{3}", "3"),
        ("2**3", "3"),
        ("3 \u00b1 5", "5"),
        ("1.5 million", "1.5"),
        ("x_1", "1"),
        ("3x", "3"),
        ("1{,}234", "234"),
        ("10,\\!080", "80"),
        ("10 000", "0"),
        ("1'000", "0"),
        ("1.234,50", "50"),
        ("version 3.14.15", "15"),
        ("(3,4)", "4"),
        ("at 12:30", "30"),
        ("on 2024-01-05", "5"),
        ("COVID-19", "19"),
        ("1\u00bd", "1"),
        ("0x1F", "1"),
        ("0.\\overline{3}", "3"),
        ("0.(3)", "3"),
        ("it is sqrt(2)", "2"),
        ("log 8", "8"),
        ("f(-5)", "-5"),
        ("\\tfrac 1 2", "2"),
        ("5 pi", "5"),
        ("5 Million", "5"),
        ("5-million", "5"),
        ("5\\text{ million}", "5"),
        ("2 trillion", "2"),
        ("3 dozen", "3"),
        ("+/- 5", "5"),
        ("x \u2265 5", "5"),
        ("x \\leq 5", "5"),
        ("The answer is - 5.", "5"),
        ("negative 5", "5"),
        ("that is -\u20b95", "5"),
    ],
)
def test_a_part_of_something_longer_is_no_answer(completion, answer):
    assert exact_answer(completions=[completion], answer=[answer]) == [0.0]


def test_answers_that_are_texts_must_be_the_same_text():
    answers = ["40*(94 - 90) + 83 - 74", "olleh", "olleh", None]
    completions = ["<answer>40*(94 - 90)  + 83 - 74</answer>", "olleh", "Olleh", "x"]
    assert exact_answer(completions=completions, answer=answers) == [1.0, 1.0, 0.0, None]


@needs_shared
@pytest.mark.parametrize("name", ["gsm8k_train.jsonl", "gsm8k_test.jsonl"])
def test_every_gsm8k_solution_earns_its_own_answer(name):
    """Comma finals (345: 1,080) and no-break spaces included; one more than the answer earns nothing."""
    answers = [json.loads(line)["answer"] for line in (SHARED / name).read_text("utf-8").splitlines()]
    assert set(exact_answer(completions=answers, answer=answers)) == {1.0}
    numbers = [parse_number(text.rpartition("####")[2]) for text in answers]
    assert None not in numbers
    plain = [f"<think>0</think><answer>{number}</answer>" for number in numbers]
    assert set(exact_answer(completions=plain, answer=answers)) == {1.0}
    assert set(exact_answer(completions=[f"#### {number + 1}" for number in numbers], answer=answers)) == {0.0}


def test_format_is_the_whole_completion():
    right = "<think>a\nb</think>\n<answer>c</answer>\n"
    wrong = ["x" + right, right + "x", right + right, right.replace("b", "<think>"), "<answer>c</answer>", ""]
    assert format(prompts=["p"] * 7, completions=[right, *wrong]) == [1.0] + [0.0] * 6
    assert format(prompts=["...<think>\n"], completions=[right.removeprefix("<think>")]) == [1.0]


def test_length_falls_off_on_both_sides():
    """Target 4: 4 -> 1, 3 and 5 -> 1 - 1/4, 0 and 8 and 20 -> 0; without a column 64 of 128 -> 1/2."""
    ids = [[0] * n for n in (4, 3, 5, 0, 8, 20)]
    assert length(completion_ids=ids, target_length=[4] * 6) == [1.0, 0.75, 0.75, 0.0, 0.0, 0.0]
    assert length(completion_ids=[[0] * 64]) == [0.5]


def test_rouge_l_precision_is_the_share_of_words_in_order():
    """Against "the cat sat": "the dog sat" shares 2 of its 3 words in order; "sat the" 1 of 2."""
    rewards = rouge_l_precision(completions=["the dog sat", "sat the", "", "x"], answer=["the cat sat"] * 3 + [None])
    assert rewards == [pytest.approx(2 / 3), 0.5, 0.0, None]


def test_weighted_sum_over_the_functions_that_apply():
    """Row 0: 2*1 + 0.5*4 = 4; row 1: only the second, 2; row 2: none."""
    functions = {"a": lambda completions: [1.0, None, None], "b": lambda completions: [4, 4, None]}
    result = compute(functions, ["x"] * 3, weights=[2.0, 0.5])
    assert result.total[:2] == [4.0, 2.0] and math.isnan(result.total[2])
    assert result.by_name == {"a": [1.0, None, None], "b": [4.0, 4.0, None]}
    assert result.failure is None and result.failed == {"a": [], "b": []}


def test_a_reward_that_raises_is_missing_and_reported():
    def broken(completions):
        raise KeyError("no such table")

    result = compute({"good": lambda completions: [1.0, 0.0], "broken": broken}, ["x", "y"])
    assert all(math.isnan(value) for value in result.total)
    assert result.by_name["good"] == [1.0, 0.0] and result.failed == {"good": [], "broken": [0, 1]}
    assert "KeyError: 'no such table'" in result.failure
    with pytest.raises(RuntimeError, match="all 2 rewards are missing(.|\n)*Traceback(.|\n)*no such table"):
        MissingRewards().check(result.total, result.failure)


@pytest.mark.parametrize("bad", [math.nan, math.inf, "1", object(), [1.0]])
def test_a_value_that_is_no_number_fails_for_its_row_alone(bad):
    result = compute({"f": lambda completions: [1.0, bad]}, ["x", "y"])
    assert result.total[0] == 1.0 and math.isnan(result.total[1])
    assert result.failed == {"f": [1]} and "for completion 1 of 2" in result.failure
    with pytest.warns(UserWarning, match="a reward failed"):
        MissingRewards().check(result.total, result.failure)  # one row has its reward


@pytest.mark.parametrize("unordered", [{3.0, 1.0}, frozenset((3.0, 1.0)), {1: "x", 0: "y"}])
def test_values_without_the_order_of_the_completions_fail(unordered):
    result = compute({"f": lambda completions: unordered}, ["x", "y"])
    assert result.failed == {"f": [0, 1]} and "return a list in their order" in result.failure


def test_a_reward_cannot_change_what_is_trained_or_rewarded_next():
    """It gets copies: the lists of token ids are the sampled completions' own."""

    def changes(completions, completion_ids, tags):
        completions.clear()
        completion_ids[0].pop()
        tags[0].append("z")
        return [1.0, 1.0]

    ids, columns = [[1, 2], [3]], [{"tags": ["a"]}, {"tags": ["b"]}]
    given = {"prompts": ["p"] * 2, "completions": ["x", "y"], "completion_ids": ids, "columns": columns}
    result = compute_rewards({"a": changes, "b": lambda **all: [len(all["tags"][0])] * 2}, [1.0, 1.0], **given)
    assert result.total == [2.0, 2.0] and ids == [[1, 2], [3]] and columns[0] == {"tags": ["a"]}


def test_a_wrong_number_of_values_fails_for_all_rows():
    result = compute({"f": lambda completions: [1.0]}, ["x", "y"])
    assert result.failed == {"f": [0, 1]} and "returned 1 values for 2 completions" in result.failure


def test_functions_get_the_columns_they_name():
    seen = {}

    def wants_one(completions, answer, absent=3):
        seen["one"] = (answer, absent)
        return [0.0, 0.0]

    def wants_all(completions, **rest):
        seen["all"] = sorted(rest)
        return [0.0, 0.0]

    columns = [{"answer": "1", "other": 2}, {"answer": "2"}]
    compute({"a": wants_one, "b": wants_all}, ["x", "y"], columns=columns)
    assert seen == {"one": (["1", "2"], 3), "all": ["answer", "completion_ids", "other", "prompts"]}
    result = compute({"exact_answer": exact_answer}, ["x"], columns=[{"gold": "1"}])
    assert "needs the column answer and the rows have gold" in result.failure


def test_functions_are_named_by_list_comma_list_or_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_test.py").write_text("def short(completions):\n    return [1.0 for _ in completions]\n")
    monkeypatch.chdir(tmp_path)
    config = RewardConfig(reward_functions="exact_answer, my_rewards_of_test:short", reward_weights=[1.0, 0.1])
    reward_fn = build_reward_fn(config)
    assert list(reward_fn.functions) == ["exact_answer", "short"] and reward_fn.weights == [1.0, 0.1]
    assert build_reward_fn(RewardConfig(reward_functions=["format", "length"])).weights == [1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"reward_functions": "exact"}, "names exact; known are exact_answer"),
        ({"reward_functions": "no_module_here:f"}, "no_module_here:f, which cannot be imported"),
        ({"reward_functions": ""}, "reward_functions is empty"),
        ({"reward_functions": "format,format"}, "names a function twice"),
        ({"reward_functions": "format,length", "reward_weights": [1.0]}, "reward_weights has 1 values for 2"),
    ],
)
def test_bad_reward_settings_say_what_to_change(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_reward_fn(RewardConfig(**settings))


class Sour:
    def __float__(self):
        raise RecursionError("too deep")


@pytest.mark.parametrize("act", [sys.exit, SystemExit, KeyError, lambda: [0.0, Sour()], lambda: [0.0, 10**400]])
def test_whatever_a_reward_does_is_a_failure_of_its_rows(act):
    """exit() too: it would end the run with exit code 0. Only Ctrl-C ends it."""

    def reward(completions):
        found = act()
        if isinstance(found, BaseException):
            raise found
        return found

    result = compute({"f": reward}, ["x", "y"])
    assert len(result.failed["f"]) in (1, 2) and math.isnan(result.total[1]) and result.failure

    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute({"f": interrupted}, ["x"])


def test_a_reward_written_for_messages_is_told_that_they_are_texts():
    result = compute({"f": lambda completions: [one[0]["content"] for one in completions]}, ["x"])
    assert "prompts and completions are texts here" in result.failure


def test_a_misspelt_function_and_a_module_that_exits_are_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "near_rewards_of_test.py").write_text("def close(completions):\n    return [1.0]\n")
    (tmp_path / "exits_of_test.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="did you mean near_rewards_of_test:close?"):
        build_reward_fn(RewardConfig(reward_functions="near_rewards_of_test:clse"))
    with pytest.raises(ValueError, match="cannot be imported: it calls exit()"):
        build_reward_fn(RewardConfig(reward_functions="exits_of_test:f"))


def test_a_converter_that_fails_or_exits_names_its_row(tmp_path, monkeypatch):
    (tmp_path / "converters_of_test.py").write_text(
        "def fails(row):\n    return {'prompt': row['nothing']}\ndef exits(row):\n    raise SystemExit\n"
    )
    monkeypatch.chdir(tmp_path)
    for name, words in (("fails", "failed on row 1 of here: KeyError 'nothing'"), ("exits", "failed on row 1 of here")):
        with pytest.raises(ValueError, match=words):
            convert_rows([{"prompt": "p"}], DataConfig(converter=f"converters_of_test:{name}"), "here")
