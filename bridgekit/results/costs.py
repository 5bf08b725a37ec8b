"""What an answer costs, in tokens that the two models write one after the other, beside how often it is right.

    table = count_written([frame_1, frame_2, frame_3], "bridgekit/model/embedded_pair")     # for `plot_costs`

Written tokens decide how long an answer takes: each is a pass of its own, while a prompt and soft tokens are one pass
together. The count depends on no machine. What is counted: the target's own answer, and the source's where its text
is used (the relays and the router); a bridge reads the source's states of the prompt, for which nothing is written.
"""

from __future__ import annotations

import typing
from pathlib import Path

from bridgekit.results import verdict
from bridgekit.results.variants import pooled_accuracy

if typing.TYPE_CHECKING:
    import pandas as pd

WRITERS = {  # whose texts an answer needs: columns `<name>_full`, and the tokenizer of the model that writes them
    "source": {"source": "source"},
    "target": {"target": "target"},
    "target_told": {"target_told": "target"},
    "bridged": {"bridged": "target"},
    "relay_full": {"source": "source", "relay_full": "target"},
    "relay_cut": {"source": "source", "relay_cut": "target"},
    "relay_answer": {"source": "source", "relay_answer": "target"},
    "router": {"source": "source", "target": "target"},
}


def count_written(frames: list[pd.DataFrame], pair: str | Path) -> pd.DataFrame:
    """condition tokens accuracy low high n n_units, over the runs of several seeds, on held-out problems."""
    import pandas as pd
    from tokenizers import Tokenizer

    tokenizers = {who: Tokenizer.from_file(str(Path(pair) / who / "tokenizer.json")) for who in ("source", "target")}
    parts, rows = [verdict.select_subset(frame) for frame in frames], []
    lengths: dict[tuple[str, str], float] = {}
    for condition, texts in WRITERS.items():
        if not all(f"{condition}_correct" in part for part in parts):
            continue
        for text, who in texts.items():
            if (text, who) not in lengths:
                lengths[text, who] = _mean_length(tokenizers[who], [t for p in parts for t in p[f"{text}_full"]])
        share = pooled_accuracy(frames, "all", condition)
        rows.append({"condition": condition, "tokens": sum(lengths[key] for key in texts.items()),
                     "accuracy": share.point, "low": share.low, "high": share.high, "n": share.n,
                     "n_units": share.n_clusters})  # fmt: skip
    return pd.DataFrame(rows)


def _mean_length(tokenizer, texts: list[str]) -> float:
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return sum(len(one.ids) for one in encoded) / len(encoded)
