"""A bank on disk: identity through save and load, whole through kills and full disks, refused by name when foreign."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from torch_engram.addressing import CanonicalVocab
from torch_engram.memory import MemoryBank, Tokens, load_bank, open_bank, save_bank, saved_tables
from torch_engram.optim import ROW_OPTIMIZERS, RowAdagrad, RowAdam, RowwiseAdam
from torch_engram.stores import DeviceStore, make_keys

Make = Callable[..., MemoryBank]
Run = Callable[..., list[float]]
Records = Callable[[MemoryBank], list[Tensor]]
BY_ORDER = dict(row_dim=(3, 5), heads=(2, 3))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def trained(make_bank: Make, train: Run) -> MemoryBank:
    bank = make_bank(BY_ORDER, optimizer=RowAdam, codec="bf16", seed=3)
    train(bank, [[Tokens(torch.randint(60, (2, 5)))] for _ in range(5)])
    return bank


@pytest.mark.parametrize(
    "optimizer",
    [
        RowAdam,
        RowAdagrad,
        *[partial(ROW_OPTIMIZERS[n], weight_decay=9.0, lazy_decay=True) for n in ("adam", "sinkhorn")],
    ],
)
def test_save_load_save_is_identity(
    make_bank: Make, optimizer: Any, every_record: Records, train: Run, tmp_path: Path
) -> None:
    trained = make_bank(BY_ORDER, optimizer=optimizer, codec="bf16", seed=3)
    train(trained, [[Tokens(torch.randint(60, (2, 5)))] for _ in range(5)])
    save_bank(trained, tmp_path / "one")
    for placement in ("device", "host"):
        bank = open_bank(tmp_path / "one", optimizer=optimizer, placement=placement)
        assert all(torch.equal(a, b) for a, b in zip(every_record(bank), every_record(trained), strict=True))
        save_bank(bank, tmp_path / placement)
        assert files(tmp_path / placement) == files(tmp_path / "one")
        assert not list(tmp_path.rglob("*.tmp"))
    batches = [[Tokens(torch.randint(60, (2, 5)))] for _ in range(5)]
    assert train(bank, batches) == train(trained, batches)  # and training goes on as if nothing had happened
    assert all(torch.equal(a, b) for a, b in zip(every_record(bank), every_record(trained), strict=True))


@pytest.mark.parametrize("owed", [None, [], [[]], [[0]], [["0.0"]], 7, [[0.0], [0.0]]])
def test_rows_whose_decay_is_not_known_are_refused(
    make_bank: Make, train: Run, every_record: Records, tmp_path: Path, owed: Any
) -> None:
    lazy: Any = partial(RowAdam, weight_decay=1.0, lazy_decay=True)
    bank = make_bank(BY_ORDER, optimizer=lazy)
    train(bank, [[Tokens(torch.randint(60, (2, 5)))] for _ in range(3)])
    save_bank(bank, tmp_path)
    assert len(json.loads((tmp_path / "memory.json").read_text())["owed_decay"][0]) == 4
    edit(tmp_path / "memory.json", lambda facts: facts.update(owed_decay=owed))
    with pytest.raises(
        ValueError, match=r"running sums of the decay that its rows owe|The saved decay is of . parameter"
    ):
        open_bank(tmp_path, optimizer=lazy)
    open_bank(tmp_path)  # to read it takes none


@pytest.mark.parametrize("codec", ["fp16", "fp8", "int8"])
def test_codecs_that_only_read_are_saved_and_opened(
    make_bank: Make, every_record: Records, tmp_path: Path, codec: str
) -> None:
    bank = make_bank(BY_ORDER, codec=codec, seed=3)
    store: Any = bank.source(bank.tables[0]).store
    keys = make_keys(0, torch.arange(5))
    planes = {"value": torch.randn(5, 3), "count": torch.ones(5, 1, dtype=torch.int32)}
    store.write(keys, bank.source(bank.tables[0]).format.encode(keys, planes))
    save_bank(bank, tmp_path)
    opened = open_bank(tmp_path)
    assert opened.codec == codec
    assert all(torch.equal(a, b) for a, b in zip(every_record(opened), every_record(bank), strict=True))


def test_the_parts_are_safetensors(trained: MemoryBank, tmp_path: Path) -> None:
    save_bank(trained, tmp_path)
    parts = sorted(tmp_path.glob("table-*/rows-*.safetensors"))
    assert len(parts) == len(trained.tables)
    with safe_open(parts[0], framework="pt") as file:
        assert set(file.keys()) == {"value", "count", "mean", "moment"}
        assert file.get_tensor("value").shape == (trained.tables[0].rows, 3)


def test_a_reader_needs_the_values_alone(trained: MemoryBank, tmp_path: Path) -> None:
    save_bank(trained, tmp_path)
    bank, tokens = open_bank(tmp_path), torch.randint(60, (2, 8))
    assert {plane.name for plane in bank.source(bank.tables[0]).format.layout.planes} == {"value", "count"}
    assert torch.equal(bank.read(tokens).wait(1)["engram"], trained.read(tokens).wait(1)["engram"])


def test_multipliers_and_primes_are_read_back_and_not_derived_again(
    trained: MemoryBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_bank(trained, tmp_path)
    monkeypatch.setattr("torch_engram.addressing.ngrams.layouts", None)
    assert open_bank(tmp_path).addressing.layouts == trained.addressing.layouts


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("damage, sentence", [
    ("no facts", r"is not a saved memory \(no readable memory\.json\): give the saved folder"),
    ("half the facts", "is not a saved memory"),
    ("a fact less", r"memory\.json has no 'seed': it is damaged, or another version's"),
    ("list", "is not a saved memory"),
    ("foreign", r"memory\.json has no 'name': it is damaged"),
    ("no layouts", r"memory\.json holds no layouts that can be read"),
    ("a layer less", r"memory\.json has no layout for each layer"),
    ("config", r"EngramConfig has no field 'head'"),
    ("vocabulary", r"canonical-\w+\.safetensors is damaged or no canonical vocabulary"),
    ("another vocabulary", r"canonical-\w+\.safetensors is not the vocabulary of this memory"),
    ("no vocabulary", r"canonical-\w+\.safetensors cannot be read"),
    ("truncated", r"table-01/rows-0+-\d+-\w+\.safetensors is truncated or damaged"),
    ("flipped", r"table-01/rows-0+-\d+-\w+\.safetensors is truncated or damaged"),
    ("a table less", r"memory\.json does not name the parts of its tables"),
    ("no parts", r"memory\.json does not name the parts of its tables"),
])  # fmt: skip
def test_damage_is_named_in_one_sentence(
    trained: MemoryBank, make_vocab: Any, tmp_path: Path, damage: str, sentence: str
) -> None:
    save_bank(trained, tmp_path)
    facts, [canonical] = tmp_path / "memory.json", tmp_path.glob("canonical-*")
    (part,) = (tmp_path / "table-01").glob("rows-*")
    match damage:
        case "no facts":
            facts.unlink()
        case "half the facts":
            facts.write_text(facts.read_text()[:99])
        case "a fact less":
            edit(facts, lambda f: f.pop("seed"))
        case "list":
            facts.write_text("[]")
        case "foreign":
            facts.write_text('{"architectures": ["GPT2LMHeadModel"]}')
        case "no layouts":
            edit(facts, lambda f: f.update(layouts=[{"layer": 1}]))
        case "a layer less":
            edit(facts, lambda f: f["layouts"].pop())
        case "config":
            edit(facts, lambda f: f["config"].update(head=3))
        case "vocabulary":
            canonical.write_bytes(canonical.read_bytes()[:-1] + b"\1")
        case "another vocabulary":
            make_vocab(60, 40, seed=9).save(canonical)
        case "no vocabulary":
            canonical.unlink()
        case "truncated":
            part.write_bytes(part.read_bytes()[:-1])
        case "flipped":
            part.write_bytes(part.read_bytes()[:-1] + b"\x55")
        case "a table less":
            edit(facts, lambda f: f["tables"].pop())
        case "no parts":
            edit(facts, lambda f: f["tables"][1]["parts"].pop())
    with pytest.raises(ValueError, match=sentence) as caught:
        open_bank(tmp_path, optimizer=RowAdam)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config, options, sentence", [
    ({"seed": 1}, {}, "another configuration"),
    ({"rows_per_head": 20}, {}, "another configuration"),
    ({}, {"name": "other"}, "another name"),
    ({}, {"seed": 4}, "another seed of initial rows"),
    ({}, {"codec": "fp32"}, "another codec"),
    ({}, {"optimizer": RowwiseAdam}, "other planes .* load it with its own row optimiser"),
    ({}, {"optimizer": partial(RowAdam, lazy_decay=True)}, "other planes .* load it with its own row optimiser"),
])  # fmt: skip
def test_another_memorys_rows_are_refused_before_any_row_has_changed(
    trained: MemoryBank,
    make_bank: Make,
    every_record: Records,
    tmp_path: Path,
    config: Any,
    options: Any,
    sentence: str,
) -> None:
    save_bank(trained, tmp_path)
    bank = make_bank({**BY_ORDER, **config}, **{"optimizer": RowAdam, "codec": "bf16", "seed": 3, **options})
    before = every_record(bank)
    with pytest.raises(ValueError, match=sentence):
        load_bank(bank, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, every_record(bank), strict=True))


def test_another_tokenizers_rows_are_refused(trained: MemoryBank, make_vocab: Any, tmp_path: Path) -> None:
    save_bank(trained, tmp_path)
    vocab = make_vocab(60, 40)
    vocab.tokenizer_digest = "another"
    bank = MemoryBank(trained.config, vocab, optimizer=RowAdam, codec="bf16", seed=3)
    with pytest.raises(ValueError, match="another tokenizer"):
        load_bank(bank, tmp_path)


def test_damage_in_the_last_table_leaves_every_row_as_it_was(
    trained: MemoryBank, make_bank: Make, every_record: Records, tmp_path: Path
) -> None:
    save_bank(trained, tmp_path)
    (part,) = sorted(tmp_path.glob("table-*"))[-1].glob("rows-*")
    part.write_bytes(part.read_bytes()[:-1])
    bank = make_bank(BY_ORDER, optimizer=RowAdam, codec="bf16", seed=3)
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_bank(bank, tmp_path)
    assert not any(records.any() for records in every_record(bank))


# -- a real process that is killed, and a real disk that is full -------------------------------------------------------

KILLED_SAVES = """
import os, random, signal, sys, time, torch
from pathlib import Path
from torch_engram.memory import open_bank, save_bank
from torch_engram.optim import RowAdam
from torch_engram.stores import parts
torch.set_num_threads(1)
parts.CHUNK_ROWS = 64
bank = open_bank(Path(sys.argv[1]), optimizer=RowAdam)
for attempt in range(12):
    child = os.fork()
    if child == 0:
        for number in range(10_000):
            save_bank(bank, Path(sys.argv[2]) / f"{attempt}-{number}", touched_only=attempt % 2 == 1)
    time.sleep(random.Random(attempt).uniform(0.01, 0.15))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


