"""A word-level vocabulary for models trained from scratch: one tokenizer serves the language model and ColBERT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
    "bos_token": "<s>",
    "eos_token": "</s>",
}
MARKERS = ("[unused0]", "[unused1]")  # ColBERT's query and document markers, under BERT's own names


def build_word_tokenizer(texts: Iterable[str], *, minimum_count: int = 1) -> PreTrainedTokenizerFast:
    """Lower-cased words, numbers and single punctuation marks of `texts`, most frequent first."""
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Split(Regex(r"[a-z]+|[0-9]+|[^\sa-z0-9]"), behavior="removed", invert=True)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    words = sorted((word for word, n in counts.items() if n >= minimum_count), key=lambda w: (-counts[w], w))
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *MARKERS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece(prefix="", cleanup=True)  # joins words by blanks
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL, additional_special_tokens=list(MARKERS))
