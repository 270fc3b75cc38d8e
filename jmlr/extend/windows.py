"""Documents as tokens, and the windows that are trained and evaluated on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

START = "<s>"


def build_subword_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte pairs of `texts`: every text has an encoding, so that no held-out word counts as an easy [UNK]."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[START], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=START, pad_token=START)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Tensor]:
    """Each text as int32 [tokens], a document's start before it."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.tensor([start, *ids], dtype=torch.int32) for ids in encoded]


class PackedWindows(Dataset):
    """Documents in a new order each epoch, one after the other, cut into windows: as LongLoRA packs its text.

    A function of the seed alone, so that every variant sees the same tokens in the same order, and a resumed run too.

    Args:
        documents: int [tokens] each.
        length: tokens of a window.
        count: windows in all, over as many epochs as it takes.
    """

    def __init__(self, documents: Sequence[Tensor], length: int, count: int, seed: int) -> None:
        self.documents, self.length, self.count, self.seed = list(documents), length, count, seed
        # A window's labels reach one token past its inputs.
        self.each_epoch = (sum(map(len, self.documents)) - 1) // length
        if self.each_epoch < 1:
            raise ValueError(f"the documents hold fewer than the {length + 1} tokens of one window")
        self._epoch, self._stream = -1, torch.empty(0)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        epoch, place = divmod(position, self.each_epoch)
        if epoch != self._epoch:
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.documents), generator=draw)
            self._epoch, self._stream = epoch, torch.cat([self.documents[n] for n in order.tolist()])
        window = self._stream[place * self.length : (place + 1) * self.length + 1].long()
        return {"input_ids": window[:-1], "labels": window[1:]}


def held_out_windows(document: Tensor, length: int, longest: int) -> tuple[Tensor, Tensor]:
    """inputs and labels, int64 [windows, length], that cover as many tokens as whole windows of `longest` do.

    Every length predicts the very same tokens, each once; they differ only in how far back a prediction may look.
    """
    kept = (len(document) - 1) // longest * longest
    return document[:kept].long().view(-1, length), document[1 : kept + 1].long().view(-1, length)
