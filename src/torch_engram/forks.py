"""What works in one process alone: a fork takes threads' objects along, and leaves the threads behind."""

from __future__ import annotations

import os


class OneProcess:
    """Remembers the process that it was made in."""

    def __init__(self, what: str):
        self._what, self._process = what, os.getpid()

    def require(self) -> None:
        """Raises ``ValueError`` in any other process, which would wait for threads that it does not have."""
        if os.getpid() != self._process:
            raise ValueError(
                f"{self._what} was opened before this process was forked off, and its threads stayed behind: open it "
                "in each process."
            )
