"""Several wordings a question, none of which uses the words that give the supporting passage away.

The passages of the ``ghr`` slice are worded alike ("X: inheritance. X is inherited in an autosomal recessive pattern
..."), so a question in the same words is answered by string matching. The wordings here avoid every word that is both
frequent in one kind of passage and rare in the others (:func:`telltale_words`; a test holds them to it): what they
mean has to be learned. The wordings for testing are never trained on; they are new sentences made mostly of words that
the training wordings hold, because a model trained from scratch knows no others.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jmlr.data.corpus import Passage
from jmlr.data.questions import Question

WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "inheritance": {
        "train": (
            "Mode of transmission for {name}?",
            "In what way is {name} handed down to the next generation?",
            "How would a relative come to have {name}?",
            "Which kind of Mendelian trait is {name}?",
            "{name}: how does it travel through a pedigree?",
            "Tell me the hereditary type of {name}.",
            "How is {name} passed along to offspring?",
            "What should kin of somebody with {name} know about transmission?",
        ),
        "test": (
            "What is the hereditary mode of {name}?",
            "How does {name} descend through a pedigree?",
            "In which way would offspring come to have {name}?",
        ),
    },
    "gene": {
        "train": (
            "Which locus lies behind {name}?",
            "What would sequencing of the genome reveal in {name}?",
            "Which symbol belongs on a laboratory report for {name}?",
            "Name the locus to sequence in somebody with {name}.",
            "A defect of what gives rise to {name}?",
            "Where in the genome does {name} have its origin?",
            "What is broken at the molecular level in {name}?",
            "Which variant would a laboratory look for in {name}?",
        ),
        "test": (
            "Which locus would a laboratory sequence in somebody with {name}?",
            "What lies at the molecular origin of {name}?",
            "Which stretch of the genome is to blame for {name}?",
        ),
    },
}
"""Question kind -> "train" or "test" -> sentences with ``{name}``."""

FUNCTION_WORDS = frozenset(
    """a about an and are as at be by can do does for from had has have how in into is it its no not of on or she he
    that the their them they these this those to was were what when where which who will with would""".split()
)
"""Words that carry no topic."""

Names = Literal["title", "synonyms", "all"]


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits."""
    return re.findall(r"[^\W_]+", text.lower())


def telltale_words(groups: Sequence[Iterable[str]], *, frequent: float = 0.05, share: float = 0.6) -> list[set[str]]:
    """The words that give each group of texts away.

    Args:
        groups: texts by kind, as many of each kind.
        frequent: the least share of a group's texts that hold the word.
        share: the least share, of all texts holding the word, that are of this group.

    Returns:
        For each group its words, without :data:`FUNCTION_WORDS`.
    """
    counts, sizes = [], []
    for group in groups:
        texts = list(group)
        sizes.append(len(texts))
        counts.append(Counter(word for text in texts for word in set(words(text))))
    return [
        {
            word
            for word, count in own.items()
            if word not in FUNCTION_WORDS
            and count >= frequent * size
            and count >= share * sum(other[word] for other in counts)
        }
        for own, size in zip(counts, sizes, strict=True)
    ]


def usable_synonyms(question: Question, passages: Iterable[Passage], *, max_words: int = 10) -> tuple[str, ...]:
    """The synonyms of a question's condition by which its passages can be found at all.

    A synonym is left out when nothing connects it with the texts (no content word shared with the passages' title, and
    not all of its content words in the passages), when it is longer than ``max_words`` words, when it is also a name of
    another condition, or when it holds a word of an option (:func:`gives_away`). Words in more than 2 % of the titles
    (syndrome, disease, type) are not content words.
    """
    return with_usable_synonyms([question], passages, max_words=max_words)[0].synonyms


def with_usable_synonyms(
    questions: Iterable[Question], passages: Iterable[Passage], *, max_words: int = 10
) -> list[Question]:
    """The questions with only their usable synonyms, see :func:`usable_synonyms`."""
    questions = list(questions)
    names = _Names.of(passages)
    owners: dict[str, set[str]] = {}
    for question in questions:
        for synonym in question.synonyms:
            owners.setdefault(_normal(synonym), set()).add(question.condition)
    result = []
    for question in questions:
        kept: dict[str, str] = {}
        for synonym in question.synonyms:
            key = _normal(synonym)
            ambiguous = len(owners[key]) > 1 or key in names.titles
            short = 0 < len(words(synonym)) <= max_words
            if short and not ambiguous and not gives_away(synonym, question) and names.connects(question, synonym):
                kept.setdefault(key, synonym)
        result.append(replace(question, synonyms=tuple(kept.values())))
    return result


