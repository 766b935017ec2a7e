"""What rows say: the table of a run, its summary, and what got slower between two files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import InputError
from .rows import Cell, Row, cell_name, latest

SUMMARY_ROWS = 16


def _text_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]
    shown = []
    for line in (head, ["-" * width for width in widths], *lines):
        cells = [
            word.rjust(width) if column else word.ljust(width) for column, (word, width) in enumerate(zip(line, widths))
        ]
        shown.append("  ".join(cells).rstrip())
    return "\n".join(shown)


def _time(row: Row | None) -> float | None:
    return None if row is None else row["median_us"]


def speedup(providers: dict[str, Row], ours: str, other: str) -> float | None:
    """How many times faster ``ours`` is than ``other`` in one run of one cell, or None where one has no time."""
    mine, theirs = _time(providers.get(ours)), _time(providers.get(other))
    return None if mine is None or theirs is None else theirs / mine


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm; NaN of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def run_table(rows: Sequence[Row]) -> str:
    """One line per cell: our time, how much faster it is than each other provider, and its share of the roofline."""
    cells = latest(rows)
    # In the order of first appearance, over all cells.
    names = dict.fromkeys(row["provider"] for row in rows)
    others = [name for name in names if name != "ours" and any(_time(p.get(name)) for p in cells.values())]
    lines = []
    for providers in cells.values():
        mine = providers.get("ours", {})
        share = mine.get("roofline_share")
        lines.append(
            [
                cell_name(next(iter(providers.values()))),
                _number(mine.get("median_us"), "{:.1f}"),
                *(_number(speedup(providers, "ours", other), "{:.2f}x") for other in others),
                _number(None if share is None else 100 * share, "{:.0f}"),
            ]
        )
    return _text_table(["case", "ours us", *(f"over {name}" for name in others), "roofline %"], lines)


def failures(rows: Sequence[Row]) -> list[str]:
    """One line per provider that has no time in the last run of a cell, with the reason."""
    return [
        f"{cell_name(row)} {row['provider']}: {row['failed']}"
        for providers in latest(rows).values()
        for row in providers.values()
        if row["failed"] is not None
    ]


def summary(rows: Sequence[Row]) -> list[str]:
    """For each pair that matters: in how many cells with M >= 16 ours is at least as fast, and geometric means."""
    lines = []
    cells = latest(rows)
    for direction in dict.fromkeys(row["direction"] for row in rows):
        for ours, other in (("ours", "chain"), ("ours", "dense"), ("ours_graph", "chain_graph")):
            ratios: dict[bool, list[float]] = {False: [], True: []}
            for providers in cells.values():
                any_row = next(iter(providers.values()))
                ratio = speedup(providers, ours, other)
                if ratio is not None and any_row["rows"] >= SUMMARY_ROWS and any_row["direction"] == direction:
                    ratios[any_row["kept"] > 0].append(ratio)
            every = ratios[False] + ratios[True]
            if not every:
                continue
            means = ", ".join(
                f"{geometric_mean(found):.2f}x at kept {words}"
                for words, found in (("= 0", ratios[False]), ("> 0", ratios[True]))
                if found
            )
            lines.append(
                f"{direction}, M >= {SUMMARY_ROWS}: {ours} is at least as fast as {other} in"
                f" {sum(ratio >= 1 for ratio in every)} of {len(every)} cells; geometric mean {means};"
                f" least {min(every):.2f}x"
            )
    return lines


@dataclass(frozen=True)
class Comparison:
    """What differs between two files.

    Args:
        compared: cells x providers with a time in both.
        slower: lines on those that got slower by more than the threshold, or lost their time.
        faster: lines on those that got faster by as much.
        only_old, only_new: "case provider" that one file alone has.
    """

    compared: int
    slower: list[str]
    faster: list[str]
    only_old: list[str]
    only_new: list[str]


def _by_provider(rows: Sequence[Row]) -> dict[tuple[Cell, str], Row]:
    return {(cell, name): row for cell, providers in latest(rows).items() for name, row in providers.items()}


def compare(old: Sequence[Row], new: Sequence[Row], threshold: float = 1.05) -> Comparison:
    """Compare the last run of every cell of two files.

    Args:
        old, new: rows.
        threshold: a time this many times the old one is slower. Default: 1.05.

    Raises:
        InputError: the rows are of different devices, thread counts or dtypes.
    """
    for key in ("device", "threads", "dtype"):
        kinds = [sorted({str(row[key]) for row in rows}) for rows in (old, new)]
        if kinds[0] != kinds[1]:
            raise InputError(f"{key}: OLD has {', '.join(kinds[0])}, NEW has {', '.join(kinds[1])}; not comparable")
        if key != "dtype" and len(kinds[0]) > 1:
            raise InputError(f"{key}: both files mix {', '.join(kinds[0])}; compare files of one {key}")
    before, after = _by_provider(old), _by_provider(new)
    compared, slower, faster = 0, [], []
    for key, row in after.items():
        if key not in before or before[key]["median_us"] is None:
            continue
        name = f"{cell_name(row)} {row['provider']}"
        was, now = before[key]["median_us"], row["median_us"]
        if now is None:
            slower.append(f"{name}: had {was:.1f} us, now none: {row['failed']}")
            continue
        compared += 1
        ratio = now / was
        overlap = before[key]["p80_us"] >= row["p20_us"] if ratio > 1 else row["p80_us"] >= before[key]["p20_us"]
        words = f"{name}: {was:.1f} -> {now:.1f} us, {ratio:.2f}x the time{' (spreads overlap)' if overlap else ''}"
        if ratio > threshold:
            slower.append(words)
        elif ratio < 1 / threshold:
            faster.append(words)
    only = [
        [f"{cell_name(row)} {row['provider']}" for key, row in one.items() if key not in two]
        for one, two in ((before, after), (after, before))
    ]
    return Comparison(compared, slower, faster, *only)
