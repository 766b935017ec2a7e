"""The studies of benchmarks/studies can be read: every option and method in them still exists."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomllib

from lpaf.recipes.study import read_study

FOLDER = Path(__file__).parents[2] / "benchmarks" / "studies"
FILES = {path.name: tomllib.loads(path.read_text()) for path in FOLDER.glob("*.toml")}
BASES = {content["extends"] for content in FILES.values() if "extends" in content}
#: files of single modules, which a study's options name
SETTINGS = {
    Path(method["module_settings"]).name
    for content in FILES.values()
    for method in content.get("methods", {}).values()
    if "module_settings" in method
}


def test_every_base_and_settings_file_exists():
    assert FILES.keys() > BASES | SETTINGS


@pytest.mark.parametrize(
    "name", sorted(name for name in FILES if name not in SETTINGS | BASES or "methods" in FILES[name])
)
def test_can_be_read(name):
    study = read_study(FOLDER / name)
    assert study.methods
    assert study.cells()
