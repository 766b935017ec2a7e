"""What is measured: shapes, their arithmetic, and the sets of them that a run can name.

A case is one operation at one shape, dtype and direction. Its floating-point operations and its compulsory bytes are
formulas, not measurements: two operations per multiply-add of the matrix products (element-wise work is not counted),
and every input read once and every output written once per pass. A training step is two passes: the forward reads x
and the parameters and writes y; the backward reads dy, x and the parameters again and writes dx and every parameter
gradient. Intermediates (z, the hidden activation) count neither as bytes nor, if they are computed anew, as
operations, so that the floor holds for every way of running the case.
"""

from __future__ import annotations

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .errors import InputError

Direction = Literal["forward", "forward+backward"]
# How a provider holds the weight: as factors and kept columns, or multiplied out.
Form = Literal["factors", "dense"]

DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
INDEX_BYTES = 4

LINEAR_SHAPES = (
    (768, 768),
    (768, 3072),
    (3072, 768),
    (1024, 1024),
    (1024, 4096),
    (4096, 1024),
    (4096, 4096),
    (4096, 11008),
    (11008, 4096),
)
MASKED_SHAPES = LINEAR_SHAPES[:3]
LINEAR_ROWS = (1, 16, 128, 512, 4096, 16384, 65536)
LINEAR_RANKS = (16, 20, 32, 41, 80, 130, 260, 1024)
KEPT_PERCENT = (0, 5, 10, 20)

BERT_BASE = {"hidden": 768, "intermediate": 3072, "heads": 12, "layers": 12}
MINILM = {"hidden": 384, "intermediate": 1536, "heads": 12, "layers": 12}
FFN_RANKS = (80, 96, 130, 192, 260, 384, 768)
MINILM_RANKS = (40, 65, 96)
FFN_BATCHES = ((1, 128), (16, 128), (32, 384), (2, 4096), (16, 4096))
ATTENTION_RANKS = (16, 32, 48, 64, 80, 130, 260)
ATTENTION_BATCHES = ((1, 128), (32, 128), (64, 128), (32, 384), (16, 1024))
ENCODER_RANKS = (80, 130, 260)
ENCODER_BATCHES = ((1, 128), (32, 128), (128, 128), (32, 384))
CPU_BATCHES = ((8, 128), (1, 128))


