"""A memory on a model that was loaded in 4 or 8 bits: it alone is trained, in float, through the quantised blocks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from models import VOCAB, make_model, make_tokenizer
from torch_engram.hub import Attached, attach, config_for, from_pretrained, load_memory
from torch_engram.optim import RowAdam

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore::FutureWarning")
BITS: dict[int, dict[str, Any]] = {
    4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
    8: {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    make_model("llama", hidden_size=64, intermediate_size=64).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=BITS, ids="{}-bit".format)
def model(request: pytest.FixtureRequest, device: torch.device, folder: Path) -> Any:
    config = BitsAndBytesConfig(**BITS[request.param])
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map={"": device}
    ).eval()


@pytest.fixture
def ids(device: torch.device) -> Tensor:
    return torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(4)).to(device)


def give(model: Any) -> Attached:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = config_for(model, tokenizer, layers=(0, 2), heads=2, row_dim=8, rows_per_head=200)
    return attach(model, tokenizer, config, optimizer=lambda rows: RowAdam(rows, lr=1e-2))


def train(model: Any, memory: Attached, ids: Tensor, steps: int = 4) -> list[float]:
    optimizer, losses = memory.optimizer(lr=1e-2), []
    model.train()
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses


def test_only_the_memory_is_trained_and_saved_beside_the_model(
    model: Any, ids: Tensor, device: torch.device, folder: Path, tmp_path: Path
) -> None:
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    with torch.no_grad():
        before = model(ids).logits
    memory = give(model)
    assert torch.equal(model(ids).logits, before)  # rows are zero
    losses = train(model, memory, ids)
    assert losses[-1] < losses[0] - 0.2
    assert {weight.dtype for weight in memory.parameters()} == {torch.float32}
    full = model(ids).logits

    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, make_tokenizer(), device_map={"": device}).eval()
    assert again.is_quantized and torch.equal(again(ids).logits, full)

    memory.detach()
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == trained
    load_memory(model, make_tokenizer(), tmp_path / "memories" / "memory")
    assert torch.equal(model(ids).logits, full)


@pytest.mark.parametrize("model", [4], indirect=True)
def test_gradients_are_those_of_the_weights_that_the_bits_stand_for(model: Any, ids: Tensor) -> None:
    plain = copy.deepcopy(model).dequantize()
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear is not type(model.model.layers[0].mlp.up_proj)
    found, expected = give(model), give(plain)
    torch.testing.assert_close(train(model, found, ids), train(plain, expected, ids), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-3, atol=1e-3)


def test_a_trainer_takes_it(model: Any, ids: Tensor, tmp_path: Path) -> None:
    """Transformers' own refuses a quantised model without something to train beside its weights."""
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=ids.device.type == "cpu",
        disable_tqdm=True, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids.cpu()]
    kind = type(model.hf_quantizer)
    memory = give(model)
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(memory.optimizer(lr=1e-2), None))
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    memory.detach()
    assert type(model.hf_quantizer) is kind
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments, train_dataset=data)
