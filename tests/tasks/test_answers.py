"""Answer extraction: a table of awkward strings, agreement with two other programs, and properties."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridgekit.keys import INVALID
from bridgekit.tasks.answers import RULES, answer_is_complete, canonical, extract_answer, read_number

AWKWARD = {
    "18": "18", "18.": "18", " 18 .": "18", "18.00": "18", "18.50": "18.5", "007": "7", "-0": "0", ".5": "0.5",
    "5.": "5", "+5": "5", "-3": "-3", "− 3": "-3", "–3": "-3", "-$5": "-5", "$-5": "-5", "－５": "-5",
    "$1,234.50": "1234.5", "\\$18": "18", "1,00,000": "100000", "1\u202f234\u202f567": "1234567", "€ 7": "7",
    "68.04% ": "68.04", "60％": "60", "１２": "12", "٣": "3", "１，２３４．５": "1234.5", "120 minutes": "120",
    "12km": "12", "10-day": "10", "$5/hour": "5", "**18**": "18", "\\boxed{18}": "18", "'10'.": "10",
    "18, in total": "18",
    "18 (since 3*6=18)": "18", "18 eggs in 3 days": "18", "8/3": "8/3", "-8/3": "-8/3", "16/2": "8", "1/2": "0.5",
    "½": "0.5", "2½": "2.5", "1 1/2": "1.5", "5 / 2": "2.5", "1e6": "1000000", "3.0e-2": "0.03", "3*5=15": "15",
    "<<3+4=7>>7": "7",
}  # fmt: skip
NO_NUMBER = (  # naming the first digits would be a wrong reading
    "400-x", "18 - 5", "2 x 4", "10²", "12:30", "1.2.3", "18,5", "18, 20", "7 or 8", "1 hour and 30 minutes", "8/0",
    "1 1/0", "3/2/2", "<number>", "Unable to say", "", "-", "9" * 5000, "1 234",
)  # fmt: skip


@pytest.mark.parametrize(("written", "answer"), [*AWKWARD.items(), *((text, INVALID) for text in NO_NUMBER)])
def test_awkward_numbers(written, answer):
    assert extract_answer(f"Some steps.\n#### {written}") == answer


# What lm-evaluation-harness 0.4.13 itself gives for these texts (regex filters, then its metric's clean-up).
HARNESS = [
    ("#### 18", "18", "18"), ("#### 18.", "18", "18"), ("#### 1,234.50", "1234.50", "1234.50"),
    ("#### $1,234", INVALID, "1234"), ("#### -5", "-5", "-5"), ("##### 7", "7", "7"), ("#### ,", "", INVALID),
    ("x\n#### 5\n\nQ: y\n#### 9", "5", "9"), ("It is 42.", INVALID, "42"), ("$1,250.00 in all.", INVALID, "1250.00"),
    ("about -7 or -8", INVALID, "-8"), ("no number", INVALID, INVALID), ("cost is $ only", INVALID, INVALID),
    ("####12", INVALID, "12"), ("#### ٣", INVALID, INVALID), ("#### 8/3", "8", "3"), ("12.5%", INVALID, "12.5"),
    ("3-2", INVALID, "-2"), ("first 12.5 then 17.25", INVALID, "17.25"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "strict", "flexible"), HARNESS)
def test_same_as_lm_evaluation_harness(text, strict, flexible):
    assert extract_answer(text, "lm_eval_strict") == strict
    assert extract_answer(text, "lm_eval_flexible") == flexible


# Endings as they stand in the first experiments' files, with the label stored there.
FIRST_EXPERIMENTS = [
    ("so 9*2=$18.\n#### 18\n\nQ: A bakery sells 250 loaves\n#### 96", "18"),
    ("#### 68.04% \n\nQ: A bakery", "68.04"), ("#### 8/3\n\nQ: The p", "8"), ("#### 75,000\n\nQ: If", "75000"),
    ("#### .6\n\nQ: A bake", ".6"), ("end with '#### <number>'.\n\nQ: A candle\n#### 8", "8"),
    ("#### 400-x\n\nQ: The", "400"), ("#### Unable", INVALID), ("#### 62.50", "62.50"), ("#### 18.", "18."),
    ("####", INVALID),
]  # fmt: skip


@pytest.mark.parametrize(("text", "label"), FIRST_EXPERIMENTS)
def test_same_as_the_first_evaluator(text, label):
    assert extract_answer(text, "seeds") == label


ASKED = "Q: How many eggs are left?\nA: Let us see.\n\nQ: How many eggs are left?\nA: 3+4=7\n#### 7"


@pytest.mark.parametrize(
    ("text", "last", "first"),
    [
        ("Try: #### 4\nNo, it is\n#### 5\n\nQ: Another one?\nA: #### 9", "5", "4"),
        ("#### 5\nend with '#### <number>'.", "5", "5"),  # a marker without a number is passed over
        ("end with '#### <number>'.\n#### 5", "5", "5"),
        (f"'.\n\n{ASKED}\n\nQ: How many are sold?\n#### 9", "7", "7"),  # its own question may be repeated
        ("\n\nQ: How many?\nA: 3+4=7\n#### 7\n\nQ: Again?\n#### 8", "7", "7"),
        *((f"She has 4.{opening} How many?\n#### 9", INVALID, INVALID) for opening in (
            "\nQ:", "\n\nQuestion: ", "\n**Question:**", "\nQuestion 2:", "\n### Q3:", "\nproblem:", "\nUser:")),
    ],
)  # fmt: skip
def test_the_answer_is_read_before_any_question_that_the_model_invents(text, last, first):
    assert (extract_answer(text), extract_answer(text, "marker_first")) == (last, first)


@pytest.mark.parametrize("text", ["#### 12\n", "a\n#### 8/3\nQ", "#### ٣\n", "#### 400-x\n#### 40\n"])
def test_an_answer_is_complete_only_after_its_newline(text):
    assert answer_is_complete(text) and not answer_is_complete(text[: text.rindex("\n")])
    assert not any(map(answer_is_complete, ("#### <number>'.\n", "####\n12\n", "12\n", "")))


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="'last' is not known; use one of: marker_last"):
        extract_answer("#### 1", "last")


@given(st.text(alphabet=st.sampled_from(list("#### 0123.,/-$%\nQ:²½٣xe=<>*")) | st.characters(), max_size=60))
def test_no_text_breaks_any_rule(text):
    assert all(isinstance(extract_answer(text, rule), str) for rule in RULES)
    answer = extract_answer(text)
    assert answer == INVALID or extract_answer(f"#### {answer}") == answer  # canonical form is a fixed point


@given(st.integers(-(10**12), 10**12), st.integers(0, 4))
def test_numbers_written_in_many_ways_read_the_same(units, places):
    value = Fraction(units, 10**places)
    plain = canonical(value)
    assert Fraction(plain) == value and extract_answer(f"#### {plain}\n\nQ: next\n#### 1") == plain
    wide = plain.translate({48 + d: 0xFF10 + d for d in range(10)})
    grouped = f"{units / 10**places:,.4f}" if abs(units) < 10**11 else plain
    for written in (plain, grouped, f"${plain}", plain.replace("-", "−"), f"{plain}%", f"{plain} eggs", wide):
        assert read_number(written) == plain


@given(st.integers(1, 10**300), st.integers(1, 10**6))
def test_a_fraction_keeps_its_value(numerator, denominator):
    value = Fraction(numerator, denominator)
    assert Fraction(canonical(value)) == value and canonical(-value) == "-" + canonical(value)
    small = numerator % 10**6 + 1
    assert Fraction(read_number(f"{small}/{denominator}")) == Fraction(small, denominator)
