"""Keeping runs of either kind: a run of the first experiments becomes compact tables, one of this package is copied.

bridgekit preserve RUN            keep RUN in preserved_data/, add its manifest entry
bridgekit preserve --study NAME   pack the finished runs NAME_* of a runs folder into studies/NAME.tar.xz; with
                                  --add, put those that are not kept yet to those that are
bridgekit preserve --manifest     write preserved_data/README.md again from the entries
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import yaml

from bridgekit.audit.first_runs import PATH_KEYS, SETTINGS_AS_FACTS, Record, evaluation_files, load_run
from bridgekit.config import Parser
from bridgekit.results import preserve
from bridgekit.results.preserve import FIRST, ROOT, changed_files, compress_evaluation, find_runs, generation_of
from bridgekit.results.reports import ENTRY, describe_answers, render, write_entry
from bridgekit.runs import load_jsonl
from bridgekit.tasks.answers import RULES, extract_answer, truncate_followups


def keep_run(
    run: str | Path,
    root: str | Path = ROOT,
    name: str | None = None,
    max_jsonl_mb: float = 1.5,
    max_checkpoint_mb: float = 2.0,
) -> Path:
    """Keep one run; returns its folder. Texts of a larger JSONL, and larger checkpoint files, stay out."""
    if Path(run).is_dir() and generation_of(Path(run)) == "bridgekit":
        return preserve.preserve(Path(run), Path(root), name, max_jsonl_mb, max_checkpoint_mb)
    record = load_run(run, name)
    if record.generation == "derived":  # its tables are all there is of it: they are kept as they are
        if changed := changed_files(record.folder):
            raise ValueError(f"{run}: {', '.join(changed)} changed since this run was preserved; restore it first")
        return preserve.copy_kept(record.folder, Path(root) / FIRST, record.name)

    def fill(folder: Path) -> str:
        write_tables(record, folder)
        compress_evaluation(record.folder, folder, max_jsonl_mb, without_texts=False)
        return describe_first(folder)

    return preserve.keep_folder(record.folder, Path(root) / FIRST, record.name, fill)


def write_tables(record: Record, folder: Path) -> None:
    """Configuration, outcomes, curve, losses, and what only the full texts tell, as compact tables."""
    if record.outcomes.empty and record.losses.empty:
        raise ValueError(f"{record.folder}: neither evaluations nor losses could be read, so there is nothing to keep")
    settings = record.facts.get("settings_text") or {key: str(value) for key, value in record.config.items()}
    lines = settings | {key: record.facts.get(fact) for key, fact in SETTINGS_AS_FACTS.items()}
    text = "".join(f"{k}: {_quote(v)}\n" for k, v in lines.items() if v is not None and k not in PATH_KEYS)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    known = ("started", "ended", "saved_best", "stopped_at", "crashes")
    facts = {key: record.facts[key] for key in known if record.facts.get(key)} | {"problems": record.problems}
    (folder / "run.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    texts = load_texts(record.folder)
    tables = {"losses.csv": record.losses, "logged.csv": record.logged}
    tables |= {"rescored.csv": count_rescored(texts), "texts.csv": count_repeats(texts)}
    for name, table in tables.items():
        if len(table):
            table.to_csv(folder / name, index=False)
    if len(record.outcomes):
        compression = {"method": "gzip", "mtime": 0}
        record.outcomes.to_csv(folder / "outcomes.csv.gz", index=False, lineterminator="\n", compression=compression)
        record.curve.to_csv(folder / "curve.csv", index=False, float_format="%.4f")


def _quote(setting: object) -> object:
    """A logged setting as YAML takes it: text that would be YAML of its own in quotes."""
    try:
        whole = not isinstance(yaml.safe_load(f"key: {setting}")["key"], (dict, list))
    except yaml.YAMLError:
        whole = False
    return setting if whole else json.dumps(str(setting))


def load_texts(folder: Path) -> pd.DataFrame:
    """Answers of a run that have a text and a label: step condition text label gold question."""
    rows = [
        (step, key.removesuffix("_full"), text, row[label], row.get("gold_extracted"), str(row.get("question", "")))
        for step, path in evaluation_files(folder)
        if path.is_file() and path.resolve().is_relative_to(folder.resolve())
        for row in load_jsonl(path, [])
        for key, text in row.items()
        if key.endswith("_full") and isinstance(text, str) and (label := key.replace("_full", "_extracted")) in row
    ]
    rows = [[str(cell).encode("utf-8", "replace").decode() for cell in row] for row in rows]  # no halves of characters
    return pd.DataFrame(rows, columns=["step", "condition", "text", "label", "gold", "question"])


def count_rescored(texts: pd.DataFrame) -> pd.DataFrame:
    """Per step, condition and extraction rule: labels unlike the stored ones, and how many answers are right."""
    table = texts.merge(pd.Series(list(RULES), name="rule"), how="cross")
    label = pd.Series(map(extract_answer, table["text"], table["rule"]), dtype=object)
    stored, right = table["label"] == table["gold"], label == table["gold"]
    counts = {"n": 1, "moved": label != table["label"], "right_stored": stored, "right": right}
    counts |= {"to_right": right & ~stored, "to_wrong": stored & ~right}
    return table.assign(**counts).groupby(["step", "condition", "rule"], sort=False)[list(counts)].sum().reset_index()


def count_repeats(texts: pd.DataFrame) -> pd.DataFrame:
    """Per step and condition: texts that begin by repeating the question, and texts that invent a further one."""
    # the first 60 characters of the question asked, after the worked examples of a few-shot prompt
    asked = [" ".join(q.rsplit("Q:", 1)[-1].split("\nA:")[0].split())[:60] for q in texts["question"]]
    opening = [" ".join(text.removeprefix("Q:").split()) for text in texts["text"]]
    repeats = [bool(start) and text.startswith(start) for start, text in zip(asked, opening, strict=True)]
    invents = texts["text"].map(truncate_followups) != texts["text"]
    counts = {"n": 1, "repeats_question": repeats, "invents_question": invents}
    return texts.assign(**counts).groupby(["step", "condition"], sort=False)[list(counts)].sum().reset_index()


def describe_first(folder: Path) -> str:
    """The metrics of a kept run's manifest entry, in Markdown."""
    record = load_run(folder)
    last, curve = record.steps[-1:], record.curve
    where = "final evaluation" if last == ["final"] else f"last evaluation (step {''.join(last)}; no final one)"
    answers = describe_answers(record.last, where) if last else ""
    numbered = curve[curve["step"] != "final"]
    return render("first_metrics.md.j2", answers=answers, numbered=numbered, **vars(record))


