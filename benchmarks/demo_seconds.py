"""demo-seconds: wall time of ``engram demo`` in an empty folder, from its start to its report; beside it its losses and
its peak of memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import record

CORES = 2


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    command = Path(sys.executable).with_name("engram")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([command, "demo"], cwd=folder, check=True, env={**os.environ, "XDG_CACHE_HOME": folder})
        took = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of KiB
        results = json.loads((Path(folder) / "engram-demo" / "results.json").read_text())
    record("demo-seconds", "engram-demo", [took], "s")
    record("demo-seconds", "peak-memory", [peak], "GiB")
    for run in results:
        record("demo-seconds", f"{run['name']}-validation", [run["nats"]], "nats/token")
        record("demo-seconds", f"{run['name']}-training", [run["tokens_per_second"]], "tokens/s")


if __name__ == "__main__":
    main()
