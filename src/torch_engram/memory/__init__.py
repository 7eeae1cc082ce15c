"""Everything about one memory: the bank, working sets, prefetch and decoding history."""

from torch_engram.memory.bank import MemoryBank
from torch_engram.memory.checkpoint import load_bank, open_bank, save_bank
from torch_engram.memory.decoding import DecodeMemory
from torch_engram.memory.fixed import FixedMemory
from torch_engram.memory.placement import disk_rows
from torch_engram.memory.tokens import Tokens
from torch_engram.memory.working_set import Memory, WorkingSet, join

__all__ = [
    "DecodeMemory",
    "FixedMemory",
    "Memory",
    "MemoryBank",
    "Tokens",
    "WorkingSet",
    "disk_rows",
    "join",
    "load_bank",
    "open_bank",
    "save_bank",
]
