"""Read the final answer out of generated text: one canonical number string, or `[invalid]`.

    from bridgekit.tasks.answers import extract_answer
    extract_answer("... so she has 18 left.\\n#### 18.00")      # "18"

Rules, named so that the same texts can be rescored under each of them:

marker_last, marker_first
    This project's own: the last (first) `#### n` before any follow-up question the model invents,
    in canonical form. A fraction stays a fraction ("8/3"), an expression ("400-x") is no answer.
seeds
    The first experiments' evaluator: first `#### ` with digits, points and commas; commas dropped,
    nothing else tidied ("18." is not "18"). It reproduces every label of their raw files.
lm_eval_strict, lm_eval_flexible
    The two filters of lm-evaluation-harness' `gsm8k` task with the clean-up its metric applies before
    comparing. These and `seeds` return a label exactly as those programs would compare it.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from bridgekit.runs import INVALID

MAX_NUMBER_CHARS = 300  # longer runs of digits are degenerate text, and int() refuses them beyond 4,300

_MARKER = re.compile(r"(?<!#)####(?!#)([^\n]*)")
_FOLLOW_UP = re.compile(r"\n[ \t>*#_]*(?:Q|Question|Problem|Human|User)(?:[ \t]*\d+)?[ \t*_]*:", re.IGNORECASE)
_CALCULATION = re.compile(r"<<[^<>\n]*>>")
_EQUATION = re.compile(r"\s*[\d.,$ ]+(?:[-+*/×÷][\d.,$ ]+)+=(?=\s*[-+$.\d])")
_DIGITS = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    r"[\s$€£¥₹*_`'\"(~≈\\{:]*(?:boxed\{\s*)?"  # decoration before the number
    rf"(?P<sign>[-+]?)[\s$€£¥₹\\]*(?P<number>{_DIGITS})(?P<exp>[eE][-+]?\d{{1,2}}(?!\w))?"
    r"(?P<fraction>\s+\d+/\d+|\s*/\s*\d+)?"
)
# The number read is only the start of something else: 1.2.3, 10², 400-x, 3 * 4, 1 hour and 30 minutes.
_CONTINUES = re.compile(
    r"[.:]\d|[²³⁴⁵⁶⁷⁸⁹⁰¹√]|\s*/\s*\d|\s*[-+*×÷^·]\s*(?:[$(]?\d|[a-zA-Z]\b)"
    r"|\s*[xX]\s*\d|\s*,?\s*\d|\s*[a-zA-Z]*\s*(?:,|&|and|or)\s+\$?\d"
)

_CHARACTERS = dict(zip("−–—‒‐‑﹣－＋，٬．٫＄＃％⁄∕／", "--------+,,..$#%///", strict=True))
_SPACED_THOUSANDS = re.compile("(?<=\\d)[\u00a0\u2009\u202f'’](?=\\d{3}(?!\\d))")
_MARKER_OF_SEEDS = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def extract_answer(text: str, rule: str = "marker_last") -> str:
    """Return the answer stated in `text` under the named rule, or `[invalid]`."""
    if rule not in RULES:
        raise ValueError(f"extraction rule {rule!r} is not known; use one of: {', '.join(RULES)}")
    return RULES[rule](text)


def truncate_followups(text: str) -> str:
    """Cut the text where the model starts another question of its own.

    A question before anything else is the one it was asked, repeated; it stays, and so do its repetitions.
    """
    asked = None
    for match in _FOLLOW_UP.finditer("\n" + text):  # match positions are those of `text`, one later
        words = text[match.end() - 1 : match.end() + 199].strip().split("\n")[0]  # its first line will do
        question = " ".join(words.split())[:40]
        if not any(map(str.isalnum, text[: match.start()])):
            asked = question
        elif question != asked:
            return text[: max(match.start() - 1, 0)]
    return text


def answer_is_complete(text: str) -> bool:
    """True once a `####` line holds a readable number and its newline: decoding may stop there."""
    lines = plain_characters(text).split("\n")[:-1]
    return any(read_number(m.group(1)) != INVALID for line in lines for m in _MARKER.finditer(line))


def read_number(text: str) -> str:
    """Canonical form of the number that `text` begins with: "149", "-3", "2.5", "8/3", or `[invalid]`."""
    text = _CALCULATION.sub("", plain_characters(text))[: MAX_NUMBER_CHARS + 100]
    equation = _EQUATION.match(text)
    match = _NUMBER.match(text, equation.end() if equation else 0)
    if not match or len(match.group()) > MAX_NUMBER_CHARS or _CONTINUES.match(text, match.end()):
        return INVALID
    value = Fraction(match["number"].replace(",", "").rstrip(".") + (match["exp"] or ""))
    numerator, slash, denominator = (match["fraction"] or "").rpartition("/")
    if slash and not int(denominator):
        return INVALID
    if numerator.strip():  # a mixed number: 1 1/2
        value += Fraction(int(numerator), int(denominator))
    elif slash:
        value /= int(denominator)
    return canonical(-value if match["sign"] == "-" else value)


def canonical(value: Fraction) -> str:
    """Decimal digits where the value ends, else the reduced fraction: 2.50 -> "2.5", 8/3 -> "8/3"."""
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    body = digits[: len(digits) - places] + ("." + digits[-places:] if places else "")
    return ("-" if value < 0 else "") + body


def plain_characters(text: str) -> str:
    """Digits, signs and separators of other scripts as ASCII; vulgar fractions spelt out (½ -> 1/2)."""
    return text if text.isascii() else _SPACED_THOUSANDS.sub("", "".join(map(_plain_character, text)))


def _plain_character(character: str) -> str:
    if character in _CHARACTERS:
        return _CHARACTERS[character]
    if unicodedata.category(character) == "Nd":
        return str(unicodedata.decimal(character))
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", character).replace("⁄", "/")
    return character


def _marker_answers(text: str) -> list[str]:
    found = (read_number(m.group(1)) for m in _MARKER.finditer(plain_characters(truncate_followups(text))))
    return [answer for answer in found if answer != INVALID] or [INVALID]


def _first_marker(text: str) -> str:
    match = _MARKER_OF_SEEDS.search(text)
    return match.group(1) if match else INVALID


def _last_number(text: str) -> str:
    found = _FLEXIBLE.findall(text)
    return (found[-1][0] or found[-1][1]).strip() if found else INVALID


def lm_eval_cleanup(text: str) -> str:
    """Drop what that exact match ignores: commas, dollars, all up to `#### `, a last full stop, case."""
    text = re.sub(r"(?s).*#### ", "", text.replace(",", "").replace("$", ""))
    return re.sub(r"\.$", "", text).lower()


RULES = {
    "marker_last": lambda text: _marker_answers(text)[-1],
    "marker_first": lambda text: _marker_answers(text)[0],
    "seeds": lambda text: _first_marker(text).replace(",", ""),
    "lm_eval_strict": lambda text: lm_eval_cleanup(_first_marker(text)),
    "lm_eval_flexible": lambda text: lm_eval_cleanup(_last_number(text)),
}
