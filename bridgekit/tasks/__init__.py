"""Tasks: where the questions come from and which text each model reads. One file per task; no torch here."""

from bridgekit.config import Config
from bridgekit.tasks import gsm8k, units
from bridgekit.tasks.base import Example

__all__ = ["Example", "load_examples"]


def load_examples(config: Config, lexicon_seed: int | None, split: str, share: float | None = None) -> list[Example]:
    """The examples of a split; `share` overrides the training mix's share of source-only problems."""
    task = config.task
    if task.task == "gsm8k":
        return gsm8k.make_examples(task, split)
    lexicon = units.make_lexicon(lexicon_seed)
    if config.pair.direction == "swapped":
        lexicon = units.swap_roles(lexicon)
    if split == "train":
        share = task.source_only_share if share is None else share
        return units.make_examples(
            lexicon, "train", task.n_train, task.data_seed, share=share, variant=task.variant,
            n_facts=task.n_facts, train_units_share=task.train_units_share,
            train_values_share=task.train_values_share, vary_facts=task.vary_facts,
        )  # fmt: skip
    n = task.n_val if split == "val" else task.n_test
    options = dict(variant=task.variant, n_facts=task.n_facts)
    examples = units.make_examples(lexicon, split, n, task.data_seed, **options)
    if split == "test" and task.variant == "weights":
        shares = task.train_units_share, task.train_values_share
        seen = units.make_seen_examples(lexicon, max(n // 10, 8), task.data_seed, *shares)
        examples += seen
    return examples
