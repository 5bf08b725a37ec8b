"""What stands under each figure of notebooks/diagnostics.ipynb, computed from the frame that was drawn.

print(read_causal(causal_table(frame)))
"""

from __future__ import annotations

import typing

from bridgekit.results.style import LABELS, SUBSET_LABELS

if typing.TYPE_CHECKING:
    import pandas as pd

NO_CONSTANT = (
    "The run kept no `checkpoint/constant.safetensors`, so the trained constant, which should follow nobody, is not "
    "asked here."
)


def read_opening(opened) -> str:
    """Which run this is, and what of it can be looked at."""
    bridge, facts = opened.config.bridge, opened.bridges["bridged"]
    text = (
        f"`{opened.run.name}`: {bridge.producer} \N{MULTIPLICATION SIGN} {bridge.injector}, "
        f"{facts.n_parameters:,} parameters, direction {opened.config.pair.direction}, source layers "
        f"{', '.join(map(str, opened.evaluator.layers))} of {opened.pair.source.n_layers}; trained on this very pair "
        f"(fingerprints {opened.pair.source.fingerprint} and {opened.pair.target.fingerprint})."
    )
    return text if "constant" in opened.bridges else f"{text} {NO_CONSTANT}"


def read_attention_classes(table: pd.DataFrame | None) -> str:
    if table is None:
        return "This bridge attends to no source token: there is nothing to average."
    rows = table.set_index("token_class")
    first = rows["share"].idxmax()
    parts = [f"{name} {_of(row, 'share')}, {row['share'] / row['uniform']:.1f} times its share of the tokens"
             for name, row in rows.iterrows() if row["uniform"] > 0]  # fmt: skip
    size = f"{rows['n'].iloc[0]:,} problems about {rows['n_units'].iloc[0]:,} units"
    return f"Over {size} most of the attention goes to the {first}. Shares: {'; '.join(parts)}."


def read_gates(frame: pd.DataFrame, injector: str) -> str:
    """Where each gate ended; a bridge of soft tokens has none, and an old log may not hold them."""
    if frame.empty and injector == "prefix":
        return "No gates: this bridge puts soft tokens into the prompt (`prefix`) and changes nothing in the target."
    if frame.empty:
        return f"metrics.jsonl holds no gates of this `{injector}` bridge: it was written before they were logged."
    ends = frame.sort_values("step").groupby("gate", sort=False)["value"].last()
    widest = ends.abs().idxmax()
    listed = ", ".join(f"{name} {value:+.3f}" for name, value in ends.items())
    return (
        f"At step {frame['step'].max():,}, the last logged, {widest} is furthest open: {listed}. "
        "One run, so without interval."
    )


def read_sizes(table: pd.DataFrame, rms_match: bool) -> str:
    low, high, whole = table["rms"].min(), table["rms"].max(), table["table_rms"].iloc[0]
    why = " `rms_match` makes it so." if rms_match else " Their size was left free."
    most, least = table.loc[table["varying"].idxmax()], table.loc[table["varying"].idxmin()]
    return (
        f"Over {table['n'].iloc[0]:,} problems about {table['n_units'].iloc[0]:,} units the soft tokens have an RMS of "
        f"{low:.3f} to {high:.3f}, the embedding table {whole:.3f}.{why} Soft token {most['soft_token']:.0f} varies "
        f"most with the question ({_of(most, 'varying', 'varying_low', 'varying_high')} of its squared length), "
        f"{least['soft_token']:.0f} least ({_of(least, 'varying', 'varying_low', 'varying_high')})."
    )


def format_neighbours(frame: pd.DataFrame, max_soft_tokens: int = 16) -> str:
    """A Markdown table: a row for each soft token, a column for each example, its nearest tokens with the cosine."""
    shown = frame[frame["soft_token"] <= max_soft_tokens]
    cells: dict[tuple, list[str]] = {}
    for row in shown.itertuples():
        token = repr(row.token)[1:-1].replace("|", "&#124;").replace("`", "&#96;").replace("$", "&#36;")
        cells.setdefault((row.soft_token, row.id), []).append(f"<code>{token}</code> {row.cosine:.2f}")
    examples = frame.drop_duplicates("id")
    head = ["soft token", *(f"{e.unit} = {e.value:.0f}" if e.unit else e.id for e in examples.itertuples())]
    rows = [[str(i), *("<br>".join(cells.get((i, e), ["\N{EN DASH}"])) for e in examples["id"])]
            for i in sorted(shown["soft_token"].unique())]  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))


def read_neighbours(frame: pd.DataFrame) -> str:
    from bridgekit.inside.measure import clustered_mean

    nearest = frame[frame["rank"] == 1]
    mean = clustered_mean(nearest["cosine"], nearest["unit"].fillna(nearest["id"]))
    digits = nearest["token"].str.strip().str.isdigit().mean()
    return (
        f"The nearest vocabulary token has a cosine of {mean.point:.3f} [{mean.low:.3f}, {mean.high:.3f}] "
        f"({mean.n:,} soft tokens of {nearest['id'].nunique():,} problems about {mean.n_clusters:,} units); a random "
        f"direction finds {frame['chance'].iloc[0]:.3f}. {digits:.0%} of the nearest tokens are digits."
    )


