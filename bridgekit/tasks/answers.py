"""Read the final answer out of generated text: one canonical number string, or `[invalid]`.

    extract_answer("... so she has 18 left.\\n#### 18.00")      # "18"

Rules, so that one text can be scored under each: `marker_last` and `marker_first`, this project's own, take the last or
first `#### n` before any follow-up question that the model invents, in canonical form ("8/3" stays a fraction, "400-x"
is no answer); `seeds` is the first experiments' evaluator, `lm_eval_strict` and `lm_eval_flexible` are the filters of
lm-evaluation-harness for GSM8K: these three return a label exactly as those programs would compare it.
"""

import re
import unicodedata
from decimal import Decimal, Inexact, localcontext
from fractions import Fraction

from bridgekit.keys import INVALID

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
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


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
    with localcontext(prec=10 * MAX_NUMBER_CHARS) as context:
        context.traps[Inexact] = True
        try:
            return f"{Decimal(value.numerator) / value.denominator:f}"
        except Inexact:
            return str(value)


def plain_characters(text: str) -> str:
    """Digits, signs and separators of other scripts as ASCII; vulgar fractions spelt out (½ -> 1/2)."""
    return text if text.isascii() else _SPACED_THOUSANDS.sub("", "".join(map(_plain_character, text)))


def _plain_character(character: str) -> str:
    if unicodedata.category(character) == "Nd":
        return str(unicodedata.decimal(character))
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", character).replace("⁄", "/")
    return _CHARACTERS.get(character, character)


def _marked_numbers(text: str) -> list[str]:
    found = (read_number(m.group(1)) for m in _MARKER.finditer(plain_characters(truncate_followups(text))))
    return [answer for answer in found if answer != INVALID] or [INVALID]


def lm_eval_cleanup(text: str) -> str:
    """Drop what that exact match ignores: commas, dollars, all up to `#### `, a last full stop, case."""
    text = re.sub(r"(?s).*#### ", "", text.replace(",", "").replace("$", ""))
    return re.sub(r"\.$", "", text).lower()


RULES = {
    "marker_last": lambda text: _marked_numbers(text)[-1],
    "marker_first": lambda text: _marked_numbers(text)[0],
    "seeds": lambda text: (_MARKER_OF_SEEDS.findall(text) or [INVALID])[0].replace(",", ""),
    "lm_eval_strict": lambda text: lm_eval_cleanup((_MARKER_OF_SEEDS.findall(text) or [INVALID])[0]),
    "lm_eval_flexible": lambda text: lm_eval_cleanup((_FLEXIBLE.findall(text) or [INVALID])[-1].strip()),
}
