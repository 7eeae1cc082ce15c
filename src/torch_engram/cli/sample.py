"""``engram sample``: continue prompts with a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sample(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="A text to continue; may be repeated.")],
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Continue prompts, decoded together with a cache."""
    from rich.console import Console
    from rich.text import Text

    from torch_engram.data.tokenizers import end_token_id
    from torch_engram.generate import generate
    from torch_engram.train import open_checkpoint
    from torch_engram.train.build import require_device

    require_device(device)
    loaded = open_checkpoint(checkpoint, device)
    encoded = [loaded.tokenizer.encode(text, add_special_tokens=False).ids for text in prompt]
    written = generate(
        loaded.decoder,
        loaded.banks,
        encoded,
        max_new_tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        end_id=end_token_id(loaded.tokenizer),
    )
    console = Console()
    for text, continuation in zip(prompt, written, strict=True):
        console.print(Text(text, style="dim") + Text(loaded.tokenizer.decode(continuation)), end="\n\n", soft_wrap=True)
