"""The pictures of a compression run: each function takes numbers and returns a new matplotlib Figure.

Nothing here touches pyplot or keeps a figure alive. Colours are Okabe and Ito's, told apart by line style as
well; the same stage has the same colour in every picture. ``pictures`` gathers those that a run has numbers
for.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from lpaf.report.summary import format_factor, format_percent, is_number, share, speedup, whole_rank

INK = "#22272e"
GRID = "#d4d9e0"
MUTED = "#737c88"
STAGE_COLORS = {"dense": "#0072b2", "pruned": "#d55e00", "compressed": "#009e73"}
STAGE_LINES = {"dense": "-", "pruned": "--", "compressed": ":"}
CURVE_COLORS = {
    "loss": "#0072b2",
    "consistency": "#d55e00",
    "distillation": "#009e73",
    "layer_distillation": "#56b4e9",
    "keep": "#cc79a7",
    "mixed_rank_p": "#e69f00",
    "learning_rate": MUTED,
}
CURVE_LABELS = {
    "loss": "loss",
    "consistency": "consistency part",
    "distillation": "distillation part",
    "layer_distillation": "layers' distillation",
    "keep": "weights kept",
    "mixed_rank_p": "mixed-rank probability",
    "learning_rate": "learning rate / its peak",
}
LOSS_LINES = {"loss": "-", "consistency": "--", "distillation": ":", "layer_distillation": "-."}
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "figure.dpi": 100.0,
    "savefig.dpi": 160.0,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "lpaf",
}
NEURON_COLORS = {"all": "#0072b2", "pruned": "#d55e00", "kept": "#009e73"}
LINE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WIDTH = 7.6
#: where logarithmic axes of counts begin, so that a single neuron can be seen
FEWEST = 0.5
LARGEST_PATTERN = 256
DENSITY_MAP = LinearSegmentedColormap.from_list("density", ["#ffffff", "#9ecae1", "#2171b5", "#08306b"])

RANK_DISTRIBUTION_CAPTION = (
    "How many weight matrices have which rank. A matrix of low rank can be split into two thin factors with "
    "little loss; dense matrices usually have full rank, so factorizing them directly loses much."
)
RANK_BY_LAYER_CAPTION = (
    "The rank of every matrix, by layer (across) and kind of matrix (down). Numbers are ranks; the darker a "
    "cell, the nearer the matrix is to full rank."
)
SPARSITY_CAPTION = (
    "Which weights pruning kept (top: one matrix each, darker means more kept, white means all removed) and "
    "how unevenly they are spread over its rows and columns (bottom, sorted). Rows and columns that are "
    "removed whole make a matrix low-rank; random removal would give the flat dashed line and leave the rank "
    "nearly full."
)
SPECTRA_CAPTION = (
    "What is lost when a matrix is cut to rank k: the relative reconstruction error of the best rank-k "
    "approximation (left, lower is better) and the share of the sum of singular values that its k largest "
    "hold (right, higher is better). Lines are means over the matrices, bands hold eight matrices of ten; "
    "the upright line, where there is one, marks the rank that this model was cut to."
)
SINGULAR_VALUES_CAPTION = (
    "The singular values of the matrices of a layer in the middle, largest first, relative to the largest; the axis "
    "is logarithmic. A fast fall at the left is a subspace that the neurons share, which a low-rank part takes over; "
    "a long, slow tail is what each neuron has of its own. Matrices of zeros have no line."
)
KEPT_BY_LAYER_CAPTION = (
    "How what is stored was shared out, by layer (across) and kind of matrix (down): the rank of the low-rank part "
    "and, where neurons are kept besides, their number. Colour is the share of full rank, or of the matrix's neurons, "
    "and darkest at the most that any matrix of the panel has."
)
IMPORTANCE_CAPTION = (
    "How many neurons (rows of a matrix) have which importance, one panel per kind of matrix, all layers together; "
    "the counts are on a logarithmic axis, and every panel has an importance axis of its own. It is the moving average "
    "at the end of pruning, when pruned rows have been zero for a while and count as nothing: the heap at zero is what "
    "was removed. The upright line, where one parts them, is the least importance of a kept neuron of that kind."
)
TRAINING_CAPTION = (
    "Training, one column per stage: the loss (top) and what was scheduled (bottom): the share of weights "
    "kept while pruning, the chance that a matrix still takes its sparse path while retraining, and the "
    "learning rate."
)
SUMMARY_CAPTION = (
    "The compressed model as a share of the dense one: for sizes, work and time shorter is better, for the "
    "task metric longer is better. The upright line is the dense model."
)


@dataclass(frozen=True)
class Picture:
    """A figure with its file stem, title and plain-language caption."""

    name: str
    title: str
    caption: str
    figure: Figure


def styled() -> AbstractContextManager[None]:
    """The shared style, the same whatever the user's own matplotlib settings are."""
    return matplotlib.style.context(["default", STYLE])


