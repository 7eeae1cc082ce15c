"""The canonical vocabulary of real tokenizers, number for number, and a map that is never silently a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from torch_engram.addressing import CanonicalVocab
from torch_engram.config import EngramConfig

SENTENCE = "Only Alexander the Great could tame the horse Bucephalus."
RAW = [22898, 19737, 270, 9327, 1494, 112253, 270, 15000, 406, 11999, 25670, 349, 16]
CANONICAL = [1134, 15695, 237, 2049, 1260, 85761, 237, 12071, 36, 9745, 20232, 290, 16]
V3_DIGEST = "0e84461b633329215755b30226757dc28a1c49772f351048fe3b4c2070fb7649"


def word_tokenizer(*words: str, ids: list[int] | None = None) -> Tokenizer:
    vocab = dict(zip(words, ids or range(len(words)), strict=True))
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_deepseek_v3(tokenizer_files: dict[str, Path]) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_files["deepseek-v3"]))
    vocab = CanonicalVocab.build(tokenizer)
    assert (vocab.raw_size, vocab.size) == (128_815, 98_627)
    assert vocab.size == EngramConfig.preset("demo").vocab_size == EngramConfig.preset("paper-27b").vocab_size
    assert vocab.digest == V3_DIGEST
    assert tokenizer.encode(SENTENCE, add_special_tokens=False).ids == RAW
    assert vocab.ids[RAW].tolist() == CANONICAL
    assert vocab.ids[2] == 2


def test_deepseek_v4(tokenizer_files: dict[str, Path]) -> None:
    vocab = CanonicalVocab.build(Tokenizer.from_file(str(tokenizer_files["deepseek-v4"])))
    assert (vocab.raw_size, vocab.size) == (129_280, 99_092)
    assert vocab.size == EngramConfig.preset("deepseek-v4.1").vocab_size
    assert vocab.ids[2] == 2


def test_new_ids_come_in_first_seen_order_and_cover_all() -> None:
    vocab = CanonicalVocab.build(
        word_tokenizer("[unk]", "Horse", "tame", "horse", "HÓRSE", "\ufb01n", "fin", "\t", " ", "  ")
    )
    assert vocab.ids.tolist() == [0, 1, 2, 1, 1, 3, 3, 4, 4, 4]
    assert set(vocab.ids.tolist()) == set(range(vocab.size))


def test_ids_with_holes_keep_their_highest_token() -> None:
    vocab = CanonicalVocab.build(word_tokenizer("[unk]", "a", "A", "b", ids=[0, 1, 6, 9]))
    assert vocab.raw_size == 10
    assert vocab.ids[1] == vocab.ids[6] != vocab.ids[9]


@pytest.mark.parametrize(
    "ids", [torch.tensor([0, 1], dtype=torch.int32), torch.zeros(2, 2).long(), torch.tensor([]).long()]
)
def test_ids_of_another_kind_are_refused(ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"Canonical ids are torch.int(32|64) \[.*\]: give int64 \[V\]"):
        CanonicalVocab(ids, "tokenizer")


def test_save_and_load(tmp_path: Path) -> None:
    vocab = CanonicalVocab(torch.tensor([0, 1, 0, 2]), "mine")
    vocab.save(tmp_path / "map")
    loaded = CanonicalVocab.load(tmp_path / "map")
    assert torch.equal(loaded.ids, vocab.ids)
    assert (loaded.tokenizer_digest, loaded.digest, loaded.size) == ("mine", vocab.digest, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["map"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_a_damaged_map_is_refused_and_a_damaged_cache_built_anew(tmp_path: Path, damage: str) -> None:
    tokenizer = word_tokenizer("[unk]", "a", "A")
    first = CanonicalVocab.of(tokenizer, tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-8:]
    elif damage == "flipped":
        content[-8] ^= 1
    else:
        content[:] = b"{}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        CanonicalVocab.load(path)
    assert torch.equal(CanonicalVocab.of(tokenizer, tmp_path).ids, first.ids)
    assert torch.equal(CanonicalVocab.load(path).ids, first.ids)


def test_the_cache_is_used_and_never_for_another_tokenizer(tmp_path: Path) -> None:
    tokenizer = word_tokenizer("[unk]", "a", "A")
    digest = CanonicalVocab.of(tokenizer, tmp_path).tokenizer_digest
    (path,) = tmp_path.iterdir()
    CanonicalVocab(torch.tensor([0, 1, 2]), digest).save(path)
    assert CanonicalVocab.of(tokenizer, tmp_path).size == 3  # read, not built
    CanonicalVocab(torch.tensor([0, 1, 2]), "another").save(path)
    assert CanonicalVocab.of(tokenizer, tmp_path).size == 2


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert CanonicalVocab.of(word_tokenizer("[unk]", "a"), tmp_path / "file").size == 2
