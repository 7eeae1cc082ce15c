"""From a recipe to the parts of a run: tokenizer, token files, decoder, memory banks, optimisers."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from torch_engram.addressing import CanonicalVocab
from torch_engram.config import EngramConfig
from torch_engram.data import PackedBatches, TokenFiles, load_tokenizer, open_corpus, tokenize_corpus, train_bpe
from torch_engram.data.corpora import Corpus
from torch_engram.durable import replacing
from torch_engram.fusion import require_fp8
from torch_engram.memory import MemoryBank, disk_rows
from torch_engram.memory.placement import StoreFactory
from torch_engram.models import Decoder, DecoderConfig
from torch_engram.optim import ROW_OPTIMIZERS
from torch_engram.train.muon import Muon
from torch_engram.train.network_pass import CapturedPass, NetworkPass
from torch_engram.train.ranks import ALONE, Ranks
from torch_engram.train.recipe import DEVICES, ON_DISK, Recipe

_MATRICES = ("qkv", "out", "gate_up", "down", "wkv")
"""Weights that map one hidden space to another, alone or as a stack of experts: what Muon is for."""
_VOCAB_MULTIPLE = 64  # rows of the embedding and head are padded to this: matrix products like it


@dataclass(frozen=True)
class Text:
    """What the text side of a run is made of."""

    tokenizer: Tokenizer
    files: TokenFiles
    vocab: CanonicalVocab


def require_device(device: str, instead: str = "use device cpu") -> None:
    """Raises ``ValueError`` for an unknown device, or when a GPU is asked for and absent."""
    if device not in DEVICES:
        raise ValueError(f"There is no device {device!r}: use 'cpu' or 'cuda'.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device is 'cuda', but PyTorch sees no GPU here: {instead}, or a CUDA build of torch with a GPU."
        )


def require_compiler(what: str = "compile=true", instead: str = "set compile=false") -> None:
    """Raises ``ValueError`` when ``what`` asks for ``torch.compile`` and there is no C++ compiler."""
    named = os.environ.get("CXX")
    if not any(map(shutil.which, [named] if named else ["g++", "clang++", "c++", "cl"])):
        raise ValueError(f"{what} needs a C++ compiler, such as g++: install one, or {instead}.")


def require_machine(recipe: Recipe, ranks: int = 1) -> None:
    """Raises ``ValueError`` when this machine does not have what the recipe asks for, or so many ranks cannot do it."""
    require_device(recipe.device, "use device=cpu with capture=false" if recipe.capture else "use device cpu")
    if recipe.compile:
        require_compiler()
    if recipe.capture:
        require_capture(recipe, ranks)
    if recipe.fp8:
        require_fp8(recipe.device)


def require_capture(recipe: Recipe, ranks: int = 1) -> None:
    """Raises ``ValueError`` when what the recipe trains cannot be captured in a CUDA graph."""
    if ranks > 1:
        raise ValueError(
            f"capture=true is for one process, for a graph would hold the collectives of {ranks} ranks: set "
            "capture=false, or train with one rank."
        )
    if recipe.device != "cuda":
        raise ValueError("capture=true needs a GPU, for its graphs are CUDA's: set device=cuda, or capture=false.")
    if recipe.model.moe is not None and recipe.dtype != "bf16":
        raise ValueError(
            "capture=true with experts needs dtype=bf16: in fp32 PyTorch's grouped products read their sizes on the "
            "host, which no graph can; set dtype=bf16, or capture=false."
        )


def build_text(recipe: Recipe) -> Text:
    """Tokenizer and token files, made once and then read from the recipe's cache.

    Raises ``ValueError`` naming what is wrong with the corpus or the tokenizer.
    """
    corpus = open_corpus(recipe.data, text_field=recipe.text_field)
    tokenizer = _tokenizer(recipe, corpus)
    files = tokenize_corpus(corpus, tokenizer, Path(recipe.cache), validation_share=recipe.validation_share)
    if len(files.train) <= recipe.seq_len:
        raise ValueError(
            f"The corpus {recipe.data!r} has {len(files.train)} tokens to train on and one sequence of "
            f"seq_len={recipe.seq_len} needs {recipe.seq_len + 1}; give a longer corpus or a shorter seq_len."
        )
    return Text(tokenizer, files, CanonicalVocab.of(tokenizer))


def _tokenizer(recipe: Recipe, corpus: Corpus) -> Tokenizer:
    """The given tokenizer, or one trained on the corpus and kept by the corpus's digest and the vocabulary's size."""
    if recipe.tokenizer is not None:
        return load_tokenizer(recipe.tokenizer)
    size = recipe.model.vocab_size
    name = hashlib.sha256(f"{corpus.digest} {size}".encode()).hexdigest()[:16]
    path = Path(recipe.cache) / f"bpe-{size}-{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        trained = train_bpe(corpus, size)
        with replacing(path) as file:
            file.write(trained.to_str().encode())
    return load_tokenizer(path)


def fit_to_text(model: DecoderConfig, tokenizer: Tokenizer, vocab: CanonicalVocab) -> DecoderConfig:
    """``model`` with the vocabulary of a tokenizer: padded embedding and head, canonical or raw ids for each Engram."""
    real = max(tokenizer.get_vocab().values()) + 1  # ids may have holes
    padded = -(-real // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE

    def fit(engram: EngramConfig) -> EngramConfig:
        size = vocab.size if engram.scheme == "engram" else real
        return dataclasses.replace(engram, vocab_size=size)

    engrams = {name: fit(engram) for name, engram in model.engrams.items()}
    return dataclasses.replace(model, vocab_size=padded, real_vocab=real if padded > real else None, engrams=engrams)


def build_decoder(recipe: Recipe, model: DecoderConfig) -> Decoder:
    """A decoder on the recipe's device, its weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return Decoder(model, recompute=recipe.recompute, fp8=recipe.fp8).to(recipe.device)


