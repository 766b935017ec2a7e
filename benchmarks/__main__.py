"""``python -m benchmarks``: run, table, compare, tune, gpu-check, gpu-pruning. Run it from the repository's root."""

from __future__ import annotations

import argparse
import sys
import time
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cases import (
    CASE_SETS,
    DIRECTIONS,
    DTYPE_BYTES,
    AttentionCase,
    Case,
    FfnCase,
    LinearCase,
    MaskedCase,
    parse_slice,
    select,
)
from .errors import InputError
from .rows import read_rows
from .tables import compare, failures, run_table, summary

if TYPE_CHECKING:
    import torch


class Parser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit status 2."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _list(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument(
        "--cases", type=_list, metavar="SET,SET", help=f"of {', '.join(CASE_SETS)}; default: cpu, or core on CUDA"
    )
    parser.add_argument("--slice", default="1/1", metavar="I/N", help="every N-th case from the I-th on")
    parser.add_argument("--only", metavar="TEXT", help="cases with TEXT in their names")
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), help="default: float32, on CUDA bfloat16")
    parser.add_argument("--direction", choices=DIRECTIONS, help="replaces that of every case")


def add_run(parser: argparse.ArgumentParser) -> None:
    _add_selection(parser)
    parser.add_argument(
        "--providers", type=_list, default=["default"], metavar="NAME,NAME", help="default, all, or names (see --list)"
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="time a peer's checkout too")
    parser.add_argument("--threads", type=_threads, default=2, metavar="N", help="CPU threads (default: 2)")
    parser.add_argument("--case-seconds", type=_positive, metavar="S", help="rounds per case; default: 6, on CUDA 1")
    parser.add_argument("--budget", type=_positive, metavar="SECONDS", help="begin no case after this")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: benchmarks/results/DEVICE/SETS.jsonl")
    parser.add_argument("--resume", action="store_true", help="skip what FILE has from this code on this machine")
    parser.add_argument("--list", action="store_true", help="print cases and providers, measure nothing")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from .peers import load_peers
    from .providers import PROVIDERS, choose
    from .run import default_output, pending, resolve_device, run_cases, start_session

    device = resolve_device(arguments.device)
    cuda = device.type == "cuda"
    if not cuda:
        torch.set_num_threads(arguments.threads)
    sets = arguments.cases or ["core" if cuda else "cpu"]
    dtype = arguments.dtype or ("bfloat16" if cuda else "float32")
    cases = select(sets, dtype, arguments.direction, arguments.only, parse_slice(arguments.slice))
    providers = choose(arguments.providers, device, load_peers(arguments.peer))
    if arguments.list:
        for case in cases:
            print(case)
        for provider in (PROVIDERS | providers).values():
            mark = "*" if provider.name in providers else " "
            print(f"{mark} {provider.name}: {provider.summary} ({', '.join(provider.devices)})")
        return 0
    session = start_session(device, dtype, providers, print)
    output = arguments.output or default_output(session.environment, "-".join(sets))
    if arguments.resume:
        total, cases = len(cases), pending(cases, output, session)
        print(f"{total - len(cases)} of {total} cases are in {output}")
    seconds = arguments.case_seconds or (1.0 if cuda else 6.0)
    rows = run_cases(cases, session, output, seconds, arguments.budget)
    if rows:
        report(rows)
        print(f"\nrows appended to {output}")
    return 0


def report(rows: list) -> None:
    """Print the table, what has no time, and the summary."""
    print("\n" + run_table(rows))
    for block in (failures(rows), summary(rows)):
        if block:
            print("", *block, sep="\n")


def add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="rows")


def table(arguments: argparse.Namespace) -> int:
    rows = read_rows(arguments.file)
    first = rows[-1]
    print(f"{first['device']}, {first['threads']} threads" if first["threads"] else first["device"])
    report(rows)
    return 0


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=Path, metavar="OLD", help="rows")
    parser.add_argument("new", type=Path, metavar="NEW", help="rows")
    parser.add_argument("--threshold", type=_positive, default=1.05, metavar="X", help="times slower (default: 1.05)")


def compare_files(arguments: argparse.Namespace) -> int:
    result = compare(read_rows(arguments.old), read_rows(arguments.new), arguments.threshold)
    for title, lines in (
        (f"slower by over {100 * (arguments.threshold - 1):.0f} %", result.slower),
        ("faster by as much", result.faster),
        ("only in OLD", result.only_old),
        ("only in NEW", result.only_new),
    ):
        for line in lines:
            print(f"{title}: {line}")
    print(f"{result.compared} times compared, {len(result.slower)} slower, {len(result.faster)} faster")
    return 1 if result.slower else 0


def add_tune(parser: argparse.ArgumentParser) -> None:
    _add_selection(parser)
    parser.add_argument("--budget", type=_positive, default=120.0, metavar="SECONDS", help="default: 120")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the table; default: the user's own")