@pytest.fixture
def saved(make_bank: Make, train: Run, tmp_path: Path) -> Path:
    bank = make_bank({"rows_per_head": 3000}, optimizer=RowAdam)
    train(bank, [[Tokens(torch.randint(60, (4, 50)))] for _ in range(3)])
    save_bank(bank, tmp_path / "earlier")
    return tmp_path / "earlier"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks and kills")
def test_a_killed_save_leaves_the_earlier_folder_whole_and_no_half_that_loads(saved: Path, tmp_path: Path) -> None:
    earlier, target = files(saved), tmp_path / "new"
    save_bank(open_bank(saved, optimizer=RowAdam), tmp_path / "touched", touched_only=True)
    whole = [earlier, files(tmp_path / "touched")]
    subprocess.run([sys.executable, "-c", KILLED_SAVES, str(saved), str(target)], check=True)
    half = 0
    for folder in sorted(target.iterdir()):
        if (folder / "memory.json").exists():
            assert files(folder) == whole[int(folder.name.split("-")[0]) % 2]
        else:
            half += 1
            with pytest.raises(ValueError, match=r"is not a saved memory .*: give the saved folder"):
                open_bank(folder, optimizer=RowAdam)
    assert half > 0
    assert files(saved) == earlier
    open_bank(saved, optimizer=RowAdam)