def _check(name: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: expected at least {low}{'' if high is None else f', at most {high}'}, got {value}")


def _check_kind(dtype: str, direction: str) -> None:
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")


@dataclass(frozen=True)
class LinearCase:
    """act-free y = (x u) v + scatter(x s, kept) + bias on ``rows`` rows.

    Args:
        in_features, out_features: of the layer.
        rank: r, below min(in_features, out_features).
        kept: kept columns of S.
        rows: M, rows of x.
        dtype: "float32", "float16" or "bfloat16".
        direction: "forward", or "forward+backward" with dx and all parameter gradients.

    Raises:
        ValueError: a number out of range, an unknown dtype or direction.
    """

    in_features: int
    out_features: int
    rank: int
    kept: int
    rows: int
    dtype: str = "float32"
    direction: Direction = "forward"

    op = "linear"

    def __post_init__(self) -> None:
        _check("in_features", self.in_features, 1)
        _check("out_features", self.out_features, 1)
        _check("rank", self.rank, 1, min(self.in_features, self.out_features) - 1)
        _check("kept", self.kept, 0, self.out_features)
        _check("rows", self.rows, 1)
        _check_kind(self.dtype, self.direction)

    @property
    def shape(self) -> dict[str, int]:
        """The numbers that a row records."""
        return {
            "in": self.in_features,
            "out": self.out_features,
            "rank": self.rank,
            "kept": self.kept,
            "rows": self.rows,
        }

    def __str__(self) -> str:
        return case_name(self.op, self.shape, self.dtype, self.direction)

    def parameters(self, form: Form = "factors") -> int:
        """Entries of the weight and the bias."""
        if form == "dense":
            return self.in_features * self.out_features + self.out_features
        return (self.rank + self.kept) * self.in_features + self.rank * self.out_features + self.out_features

    def flops(self, form: Form = "factors") -> int:
        """Operations of the matrix products; a training step has three products where the forward has one."""
        if form == "dense":
            entries = self.in_features * self.out_features
        else:
            entries = (self.rank + self.kept) * self.in_features + self.rank * self.out_features
        return 2 * self.rows * entries * (3 if self.direction == "forward+backward" else 1)

    def bytes(self, form: Form = "factors") -> int:
        """Compulsory bytes through memory."""
        return _linear_bytes(
            self.rows * self.in_features,
            self.rows * self.out_features,
            self.parameters(form),
            self.kept if form == "factors" else 0,
            DTYPE_BYTES[self.dtype],
            self.direction,
        )


@dataclass(frozen=True)
class MaskedCase:
    """y = x (W * mask)^T + bias on ``rows`` rows, with W and a score per weight in float32, as under autocast.

    Args:
        in_features, out_features: of the layer.
        rows: M, rows of x.
        dtype: of x and of the products: "float32", "float16" or "bfloat16".
        direction: "forward", or "forward+backward" with dx and the gradients of W, scores and bias.

    Raises:
        ValueError: a number out of range, an unknown dtype or direction.
    """

    in_features: int
    out_features: int
    rows: int
    dtype: str = "float32"
    direction: Direction = "forward+backward"

    op = "masked"

    def __post_init__(self) -> None:
        _check("in_features", self.in_features, 1)
        _check("out_features", self.out_features, 1)
        _check("rows", self.rows, 1)
        _check_kind(self.dtype, self.direction)

    @property
    def shape(self) -> dict[str, int]:
        """The numbers that a row records."""
        return {"in": self.in_features, "out": self.out_features, "rank": 0, "kept": 0, "rows": self.rows}

    def __str__(self) -> str:
        return case_name(self.op, self.shape, self.dtype, self.direction)

    def flops(self, form: Form = "factors") -> int:
        """Operations of the matrix products; a training step has three products where the forward has one."""
        passes = 3 if self.direction == "forward+backward" else 1
        return 2 * self.rows * self.in_features * self.out_features * passes

    def bytes(self, form: Form = "factors") -> int:
        """Compulsory bytes through memory; the form "dense" has no scores."""
        size, entries = DTYPE_BYTES[self.dtype], self.in_features * self.out_features
        parameters = DTYPE_BYTES["float32"] * (entries * (1 if form == "dense" else 2) + self.out_features)
        x, y = size * self.rows * self.in_features, size * self.rows * self.out_features
        forward = x + parameters + y
        return forward if self.direction == "forward" else forward + y + x + parameters + x + parameters


@dataclass(frozen=True, kw_only=True)
class BlockCase(ABC):
    """What the cases on whole blocks share: ``batch`` sequences of ``length`` tokens, forward only.

    Args:
        hidden: size of the block's input and output.
        rank: of every weight, at most ``hidden``.
        batch, length: their product is M.
        dtype: "float32", "float16" or "bfloat16".

    Raises:
        ValueError: a number out of range, an unknown dtype or a direction other than "forward".
    """

    hidden: int
    rank: int
    batch: int
    length: int
    dtype: str = "float32"
    direction: Direction = "forward"

    op = "block"
    kept = 0

    def __post_init__(self) -> None:
        _check("hidden", self.hidden, 1)
        _check("rank", self.rank, 1, self.hidden)
        _check("batch", self.batch, 1)
        _check("length", self.length, 1)
        _check_kind(self.dtype, self.direction)
        if self.direction != "forward":
            raise ValueError(f"direction: expected forward for {self.op}, got {self.direction!r}")

    @property
    def rows(self) -> int:
        return self.batch * self.length

    @property
    def outputs(self) -> int:
        """What a row records as ``out``."""
        return self.hidden

    @property
    def shape(self) -> dict[str, int]:
        """The numbers that a row records."""
        numbers = {"in": self.hidden, "out": self.outputs, "rank": self.rank, "kept": 0, "rows": self.rows}
        return numbers | {"batch": self.batch, "length": self.length}

    def __str__(self) -> str:
        return case_name(self.op, self.shape, self.dtype, self.direction)

    @abstractmethod
    def weights(self, form: Form) -> int:
        """Entries of the weights: what every token is multiplied with."""

    @abstractmethod
    def vectors(self) -> int:
        """Entries of the biases and of the norm."""

    def parameters(self, form: Form = "factors") -> int:
        """Entries of all of them."""
        return self.weights(form) + self.vectors()

    def flops(self, form: Form = "factors") -> int:
        """Operations of the matrix products."""
        return 2 * self.rows * self.weights(form)

    def bytes(self, form: Form = "factors") -> int:
        """Compulsory bytes: x and y once, the parameters once; nothing between them."""
        wide = self.rows * self.hidden
        return _linear_bytes(wide, wide, self.parameters(form), 0, DTYPE_BYTES[self.dtype], self.direction)


def _weight(inputs: int, outputs: int, rank: int, form: Form) -> int:
    return inputs * outputs if form == "dense" else rank * (inputs + outputs)


@dataclass(frozen=True, kw_only=True)
class FfnCase(BlockCase):
    """y = (gelu((x u1) v1 + b1) u2) v2 + b2.

    Args:
        intermediate: size between the two layers.
    """

    intermediate: int

    op = "ffn"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("intermediate", self.intermediate, 1)

    @property
    def outputs(self) -> int:
        return self.intermediate

    def weights(self, form: Form) -> int:
        return 2 * _weight(self.hidden, self.intermediate, self.rank, form)

    def vectors(self) -> int:
        return self.hidden + self.intermediate


@dataclass(frozen=True, kw_only=True)
class AttentionCase(BlockCase):
    """y = LayerNorm(x + O(attention(Q(x), K(x), V(x)))).

    Args:
        heads: a divisor of ``hidden``.
    """

    heads: int

    op = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1 or self.hidden % self.heads:
            raise ValueError(f"heads: expected a divisor of {self.hidden}, got {self.heads}")

    @property
    def shape(self) -> dict[str, int]:
        return super().shape | {"heads": self.heads}

    def weights(self, form: Form) -> int:
        return 4 * _weight(self.hidden, self.hidden, self.rank, form)

    def vectors(self) -> int:
        biases, norm = 4 * self.hidden, 2 * self.hidden
        return biases + norm

    def flops(self, form: Form = "factors") -> int:
        """Those of the weights, the scores and the probabilities' product with V."""
        return super().flops(form) + 2 * 2 * self.rows * self.length * self.hidden


@dataclass(frozen=True, kw_only=True)
class EncoderCase(BlockCase):
    """``layers`` encoder layers with weights of their own, each an attention block and a feed-forward block that both
    end in LayerNorm(x + ...); no embedding, no padding.

    Args:
        intermediate, heads: as in FfnCase and AttentionCase.
        layers: how many.
    """

    intermediate: int
    heads: int
    layers: int

    op = "encoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("layers", self.layers, 1)
        # Their sizes are checked where they are made.
        _ = self.attention, self.ffn

    @property
    def attention(self) -> AttentionCase:
        """One layer's attention block."""
        return AttentionCase(heads=self.heads, **self._shared)

    @property
    def ffn(self) -> FfnCase:
        """One layer's feed-forward block."""
        return FfnCase(intermediate=self.intermediate, **self._shared)

    @property
    def _shared(self) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(BlockCase)]
        return {name: getattr(self, name) for name in names}

    @property
    def outputs(self) -> int:
        return self.intermediate

    @property
    def shape(self) -> dict[str, int]:
        return super().shape | {"heads": self.heads, "layers": self.layers}

    def weights(self, form: Form) -> int:
        return self.layers * (self.attention.weights(form) + self.ffn.weights(form))

    def vectors(self) -> int:
        return self.layers * (self.attention.vectors() + self.ffn.vectors() + 2 * self.hidden)

    def flops(self, form: Form = "factors") -> int:
        return self.layers * (self.attention.flops(form) + self.ffn.flops(form))


