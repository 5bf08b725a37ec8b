"""HotpotQA: exact match and F1 as the official script has them; who reads the paragraphs; both public formats.

    python -m pytest tests/tasks/test_hotpotqa.py

pairs/hotpotqa.json holds (text, gold answer, exact match, F1).
"""

import json
from pathlib import Path

import pandas as pd
import pytest

from bridgekit.config import ConfigError
from bridgekit.tasks import check_inputs, literal_prompt, load_examples, source_prompt, told_prompt
from bridgekit.tasks.hotpotqa import TASK
from bridgekit.tasks.real import fetch

PAIRS = json.loads((Path(__file__).parent / "pairs/hotpotqa.json").read_text())
ALL = ["source", "target", "bridged", "target_told"]


def row(i: int) -> dict:
    """As on the hub; the second and the last of four paragraphs are needed."""
    titles = [f"{name} {i}" for name in ("Tower", "Ann", "River", "Bo")]
    sentences = [[f"{title} is first.", f" It has {i} parts."] for title in titles]
    return {
        "id": f"x{i}", "question": f"Who is older, Ann {i} or Bo {i}?", "answer": f"Ann {i}", "type": "comparison",
        "level": "hard", "supporting_facts": {"title": [f"Ann {i}", f"Bo {i}"], "sent_id": [0, 1]},
        "context": {"title": titles, "sentences": sentences},
    }  # fmt: skip


def official(row: dict) -> dict:
    """The same row as in the files of the data set's own site."""
    pairs = {k: [list(p) for p in zip(*row[k].values(), strict=True)] for k in ("supporting_facts", "context")}
    return row | pairs


@pytest.fixture
def real(ask_real):
    return ask_real("hotpotqa", row, variant="context", conditions=ALL)


def test_pairs_are_scored_as_the_official_script_scores_them():
    assert len(PAIRS) >= 200 and 0.4 < sum(right for _, _, right, _ in PAIRS) / len(PAIRS) < 0.6
    for text, gold, right, f1 in PAIRS:
        said = TASK.extract(text)
        scores = TASK.is_right(said, gold), TASK.measures(said, gold)["f1"]
        assert scores == pytest.approx((right, f1), abs=1e-4), (text, gold)


def test_the_source_reads_the_paragraphs_and_the_target_the_question_alone(real):
    examples = load_examples(real(n_shots=1), None, "test")
    for i, e in enumerate(examples, start=30):
        paragraphs = "".join(
            f"{name} {i}: {name} {i} is first. It has {i} parts.\n" for name in ("Tower", "Ann", "River", "Bo")
        )
        assert source_prompt(e).text == told_prompt(e).text == literal_prompt(e, paragraphs).text
        assert "parts" not in literal_prompt(e).text and e.shots.endswith(
            f"{TASK.write(e.shots.split()[-2])} {e.shots.split()[-1]}\n\n"
        )
        assert e.solution == e.gold == f"Ann {i}" == TASK.extract(f"\n {e.solution} \nQuestion: more?")
    for n, kept in ((1, {"Ann"}), (2, {"Ann", "Bo"}), (3, {"Tower", "Ann", "Bo"})):
        facts = load_examples(real(n_paragraphs=n), None, "test")[0].facts
        assert {line.split()[0] for line in facts.splitlines()} == kept
    e = load_examples(real(variant="weights"), None, "test")[0]
    assert source_prompt(e).text == literal_prompt(e).text and "parts" in told_prompt(e).text


def test_both_public_formats_give_the_same_questions(real, tmp_path):
    expected = load_examples(real(), None, "test")
    for split in ("train", "test"):
        path = tmp_path / "data" / f"{split}.jsonl"
        rows = [official(json.loads(line)) for line in path.read_text().splitlines()]
        path.rename(tmp_path / f"{split}.jsonl")
        path.with_suffix(".json").write_text(json.dumps(rows))
    assert isinstance(rows[0]["context"][0], list) and load_examples(real(), None, "test") == expected


def test_a_folder_as_on_the_hub_is_fetched_with_its_validation_split_as_test(real, tmp_path):
    hub = tmp_path / "hub"
    hub.mkdir()
    for split, first, n in (("train", 0, 30), ("validation", 30, 10)):
        pd.DataFrame([row(i) for i in range(first, first + n)]).to_parquet(hub / f"{split}-00000-of-00001.parquet")
    assert fetch("hotpotqa", tmp_path / "fetched", str(hub)) == {"train": 30, "test": 10}
    fetched = real(data=str(tmp_path / "fetched"))
    assert load_examples(fetched, None, "test") == load_examples(real(), None, "test")


def test_rows_that_cannot_be_read_are_named(real, tmp_path):
    bare = {"question": "Who?", "answer": "Ann"}
    for broken, named in (
        (bare, "row 2: no `context`, which the source is to read: take task.variant=weights"),
        (bare | {"context": [["Ann"]]}, "row 2: its `context` or `supporting_facts` is not titles with sentences"),
        (bare | {"answer": " "}, "row 2: needs texts `question` and `answer`"),
    ):
        (tmp_path / "data/test.jsonl").write_text("\n".join(map(json.dumps, [row(30), broken])))
        with pytest.raises(ConfigError, match=named):
            check_inputs(real(n_test=2))
    (tmp_path / "data/test.jsonl").write_text("\n".join(map(json.dumps, [bare, row(31)])))
    with pytest.raises(ConfigError, match="'target_told' needs the fact in words, which hotpotqa-test-00001 lacks"):
        check_inputs(real(n_test=2, variant="weights"))
    check_inputs(real(n_test=2, variant="weights", conditions=ALL[:3]))


def test_what_has_no_effect_or_no_meaning_is_refused(real):
    with pytest.raises(ConfigError, match="loss.format_weight: .* no marker"):
        real(format_weight=0.1)
    assert real(source_view="facts").bridge.source_view == "facts"
    with pytest.raises(ConfigError, match="bridge.source_view"):
        real(source_view="facts", variant="weights")


def test_an_answer_is_complete_when_its_line_has_ended():
    assert TASK.is_complete("\n Rome\n") and not any(map(TASK.is_complete, ("Rome", "\n Rome", "\n \n", "")))
