"""What a report says in words and short numbers: the one source for page, model card and terminal."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from lpaf.data.tasks import LOWER_IS_BETTER

MISSING = "-"
STAGES = ("dense", "pruned", "factorized", "compressed")


class StageRow(NamedTuple):
    """One line of the table of stages; every cell is text, ``MISSING`` where a stage has no such number."""

    label: str
    dense: str
    pruned: str
    factorized: str
    compressed: str
    change: str


class Headline(NamedTuple):
    """One of the few numbers that a reader should see first: a short value and what it is."""

    value: str
    text: str


def is_number(value: Any) -> bool:
    """True for a finite int or float (bool excluded)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def share(part: Any, whole: Any) -> float | None:
    """part / whole, or None when either is missing or whole is zero."""
    if not is_number(part) or not is_number(whole) or whole == 0:
        return None
    return part / whole


def significant(value: float, digits: int = 3) -> str:
    """A number to ``digits`` significant digits without an exponent: 0.0123, 1.23, 123, 12346."""
    if value == 0:
        return "0"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    rounded = round(value, decimals)
    # 9.996 rounds up to the next power of ten and would otherwise be written with one digit too many.
    if rounded != 0 and math.floor(math.log10(abs(rounded))) > math.floor(math.log10(abs(value))):
        decimals = max(decimals - 1, 0)
    return f"{rounded:.{decimals}f}"


def format_count(value: Any) -> str:
    """A count in thousands (k), millions (M), billions (G) or trillions (T): 85054464 -> '85.1 M'."""
    if not is_number(value):
        return MISSING
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # A value that would round up to 1000 of the smaller unit is written in the larger one.
        if abs(value) >= size * 0.9995:
            return f"{significant(value / size)} {unit}"
    return str(value) if isinstance(value, int) else significant(value)


def format_bytes(value: Any) -> str:
    """A file size in decimal units: 437961724 -> '438 MB'."""
    if not is_number(value):
        return MISSING
    text = format_count(value)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def format_milliseconds(value: Any) -> str:
    """A time in milliseconds to three significant digits."""
    return f"{significant(value)} ms" if is_number(value) else MISSING


def format_seconds(value: Any) -> str:
    """A duration: '4.2 s', '3 min 20 s', '2 h 05 min'."""
    if not is_number(value):
        return MISSING
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours} h {minutes:02d} min"


def format_percent(value: Any) -> str:
    """A share as a percentage with one decimal: 0.25 -> '25.0 %'."""
    return f"{100 * value:.1f} %" if is_number(value) else MISSING


def format_factor(value: Any) -> str:
    """A factor with one or two decimals: 4.0x, 1.85x, 12x."""
    if not is_number(value):
        return MISSING
    return f"{value:.0f}x" if value >= 10 else f"{value:.2f}x"


def format_metric(value: Any) -> str:
    """A task metric with four decimals."""
    return f"{value:.4f}" if is_number(value) else MISSING


def format_rank(value: Any) -> str:
    """A rank, or a mean of ranks with one decimal."""
    if not is_number(value):
        return MISSING
    return str(value) if isinstance(value, int) else f"{value:.1f}"


def metric_change(name: str, dense: Any, compressed: Any) -> str:
    """How much of the dense metric is left: a share where that makes sense, else the signed difference."""
    if not is_number(dense) or not is_number(compressed):
        return MISSING
    if name in LOWER_IS_BETTER or dense <= 0:
        return f"{compressed - dense:+.4f}"
    return f"{format_percent(compressed / dense)} kept"


def command_text(command: Any) -> str:
    """The command line of a run as one line (a list of arguments is quoted for the shell)."""
    return shlex.join(str(part) for part in command) if isinstance(command, (list, tuple)) else str(command)


def latency_conditions(report: Mapping[str, Any]) -> str:
    """What the latency was measured on: 'batch 8, length 128, AMD EPYC float32, 2 threads'."""
    latency = report["latency_ms"]
    parts = [
        f"batch {latency['batch']}",
        f"length {latency['length']}",
        f"{latency['device']} {latency['dtype']}",
    ]
    if str(latency.get("device_type", latency["device"])).startswith("cpu"):
        parts.append(f"{latency['threads']} threads")
    return ", ".join(parts)


def speedup(report: Mapping[str, Any]) -> float | None:
    """Dense latency over compressed latency: the stored value when there is one."""
    latency = report["latency_ms"]
    stored = latency.get("speedup")
    return stored if is_number(stored) else share(latency["dense"], latency["compressed"])


def headlines(report: Mapping[str, Any]) -> list[Headline]:
    """How many times smaller and faster the compressed model is, and how much of the metric it keeps."""
    found: list[Headline] = []
    modules = report.get("modules")
    if modules:
        weights, stored = (sum(found[key] for found in modules.values()) for key in ("weights", "stored"))
        found.append(Headline(format_factor(weights / stored), f"smaller {', '.join(modules)}"))
    else:
        smaller = share(report["encoder_params"]["dense"], report["encoder_params"]["compressed"])
        if smaller is not None:
            found.append(Headline(format_factor(smaller), "smaller encoder"))
    faster = speedup(report)
    if faster is not None:
        word = "faster" if faster >= 1 else "the dense speed"
        found.append(Headline(format_factor(faster), f"{word} ({latency_conditions(report)})"))
    metric = report["metric"]
    change = metric_change(metric["name"], metric["dense"], metric["compressed"])
    if change.endswith(" kept"):
        found.append(Headline(change.removesuffix(" kept"), f"of the dense model's {metric['name']} kept"))
    elif is_number(metric["compressed"]):
        against = "" if change == MISSING else f" ({change} against the dense model)"
        found.append(Headline(format_metric(metric["compressed"]), metric["name"] + against))
    return found


