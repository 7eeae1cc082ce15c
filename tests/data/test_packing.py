"""Packing loses no document, shares none between splits, and leaves whole folders or none."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from torch_engram.data import Corpus, TokenFile, TokenFiles, open_token_files, split_of, tokenize_corpus, train_bpe


def texts_of(file: TokenFile, tokenizer: Tokenizer) -> list[str]:
    documents = [part.tolist() for part in np.split(file.tokens, file.starts[1:])]
    assert all(document[-1] == file.end_id for document in documents)
    return [tokenizer.decode(document[:-1], skip_special_tokens=False) for document in documents]


def test_every_document_comes_back_in_its_split(
    documents: list[str], tokenizer: Tokenizer, token_files: TokenFiles
) -> None:
    assert token_files.validation is not None
    for file, split in ((token_files.train, "train"), (token_files.validation, "validation")):
        expected = [document for document in documents if split_of(document, 0.2) == split]
        assert texts_of(file, tokenizer) == expected
        assert file.text_bytes == sum(len(document.encode()) for document in expected)
        assert len(file) == len(file.tokens)
        assert np.count_nonzero(file.tokens == file.end_id) == len(expected), "an end token inside a document"
        assert not file.tokens.flags.writeable


def test_no_document_lies_in_both_splits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    twice = [f"document {i % 100}" for i in range(200)]
    files = tokenize_corpus(Corpus("twice", lambda: iter(twice)), tokenizer, tmp_path, validation_share=0.3)
    assert files.validation is not None
    train, validation = texts_of(files.train, tokenizer), texts_of(files.validation, tokenizer)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(twice)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=8))
def test_any_documents_come_back(tokenizer: Tokenizer, tmp_path: Path, texts: list[str]) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    files = tokenize_corpus(Corpus("any", lambda: iter(texts)), tokenizer, tmp_path, validation_share=0)
    assert files.validation is None
    assert texts_of(files.train, tokenizer) == texts


def test_batches_of_documents_do_not_show(
    corpus: Corpus, tokenizer: Tokenizer, token_files: TokenFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch_engram.data.packing._BATCH_CHARACTERS", 100)
    files = tokenize_corpus(corpus, tokenizer, tmp_path, validation_share=0.2)
    for name in ("train.bin", "train.starts.bin", "validation.bin", "validation.starts.bin", "meta.json"):
        assert (files.folder / name).read_bytes() == (token_files.folder / name).read_bytes()


def test_settings_of_the_callers_tokenizer_neither_matter_nor_change(
    corpus: Corpus, tokenizer: Tokenizer, token_files: TokenFiles, tmp_path: Path
) -> None:
    fussy = Tokenizer.from_str(tokenizer.to_str())
    fussy.enable_truncation(4)
    fussy.enable_padding(length=8)
    files = tokenize_corpus(corpus, fussy, tmp_path, validation_share=0.2)
    assert (files.folder / "train.bin").read_bytes() == (token_files.folder / "train.bin").read_bytes()
    assert fussy.truncation is not None and fussy.padding is not None and not fussy.encode_special_tokens


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    tokenizer = train_bpe(["text"], 300)
    tokenizer.add_tokens([f"<word {i}>" for i in range(70_000)])
    corpus = Corpus("wide", lambda: iter(["<word 69999> and text"]))
    file = tokenize_corpus(corpus, tokenizer, tmp_path, validation_share=0).train
    assert file.tokens.dtype == np.uint32
    assert file.tokens[0] == tokenizer.token_to_id("<word 69999>") > 1 << 16
    assert file.vocab_size == tokenizer.get_vocab_size()


def test_files_are_reused_for_the_same_inputs_only(documents: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    reads = []

    def read() -> Iterator[str]:
        reads.append(1)
        return iter(documents)

    def pack(read=read, tokenizer=tokenizer, share=0.2):  # type: ignore[no-untyped-def]
        return tokenize_corpus(Corpus("known", read), tokenizer, tmp_path, validation_share=share).folder

    first = pack()
    before = len(reads)
    assert pack() == first
    assert len(reads) == before + 1, "reuse reads the corpus for its digest, and no more"
    others = {pack(share=0.3), pack(read=lambda: iter(documents[:-1])), pack(tokenizer=train_bpe(documents, 390))}
    assert len(others | {first}) == 4
    assert sorted(tmp_path.iterdir()) == sorted(others | {first}), "nothing but whole folders is left"


@given(st.lists(st.text(min_size=1), min_size=1, max_size=9), st.sampled_from([0.001, 0.02, 0.5, 0.999]))
def test_no_split_is_empty_where_documents_differ(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, documents: list[str], share: float
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = tokenize_corpus(Corpus("few", lambda: iter(documents)), tokenizer, folder, validation_share=share)
    held_out = texts_of(files.validation, tokenizer) if files.validation is not None else []
    trained = texts_of(files.train, tokenizer)
    assert sorted(trained + held_out) == sorted(documents) and not set(trained) & set(held_out)
    assert trained and bool(held_out) == (len(set(documents)) > 1)
    if {split_of(document, share) for document in documents} == {"train", "validation"}:
        assert sorted(held_out) == sorted(text for text in documents if split_of(text, share) == "validation")


def test_a_corpus_of_one_document_is_all_for_training(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="'single' is one document, so none of it is held out"):
        files = tokenize_corpus(Corpus("single", lambda: iter(["one"])), tokenizer, tmp_path, validation_share=0.5)
    assert files.validation is None and texts_of(files.train, tokenizer) == ["one"]


def test_damaged_folders_are_named(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tokenize_corpus(corpus, tokenizer, tmp_path, validation_share=0.2).folder
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"train\.bin has \d+ bytes where meta\.json promises"):
        open_token_files(folder)
    with pytest.raises(ValueError, match=r"holds no meta\.json"):
        open_token_files(tmp_path)
    for share in (1.5, 1.0, -0.1):
        with pytest.raises(ValueError, match=rf"validation_share is {share}; give a share of at least 0 and below 1"):
            tokenize_corpus(corpus, tokenizer, tmp_path, validation_share=share)


def test_meta_data_say_what_was_packed(token_files: TokenFiles) -> None:
    meta = json.loads((token_files.folder / "meta.json").read_text())
    assert meta["splits"]["train"]["tokens"] == len(token_files.train)
    assert meta["dtype"] == "<u2" and token_files.train.tokens.dtype == np.uint16
    assert {"tokenizer", "corpus", "validation_share", "vocab_size", "end_id"} <= set(meta)


# Other processes

CHILD = """
import sys, time
from pathlib import Path
from torch_engram.data import Corpus, load_tokenizer, packing, tokenize_corpus, tokenizer_digest

