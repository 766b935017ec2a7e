"""``lpaf study``: a grid of compressions from one file, that resumes, shares stages, and ends in one table.

The file is TOML::

    extends = "sst2.toml"              # sections of another file, which this one's entries go before
    title = "LPAF against fine-tuned SVD"
    against = "svd"                    # paired tests are against this one

    [options]                          # of lpaf compress, for every run
    model = "minilm-l6"
    task = "sst2"
    data_dir = "data/sst2"

    [grid]                             # every combination
    ratio = [0.5, 0.25, 0.16]
    seed = [0, 1]

    [methods.lpaf]                     # the rows of the table, each with its own options
    keep = 0.25
    [methods.svd]
    method = "svd"

    [tune]                             # tried for every method; the best validation metric wins
    retrain_lr = [4e-4, 8e-4]
    [tune.at]                          # where it is tried (default: in every cell, with the first seed)
    ratio = 0.25

Runs are folders named after their method and a key of their options. What is finished is skipped, what was interrupted
is resumed, and stages that several runs have in common (fine-tuning, pruning) are made once. Several processes may work
on one study: a run that another one has in hand is left to it.
"""

from __future__ import annotations

import dataclasses
import difflib
import gc
import itertools
import json
import shutil
import time
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tomllib

import lpaf_kernels

from ..data import get_task
from ..errors import InputError
from ..processes import from_main, is_main, process_place, say, start
from ..report.study import Cell, Outcome, write_study
from .calibrate import calibration_fingerprint
from .compress import compress
from .fingerprints import files_fingerprint, weights_fingerprint
from .fisher import fisher_fingerprint
from .methods import METHODS, get_method
from .modules import module_settings_fingerprint
from .options import PATH_OPTIONS, RUN_OPTIONS, CompressOptions
from .prepare import check_method_size
from .stages import stage_key
from .workspace import BusyError, is_published, work_directory

REPORT = "report.json"
WEIGHTS = "model.safetensors"
SECTIONS = ("extends", "title", "against", "scored", "keep_models", "options", "grid", "methods", "tune")
SCORED = ("factorized", "compressed")
#: options that the study sets itself
OWN = ("output", "stages", "resume", "overwrite", "save_dense", "save_fisher")
BUSY_SECONDS = 5.0

Settings = dict[str, Any]


@dataclass(frozen=True)
class StudyFile:
    """A study as its file has it.

    Args:
        title: heading of the table.
        options: options of every run.
        methods: label -> options of its runs.
        grid: option -> values; every combination is run. ``seed`` is one of them.
        tune: option -> values tried for every method.
        tune_at: grid options fixed while tuning.
        against: label that the others are tested against.
        scored: stages that get a table: "compressed", and "factorized" for the model before retraining.
        keep_models: keep the weights of every run.
    """

    title: str
    options: Settings
    methods: dict[str, Settings]
    grid: dict[str, list]
    tune: dict[str, list] = field(default_factory=dict)
    tune_at: Settings = field(default_factory=dict)
    against: str | None = None
    scored: tuple[str, ...] = ("compressed",)
    keep_models: bool = True

    def cells(self) -> list[Cell]:
        """Every combination of the grid without the seed, in the order of the file."""
        names = [name for name in self.grid if name != "seed"]
        return [tuple(zip(names, values, strict=True)) for values in itertools.product(*(self.grid[n] for n in names))]

    @property
    def seeds(self) -> list[int]:
        """Seeds of every cell."""
        return self.grid.get("seed", [self.options.get("seed", 0)])

    def candidates(self) -> list[Settings]:
        """Every combination of the tuned options; one empty one without tuning."""
        return [dict(zip(self.tune, values, strict=True)) for values in itertools.product(*self.tune.values())]

    def settings(self, label: str, cell: Cell, seed: int, tuned: Settings) -> Settings:
        """The options of one run; those of its method go before ``[options]``, of which it takes nothing about pruning
        or a teacher that it has no use for."""
        shared, own = self.options, self.methods[label]
        method = METHODS.get(str((shared | own).get("method", CompressOptions.method)))
        if method is not None:  # else what is wrong is found later
            idle = method.idle(shared | own)
            shared = {name: value for name, value in shared.items() if name not in idle}
        return shared | own | dict(cell) | {"seed": seed} | tuned


