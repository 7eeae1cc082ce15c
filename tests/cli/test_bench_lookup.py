"""``engram bench lookup`` from the command to its CSV and page, on a CPU with the smallest tables."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from torch_engram.bench import limits

COLUMNS = ["case", "value", "unit", "reference", "ratio", "p20", "p50", "p80", "n", "device", "versions", "date"]
READS = (
    "--chunk", "32", "--chunks", "2", "--sequences", "1", "--sequences", "5", "--steps", "3", "--device", "cpu",
)  # fmt: skip
TIMED = ["read", "p99", "rows", "delivered", "distinct"]


@pytest.fixture(autouse=True)
def few_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in (("_READS", 64), ("_REPEATS", 2), ("_TABLE_BYTES", 1 << 20)):
        monkeypatch.setattr(limits, name, few)


@pytest.fixture(scope="module")
def text(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return ("--text", str(corpus_file), "--text-cache", str(tmp_path_factory.mktemp("cache")))


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == ["placement", "read", "settings", *COLUMNS]
        rows = list(reader)
    for row in rows:
        assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) and row["value"] == row["p50"]
    return rows


def test_every_placement_prefill_and_decode(engram, tmp_path, text):
    out = tmp_path / "bench"
    done = engram("bench", "lookup", *READS, *text, "--rows", "6000", "--cold", "--out", str(out))
    assert done.code == 0 and not done.err, done
    rows = rows_of(out / "lookup.csv")
    measured = [row for row in rows if row["placement"] == "limit"]
    assert {row["case"] for row in measured} >= {"memory-copy", "memory-gather"}
    timed = [row for row in rows if row["placement"] != "limit"]
    for placement in ("disk", "disk-direct", "host"):
        for read in ("prefill-32", "decode-1", "decode-5"):
            found = {row["case"]: row for row in timed if (row["placement"], row["read"]) == (placement, read)}
            assert list(found)[:5] == TIMED and found["read"]["n"] == ("2" if read == "prefill-32" else "3")
            delivered = found["delivered"]
            if delivered["reference"]:
                ratio = float(delivered["value"]) / float(delivered["reference"])
                assert float(delivered["ratio"]) == pytest.approx(ratio, rel=1e-3)
    assert "layers=1,14 rows=6000,6000 columns=24 codec=fp8 row-bytes=264 pages=dropped" in rows[0]["settings"]
    page = (out / "lookup.html").read_text()
    chart = ElementTree.fromstring(page[page.index("<figure>") : page.index("</figure>") + len("</figure>")])
    assert "disk-direct, decode-5" in " ".join(chart.itertext()) and chart.findall(".//rect")
    assert "Hit rates" not in page and "4-grams" not in done.out and "cache=" not in rows[0]["settings"]
    assert "told to drop" in page and "told to drop" in done.out and "memory-gather" in done.out
    assert sorted(path.name for path in out.iterdir()) == ["lookup.csv", "lookup.html"]
    assert [path.name for path in tmp_path.iterdir()] == ["bench"]  # the tables are gone


def test_a_cache_is_filled_and_its_hits_are_told(engram, tmp_path, text):
    out = tmp_path / "bench"
    options = ("--rows", "6000", "--cache", "2MB", "--warm", "500", "--out", str(out))
    done = engram("bench", "lookup", *READS, *text, *options, "--placement", "disk", "--placement", "host")
    assert done.code == 0 and not done.err, done
    rows = [row for row in rows_of(out / "lookup.csv") if row["placement"] != "limit"]
    assert all("cache=2000000 warmed=500" in row["settings"] for row in rows)
    rates: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        if row["case"].startswith("hits"):
            assert row["unit"] == "of n-grams" and 0 <= float(row["value"]) <= 1
            rates.setdefault((row["placement"], row["read"]), {})[row["case"]] = row["value"]
    assert list(rates) == [
        (place, read) for place in ("disk", "host") for read in ("prefill-32", "decode-1", "decode-5")
    ]
    for read, found in rates.items():
        assert list(found) == ["hits", "hits-order-2", "hits-order-3", "hits-order-4"], read
        assert float(found["hits-order-2"]) >= float(found["hits-order-4"])
    page = (out / "lookup.html").read_text()
    for shown in (page, " ".join(done.out.split())):
        assert "filled by 500 tokens of the text before" in shown and "4-grams" in shown
    assert "Hit rates of the cache" in page


def test_tables_are_kept_and_read_again(engram, tmp_path, text):
    made, out = tmp_path / "tables", ("--out", str(tmp_path / "bench"))
    few = (*READS, *text, *out, "--placement", "disk", "--steps", "0")
    done = engram("bench", "lookup", *few, "--preset", "demo", "--codec", "int8", "--rows", "4000", "--keep", str(made))
    assert done.code == 0 and sorted(path.name for path in made.iterdir()) == ["layer-1", "layer-15"], done
    done = engram("bench", "lookup", *few, "--preset", "demo", "--tables", str(made), "--layers", "15")
    assert done.code == 0, done
    (row, *_) = [row for row in rows_of(tmp_path / "bench" / "lookup.csv") if row["case"] == "delivered"]
    assert row["read"] == "prefill-32" and "layers=15 rows=4000 columns=16 codec=int8 row-bytes=68" in row["settings"]
    assert "pages=as-found" in row["settings"]


def test_the_scheme_of_qwen_with_rows_in_one_file(engram, tmp_path, text):
    table, out = str(tmp_path / "table"), ("--out", str(tmp_path / "bench"))
    assert engram("table", "synth", table, "--rows", "5000", "--width", "160", "--codec", "bf16").code == 0
    options = ("--preset", "qwen-ple", "--tables", table, "--placement", "host")
    done = engram("bench", "lookup", *READS, *text, *out, *options)
    assert done.code == 0 and "layers=1 rows=5000 columns=16 codec=bf16 row-bytes=320" in done.out, done


@pytest.mark.parametrize(
    "arguments, needles",
    [
        (("--placement", "dsk"), ("no placement 'dsk'", "did you mean 'disk'?")),
        (("--preset", "deepsek-v4.1"), ("no preset 'deepsek-v4.1'", "did you mean 'deepseek-v4.1'?")),
        (("--codec", "fp7"), ("no codec 'fp7'",)),
        (("--rows", "40"), ("40 rows are too few for 24 heads",)),
        (("--tables", "nowhere", "--rows", "40"), ("--rows, --codec and --keep are of tables to make",)),
        (("--tables", "nowhere"), ("nowhere",)),
        (("--chunk", "100000"), ("tokens, and", "would be read: lower --chunk")),
        (("--cache", "8 pounds"), ("'8 pounds' is no size", "as in '8GB'")),
        (("--cache", "1kB", "--rows", "6000"), ("A cache of 1,000 bytes is too small: give",)),
        (("--cache", "8GB", "--placement", "device"), ("other placements than device", "leave it out")),
        (("--device", "gpu"), ("no device 'gpu'", "use 'cpu' or 'cuda'")),
    ],
)
def test_a_mistake_is_one_sentence(engram, tmp_path, text, arguments, needles):
    done = engram("bench", "lookup", *READS, *text, *arguments, "--out", str(tmp_path / "bench"))
    assert done.code == 1 and done.err.startswith("engram: "), done
    for needle in needles:
        assert needle in done.err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_takes_no_files_is_found_out_first(engram, tmp_path):
    (tmp_path / "file").write_text("")
    done = engram("bench", "lookup", "--out", str(tmp_path / "file" / "bench"))
    assert done.code == 1 and "cannot be written" in done.err and "choose another folder with --out" in done.err
