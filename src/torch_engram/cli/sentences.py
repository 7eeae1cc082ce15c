"""What a failure is called: the one sentence that a user is told."""

from __future__ import annotations

import errno


def sentence(error: ValueError | OSError) -> str:
    """The library's own sentence, or one about what the system said."""
    if isinstance(error, ValueError) or error.errno is None:
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    mend = "check that path and its permissions"
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        mend = "make room, or choose other folders for what is written"
    elif error.errno == errno.EMFILE:
        mend = "let the command hold more files open (ulimit -n)"
    return f"{where}{error.strerror or error}; {mend}."
