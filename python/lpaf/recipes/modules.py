"""``--modules``: which matrices are compressed offline, and how each group of them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomllib
from torch import nn

from ..errors import InputError
from ..factorize.baselines import check_baseline
from ..factorize.offline import OFFLINE, ModulePlan, ModuleSettings, plan_module
from ..models.modules import module_groups
from .fingerprints import content_fingerprint
from .options import AUTOENCODER_OPTIONS, MODULE_OPTIONS, CompressOptions, flag, given_flags

#: options of whole encoders
_SIZES = ("rank", "ratio", "rank_error", "force")


def check_modules(options: CompressOptions, modules_only: bool) -> None:
    """InputError unless the options of single modules fit each other and the method.

    Args:
        modules_only: whether the method knows nothing but single modules.
    """
    if options.modules is None:
        if modules_only:
            raise InputError(
                f"--method {options.method}: compresses chosen modules; pass --modules, such as "
                "embeddings,key,output-dense"
            )
        for name in given_flags(options, (*MODULE_OPTIONS, "module_settings")):
            raise InputError(f"{name}: is for single modules; pass --modules NAME,NAME as well")
        return
    if options.method not in OFFLINE:
        raise InputError(
            f"--modules: --method {options.method} has no use for it; pass --method {' or '.join(OFFLINE)}"
        )
    check_baseline(options.method)
    for name in given_flags(options, _SIZES):
        raise InputError(f"{name}: is the size of the whole encoder; with --modules pass --compression-ratio CR")
    if options.compression_ratio is None and options.module_settings is None:
        raise InputError("--modules: their size is missing; pass --compression-ratio CR, or --module-settings FILE")
    if options.calibration is not None:
        raise InputError(f"--calibration {options.calibration}: is for whole encoders, not for --modules")
    for name in given_flags(options, ("prune_epochs", "prune")):
        raise InputError(f"{name}: is for pruning, which --modules leaves out")
    if options.fisher_transform is not None and options.fisher is None and options.method == "autoencoder":
        raise InputError(
            f"--fisher-transform {options.fisher_transform}: there is nothing to transform; pass --fisher FILE or "
            "compute as well"
        )
    if options.method != "autoencoder":
        for name in given_flags(options, AUTOENCODER_OPTIONS):
            raise InputError(f"{name}: is for --method autoencoder, not for --method {options.method}")


def module_plans(model: nn.Module, options: CompressOptions) -> list[ModulePlan]:
    """What becomes of every group that ``--modules`` names.

    Raises:
        InputError: a module that the model does not have, a settings file that cannot be read or names something else,
            or a compression ratio that leaves nothing.
    """
    groups = module_groups(model, [name.strip() for name in options.modules.split(",")])
    tables = {} if options.module_settings is None else _settings_tables(options.module_settings)
    names = [group.name for group in groups]
    for name in tables:
        if name not in names:
            raise InputError(
                f"--module-settings {options.module_settings}: [{name}] is not among --modules {','.join(names)}"
            )
    shared = {
        field.name: value
        for field in dataclasses.fields(ModuleSettings)
        if (value := getattr(options, field.name, None)) is not None
    }
    plans = []
    for group in groups:
        where = f"--module-settings {options.module_settings}: [{group.name}]"
        own = _checked(tables.get(group.name, {}), where, options.method)
        if "compression_ratio" not in shared | own:
            raise InputError(f"{where} has no compression_ratio; add it, or pass --compression-ratio CR")
        try:
            plans.append(plan_module(group, options.method, ModuleSettings(**shared | own), options.seed))
        except InputError as error:
            raise InputError(f"{where}: {error}" if own else str(error)) from None
    return plans


def module_settings_fingerprint(options: CompressOptions) -> str | None:
    """Content of ``--module-settings``; None without."""
    return None if options.module_settings is None else content_fingerprint([Path(options.module_settings)])


def _settings_tables(path: str) -> dict[str, Any]:
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"--module-settings {path}: cannot be read ({error})") from None
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise InputError(f"--module-settings {path}: {name} = {table!r}: expected a table [{name}] of settings")
    return tables


def _checked(table: Mapping[str, Any], where: str, method: str) -> dict[str, Any]:
    """The entries of one table, by the names of ``ModuleSettings``."""
    kinds = typing.get_type_hints(ModuleSettings)
    found = {}
    for written, value in table.items():
        name = written.replace("-", "_")
        if name not in kinds:
            raise InputError(f"{where} {written}: is unknown; expected one of {', '.join(kinds)}")
        if method != "autoencoder" and name in AUTOENCODER_OPTIONS:
            raise InputError(f"{where} {written}: is for --method autoencoder, not for --method {method}")
        kind = kinds[name]
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits:
            raise InputError(f"{where} {flag(name)[2:]} = {value!r}: expected {kind.__name__}")
        found[name] = kind(value)
    return found