packing._BATCH_CHARACTERS = 1000
documents = [f"document {i} " * 20 for i in range(200)]
passes = 0

def read():
    global passes
    passes += 1
    for index, document in enumerate(documents):
        if passes == 2 and index == 150:
            Path(sys.argv[3]).touch()
            while sys.argv[4] == "hang":
                time.sleep(0.1)
        yield document

corpus = Corpus("children", read)
tokenizer = load_tokenizer(sys.argv[1])
files = tokenize_corpus(corpus, tokenizer, sys.argv[2], validation_share=0.1)
print(corpus.digest, tokenizer_digest(tokenizer), files.folder.name, len(files.train))
"""


@pytest.fixture
def saved(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def start(saved: Path, mode: str, hash_seed: int = 0) -> tuple[subprocess.Popen[str], Path, Path]:
    cache, reached = saved.parent / "cache", saved.parent / f"reached-{mode}-{hash_seed}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, "-c", CHILD, str(saved), str(cache), str(reached), mode]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True), cache, reached


def test_a_killed_run_leaves_nothing_under_a_final_name_and_the_next_one_succeeds(saved: Path) -> None:
    child, cache, reached = start(saved, "hang")
    deadline = time.monotonic() + 60
    while not reached.exists():
        assert child.poll() is None and time.monotonic() < deadline, "the child never came to tokenise"
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    (left,) = cache.iterdir()
    assert left.name.endswith(".partial") and not (left / "meta.json").exists()

    # What a killed run left is removed once nobody can be writing it any more.
    for path in (left, *left.iterdir()):
        os.utime(path, (0, 0))
    child, cache, _ = start(saved, "go")
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    (folder,) = cache.iterdir()
    assert folder.name == output.split()[2]
    assert len(open_token_files(folder).train.starts) > 150


def test_two_processes_at_once_agree_on_digests_and_files(saved: Path) -> None:
    children = [start(saved, "go", hash_seed) for hash_seed in (1, 2)]
    outputs = [child.communicate(timeout=60)[0] for child, _, _ in children]
    assert [child.returncode for child, _, _ in children] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    (folder,) = children[0][1].iterdir()
    assert folder.name == outputs[0].split()[2]
