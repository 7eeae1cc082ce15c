"""Models whose layers can be read: what is read adds up to what the model itself computes, memories or not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_models import WORDS, hub_model, word_tokenizer
from torch import Tensor

from torch_engram.analysis.lens import logit_lens
from torch_engram.analysis.reading import last_tokens, read_text
from torch_engram.analysis.subject import DecoderSubject, HubSubject, open_subject
from torch_engram.data import DOCUMENT_SEPARATOR, IGNORE_INDEX, Batch
from torch_engram.models import Decoder, DecoderConfig
from torch_engram.train import Loaded, Trainer
from torch_engram.train.evaluate import read_memory


def batch(vocab: int, length: int = 12) -> Batch:
    """Two sequences, the second with a document that begins in its midst."""
    tokens = torch.randint(3, vocab, (2, length + 1), generator=torch.Generator().manual_seed(1))
    starts = torch.zeros(2, length, dtype=torch.bool)
    starts[:, 0] = starts[1, 5] = True
    targets = tokens[:, 1:].clone()
    targets[1, 4] = IGNORE_INDEX
    return Batch(tokens[:, :-1].contiguous(), targets, starts)


# -- this library's decoder -------------------------------------------------------------------------------------------


def test_the_states_of_a_decoder_are_its_own(checkpoint: Path, loaded: Loaded) -> None:
    """Two branches, memory at two layers: the last state reads out as the model does, the first is the embedding."""
    subject, given = open_subject(checkpoint), batch(300)
    assert isinstance(subject, DecoderSubject) and subject.has_memory
    states = subject.states(given)
    decoder = loaded.decoder
    assert states.shape == (3, 2, 12, 16) and states.dtype == torch.float32
    torch.testing.assert_close(states[0], decoder.embedding(given.tokens))
    with torch.no_grad():
        whole = decoder(given.tokens, read_memory(loaded.banks, given), doc_start=given.doc_start)
    torch.testing.assert_close(subject.logits(states[-1].flatten(0, 1)), whole.flatten(0, 1))
    assert not torch.allclose(states[1], states[2])


def test_a_decoder_without_its_memory_is_one_whose_rows_are_zero(loaded: Loaded, checkpoint: Path) -> None:
    """Here an Engram has no bias: what zero embeddings add is nothing, too."""
    subject, given = open_subject(checkpoint), batch(300)

    class Nothing:
        def wait(self, layer: int) -> dict[str, Tensor]:
            config = loaded.banks["engram"].config
            return {"engram": torch.zeros(2, 12, config.embedding_dim)} if layer in config.layers else {}

    with torch.no_grad():
        zero = loaded.decoder(given.tokens, Nothing(), doc_start=given.doc_start)
    before = subject.states(given)
    with subject.disabled():
        off = subject.states(given)
    torch.testing.assert_close(subject.logits(off[-1].flatten(0, 1)), zero.flatten(0, 1))
    torch.testing.assert_close(off[0], before[0])
    assert not torch.allclose(off[1], before[1])
    torch.testing.assert_close(subject.states(given), before)


def test_a_decoder_that_has_no_memory(dense: Trainer) -> None:
    subject, given = open_subject(dense.folder), batch(300)
    assert not subject.has_memory
    with subject.disabled():
        torch.testing.assert_close(subject.states(given), subject.states(given))


def test_ids_beyond_the_tokenizer_are_never_predicted() -> None:
    config = DecoderConfig(vocab_size=70, hidden=16, layers=1, heads=2, ffn_hidden=16, real_vocab=64)
    subject, given = DecoderSubject(Decoder(config), {}, word_tokenizer()), batch(64)
    logits = subject.logits(subject.states(given)[0].flatten(0, 1))
    assert logits.shape == (24, 70) and (logits.softmax(-1)[:, 64:] == 0).all()
    assert all(math.isfinite(nats) for nats in logit_lens(subject, [given]).nats)


# -- transformers -----------------------------------------------------------------------------------------------------


def test_a_saved_model_with_its_memory(hub_folder: Path) -> None:
    from torch_engram.hub import from_pretrained

    subject, given = open_subject(hub_folder), batch(64)
    assert isinstance(subject, HubSubject) and subject.has_memory
    assert subject.tokenizer.get_vocab() == {word: number for number, word in enumerate(WORDS)}
    model, positions = from_pretrained(hub_folder), torch.arange(12).repeat(2, 1)
    positions[1, 5:] -= 5
    with torch.no_grad():
        embedded = model.get_input_embeddings()(given.tokens)
        whole = model(given.tokens, position_ids=positions, use_cache=False).logits
    states = subject.states(given)
    assert states.shape == (4, 2, 12, 32)
    torch.testing.assert_close(states[0], embedded)  # though a memory is added before the first block
    torch.testing.assert_close(subject.logits(states[-1].flatten(0, 1)), whole.flatten(0, 1))


def test_a_saved_model_without_its_memory_is_the_model(hub_folder: Path) -> None:
    subject, given = open_subject(hub_folder), batch(64)
    plain = HubSubject(hub_model("llama"), word_tokenizer())
    assert not plain.has_memory
    with subject.disabled():
        torch.testing.assert_close(subject.states(given), plain.states(given))
    assert not torch.allclose(subject.states(given)[1], plain.states(given)[1])


GEMMA = dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=64, final_logit_softcapping=0.05)
V4 = dict(
    moe_intermediate_size=16, head_dim=16, q_lora_rank=16, num_experts_per_tok=2, n_routed_experts=4, hc_mult=3,
    layer_types=["sliding_attention"] * 3, mlp_layer_types=["moe"] * 3, o_groups=2, o_lora_rank=8,
    partial_rotary_factor=0.5, sliding_window=64,
)  # fmt: skip
FALCON = dict(alibi=False, new_decoder_architecture=False, parallel_attn=False, multi_query=True)


@pytest.mark.parametrize(
    ("kind", "changes", "width"),
    [("gemma2", GEMMA, 32), ("gpt2", {}, 32), ("deepseek_v4", V4, 96), ("falcon", FALCON, 32)],
)
def test_the_last_state_reads_out_as_the_model_does(kind: str, changes: dict[str, Any], width: int) -> None:
    """A cap on the logits, learnt positions, weighed branches, blocks that give tuples: nothing is asked by name."""
    subject, given = HubSubject(hub_model(kind, **changes), word_tokenizer()), batch(64)
    positions = torch.arange(12).repeat(2, 1)
    positions[1, 5:] -= 5
    with torch.no_grad():
        whole = subject.model(given.tokens, position_ids=positions, use_cache=False).logits
    states = subject.states(given)
    assert states.shape == (4, 2, 12, width)
    assert subject._gives_tuples == (kind == "falcon")
    torch.testing.assert_close(subject.logits(states[-1].flatten(0, 1)), whole.flatten(0, 1))
    torch.testing.assert_close(subject.states(given), states)  # blocks compute again


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither a run's folder with a checkpoint nor a model's with a config\.json"):
        open_subject(tmp_path)
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="There is no causal model with a tokenizer"):
        open_subject(tmp_path)


# -- texts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(f"w3 w4 w5 w6\n{DOCUMENT_SEPARATOR}w7 w3 w4\n{DOCUMENT_SEPARATOR}w8 w9 w10 w11 w12\n")
    return path


def test_a_text_in_sequences(text: Path) -> None:
    first, second = read_text(text, word_tokenizer(), 100, length=4, batch=1)
    assert first.batch.tokens.tolist() == [[3, 4, 5, 6]] and second.batch.tokens.tolist() == [[7, 3, 4, 8]]
    assert first.batch.targets.tolist() == [[4, 5, 6, IGNORE_INDEX]]
    assert second.batch.targets.tolist() == [[3, 4, IGNORE_INDEX, 9]]
    assert second.batch.doc_start.tolist() == [[True, False, False, True]]
    assert first.chosen.all() and second.chosen.all()


def test_a_text_is_read_as_far_as_is_asked(text: Path) -> None:
    (reading,) = read_text(text, word_tokenizer(), 6, length=3)
    assert reading.batch.tokens.tolist() == [[3, 4, 5], [6, 7, 3]]
    assert reading.batch.doc_start.tolist() == [[True, False, False], [True, True, False]]
    (short,) = read_text(text, word_tokenizer(), 1000)
    assert short.batch.tokens.shape == (1, 11)
    (tiny,) = read_text(text, word_tokenizer(), 2)
    assert tiny.batch.tokens.tolist() == [[3, 4]]


def test_positions_are_the_last_tokens_of_entities(text: Path) -> None:
    (reading,) = read_text(text, word_tokenizer(), 100, entities=["w3 w4", "w10"])
    assert reading.chosen.nonzero()[:, 1].tolist() == [1, 6, 9]  # of the first, the second and the third document
    with pytest.raises(ValueError, match="None of the 1 entities stands"):
        read_text(text, word_tokenizer(), 100, entities=["w4 w3"])


def test_a_character_of_several_tokens_counts_by_its_last(loaded: Loaded) -> None:
    document = "By the way, 霜 and 龘 were seen."
    encoding = loaded.tokenizer.encode(document)
    begin = document.index("龘")
    of_it = [place for place, (first, _) in enumerate(encoding.offsets) if first == begin]
    assert len(of_it) > 1
    assert list(last_tokens(document, encoding, ["龘"])) == [of_it[-1]]