def read_study(path: Path, changes: Mapping[str, Any] | None = None) -> StudyFile:
    """A checked study file; ``changes`` replace entries of ``[options]``.

    Raises:
        InputError: the file cannot be read, or has a section, option or value that means nothing.
    """
    content = _content(path)
    where = f"study {path}"
    for name in ("options", "grid", "methods", "tune"):
        _table_of(where, name, content.setdefault(name, {}))
    tune_at = _table_of(where, "tune.at", content["tune"].pop("at", {}))
    options, grid, tune, methods = (content[name] for name in ("options", "grid", "tune", "methods"))
    changes = dict(changes or {})
    if not methods:
        raise InputError(f"{where}: has no [methods.NAME]; add one table per row")
    names = [option.name for option in dataclasses.fields(CompressOptions) if option.name not in OWN]
    sections = {"[options]": options, "[grid]": grid, "[tune]": tune, "[tune.at]": tune_at, "--set": changes}
    sections |= {f"[methods.{label}]": _table_of(where, f"methods.{label}", of) for label, of in methods.items()}
    for section, given in sections.items():
        _known(f"{where}: {section}", given, names)
    _check_places(where, sections)
    for name, value in tune_at.items():
        if value not in grid.get(name, []):
            raise InputError(f"{where}: [tune.at] {name} = {value!r} is not in [grid]")
    against, scored = content.get("against"), content.get("scored", ["compressed"])
    if against is not None and (not isinstance(against, str) or against not in methods):
        raise InputError(f"{where}: against = {against!r} is not one of the methods ({', '.join(methods)})")
    if not isinstance(scored, list) or not scored or any(stage not in SCORED for stage in scored):
        raise InputError(f"{where}: scored = {scored!r}: expected a list out of {', '.join(SCORED)}")
    keep_models = content.get("keep_models", True)
    if not isinstance(keep_models, bool):
        raise InputError(f"{where}: keep_models = {keep_models!r}: expected true or false")
    study = StudyFile(
        title=str(content.get("title", path.stem)),
        options=options | changes,
        methods=methods,
        grid=grid,
        tune=tune,
        tune_at=tune_at,
        against=against,
        scored=tuple(scored),
        keep_models=keep_models,
    )
    combinations = itertools.product(study.methods, study.cells(), study.seeds, study.candidates())
    for label, cell, seed, tuned in combinations:
        _options(study.settings(label, cell, seed, tuned), Path("unwritten"), Path("unwritten"), where)
    return study


def _check_places(where: str, sections: Mapping[str, Mapping[str, Any]]) -> None:
    """InputError where one section would override another in silence, or a list is none."""
    grid, tune = sections["[grid]"], sections["[tune]"]
    methods = {section: given for section, given in sections.items() if section.startswith("[methods.")}
    for section in ("[tune]", "--set", *methods):
        overriding = {"[grid]": grid, "[tune]": tune} | (methods if section == "--set" else {})
        for name in sections[section]:
            other = next((its for its, given in overriding.items() if its != section and name in given), None)
            if other is not None:
                raise InputError(f"{where}: {name} is in {section} and in {other}; leave it out of one")
    for section in ("[tune]", *methods):
        if "seed" in sections[section]:
            raise InputError(f"{where}: seed is in {section}; it belongs into [grid] or [options]")
    for section, lists in {"[grid]": grid, "[tune]": tune}.items():
        for name, values in lists.items():
            if not isinstance(values, list) or not values:
                raise InputError(f"{where}: {section} {name} = {values!r}: expected a list of values")
            if any(value in values[:at] for at, value in enumerate(values)):
                raise InputError(f"{where}: {section} {name} = {values!r}: has a value twice")


