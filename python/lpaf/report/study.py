"""What a study found: one table per split and stage, every run's numbers, the trade-off and the ranks as pictures."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from safetensors import safe_open

from lpaf.data.task_data import TEST
from lpaf.data.tasks import LOWER_IS_BETTER
from lpaf.evaluate.metrics import PairedTest, paired_scores
from lpaf.report.figures import MUTED, Picture, grid, styled, to_png
from lpaf.report.summary import MISSING, STAGES, format_rank, is_number
from lpaf.report.write import ANALYSIS_FILE, REPORT_FILE

Cell = tuple[tuple[str, Any], ...]

STAGE_WORDS = {"factorized": "before retraining", "compressed": "after retraining"}
#: what ``example_scores`` are, by problem
EXAMPLE_SCORES = {
    "classification": "right and wrong",
    "regression": "the squared error",
    "question-answering": "F1",
    "summarization": "ROUGE-2",
    "language-modeling": "the mean loss of a block",
    "masked-language-modeling": "the mean loss of a block's hidden words",
}
MARKERS = "osD^vP*X<>"
TRADE_OFF_CAPTION = (
    "The task metric against the share of the {whole}'s parameters that is left, means over the seeds with one "
    "standard deviation each way; the dashed line is the dense model."
)
RANKS_CAPTION = (
    "Mean rank of the pruned matrices (bottom) and task metric of the pruned model (top) against the share of weights "
    "that pruning kept; the dashed lines are the dense model (the paper's Figure 2)."
)


@dataclass(frozen=True)
class Outcome:
    """A finished run: its row, its cell, and the folder with its report."""

    label: str
    cell: Cell
    seed: int
    tuned: Mapping[str, Any]
    directory: Path

    @cached_property
    def report(self) -> dict[str, Any]:
        return json.loads((self.directory / REPORT_FILE).read_text(encoding="utf-8"))

    def metric(self, stage: str, split: str) -> float | None:
        """The main metric of one stage on one split; None when the stage did not run, or the run has no such split."""
        return self.report["metric"]["details"].get(stage, {}).get(split, {}).get(self.report["metric"]["name"])

    @property
    def metric_name(self) -> str:
        """The main metric."""
        return self.report["metric"]["name"]

    @property
    def splits(self) -> list[str]:
        """The splits that were scored, ``--test-file``'s last."""
        return sorted(self.report["metric"]["details"]["compressed"], key=lambda split: split == TEST)

    def scores(self, stage: str, split: str) -> np.ndarray:
        """The score of every example, float32 [N]."""
        with safe_open(self.directory / ANALYSIS_FILE, framework="np") as tensors:
            return tensors.get_tensor(f"scores.{stage}.{split}")


@dataclass(frozen=True)
class Entry:
    """One cell of a table: the mean over seeds, and the row it is compared with: its mean, and the test of both.

    What is written is ``scale`` times the metric: 100 for shares.
    """

    label: str
    cell: Cell
    values: list[float]
    theirs: float | None = None
    test: PairedTest | None = None
    missing: int = 0
    scale: int = 100

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        text = f"{self.scale * self.mean:.2f}"
        if self.deviation is not None:
            text += f" ± {self.scale * self.deviation:.2f}"
        if self.missing:
            text += f" [{self.missing} of {self.missing + len(self.values)} seeds missing]"
        if self.test is not None:
            text += f" ({self.scale * (self.mean - self.theirs):+.2f}, p = {self.test.p_value:.2g})"
        return text


def metric_scale(name: str) -> int:
    """By what a metric is multiplied in tables: shares are written as percentages."""
    return 1 if name in LOWER_IS_BETTER else 100


def paired(ours: Sequence[Outcome], theirs: Sequence[Outcome], stage: str, split: str) -> PairedTest | None:
    """Test of two rows on the same examples: over the seeds that both have, each example counts with its mean."""
    scores = [{run.seed: run.scores(stage, split) for run in runs} for runs in (ours, theirs)]
    seeds = sorted(set(scores[0]) & set(scores[1]))
    if not seeds:
        return None
    return paired_scores(*(np.mean([of[seed] for seed in seeds], axis=0) for of in scores))


