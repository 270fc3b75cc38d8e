"""The one prompt of training, scoring and inference: documents, best last, then the question, then the answer.

    <s> Reference: d_1 ... Reference: d_n Question: q Options: ... Answer: y </s>

Only y and </s> are supervised. A prompt that would outgrow the model loses whole documents, the worst first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from jmlr.data.corpus import Passage
from jmlr.data.questions import Question
from jmlr.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """Token ids; the last `answer` of them are the supervised ones."""

    ids: list[int]
    answer: int


class PromptBuilder:
    """Builds prompts as token lists. Passages are tokenised once.

    Args:
        max_length: tokens the language model can take.
        document_tokens: a passage is cut after so many tokens; None cuts nothing.
        show_options: lists the options in the prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        passages: Sequence[Passage],
        *,
        max_length: int,
        document_tokens: int | None = None,
        show_options: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.show_options = show_options
        self.begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        if tokenizer.eos_token_id is None:
            raise UserError("the language model's tokenizer has no end-of-text token", remedy="set its eos_token")
        self.end = [int(tokenizer.eos_token_id)]
        self.prompts = 0
        self.prompts_shortened = 0
        self.documents_dropped = 0
        head = self._ids("\nReference:\n")
        bodies = self._batch([p.text for p in passages])
        self.documents = [head + (ids if document_tokens is None else ids[:document_tokens]) for ids in bodies]
        self._passages = passages
        self._questions: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _batch(self, texts: list[str]) -> list[list[int]]:
        return list(self.tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else []

    def question_ids(self, question: Question) -> list[int]:
        if question.id not in self._questions:
            options = f"\nOptions: {' | '.join(question.options)}" if self.show_options and question.options else ""
            self._questions[question.id] = self._ids(f"\nQuestion:\n{question.question}{options}\nAnswer:")
        return self._questions[question.id]

    def answer_ids(self, answer: str) -> list[int]:
        return self._ids(f" {answer}") + self.end

    def build(self, question: Question, documents: Sequence[int], answer: str) -> Prompt:
        """documents: passage numbers, best first. Whole documents are dropped, worst first, until all fits."""
        tail = self.question_ids(question) + (ending := self.answer_ids(answer))
        room = self.max_length - len(self.begin) - len(tail)
        kept: list[int] = []
        for number in documents:
            if len(self.documents[number]) > room:
                break
            kept.append(number)
            room -= len(self.documents[number])
        self.prompts += 1
        self.prompts_shortened += len(kept) < len(documents)
        self.documents_dropped += len(documents) - len(kept)
        context = [token for number in reversed(kept) for token in self.documents[number]]
        return Prompt(self.begin + context + tail, len(ending))

    def check(self, questions: Sequence[Question]) -> None:
        """Every question must leave room for the longest passage.

        Raises:
            UserError: names the question or the passage that does not fit, before any training.
        """
        longest = max(range(len(self.documents)), key=lambda n: len(self.documents[n]), default=None)
        size = 0 if longest is None else len(self.documents[longest])
        for question in questions:
            answers = max(len(self.answer_ids(option)) for option in (question.options or (question.gold,)))
            own = len(self.begin) + len(self.question_ids(question)) + answers
            if own > self.max_length:
                raise UserError(
                    f"question {question.id!r} takes {own} tokens and the model {self.max_length}",
                    remedy="raise llm.max_length or drop the question",
                )
            if own + size > self.max_length:
                assert longest is not None
                raise UserError(
                    f"passage {self._passages[longest].id!r} takes {size} tokens and question {question.id!r} {own},"
                    f" together more than the model's {self.max_length}",
                    remedy="cut passages with llm.document_tokens, split them, or raise llm.max_length",
                )
