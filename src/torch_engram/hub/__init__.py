"""Models of Hugging Face's transformers with memories from our stores, and memories under the names of two releases.

Needs the extra ``hf``.
"""

try:
    import transformers.models.qwen4_exp as _newest  # noqa: F401
except ImportError as error:
    raise ImportError(
        "torch_engram.hub needs transformers 5.17 or newer: pip install 'torch-engram[hf]', or '.[hf]' in a clone."
    ) from error

from torch_engram.hub.attach import attach, config_for
from torch_engram.hub.attached import Attached, memories_of
from torch_engram.hub.deepseek import read_deepseek, write_deepseek
from torch_engram.hub.loading import from_pretrained, load_memory, restore_memories
from torch_engram.hub.merging import merge_memories
from torch_engram.hub.qwen_checkpoint import read_ple, write_ple
from torch_engram.hub.qwen_ple import ServedPle, serve_ple, without_ple_tables
from torch_engram.hub.saved import save_memory

__all__ = [
    "Attached",
    "ServedPle",
    "attach",
    "config_for",
    "from_pretrained",
    "load_memory",
    "memories_of",
    "merge_memories",
    "read_deepseek",
    "read_ple",
    "restore_memories",
    "save_memory",
    "serve_ple",
    "without_ple_tables",
    "write_deepseek",
    "write_ple",
]
