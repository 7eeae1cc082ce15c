"""Tokens to row ids: canonical vocabulary, layouts (primes, multipliers) and n-gram hashing. Knows no float."""

from torch_engram.addressing.canonical import CanonicalVocab
from torch_engram.addressing.layout import LayerLayout, layouts
from torch_engram.addressing.ngrams import Addressing, Lookup

__all__ = ["Addressing", "CanonicalVocab", "LayerLayout", "Lookup", "layouts"]
