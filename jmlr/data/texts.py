"""The corpus and the questions of a run, checked and worded. Torch-free, so that bad input is told within a second."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from jmlr.config import DataConfig, RunConfig
from jmlr.data.corpus import Passage, corpus_hash, load_corpus
from jmlr.data.questions import Question, load_questions, resolve_support
from jmlr.data.wordings import expand, with_usable_synonyms
from jmlr.errors import UserError


@dataclass(frozen=True)
class Texts:
    """What a run reads, in every wording that it uses."""

    passages: list[Passage]
    train: list[Question]
    probe: list[Question]  # of conditions held out from training, asked while it goes on
    test: list[Question]

    @cached_property
    def passage_ids(self) -> list[str]:
        """The passages' ids in the index's order."""
        return [passage.id for passage in self.passages]

    @cached_property
    def corpus_hash(self) -> str:
        """What an index of these passages must have been built from."""
        return corpus_hash(self.passages)


def load_texts(config: RunConfig) -> Texts:
    """Read and check everything that ``config.data`` names.

    The probe takes ``data.probe_fraction`` of the conditions away from training, so that recall can be watched without
    a look at the test questions.

    Raises:
        UserError: with file, line and remedy, for any mistake in the files; a kind that no question has; a condition
            that is both trained and tested on.
    """
    data = config.data
    passages = load_corpus(data.corpora, data_dir=data.data_dir, repeated_ids=data.repeated_ids)
    train = _questions(data, data.train, passages)
    test = _questions(data, data.test, passages)
    trained_on = {question.cluster for question in train}
    shared = [question for question in test if question.cluster in trained_on]
    if shared:
        raise UserError(
            f"{len(shared)} test questions, such as '{shared[0].id}' about '{shared[0].cluster}', are also trained on",
            file=", ".join(data.test),
            remedy="split the questions by condition or module between data.train and data.test",
        )
    clusters = sorted(trained_on)
    probed = set(random.Random("probe").sample(clusters, round(len(clusters) * data.probe_fraction)))
    kept = _sample([question for question in train if question.cluster not in probed], data.max_train_questions)
    if not kept:
        raise UserError(
            "the probe leaves no question to train on",
            file=", ".join(data.train),
            remedy="lower data.probe_fraction, or give more questions",
        )
    return Texts(
        passages=passages,
        train=expand(
            kept, wordings="train", names=data.names, per_question=data.wordings_per_question, seed=config.seed
        ),
        probe=expand(
            [question for question in train if question.cluster in probed],
            wordings="test",
            names=data.names,
            per_question=1,
        ),
        test=expand(
            _sample(test, data.max_test_questions),
            wordings="test",
            names=data.names,
            per_question=data.test_wordings_per_question,
        ),
    )


def _questions(data: DataConfig, names: Sequence[str], passages: Sequence[Passage]) -> list[Question]:
    found = load_questions(
        names, data_dir=data.data_dir, repeated_ids=data.repeated_ids, repeated_options=data.repeated_options
    )
    present = sorted({question.kind for question in found if question.kind})
    for kind in data.kinds:
        if kind not in present:
            known = f"choose among {', '.join(present)}" if present else "leave data.kinds empty: these have no kind"
            raise UserError(f"no question is of the kind '{kind}' (data.kinds)", file=", ".join(names), remedy=known)
    kept = [question for question in found if not data.kinds or question.kind in data.kinds]
    return with_usable_synonyms(resolve_support(kept, passages), passages)


def _sample(questions: list[Question], limit: int | None) -> list[Question]:
    """A part of the questions, the same for every seed: runs of several seeds are compared on one test set."""
    if limit is None or limit >= len(questions):
        return questions
    kept = random.Random("sample").sample(range(len(questions)), limit)
    return [questions[index] for index in sorted(kept)]
