"""Tables of measured plans: JSON files, one per GPU, looked up by shape and by the nearest row count.

Format 1::

    {"format": 1, "gpu": "NVIDIA H100 80GB HBM3", "triton": "3.6", "torch": "2.11.0+cu130", "driver": "580.159.04",
     "measured": "2026-11-21T12:00:00Z", "commit": "5583c48",
     "entries": [{"op": "lowrank_sparse_linear", "direction": "forward", "dtype": "bfloat16",
                  "in": 768, "out": 3072, "rank": 80, "kept": 154,
                  "rows": {"16": [["one_kernel", ["one_kernel-16x64x128-w4-s3-p0-r144"], 3.1], ["chain", [], 5.0]]}}]}

Each list of plans is ordered, the fastest first: (provider, launch names, microseconds). An entry of "lowrank_ffn" has
the sizes of the block, {"in": 768, "hidden": 3072, "out": 768, "ranks": [80, 80], "kept": [38, 0], "gate": 0}, the last
one the rank of the gate; one of "lowrank_attention" has {"in": 768, "heads": 12, "kv_heads": 12, "head_dim": 64,
"out": 768, "ranks": [80, 80, 80, 80], "kept": [0, 0, 0, 0], "rotary": false, "length": 128}, those of q, k, v and o in
this order; one of "masked_linear" has {"in": 768, "out": 3072, "weight": "float32"}, the last one the dtype that weight
and scores are kept in. The default table has "gpu": "*" and "rules" in place of entries, see :class:`Rule`.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ..triton.launch import ALIGNED, head_columns

FORMAT = 1
# A shape that was not measured takes the plans of the nearest one that was, if every size is within this factor.
NEAREST_FACTOR = 1.5
LINEAR, FFN, ATTENTION = "lowrank_sparse_linear", "lowrank_ffn", "lowrank_attention"
MASKED = "masked_linear"


class Plan(NamedTuple):
    """One way to run an operator: the provider, the names of its launches, and the measured time (None: a rule)."""

    provider: str
    launches: tuple[str, ...] = ()
    microseconds: float | None = None


class Shape(NamedTuple):
    """What a plan of lowrank_sparse_linear depends on besides the row count."""

    op: str
    direction: str
    dtype: str
    in_features: int
    out_features: int
    rank: int
    kept: int

    @property
    def kind(self) -> tuple:
        """What must be equal for two shapes to be compared at all."""
        return self.op, self.direction, self.dtype, self.kept > 0

    @property
    def width(self) -> int:
        """The rank columns that one program may have to hold."""
        return self.rank + self.kept

    @property
    def fields(self) -> dict[str, Any]:
        """The sizes as a table stores them."""
        return {"in": self.in_features, "out": self.out_features, "rank": self.rank, "kept": self.kept}

    @property
    def text(self) -> str:
        return f"{self.in_features}->{self.out_features} rank {self.rank} kept {self.kept}"

    def distance(self, other: Shape) -> float:
        """The largest factor between two sizes of the shapes, as a logarithm."""
        mine = (self.in_features, self.out_features, self.rank + 1, self.kept + 1)
        theirs = (other.in_features, other.out_features, other.rank + 1, other.kept + 1)
        return max(abs(math.log(a / b)) for a, b in zip(mine, theirs))


class FfnShape(NamedTuple):
    """What a plan of lowrank_ffn depends on besides the row count; ``ranks`` and ``kept`` of F1 and F2."""

    op: str
    direction: str
    dtype: str
    in_features: int
    hidden: int
    out_features: int
    ranks: tuple[int, int]
    kept: tuple[int, int]
    gate: int

    @property
    def kind(self) -> tuple:
        """What must be equal for two shapes to be compared at all."""
        return self.op, self.direction, self.dtype, self.kept[0] > 0, self.kept[1] > 0, self.gate > 0

    @property
    def width(self) -> int:
        """The rank columns that one program may have to hold: those of F1 and the gate together, or those of F2."""
        return max(self.ranks[0] + self.kept[0] + self.gate, self.ranks[1] + self.kept[1])

    @property
    def fields(self) -> dict[str, Any]:
        """The sizes as a table stores them."""
        sizes = {"in": self.in_features, "hidden": self.hidden, "out": self.out_features}
        return sizes | {"ranks": self.ranks, "kept": self.kept, "gate": self.gate}

    @property
    def text(self) -> str:
        ranks, kept = (f"{first}, {second}" for first, second in (self.ranks, self.kept))
        gate = f" gate {self.gate}" if self.gate else ""
        return f"{self.in_features}->{self.hidden}->{self.out_features} ranks {ranks} kept {kept}{gate}"

    def distance(self, other: FfnShape) -> float:
        """The largest factor between two sizes of the shapes, as a logarithm."""
        mine, theirs = (
            (
                shape.in_features,
                shape.hidden,
                shape.out_features,
                *(n + 1 for n in (*shape.ranks, *shape.kept, shape.gate)),
            )
            for shape in (self, other)
        )
        return max(abs(math.log(a / b)) for a, b in zip(mine, theirs))


class AttentionShape(NamedTuple):
    """What a plan of lowrank_attention depends on besides the row count; ranks and kept are those of q, k, v and o.

    The length, the longest sequence's, is one of its sizes: the block makes K and V once per tile of queries.
    """

    op: str
    direction: str
    dtype: str
    in_features: int
    heads: int
    kv_heads: int
    head_dim: int
    out_features: int
    ranks: tuple[int, int, int, int]
    kept: tuple[int, int, int, int]
    rotary: bool
    length: int

    @property
    def kind(self) -> tuple:
        """What must be equal for two shapes to be compared at all."""
        return self.op, self.direction, self.dtype, self.head_dim, self.rotary, *(count > 0 for count in self.kept)

    @property
    def width(self) -> int:
        """The columns of z that a program of "attend" holds: of q, k or v, and those before that are read with it."""
        widths = [rank + kept for rank, kept in zip(self.ranks[:3], self.kept)]
        firsts = accumulate(widths[:2], initial=0)
        return max(first % ALIGNED + width for first, width in zip(firsts, widths))

    @property
    def out_width(self) -> int:
        """The rank columns of o, which a program of "close" holds."""
        return self.ranks[3] + self.kept[3]

    @property
    def head(self) -> int:
        """The columns of a head that a program of "attend" holds."""
        return head_columns(self.head_dim, self.rotary)

    @property
    def fields(self) -> dict[str, Any]:
        """The sizes as a table stores them."""
        sizes = {"in": self.in_features, "heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        sizes |= {"out": self.out_features, "ranks": self.ranks, "kept": self.kept}
        return sizes | {"rotary": self.rotary, "length": self.length}

    @property
    def text(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        ranks, kept = (", ".join(map(str, sizes)) for sizes in (self.ranks, self.kept))
        turned = " rotary" if self.rotary else ""
        return (
            f"{self.in_features}->{heads}x{self.head_dim}->{self.out_features} ranks {ranks} kept {kept}{turned}"
            f" length {self.length}"
        )

    def distance(self, other: AttentionShape) -> float:
        """The largest factor between two sizes of the shapes, as a logarithm."""
        mine, theirs = (
            (
                shape.in_features,
                shape.heads,
                shape.kv_heads,
                shape.out_features,
                shape.length,
                *(n + 1 for n in (*shape.ranks, *shape.kept)),
            )
            for shape in (self, other)
        )
        return max(abs(math.log(a / b)) for a, b in zip(mine, theirs))


class MaskedShape(NamedTuple):
    """What a plan of masked_linear depends on besides the row count; ``weight`` is the dtype of weight and scores."""

    op: str
    direction: str
    dtype: str
    in_features: int
    out_features: int
    weight: str

    @property
    def kind(self) -> tuple:
        """What must be equal for two shapes to be compared at all."""
        return self.op, self.direction, self.dtype, self.weight

    @property
    def fields(self) -> dict[str, Any]:
        """The sizes as a table stores them."""
        return {"in": self.in_features, "out": self.out_features, "weight": self.weight}

    @property
    def text(self) -> str:
        return f"{self.in_features}->{self.out_features} weight {self.weight}"

    def distance(self, other: MaskedShape) -> float:
        """The larger factor between two sizes of the shapes, as a logarithm."""
        sizes = ((self.in_features, other.in_features), (self.out_features, other.out_features))
        return max(abs(math.log(a / b)) for a, b in sizes)


AnyShape = Shape | FfnShape | AttentionShape | MaskedShape


@dataclass(frozen=True)
class Rule:
    """Plans of the default table for every shape that fits; a field of None fits all.

    Of several rules that fit the same rows the first one serves.

    Args:
        direction: "forward" (training too, unless a rule before it names "training"), "training" or "backward".
        op: the operator. Default: "lowrank_sparse_linear".
        kept: whether there are kept columns ("lowrank_sparse_linear" only).
        max_width: the most rank columns, see the shapes' ``width``.
        max_length: the longest sequence ("lowrank_attention" only).
        archs: compute capabilities times ten.
        dtypes: names.
        rows: [first, last] row counts, last of None: no end.
        plans: as in an entry, without times.
    """

    direction: str
    plans: tuple[Plan, ...]
    op: str = LINEAR
    kept: bool | None = None
    max_width: int | None = None
    max_length: int | None = None
    archs: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    rows: tuple[int, int | None] = (0, None)

    def fits(self, shape: AnyShape, arch: int) -> bool:
        return (
            shape.op == self.op
            and (shape.direction == self.direction or (shape.direction, self.direction) == ("training", "forward"))
            and (self.kept is None or self.kept == (shape.kept > 0))
            and (self.max_width is None or shape.width <= self.max_width)
            and (self.max_length is None or shape.length <= self.max_length)
            and (self.archs is None or arch in self.archs)
            and (self.dtypes is None or shape.dtype in self.dtypes)
        )


@dataclass(frozen=True)
class Resolved:
    """The plans of one shape by row count: ``plans[i]`` serves rows up to ``limits[i]``, the last one all beyond."""

    limits: tuple[float, ...]
    plans: tuple[tuple[Plan, ...], ...]
    rows: tuple[int, ...]
    reason: str

    def at(self, rows: int) -> tuple[Plan, ...]:
        return self.plans[bisect_left(self.limits, rows)]


@dataclass(frozen=True)
class Table:
    """One loaded file.

    Raises (from :meth:`load`):
        ValueError: the file is no table of this format; the message names the file and what is wrong.
    """

    path: str
    gpu: str
    triton: str
    entries: dict[AnyShape, dict[int, tuple[Plan, ...]]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()

    @classmethod
    def load(cls, path: Path) -> Table:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}, expected {FORMAT}")
            entries: dict[AnyShape, dict[int, tuple[Plan, ...]]] = {}
            for entry in data.get("entries", ()):
                shape = _shape(entry)
                entries[shape] = {int(rows): _plans(plans) for rows, plans in entry["rows"].items()}
                if not entries[shape] or not all(entries[shape].values()):
                    raise ValueError(f"an entry without plans: {shape}")
            rules = tuple(_rule(rule) for rule in data.get("rules", ()))
            return cls(str(path), data["gpu"], data.get("triton", "*"), entries, rules)
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"missing {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}: not a tuning table of format {FORMAT}: {what}") from error

    def rejects(self, gpu: str, triton: str) -> str | None:
        """Why this table must not be used on ``gpu`` with ``triton`` (major.minor), or None."""
        if self.gpu not in ("*", gpu):
            return f"it was measured on {self.gpu}, this is {gpu}"
        if self.triton not in ("*", triton):
            return f"it was measured with Triton {self.triton}, this is {triton}"
        return None

    def resolve(self, shape: AnyShape, arch: int) -> Resolved | None:
        """The plans of ``shape``: its own entry, that of the nearest shape, or the rules; None if nothing fits."""
        name = Path(self.path).name
        # A forward is measured once, whether autograd records it or not.
        measured = shape._replace(direction="forward") if shape.direction == "training" else shape
        if measured in self.entries:
            return by_rows(self.entries[measured], f"{name}, measured")
        kind = measured.kind
        near = min((known for known in self.entries if known.kind == kind), key=shape.distance, default=None)
        if near is not None and shape.distance(near) <= math.log(NEAREST_FACTOR):
            return by_rows(self.entries[near], f"{name}, measured on the nearest shape {near.text}")
        rules = sorted((rule for rule in self.rules if rule.fits(shape, arch)), key=lambda rule: rule.rows[0])
        if not rules:
            return None
        limits = tuple(float(rule.rows[1]) for rule in rules[:-1] if rule.rows[1] is not None)
        return Resolved(limits, tuple(rule.plans for rule in rules), (), f"{name}, a rule")


def by_rows(plans: dict[int, tuple[Plan, ...]], reason: str) -> Resolved:
    """Plans that change halfway, in log space, between two measured row counts."""
    rows = sorted(plans)
    limits = tuple(math.sqrt(a * b) for a, b in pairwise(rows))
    return Resolved(limits, tuple(plans[count] for count in rows), tuple(rows), reason)


def to_json(entries: dict[AnyShape, dict[int, tuple[Plan, ...]]], meta: dict[str, Any]) -> str:
    """The text of a table: ``meta`` (gpu, triton, ...) and ``entries``, one line per row count."""
    lines = []
    for shape in sorted(entries):
        head = {"op": shape.op, "direction": shape.direction, "dtype": shape.dtype, **shape.fields}
        rows = ",\n    ".join(f'"{rows}": {json.dumps(plans)}' for rows, plans in sorted(entries[shape].items()))
        lines.append(f'  {json.dumps(head)[:-1]}, "rows": {{\n    {rows}}}}}')
    top = json.dumps({"format": FORMAT, **meta}, indent=1)[:-2]
    body = ",\n".join(lines)
    return f'{top},\n "entries": [\n{body}\n]}}\n'


def _plans(plans: Iterable[list]) -> tuple[Plan, ...]:
    return tuple(Plan(provider, tuple(launches), *time) for provider, launches, *time in plans)


def _shape(entry: dict[str, Any]) -> AnyShape:
    head = entry["op"], entry["direction"], entry["dtype"]
    if entry["op"] == ATTENTION:
        sizes = (int(entry[key]) for key in ("in", "heads", "kv_heads", "head_dim", "out"))
        ranks, kept = ((int(q), int(k), int(v), int(o)) for q, k, v, o in (entry["ranks"], entry["kept"]))
        return AttentionShape(*head, *sizes, ranks, kept, bool(entry["rotary"]), int(entry["length"]))
    if entry["op"] == MASKED:
        return MaskedShape(*head, int(entry["in"]), int(entry["out"]), str(entry["weight"]))
    if entry["op"] != FFN:
        return Shape(*head, *(int(entry[key]) for key in ("in", "out", "rank", "kept")))
    sizes = (int(entry[key]) for key in ("in", "hidden", "out"))
    (rank1, rank2), (kept1, kept2) = entry["ranks"], entry["kept"]
    return FfnShape(*head, *sizes, (int(rank1), int(rank2)), (int(kept1), int(kept2)), int(entry["gate"]))


def _rule(rule: dict[str, Any]) -> Rule:
    known = {field.name for field in fields(Rule)}
    if set(rule) - known:
        raise ValueError(f"a rule with unknown fields {sorted(set(rule) - known)}")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in rule.items()}
    return Rule(**given | {"plans": _plans(rule["plans"])})
