"""What an Engram is: orders, heads, rows, layers, hash scheme and numerics, as one frozen value.

Everything else in the library is built from an :class:`EngramConfig`: the addressing derives primes and
multipliers from it, the bank its tables, the fusion module its weights. Sources of the presets:
``docs/spec.md`` (arXiv 2601.07372, the DeepSeek-V4.1 release, Qwen4Exp).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

SCHEMES = ("engram", "qwen_ple")
FUSIONS = ("paper", "deepseek-v4.1", "qwen-ple")


def nearest(word: str, choices: Iterable[str]) -> str:
    """The end of an error sentence: the choice closest to ``word``, or all of them when none is close."""
    names = list(choices)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(map(repr, names))}."


def need(config: object, ok: bool, field: str, mend: str) -> None:
    """Raises ``ValueError`` naming a field of a configuration, its value and the mend, unless ``ok``."""
    if not ok:
        raise ValueError(f"{type(config).__name__}.{field} is {getattr(config, field)!r}: {mend}")


def checked_fields(cls: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` of the dataclass ``cls``. Raises ``ValueError`` for one that it does not have, or needs and lacks."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in fields:
        if name not in known:
            raise ValueError(f"{cls.__name__} has no field {name!r}: {nearest(name, known)}")
    for name, f in known.items():
        has_default = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        if name not in fields and not has_default:
            raise ValueError(f"{cls.__name__} needs the field {name!r}: add it.")
    return dict(fields)


@dataclass(frozen=True)
class EngramConfig:
    """One conditional memory: hashed n-gram tables for some layers of a decoder.

    ``heads``, ``row_dim`` and ``rows_per_head`` are one number for every order, or one number an order,
    lowest order first. Raises ``ValueError`` naming the field and the mend.
    """

    layers: tuple[int, ...]
    """Decoder blocks, 0-based and ascending, at whose entry the memory is added."""
    hidden: int
    """Width d of one residual branch."""
    vocab_size: int
    """Number of ids the hash sees: V' canonical ids in scheme ``engram``, V raw ids in ``qwen_ple``."""
    max_ngram: int = 3
    """Highest order N; orders 2..N are hashed."""
    heads: int | tuple[int, ...] = 8
    """H: independent hash heads of each order."""
    row_dim: int | tuple[int, ...] = 64
    """Numbers in one row."""
    rows_per_head: int | tuple[int, ...] = 646_400
    """Rows asked for a head; each head gets a prime near it."""
    branches: int = 1
    """M: residual branches (hyper-connections); 1 without."""
    scheme: str = "engram"
    """How ids become rows: ``engram`` or ``qwen_ple``."""
    fusion: str = "paper"
    """Whose numerics the gate follows: ``paper``, ``deepseek-v4.1`` or ``qwen-ple``."""
    pad_id: int = 2
    """Raw id that a blocked position reads as; in ``qwen_ple`` this is the EOS id."""
    seed: int = 0
    """Seed of the multipliers."""
    conv_kernel: int = 4
    """Taps of the short causal convolution, dilation N; 0 for none."""
    bias: bool = False
    """Biases on W_K and W_V (only the paper's demo has them)."""
    row_multiple: int = 1
    """A layer's rows are padded to a multiple of this."""
    init_std: float = 0.0
    """Standard deviation of a row before its first update."""

    def __post_init__(self) -> None:
        for field in ("layers", "heads", "row_dim", "rows_per_head"):
            value = getattr(self, field)
            if isinstance(value, Sequence):  # a list out of JSON
                object.__setattr__(self, field, tuple(value))
        self._check()

    def _check(self) -> None:
        self._check_types()
        must = partial(need, self)
        some = isinstance(self.layers, tuple) and len(self.layers) > 0
        must(some, "layers", "name at least one decoder layer, such as (1,).")
        ascending = list(self.layers) == sorted(set(self.layers)) and all(layer >= 0 for layer in self.layers)
        must(ascending, "layers", "give distinct 0-based layers in ascending order.")
        must(self.max_ngram >= 2, "max_ngram", "the highest order must be 2 or more.")
        for field in ("heads", "row_dim", "rows_per_head"):
            value = getattr(self, field)
            many = self.max_ngram - 1
            fits = not isinstance(value, tuple) or len(value) == many
            must(fits, field, f"give one number, or {many} (one an order).")
            must(min(self.per_order(field)) >= 1, field, "every number must be at least 1.")
        must(min(self.per_order("rows_per_head")) >= 2, "rows_per_head", "a head needs 2 rows or more.")
        for field in ("hidden", "vocab_size", "branches", "row_multiple"):
            must(getattr(self, field) >= 1, field, "it must be at least 1.")
        must(self.scheme in SCHEMES, "scheme", nearest(str(self.scheme), SCHEMES))
        must(self.fusion in FUSIONS, "fusion", nearest(str(self.fusion), FUSIONS))
        must(self.seed >= 0, "seed", "NumPy's generator takes 0 or more.")
        must(self.pad_id >= 0, "pad_id", "it is a token id, 0 or more.")
        must(self.conv_kernel == 0 or self.conv_kernel >= 2, "conv_kernel", "use 0 for none, or 2 taps or more.")
        must(self.init_std >= 0, "init_std", "a standard deviation is 0 or more.")

    def _check_types(self) -> None:
        must = partial(need, self)
        for field in ("hidden", "vocab_size", "max_ngram", "branches", "pad_id", "seed", "conv_kernel", "row_multiple"):
            must(isinstance(getattr(self, field), int), field, "give a whole number.")
        for field in ("layers", "heads", "row_dim", "rows_per_head"):
            value = getattr(self, field)
            numbers = value if isinstance(value, tuple) else (value,)
            must(all(isinstance(number, int) for number in numbers), field, "give whole numbers.")
        must(isinstance(self.init_std, int | float), "init_std", "give a number.")

    # -- derived sizes ---------------------------------------------------------------------------------------

    @property
    def orders(self) -> tuple[int, ...]:
        """The n-gram orders, 2..N."""
        return tuple(range(2, self.max_ngram + 1))

    def per_order(self, field: str) -> tuple[int, ...]:
        """``heads``, ``row_dim`` or ``rows_per_head`` as one number an order."""
        value = getattr(self, field)
        return value if isinstance(value, tuple) else (value,) * (self.max_ngram - 1)

    @property
    def columns(self) -> int:
        """C: rows read per token and layer."""
        return sum(self.per_order("heads"))

    @property
    def embedding_dim(self) -> int:
        """E: width of the concatenated rows of one token and layer."""
        return sum(h * dim for h, dim in zip(self.per_order("heads"), self.per_order("row_dim"), strict=True))

    @property
    def conv_dilation(self) -> int:
        """Distance between the convolution's taps: N in every published scheme."""
        return self.max_ngram

    # -- presets and JSON ------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> EngramConfig:
        """A published configuration, optionally with some fields changed. Raises ``ValueError`` for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}: {nearest(name, PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; :meth:`from_dict` reads them back."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> EngramConfig:
        """A configuration from a mapping. Raises ``ValueError`` naming an unknown or missing field."""
        return cls(**checked_fields(cls, fields))

    def to_json(self) -> str:
        """One JSON object with every field."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> EngramConfig:
        """Inverse of :meth:`to_json`. Raises ``ValueError`` when it is none."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError:
            fields = None
        if not isinstance(fields, dict):
            raise ValueError("An EngramConfig in JSON is one object with its fields: use what to_json() wrote.")
        return cls.from_dict(fields)


_PAPER: dict[str, Any] = dict(
    layers=(1, 14), hidden=2560, vocab_size=98_627, max_ngram=3, heads=8, row_dim=80, branches=4
)
PRESETS: dict[str, dict[str, Any]] = {
    "demo": dict(
        layers=(1, 15), hidden=1024, vocab_size=98_627, max_ngram=3, heads=8, row_dim=64,
        rows_per_head=646_400, branches=4, bias=True,
    ),
    "paper-27b": dict(_PAPER, rows_per_head=2_262_400),
    "paper-40b": dict(_PAPER, rows_per_head=7_239_680),
    "deepseek-v4.1": dict(
        layers=(1, 14), hidden=5120, vocab_size=99_092, max_ngram=4, heads=8, row_dim=256,
        rows_per_head=16_000_000, branches=4, conv_kernel=0, fusion="deepseek-v4.1",
    ),
    "qwen-ple": dict(
        layers=(1,), hidden=2560, vocab_size=248_320, max_ngram=3, heads=8, row_dim=160,
        rows_per_head=20_000_000, branches=4, scheme="qwen_ple", fusion="qwen-ple",
        pad_id=248_044, seed=1234, row_multiple=128,
    ),
}  # fmt: skip
"""Published configurations by name; ``hidden`` of ``qwen-ple`` equals its E, the released default."""