# -- saves over an earlier one ---------------------------------------------------------------------------------------


def parts_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.glob("table-*/*")}


def test_a_save_over_its_own_folder_adds_the_changed_rows(
    make_bank: Make, train: Run, every_record: Records, tmp_path: Path
) -> None:
    bank = make_bank({"rows_per_head": 3000}, optimizer=RowAdam)
    save_bank(bank, tmp_path)
    whole, rest = parts_of(tmp_path), files(tmp_path)
    save_bank(bank, tmp_path)  # nothing has changed
    assert files(tmp_path) == rest
    for times in range(1, 4):
        train(bank, [[Tokens(torch.randint(60, (1, 4)))]])
        save_bank(bank, tmp_path)
        added = sorted(parts_of(tmp_path) - whole)
        assert len(added) == times * len(bank.tables) and whole < parts_of(tmp_path)
        assert all((tmp_path / name).stat().st_size < 20_000 for name in added)
        reopened = open_bank(tmp_path, optimizer=RowAdam)
        assert all(torch.equal(a, b) for a, b in zip(every_record(reopened), every_record(bank), strict=True))
        bank = reopened if times == 2 else bank  # a bank that was loaded goes on where the saved one was
    save_bank(bank, tmp_path / "elsewhere")
    assert len(parts_of(tmp_path / "elsewhere")) == len(bank.tables)


