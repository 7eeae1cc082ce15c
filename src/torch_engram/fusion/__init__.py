"""Embeddings and hidden state to hidden state: the Engram module, its gate and its short convolution."""

from torch_engram.fusion.engram import Engram, EngramState
from torch_engram.fusion.fp8 import fp8_linear, require_fp8
from torch_engram.fusion.styles import STYLES, FusionStyle

__all__ = ["STYLES", "Engram", "EngramState", "FusionStyle", "fp8_linear", "require_fp8"]