Case = LinearCase | MaskedCase | FfnCase | AttentionCase | EncoderCase


def _linear_bytes(x: int, y: int, parameters: int, kept: int, size: int, direction: Direction) -> int:
    forward = size * (x + parameters + y) + INDEX_BYTES * kept
    if direction == "forward":
        return forward
    backward = size * (y + x + parameters + x + parameters) + INDEX_BYTES * kept
    return forward + backward


def case_name(op: str, shape: dict[str, int], dtype: str, direction: str) -> str:
    """One word for a case: "768x3072-r80-k307-m512-float32", "ffn-768x3072-r96-b16x128-bfloat16"."""
    words = [f"{shape['in']}x{shape['out']}", f"r{shape['rank']}"]
    if op == "masked":
        words = [op, words[0], f"m{shape['rows']}"]
    elif op == "linear":
        words += [f"k{shape['kept']}", f"m{shape['rows']}"]
    else:
        if shape.get("heads"):
            words.insert(1, f"h{shape['heads']}")
        if shape.get("layers"):
            words.insert(1, f"l{shape['layers']}")
        words = [op, *words, f"b{shape['batch']}x{shape['length']}"]
    return "-".join([*words, dtype, *(["train"] if direction == "forward+backward" else [])])


def kept_columns(out_features: int, percent: int) -> int:
    """The share of the outputs, rounded."""
    return (out_features * percent + 50) // 100


def _linear(
    shape: tuple[int, int], rank: int, percent: int, rows: int, dtype: str, direction: Direction = "forward"
) -> LinearCase:
    return LinearCase(*shape, rank, kept_columns(shape[1], percent), rows, dtype, direction)


