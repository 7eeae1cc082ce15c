"""Codecs: how the numbers of a plane become bytes. A codec names its components and encodes whole rows at once.

fp32, int32, bf16 and fp16 have one component; formats with scales have two: fp8 one for 32 numbers, int8 one a row. New
codecs join :data:`CODECS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_engram.config import nearest

_CACHED = 1 << 18
"""Numbers that a CPU decodes together, so that what is between stays in its cache."""
_LARGEST_E4M3 = 448.0


@dataclass(frozen=True)
class Component:
    """One typed run of numbers in an encoded row."""

    name: str
    dtype: torch.dtype
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes of the component in one row."""
        return self.width * self.dtype.itemsize


class Codec(Protocol):
    """Encodes rows ``[U, width]`` to components ``[U, component.width]`` and back."""

    @property
    def stochastic(self) -> bool:
        """Whether :meth:`encode` uses its noise."""

    @property
    def trains(self) -> bool:
        """Whether small updates of a row are kept: exactly, or in expectation."""

    def components(self, width: int) -> tuple[Component, ...]:
        """The components of a row of ``width`` numbers."""

    def encode(self, values: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """One tensor a component. ``noise``: int64 ``[U, width]`` random bits for stochastic rounding; None rounds
        to nearest."""

    def decode(self, components: tuple[Tensor, ...]) -> Tensor:
        """Inverse of :meth:`encode`: contiguous fp32 ``[U, width]`` (int32 for the integer codec)."""


@dataclass(frozen=True)
class Plain:
    """A dtype that holds the numbers exactly."""

    dtype: torch.dtype
    stochastic: bool = False
    trains: bool = True

    def components(self, width: int) -> tuple[Component, ...]:
        """See :class:`Codec`."""
        return (Component("value", self.dtype, width),)

    def encode(self, values: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """See :class:`Codec`."""
        return (values.to(self.dtype),)

    def decode(self, components: tuple[Tensor, ...]) -> Tensor:
        """See :class:`Codec`."""
        return components[0].contiguous()


class BFloat16:
    """bf16, rounded stochastically on write so that small updates are kept in expectation."""

    stochastic = trains = True

    def components(self, width: int) -> tuple[Component, ...]:
        """See :class:`Codec`."""
        return (Component("value", torch.bfloat16, width),)

    def encode(self, values: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """See :class:`Codec`. Adding 16 random bits below bf16's last one and cutting them off rounds up with
        the probability that the cut part asks for; NaN and infinity pass unchanged."""
        if noise is None:
            return (values.to(torch.bfloat16),)
        bits = values.contiguous().view(torch.int32) + (noise & 0xFFFF).to(torch.int32)
        rounded = (bits & -0x10000).view(torch.float32)
        return (torch.where(values.isfinite(), rounded, values).to(torch.bfloat16),)

    def decode(self, components: tuple[Tensor, ...]) -> Tensor:
        """See :class:`Codec`."""
        return components[0].to(torch.float32)


class Float16:
    """fp16, rounded to nearest; past 65,504 infinity."""

    stochastic = trains = False

    def components(self, width: int) -> tuple[Component, ...]:
        """See :class:`Codec`."""
        return (Component("value", torch.float16, width),)

    def encode(self, values: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """See :class:`Codec`."""
        return (values.to(torch.float16),)

    def decode(self, components: tuple[Tensor, ...]) -> Tensor:
        """See :class:`Codec`."""
        return components[0].to(torch.float32)


@dataclass(frozen=True)
class Float8:
    """E4M3 with a power of two, E8M0, for every 32 numbers: DeepSeek-V4.1's, so that its tables are read as they are.

    ``block``: how many numbers share a scale where they are not 32. A scale is the byte of an fp32 exponent: 0 stands
    for 0 and 255 for infinity, which is not what PyTorch's own ``float8_e8m0fnu`` makes of them.
    """

    block: int = 32
    stochastic = trains = False

    def components(self, width: int) -> tuple[Component, ...]:
        """See :class:`Codec`. The last scale may have fewer numbers."""
        blocks = -(-width // self.block)
        return Component("value", torch.float8_e4m3fn, width), Component("scale", torch.float8_e8m0fnu, blocks)

    def encode(self, values: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """See :class:`Codec`. Scales are the least powers of two that bring a block to 448 or less, 2**-126 at least;
        numbers are rounded to nearest, ties to even. A block with infinity, which E4M3 has not, or NaN is all NaN."""
        width = values.shape[1]
        padded = F.pad(values.float(), (0, -width % self.block)).unflatten(1, (-1, self.block))
        largest = padded.abs().amax(2) / _LARGEST_E4M3
        mantissa, exponent = torch.frexp(largest)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        finite = largest.isfinite()
        scale = torch.where(finite & (largest > 0), exponent + 127, 127).clamp(1, 254).to(torch.uint8)
        scaled = torch.where(finite[..., None], padded / self._factors(scale)[..., None], torch.nan)
        return scaled.flatten(1)[:, :width].to(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)

    def decode(self, components: tuple[Tensor, ...]) -> Tensor:
        """See :class:`Codec`."""
        codes, scale = components
        factors = self._factors(scale.contiguous().view(torch.uint8))
        values = torch.empty(codes.shape, device=codes.device)
        together = len(codes) if codes.is_cuda else max(1, _CACHED // max(1, codes.shape[1]))
        for first in range(0, len(codes), together or 1):
            part = slice(first, first + together)
            self._decode_into(values[part], codes[part], factors[part])
        return values

    def _decode_into(self, values: Tensor, codes: Tensor, factors: Tensor) -> None:
        if codes.is_cuda:
            values.copy_(codes)
        else:
            _widen_e4m3(values, codes)
        blocks = codes.shape[1] // self.block
        whole = blocks * self.block
        values[:, :whole].unflatten(1, (blocks, self.block)).mul_(factors[:, :blocks, None])
        values[:, whole:].mul_(factors[:, blocks:])

    @staticmethod
    def _factors(scale: Tensor) -> Tensor:
        return (scale.to(torch.int32) << 23).view(torch.float32)


def _widen_e4m3(values: Tensor, codes: Tensor) -> None:
    """E4M3 to fp32 on a CPU, by integers: that is quicker there than a cast.

    Shifted by 7 the bits of a code are those of an fp16 with an exponent that is 8 too low.
    """
    bits = codes.view(torch.int8)
    wide = bits.to(torch.int16)
    values.copy_(((wide & 0x7F) << 7 | wide & -0x8000).view(torch.float16)).mul_(256)
    is_nan = bits & 0x7F == 0x7F
    if is_nan.any():
        values.masked_fill_(is_nan, torch.nan)


class Int8:
    """int8 and one fp32 scale a row, by which its largest number is 127."""

    stochastic = trains = False

    def components(self, width: int) -> tuple[Component, ...]:
        """See :class:`Codec`."""
        return Component("value", torch.int8, width), Component("scale", torch.float32, 1)

    def encode(self, values: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """See :class:`Codec`. Numbers are rounded to nearest, ties to even. Infinity and NaN, which int8 has not, make
        NaN of the whole row."""
        largest = values.float().abs().amax(dim=1, keepdim=True)
        scale = torch.where(largest == 0, 1.0, largest / 127)
        return (values / scale).round().nan_to_num(0.0).to(torch.int8), scale

    def decode(self, components: tuple[Tensor, ...]) -> Tensor:
        """See :class:`Codec`."""
        return components[0].float() * components[1]


CODECS: dict[str, Codec] = {
    "fp32": Plain(torch.float32),
    "int32": Plain(torch.int32),
    "bf16": BFloat16(),
    "fp16": Float16(),
    "fp8": Float8(),
    "int8": Int8(),
}
VALUE_CODECS = tuple(name for name in CODECS if name != "int32")
"""Those that the values of rows may be in: int32 is for counts."""


def require_value_codec(codec: str) -> None:
    """Raises ``ValueError`` for a codec that holds no values, with the nearest one that does."""
    if codec not in VALUE_CODECS:
        raise ValueError(f"There is no codec {codec!r} for values: {nearest(codec, VALUE_CODECS)}")