def table(outcomes: Sequence[Outcome], stage: str, split: str, against: str | None) -> list[Entry]:
    """The entries of one table, in the order of the study."""
    groups: dict[tuple[str, Cell], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.metric(stage, split) is not None:
            groups.setdefault((outcome.label, outcome.cell), []).append(outcome)
    seeds = max((len(runs) for runs in groups.values()), default=0)
    entries = []
    for (label, cell), runs in groups.items():
        values = [run.metric(stage, split) for run in runs]
        entry = Entry(label, cell, values, missing=seeds - len(runs), scale=metric_scale(runs[0].metric_name))
        others = groups.get((against, cell), []) if label != against else []
        if others:
            theirs = statistics.fmean(run.metric(stage, split) for run in others)
            entry = replace(entry, theirs=theirs, test=paired(runs, others, stage, split))
        entries.append(entry)
    return entries


def cell_name(cell: Cell) -> str:
    """ "ratio 0.5, keep 0.25"."""
    return ", ".join(f"{name} {value}" for name, value in cell) or "all"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def result_table(entries: Sequence[Entry]) -> str:
    """Methods down, cells across."""
    cells = list(dict.fromkeys(entry.cell for entry in entries))
    found = {(entry.label, entry.cell): entry for entry in entries}
    labels = dict.fromkeys(entry.label for entry in entries)
    rows = [[label, *(str(found.get((label, cell), MISSING)) for cell in cells)] for label in labels]
    return markdown_table(["", *(cell_name(cell) for cell in cells)], rows)


def run_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One flat row per run, for study.csv and the list of runs."""
    rows = []
    for run in outcomes:
        report = run.report
        seconds, rank = report["seconds"], report["rank"]
        pruned = [entry for entry in rank["per_matrix"].values() if entry["pruned"] is not None]
        row = {"method": run.label, **dict(run.cell), "seed": run.seed, **run.tuned}
        for stage in STAGES:
            row |= {f"{stage}.{split}": run.metric(stage, split) for split in run.splits}
        row |= {
            "encoder_ratio": report["encoder_params"]["ratio"],
            "rank_dense": rank["mean_before"],
            "rank_pruned": rank["mean_after"] if pruned else None,
            "kept_share": float(np.mean([entry["kept_share"] for entry in pruned])) if pruned else None,
            "prune_seconds": sum(value for stage, value in seconds.items() if stage.startswith(("prune", "round"))),
            "retrain_seconds": seconds.get("retrain"),
        }
        for name, module in (report.get("modules") or {}).items():
            row |= {f"{name}_ratio": module["ratio"], f"{name}_seconds": module["seconds"]}
        if "fisher" in seconds:
            row["fisher_seconds"] = seconds["fisher"]
        row["run"] = run.directory.name
        rows.append(row)
    return rows


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def whole(outcomes: Sequence[Outcome]) -> str:
    """What sizes are a share of: the encoder, or the model where modules were compressed, embeddings among them."""
    return "model" if any(run.report.get("modules") for run in outcomes) else "encoder"


def trade_off(outcomes: Sequence[Outcome], split: str) -> Figure:
    """Metric against the share of the parameters, one line per method."""
    params = {"encoder": "encoder_params", "model": "total_params"}[whole(outcomes)]
    entries = table(outcomes, "compressed", split, None)
    name = outcomes[0].report["metric"]["name"]
    ratios: dict[tuple[str, Cell], list[float]] = {}
    for run in outcomes:
        sizes = run.report[params]
        ratios.setdefault((run.label, run.cell), []).append(sizes["compressed"] / sizes["dense"])
    with styled():
        figure, axes = grid(1, 1, 3.4)
        plot = axes[0, 0]
        for label, marker in zip(dict.fromkeys(entry.label for entry in entries), MARKERS * 9):
            own = [entry for entry in entries if entry.label == label]
            at = [statistics.fmean(ratios[label, entry.cell]) for entry in own]
            order = np.argsort(at)
            plot.errorbar(
                [at[i] for i in order],
                [own[i].mean for i in order],
                yerr=[own[i].deviation or 0.0 for i in order],
                marker=marker,
                markersize=4,
                capsize=2,
                label=label,
            )
        dense = statistics.fmean(run.metric("dense", split) for run in outcomes)
        plot.axhline(dense, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.0)
        plot.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        plot.set_xlabel(f"{whole(outcomes)} parameters left")
        plot.set_ylabel(f"{name}, {split}")
        figure.legend(loc="outside right upper")
        return figure


def ranks_by_share(outcomes: Sequence[Outcome], split: str) -> Figure | None:
    """Metric and mean rank of pruned models against the share kept, one line per pruner; None without such a line."""
    points: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for run in outcomes:
        config, rank = run.report["config"], run.report["rank"]
        pruned = [entry for entry in rank["per_matrix"].values() if entry["pruned"] is not None]
        if pruned:
            kept = round(float(np.mean([entry["kept_share"] for entry in pruned])), 3)
            values = (rank["mean_after"], run.metric("pruned", split))
            points.setdefault(config.get("pruner") or run.label, {}).setdefault(kept, []).append(values)
    points = {name: found for name, found in points.items() if len(found) > 1}
    if not points:
        return None
    with styled():
        figure, axes = grid(2, 1, 4.4, sharex=True)
        for (name, found), marker in zip(points.items(), MARKERS * 9):
            shares = sorted(found)
            for plot, index in ((axes[0, 0], 1), (axes[1, 0], 0)):
                values = [statistics.fmean(pair[index] for pair in found[share]) for share in shares]
                plot.plot(shares, values, marker=marker, markersize=4, label=name if index else None)
        report = outcomes[0].report
        axes[0, 0].axhline(outcomes[0].metric("dense", split), color=MUTED, linestyle=(0, (4, 3)), linewidth=1.0)
        axes[1, 0].axhline(report["rank"]["mean_before"], color=MUTED, linestyle=(0, (4, 3)), linewidth=1.0)
        axes[0, 0].set_ylabel(f"{report['metric']['name']}, pruned")
        axes[1, 0].set_ylabel("mean rank")
        axes[1, 0].set_ylim(bottom=0)
        axes[1, 0].set_xlabel("weights kept")
        axes[1, 0].xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        figure.legend(loc="outside upper left", ncols=3)
        return figure


def study_pictures(outcomes: Sequence[Outcome], split: str) -> list[Picture]:
    """The pictures that these runs allow."""
    caption = TRADE_OFF_CAPTION.format(whole=whole(outcomes))
    found = [Picture("trade_off", "Trade-off", caption, trade_off(outcomes, split))]
    ranks = ranks_by_share(outcomes, split)
    if ranks is not None:
        found.append(Picture("rank_by_share", "Rank against kept share", RANKS_CAPTION, ranks))
    return found


def study_text(title: str, outcomes: Sequence[Outcome], against: str | None, scored: Sequence[str]) -> str:
    """The tables as Markdown."""
    parts = [f"# {title}"]
    if not outcomes:
        return f"# {title}\n\nNo run is finished yet.\n"
    name, splits = outcomes[0].report["metric"]["name"], outcomes[0].splits
    dense = {split: statistics.fmean(run.metric("dense", split) for run in outcomes) for split in splits}
    scale = metric_scale(name)
    legend = f"{name}{f' x {scale}' if scale != 1 else ''}, mean over seeds ± standard deviation"
    if name in LOWER_IS_BETTER:
        legend = legend.replace(name, f"{name} (lower is better)", 1)
    if against is not None:
        score = EXAMPLE_SCORES[outcomes[0].report.get("problem", "classification")]
        legend += f"; in brackets the difference to {against}, and p of the paired test of {score} example by example"
    parts.append(legend + ".")
    for split in splits:
        for stage in scored:
            entries = table(outcomes, stage, split, against)
            parts += [
                f"## {split}, {STAGE_WORDS[stage]} (dense {scale * dense[split]:.2f})",
                result_table(entries),
            ]
    rows = run_rows(outcomes)
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_short(row.get(name), name) for name in names] for row in rows]
    parts += ["## Runs", markdown_table(names, cells)]
    return "\n\n".join(parts) + "\n"


def _short(value: Any, name: str) -> str:
    if value is None:
        return MISSING
    if name.startswith("rank"):
        return format_rank(value)
    if "seconds" in name:
        return f"{value:.0f}"
    return f"{value:.4g}" if is_number(value) and isinstance(value, float) else str(value)


def write_study(
    directory: Path,
    title: str,
    outcomes: Sequence[Outcome],
    against: str | None = None,
    scored: Sequence[str] = ("compressed",),
    failed: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write study.md, study.csv, study.json and the pictures into ``directory``; returns what study.json holds."""
    rows = run_rows(outcomes)
    splits = outcomes[0].splits if outcomes else []
    result = {
        "title": title,
        "against": against,
        "runs": rows,
        "tables": [
            {
                "split": split,
                "stage": stage,
                "method": entry.label,
                "cell": dict(entry.cell),
                "mean": entry.mean,
                "deviation": entry.deviation,
                "seeds": len(entry.values),
                "test": None if entry.test is None else vars(entry.test),
            }
            for split in splits
            for stage in scored
            for entry in table(outcomes, stage, split, against)
        ],
        "failed": dict(failed or {}),
    }
    contents = {
        "study.md": study_text(title, outcomes, against, scored).encode(),
        "study.csv": csv_text(rows).encode(),
        "study.json": json.dumps(result, indent=1).encode(),
    }
    if outcomes:
        for picture in study_pictures(outcomes, splits[-1]):
            contents[f"{picture.name}.png"] = to_png(picture.figure)
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return result
