"""Any source of text gives the documents that are in it, or one sentence that says what is wrong."""

import gzip
import json
import lzma
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_engram.data import open_corpus, split_of
from torch_engram.data.text_files import SECTION_CHARACTERS

DOCUMENTS = ["First.\nTwo lines.\n", "第二。\n", "Third, without a last line end"]
TEXT = "\f\n".join(DOCUMENTS)


def write(path: Path, text: str) -> Path:
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write(text.encode())
    return path


def error_of(source: str | Path, **options: str) -> str:
    """The message with which a source is refused, checked to be one sentence."""
    with pytest.raises(ValueError) as caught:
        list(open_corpus(source, **options))
    message = str(caught.value)
    assert message.endswith((".", "?")) and "\n" not in message
    assert not re.search(r"[.?] [A-Z]", message), f"more than one sentence: {message}"
    return message


@pytest.mark.parametrize("name", ["a.txt", "a", "a.txt.xz", "a.txt.gz", "a.xz", "a.gz"])
def test_form_feed_lines_separate_the_documents_of_a_text_file(tmp_path: Path, name: str) -> None:
    assert list(open_corpus(write(tmp_path / name, TEXT))) == DOCUMENTS


@pytest.mark.parametrize("name", ["a.py", "a.md", "a.py.xz"])
def test_other_text_files_are_one_document_in_a_folder_and_divided_alone(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, TEXT)
    assert list(open_corpus(tmp_path)) == [TEXT]
    assert list(open_corpus(tmp_path / name)) == list(open_corpus(write(tmp_path / "a.txt", TEXT)))
    assert len(list(open_corpus(tmp_path / name))) > 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz", "a.jsonl.gz"])
def test_jsonl_holds_one_document_a_line(tmp_path: Path, name: str) -> None:
    lines = "\n".join(json.dumps({"id": 1, "body": document}) for document in DOCUMENTS)
    assert list(open_corpus(write(tmp_path / name, lines + "\n\n"), text_field="body")) == DOCUMENTS


def test_a_folder_gives_its_text_files_in_order_and_reports_what_it_skips(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / "b" / "2.txt", "two")
    write(tmp_path / "a.md", "one")
    write(tmp_path / "c.jsonl", '{"text": "three"}')
    write(tmp_path / ".hidden" / "no.txt", "no")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.warns(UserWarning, match="Skipped 2 files"):
        corpus = open_corpus(tmp_path)
    assert list(corpus) == ["one", "two", "three"]
    assert [path.name for path in corpus.skipped] == ["image.png", "latin.txt"]


@pytest.mark.parametrize("blank", ["\n", ""], ids=["blank lines", "none"])
@pytest.mark.parametrize("paragraphs, section", [(100, 1024), (400, 1264), (9000, SECTION_CHARACTERS)])
def test_a_text_without_separators_is_divided_and_loses_nothing(
    tmp_path: Path, blank: str, paragraphs: int, section: int
) -> None:
    text = "".join(f"Paragraph {i:04}.\n" + "words " * 50 + f"\n{blank}" for i in range(paragraphs))
    documents = list(open_corpus(write(tmp_path / "book.txt", text)))
    assert "".join(documents) == text
    least = section if blank else 2 * section
    assert all(least <= len(document) < least + 400 for document in documents[:-1])
    assert all(document.endswith(f"\n{blank}") for document in documents)


def test_line_ends_and_byte_order_mark_do_not_reach_the_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\f\r\ntwo\r\n")
    assert list(open_corpus(tmp_path / "a.txt")) == ["one\n", "two\n"]


def test_blank_documents_are_dropped(tmp_path: Path) -> None:
    assert list(open_corpus(write(tmp_path / "a.txt", "\f\n \n\f\none\n\f\n"))) == ["one\n"]


def test_a_corpus_can_be_read_again_and_its_digest_depends_on_documents_alone(tmp_path: Path) -> None:
    text = open_corpus(write(tmp_path / "a.txt", TEXT))
    lines = open_corpus(write(tmp_path / "b.jsonl", "\n".join(json.dumps({"text": each}) for each in DOCUMENTS)))
    assert list(text) == list(text)
    assert text.digest == lines.digest
    assert open_corpus(write(tmp_path / "c.txt", TEXT.replace("\f\n", ""))).digest != text.digest
    assert open_corpus(write(tmp_path / "d.txt", "\f\n".join(DOCUMENTS[::-1]))).digest != text.digest


