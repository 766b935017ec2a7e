"""The report as one self-contained page: inline pictures and style, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import torch

from lpaf.report.figures import Picture, in_order, pictures, to_inline_svg
from lpaf.report.summary import (
    MISSING,
    Headline,
    command_text,
    flatten,
    format_metric,
    format_percent,
    format_rank,
    format_seconds,
    headlines,
    is_number,
    latency_conditions,
    loading_snippet,
    significant,
    stage_rows,
)

CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --panel: #f5f7f9; --ink: #22272e; --muted: #66707c;
  --grid: #d4d9e0; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --paper: #15191e; --panel: #1d232a; --ink: #e4e8ed;
  --muted: #98a2ae; --grid: #38414b; --accent: #56b4e9; } }
@media print { :root { color-scheme: light; --paper: #ffffff; --panel: #f5f7f9; --ink: #22272e;
  --muted: #66707c; --grid: #d4d9e0; --accent: #0072b2; }
  figure, tr { break-inside: avoid; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 52rem; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.12rem; margin: 2.4rem 0 .7rem; }
p.subtitle, figcaption, .note { color: var(--muted); font-size: .9rem; }
p.subtitle { margin: 0; }
ul.headline { list-style: none; display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr));
  gap: .8rem; padding: 0; margin: 1.4rem 0; }
ul.headline li { background: var(--panel); border-radius: .5rem; padding: .8rem 1rem; font-size: .9rem; }
ul.headline strong { display: block; font-size: 1.9rem; line-height: 1.2; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem; border-bottom: 1px solid var(--grid); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
table.pairs td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.pairs td:first-child { width: 34%; color: var(--muted); }
thead th { border-bottom: 2px solid var(--muted); font-weight: 600; }
figure { margin: 0 0 1.6rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { margin-top: .4rem; }
pre { background: var(--panel); border-radius: .5rem; padding: .8rem 1rem; overflow-x: auto;
  font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-top: .8rem; } summary { cursor: pointer; font-weight: 600; }
"""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table; every cell is escaped, the first column is the row's heading."""
    top = "".join(f'<th scope="col">{escape(str(cell))}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """A two-column table of names and texts."""
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in rows)
    return f'<div class="scroll"><table class="pairs"><tbody>{body}</tbody></table></div>'


def section(title: str, *parts: str) -> str:
    """A titled part of the page; the parts are HTML already."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def folded(title: str, content: str) -> str:
    """Content that is closed at first (browsers print it as it stands)."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def picture_section(picture: Picture) -> str:
    """One figure with its title and caption."""
    drawing = to_inline_svg(picture.figure, picture.name)
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>"
    return section(picture.title, f"<figure>{drawing}{caption}</figure>")


def matrix_table(per_matrix: Mapping[str, Mapping[str, Any]]) -> str:
    """Ranks, kept weights and reconstruction error of every matrix."""
    rows = [
        (
            name,
            " x ".join(str(size) for size in entry["shape"]),
            *(format_rank(entry[stage]) for stage in ("dense", "pruned", "compressed")),
            MISSING if entry["kept"] is None else entry["kept"],
            format_percent(entry["kept_share"]),
            significant(entry["error"]) if is_number(entry["error"]) else MISSING,
        )
        for name, entry in in_order(per_matrix).items()
    ]
    head = ("matrix", "shape", "dense rank", "pruned", "compressed", "columns of S", "weights kept", "error")
    return table(head, rows)


def page(title: str, subtitle: str, headline: Iterable[Headline], parts: Iterable[str]) -> str:
    """The whole document around parts that are HTML already."""
    items = "".join(f"<li><strong>{escape(part.value)}</strong>{escape(part.text)}</li>" for part in headline)
    top = f'<h1>{escape(title)}</h1><p class="subtitle">{escape(subtitle)}</p>'
    if items:
        top += f'<ul class="headline">{items}</ul>'
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{top}\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _details_table(report: Mapping[str, Any]) -> str:
    rows = [
        (stage, split, name, format_metric(value))
        for stage, splits in report["metric"]["details"].items()
        for split, metrics in splits.items()
        for name, value in metrics.items()
    ]
    return folded("All metrics", table(("stage", "split", "metric", "value"), rows)) if rows else ""


def _data_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = report["data"]
    validation = ", ".join(f"{split}: {count}" for split, count in data["validation"].items())
    return [
        ("training examples", str(data["train"])),
        ("validation examples", validation or MISSING),
        ("data fingerprint", str(data["fingerprint"])),
    ]


def render_html(report: Mapping[str, Any], analysis: Mapping[str, torch.Tensor]) -> str:
    """The page of one compression run; ``report`` and ``analysis`` as ``validate_report`` describes them."""
    latency = report["latency_ms"]
    note = f"Latency is the median of {latency['rounds']} interleaved rounds ({latency_conditions(report)})"
    low, high = latency["p20"], latency["p80"]
    if all(is_number(side.get(key)) for side in (low, high) for key in ("dense", "compressed")):
        spread = (
            f"{name} {significant(low[name])} to {significant(high[name])} ms" for name in ("dense", "compressed")
        )
        note += f"; from the 20th to the 80th percentile: {', '.join(spread)}"
    note += ". MACs are multiply-accumulates of the encoder's matrices and attention products."
    head = ("", "dense", "pruned", "factorized", "compressed", "compressed / dense")
    parts = [
        section(
            "Numbers",
            table(head, stage_rows(report)),
            f'<p class="note">{escape(note)}</p>',
            _details_table(report),
        )
    ]
    parts.extend(picture_section(picture) for picture in pictures(report, analysis))
    snippet = loading_snippet(report.get("problem", "classification"))
    loading = f"<p>Install lpaf-kernels, then:</p><pre>{escape(snippet)}</pre>"
    parts.append(section("How to load it", loading))
    seconds = [(stage.replace("_", " "), format_seconds(value)) for stage, value in report["seconds"].items()]
    parts.append(
        section(
            "How it was made",
            f"<pre>{escape(command_text(report['command']))}</pre>",
            pairs([("seed", str(report["seed"])), *_data_rows(report), *((f"time: {k}", v) for k, v in seconds)]),
            folded("Every matrix", matrix_table(report["rank"]["per_matrix"])),
            folded("Configuration", pairs(flatten(report["config"]))),
            folded("Versions", pairs(flatten(report["versions"]))),
        )
    )
    title = f"{report['model']} compressed by {report['method']}"
    return page(title, f"task: {report['task']}", headlines(report), parts)
