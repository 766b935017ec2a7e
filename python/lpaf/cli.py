"""The ``lpaf`` command; each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import processes
from .errors import InputError

DESCRIPTION = """\
Compress a transformer: low-rank factors, neurons, heads and blocks, with training or without.

  lpaf demo                         fine-tune, compress and compare on a built-in task (about 10 minutes on 2 CPU cores)
  lpaf compress --model DIR --task sst2 --ratio 0.25 --output small
                                    make a small, fast copy of your model
  lpaf evaluate --model small --task sst2
  lpaf study FILE.toml --output DIR compare methods, sizes and seeds; one table, with tests
  lpaf bench    --model small       latency against the dense original
  lpaf bench    --model DIR --step  what a pruning step costs beside a fine-tuning step
  lpaf tune     --model small       choose the fastest kernels for this GPU by measuring
  lpaf inspect  --model small       ranks, spectra and sparsity patterns

A compressed directory loads in any transformers program after `import lpaf`.
"""

GROUPS = {
    "what": "what to compress",
    "size": "how small (one of --rank K, --ratio R, --rank auto --ratio R, --rank-error E)",
    "modules": "offline compression of chosen modules (--method autoencoder, svd; instead of the sizes above)",
    "data": "data (without any of these, tasks that the Hub knows come from there)",
    "answers": "question answering",
    "texts": "summarisation",
    "training": "training",
    "method": "method (each step can be switched off)",
    "running": "running",
}


FUSE_HELP = "run every attention and feed-forward block of the compressed model as one operator"


class Parser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit status 2."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message}\n" if processes.first_to_fail() else None)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there is one worth showing."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default not in (None, False, True, "", [], argparse.SUPPRESS) and "default" not in text:
            text += " (default: %(default)s)"
        return text


def _value_type(annotation: Any) -> type:
    """int from ``int | None`` and the like."""
    if isinstance(annotation, types.UnionType):
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def _number_or(word: str, kind: type) -> Callable[[str], Any]:
    """A parser of options that take a number or one ``word``."""

    def parse(text: str) -> Any:
        if text == word:
            return text
        try:
            return kind(text)
        except ValueError:
            number = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"expected a {number} or {word}, got {text!r}") from None

    return parse


def add_compress_options(parser: argparse.ArgumentParser) -> None:
    """One command-line option per field of CompressOptions."""
    import dataclasses

    from .models.count import AUTO
    from .recipes.methods import METHODS
    from .recipes.options import LAYER, CompressOptions, flag

    words = {"rank": AUTO, "distill": LAYER}
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    annotations = typing.get_type_hints(CompressOptions)
    for field in dataclasses.fields(CompressOptions):
        meta = field.metadata
        kind = _value_type(annotations[field.name])
        text = meta["help"].replace("%", "%%")
        if field.name == "method":
            text += "".join(f"; {method.name}: {method.summary}" for method in METHODS.values())
        options: dict[str, Any] = {"help": text, "dest": field.name, "default": field.default}
        name = flag(field.name)
        if meta.get("negate"):
            name, options["action"] = f"--no-{name[2:]}", "store_false"
        elif kind is bool:
            options["action"] = "store_true"
        else:
            options |= {"type": kind, "metavar": meta.get("metavar", field.name.upper())}
            if field.name in words:
                options["type"] = _number_or(words[field.name], kind)
            if meta.get("choices"):
                options["metavar"] = "|".join(meta["choices"])
        if field.name in ("model", "task", "output"):
            options |= {"required": True}
        groups[meta["group"]].add_argument(name, **options)


def run_compress(arguments: argparse.Namespace) -> None:
    from .recipes.compress import compress
    from .recipes.options import CompressOptions
    from .report.terminal import final_table, show

    values = {name: value for name, value in vars(arguments).items() if name not in ("run", "command")}
    _, report = compress(CompressOptions(**values))
    show(final_table(report))
    print(f"\nwritten to {arguments.output}; open {Path(arguments.output) / 'report.html'}")


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="model directory, compressed or dense")
    parser.add_argument(
        "--task",
        required=True,
        help="task name, as for lpaf compress; perplexity of running text: language-modeling for causal models, from "
        "left to right, mlm for encoders, of hidden words (not comparable)",
    )
    parser.add_argument("--data-dir", metavar="DIR", help="folder with validation.* (csv, json, jsonl, parquet; txt)")
    parser.add_argument("--validation-file", metavar="FILE", help="file to evaluate on, instead of --data-dir")
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens per example (default: 384 for questions, 512 for summaries and language-modeling, else 128, or "
        "what the model takes)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="examples per batch (default: 64, 8 for summaries and causal models)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--predictions", metavar="FILE", help="also write label and logits, or the answer, of every example (jsonl)"
    )
    _add_task_options(parser)
    parser.add_argument("--fuse", action="store_true", help=FUSE_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _task_fields() -> dict[str, Any]:
    """The options of single kinds of tasks, by name."""
    from .recipes.options import answer_fields, text_fields

    return answer_fields() | text_fields()


def _add_task_options(parser: argparse.ArgumentParser) -> None:
    """How questions are answered and summaries are written, as for lpaf compress."""
    from .recipes.options import CompressOptions, flag

    annotations = typing.get_type_hints(CompressOptions)
    groups = {name: parser.add_argument_group(GROUPS[name]) for name in ("answers", "texts")}
    for name, field in _task_fields().items():
        kind, meta = _value_type(annotations[name]), field.metadata
        groups[meta["group"]].add_argument(flag(name), type=kind, metavar=meta["metavar"], help=meta["help"])


def run_evaluate(arguments: argparse.Namespace) -> None:
    from .evaluate.evaluate import evaluate_directory
    from .report.terminal import metrics_table, show

    result = evaluate_directory(
        arguments.model,
        arguments.task,
        data_dir=arguments.data_dir,
        validation_file=arguments.validation_file,
        max_length=arguments.max_length,
        batch_size=arguments.batch_size,
        device=arguments.device,
        predictions=arguments.predictions,
        fuse=arguments.fuse,
        **{name: getattr(arguments, name) for name in _task_fields()},
    )
    print(json.dumps(result, indent=1)) if arguments.json else show(metrics_table(result["metrics"]))


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 1,8, got {text!r}") from None
    if any(value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"expected numbers of at least 1, got {text!r}")
    return values


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--model", metavar="DIR", help="model directory, compressed or dense")
    task.add_argument("--plot", metavar="ROWS", help="draw the rows of python -m benchmarks run instead of timing")
    parser.add_argument("--output", metavar="DIR", help="folder for the pictures of --plot (default: beside ROWS)")
    parser.add_argument(
        "--against",
        metavar="DIR_OR_NAME",
        help="second model (default: a dense model of the same shape with random weights)",
    )
    parser.add_argument(
        "--step",
        action="store_true",
        help="time training instead: one step of fine-tuning, of pruning (ours, and with sorted masks as published), "
        "of LoSparse and of mixed-rank retraining, interleaved, on a model of this configuration with random weights",
    )
    parser.add_argument("--batch", type=_numbers, metavar="N,N", help="batch sizes (default: 1,8, with --step 32)")
    parser.add_argument(
        "--length", type=_numbers, metavar="N,N", help="sequence lengths (default: 128, with --step 64)"
    )
    parser.add_argument("--stages", type=_words, metavar="NAME,NAME", help="with --step: some of its stages only")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, metavar="K", help="with --step: rank of the factors")
    size.add_argument(
        "--ratio", type=float, metavar="R", help="with --step: their share of the encoder (default: 0.25)"
    )
    parser.add_argument("--bf16", action="store_true", help="with --step: train under bfloat16 autocast")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="timed rounds per cell")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="dtype of both models"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--fuse", action="store_true", help=f"{FUSE_HELP} (of --model, not of --against)")
    parser.add_argument(
        "--mode",
        type=_words,
        default=["eager"],
        metavar="MODE,MODE",
        help="how both models are called: eager, compiled (torch.compile), graphed (CUDA graphs) (default: eager)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run_bench(arguments: argparse.Namespace) -> None:
    if arguments.plot is not None:
        if arguments.step:
            raise InputError("--plot: draws rows that are there; --step has none to draw")
        from .report.bench_figures import write_bench_pictures

        rows = Path(arguments.plot)
        written = write_bench_pictures(rows, Path(arguments.output) if arguments.output else rows.parent)
        for file, caption in written.items():
            print(f"{file}\n  {caption}")
        return
    if arguments.output is not None:
        raise InputError("--output: is for --plot; times are printed, with --json as JSON")
    for name in () if arguments.step else ("stages", "rank", "ratio", "bf16"):
        if getattr(arguments, name) is not None and getattr(arguments, name) is not False:
            raise InputError(f"--{name}: is for --step")
    if arguments.step:
        run_bench_step(arguments)
        return
    from .evaluate.bench import bench, bench_lines
    from .report.terminal import bench_table, show

    rows = bench(
        arguments.model,
        against=arguments.against,
        batches=arguments.batch or [1, 8],
        lengths=arguments.length or [128],
        rounds=arguments.rounds,
        threads=arguments.threads,
        dtype=arguments.dtype,
        device=arguments.device,
        fuse=arguments.fuse,
        modes=arguments.mode,
    )
    print(json.dumps(rows, indent=1)) if arguments.json else show(bench_table(bench_lines(rows)))


def run_bench_step(arguments: argparse.Namespace) -> None:
    from .evaluate.step import bench_steps
    from .report.terminal import show, step_table

    for name, given in (("--against", arguments.against), ("--fuse", arguments.fuse)):
        if given:
            raise InputError(f"{name}: is for inference, not for --step")
    for name, values in (("--batch", arguments.batch), ("--length", arguments.length)):
        if values is not None and len(values) > 1:
            raise InputError(f"{name} {','.join(map(str, values))}: --step takes one")
    if arguments.mode not in (["eager"], ["compiled"]):
        raise InputError(f"--mode {','.join(arguments.mode)}: --step takes eager or compiled")
    if arguments.dtype != "float32":
        raise InputError(f"--dtype {arguments.dtype}: --step keeps float32 weights; pass --bf16 for bfloat16 autocast")
    rows = bench_steps(
        arguments.model,
        batch=(arguments.batch or [32])[0],
        length=(arguments.length or [64])[0],
        rank=arguments.rank,
        ratio=arguments.ratio,
        stages=arguments.stages,
        rounds=arguments.rounds,
        threads=arguments.threads,
        device=arguments.device,
        bf16=arguments.bf16,
        compiled=arguments.mode == ["compiled"],
    )
    print(json.dumps(rows, indent=1)) if arguments.json else show(step_table(rows))


def _shape(text: str) -> tuple[int, int, int, int]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) == 3:
        sizes = (*sizes, 0)
    if len(sizes) != 4 or min(sizes[:2]) < 1 or min(sizes) < 0:
        raise argparse.ArgumentTypeError(f"expected IN,OUT,RANK or IN,OUT,RANK,KEPT such as 768,3072,80, got {text!r}")
    return sizes


def add_tune_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="compressed model whose layers and blocks are measured")
    parser.add_argument(
        "--shape",
        type=_shape,
        action="append",
        default=[],
        metavar="IN,OUT,RANK,KEPT",
        help="a layer to measure; may be given several times",
    )
    parser.add_argument(
        "--rows", type=_numbers, metavar="N,N", help="batch times length (default: 1,16,128,512,4096,16384)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="dtype of the layers")
    parser.add_argument(
        "--for",
        dest="purpose",
        choices=("inference", "training"),
        default="training",
        help="training measures the backward too",
    )
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="stop then; what was measured is kept")
    parser.add_argument("--output", metavar="FILE", help="the table (default: your own, which the layers read)")


def run_tune(arguments: argparse.Namespace) -> None:
    from .evaluate.tune import tune

    written = tune(
        arguments.model,
        arguments.shape,
        rows=arguments.rows,
        dtype=arguments.dtype,
        purpose=arguments.purpose,
        budget=arguments.budget,
        output=arguments.output,
    )
    print(f"table in {written}")


def add_inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="model directory, compressed or dense")
    parser.add_argument("--pictures", metavar="DIR", help="write the pictures and a page with them here")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run_inspect(arguments: argparse.Namespace) -> None:
    from .report.inspect import inspect_directory, write_pictures
    from .report.terminal import inspection_table, show

    inspection = inspect_directory(Path(arguments.model))
    if arguments.json:
        print(json.dumps(inspection.to_json(), indent=1))
    else:
        show(inspection_table(inspection))
    if arguments.pictures:
        write_pictures(inspection, Path(arguments.pictures))
        print(f"pictures in {arguments.pictures}", file=sys.stderr)


def _setting(text: str) -> tuple[str, Any]:
    import tomllib

    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value


def add_study_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the study: options, grid, methods (docs/studies.md)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the tables and pictures")
    parser.add_argument(
        "--runs", metavar="DIR", help="folder of the runs; studies may share one (default: OUTPUT/runs)"
    )
    parser.add_argument(
        "--set",
        dest="changes",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="replace an entry of [options]; may be given several times",
    )
    parser.add_argument("--table-only", action="store_true", help="run nothing: write the table of what is finished")


def run_study(arguments: argparse.Namespace) -> None:
    import shlex

    from .recipes.study import study

    result = study(
        arguments.file,
        arguments.output,
        runs=arguments.runs,
        changes=dict(arguments.changes),
        table_only=arguments.table_only,
        command=shlex.join(["lpaf", *sys.argv[1:]]),
    )
    output = Path(arguments.output)
    print((output / "study.md").read_text(encoding="utf-8"))
    for reason in result["failed"].values():
        print(f"not done: {reason}", file=sys.stderr)
    print(f"tables, numbers and pictures in {output}", file=sys.stderr)


def add_demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="runs/demo", metavar="DIR", help="directory to write")
    parser.add_argument("--quick", action="store_true", help="a smoke run on a fraction of the data, under 2 minutes")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed")


def run_demo(arguments: argparse.Namespace) -> None:
    from .recipes.demo import demo

    demo(Path(arguments.output), quick=arguments.quick, seed=arguments.seed)


COMMANDS = {
    "compress": (add_compress_options, run_compress, "compress a model for a task"),
    "study": (add_study_options, run_study, "compare methods, sizes and seeds on one task"),
    "evaluate": (add_evaluate_options, run_evaluate, "score a model on a task"),
    "bench": (add_bench_options, run_bench, "time a model against another, interleaved"),
    "tune": (add_tune_options, run_tune, "choose the fastest kernels for this GPU by measuring"),
    "inspect": (add_inspect_options, run_inspect, "show ranks, spectra and sparsity patterns"),
    "demo": (add_demo_options, run_demo, "run the whole story on a built-in model and task"),
}


#: those that torchrun may start; the others time or draw
SHARED_COMMANDS = ("compress", "evaluate", "study", "demo")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser; only ``command``'s options are filled in, because listing methods imports the pipeline."""
    parser = Parser(prog="lpaf", description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, (add_options, run, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary, formatter_class=HelpFormatter)
        sub.set_defaults(run=run)
        if name == command:
            add_options(sub)
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"lpaf-kernels {version('lpaf-kernels')}"
    except PackageNotFoundError:
        return "lpaf-kernels (not installed)"


def _quiet_transformers() -> None:
    """One bar per stage: transformers' own bars (one per saved checkpoint) would bury it."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 2 bad input, 130 interrupted).

    Of many processes one speaks: the main one, or the first that fails.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    command = next((word for word in arguments if word in COMMANDS), None)
    with contextlib.ExitStack() as stack:
        try:
            processes.start()
            if not processes.is_main():
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            parsed = build_parser(command).parse_args(arguments)
            if processes.process_place()[1] > 1 and command not in SHARED_COMMANDS:
                raise InputError("runs in one process; start it without a launcher")
            _quiet_transformers()
            parsed.run(parsed)
        except InputError as error:
            message = " ".join(str(error).split())
            return fail(2, f"lpaf {command}: {message}")
        except KeyboardInterrupt:
            return fail(130, f"lpaf {command}: interrupted; --resume continues a compression")
        except RuntimeError:
            if processes.another_failed():  # and took the connection with it
                return 2
            raise
        processes.stop()
    return 0


def fail(status: int, message: str) -> int:
    """``status``, after ``message`` on stderr, once for all processes."""
    if processes.first_to_fail():
        print(message, file=sys.stderr)
    return status
