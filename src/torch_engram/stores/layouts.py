"""What the tensors of a table are called where it is written, by the names of the layouts in which tables are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch_engram.config import nearest
from torch_engram.stores.codecs import CODECS, VALUE_CODECS, Component, require_value_codec


class Layout(NamedTuple):
    """How the tensors of a table are called and made."""

    names: str
    """With ``{layer}`` where they say it, and ``{shard}`` where a table has many tensors."""
    codecs: tuple[str, ...]
    """Those that it may have, the usual one first."""
    width: int

    @property
    def many(self) -> bool:
        """Whether a table may be dealt out to many tensors."""
        return "{shard}" in self.names


LAYOUTS: Mapping[str, Layout] = {
    "plain": Layout("table.weight", ("bf16", *(name for name in VALUE_CODECS if name != "bf16")), 64),
    "deepseek-v4.1": Layout("layers.{layer}.engram.embed.weight", ("fp8",), 256),
    "qwen4exp": Layout(
        "model.language_model.layers.{layer}.ple.ple_embedding.ngram_embedding.shard_{shard}.weight",
        ("bf16", "fp16", "fp32"),
        160,
    ),
}


def plain_name(layer: int, number: int | None = None) -> str:
    """What the tensor of a layer's table is called in the layout ``plain``; ``number`` where it has several."""
    return f"layers.{layer}.{'' if number is None else f'{number}.'}{LAYOUTS['plain'].names}"


def known_layout(name: str) -> Layout:
    """The layout of this name. Raises ``ValueError`` when there is none, with the nearest one."""
    if name not in LAYOUTS:
        raise ValueError(f"There is no layout {name!r}: {nearest(name, LAYOUTS)}")
    return LAYOUTS[name]


def require_codec_of(layout: str, codec: str) -> None:
    """Raises ``ValueError`` for a codec that is none, with the nearest one, or that ``layout`` has not."""
    require_value_codec(codec)
    codecs = LAYOUTS[layout].codecs
    if codec not in codecs:
        raise ValueError(
            f"{layout} keeps rows in {' or '.join(codecs)}, not {codec}: leave out --codec, or use --layout plain."
        )


def components_of(name: str, codec: str, width: int) -> dict[str, Component]:
    """The components of rows by tensor: their values are called ``name``, as find_tables() wants them."""
    stem = name.removesuffix("weight").removesuffix(".")
    parts = CODECS[codec].components(width)
    return {name if part.name == "value" else f"{stem}.{part.name}": part for part in parts}