def write_manifest(root: str | Path = ROOT, blocks: dict[str, str] | None = None) -> Path:
    """Bring every entry and the README of `root` up to date; `blocks` are further generated blocks."""
    Path(root).mkdir(parents=True, exist_ok=True)
    for folder in find_runs(root):
        if generation_of(folder) != "bridgekit":
            with preserve.warned(folder):
                write_entry(folder, describe_first(folder))
    return preserve.write_manifest(root, blocks)


def main(argv: list[str] | None = None) -> int:
    """The `bridgekit preserve` verb."""
    parser = Parser(prog="bridgekit preserve", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folder, or a folder of run folders")
    parser.add_argument("--root", default=str(ROOT), help="where runs are kept (default: %(default)s)")
    parser.add_argument("--name", help="keep a single run under this name")
    parser.add_argument("--max-jsonl-mb", type=float, default=1.5, help="limit of the compressed final JSONL")
    parser.add_argument("--max-checkpoint-mb", type=float, default=2.0, help="limit of a checkpoint file")
    parser.add_argument("--study", help="pack the finished runs of this study into one file")
    parser.add_argument("--add", action="store_true", help="the study is kept already: put the runs that are new to it")
    parser.add_argument("--runs-dir", default="runs", help="where the study's runs are (default: %(default)s)")
    parser.add_argument("--manifest", action="store_true", help="only write the manifest again")
    args = parser.parse_args(argv)
    if not args.runs and not args.manifest and not args.study:
        parser.error("name a RUN, a --study, or ask for --manifest")
    if args.study:
        path = preserve.keep_study(args.runs_dir, args.study, Path(args.root) / "studies", args.add)
        print(f"kept {path} ({path.stat().st_size / 1e6:.2f} MB)")
        return 0
    folders = [folder for run in args.runs for folder in find_runs(run) or [Path(run)]]
    if args.name and len(folders) > 1:
        raise ValueError(f"--name is for one run; {args.runs[0]} holds {len(folders)}")
    failed, n_kept = 0, 0
    for folder in folders:
        try:
            kept = keep_run(folder, args.root, args.name, args.max_jsonl_mb, args.max_checkpoint_mb)
            n_kept += 1
            print(f"kept {kept}; now fill in the why and the publishability in {kept / ENTRY}")
        except (ValueError, OSError) as error:
            failed = 2
            print(f"error: {error}", file=sys.stderr)
    if n_kept or args.manifest:
        print(f"manifest: {write_manifest(args.root)}")
    return failed
