"""The norm before every layer: computed in fp32, handed on in the type of the residual stream."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv 1910.07467) with an fp32 weight on a stream of any floating type, which its result has again."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d]`` over its root mean square, times the weight."""
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)