def _table_of(where: str, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: {name} = {value!r}: expected a table")
    return value


def _content(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's sections over those of the file that it extends."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"study {path}: cannot be read ({error})") from None
    _known(f"study {path}", content, SECTIONS)
    base = content.pop("extends", None)
    if base is None:
        return content
    if path.resolve() in above:
        raise InputError(f"study {path}: extends itself; leave out one extends")
    merged = _content(path.parent / str(base), (*above, path.resolve()))
    for name, value in content.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merged[name] | value if both else value
    return merged


def _known(where: str, given: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(names)}"
            raise InputError(f"{where}: {name} is unknown; {hint}")


def _options(settings: Settings, directory: Path, stages: Path, where: str) -> CompressOptions:
    """Options of a run in ``directory``; InputError that begins with ``where``."""
    kinds = typing.get_type_hints(CompressOptions)
    for name, value in settings.items():
        fits = isinstance(value, kinds[name]) or (isinstance(value, int) and isinstance(0.0, kinds[name]))
        if not fits or (isinstance(value, bool) and kinds[name] is not bool):
            wanted = getattr(kinds[name], "__name__", str(kinds[name]).removesuffix(" | None"))
            raise InputError(f"{where}: {name} = {value!r}: expected {wanted}")
    try:
        options = CompressOptions(**settings, output=str(directory), stages=str(stages), resume=True)
        check_method_size(get_method(options.method).with_options(options), options)
        return options
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


@dataclass(frozen=True)
class Run:
    """One compression of a study: what it is called and the options that decide it."""

    label: str
    cell: Cell
    seed: int
    tuned: Settings
    settings: Settings

    @cached_property
    def name(self) -> str:
        """The run's folder: equal for runs that end with the same weights."""
        options = CompressOptions(**self.settings, output="unwritten")
        processes = process_place()[1]
        idle = get_method(options.method).idle(options.to_dict())
        decides = options.to_dict(without=(*RUN_OPTIONS, *PATH_OPTIONS, *idle)) | {
            "weights": weights_fingerprint(options.model),
            "data": files_fingerprint(options),
            "calibrated": calibration_fingerprint(options) or options.calibration,
            "fisher_data": fisher_fingerprint(options),
            "module_settings": module_settings_fingerprint(options),
            "force": options.forced,
            "version": lpaf_kernels.__version__,
            "processes": processes if processes > 1 else None,
        }
        return f"{options.method}-{stage_key(decides)}"

    def __str__(self) -> str:
        values = {**dict(self.cell), "seed": self.seed, **self.tuned}
        return " ".join([self.label, *(f"{name}={value}" for name, value in values.items())])


class Study:
    """Works through a study file.

    Args:
        file: what to run.
        runs: folder of the runs and of the stages they share; several studies may use one.
        command: how the study was started, for the reports of the runs.
    """

    def __init__(self, file: StudyFile, runs: Path, command: str) -> None:
        self.file, self.runs, self.command = file, runs, command
        #: runs that ended without a model -> why
        self.failed: dict[str, str] = {}

    def run(self, label: str, cell: Cell, seed: int, tuned: Settings) -> Run:
        return Run(label, cell, seed, tuned, self.file.settings(label, cell, seed, tuned))

    def tuning(self, label: str, cell: Cell) -> list[Run]:
        """The runs among which the tuned options of this cell are chosen."""
        at = dict(self.file.tune_at)
        seed = at.pop("seed", self.file.seeds[0])
        where = tuple((name, at.get(name, value)) for name, value in cell)
        return [self.run(label, where, seed, tuned) for tuned in self.file.candidates()]

    def chosen(self, label: str, cell: Cell) -> Settings | None:
        """The tuned options of a cell; None while runs are missing."""
        runs = self.tuning(label, cell)
        if len(runs) == 1:
            return runs[0].tuned
        if not all(self.ended(run) for run in runs):
            return None
        sign = -1 if get_task(runs[0].settings["task"]).lower_is_better else 1
        reports = [self.report(run) for run in runs]
        scores = [sign * report["metric"]["compressed"] if report else float("-inf") for report in reports]
        return runs[scores.index(max(scores))].tuned

    def final(self) -> Iterator[Run]:
        """The runs of the table, as far as their tuned options are known."""
        for label, cell in itertools.product(self.file.methods, self.file.cells()):
            tuned = self.chosen(label, cell)
            if tuned is not None:
                for seed in self.file.seeds:
                    yield self.run(label, cell, seed, tuned)

    def wanted(self) -> list[Run]:
        """What is still to be run: the tuning first, the rest as soon as it is known."""
        cells = list(itertools.product(self.file.methods, self.file.cells()))
        runs = [run for label, cell in cells for run in self.tuning(label, cell)] if self.file.tune else []
        different = {run.name: run for run in (*runs, *self.final())}
        return [run for run in different.values() if not self.ended(run)]

    def ended(self, run: Run) -> bool:
        """Whether the run has a report, or failed in this session."""
        return run.name in self.failed or (self.runs / run.name / REPORT).is_file()

    def report(self, run: Run) -> dict[str, Any] | None:
        """The run's report.json, or None."""
        path = self.runs / run.name / REPORT
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def work(self) -> None:
        """Run everything that is not finished."""
        while runs := from_main(self.wanted):
            done = [self.attempt(run, len(runs) - at) for at, run in enumerate(runs)]
            if not any(done):
                time.sleep(BUSY_SECONDS)  # all of them are in other hands
        if is_main():
            for run in self.final():
                self.tidy(self.runs / run.name)

    def attempt(self, run: Run, left: int) -> bool:
        """Do one run; False when another process has it in hand."""
        directory = self.runs / run.name
        if from_main(lambda: self.ended(run)):
            return True
        options = _options(run.settings, directory, self.runs / "stages", str(run))
        say(f"[{left} left] {run}")
        try:
            compress(options, self.command)
        except BusyError:
            return False
        except InputError as error:
            if not from_main(lambda: self.ended(run)):  # else another study has just finished it
                self.fail(run, error)
        except RuntimeError as error:  # such as a GPU that is too small
            if process_place()[1] > 1:
                raise  # the processes are not in step any more
            self.fail(run, error)
        gc.collect()
        return True

    def fail(self, run: Run, error: Exception) -> None:
        """Go on without ``run``."""
        self.failed[run.name] = f"{run}: {error}"
        say(self.failed[run.name])

    def tidy(self, directory: Path) -> None:
        """Drop what a run that was killed at its very end left, and the weights if they are not wanted."""
        if is_published(directory):
            shutil.rmtree(work_directory(directory), ignore_errors=True)
        if not self.file.keep_models:
            (directory / WEIGHTS).unlink(missing_ok=True)

    def outcomes(self) -> list[Outcome]:
        """The finished runs of the table."""
        return [
            Outcome(run.label, run.cell, run.seed, run.tuned, self.runs / run.name)
            for run in self.final()
            if (self.runs / run.name / REPORT).is_file()
        ]


def study(
    path: str,
    output: str,
    runs: str | None = None,
    changes: Mapping[str, Any] | None = None,
    table_only: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Run a study and write its table, figures and numbers.

    Args:
        path: the TOML file.
        output: folder of study.md, study.csv, study.json and the pictures; what is there is replaced.
        runs: folder of the runs. Default: ``output``/runs.
        changes: entries of ``[options]`` to replace.
        table_only: run nothing; write the table of what is finished.
        command: how it was started. Default: ``lpaf study PATH``.

    Returns:
        What study.json holds.

    Raises:
        InputError: a bad file, or no run that could be done; single ones that fail are listed under "failed".
    """
    start()
    file = read_study(Path(path), changes)
    folder = Path(runs) if runs else Path(output) / "runs"
    for directory in (Path(output), folder):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output {directory}: cannot be made ({error.strerror}); pass another folder") from None
    work = Study(file, folder, command or f"lpaf study {path}")
    if not table_only:
        work.work()
    return from_main(lambda: results(work, Path(output)))


def results(work: Study, output: Path) -> dict[str, Any]:
    """Write what is finished; InputError where that is nothing."""
    outcomes, file = work.outcomes(), work.file
    if work.failed and not outcomes:
        raise InputError(next(iter(work.failed.values())))
    return write_study(output, file.title, outcomes, against=file.against, scored=file.scored, failed=work.failed)
