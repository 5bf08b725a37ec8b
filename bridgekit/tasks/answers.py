"""Read the final answer out of generated text: one canonical number string, or `[invalid]`.

    extract_answer("... so she has 18 left.\\n#### 18.00")      # "18"
    extract_answer("16 - 3 = 13. The answer is $13.")         # "13"

Rules, so that one text can be scored under each: `marker_last` and `marker_first`, this project's own, take the last or
first `#### n` before any follow-up question that the model invents, in canonical form ("8/3" stays a fraction, "400-x"
is no answer); `final`, the default, is `marker_last`, and without a marker the number of "The answer is n" or of a line
"A: n"; `seeds` is the first experiments' evaluator, `lm_eval_strict` and `lm_eval_flexible` are the filters of
lm-evaluation-harness for GSM8K: these three return a label exactly as those programs would compare it.
"""

import re
import unicodedata
from decimal import Decimal, Inexact, localcontext
from fractions import Fraction

from bridgekit.keys import INVALID

MAX_NUMBER_CHARS = 300  # longer runs of digits are degenerate text, and int() refuses them beyond 4,300

_MARKER = re.compile(r"(?<!#)####(?!#)([^\n]*)")
FOLLOW_UP = re.compile(r"\n[ \t>*#_]*(?:Q|Question|Problem|Human|User)(?:[ \t]*\d+)?[ \t*_]*:", re.IGNORECASE)
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
    r"|\s*[xX]\s*\d|\s*,?\s*\d|\s*[a-zA-Z]*\s*(?:,|&|and)\s+\$?\d|\s*or\s+\$?\d"  # 120 minutes or 2 hours: the same
)
_STATED = re.compile(r"\banswer(?:[ \t]+is\b|[ \t]*:)(?P<said>[^\n]+)|^[ \t>*_]*A[*_]*:(?P<alone>[^\n]+)", re.I | re.M)
_BLOCK = re.compile(r"\n\s*\n(?=[ \t>*#_]*(?:Q|Question|Problem|Human|User)\b)", re.I)

_CHARACTERS = dict(zip("−–—‒‐‑﹣－＋，٬．٫＄＃％⁄∕／", "--------+,,..$#%///", strict=True))
_SPACED_THOUSANDS = re.compile("(?<=\\d)[\u00a0\u2009\u202f'’](?=\\d{3}(?!\\d))")
_MARKER_OF_SEEDS = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def extract_answer(text: str, rule: str = "final") -> str:
    """Return the answer stated in `text` under the named rule, or `[invalid]`."""
    if rule not in RULES:
        raise ValueError(f"extraction rule {rule!r} is not known; use one of: {', '.join(RULES)}")
    return RULES[rule](text)


def truncate_followups(text: str) -> str:
    """Cut the text where the model starts another question of its own, once it has given an answer.

    A text that opens with a question repeats the one it was asked, or works through sub-questions: no further question
    cuts it before a final answer, and one that repeats the first, word for word, never does.
    """
    asked = None
    for match in FOLLOW_UP.finditer("\n" + text):  # match positions are those of `text`, one later
        before = plain_characters(text[: match.start()])
        question = " ".join(text[match.end() - 1 :].lstrip().partition("\n")[0].split())
        if asked is None and not any(map(str.isdigit, before)):
            asked = question
        elif question != asked and (asked is None or _marked(before) or _stated(before, alone=False)):
            return text[: max(match.start() - 1, 0)]
    return text


def answer_is_complete(text: str) -> bool:
    """True once a `####` line holds a readable number and its newline, or a follow-up question's line has ended:
    decoding may stop there."""
    lines = text[: text.rfind("\n") + 1]
    return bool(_marked(plain_characters(lines))) or truncate_followups(lines) != lines


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


def _readable(texts) -> list[str]:
    return [answer for answer in map(read_number, texts) if answer != INVALID]


def _marked(text: str) -> list[str]:
    return _readable(m[1] for m in _MARKER.finditer(text))


def _stated(text: str, alone: bool = True) -> list[str]:
    """The numbers of "The answer is n" and, unless not `alone`, of lines that are "A: n"."""
    found = ((m["said"], m["alone"]) for m in _STATED.finditer(text))
    return _readable(said or line for said, line in found if said or alone and len(line.split()) <= 5)  # no sentence


def _final(text: str) -> str:
    """The last marked number; without one the last that is stated before the next question."""
    text = plain_characters(truncate_followups(text))
    blocks = (_stated(block) for block in _BLOCK.split(text))
    return (_marked(text) or next(filter(None, blocks), [INVALID]))[-1]


def _marked_numbers(text: str) -> list[str]:
    return _marked(plain_characters(truncate_followups(text))) or [INVALID]


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
    "final": _final,
}
