"""``python -m torch_engram.cli``: the ``engram`` command, for ``torchrun``."""

from torch_engram.cli import main

if __name__ == "__main__":
    main()