def grid(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _note(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.set_axis_off()


def matrix_place(name: str) -> tuple[int, str]:
    """The layer number and kind of a matrix: 'bert.encoder.layer.3.output.dense' -> (3, 'output.dense').

    The first number in the dotted name is the layer; a name without one belongs to layer 0. Of an
    encoder and a decoder both number their layers: see :func:`matrix_places`.
    """
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdecimal():
            return int(part), ".".join(parts[position + 1 :]) or ".".join(parts[:position])
    return 0, name


def matrix_stack(name: str) -> str:
    """The list of layers that a matrix is in: 'model.decoder.layers.3.fc1' -> 'model.decoder.layers', else ''."""
    parts = name.split(".")
    return ".".join(parts[: next((at for at, part in enumerate(parts) if part.isdecimal()), 0)])


def matrix_places(names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """The layer number and kind of each of a model's matrices, in the order given.

    Where there are several stacks of layers (encoder and decoder), kinds begin with the words that tell them apart.
    """
    stacks = {name: [part for part in matrix_stack(name).split(".") if part] for name in names}
    shared = set.intersection(*(set(stack) for stack in stacks.values() if stack)) if any(stacks.values()) else set()
    places = {}
    for name, stack in stacks.items():
        layer, kind = matrix_place(name)
        places[name] = (layer, " ".join([*(part for part in stack if part not in shared), kind]))
    return places


def in_order(per_matrix: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The matrices by stack (decoders last), layer number and kind: the same order whatever file they come from."""

    def place(name: str) -> tuple[Any, ...]:
        stack = matrix_stack(name)
        return ("decoder" in stack, stack, *matrix_place(name), name)

    return {name: per_matrix[name] for name in sorted(per_matrix, key=place)}


def _stage_ranks(per_matrix: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """{stage: {matrix: rank}} for the stages that have ranks."""
    found = {
        stage: {name: int(entry[stage]) for name, entry in per_matrix.items() if is_number(entry[stage])}
        for stage in ("dense", "pruned")
    }
    found["compressed"] = {name: rank for name, entry in per_matrix.items() if (rank := whole_rank(entry)) is not None}
    return {stage: ranks for stage, ranks in found.items() if ranks}


def rank_distribution(per_matrix: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Histogram of the ranks of all matrices, dense, pruned and compressed (the paper's Figures 1 and 2)."""
    stages = _stage_ranks(per_matrix)
    with styled():
        figure, axes = grid(1, 1, 2.7)
        plot = axes[0, 0]
        if not stages:
            _note(plot, "no ranks were recorded")
            return figure
        top = max(max(ranks.values()) for ranks in stages.values())
        edges = np.linspace(0, max(top, 1) * 1.0001, 33)
        for stage, ranks in stages.items():
            values = np.fromiter(ranks.values(), dtype=float)
            options = {"bins": edges, "color": STAGE_COLORS[stage]}
            plot.hist(values, histtype="stepfilled", alpha=0.28, **options)
            label = f"{stage}: mean {values.mean():.0f}"
            plot.hist(values, histtype="step", linewidth=1.4, linestyle=STAGE_LINES[stage], label=label, **options)
        plot.set_xlim(0, edges[-1] * 1.02)
        plot.set_xlabel("rank")
        plot.set_ylabel("matrices")
        plot.yaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside upper left", ncols=len(stages))
        return figure


def heat_map(
    plot: Any,
    places: Mapping[str, tuple[int, str]],
    values: Mapping[str, int],
    full: Mapping[str, int],
    top: float = 1.0,
) -> Any:
    """The matrices by layer (across) and kind (down), each a cell coloured by its share and marked with its value.

    Args:
        places: matrix -> (layer, kind), also of matrices without a value, whose cells stay empty.
        values: matrix -> number.
        full: matrix -> what its number is a share of.
        top: share of the darkest colour.

    Returns:
        The image, for a colour bar.
    """
    layers = sorted({layer for layer, _ in places.values()})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    cells = np.full((len(kinds), len(layers)), np.nan)
    plot.grid(False)
    for name, value in values.items():
        layer, kind = places[name]
        row, column = kinds.index(kind), layers.index(layer)
        cells[row, column] = value / full[name]
        if len(layers) <= 16:
            ink = "#ffffff" if cells[row, column] > top / 2 else "#000000"
            plot.text(column, row, str(value), ha="center", va="center", fontsize=7.5, color=ink)
    image = plot.imshow(cells, cmap=DENSITY_MAP, vmin=0, vmax=top, aspect="auto", interpolation="none")
    plot.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    plot.set_yticks(range(len(kinds)), kinds)
    plot.tick_params(length=0)
    plot.spines[:].set_visible(False)
    return image


def rank_by_layer(per_matrix: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Heat map of ranks by layer and kind of matrix, one panel per stage whose ranks differ.

    Colour is the rank relative to min(out, in); a stage whose ranks differ by 1 % or less is told in words.
    """
    stages = _stage_ranks(per_matrix)
    places = matrix_places(per_matrix)
    kinds = {kind for _, kind in places.values()}
    ranges = {stage: (min(ranks.values()), max(ranks.values())) for stage, ranks in stages.items()}
    equal = {stage: (low, high) for stage, (low, high) in ranges.items() if high - low <= high / 100}
    shown = {stage: ranks for stage, ranks in stages.items() if stage not in equal}
    if not shown and stages:
        shown = {stage: stages[stage] for stage in list(stages)[:1]}
        equal.pop(next(iter(shown)))
    with styled():
        if not shown:
            figure, axes = grid(1, 1, 1.4)
            _note(axes[0, 0], "no ranks were recorded")
            return figure
        figure, axes = grid(len(shown), 1, 0.7 + len(shown) * (0.45 + 0.25 * len(kinds)))
        for plot, (stage, ranks) in zip(axes[:, 0], shown.items(), strict=True):
            image = heat_map(plot, places, ranks, {name: min(per_matrix[name]["shape"]) for name in ranks})
            plot.set_title(f"{stage}, mean {np.mean(list(ranks.values())):.0f}")
        axes[-1, 0].set_xlabel("layer")
        bar = figure.colorbar(image, ax=axes[:, 0].tolist(), shrink=0.9, pad=0.01, aspect=24)
        bar.set_label("rank / full rank")
        bar.outline.set_visible(False)
        if equal:
            words = "; ".join(
                f"{stage}: {low if low == high else f'{low} to {high}'} in every matrix"
                for stage, (low, high) in equal.items()
            )
            figure.supxlabel(words, fontsize=8.5, color=MUTED, x=0.01, ha="left")
        return figure


def kept_by_layer(per_matrix: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Heat maps of the rank of U V and of the neurons that S keeps, by layer and kind of matrix.

    Each has a colour scale of its own, which ends at its largest share; one without any rank or neuron is left out.
    """
    places = matrix_places(per_matrix)
    kinds = {kind for _, kind in places.values()}
    panels = (
        ("compressed", "rank of the low-rank part", "of full rank", min),
        ("kept", "neurons kept", "of all neurons", lambda shape: shape[0]),
    )
    shown = []
    for key, title, label, full in panels:
        values = {name: int(entry[key]) for name, entry in per_matrix.items() if is_number(entry[key])}
        if any(values.values()):
            shown.append((values, title, label, {name: full(per_matrix[name]["shape"]) for name in values}))
    with styled():
        if not shown:
            figure, axes = grid(1, 1, 1.4)
            _note(axes[0, 0], "nothing was kept")
            return figure
        figure, axes = grid(len(shown), 1, 0.5 + len(shown) * (0.45 + 0.25 * len(kinds)))
        for plot, (values, title, label, full) in zip(axes[:, 0], shown, strict=True):
            image = heat_map(plot, places, values, full, max(value / full[name] for name, value in values.items()))
            plot.set_title(f"{title}, mean {np.mean(list(values.values())):.0f}")
            bar = figure.colorbar(image, ax=plot, pad=0.01, aspect=14)
            bar.set_label(label)
            bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
            bar.outline.set_visible(False)
        axes[-1, 0].set_xlabel("layer")
        return figure


def keeping_threshold(kept: np.ndarray, pruned: np.ndarray) -> float | None:
    """The least importance of ``kept`` neurons; None where a ``pruned`` one has more: no one threshold parts them."""
    if not len(kept) or not len(pruned) or kept.min() < pruned.max():
        return None
    return float(kept.min())


def importance_bins(top: float, threshold: float | None = None, most: int = 200) -> np.ndarray:
    """Edges of about 40 equal bins from 0 to ``top``, float64.

    A threshold is one of the edges, so that no bin holds neurons from both sides of it, unless that takes more than
    ``most`` bins.
    """
    width = (top or 1.0) / 40
    if threshold:
        exact = threshold / max(round(threshold / width), 1)
        width = exact if top / exact <= most else width
    return width * np.arange(int(np.ceil(top / width * (1 - 1e-9))) + 1 if top else 41)


def importance(per_matrix: Mapping[str, Mapping[str, Any]], analysis: Mapping[str, torch.Tensor]) -> Figure:
    """Histograms of the importance of neurons by kind of matrix, with log-scaled counts (LoSparse's Figures 1 and 4).

    Kept and pruned neurons are told apart where ``kept_neurons.NAME`` says which are kept, with the threshold where
    there is one for all layers.
    """
    pooled: dict[str, dict[str, list[np.ndarray]]] = {}
    for name, (_, kind) in matrix_places(per_matrix).items():
        scores = analysis.get(f"importance.{name}")
        if scores is None:
            continue
        values, groups = scores.double().numpy(), pooled.setdefault(kind, {})
        if f"kept_neurons.{name}" not in analysis:
            groups.setdefault("all", []).append(values)
            continue
        kept = np.zeros(len(values), dtype=bool)
        kept[analysis[f"kept_neurons.{name}"].numpy()] = True
        groups.setdefault("pruned", []).append(values[~kept])
        groups.setdefault("kept", []).append(values[kept])
    with styled():
        if not pooled:
            figure, axes = grid(1, 1, 1.4)
            _note(axes[0, 0], "no importance was recorded")
            return figure
        columns = min(len(pooled), 3)
        rows = -(-len(pooled) // columns)
        figure, axes = grid(rows, columns, 0.7 + 1.6 * rows, sharey=True)
        handles: dict[str, Any] = {}
        for plot, (kind, groups) in zip(axes.flat, pooled.items(), strict=False):
            values = {group: np.concatenate(parts) for group, parts in groups.items()}
            threshold = keeping_threshold(values["kept"], values["pruned"]) if "kept" in values else None
            bins = importance_bins(max(part.max(initial=0.0) for part in values.values()), threshold)
            for group, part in values.items():
                counts = np.histogram(np.minimum(part, bins[-1]), bins)[0]
                options = {"fill": True, "color": NEURON_COLORS[group], "alpha": 0.7}
                handles[group] = plot.stairs(counts, bins, baseline=FEWEST, **options)
            if threshold is not None:
                handles["threshold"] = plot.axvline(threshold, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
            plot.set_title(_short_kind(kind))
            plot.set_yscale("log")
            plot.set_ylim(bottom=FEWEST)
            plot.set_xlim(0, bins[-1])
            plot.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
            plot.locator_params(axis="x", nbins=4)
        for plot in axes.flat[len(pooled) :]:
            plot.set_axis_off()
        figure.supxlabel("importance", fontsize=9.0)
        figure.supylabel("neurons", fontsize=9.0)
        if "kept" in handles:
            figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=4)
        return figure


def singular_values(per_matrix: Mapping[str, Mapping[str, Any]], analysis: Mapping[str, torch.Tensor]) -> Figure:
    """Singular values of every matrix of the layer in the middle, on a log axis (LoSparse's Figure 3).

    One panel per stage that has them; relative to each matrix's largest, those below a millionth of it left out. Of
    several stacks each has its middle layer.
    """
    places = matrix_places(per_matrix)
    layers: dict[str, set[int]] = {}
    for name, (layer, _) in places.items():
        layers.setdefault(matrix_stack(name), set()).add(layer)
    middle = {stack: sorted(numbers)[len(numbers) // 2] for stack, numbers in layers.items()}
    names = [name for name, (layer, _) in places.items() if layer == middle[matrix_stack(name)]]
    curves = {
        stage: {name: analysis[key] for name in names if (key := f"singular_values.{stage}.{name}") in analysis}
        for stage in ("dense", "pruned")
    }
    curves = {stage: found for stage, found in curves.items() if found}
    with styled():
        if not curves:
            figure, axes = grid(1, 1, 1.4)
            _note(axes[0, 0], "no singular values were recorded")
            return figure
        figure, axes = grid(1, len(curves), 3.1, sharey=True)
        handles: dict[str, Any] = {}
        for plot, (stage, found) in zip(axes[0], curves.items(), strict=True):
            for name, tensor in found.items():
                values = np.sort(tensor.double().numpy())[::-1] / max(float(tensor.max()), np.finfo(float).tiny)
                number = names.index(name)
                (handles[places[name][1]],) = plot.plot(
                    np.arange(1, len(values) + 1),
                    np.where(values > 1e-6, values, np.nan),
                    color=LINE_COLORS[number % len(LINE_COLORS)],
                    linestyle=("-", "--", ":")[number // len(LINE_COLORS) % 3],
                    linewidth=1.3,
                )
            plot.set_yscale("log")
            plot.set_xlim(left=0)
            plot.set_title(f"{stage}, layer {', '.join(str(layer) for layer in sorted(set(middle.values())))}")
            plot.set_xlabel("singular value, largest first")
        axes[0, 0].set_ylabel("share of the largest")
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3)
        return figure


def unpack_mask(packed: torch.Tensor, shape: Sequence[int]) -> np.ndarray:
    """The bool keep mask [out, in] from its ``numpy.packbits`` form (uint8 [ceil(out * in / 8)]).

    Raises ValueError when the number of bytes does not fit the shape.
    """
    entries = int(shape[0]) * int(shape[1])
    if packed.dtype != torch.uint8 or packed.numel() != (entries + 7) // 8:
        raise ValueError(
            f"mask: expected uint8 [{(entries + 7) // 8}] for shape {list(shape)}, "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    bits = np.unpackbits(packed.reshape(-1).numpy(), count=entries)
    return bits.reshape(int(shape[0]), int(shape[1])).astype(bool)


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """A bool keep mask [out, in] as uint8 bits, the form in which an analysis stores it."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().astype(bool)))


def block_density(mask: np.ndarray, largest: int = LARGEST_PATTERN) -> np.ndarray:
    """The share of True entries in a grid of at most largest x largest blocks, float64 [rows, columns]."""
    out_blocks, in_blocks = (min(size, largest) for size in mask.shape)
    row_edges = np.linspace(0, mask.shape[0], out_blocks + 1).astype(int)
    column_edges = np.linspace(0, mask.shape[1], in_blocks + 1).astype(int)
    sums = np.add.reduceat(mask.astype(np.int64), row_edges[:-1], axis=0)
    sums = np.add.reduceat(sums, column_edges[:-1], axis=1)
    return sums / np.outer(np.diff(row_edges), np.diff(column_edges))


def _short_name(name: str) -> str:
    layer, kind = matrix_place(name)
    return f"layer {layer} {_short_kind(kind)}"


def _short_kind(kind: str) -> str:
    return kind.replace("attention.", "att.").replace("intermediate.", "interm.")


def sparsity_patterns(
    per_matrix: Mapping[str, Mapping[str, Any]], analysis: Mapping[str, torch.Tensor], most: int = 4
) -> Figure:
    """Sparsity patterns of at most ``most`` matrices whose masks were kept (the paper's Figure 3).

    Top: density of kept weights, output rows downwards. Bottom: kept share of each row and column, sorted.
    """
    names = [name for name in per_matrix if f"mask.{name}" in analysis]
    names = [names[index] for index in np.unique(np.linspace(0, len(names) - 1, min(most, len(names))).astype(int))]
    with styled():
        if not names:
            figure, axes = grid(1, 1, 1.4)
            _note(axes[0, 0], "no masks were recorded")
            return figure
        masks = [unpack_mask(analysis[f"mask.{name}"], per_matrix[name]["shape"]) for name in names]
        figure, axes = grid(2, len(names), 4.1, height_ratios=[1.75, 1])
        if len(names) < 3:
            figure.set_figwidth(3.9 + 2.1 * (len(names) - 1))
        densities = [block_density(mask) for mask in masks]
        # A shared scale that leaves out the few fullest blocks, else the pattern of a 10 % mask is all pale.
        top = max(max(float(np.quantile(density, 0.99)) for density in densities), 1e-3)
        for column, (name, mask, density) in enumerate(zip(names, masks, densities, strict=True)):
            pattern, curve = axes[0, column], axes[1, column]
            pattern.grid(False)
            extent = (0, mask.shape[1], mask.shape[0], 0)
            image = pattern.imshow(
                density,
                cmap=DENSITY_MAP,
                vmin=0,
                vmax=top,
                interpolation="none",
                aspect="auto",
                extent=extent,
            )
            pattern.spines[:].set_visible(True)
            pattern.set_title(_short_name(name), fontsize=8.0)
            pattern.set_xticks([0, mask.shape[1]])
            pattern.set_yticks([0, mask.shape[0]])
            for values, label, color, line in (
                (mask.mean(axis=1), "rows", STAGE_COLORS["dense"], "-"),
                (mask.mean(axis=0), "columns", STAGE_COLORS["pruned"], "--"),
            ):
                ordered = np.sort(values)[::-1]
                curve.plot(np.linspace(0, 1, len(ordered)), ordered, color=color, linestyle=line, label=label)
            curve.axhline(mask.mean(), color=MUTED, linestyle=(0, (4, 3)), linewidth=1.0)
            gone = int((~mask.any(axis=1)).sum())
            curve.set_title(f"{gone} of {mask.shape[0]} rows gone", fontsize=8.0)
            curve.set_ylim(0, 1.02)
            curve.set_xlim(0, 1)
            curve.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            if column:
                curve.set_yticklabels([])
        axes[0, 0].set_ylabel("output row")
        axes[1, 0].set_ylabel("share kept")
        axes[1, 0].legend(loc="upper right", handlelength=1.6)
        figure.supxlabel("input column (top); rows or columns in order of their kept share (bottom)", fontsize=8.5)
        bar = figure.colorbar(image, ax=axes[0, :].tolist(), pad=0.01, aspect=18, extend="max")
        bar.set_label("share kept")
        bar.outline.set_visible(False)
        return figure


def spectrum_curves(singular_values: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """For k = 0..n: the relative Frobenius error of the best rank-k approximation and the cumulative share.

    singular_values [n], any order; both results are float64 [n + 1].
    error(k) = sqrt(sum_{i>k} s_i^2 / sum s_i^2) (Eckart and Young), share(k) = sum_{i<=k} s_i / sum s_i.
    An all-zero matrix has error 0 and share 1.
    """
    values = np.sort(singular_values.detach().cpu().double().numpy().reshape(-1))[::-1]
    total, energy = values.sum(), np.square(values).sum()
    if total == 0:
        return np.zeros(len(values) + 1), np.ones(len(values) + 1)
    # Summing the tail from its small end keeps the error exact where it is tiny.
    tail = np.concatenate([np.cumsum(np.square(values[::-1]))[::-1], [0.0]])
    return np.sqrt(tail / energy), np.concatenate([[0.0], np.cumsum(values)]) / total


def spectra(per_matrix: Mapping[str, Mapping[str, Any]], analysis: Mapping[str, torch.Tensor]) -> Figure:
    """Reconstruction error and cumulative singular values against k, dense and pruned (the paper's Figure 4).

    The axis is k when all matrices have the same min(out, in), otherwise k relative to it.
    """
    curves: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for stage in ("dense", "pruned"):
        keys = [f"singular_values.{stage}.{name}" for name in per_matrix]
        found = [spectrum_curves(analysis[key]) for key in keys if key in analysis]
        if found:
            curves[stage] = found
    with styled():
        figure, axes = grid(1, 2, 2.9)
        if not curves:
            for plot in axes[0]:
                _note(plot, "no singular values were recorded")
            return figure
        lengths = {len(error) - 1 for found in curves.values() for error, _ in found}
        full = lengths.pop() if len(lengths) == 1 else None
        scale, shares = full or 1, np.linspace(0, 1, (full or 400) + 1)
        ranks = [(entry["compressed"], min(entry["shape"])) for entry in per_matrix.values()]
        marks = [rank * scale / size for rank, size in ranks if is_number(rank) and rank > 0]
        chosen = float(np.mean(marks)) if marks else None
        titles = ("relative reconstruction error", "share of the sum of singular values")
        for which, (plot, title) in enumerate(zip(axes[0], titles, strict=True)):
            for row, (stage, found) in enumerate(curves.items()):
                color = STAGE_COLORS[stage]
                curve = [pair[which] for pair in found]
                lines = [np.interp(shares, np.linspace(0, 1, len(values)), values) for values in curve]
                mean, (low, high) = np.mean(lines, axis=0), np.quantile(lines, [0.1, 0.9], axis=0)
                plot.fill_between(shares * scale, low, high, color=color, alpha=0.16, linewidth=0)
                label = None if which else stage
                plot.plot(shares * scale, mean, color=color, linestyle=STAGE_LINES[stage], label=label)
                if chosen is not None:
                    value = float(np.interp(chosen, shares * scale, mean))
                    plot.plot([chosen], [value], marker="o", markersize=4.5, color=color)
                    # The corner that an error (falling) or a share (rising) leaves free.
                    place = 0.95 - 0.085 * row if which == 0 else 0.05 + 0.085 * (len(curves) - 1 - row)
                    plot.text(
                        0.98, place, f"{stage} at the line: {value:.2f}", transform=plot.transAxes,
                        ha="right", va="center", fontsize=8, color=color,
                    )  # fmt: skip
            if chosen is not None:
                plot.axvline(chosen, color=MUTED, linewidth=1.0)
                if max(marks) > min(marks):
                    plot.axvspan(min(marks), max(marks), color=MUTED, alpha=0.12, linewidth=0)
            plot.set_title(title)
            plot.set_xlabel("k" if full else "k / full rank")
            plot.set_xlim(0, scale)
            plot.set_ylim(0, 1.04)
        if chosen is not None:
            label = f"chosen rank {chosen:.0f}" if full else f"chosen rank {format_percent(chosen)} of full"
            axes[0, 0].plot([], [], color=MUTED, linewidth=1.0, label=label)
        figure.legend(loc="outside upper left", ncols=3)
        return figure


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(record["step"], record[key]) for record in records if is_number(record.get(key))]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def training_curves(training: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Loss and its parts (top) and the schedules (bottom) against the step, one column per stage."""
    stages = {stage: records for stage, records in training.items() if len(records)}
    with styled():
        if not stages:
            figure, axes = grid(1, 1, 1.4)
            _note(axes[0, 0], "nothing was trained")
            return figure
        figure, axes = grid(2, len(stages), 3.9, height_ratios=[1.5, 1], sharex="col")
        handles: dict[str, Any] = {}
        for column, (stage, records) in enumerate(stages.items()):
            losses, schedule = axes[0, column], axes[1, column]
            for key in LOSS_LINES:
                steps, values = _series(records, key)
                if len(steps):
                    (handles[key],) = losses.plot(
                        steps,
                        values,
                        color=CURVE_COLORS[key],
                        linewidth=1.5 if key == "loss" else 1.1,
                        linestyle=LOSS_LINES[key],
                        marker="o" if len(steps) < 3 else None,
                        markersize=3,
                    )
            for key in ("learning_rate", "keep", "mixed_rank_p"):
                steps, values = _series(records, key)
                if key == "learning_rate" and len(values):
                    values = values / max(values.max(), np.finfo(float).tiny)
                if len(steps):
                    (handles[key],) = schedule.plot(
                        steps,
                        values,
                        color=CURVE_COLORS[key],
                        linestyle={"learning_rate": ":", "keep": "-", "mixed_rank_p": "--"}[key],
                        marker="o" if len(steps) < 3 else None,
                        markersize=3,
                    )
            losses.set_ylim(bottom=0)
            schedule.set_ylim(0, 1.04)
            losses.set_title(stage.replace("_", " "))
            schedule.set_xlabel("step")
            schedule.locator_params(axis="x", nbins=4, integer=True)
        axes[0, 0].set_ylabel("loss")
        axes[1, 0].set_ylabel("share")
        figure.legend(
            list(handles.values()),
            [CURVE_LABELS[key] for key in handles],
            loc="outside lower center",
            ncols=3,
        )
        return figure


def summary_bars(report: Mapping[str, Any]) -> Figure:
    """Size, work, time and metric of the compressed model as shares of the dense model's."""
    metric = report["metric"]
    shares = [
        (
            "encoder parameters",
            share(report["encoder_params"]["compressed"], report["encoder_params"]["dense"]),
        ),
        ("all parameters", share(report["total_params"]["compressed"], report["total_params"]["dense"])),
        ("file size", share(report["file_bytes"]["compressed"], report["file_bytes"]["dense"])),
        ("multiply-accumulates", share(report["flops"]["compressed"], report["flops"]["dense"])),
    ]
    faster = speedup(report)
    shares.append(("time per batch", None if faster is None else share(1.0, faster)))
    shares.append((metric["name"], share(metric["compressed"], metric["dense"])))
    shown = [(label, value) for label, value in shares if value is not None and value >= 0]
    with styled():
        figure, axes = grid(1, 1, 0.65 + 0.29 * max(len(shown), 2))
        plot = axes[0, 0]
        if not shown:
            _note(plot, "nothing to compare with")
            return figure
        plot.grid(False)
        for row, (label, value) in enumerate(shown):
            color = STAGE_COLORS["dense"] if label == metric["name"] else STAGE_COLORS["compressed"]
            plot.barh(row, value, height=0.66, color=color)
            words = format_percent(value)
            if label == "time per batch":
                words += f"  ({format_factor(faster)} speed)"
            # Beside the bar, or inside the long ones so that the words stay clear of the dense line.
            inside = 0.8 < value < 1.1
            at, align = (min(value, 1) - 0.012, "right") if inside else (value + 0.012, "left")
            ink = "#ffffff" if inside else INK
            plot.text(at, row, words, va="center", ha=align, color=ink, fontsize=8.5)
        plot.axvline(1.0, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)
        plot.set_yticks(range(len(shown)), [label for label, _ in shown])
        plot.invert_yaxis()
        plot.tick_params(axis="y", length=0)
        plot.set_xlim(0, max(1.0, *(value for _, value in shown)) * 1.14)
        plot.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        plot.spines["left"].set_visible(False)
        plot.set_xlabel("share of the dense model")
        return figure


def matrix_pictures(per_matrix: Mapping[str, Mapping[str, Any]], analysis: Mapping[str, torch.Tensor]) -> list[Picture]:
    """The pictures of ranks, spectra and patterns that these numbers allow."""
    found: list[Picture] = []
    per_matrix = in_order(per_matrix)
    if _stage_ranks(per_matrix):
        figure = rank_distribution(per_matrix)
        found.append(Picture("rank_distribution", "Ranks", RANK_DISTRIBUTION_CAPTION, figure))
        figure = rank_by_layer(per_matrix)
        found.append(Picture("rank_by_layer", "Ranks by layer", RANK_BY_LAYER_CAPTION, figure))
    stored = [(entry["compressed"], entry["kept"]) for entry in per_matrix.values() if is_number(entry["compressed"])]
    if any(kept for _, kept in stored) or len({rank for rank, _ in stored}) > 1:
        figure = kept_by_layer(per_matrix)
        found.append(Picture("kept_by_layer", "What each matrix stores", KEPT_BY_LAYER_CAPTION, figure))
    if any(key.startswith("importance.") for key in analysis):
        figure = importance(per_matrix, analysis)
        found.append(Picture("importance", "Importance of neurons", IMPORTANCE_CAPTION, figure))
    if any(key.startswith("singular_values.") for key in analysis):
        figure = spectra(per_matrix, analysis)
        found.append(Picture("spectra", "What a cut to rank k loses", SPECTRA_CAPTION, figure))
        figure = singular_values(per_matrix, analysis)
        found.append(Picture("singular_values", "Singular values of one layer", SINGULAR_VALUES_CAPTION, figure))
    if any(key.startswith("mask.") for key in analysis):
        figure = sparsity_patterns(per_matrix, analysis)
        found.append(Picture("sparsity_patterns", "Sparsity patterns", SPARSITY_CAPTION, figure))
    return found


def pictures(report: Mapping[str, Any], analysis: Mapping[str, torch.Tensor]) -> list[Picture]:
    """All pictures that a report and its analysis have numbers for, in reading order."""
    found = [Picture("summary", "Compressed against dense", SUMMARY_CAPTION, summary_bars(report))]
    found.extend(matrix_pictures(report["rank"]["per_matrix"], analysis))
    if any(len(records) for records in report["training"].values()):
        figure = training_curves(report["training"])
        found.append(Picture("training", "Training", TRAINING_CAPTION, figure))
    return found


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG: transparent, without dates, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def to_png(figure: Figure) -> bytes:
    """The figure as PNG on white, without dates or program versions."""
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def to_inline_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element for a page: ids made unique by ``name``, colours of the page's theme."""
    text = to_svg(figure).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for color, variable in ((INK, "--ink"), (GRID, "--grid"), (MUTED, "--muted")):
        text = text.replace(color, f"var({variable}, {color})")
    return re.sub(r"<svg ", '<svg role="img" aria-hidden="true" ', text, count=1).strip()