def read_entropy(table: pd.DataFrame) -> str:
    """The most that is open at the first token, and for each group what the bridge changes where the value is said."""
    first = table[table["place"] == "first token"]
    most, least = first.loc[first["entropy"].idxmax()], first.loc[first["right_probability"].idxmin()]
    parts = [
        f"- At the first answer token the entropy is at most {_of(most, 'entropy')} bits ({LABELS[most['condition']]}, "
        f"{_group(most['group'])}, n = {most['n']:,}), and the right token has at least "
        f"{_of(least, 'right_probability', 'right_low', 'right_high')}."
    ]
    for group in dict.fromkeys(table["group"]):
        rows = table[(table["place"] == "value") & (table["group"] == group)].set_index("condition")
        if {"target", "bridged"} <= set(rows.index):
            alone, bridged = rows.loc["target"], rows.loc["bridged"]
            parts.append(
                f"- Where the unit's value begins, {_group(group)} (n = {bridged['n']:,}, {bridged['n_units']:,} "
                f"units): entropy {_of(alone, 'entropy')} bits alone, {_of(bridged, 'entropy')} bridged; the right "
                f"digit has {_of(alone, 'right_probability', 'right_low', 'right_high')} alone and "
                f"{_of(bridged, 'right_probability', 'right_low', 'right_high')} bridged."
            )
    return "\n".join(parts)


def read_cka(table: pd.DataFrame) -> str:
    """What the message is most like, and how much it is like the digits of the value."""
    pairs = [(r.b if r.a == "soft tokens" else r.a, r) for r in table.itertuples() if "soft tokens" in (r.a, r.b)]
    if not pairs:
        return "There are no soft tokens to compare."
    name, best = max(pairs, key=lambda p: p[1].cka)
    text = (
        f"Over {best.n:,} problems about {best.n_units:,} units the soft tokens are most like *{name}*: CKA "
        f"{best.cka:.3f} [{best.low:.3f}, {best.high:.3f}]."
    )
    for other, row in pairs:
        if other.startswith(("target embeddings", "digits")) and other != name:
            text += f" With {other} it is {row.cka:.3f} [{row.low:.3f}, {row.high:.3f}]."
    return text


def read_probe(frame: pd.DataFrame, layers: tuple[int, ...]) -> str:
    """Where both digits are best read, for units and for values the probe never saw, and what the bridge reads."""
    parts = []
    joint = frame[frame["digit"] == "joint"]
    for novelty, label in (("held_unit", "units"), ("held_value", "units of a value")):
        rows = joint[joint["novelty"] == novelty]
        if rows.empty:
            continue
        best = rows.loc[rows["accuracy"].idxmax()]
        text = (
            f"Of {best['n']:,} {label} that the probe never saw both digits are read best in layer {best['layer']}, at "
            f"the {best['place']}: {_of(best, 'accuracy')}, the best of {len(rows)} cells."
        )
        read = rows[(rows["place"] == best["place"]) & rows["layer"].isin(layers)]
        used = [f"{_of(row, 'accuracy')} in layer {row['layer']}" for _, row in read.iterrows()]
        parts.append(f"{text} The layers that this bridge reads have {' and '.join(used)}." if used else text)
    control = joint[joint["novelty"] == "not taught"]
    if len(control):
        worst = control.loc[control["accuracy"].idxmax()]
        parts.append(f"Of {worst['n']:,} units the source was never taught: at most {_of(worst, 'accuracy')} anywhere.")
    return " ".join(parts)


def read_message_probe(frame: pd.DataFrame) -> str:
    joint = frame[frame["digit"] == "joint"].set_index("novelty")
    labels = (("held_unit", "held-out units"), ("held_value", "units of a held-out value"))
    parts = [f"{_of(joint.loc[name], 'accuracy')} of {joint.loc[name, 'n']:,} {label}" for name, label in labels
             if name in joint.index]  # fmt: skip
    return f"From the message itself the same probe reads both digits of {' and of '.join(parts)}."


def read_causal(table: pd.DataFrame) -> str:
    """How often the answer is the donor's, for each bridge; and where the donor's states must stand for that."""
    parts = []
    for condition in dict.fromkeys(table["condition"]):
        rows = table[(table["condition"] == condition) & (table["outcome"] == "follows")].set_index("variant")
        whole, chance = rows.loc["whole prompt"], rows.loc["nowhere"]
        text = (
            f"**{LABELS[condition].capitalize()}** (n = {whole['n']:,} problems about {whole['n_units']:,} units): "
            f"with the donor's states in the whole prompt {_of(whole, 'share')} of the answers are the donor's, "
            f"with its own {_of(chance, 'share')}."
        )
        for variant, label in (("unit word", "at the unit's word alone"), ("all but the word", "everywhere else")):
            if variant in rows.index:
                text += f" With the donor's states {label}: {_of(rows.loc[variant], 'share')}."
        parts.append(text)
    if "constant" not in set(table["condition"]):
        parts.append(NO_CONSTANT)
    return "\n\n".join(parts)


def _group(group: str) -> str:
    return SUBSET_LABELS.get(group, group).replace("\n", " ")


def _of(row, value: str, low: str = "low", high: str = "high") -> str:
    return f"{row[value]:.3f} [{row[low]:.3f}, {row[high]:.3f}]"