def headline_sentence(report: Mapping[str, Any]) -> str:
    """The headline as one line of text."""
    return "; ".join(f"{part.value} {part.text}" for part in headlines(report))


def stage_rows(report: Mapping[str, Any]) -> list[StageRow]:
    """The table dense / pruned / factorized / compressed, as text."""
    metric, rank, latency, flops = report["metric"], report["rank"], report["latency_ms"], report["flops"]
    rows = [
        StageRow(
            name,
            *(format_metric(values[stage]) for stage in STAGES),
            metric_change(name, values["dense"], values["compressed"]),
        )
        for name, values in {metric["name"]: metric, **metric.get("others", {})}.items()
    ]

    def pair(label: str, counts: Mapping[str, Any], write: Any) -> StageRow:
        dense, compressed = counts["dense"], counts["compressed"]
        change = format_percent(share(compressed, dense))
        return StageRow(label, write(dense), MISSING, MISSING, write(compressed), change)

    rows.append(pair("encoder parameters", report["encoder_params"], format_count))
    for name, found in (report.get("modules") or {}).items():
        counts = {"dense": found["weights"], "compressed": found["stored"]}
        rows.append(pair(f"numbers of {name}", counts, format_count))
    rows.append(pair("all parameters", report["total_params"], format_count))
    rows.append(pair("file size", report["file_bytes"], format_bytes))
    rows.append(pair(f"MACs, length {flops['sequence_length']}", flops, format_count))
    row = pair(f"latency, {latency['batch']} x {latency['length']}", latency, format_milliseconds)
    faster = speedup(report)
    rows.append(row if faster is None else row._replace(change=f"{format_factor(faster)} speed"))
    pruned_rank = rank["mean_after"] if is_number(metric["pruned"]) or has_pruned_ranks(rank) else None
    rows.append(
        StageRow(
            "mean rank",
            format_rank(rank["mean_before"]),
            format_rank(pruned_rank),
            MISSING,
            format_rank(rank["mean_compressed"]),
            format_percent(share(rank["mean_compressed"], rank["mean_before"])),
        )
    )
    spread = rank_spread(rank["per_matrix"])
    if spread is not None and spread[0] < spread[2]:
        text = " / ".join(format_rank(value) for value in spread)
        rows.append(StageRow("rank min/median/max", MISSING, MISSING, MISSING, text, MISSING))
    return rows


def whole_rank(entry: Mapping[str, Any]) -> int | None:
    """The rank of a compressed matrix U V + S: that of U V (``compressed``) and one more for each kept neuron, at most
    the full rank of what is left of the matrix; None where nothing was compressed."""
    if not is_number(entry["compressed"]):
        return None
    return min(int(entry["compressed"]) + int(entry["kept"] or 0), *(entry.get("left") or entry["shape"]))


def rank_spread(per_matrix: Mapping[str, Any]) -> tuple[int, float, int] | None:
    """(smallest, median, largest) rank of the compressed matrices, or None when there are none."""
    ranks = [entry["compressed"] for entry in per_matrix.values() if is_number(entry["compressed"])]
    if not ranks:
        return None
    median = statistics.median(ranks)
    return min(ranks), int(median) if median == int(median) else median, max(ranks)


def has_pruned_ranks(rank: Mapping[str, Any]) -> bool:
    """True when any matrix of a report's ``rank`` block was pruned."""
    return any(entry["pruned"] is not None for entry in rank["per_matrix"].values())


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested options as (dotted key, text) pairs in sorted order."""
    pairs: list[tuple[str, str]] = []
    for key in sorted(mapping, key=str):
        value, name = mapping[key], f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            pairs.extend(flatten(value, f"{name}."))
        elif isinstance(value, (list, tuple)):
            pairs.append((name, ", ".join(str(item) for item in value) or MISSING))
        else:
            pairs.append((name, MISSING if value is None else str(value)))
    return pairs


#: problem -> (class of transformers, an input for the tokenizer, what to print of the output)
_USE = {
    "question-answering": (
        "AutoModelForQuestionAnswering",
        '["a question"], ["the text that answers it"]',
        """output = model(**batch)
start, end = output.start_logits.argmax(), output.end_logits.argmax()
print(tokenizer.decode(batch.input_ids[0, start : end + 1]))
""",
    ),
    "summarization": (
        "AutoModelForSeq2SeqLM",
        '["a text to summarise"]',
        """written = model.generate(**batch, num_beams=4, max_new_tokens=128)
print(tokenizer.decode(written[0], skip_special_tokens=True))
""",
    ),
    "language-modeling": (
        "AutoModelForCausalLM",
        '["The beginning of a text"]',
        """written = model.generate(**batch, max_new_tokens=40)
print(tokenizer.decode(written[0], skip_special_tokens=True))
""",
    ),
    "masked-language-modeling": (
        "AutoModelForMaskedLM",
        '[f"A text with a {tokenizer.mask_token} word."]',
        """hidden = batch.input_ids[0] == tokenizer.mask_token_id
print(tokenizer.decode(model(**batch).logits[0, hidden].argmax(-1)))
""",
    ),
}
_CLASSIFY = ("AutoModelForSequenceClassification", '["a sentence to classify"]', "print(model(**batch).logits)\n")


def loading_snippet(problem: str = "classification", directory: str = "path/to/this/directory") -> str:
    """The Python lines that load a compressed model for ``problem`` with plain transformers."""
    name, texts, use = _USE.get(problem, _CLASSIFY)
    return (
        "import lpaf  # teaches transformers the compressed layers\n"
        f"from transformers import {name}, AutoTokenizer\n"
        "\n"
        f'model = {name}.from_pretrained("{directory}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{directory}")\n'
        f'batch = tokenizer({texts}, return_tensors="pt")\n'
        f"{use}"
    )
