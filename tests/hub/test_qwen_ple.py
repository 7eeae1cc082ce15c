"""Qwen4Exp with served tables against the same model with its own: every output equal, bit for bit."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers.models.qwen4_exp", reason="needs transformers with Qwen4Exp")
from transformers import DynamicCache

from torch_engram.hub import serve_ple
from torch_engram.memory import MemoryBank
from torch_engram.stores import DeviceStore

Build = Callable[..., Any]
BankOf = Callable[..., MemoryBank]


def batch(rows: int = 3, length: int = 19) -> dict[str, Tensor]:
    """Left-padded, with both ends of text, 7 and 9, among the tokens."""
    ids, mask = torch.randint(10, 60, (rows, length)), torch.ones(rows, length, dtype=torch.int64)
    ids[0, length // 2] = ids[-1, length // 3] = 7
    ids[0, 3] = 9
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(scope="module")
def pair(build: Build, bank_of: BankOf) -> tuple[Any, Any]:
    """A model, and its equal with served tables."""
    original, served = build(), build()
    table = served.model.language_model.layers[1].ple.ple_embedding.ngram_embedding
    serve_ple(served, bank_of(served, placement="host"))
    torch.nn.init.zeros_(table.weight)  # it is kept, and reading it would show
    return original, served


GENERATE: dict[str, dict[str, Any]] = {
    "greedy": dict(do_sample=False),
    "no cache": dict(do_sample=False, use_cache=False),
    "static cache": dict(do_sample=False, cache_implementation="static"),
    "prefill in chunks": dict(do_sample=False, prefill_chunk_size=4),
    "sampling": dict(do_sample=True, temperature=1.3, top_k=0),
    "many a prompt": dict(do_sample=True, num_return_sequences=3),
    "beams": dict(do_sample=False, num_beams=4, num_return_sequences=2),
    "sampled beams": dict(do_sample=True, num_beams=3),
}


@pytest.mark.parametrize("mode", GENERATE)
def test_generation(pair: tuple[Any, Any], mode: str) -> None:
    inputs, found = batch(), []
    for model in pair:
        torch.manual_seed(3)
        found.append(
            model.generate(
                **inputs, max_new_tokens=12, return_dict_in_generate=True, output_logits=True, **GENERATE[mode]
            )
        )
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert all(torch.equal(*logits) for logits in zip(found[0].logits, found[1].logits, strict=True))


@pytest.mark.parametrize("kind", ["Qwen4ExpForConditionalGeneration", "Qwen4ExpForCausalLM", "Qwen4ExpTextModel"])
@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_every_class_placement_and_type(
    build: Build, bank_of: BankOf, kind: str, placement: str, dtype: torch.dtype
) -> None:
    original, inputs = build(kind).to(dtype), batch()
    expected = original(**inputs)[0]
    served = serve_ple(original, bank_of(original, placement=placement, dtype=dtype))
    assert torch.equal(original(**inputs)[0], expected)
    served.detach()
    assert torch.equal(original(**inputs)[0], expected)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), rows=st.integers(1, 3))
@torch.no_grad()
def test_any_chunks(pair: tuple[Any, Any], seed: int, lengths: list[int], rows: int) -> None:
    torch.manual_seed(seed)
    ids = torch.randint(5, 60, (rows, sum(lengths)))
    models = [model.model.language_model for model in pair]
    caches = [DynamicCache(config=model.config) for model in models]
    for chunk in ids.split(lengths, dim=1):
        assert torch.equal(*[model(chunk, cache=cache)[0] for model, cache in zip(models, caches, strict=True)])


@torch.no_grad()
def test_a_cache_that_is_reset(pair: tuple[Any, Any]) -> None:
    ids, found = batch()["input_ids"], []
    for model in pair:
        cache = DynamicCache(config=model.config.text_config)
        first = model(ids, cache=cache).logits
        cache.reset()
        found.append((first, model(ids[:, :5], cache=cache).logits))
    assert all(torch.equal(*logits) for logits in zip(*found, strict=True))


@torch.no_grad()
def test_embeddings_and_images_in_place_of_tokens(pair: tuple[Any, Any]) -> None:
    ids = batch()["input_ids"]
    image = torch.randn(4, 3 * 2 * 4 * 4)
    ids[0, 5] = 60
    pictured = dict(
        input_ids=ids[:1], pixel_values=image, image_grid_thw=torch.tensor([[1, 2, 2]]),
        mm_token_type_ids=(ids[:1] == 60).int(),
    )  # fmt: skip
    found = [
        (model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(**pictured).logits) for model in pair
    ]
    assert all(torch.equal(*logits) for logits in zip(*found, strict=True))


def test_gradients_of_all_other_weights(build: Build, bank_of: BankOf) -> None:
    """Also where layers are recomputed in the backward, which calls lookups out of their order."""
    grads = []
    for is_served, recompute in [(False, False), (True, False), (True, True)]:
        model = build("Qwen4ExpForCausalLM").train()
        if is_served:
            serve_ple(model, bank_of(model))
        if recompute:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)
        inputs = batch(8, 25)
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        parameters = [p for name, p in model.named_parameters() if "ngram_embedding" not in name]
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    assert all(torch.equal(first, other) for others in grads[1:] for first, other in zip(grads[0], others, strict=True))


@torch.no_grad()
def test_several_ple_layers(build: Build, bank_of: BankOf) -> None:
    kinds = ["linear_attention", "linear_attention", "indexed_attention", "linear_attention"]
    layers = dict(ple_layer_ids=[1, 2, 4], layer_types=kinds, ngram_size=4, ple_embed_dim=36)
    model, inputs = build("Qwen4ExpForCausalLM", **layers), batch()
    expected = model(**inputs).logits
    served = serve_ple(model, bank_of(model, layouts=None))
    assert served.bank.config.layers == (0, 1, 3)
    assert torch.equal(model(**inputs).logits, expected)


class Watched(DeviceStore):
    """Remembers what was fetched, and says so."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.keys: list[Tensor] = []
        self.asked = threading.Event()

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        self.keys.append(keys)
        self.asked.set()
        return super().fetch(keys, group)