def full_cases(dtype: str) -> list[LinearCase]:
    """Every shape, rank, kept share and M; a rank that is not below both sides is dropped."""
    cells = itertools.product(LINEAR_SHAPES, LINEAR_RANKS, KEPT_PERCENT, LINEAR_ROWS)
    return [_linear(shape, rank, percent, rows, dtype) for shape, rank, percent, rows in cells if rank < min(shape)]


def core_cases(dtype: str) -> list[LinearCase]:
    """The cells of the GPU check: BERT-base's and a 4096-wide model's matrices over all M, and training steps."""
    cells: list[tuple[tuple[int, int], int, int, int, Direction]] = []
    cells += [((768, 3072), r, k, m, "forward") for r in (80, 260) for k in (0, 10) for m in LINEAR_ROWS]
    cells += [((3072, 768), 80, k, m, "forward") for k in (0, 10) for m in (16, 512, 4096, 65536)]
    cells += [((768, 768), r, k, m, "forward") for r, k in ((41, 5), (130, 0)) for m in (1, 128, 4096, 65536)]
    cells += [((4096, 4096), r, k, m, "forward") for r, k in ((130, 10), (1024, 0)) for m in (1, 128, 4096, 16384)]
    cells += [((4096, 11008), 260, 0, m, "forward") for m in (16, 4096)]
    cells += [((768, 3072), 80, k, m, "forward+backward") for k in (0, 10) for m in (512, 4096, 16384, 65536)]
    return [_linear(shape, r, k, m, dtype, direction) for shape, r, k, m, direction in cells]


# (in, out): (rank, kept percent, rows). Forty cells that visit every shape, rank, kept share and M.
CPU_CELLS = {
    (768, 768): ((16, 0, 128), (41, 10, 16), (80, 5, 512), (130, 0, 1024), (260, 20, 128)),
    (768, 3072): (
        (20, 5, 16),
        (32, 0, 512),
        (80, 0, 128),
        (80, 10, 128),
        (80, 20, 1024),
        (130, 10, 512),
        (260, 0, 1),
    ),
    (3072, 768): ((16, 20, 128), (41, 0, 512), (80, 5, 16), (80, 0, 1024), (130, 10, 1), (260, 10, 128)),
    (1024, 1024): ((20, 0, 1), (32, 10, 128), (80, 20, 512), (260, 0, 1024)),
    (1024, 4096): ((41, 5, 128), (80, 0, 16), (130, 20, 512), (260, 10, 1024)),
    (4096, 1024): ((16, 0, 1024), (32, 0, 128), (80, 10, 512), (260, 5, 16)),
    (4096, 4096): ((20, 5, 1), (80, 10, 16), (130, 0, 128), (260, 20, 512), (1024, 0, 128)),
    (4096, 11008): ((80, 0, 16), (130, 10, 128), (1024, 0, 1)),
    (11008, 4096): ((41, 5, 16), (260, 0, 128)),
}
CPU_TRAINING_CELLS = (
    ((768, 768), 80, 5, 512),
    ((768, 3072), 80, 0, 128),
    ((768, 3072), 80, 10, 128),
    ((768, 3072), 130, 10, 512),
    ((3072, 768), 41, 0, 512),
    ((1024, 1024), 80, 20, 512),
)


def cpu_cases(dtype: str) -> list[LinearCase]:
    """Forty forward cells with M <= 1024 that two CPU cores finish in minutes."""
    return [_linear(shape, *cell, dtype) for shape, cells in CPU_CELLS.items() for cell in cells]


def cpu_training_cases(dtype: str) -> list[LinearCase]:
    """Six training steps for the CPU."""
    return [_linear(*cell, dtype, "forward+backward") for cell in CPU_TRAINING_CELLS]


def _masked(rows: Sequence[int], dtype: str) -> list[Case]:
    return [MaskedCase(*shape, m, dtype) for shape in MASKED_SHAPES for m in rows]


def masked_cases(dtype: str) -> list[Case]:
    """Training steps of BERT-base's matrices with a score per weight."""
    return _masked((4096, 16384), dtype)


def cpu_masked_cases(dtype: str) -> list[Case]:
    """The same for the CPU."""
    return _masked((128, 512), dtype)


Model = dict[str, int]


def _blocks(
    kind: type[BlockCase], models: Iterable[tuple[Model, Sequence[int]]], batches: Sequence[tuple[int, int]], dtype: str
) -> list[Case]:
    """The cases of ``kind`` at every rank and batch; of a model the sizes that ``kind`` has."""
    names = {field.name for field in dataclasses.fields(kind)}
    return [
        kind(
            rank=rank, batch=batch, length=length, dtype=dtype,
            **{name: size for name, size in model.items() if name in names},
        )
        for model, ranks in models
        for rank in ranks
        for batch, length in batches
    ]  # fmt: skip


