"""What soft tokens are taught to be where one message must hold several facts: the target's own note of them, folded.

    rows = note_facts(target, examples, 16)     # of each example: (token, the soft token that holds it), ...

With the tokens' own embeddings as its message, the embedded target reads a note as well as in its context without `A`
and `is`, hardly without `Note:` or the full stops, and not at all without the space before a value. A soft token may
hold several tokens as the sum of their embeddings: least is lost with a full stop. A bridge learns the sum of a word's
tokens far later than its first token alone, so a word that has no room loses its end.
"""

from bisect import bisect_right

from bridgekit.model.pair import LanguageModel, tokens_at
from bridgekit.tasks import Example
from bridgekit.tasks.units import NOTE, state_fact


def note_facts(lm: LanguageModel, examples: list[Example], n_soft_tokens: int) -> list[list[tuple[int, int]]]:
    """The first soft token holds `Note:`, each fact has an equal stretch of the others."""
    rows, texts = [], [e.facts.strip() for e in examples]
    for e, text, ids, offsets in zip(examples, texts, *lm.locate(texts), strict=True):
        k, n, end = len(ids) if n_soft_tokens == -1 else n_soft_tokens, len(e.fact_pairs), 0
        held = dict.fromkeys(tokens_at(offsets, 0, len(NOTE)), 0)
        for i, (word, value) in enumerate(e.fact_pairs):
            begin = text.index(state_fact(word, value), end)
            end = begin + len(state_fact(word, value))
            word_at = text.index(word, begin)
            spans = (begin, end), (word_at, word_at + len(word)), (end - len(f" {value}."), end)
            first, after = (1 + j * (k - 1) // n for j in (i, i + 1))
            kept, starts = fold(*(tokens_at(offsets, *span) for span in spans), after - first)
            held |= {token: min(first + bisect_right(starts, token), k - 1) for token in kept}
        rows.append([(ids[token], place) for token, place in held.items()])
    return rows


def fold(whole: list[int], word: list[int], value: list[int], room: int) -> tuple[list[int], list[int]]:
    """Which tokens of a fact are kept, and at which of them a further soft token begins."""
    others = [token for token in whole if token not in {*word, *value}]
    word = word[: max(1, room - len(value) + 1)]  # the full stop stands with the last digit
    spare = max(0, room - len(word) - len(value))
    kept = sorted([*word, *value, *(others[-spare:] if spare else [])])
    order = dict.fromkeys([value[0], *value[-2:-1], *value[:-1], *word, *value[-1:], *kept])  # what to part first
    return kept, sorted([token for token in order if token in kept[1:]][: max(0, room - 1)])
