"""What the kernels and the training step reach on the user's own device, against limits measured in the same run."""

from torch_engram.bench import memory_ops, network_ops  # noqa: F401  they register their ops
from torch_engram.bench.ops import OPS, Op, Sizes, Timed, op

__all__ = ["OPS", "Op", "Sizes", "Timed", "op"]