def test_a_dataset_folder_is_read_by_its_text_column(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"body": [*DOCUMENTS, "", None], "label": range(5)})
    dataset.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(train=dataset).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict(test=dataset).save_to_disk(tmp_path / "test_only")
    for source in (tmp_path / "plain", tmp_path / "splits", f"datasets:{tmp_path / 'plain'}"):
        corpus = open_corpus(source, text_field="body")
        assert list(corpus) == list(corpus) == DOCUMENTS
    assert "has no column 'text' (it has 'body', 'label')" in error_of(tmp_path / "plain")
    assert "no split 'train'" in error_of(tmp_path / "test_only", text_field="body")


def test_a_dataset_name_and_configuration_reach_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> object:
        asked.append((name, config, split))
        if name == "no-such/name":
            raise ConnectionError("Cannot be reached")
        return datasets.Dataset.from_dict({"text": DOCUMENTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("datasets:wikitext:wikitext-2-raw-v1", "owner/prose"):
        assert list(open_corpus(source)) == DOCUMENTS
    assert asked == [("wikitext", "wikitext-2-raw-v1", "train"), ("owner/prose", None, "train")]
    assert "'no-such/name' is neither an existing file" in error_of("no-such/name")


def test_without_the_datasets_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = error_of("datasets:wikitext")
    assert "'wikitext'" in message and "torch-engram[train]" in message


def test_a_missing_path_names_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path / "corpus.txt", TEXT)
    message = error_of(tmp_path / "corpsu.txt")
    assert f"'{tmp_path / 'corpsu.txt'}'" in message and f"did you mean '{tmp_path / 'corpus.txt'}'?" in message
    assert "check the path" in error_of(tmp_path / "nothing" / "alike.txt")


def test_a_misspelt_name_without_suffix_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpora").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'corpora'?" in error_of("corprora")


def test_empty_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for source in (write(tmp_path / "a.txt", " \n\f\n"), write(tmp_path / "b.jsonl", ""), tmp_path / "folder"):
        assert f"{str(source)!r} holds no text" in error_of(source)
    (tmp_path / "folder" / "image.png").write_bytes(b"\x89PNG\0\0")
    assert "besides 1 files that are not text" in error_of(tmp_path / "folder")


@pytest.mark.parametrize(
    "content", [b"text\0text", b"caf\xe9", b"fine\n" * 50_000 + b"\xff", b"fine\n" * 50_000 + b"\0"]
)
def test_binary_files_are_refused_wherever_the_bytes_are(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    assert f"{tmp_path / 'a.bin'} is not UTF-8 text" in error_of(tmp_path / "a.bin")


def test_a_character_across_the_probes_edge_is_no_damage(tmp_path: Path) -> None:
    text = "x" + "白" * 60_000
    assert list(open_corpus(write(tmp_path / "a.txt", text))) == [text]


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
def test_truncated_and_false_archives_are_refused(tmp_path: Path, suffix: str) -> None:
    whole = write(tmp_path / f"a.txt{suffix}", "".join(f"{i}\n" for i in range(50_000)))
    whole.write_bytes(whole.read_bytes()[:-500])
    assert f"{whole} does not decompress" in error_of(whole)
    (tmp_path / f"b{suffix}").write_bytes(b"plain text")
    assert "does not decompress" in error_of(tmp_path / f"b{suffix}")


def test_bad_jsonl_lines_are_named(tmp_path: Path) -> None:
    assert "Line 2 of" in error_of(write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": \n'))
    assert "no text under 'text' (it has 'body')" in error_of(write(tmp_path / "b.jsonl", '{"body": "a"}\n'))
    assert "no text under 'text' (it has no fields)" in error_of(write(tmp_path / "c.jsonl", "[1]\n"))


@settings(deadline=None)
@given(st.text(), st.floats(0, 0.99))
def test_the_split_grows_with_its_share_and_depends_on_the_text_alone(document: str, share: float) -> None:
    assert split_of(document, share) == split_of(str(document), share)
    assert split_of(document, 0) == "train"
    if split_of(document, share) == "validation":
        assert split_of(document, (1 + share) / 2) == "validation"


def test_the_split_holds_out_about_its_share() -> None:
    held_out = sum(split_of(f"document {i}", 0.1) == "validation" for i in range(10_000))
    assert 850 < held_out < 1150


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="validation_share"):
        split_of("text", share)
