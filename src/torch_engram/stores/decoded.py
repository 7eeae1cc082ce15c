"""The decoded rows of a step, together with what it takes to bring them up to date and to encode them again.

On a GPU the kernels of :mod:`torch_engram.stores.record_kernels` work on the records in place; elsewhere, and for
codecs that have no kernel, the planes are copies and everything is PyTorch. The numbers are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_engram.kernels import use_kernels
from torch_engram.stores.codecs import CODECS, BFloat16, Plain
from torch_engram.stores.records import RecordLayout, RowFormat


class DecodedRows(dict[str, Tensor]):
    """The planes of U rows by name: each ``[U, width]``, fp32 (integers int32).

    ``row_keys``: int64 ``[U]``, ascending. ``records``: uint8 ``[U, nbytes]`` as a store gave them; they are the rows'
    own from here on. Where ``in_place`` is true, planes in the codecs fp32 and int32 are views of ``records``, with its
    distance from row to row, values in bf16 are decoded when they are asked for, and an optimiser may write new records
    in place and set ``encoded``.
    """

    def __init__(self, row_format: RowFormat, row_keys: Tensor, records: Tensor):
        self.format, self.row_keys = row_format, row_keys
        self.in_place = use_kernels(records) and _has_kernels(row_format.layout)
        self.records = records if self.in_place else None
        self.encoded = False
        """Whether ``records`` are newer than the planes."""
        if not self.in_place:
            super().__init__(row_format.decode(row_keys, records))
            return
        super().__init__({plane.name: self.stored(plane.name) for plane in row_format.layout.planes})
        self._forget_values()
        if row_format.init_std:
            from torch_engram.stores.record_kernels import initial_triton

            initial_triton(row_keys, self.stored("value"), self["count"], row_format.seed, row_format.init_std)

    def __missing__(self, name: str) -> Tensor:
        """Values in fp32, which only an optimiser's step wants: until then they take no memory."""
        if name != "value":
            raise KeyError(name)
        self["value"] = self.stored("value").float()
        return self["value"]

    @property
    def read(self) -> Tensor:
        """The values ``[U, dim]`` as whoever reads them finds them: fp32, or where they are in the records."""
        return self.stored("value") if self.in_place else self["value"]

    def stored(self, name: str) -> Tensor:
        """A plane as the records hold it: a view ``[U, width]`` of them, in its codec's type. Only ``in_place``."""
        assert self.records is not None, "planes that are copies are stored nowhere"
        layout = self.format.layout
        (field,) = (field for field in layout.fields if field.plane == name)
        return layout.view(self.records, field)

    def lay_over(self, keys: Tensor, records: Tensor, changed: Tensor) -> None:
        """Replace the rows whose key is among ``keys`` int64 ``[K]``, ascending, by their ``records`` uint8
        ``[K, nbytes]``, and mark them in ``changed`` bool ``[U]``. There is one key at least."""
        if self.records is not None:
            from torch_engram.stores.record_kernels import lay_over_triton

            lay_over_triton(self.row_keys, self.records, keys, records, changed)
            self._forget_values()
            return
        at = torch.searchsorted(keys, self.row_keys).clamp_(max=len(keys) - 1)
        hit = keys[at] == self.row_keys
        new = self.format.decode(self.row_keys[hit], records[at[hit]])
        for name, plane in self.items():
            plane[hit] = new[name]
        changed |= hit

    def encode(self) -> Tensor:
        """Records uint8 ``[U, nbytes]`` of the rows as they are now."""
        if self.encoded:
            assert self.records is not None
            return self.records
        return self.format.encode(self.row_keys, self)

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of all that is here from being used again before ``stream`` is done with it."""
        for tensor in (self.row_keys, *self.values()):
            tensor.record_stream(stream)

    def _forget_values(self) -> None:
        """What is no view of the records would be older than they are."""
        if self.stored("value").dtype != torch.float32:
            self.pop("value", None)


def _has_kernels(layout: RecordLayout) -> bool:
    """Whether the values are fp32 or bf16, the other planes numbers as they are, and updates counted."""
    codecs = {plane.name: CODECS[plane.codec] for plane in layout.planes}
    value = codecs.pop("value", None)
    plain = all(isinstance(codec, Plain) for codec in codecs.values())
    return plain and "count" in codecs and isinstance(value, (Plain, BFloat16))