def tune(arguments: argparse.Namespace) -> int:
    import torch

    from .run import resolve_device

    if resolve_device(arguments.device).type != "cuda":
        raise InputError("--device: tuning needs a CUDA device")
    dtype = arguments.dtype or "bfloat16"
    cases = select(arguments.cases or ["core"], dtype, None, arguments.only, parse_slice(arguments.slice))
    tune_cases(cases, getattr(torch, dtype), arguments.budget, arguments.output)
    return 0


def tune_cases(cases: Sequence[Case], dtype: torch.dtype, budget: float, output: Path | None) -> None:
    """Measure the shapes of the cases in ``budget`` seconds: single layers, then blocks, an encoder's among them."""
    from lpaf_kernels.tuning import tune_attention, tune_ffn, tune_linear, tune_masked

    started = time.monotonic()

    def options() -> dict[str, Any]:
        left = max(budget - (time.monotonic() - started), 0.0)
        return {"dtype": dtype, "budget_s": left, "output": output}

    def named(rows: Iterable[int]) -> str:
        return ", ".join(map(str, rows))

    linear = [case for case in cases if isinstance(case, LinearCase)]
    if linear:
        shapes = list(dict.fromkeys((c.in_features, c.out_features, c.rank, c.kept) for c in linear))
        rows = sorted({case.rows for case in linear})
        written = tune_linear(shapes, rows=rows, **options())
        print(f"{len(shapes)} shapes at M = {named(rows)}: table in {written}")
    masked = [case for case in cases if isinstance(case, MaskedCase)]
    if masked:
        shapes = list(dict.fromkeys((c.in_features, c.out_features) for c in masked))
        rows = sorted({case.rows for case in masked})
        written = tune_masked(shapes, rows=rows, **options())
        print(f"{len(shapes)} masked shapes at M = {named(rows)}: table in {written}")
    parts = [part for case in cases for part in ((case.attention, case.ffn) if case.op == "encoder" else (case,))]
    ffn = [case for case in parts if isinstance(case, FfnCase)]
    if ffn:
        shapes = list(dict.fromkeys((c.hidden, c.intermediate, c.hidden, (c.rank, c.rank), (0, 0), 0) for c in ffn))
        rows = sorted({case.rows for case in ffn})
        written = tune_ffn(shapes, rows=rows, directions=("forward",), **options())
        print(f"{len(shapes)} feed-forward blocks at M = {named(rows)}: table in {written}")
    attention = [case for case in parts if isinstance(case, AttentionCase)]
    if attention:
        shapes = list(dict.fromkeys(_attention_sizes(case) for case in attention))
        batches = sorted({(case.batch, case.length) for case in attention})
        written = tune_attention(shapes, batches=batches, **options())
        words = ", ".join(f"{batch} x {length}" for batch, length in batches)
        print(f"{len(shapes)} attention blocks at {words}: table in {written}")


def _attention_sizes(case: AttentionCase) -> tuple:
    """(in, heads, kv_heads, head_dim, out, ranks, kept, rotary)."""
    head_dim = case.hidden // case.heads
    return case.hidden, case.heads, case.heads, head_dim, case.hidden, (case.rank,) * 4, (0,) * 4, False


def add_gpu_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry", action="store_true", help="every step up to the launch, on a machine with no GPU")
    parser.add_argument("--budget", type=_positive, default=540.0, metavar="SECONDS", help="default: 540")
    parser.add_argument("--skip-build", action="store_true", help="use the native libraries that are there")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: benchmarks/results/DEVICE/core.jsonl")


def gpu_check(arguments: argparse.Namespace) -> int:
    from .gpu_check import check

    return check(arguments.dry, arguments.budget, arguments.skip_build, arguments.output)


def add_gpu_pruning(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=_positive, default=540.0, metavar="SECONDS", help="default: 540")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: benchmarks/results/DEVICE/masked.jsonl")


def gpu_pruning(arguments: argparse.Namespace) -> int:
    from .gpu_check import check_pruning

    return check_pruning(arguments.budget, arguments.output)


COMMANDS = {
    "run": (add_run, run, "measure cases and append their rows to a file"),
    "table": (add_table, table, "print a file's last runs as a table with a summary"),
    "compare": (add_compare, compare_files, "name what got slower between two files; exit status 1 if anything did"),
    "tune": (add_tune, tune, "measure which implementation suits each case on this GPU and write the table"),
    "gpu-check": (add_gpu_check, gpu_check, "build, test, measure, tune and measure again on a GPU"),
    "gpu-pruning": (add_gpu_pruning, gpu_pruning, "what pruning and factorising BERT-base cost on a GPU"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 something is worse, 2 bad input)."""
    parser = Parser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, (add_options, function, words) in COMMANDS.items():
        sub = commands.add_parser(name, help=words, description=words)
        sub.set_defaults(function=function)
        add_options(sub)
    parsed = parser.parse_args(arguments)
    try:
        return parsed.function(parsed)
    except InputError as error:
        print(f"python -m benchmarks {parsed.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
