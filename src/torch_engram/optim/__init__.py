"""Row gradients to rows: optimisers that touch only the rows of a working set."""

from collections.abc import Callable

from torch_engram.optim.adagrad import RowAdagrad
from torch_engram.optim.adam import RowAdam
from torch_engram.optim.row_optimizer import RowOptimizer
from torch_engram.optim.rowwise_adam import RowwiseAdam
from torch_engram.optim.sinkhorn import RowSinkhorn

ROW_OPTIMIZERS: dict[str, Callable[..., RowOptimizer]] = {
    "adam": RowAdam,
    "rowwise_adam": RowwiseAdam,
    "adagrad": RowAdagrad,
    "sinkhorn": RowSinkhorn,
}

__all__ = ["ROW_OPTIMIZERS", "RowAdagrad", "RowAdam", "RowOptimizer", "RowSinkhorn", "RowwiseAdam"]