def ffn_cases(dtype: str) -> list[Case]:
    """The feed-forward blocks of BERT-base and MiniLM; FlashSVD's kernel is measured on the former."""
    return _blocks(FfnCase, [(BERT_BASE, FFN_RANKS), (MINILM, MINILM_RANKS)], FFN_BATCHES, dtype)


def attention_cases(dtype: str) -> list[Case]:
    """The attention block of BERT-base."""
    return _blocks(AttentionCase, [(BERT_BASE, ATTENTION_RANKS)], ATTENTION_BATCHES, dtype)


def encoder_cases(dtype: str) -> list[Case]:
    """The encoders of BERT-base and MiniLM-L12."""
    return _blocks(EncoderCase, [(BERT_BASE, ENCODER_RANKS), (MINILM, MINILM_RANKS)], ENCODER_BATCHES, dtype)


def core_block_cases(dtype: str) -> list[Case]:
    """The blocks of the GPU check: those of BERT-base, wide feed-forward blocks, and its encoder by batch size."""
    bert, one = [(BERT_BASE, ENCODER_RANKS)], [(32, 128)]
    return [
        *_blocks(FfnCase, bert, one, dtype),
        *_blocks(FfnCase, [(BERT_BASE, (96, 192))], [(16, 4096)], dtype),
        *_blocks(AttentionCase, bert, one, dtype),
        *_blocks(EncoderCase, bert, [(1, 128), (32, 128), (128, 128)], dtype),
    ]


def cpu_block_cases(dtype: str) -> list[Case]:
    """Both blocks of BERT-base, for the CPU."""
    models = [(BERT_BASE, ENCODER_RANKS)]
    return [case for kind in (FfnCase, AttentionCase) for case in _blocks(kind, models, CPU_BATCHES, dtype)]


def cpu_encoder_cases(dtype: str) -> list[Case]:
    """The encoder of BERT-base, for the CPU."""
    return _blocks(EncoderCase, [(BERT_BASE, ENCODER_RANKS)], CPU_BATCHES, dtype)


CASE_SETS: dict[str, Callable[[str], Sequence[Case]]] = {
    "attention": attention_cases,
    "core": core_cases,
    "core-blocks": core_block_cases,
    "cpu": cpu_cases,
    "cpu-blocks": cpu_block_cases,
    "cpu-encoder": cpu_encoder_cases,
    "cpu-masked": cpu_masked_cases,
    "cpu-training": cpu_training_cases,
    "encoder": encoder_cases,
    "ffn": ffn_cases,
    "full": full_cases,
    "masked": masked_cases,
}


def parse_slice(text: str) -> tuple[int, int]:
    """(i, n) of "i/n", 1 <= i <= n.

    Raises:
        InputError: anything else.
    """
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise InputError(f"--slice {text}: expected i/n with 1 <= i <= n, such as 1/8")
    return int(first), int(count)


def _with_direction(case: Case, direction: Direction) -> Iterator[Case]:
    if case.op in ("linear", "masked") or direction == "forward":
        yield dataclasses.replace(case, direction=direction)


def select(
    names: Sequence[str],
    dtype: str,
    direction: Direction | None = None,
    only: str | None = None,
    slice_: tuple[int, int] = (1, 1),
) -> list[Case]:
    """The cases of the named sets, in order and each once.

    Args:
        names: keys of CASE_SETS.
        dtype: of every case.
        direction: replaces every case's own. Default: None, keep it.
        only: a part of the case's name. Default: None, all.
        slice_: (i, n): every n-th case from the i-th on, so that slices cost about the same.

    Raises:
        InputError: an unknown set, or nothing is left.
    """
    found: dict[Case, Any] = {}
    for name in names:
        if name not in CASE_SETS:
            raise InputError(f"--cases {name}: expected one of {', '.join(CASE_SETS)}")
        for case in CASE_SETS[name](dtype):
            found |= dict.fromkeys([case] if direction is None else _with_direction(case, direction))
    if not found:
        raise InputError(f"--direction {direction}: no case of {', '.join(names)} has it")
    cases = [case for case in found if only is None or only in str(case)]
    if not cases:
        raise InputError(f"--only {only}: no case of {', '.join(names)} has this in its name")
    first, count = slice_
    if first > len(cases):
        raise InputError(f"--slice {first}/{count}: there are {len(cases)} cases")
    return cases[first - 1 :: count]
