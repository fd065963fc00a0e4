"""The built-in reward `exact_answer`: find the final answer in a completion and compare it with the row's."""

from __future__ import annotations

import re
from collections import deque
from decimal import Decimal
from typing import Any


def exact_answer(*, completions: list[str], answer: list[Any]) -> list[float | None]:
    """1.0 where the completion's final answer equals the row's `answer`, else 0.0; None where the row has no answer.

    Both sides are narrowed, in this order, to what follows the last `</think>`, the inside of the last
    `<answer>...</answer>`, the rest of the line after the last `####`, the inside of the last `\\boxed{...}`; markers
    that are absent narrow nothing. A completion without any of the last three answers a number with its last number.

    Numbers are compared as numbers (1,000 = 1000 = $1000.0 = 1e3 = 1 \\times 10^3); `$`, `%`, thousands commas,
    markdown's `**`, a trailing dot and a leading `x =` are dropped. `72 apples` is not the number 72. Where the last
    number is a part of something longer (1/2, 2^5, 3x, 12:30, 2024-01-05) the completion has no answer. All else must
    be the same text, letter case included, with runs of white space read as one space. Nothing is ever evaluated.
    """
    return [_same_answer(text, gold) for text, gold in zip(completions, answer, strict=True)]


def _same_answer(completion: str, gold: Any) -> float | None:
    if gold is None:
        return None
    if not isinstance(gold, (str, int, float)):
        raise TypeError(f"the answer column holds a {type(gold).__name__}; give text or a number")
    expected, _ = extract_answer(str(gold))
    found, marked = extract_answer(completion)
    expected_number = parse_number(expected)
    if expected_number is None:
        return float(" ".join(found.split()) == " ".join(expected.split()))
    number = parse_number(found)
    if number is None and not marked:
        number = _last_number(found)
    return float(number == expected_number)


def extract_answer(text: str) -> tuple[str, bool]:
    """The final answer in a text, and whether a marker named it; see `exact_answer`."""
    text = text.rpartition("</think>")[2]
    marked = False
    inside = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, flags=re.DOTALL)
    if inside:
        text, marked = inside[-1], True
    if "####" in text:
        text, marked = text.rpartition("####")[2].strip().partition("\n")[0], True
    boxed = _last_boxed(text)
    if boxed is not None:
        text, marked = boxed, True
    text = text.strip()
    for _ in range(2):  # markdown's, which may be doubled
        emphasis = _EMPHASIS.fullmatch(text)
        text = emphasis[2].strip() if emphasis else text
    return text, marked


def _last_boxed(text: str) -> str | None:
    """The inside of the last `\\boxed{...}` with balanced braces."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start:index]
    return None


_EMPHASIS = re.compile(r"(\*\*|__|\*|`)(.+)\1", flags=re.DOTALL)
_NUMBER = (
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,4}(?![0-9]))?"
)
_WHOLE_NUMBER = re.compile(rf"(?:[A-Za-z] ?= ?)?([-+]?)({_NUMBER})")
# A minus right after a letter, digit or closing bracket is an operator, not a sign.
_NUMBER_IN_TEXT = re.compile(rf"(?:(?<![\w)\]}}])-)?\$?{_NUMBER}")
_TIMES = r"(?:\\times|\\cdot|[*x\u00d7\u00b7])"
_SPELLINGS = (
    (re.compile("[\u2212\u2012\u2013\ufe63\uff0d]"), "-"),  # typographic minus signs
    (re.compile(r"\{,\}"), ","),  # LaTeX's thousands, and the spaces after them
    (re.compile(r"(?<=[0-9,])\\[,!](?=[0-9])|(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))"), ""),
    (re.compile(r"\\[$%]|[\u00a3\u00a5\u20a0-\u20bf]"), lambda found: "%" if found[0] == r"\%" else "$"),  # currencies
    (re.compile(rf"(?<=[0-9]) ?{_TIMES} ?10(?:\^|\*\*)\{{?([-+]?[0-9]{{1,4}})(?![0-9])\}}?"), r"e\1"),
    (re.compile(r"(?i)(?:(?<=[=:({])|(?<=\bis)|^) ?- ?(?=\$? ?\.?[0-9])|\b(?:minus|negative) (?=\$?\.?[0-9])"), " -"),
    (re.compile(r"-\$ ?|- \$"), "-$"),
)
_FUNCTION = r"\\(?:[cdt]?frac|sqrt|log|ln|exp|binom|pm|overline|dot|bar)"
# What makes a number a part of something longer: text before it, after it, and before the braces around it.
_JOINED_BEFORE = re.compile(
    r"[/\u2044^\u221a\u00b1] ?$|[0-9][,.:'\u2019_]$|[A-Za-z_]-?$|[0-9]-[0-9]{1,2}-$|(?<![0-9])[0-9]{1,3} $"
    rf"|{_FUNCTION}(?: ?[0-9])? ?$|[A-Za-z0-9_.]\( ?$|\b(?:sqrt|log|ln|exp) $|\+/- ?$|[<\u2264\u2265] ?$|\\[lg]eq? ?$"
)
_JOINED_AFTER = re.compile(
    r" ?[/\u2044](?! ?[A-Za-z]{2})|\^(?!\\circ|\{\\circ)|_[^_\W]| ?(?:\\pi|\u03c0)|\\(?:[cdt]?frac|sqrt)"
    r"| pi\b|(?: |-|\\text\{ ?)(?i:hundred|thousand|(?:[mb]|tr)illion|dozen|lakh|crore)"
)
_JOINED_BRACES = re.compile(rf"(?:{_FUNCTION}|[\^_}}\]])$")


def _spell_plainly(text: str) -> str:
    for spelling, plain in _SPELLINGS:
        text = spelling.sub(plain, text)
    return text


def parse_number(text: str) -> Decimal | None:
    """The exact value of a text that is one number and nothing else, or None."""
    text = _spell_plainly(text)
    for dropped in ("$", "%", "\\(", "\\)", "\\[", "\\]", "\\,", "\\!"):
        text = text.replace(dropped, "")
    match = _WHOLE_NUMBER.fullmatch(text.strip().lstrip("*`").rstrip("*`. "))
    return Decimal(match[1] + match[2].replace(",", "")) if match else None


def _last_number(text: str) -> Decimal | None:
    """The value of the last number in a text; None where it is a part of something longer, as the 2 of 1/2 is."""
    text = _spell_plainly(text)
    last = deque(_NUMBER_IN_TEXT.finditer(text), maxlen=1)
    if not last:
        return None
    match = last[0]
    start, end = match.span()
    before, after = text[max(0, start - 12) : start], text[end : end + 20]
    if re.search(r"[\w)]\*\*$", before) and not after.startswith("**"):  # a power, not markdown
        return None
    digits = match[0].lstrip("-$")
    grouped = len(digits) == 3 and digits.isdigit()  # else a space before it parts two numbers
    joined = _JOINED_BEFORE.search(before)
    if joined and (grouped or not joined[0].endswith(" ") or not joined[0][0].isdigit()):
        return None
    if _JOINED_AFTER.match(after) or _is_letter(after[:1]) or _is_letter(before[-1:]):
        return None
    depth = 0
    for index in range(start - 1, -1, -1):
        depth += {"}": 1, "{": -1}.get(text[index], 0)
        if depth < 0:
            return None if _JOINED_BRACES.search(text[max(0, index - 10) : index]) else parse_number(match[0])
    return parse_number(match[0])


def _is_letter(character: str) -> bool:
    """A letter of a script that puts spaces between words, a superscript or a fraction such as one half."""
    return character.isalpha() and character < "\u0590" or character.isnumeric()
