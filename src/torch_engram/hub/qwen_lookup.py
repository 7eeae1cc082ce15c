"""What stands where Qwen4Exp's n-gram table stood: nothing yet, or rows from a bank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class AbsentTable(nn.Module):
    """A table's place in a model that was loaded without it. It has no parameter, so that nothing is loaded or saved.

    ``num_embeddings``, ``embedding_dim``: of the table. ``weight``: no rows, on the device and of the type that the
    table would have, so that both follow the model.
    """

    weight: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.register_buffer("weight", torch.empty(0, embedding_dim, device=device, dtype=dtype), persistent=False)

    def extra_repr(self) -> str:
        """As ``nn.Embedding`` has it."""
        return f"{self.num_embeddings}, {self.embedding_dim}"

    def forward(self, ids: Tensor) -> Tensor:
        """Raises ``ValueError``."""
        raise ValueError("This model was loaded without its PLE tables: call serve_ple(model, path) before it runs.")


class ServedTable(AbsentTable):
    """The rows of one layer as ``take`` gives them: embeddings ``[B, T, E]`` of the lookup that is due."""

    def __init__(self, table: Any, take: Callable[[], Tensor], device: torch.device):
        dtype = table.weight.dtype
        super().__init__(table.num_embeddings, table.embedding_dim, device=device, dtype=dtype)
        self._take = take

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, ids: Tensor) -> Tensor:
        """Rows ``[B, T, C, row dim]`` of ids int64 ``[B, T, C]``, in the model's type."""
        embeddings = self._take().to(ids.device, self.weight.dtype)
        assert embeddings.shape[:2] == ids.shape[:2], "rows of another call"
        return embeddings.view(*ids.shape, self.embedding_dim)
