"""Tables for the terminal, at most 80 columns wide; plain ASCII where the output is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lpaf.report.summary import (
    MISSING,
    format_bytes,
    format_count,
    format_factor,
    format_metric,
    format_milliseconds,
    format_percent,
    format_rank,
    headline_sentence,
    is_number,
    share,
    significant,
    speedup,
    stage_rows,
)

if TYPE_CHECKING:
    from lpaf.report.inspect import Inspection

WIDTH = 80
# Longer names (paths, usually) fold, or rich would drop the numbers beside them.
NAME_WIDTH = 34
# Rich's SIMPLE_HEAD in ASCII: a rule under the heading and nothing else.
PLAIN = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def _table(title: str | None, head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str | None = None) -> Table:
    """A table whose first column may fold while the numbers stay whole. Text is never read as markup."""
    table = Table(
        title=None if title is None else Text(title),
        caption=None if caption is None else Text(caption),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, name in enumerate(head):
        table.add_column(
            Text(name),
            justify="right" if index else "left",
            no_wrap=index > 0,
            overflow="fold",
            min_width=8 if not index else None,
            max_width=NAME_WIDTH if not index else None,
        )
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def show(table: Table, file: IO[str] | Console | None = None) -> None:
    """Print a table to a text file or rich Console (default: standard output), at most 80 columns wide."""
    console = file if isinstance(file, Console) else Console(file=file or sys.stdout, highlight=False)
    console = console if console.is_terminal else Console(file=console.file, width=WIDTH, no_color=True)
    if not console.is_terminal:
        table.box = PLAIN
    console.print(table, width=min(console.width, WIDTH))


def final_table(report: Mapping[str, Any]) -> Table:
    """The closing table of a compression run: each stage's numbers and the headline."""
    head = ("", "dense", "pruned", "factored", "compressed", "to dense")
    title = f"{report['model']} on {report['task']}: {report['method']}"
    return _table(title, head, stage_rows(report), headline_sentence(report))


def comparison_row(name: str, report: Mapping[str, Any], stage: str = "compressed") -> dict[str, Any]:
    """A row for ``comparison_table``: a report's compressed model (``stage="dense"``: its dense one)."""
    if stage not in ("dense", "compressed"):
        raise ValueError(f"stage: got {stage!r}, expected 'dense' or 'compressed'")
    encoder = report["encoder_params"]
    return {
        "name": name,
        "metric": report["metric"][stage],
        "encoder_ratio": share(encoder[stage], encoder["dense"]),
        "file_bytes": report["file_bytes"][stage],
        "flops": report["flops"][stage],
        "latency_ms": report["latency_ms"][stage],
        "speedup": 1.0 if stage == "dense" else speedup(report),
    }


def comparison_table(rows: Iterable[Mapping[str, Any]], metric: str = "metric", title: str | None = None) -> Table:
    """Several models side by side.

    Each row has name, metric, encoder_ratio (share of the dense encoder's parameters), file_bytes,
    flops (MACs), latency_ms and speedup; any but the name may be missing or None.
    """
    head = ("model", metric, "encoder", "size", "MACs", "latency", "speed")
    cells = [
        (
            row["name"],
            format_metric(row.get("metric")),
            format_percent(row.get("encoder_ratio")),
            format_bytes(row.get("file_bytes")),
            format_count(row.get("flops")),
            format_milliseconds(row.get("latency_ms")),
            format_factor(row.get("speedup")),
        )
        for row in rows
    ]
    return _table(title, head, cells)


def bench_table(rows: Iterable[Mapping[str, Any]], title: str | None = None) -> Table:
    """Latencies: each row has model, mode, batch, length, latency_ms, and where known p20, p80 (ms) and speedup."""
    head = ("model", "mode", "batch", "length", "median", "p20", "p80", "speed")
    cells = [
        (
            row["model"],
            row["mode"],
            row["batch"],
            row["length"],
            format_milliseconds(row.get("latency_ms")),
            *(significant(row[key]) if is_number(row.get(key)) else MISSING for key in ("p20", "p80")),
            format_factor(row.get("speedup")),
        )
        for row in rows
    ]
    return _table(title, head, cells)


def step_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Training steps: each row as :func:`lpaf.evaluate.step.bench_steps` returns it."""
    rows = list(rows)
    first = rows[0]
    title = (
        f"One step of {first['model']}, batch {first['batch']}, length {first['length']}, rank {first['rank']},"
        f" {first['dtype']}, {first['mode']}"
    )
    cells = [
        (
            row["stage"],
            format_milliseconds(row["step_ms"]),
            significant(row["p20"]),
            significant(row["p80"]),
            format_factor(row["ratio"]),
        )
        for row in rows
    ]
    return _table(title, ("stage", "median", "p20", "p80", f"of {first['stage']}"), cells)


def metrics_table(metrics: Mapping[str, Mapping[str, Any]], title: str | None = None) -> Table:
    """Evaluation results {split: {metric: value}}: one line per split and metric."""
    cells = [(split, name, format_metric(value)) for split, values in metrics.items() for name, value in values.items()]
    return _table(title, ("split", "metric", "value"), cells)


def _without_shared_start(names: Sequence[str]) -> list[str]:
    """Dotted names without the leading parts that all share, all but the last: 'layer.0.output.dense'."""
    parts = [name.split(".") for name in names]
    same = 0
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        same += 1
    return [".".join(part[max(same - 1, 0) :]) for part in parts]


def inspection_table(inspection: Inspection) -> Table:
    """Ranks of every matrix of an inspected directory, with the means as its last line."""
    per_matrix, summary = inspection.per_matrix, inspection.summary
    head = ("matrix", "shape", "dense", "pruned", "compr.", "kept", "error")
    cells = [
        (
            short,
            "x".join(str(size) for size in entry["shape"]),
            *(format_rank(entry[stage]) for stage in ("dense", "pruned", "compressed")),
            format_percent(entry["kept_share"]),
            f"{entry['error']:.3f}" if is_number(entry["error"]) else MISSING,
        )
        for short, entry in zip(_without_shared_start(list(per_matrix)), per_matrix.values(), strict=True)
    ]
    means = (summary["mean_rank"][stage] for stage in ("dense", "pruned", "compressed"))
    cells.append(("mean", "", *(format_rank(mean) for mean in means), format_percent(summary["mean_kept_share"]), ""))
    return _table(f"Ranks in {inspection.directory}", head, cells, inspection.sentence())
