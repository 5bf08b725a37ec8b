"""What does the target read of a note of several facts, if the note's own embeddings are its message? No bridge.

    python tests/train/read_notes.py     # writes preserved_data/benchmarks/notes.json; minutes on a CPU

First the note as a text, whole or without some of it; then fitted to soft tokens as `bridge.teacher=facts` teaches it
(`bridgekit/train/notes.py`). Validation problems of the embedded pair.
"""

import argparse
import json
from pathlib import Path

import torch

from bridgekit.config import load_config
from bridgekit.model.generation import generate_batch
from bridgekit.model.losses import gather_places
from bridgekit.model.message import Message
from bridgekit.model.pair import pad_ids, split_prompts
from bridgekit.tasks import literal_prompt
from bridgekit.train.data import split_target
from bridgekit.train.experiment import Experiment
from bridgekit.train.notes import note_facts

TEXTS = {
    "whole": lambda facts: facts,
    "without A and is": lambda facts: facts.replace(" A ", " ").replace(" is ", " "),
    "without Note:": lambda facts: facts.removeprefix("Note:"),
    "without full stops": lambda facts: facts.replace(".", ""),
    "without the space before a value": lambda facts: facts.replace(" is ", " is").replace(" A ", " "),
}
FOLDED = {2: (16,), 4: (16, 24, 32), 8: (32, 64)}  # {facts: soft tokens}
OUT = Path(__file__).parents[2] / "preserved_data" / "benchmarks" / "notes.json"


def read(n_facts: int, n: int) -> list[dict]:
    """A row for each text and each number of soft tokens: how many of n problems the target then has right."""
    facts = dict(variant="context", n_facts=n_facts, source_view="facts", n_train=1, n_val=n, val_samples=n)
    experiment = Experiment(load_config(**facts, controls=[]))
    target, task, examples = experiment.pair.target, experiment.task, experiment.examples("val")
    pieces = split_prompts(target, [literal_prompt(e) for e in examples])
    shared, before, after = split_target(experiment.config, target, pieces, "soft_plus_text")
    messages = {}
    for name, change in TEXTS.items() if n_facts > 2 else ():
        ids, mask = pad_ids(target.tokenize([change(e.facts.strip()) for e in examples]), target.device)
        messages["text", name] = Message(target.embed(ids), mask)
    for k in FOLDED[n_facts]:
        rows = [list(zip(*row, strict=True)) for row in note_facts(target, examples, k)]
        (ids, mask), (places, _) = (pad_ids([list(row[i]) for row in rows], target.device) for i in (0, 1))
        messages["folded", f"{k} soft tokens"] = Message(*gather_places(target.embed(ids), mask, places))
    injector, found = experiment.build_bridge().injector, []
    for (kind, name), message in messages.items():
        said = generate_batch(target, before, after, message, injector, is_complete=task.is_complete, shared=shared)
        right = sum(task.is_right(task.extract(g.text), e.gold) for g, e in zip(said, examples, strict=True))
        tokens = message.mask.sum().item() / n
        found.append({"facts": n_facts, kind: name, "tokens": round(tokens, 1), "right": right, "n": n})
        print(json.dumps(found[-1]), flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=400, help="problems (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    with torch.no_grad():
        rows = [row for n_facts in FOLDED for row in read(n_facts, args.n)]
    args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