def gives_away(name: str, question: Question) -> bool:
    """Whether a name holds a word of the options: "X-linked Ohdo syndrome" answers how it is inherited."""
    telling = {word for option in question.options for word in words(option) if len(word) > 1} - FUNCTION_WORDS
    return not telling.isdisjoint(words(name))


@dataclass(frozen=True)
class _Names:
    titles: frozenset[str]
    generic: frozenset[str]
    title_of: dict[str, str]
    vocabulary: dict[str, set[str]]  # title -> the words of all its passages

    @classmethod
    def of(cls, passages: Iterable[Passage]) -> _Names:
        title_of: dict[str, str] = {}
        vocabulary: dict[str, set[str]] = {}
        for passage in passages:
            title_of[passage.id] = passage.title
            vocabulary.setdefault(passage.title, set()).update(words(passage.text))
        counts = Counter(word for title in vocabulary for word in set(words(title)))
        limit = max(0.02 * len(vocabulary), 3)
        generic = frozenset(word for word, count in counts.items() if count > limit)
        return cls(frozenset(map(_normal, vocabulary)), generic, title_of, vocabulary)

    def connects(self, question: Question, synonym: str) -> bool:
        own = {self.title_of[identifier] for identifier in question.supporting if identifier in self.title_of}
        content = self._content(synonym)
        texts = set().union(*(self.vocabulary[title] for title in own))
        title_words = set().union(*(self._content(title) for title in own))
        return bool(content & title_words) or (bool(content) and content <= texts)

    def _content(self, text: str) -> set[str]:
        return {
            word
            for word in words(text)
            if len(word) > 1 and not word.isdigit() and word not in self.generic and word not in FUNCTION_WORDS
        }


def _normal(name: str) -> str:
    return " ".join(words(name))


def expand(
    questions: Iterable[Question],
    *,
    wordings: Literal["train", "test"],
    names: Names = "all",
    per_question: int,
    seed: int = 0,
) -> list[Question]:
    """Ask each question in several wordings and under several names. Deterministic.

    Args:
        questions: their ``synonyms`` should be usable ones, see :func:`with_usable_synonyms`.
        wordings: which sentences: ``"train"``, or the held-out ones for ``"test"``.
        names: the condition as the passages call it (its title), its synonyms, or both. Names that hold a word of the
            options are used only where there is no other.
        per_question: the most variants of a question; every wording is used once before any comes again.
        seed: chooses among wordings and names; a question's variants do not depend on the other questions.

    Returns:
        The variants in the questions' order, each with an id of its own and the question's ``condition``. A question
        of a kind without wordings comes back as it is.
    """
    if per_question < 1:
        raise ValueError(f"per_question must be at least 1, not {per_question}")
    if wordings not in ("train", "test") or names not in ("title", "synonyms", "all"):
        raise ValueError(f"no such wordings or names: {wordings!r}, {names!r}")
    variants = []
    for question in questions:
        if question.kind not in WORDINGS or not question.condition:
            variants.append(question)
            continue
        called = _called(question, names)
        sentences = list(enumerate(WORDINGS[question.kind][wordings]))
        generator = random.Random(f"{seed}/{wordings}/{question.id}")
        generator.shuffle(sentences)
        generator.shuffle(called)
        pairs = [
            (sentence, called[(position + turn) % len(called)])
            for turn in range(len(called))
            for position, sentence in enumerate(sentences)
        ]
        for (sentence_index, sentence), (name_index, name) in pairs[:per_question]:
            variants.append(
                replace(
                    question,
                    id=f"{question.id}/{wordings}{sentence_index}-name{name_index}",
                    question=sentence.format(name=name),
                )
            )
    return variants


def _called(question: Question, names: Names) -> list[tuple[int, str]]:
    everything = list(enumerate((question.condition, *question.synonyms)))
    if names == "title":
        return everything[:1]
    silent = [pair for pair in everything if not gives_away(pair[1], question)]
    if names == "synonyms":
        silent = [pair for pair in silent if pair[0] > 0]
    return silent or everything[:1]
