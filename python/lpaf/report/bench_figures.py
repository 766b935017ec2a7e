"""Pictures of benchmark rows (``python -m benchmarks run`` writes them): speed-ups, and the roofline.

Nothing is measured here. Of every cell the last run counts, because a ratio must come from one run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from lpaf.errors import InputError
from lpaf.report.figures import INK, MUTED, Picture, _note, grid, styled, to_svg

Row = Mapping[str, Any]

NUMBERS = ("in", "out", "rank", "kept", "rows", "bytes", "flops", "ceiling_bandwidth", "ceiling_flops")
WORDS = ("op", "dtype", "direction", "provider", "device", "run")
CELL = ("op", "in", "out", "rank", "kept", "rows", "batch", "length", "dtype", "direction")
BASELINES = ("dense", "chain")
BASELINE_WORDS = {"dense": "the dense one", "chain": "the same factors as an eager chain"}
# The shares of kept columns, in per cent, that lines are grouped by.
KEPT_STYLES = {
    0: ("#0072b2", "o", "-"),
    5: ("#e69f00", "s", "--"),
    10: ("#d55e00", "^", "-."),
    20: ("#009e73", "D", ":"),
}
PROVIDER_STYLES = {
    "ours": ("#009e73", "o"),
    "ours_graph": ("#009e73", "D"),
    "chain": ("#d55e00", "^"),
    "chain_graph": ("#d55e00", "v"),
    "compile": ("#cc79a7", "P"),
    "compile_b2b": ("#cc79a7", "X"),
    "dense": ("#0072b2", "s"),
}
OTHER_STYLE = (MUTED, "*")
PANELS_PER_LINE = 3

SPEEDUP_CAPTION = (
    "How many times faster the low-rank layer is than {baseline} at the same numbers, from the same interleaved run, "
    "against {axis}. One panel per matrix (inputs x outputs), one colour per share of kept columns; {others} are "
    "drawn as points and the line joins their geometric means. Above the dashed line the layer is faster."
)
ROOFLINE_CAPTION = (
    "Work done per second against work per byte that must move, by formula. The line is what the device was seen to "
    "do in the same run: a large copy (slope) and a large matrix product (flat). Points above it are small enough to "
    "stay in a cache."
)


def read_bench_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that ``python -m benchmarks run`` wrote, without those that have no time.

    A last line without an end is what an interrupted run left and is not read.

    Raises:
        InputError: no such file, a line that is no row, or no row with a time.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise InputError(
            f"--plot {path}: cannot be read ({reason}); expected rows of python -m benchmarks run"
        ) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not _is_row(row):
            raise InputError(f"--plot {path}: line {number} is not a row of python -m benchmarks run")
        rows.append(row)
    timed = [row for row in rows if row["median_us"] is not None]
    if not timed:
        raise InputError(f"--plot {path}: holds no row with a time; measure with python -m benchmarks run")
    return timed


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and "median_us" in row
        and all(_is_number(row.get(key)) and row[key] >= 0 for key in NUMBERS)
        and all(row[key] > 0 for key in ("in", "out", "rows", "bytes", "flops", "ceiling_bandwidth", "ceiling_flops"))
        and all(isinstance(row.get(key), str) for key in WORDS)
        and (row["median_us"] is None or (_is_number(row["median_us"]) and row["median_us"] > 0))
    )


def _cell(row: Row) -> tuple:
    return tuple(row.get(key) for key in CELL)


def by_cell(rows: Sequence[Row]) -> dict[tuple, dict[str, Row]]:
    """cell -> provider -> row, the last run of every cell."""
    runs = {_cell(row): row["run"] for row in rows}
    cells: dict[tuple, dict[str, Row]] = {cell: {} for cell in runs}
    for row in rows:
        if row["run"] == runs[_cell(row)]:
            cells[_cell(row)][row["provider"]] = row
    return cells


def speedups(rows: Sequence[Row], baseline: str) -> list[tuple[Row, float]]:
    """(our row, how many times faster than ``baseline``) of every linear cell that has both."""
    found = []
    for providers in by_cell(rows).values():
        ours, other = providers.get("ours"), providers.get(baseline)
        if ours is not None and other is not None and ours["op"] == "linear":
            found.append((ours, other["median_us"] / ours["median_us"]))
    return found


def kept_share(row: Row) -> int:
    """The share of kept columns in per cent, rounded to one of those that are drawn."""
    percent = 100 * row["kept"] / row["out"]
    return min(KEPT_STYLES, key=lambda known: abs(known - percent))


def _log_axis(axis: Any, values: Sequence[float], label: Callable[[float], str]) -> None:
    """A logarithmic axis with a mark at each of ``values``."""
    axis.set_major_locator(NullLocator())
    axis.set_minor_locator(NullLocator())
    axis.set_ticks(list(values))
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))


def _factor_marks(low: float, high: float) -> list[float]:
    """1, 2, 4, ... and halves that cover a range of factors, at most about six."""
    marks = [2.0**power for power in range(-8, 11)]
    shown = [mark for mark in marks if low / 1.5 <= mark <= high * 1.5]
    step = -(-len(shown) // 6)
    one = shown.index(1.0) if 1.0 in shown else 0
    return [mark for index, mark in enumerate(shown) if (index - one) % step == 0]


def _spread_marks(values: Sequence[float], least_ratio: float) -> list[float]:
    """Those of sorted ``values`` whose labels have room on a logarithmic axis."""
    shown: list[float] = []
    for value in values:
        if not shown or value / shown[-1] >= least_ratio:
            shown.append(value)
    return shown


def speedup_figure(rows: Sequence[Row], baseline: str, axis: str) -> Figure:
    """Speed-up over ``baseline`` against ``axis`` ("rank" or "rows"), a panel per matrix, a line per kept share.

    Forward rows only; training steps are in the table and the roofline.
    """
    points = [(row, factor) for row, factor in speedups(rows, baseline) if row["direction"] == "forward"]
    shapes = sorted({(row["in"], row["out"]) for row, _ in points}, key=lambda shape: (shape[0] * shape[1], shape))
    with styled():
        if not points:
            figure, axes = grid(1, 1, 1.4)
            _note(axes[0, 0], f"no forward cell has both ours and {baseline}")
            return figure
        columns = min(PANELS_PER_LINE, len(shapes))
        lines = -(-len(shapes) // columns)
        figure, axes = grid(lines, columns, 0.95 + 1.75 * lines, sharex=True, sharey=True)
        factors = [factor for _, factor in points]
        low, high = min(*factors, 1.0), max(*factors, 1.0)
        values = sorted({row[axis] for row, _ in points})
        room = (values[-1] / values[0]) ** (1 / 10) if len(values) > 1 else 1.0
        drawn: dict[str, Any] = {}
        for plot, shape in zip(axes.flat, shapes):
            here = [(row, factor) for row, factor in points if (row["in"], row["out"]) == shape]
            plot.axhline(1.0, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
            for share, (color, marker, dashes) in KEPT_STYLES.items():
                mine = [(row[axis], factor) for row, factor in here if kept_share(row) == share]
                if not mine:
                    continue
                at = sorted({x for x, _ in mine})
                means = [_geometric_mean([factor for x, factor in mine if x == value]) for value in at]
                plot.scatter(*zip(*mine), color=color, marker=marker, s=9, alpha=0.45, linewidths=0, zorder=2)
                (drawn[f"kept {share} %"],) = plot.plot(
                    at, means, color=color, marker=marker, markersize=3.5, linestyle=dashes, linewidth=1.2, zorder=3
                )
            plot.set_title(f"{shape[0]} x {shape[1]}", fontsize=8.5)
            plot.set_xscale("log")
            plot.set_yscale("log")
            plot.set_ylim(low / 1.25, high * 1.25)
            plot.set_xlim(values[0] / 1.3, values[-1] * 1.3)
            _log_axis(
                plot.yaxis, _factor_marks(low, high), lambda value: f"{value:.2g}x" if value < 1 else f"{value:g}x"
            )
            _log_axis(plot.xaxis, _spread_marks(values, room), _short)
        for plot in axes.flat[len(shapes) :]:
            plot.set_axis_off()
        for column in range(columns):
            # The lowest panel of each column carries the numbers, also above an empty place.
            row = max(line for line in range(lines) if line * columns + column < len(shapes))
            axes[row, column].tick_params(labelbottom=True)
        figure.supxlabel("rank" if axis == "rank" else "rows M", fontsize=9)
        figure.supylabel(f"times faster than {baseline}", fontsize=9)
        order = [f"kept {share} %" for share in KEPT_STYLES if f"kept {share} %" in drawn]
        figure.legend([drawn[name] for name in order], order, loc="outside upper left", ncols=len(order))
        return figure


def _geometric_mean(values: Sequence[float]) -> float:
    product = 1.0
    for value in values:
        product *= value ** (1 / len(values))
    return product


def _short(value: float) -> str:
    """16384 -> 16k."""
    return f"{value / 1024:g}k" if value >= 4096 and value % 1024 == 0 else f"{value:g}"


def roofline_figure(rows: Sequence[Row]) -> Figure:
    """FLOP per second against FLOP per byte, a panel per dtype, under the ceilings that the rows hold."""
    dtypes = sorted({row["dtype"] for row in rows})
    cells = by_cell(rows).values()
    known = {row["provider"] for row in rows}
    names = [name for name in PROVIDER_STYLES if name in known] + sorted(known - PROVIDER_STYLES.keys())
    with styled():
        figure, axes = grid(1, len(dtypes), 3.9, sharey=True)
        drawn: dict[str, Any] = {}
        for plot, dtype in zip(axes[0], dtypes, strict=True):
            here = [row for providers in cells for row in providers.values() if row["dtype"] == dtype]
            intensities = [row["flops"] / row["bytes"] for row in here]
            bandwidth, flops = (max(row[key] for row in here) for key in ("ceiling_bandwidth", "ceiling_flops"))
            ridge = flops / bandwidth
            left, right = min(*intensities, ridge) / 1.5, max(*intensities, ridge) * 1.5
            plot.plot([left, ridge, right], [left * bandwidth, flops, flops], color=INK, linewidth=1.3, zorder=1)
            # Ours last, on top of the others.
            for name in reversed(names):
                color, marker = PROVIDER_STYLES.get(name, OTHER_STYLE)
                mine = [row for row in here if row["provider"] == name]
                if mine:
                    drawn[name] = plot.scatter(
                        [row["flops"] / row["bytes"] for row in mine],
                        [1e6 * row["flops"] / row["median_us"] for row in mine],
                        color=color,
                        marker=marker,
                        s=14,
                        alpha=0.65,
                        linewidths=0,
                        zorder=2,
                    )
            plot.set_xscale("log")
            plot.set_yscale("log")
            plot.set_xlim(left, right)
            plot.set_xlabel("FLOP / byte")
            words = f"{_rate(bandwidth, 'B/s')}, {_rate(flops, 'FLOP/s')}"
            plot.set_title(f"{dtype}: {words}" if len(dtypes) < PANELS_PER_LINE else dtype)
        axes[0, 0].set_ylabel("FLOP / s")
        axes[0, 0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: _rate(value, "")))
        figure.legend([drawn[name] for name in names], names, loc="outside upper left", ncols=min(len(names), 6))
        return figure


def _rate(value: float, unit: str) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def bench_pictures(rows: Sequence[Row]) -> list[Picture]:
    """Speed-up over dense and over the chain against rank and M, and the roofline."""
    found = []
    for baseline in BASELINES:
        for axis, words, others in (("rank", "the rank", "all M"), ("rows", "the rows M", "all ranks")):
            caption = SPEEDUP_CAPTION.format(baseline=BASELINE_WORDS[baseline], axis=words, others=others)
            title = f"Speed-up over {baseline} against {words}"
            picture = Picture(f"speedup_{baseline}_{axis}", title, caption, speedup_figure(rows, baseline, axis))
            found.append(picture)
    found.append(Picture("roofline", "Roofline", ROOFLINE_CAPTION, roofline_figure(rows)))
    return found


def write_bench_pictures(path: Path, directory: Path) -> dict[Path, str]:
    """Draw the rows of ``path`` as SVG files in ``directory``, which is made if need be; returns file -> caption.

    Raises:
        InputError: the rows cannot be read, are of several devices, or the folder cannot be written.
    """
    rows = read_bench_rows(path)
    devices = sorted({row["device"] for row in rows})
    if len(devices) > 1:
        raise InputError(f"--plot {path}: mixes {', '.join(devices)}; plot a file of one device")
    pictures = bench_pictures(rows)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        written = {}
        for picture in pictures:
            file = directory / f"{picture.name}.svg"
            file.write_bytes(to_svg(picture.figure))
            written[file] = picture.caption
    except OSError as error:
        raise InputError(f"--output {directory}: cannot be written ({error.strerror})") from None
    return written
