"""The text that ways to train a table read: the corpus that ships, its documents mixed, as batches with their rows."""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from table_ways import Batch
from torch import Tensor

from torch_engram.addressing import Addressing, CanonicalVocab, LayerLayout
from torch_engram.config import EngramConfig
from torch_engram.data import open_corpus, tokenize_corpus, train_bpe

VOCAB = 8192


@dataclass(frozen=True)
class Text:
    """Token ids int64 ``[batches, B, T + 1]``, so that each has a target, and the tokenizer's vocabularies."""

    ids: Tensor
    tokens_in_vocab: int
    vocab: CanonicalVocab

    def batches(self, config: EngramConfig, layer: int, device: torch.device) -> tuple[LayerLayout, list[Batch]]:
        """The layer's layout under ``config``, and all batches on ``device`` with the rows that they read."""
        addressing, found = Addressing(config, self.vocab), []
        for ids in self.ids.to(device):
            tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            rows = addressing.lookup(tokens, with_mixes=False)(layer)[1]
            found.append(Batch(tokens, targets, rows.contiguous()))
        return addressing.layouts[layer], found


def read_text(sequences: int, length: int, batches: int, every: int) -> Text:
    """``batches`` of ``sequences`` of ``length`` tokens out of every ``every``-th document of the corpus."""
    documents = list(open_corpus("demo"))[::every]
    random.Random(0).shuffle(documents)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        path.write_text("\n".join(json.dumps({"text": document}) for document in documents))
        corpus = open_corpus(str(path))
        tokenizer = train_bpe(corpus, VOCAB)
        tokens = tokenize_corpus(corpus, tokenizer, Path(folder), validation_share=0.0).train.tokens
        wanted = batches * sequences * length + 1
        assert len(tokens) >= wanted, f"{len(tokens):,} tokens, and {wanted:,} are read: take more documents"
        flat = torch.from_numpy(tokens[:wanted].astype(np.int64))
    ids = torch.cat((flat[:-1].view(-1, length), flat[length::length, None]), 1).view(batches, sequences, length + 1)
    return Text(ids, max(tokenizer.get_vocab().values()) + 1, CanonicalVocab.of(tokenizer))
