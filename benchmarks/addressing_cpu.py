"""addressing-cpu: token ids to row ids on one core, over a plain NumPy version of the same arithmetic.

Both sides map raw to canonical ids, build the n-gram windows and hash them for one layer; both are given random ids,
so that nothing repeats. Each side runs in processes of its own, in turn, and the ratio is taken pair by pair. In one
process each side also pays for the memory that the other has given back, which moves the ratio by as much as the
arithmetic does: that is recorded beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from record import record

from torch_engram.addressing import Addressing, CanonicalVocab
from torch_engram.bench.results import quantiles
from torch_engram.config import EngramConfig

LAYER, CALLS, ROUNDS, SEQUENCE = 1, 21, 9, 4096
RAW_IDS = 129_280


def plain_numpy(addressing: Addressing) -> Callable[[np.ndarray], np.ndarray]:
    """Rows ``[B, T, C]`` of ids ``[B, T]``: multiply, xor, remainder by broadcasting."""
    layout, order = addressing.layouts[LAYER], addressing.config.max_ngram
    assert addressing.vocab is not None
    canonical, primes = addressing.vocab.ids.numpy(), np.array(layout.primes)
    offsets = np.array(layout.offsets).reshape(primes.shape)

    def rows(ids: np.ndarray) -> np.ndarray:
        padded = np.pad(canonical[ids], ((0, 0), (order - 1, 0)), constant_values=addressing.pad)
        windows = [padded[:, order - 1 - age : padded.shape[1] - age] for age in range(order)]
        mix, mixes = windows[0] * layout.multipliers[0], np.empty((*ids.shape, order - 1), np.int64)
        for i in range(order - 1):
            mix = mix ^ (windows[i + 1] * layout.multipliers[i + 1])
            mixes[..., i] = mix
        return (mixes[..., None] % primes + offsets).reshape(*ids.shape, -1)

    return rows


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def sides(tokens: int) -> dict[str, Callable[[], Any]]:
    """Both sides on the same random ids: ``[tokens / SEQUENCE, SEQUENCE]``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = EngramConfig.preset("deepseek-v4.1")
    more = torch.randint(config.vocab_size, (RAW_IDS - config.vocab_size,))
    vocab = CanonicalVocab(torch.cat((torch.arange(config.vocab_size), more)), "random")
    addressing = Addressing(config, vocab)
    ids = torch.randint(RAW_IDS, (tokens // SEQUENCE, SEQUENCE))
    reference, plain_ids = plain_numpy(addressing), ids.numpy()
    assert np.array_equal(
        reference(plain_ids[:, :64]), addressing.rows(addressing.windows(ids[:, :64]), LAYER)[1].numpy()
    )
    return {
        "ours": lambda: addressing.rows(addressing.windows(ids), LAYER)[1],
        "numpy": lambda: reference(plain_ids),
    }


def alone(side: str, tokens: int) -> float:
    """Median seconds of a call, in a new process that does nothing else."""
    command = [sys.executable, __file__, side, str(tokens)]
    return float(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))


def together(tokens: int) -> list[float]:
    """Ratios of pairs of calls in this process, one side after the other."""
    work = sides(tokens)
    pairs = [(seconds(work["numpy"]), seconds(work["ours"])) for _ in range(CALLS + 2)][2:]
    return [numpy_took / ours_took for numpy_took, ours_took in pairs]


def main() -> None:
    for tokens in (65_536, 8_192):
        case = f"{tokens}-random-ids"
        numpy_took, ours_took = zip(
            *((alone("numpy", tokens), alone("ours", tokens)) for _ in range(ROUNDS)), strict=True
        )
        ratios = [theirs / mine for theirs, mine in zip(numpy_took, ours_took, strict=True)]
        record("addressing-cpu", case, ratios, "times", reference=1.0, ratio=quantiles(ratios)[1])
        rows = tokens * 24
        speeds, reference = [rows / took for took in ours_took], rows / quantiles(numpy_took)[1]
        ratio = quantiles(speeds)[1] / reference
        record("addressing-cpu", f"{case}-rows-per-second", speeds, "rows/s", reference=reference, ratio=ratio)
        shared = together(tokens)
        record("addressing-cpu", f"{case}-one-process", shared, "times", reference=1.0, ratio=quantiles(shared)[1])


if __name__ == "__main__":
    if len(sys.argv) == 3:
        call = sides(int(sys.argv[2]))[sys.argv[1]]
        print(json.dumps(quantiles([seconds(call) for _ in range(CALLS + 3)][3:])[1]))
    else:
        main()