def build_banks(
    recipe: Recipe, model: DecoderConfig, vocab: CanonicalVocab, ranks: Ranks = ALONE
) -> dict[str, MemoryBank]:
    """One trainable bank a memory of the model, by name; its rows are divided over the ranks. Those on disk are in
    ``out/name/rows-<memory>``, with several ranks each in ``rows-<memory>-<rank>``.

    Raises ``ValueError`` when another process trains there, ``OSError`` when nothing can be written there.
    """
    table, mine = recipe.table, f"-{ranks.rank}" if ranks.size > 1 else ""

    def placement(name: str) -> str | StoreFactory:
        if table.placement != ON_DISK:
            return table.placement
        return disk_rows(Path(recipe.out) / recipe.name / f"rows-{name}{mine}", table.staging)

    return {
        name: MemoryBank(
            engram,
            vocab,
            optimizer=partial(
                ROW_OPTIMIZERS[table.optimizer],
                lr=table.lr,
                weight_decay=table.weight_decay,
                lazy_decay=table.lazy_decay,
            ),
            placement=placement(name),
            cache=table.cache,
            codec=table.codec,
            device=ranks.device(recipe.device),
            dtype=torch.bfloat16 if recipe.dtype == "bf16" else torch.float32,
            name=name,
            seed=recipe.seed,
            group=ranks.group,
        )
        for name, engram in model.engrams.items()
    }


def build_pass(recipe: Recipe, decoder: Decoder, banks: Mapping[str, MemoryBank], data: PackedBatches) -> NetworkPass:
    """What takes a micro-batch of ``data`` forward and backward."""
    mixed, masked = recipe.dtype == "bf16", recipe.deterministic  # only attention with a mask has such kernels
    if recipe.capture:  # one graph for all batches, though a few may need no mask
        masked = masked or data.packs_documents
        return CapturedPass(decoder, banks, recipe.batch_size, recipe.seq_len, mixed=mixed, masked=masked)
    return NetworkPass(decoder, mixed=mixed, masked=masked)


def build_optimizers(recipe: Recipe, decoder: Decoder, ranks: Ranks = ALONE) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, Adam for the rest; tables have their own in their banks."""
    rates = recipe.rates
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "embedding": [], "head": [], "router": [], "other": []}
    for role, parameter in _roles(decoder):
        groups[role].append(parameter)
    adam = [
        {"params": parameters, "lr": getattr(rates, role)}
        for role, parameters in groups.items()
        if parameters and role != "matrices"
    ]
    return [
        Muon(groups["matrices"], lr=rates.matrices, weight_decay=rates.weight_decay, divided=ranks.rows),
        torch.optim.Adam(adam, betas=(0.9, 0.95), eps=1e-10, fused=True),
    ]


def _roles(decoder: Decoder) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter with the name of its learning rate in :class:`Rates`."""
    for name, parameter in decoder.named_parameters():
        if name == "embedding.weight":
            yield "embedding", parameter
        elif name == "head.weight":
            yield "head", parameter
        elif name.endswith("router"):
            yield "router", parameter
        elif name.removesuffix(".weight").rpartition(".")[2] in _MATRICES:
            yield "matrices", parameter
        else:
            yield "other", parameter
