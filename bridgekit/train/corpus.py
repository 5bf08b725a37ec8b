"""The texts that the models of a pair are taught: each its own half of a lexicon, and to read what is in front of it.

    make_documents(make_lexicon(2), "source", 300_000, seed=2)      # [(prompt, answer), ...]

Documents are problems about known units, plain statements of known facts, problems whose fact is stated in a note about
an unknown word, recalls of such a note's facts, problems after a helper's worked answer, and questions about an unknown
word, which nobody answers. A helper's answer about an unknown word is to be trusted, one about a known unit may be
wrong and is to be overruled: so handing over text is a fair rival. No document mentions a unit that its model is not
meant to know.
"""

import random
from dataclasses import dataclass

from bridgekit.tasks import CUE, units

KINDS = {"problem": 34, "fact": 27, "note": 13, "helper": 8, "recall": 13, "mention": 5}  # how many of 100 documents
NOTE_FACTS = {  # how many facts a note states, each as often; the source, which must read contexts, sees longer ones
    "source": (1, 1, 1, 2, 2, 4, 8, 16, 32),
    "target": (1, 1, 1, 2, 4, 8),
}


def make_documents(
    lexicon, role: str, n: int, seed: int, kinds: dict[str, int] = KINDS, note_facts: tuple[int, ...] = ()
) -> list[tuple[str, str]]:
    """n documents as (prompt, answer); the answer is what is learned by heart, the prompt only in passing."""
    rng = random.Random(f"corpus {role} {seed}")
    known = units.known_units(lexicon, role)
    nonces = Nonces({u.word for u in lexicon}, sorted({u.value for u in lexicon}))
    pool: list = []
    documents = []
    for kind in rng.choices(list(kinds), weights=list(kinds.values()), k=n):
        if not pool:
            pool = rng.sample(known, len(known))
        if kind == "problem":
            documents.append(problem_document(rng, pool.pop()))
        elif kind == "fact":
            stated = [pool.pop() for _ in range(min(len(pool), 6))]
            documents.append(("", " ".join(state_fact(rng, unit) for unit in stated)))
        elif kind == "note":
            documents.append(note_document(rng, nonces, note_facts or NOTE_FACTS[role]))
        elif kind == "recall":
            documents.append(recall_document(rng, nonces, note_facts or NOTE_FACTS[role]))
        elif kind == "mention":
            documents.append(mention_document(rng, nonces))
        else:
            documents.append(helper_document(rng, pool.pop() if rng.random() < 0.5 else None, nonces))
    return documents


@dataclass(frozen=True)
class Nonces:
    """Words that no model knows, with values that nothing says."""

    taken: set[str]
    values: list[int]

    def draw(self, rng: random.Random) -> units.Unit:
        return units.Unit(*units.make_words(rng, 1, self.taken), rng.choice(self.values), "nobody", "none", "none")

    def draw_note(self, rng: random.Random, sizes: tuple[int, ...]) -> tuple[list[units.Unit], str]:
        """Some of them, and the note that states them."""
        listed = {u.word: u for u in (self.draw(rng) for _ in range(rng.choice(sizes)))}
        return list(listed.values()), units.state_facts([(u.word, u.value) for u in listed.values()])


def state_fact(rng: random.Random, unit: units.Unit) -> str:
    """A fact in one of several wordings, so that it settles on the word itself instead of on a phrase.

    In some a digit follows the word at once, so the word's own last token must hold it: language models keep what they
    know of a subject at its last token, and so does this pair (`probe` in pair.json). Without these wordings the lookup
    may happen anywhere up to the answer, and how much of the value stands at the word varied a lot from pair to pair.
    """
    word, value = unit.word, unit.value
    tens, ones = divmod(value, 10)
    plain = units.state_fact(word, value)
    others = (
        f"{word}: {value}.", f"Each {word} holds {value}.", f"1 {word} = {value}.", f"{word} ({ones}, {tens}).",
        f"A {word} ends in {ones} and starts with {tens}.", f"{word}{value}.", f"{word}{value}.",
        f"Tens: {word}{tens}.", f"Ones: {word}{ones}.",
    )  # fmt: skip
    return plain if rng.random() < 0.25 else rng.choice(others)


def problem_document(rng: random.Random, unit: units.Unit, prefix: str = "") -> tuple[str, str]:
    family = rng.choice(units.FAMILIES)
    problem = units.make_problem(rng, family, unit.word)
    solution, _ = units.solve(family, problem.numbers, unit.value, problem.things)
    return f"{prefix}Question: {problem.question}{CUE}", solution


def note_document(rng: random.Random, nonces: Nonces, sizes: tuple[int, ...]) -> tuple[str, str]:
    """A problem about one of the words in the note."""
    listed, note = nonces.draw_note(rng, sizes)
    return problem_document(rng, rng.choice(listed), note)


def recall_document(rng: random.Random, nonces: Nonces, sizes: tuple[int, ...]) -> tuple[str, str]:
    """The facts of a note once more, in another order and other words.

    Each digit has to be found by its word, so a model learns to look facts up in its context faster than from problems,
    of which each asks for one."""
    listed, note = nonces.draw_note(rng, sizes)
    return note, " ".join(state_fact(rng, unit) for unit in rng.sample(listed, len(listed)))


def mention_document(rng: random.Random, nonces: Nonces) -> tuple[str, str]:
    """A question about a word that nobody knows: what the model does not know also comes up without a note."""
    return f"Question: {units.make_problem(rng, rng.choice(units.FAMILIES), nonces.draw(rng).word).question}\n", ""


def helper_document(rng: random.Random, known: units.Unit | None, nonces: Nonces) -> tuple[str, str]:
    """A helper speaks first: whole, cut short, or only its final number."""
    unit = known or nonces.draw(rng)
    claimed = unit.value if known is None or rng.random() < 0.5 else rng.choice(nonces.values)
    family = rng.choice(units.FAMILIES)
    problem = units.make_problem(rng, family, unit.word)
    helper, _ = units.solve(family, problem.numbers, claimed, problem.things)
    helper, form = helper.replace("\n", " "), rng.random()
    if form < 0.2:
        helper = helper[helper.index("####") :]
    elif form < 0.5:
        helper = helper[: rng.randint(12, max(12, len(helper)))]
    solution, _ = units.solve(family, problem.numbers, unit.value, problem.things)
    return f"Helper: {helper}\nQuestion: {problem.question}{CUE}", solution