@torch.no_grad()
def test_rows_are_fetched_once_each_while_the_first_layer_runs(build: Build, bank_of: BankOf) -> None:
    model = build("Qwen4ExpForCausalLM")
    bank = bank_of(model, placement=Watched)
    serve_ple(model, bank)
    store: Any = bank.source(bank.tables[0]).store
    model.model.layers[0].mlp.register_forward_hook(lambda *_: in_time.append(store.asked.wait(30)))
    cache, in_time = DynamicCache(config=model.config), []
    for ids in (batch()["input_ids"].repeat(2, 1), torch.randint(60, (6, 1))):
        store.keys.clear()
        store.asked.clear()
        model(ids, cache=cache)
        assert len(store.keys) == 1 and len(store.keys[0].unique()) == len(store.keys[0])
    assert in_time == [True, True]


class Grouped(DeviceStore):
    """Checks that every key comes with the mix of an n-gram that reads it."""

    grouped = True

    def fetch(self, keys: Tensor, group: Tensor | None = None) -> Tensor:
        assert group is not None
        sizes, offsets = self.hash
        column = torch.searchsorted(offsets, keys, right=True) - 1
        assert torch.equal(group % sizes[column] + offsets[column], keys)
        return super().fetch(keys, group)


@torch.no_grad()
def test_a_grouped_store_is_given_mixes(build: Build, bank_of: BankOf) -> None:
    model, inputs = build("Qwen4ExpForCausalLM"), batch()
    expected = model(**inputs).logits
    bank, embedding = bank_of(model, placement=Grouped), model.model.layers[1].ple.ple_embedding
    bank.source(bank.tables[0]).store.hash = embedding.ngram_heads_vocab_sizes, embedding.ngram_heads_offsets  # type: ignore[attr-defined]
    serve_ple(model, bank)
    assert torch.equal(model(**inputs).logits, expected)


def test_threads_do_not_read_each_others_rows(pair: tuple[Any, Any]) -> None:
    original, served = pair
    batches, found = [batch(2, 7) for _ in range(12)], {}

    def run(number: int) -> None:
        with torch.no_grad():
            found[number] = served(**batches[number]).logits

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        assert all(torch.equal(found[number], original(**inputs).logits) for number, inputs in enumerate(batches))


@torch.no_grad()
def test_a_forward_that_fails_leaves_nothing_behind(build: Build, bank_of: BankOf) -> None:
    model, ids = build("Qwen4ExpForCausalLM"), batch()["input_ids"]
    bank = bank_of(model)
    serve_ple(model, bank)
    fails = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids)  # without a mask, these very tokens go down to the lookup
    fails.remove()
    embedding, other = model.model.layers[1].ple.ple_embedding, torch.randint(60, ids.shape)
    ids.copy_(other)
    assert torch.equal(embedding(ids, None), embedding(other, None))
    assert not bank.source(bank.tables[0]).in_use


@torch.no_grad()
def test_a_lookup_in_between_takes_its_own_rows(build: Build, bank_of: BankOf) -> None:
    model, inputs = build("Qwen4ExpForCausalLM"), batch()
    embedding, other = model.model.layers[1].ple.ple_embedding, torch.randint(60, inputs["input_ids"].shape)
    expected = embedding(other, None), model(**inputs).logits
    serve_ple(model, bank_of(model))
    model.model.layers[0].mlp.register_forward_hook(lambda *_: between.append(embedding(other, None)))
    between: list[Tensor] = []
    assert torch.equal(model(**inputs).logits, expected[1]) and torch.equal(between[0], expected[0])


@torch.no_grad()
def test_a_copy_is_served_by_the_same_bank(build: Build, bank_of: BankOf) -> None:
    model, inputs = build("Qwen4ExpForCausalLM"), batch()
    expected = model(**inputs).logits
    served = serve_ple(model, bank_of(model))
    copied = copy.deepcopy(model)
    served.detach()
    assert torch.equal(copied(**inputs).logits, expected) and torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_the_type_follows_the_model(build: Build, bank_of: BankOf) -> None:
    model, inputs = build("Qwen4ExpForCausalLM"), batch()
    serve_ple(model, bank_of(model, dtype=torch.float32))
    expected = build("Qwen4ExpForCausalLM").bfloat16()(**inputs).logits
    assert torch.equal(model.bfloat16()(**inputs).logits, expected)


def test_detach_gives_the_model_back(build: Build, bank_of: BankOf) -> None:
    model = build("Qwen4ExpForCausalLM")
    tables = [model.model.layers[1].ple.ple_embedding.ngram_embedding]
    state, attributes = model.state_dict(), set(vars(model))
    served = serve_ple(model, bank_of(model))
    assert not any("ngram_embedding" in name for name in model.state_dict())
    served.detach()
    served.detach()
    assert model.model.layers[1].ple.ple_embedding.ngram_embedding is tables[0]
    assert list(model.state_dict()) == list(state) and set(vars(model)) == attributes
    for part in model.modules():
        assert not part._forward_pre_hooks and not part._forward_hooks
    serve_ple(model, bank_of(model)).detach()