@pytest.mark.parametrize("between", ["another bank", "another process", "removed"])
def test_a_folder_that_is_not_as_the_bank_left_it_is_written_anew(
    make_bank: Make, train: Run, every_record: Records, tmp_path: Path, between: str
) -> None:
    bank, other = (make_bank({"rows_per_head": 3000}, optimizer=RowAdam, seed=seed) for seed in (0, 1))
    save_bank(bank, tmp_path)
    match between:
        case "another bank":
            save_bank(other, tmp_path)
        case "another process":
            third = open_bank(tmp_path, optimizer=RowAdam)
            train(third, [[Tokens(torch.randint(60, (1, 4)))]])
            save_bank(third, tmp_path)
        case "removed":
            (tmp_path / "memory.json").unlink()
    train(bank, [[Tokens(torch.randint(60, (1, 4)))]])
    save_bank(bank, tmp_path)
    reopened = open_bank(tmp_path, optimizer=RowAdam)
    assert all(torch.equal(a, b) for a, b in zip(every_record(reopened), every_record(bank), strict=True))
    assert len(parts_of(tmp_path)) == len(bank.tables)  # and what the others left is gone


def test_a_save_by_another_while_loading_is_not_built_upon(
    make_bank: Make, train: Run, every_record: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, reader = (make_bank(optimizer=RowAdam) for _ in range(2))
    save_bank(trainer, tmp_path)
    real = saved_tables.load_table

    def load_while_another_saves(*arguments: Any) -> None:
        real(*arguments)
        train(trainer, [[Tokens(torch.randint(60, (1, 2)))]])
        save_bank(trainer, tmp_path)

    monkeypatch.setattr(saved_tables, "load_table", load_while_another_saves)
    load_bank(reader, tmp_path)
    monkeypatch.undo()
    train(reader, [[Tokens(torch.tensor([[5]]))]])
    save_bank(reader, tmp_path)
    found = every_record(open_bank(tmp_path, optimizer=RowAdam))
    assert all(torch.equal(a, b) for a, b in zip(found, every_record(reader), strict=True))


def test_a_save_since_another_folder_writes_what_changed_and_needs_that_folder_no_more(
    make_bank: Make, train: Run, every_record: Records, tmp_path: Path
) -> None:
    bank = make_bank({"rows_per_head": 997}, optimizer=RowAdam)
    train(bank, [[Tokens(torch.randint(60, (2, 30)))]])
    save_bank(bank, tmp_path / "1")
    for number in (2, 3):
        train(bank, [[Tokens(torch.randint(60, (1, 4)))]])
        save_bank(bank, tmp_path / str(number), since=tmp_path / str(number - 1))
    fresh = parts_of(tmp_path / "3") - parts_of(tmp_path / "1")
    assert len(fresh) == 2 * len(bank.tables) and all("changes-" in name for name in fresh)
    for folder in ("1", "2"):
        shutil.rmtree(tmp_path / folder)
    found = every_record(open_bank(tmp_path / "3", optimizer=RowAdam))
    assert all(torch.equal(a, b) for a, b in zip(found, every_record(bank), strict=True))


@pytest.mark.parametrize("spoil", ["another memory", "no links", "nothing there"])
def test_a_save_since_a_folder_that_does_not_serve_writes_all(
    make_bank: Make, train: Run, every_record: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    bank = make_bank(optimizer=RowAdam)
    save_bank(bank, tmp_path / "1")
    train(bank, [[Tokens(torch.randint(60, (1, 1)))]])
    if spoil == "another memory":
        save_bank(make_bank(optimizer=RowAdam, seed=5), tmp_path / "1")
    elif spoil == "no links":
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no links here")))
    else:
        shutil.rmtree(tmp_path / "1")
    save_bank(bank, tmp_path / "2", since=tmp_path / "1")
    assert not list((tmp_path / "2").rglob("changes*"))
    found = every_record(open_bank(tmp_path / "2", optimizer=RowAdam))
    assert all(torch.equal(a, b) for a, b in zip(found, every_record(bank), strict=True))


def test_two_banks_over_one_store_keep_their_own_folders_whole(
    make_bank: Make, train: Run, every_record: Records, tmp_path: Path
) -> None:
    shared: dict[Any, DeviceStore] = {}

    def place(layout: Any, spaces: Any, device: torch.device) -> DeviceStore:
        return shared.setdefault(layout, DeviceStore(layout, spaces, device))

    one, two = (make_bank(optimizer=RowAdam, placement=place, name=name) for name in ("one", "two"))
    save_bank(one, tmp_path / "one")
    save_bank(two, tmp_path / "two")
    train(one, [[Tokens(torch.randint(60, (1, 4)))]])
    save_bank(one, tmp_path / "one")
    train(one, [[Tokens(torch.randint(60, (1, 4)))]])
    save_bank(two, tmp_path / "two")
    found = every_record(open_bank(tmp_path / "two", optimizer=RowAdam))
    assert all(torch.equal(a, b) for a, b in zip(found, every_record(two), strict=True))


def test_a_reader_does_not_save_a_memory_without_its_moments(trained: MemoryBank, tmp_path: Path) -> None:
    save_bank(trained, tmp_path / "own")
    before, reader = files(tmp_path / "own"), open_bank(tmp_path / "own")
    with pytest.raises(
        ValueError, match=r"own also holds mean, moment, which this bank would lose: save to another folder"
    ):
        save_bank(reader, tmp_path / "own")
    assert files(tmp_path / "own") == before
    save_bank(reader, tmp_path / "another")


def test_other_peoples_files_stay(trained: MemoryBank, tmp_path: Path) -> None:
    others = ["table-results/rows-1.csv", "canonical-mine.safetensors.bak", "table-00/notes.txt", "memory.json.bak"]
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "memory.json.0123abcd.tmp").write_text("left by a kill")
    for _ in range(2):
        save_bank(trained, tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in others)
    assert not list(tmp_path.glob("memory.json.*.tmp"))


def test_a_failed_save_over_a_damaged_memory_removes_nothing_that_was_there(
    trained: MemoryBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_bank(trained, tmp_path)
    (tmp_path / "memory.json").write_bytes(b"{" + (tmp_path / "memory.json").read_bytes())
    before = files(tmp_path)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CanonicalVocab, "save", full)  # after all parts were written
    with pytest.raises(OSError, match="No space left"):
        save_bank(trained, tmp_path)
    assert files(tmp_path) == before


def test_another_tokenizers_vocabulary_does_not_take_the_earlier_ones_place(
    trained: MemoryBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have the same map, and a killed save may have written the later one already."""
    assert trained.addressing.vocab is not None
    own, call, died = trained.addressing.vocab.tokenizer_digest, 0, True
    while died:
        trained.addressing.vocab.tokenizer_digest = own
        save_bank(trained, tmp_path)
        trained.addressing.vocab.tokenizer_digest = "another"
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            came_to_that = die_at(patch, call)
            save_bank(trained, tmp_path)
        vocab = open_bank(tmp_path).addressing.vocab
        assert vocab is not None and vocab.tokenizer_digest in (own, "another")
        died, call = came_to_that(), call + 1
    assert vocab.tokenizer_digest == "another" and call > 8


SAVES = """
import sys, torch
from pathlib import Path
from torch_engram.memory import open_bank, save_bank
from torch_engram.optim import RowAdam
torch.set_num_threads(1)
bank = open_bank(Path(sys.argv[1]), optimizer=RowAdam)
for _ in range(15):
    step = bank.prefetch(torch.randint(60, (1, 4)))
    sum(step[0].wait(layer)["engram"].sum() for layer in bank.config.layers).backward()
    step.reduce()
    step.apply()
    save_bank(bank, Path(sys.argv[2]))
"""


def test_two_processes_save_into_one_folder_one_after_the_other(saved: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAVES, str(saved), str(tmp_path / "both")]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, complaint = process.communicate(timeout=120)
        assert not process.returncode, complaint
    bank = open_bank(tmp_path / "both", optimizer=RowAdam)
    assert len(parts_of(tmp_path / "both")) <= len(bank.tables) * 15


def die_at(patch: pytest.MonkeyPatch, call: int) -> Callable[[], bool]:
    """From the given call on, nothing that changes the disk gets through any more; returns whether it came to that."""
    made = [0]

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **options: Any) -> Any:
            made[0] += 1
            if made[0] > call:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        return change

    for name in ("pwrite", "fsync", "replace", "unlink", "mkdir"):
        patch.setattr(os, name, dying(getattr(os, name)))
    return lambda: made[0] > call


@pytest.mark.parametrize("tokens", [1, 50], ids=["adds", "writes anew"])
def test_every_moment_of_a_save_leaves_the_earlier_memory_or_the_new_one(
    make_bank: Make, train: Run, every_record: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    seen, died, call = set(), True, 0
    while died:
        folder = tmp_path / str(call)
        bank = make_bank(optimizer=RowAdam)
        save_bank(bank, folder)
        before = every_record(bank)
        train(bank, [[Tokens(torch.randint(60, (1, tokens)))]])
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            came_to_that = die_at(patch, call)
            save_bank(bank, folder)
        found = every_record(open_bank(folder, optimizer=RowAdam))
        is_new = all(torch.equal(a, b) for a, b in zip(found, every_record(bank), strict=True))
        assert is_new or all(torch.equal(a, b) for a, b in zip(found, before, strict=True))
        seen.add(is_new)
        save_bank(bank, folder)  # the next save goes on from either, and takes away what the dead one left
        tables = json.loads((folder / "memory.json").read_text())["tables"]
        assert len(parts_of(folder)) == sum(len(table["parts"]) for table in tables)
        assert len(list(folder.iterdir())) == len(tables) + 2  # memory.json and the vocabulary beside the tables
        found = every_record(open_bank(folder, optimizer=RowAdam))
        assert all(torch.equal(a, b) for a, b in zip(found, every_record(bank), strict=True))
        died, call = came_to_that(), call + 1
    assert seen == {False, True} and call > 20


SAVED_OVER = """
import os, random, signal, sys, time, torch
from pathlib import Path
from torch_engram.memory import open_bank, save_bank
from torch_engram.optim import RowAdam
torch.set_num_threads(1)
folder, tokens = Path(sys.argv[1]), torch.arange(40).view(1, -1)
def counts(bank):
    step = bank.prefetch(tokens)
    step.touched
    return torch.cat([rows.planes["count"] for layer in step._rows.values() for rows in layer])
begun = counts(open_bank(folder, optimizer=RowAdam))
for attempt in range(12):
    wait, tell = os.pipe()
    child = os.fork()
    if child == 0:
        bank = open_bank(folder, optimizer=RowAdam)
        while True:
            step = bank.prefetch(tokens)
            sum(step[0].wait(layer)["engram"].sum() for layer in bank.config.layers).backward()
            step.reduce()
            step.apply()
            os.write(tell, b".")
            save_bank(bank, folder)
    for _ in range(1 + attempt % 2):  # a busy machine takes its time to come to a save, the first or the second one
        os.read(wait, 1)
    time.sleep(random.Random(attempt).uniform(0, 0.2))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    print(*set((counts(open_bank(folder, optimizer=RowAdam)) - begun).flatten().tolist()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks and kills")
def test_a_save_that_is_killed_over_an_earlier_one_leaves_a_whole_memory(saved: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SAVED_OVER, str(saved)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    saves = [int(line) for line in done.stdout.splitlines()]  # one number a line: all rows are of one save
    assert len(saves) == 12 and saves == sorted(saves) and saves[-1] > 0


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from torch_engram.memory import open_bank, save_bank
from torch_engram.optim import RowAdam
bank = open_bank(Path(sys.argv[1]), optimizer=RowAdam)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in sys.argv[3:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try:
        save_bank(bank, Path(sys.argv[2]) / limit)
    except OSError as error:
        print("OSError", limit)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs resource limits")
def test_a_full_disk_is_an_os_error_and_leaves_the_earlier_one_whole(saved: Path, tmp_path: Path) -> None:
    earlier, limits = files(saved), ["0", "4096", "5000", "100000"]
    command = [sys.executable, "-c", FULL_DISK, str(saved), str(tmp_path / "new"), *limits]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == [f"OSError {limit}" for limit in limits], done.stderr
    assert files(saved) == earlier
    for limit in limits:
        assert not list((tmp_path / "new" / limit).rglob("*.safetensors.tmp"))
        with pytest.raises(ValueError, match="is not a saved memory"):
            open_bank(tmp_path / "new" / limit)
