"""The built-in task: from the first sentence of a docstring, tell which installed package it comes from.

The examples are made from the source files of packages that lpaf depends on, so nothing is downloaded and
machines with the same versions have the same data (``TaskData.fingerprint`` tells). Nothing is imported:
sources are parsed with ``ast``.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.util
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features, Value
from tqdm.auto import tqdm

from ..errors import InputError
from ..processes import is_main
from .task_data import TaskData, make_task_data
from .tasks import get_task

PACKAGES = (
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "networkx",
    "numpy",
    "pandas",
    "python",
    "scipy",
    "sklearn",
    "sympy",
    "torch",
    "transformers",
)
PLACEHOLDER = "_"
SHINGLE = 3
NEAR_DUPLICATE = 0.5

# Tests and vendored copies are not the package's own prose; the rest of the list are the parts of the
# standard library that distributions leave out.
_SKIPPED_FOLDERS = frozenset(
    [
        "tests",
        "test",
        "testing",
        "_testing",
        "conftest",
        "externals",
        "vendored",
        "_vendor",
        "__pycache__",
        "site-packages",
        "dist-packages",
        "distutils",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "tkinter",
        "turtledemo",
    ]
)

# Names of the packages, what they are called in prose, and what they are imported as.
_GIVEAWAYS = [
    "aten",
    "caffe2",
    "cpython",
    "datasets",
    "hf",
    "hugging-face",
    "hugging",
    "huggingface",
    "huggingface_hub",
    "huggingface-hub",
    "isympy",
    "libtorch",
    "matplotlib",
    "mpl",
    "mpmath",
    "networkx",
    "np",
    "numpy",
    "nx",
    "onnx",
    "pandas",
    "pd",
    "plt",
    "pyarrow",
    "pylab",
    "pyplot",
    "python",
    "python2",
    "python3",
    "pytorch",
    "scikit",
    "scikit-learn",
    "scikits",
    "scipy",
    "sklearn",
    "sympy",
    "torch",
    "torchgen",
    "torchscript",
    "torchvision",
    "transformers",
]
_MASKED = re.compile(
    "|".join(
        (
            r":[a-z:]+:`[^`]*`",  # roles, :class:`Tensor`
            r"``[^`]*``|`[^`]*`_{0,2}",  # code
            r"https?://\S+",
            r"\b(?:[A-Za-z_]\w*\.)+[A-Za-z_]\w*(?:\(\))?",  # dotted.names
            r"\b\w*_\w*(?:\(\))?",  # snake_case
            r"\b\w+\(\)",  # calls()
            r"\b[A-Za-z]+[a-z0-9][A-Z]\w*|\b[A-Z]{2,}[a-z]\w*",  # CamelCase, HTTPServer
        )
    )
)
_NAMES = re.compile(
    r"(?<![A-Za-z])(?:" + "|".join(sorted(map(re.escape, _GIVEAWAYS), key=len, reverse=True)) + r")(?![A-Za-z])",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"[*#=<>|\\{}\[\]~^`-]{2,}|[*`]")
_SPACE_BEFORE = re.compile(r"\s+(?=[.,;:!?)])")
_RUNS = re.compile(rf"{PLACEHOLDER}(?:[\s,]*{PLACEHOLDER})+")
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`(])")
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Docstring:
    """One example before the split.

    Args:
        package: its class.
        source: the file, relative to the package.
        text: masked text.
    """

    package: str
    source: str
    text: str

    @property
    def words(self) -> list[str]:
        """Lower-case words and numbers of the text, without the placeholder."""
        return _WORD.findall(self.text.lower())


def mask(text: str) -> str:
    """``text`` without what gives its package away: names of packages, identifiers, code, links and markup.

    Each becomes ``PLACEHOLDER``, runs of it one.
    """
    text = _MASKED.sub(f" {PLACEHOLDER} ", text)
    text = _NAMES.sub(f" {PLACEHOLDER} ", text)
    text = _RUNS.sub(PLACEHOLDER, _MARKUP.sub(" ", text))
    return " ".join(_SPACE_BEFORE.sub("", text).split())


def first_sentences(docstring: str, count: int = 1) -> str:
    """The first ``count`` sentences of a docstring's first paragraph, on one line."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    return " ".join(_SENTENCE_END.split(" ".join(paragraph.split()))[:count])


def docstrings_of(source: bytes) -> Iterator[str]:
    """Docstrings of a module's source: its own, then those of its classes and functions, in the file's order.

    Yields nothing for source that this Python cannot parse.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
        # Functions inside functions are nobody's interface.
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            stack += reversed([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])


def package_root(package: str) -> Path:
    """The folder of a package's sources; "python" is the standard library.

    Raises:
        InputError: the package is not installed.
    """
    if package == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"--task docstrings: package {package} is not installed; pip install it, or pass --data-dir")
    return Path(next(iter(spec.submodule_search_locations)))


def _order(seed: int, *parts: str) -> str:
    """Sort key: pseudo-random, and the same on every machine."""
    return hashlib.sha256("\0".join((str(seed), *parts)).encode()).hexdigest()


def _sources(root: Path) -> list[str]:
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return [path.as_posix() for path in files if not _SKIPPED_FOLDERS & set(path.parts[:-1])]


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection: it visits every node of every syntax tree, which doubles the time to parse."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _collect(
    package: str, root: Path, wanted: int, seed: int, sentences: int, words: tuple[int, int]
) -> list[Docstring]:
    """At least ``wanted`` distinct docstrings of a package, file by file in seeded order, or all it has."""
    found: dict[str, Docstring] = {}
    for source in sorted(_sources(root), key=lambda source: _order(seed, package, source)):
        if len(found) >= wanted:
            break
        for text in docstrings_of((root / source).read_bytes()):
            example = Docstring(package, source, mask(first_sentences(text, sentences)))
            count = len(example.words)
            if count >= words[0]:
                short = " ".join(example.text.split()[: words[1]])
                found.setdefault(short.lower(), Docstring(package, source, short))
    return list(found.values())


def shingles(words: Sequence[str]) -> frozenset[tuple[str, ...]]:
    """All runs of ``SHINGLE`` words; near-duplicates share half of the union of theirs."""
    return frozenset(tuple(words[at : at + SHINGLE]) for at in range(max(1, len(words) - SHINGLE + 1)))


def _distinct(examples: Iterable[Docstring], cap: int) -> list[Docstring]:
    """Examples without near-duplicates, at most ``cap`` per package; the first of each kind stays."""
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    kept: list[Docstring] = []
    sizes: list[int] = []
    counts: Counter[str] = Counter()
    for example in examples:
        if counts[example.package] >= cap:
            continue
        own = shingles(example.words)
        common = Counter(index for shingle in own for index in holders[shingle])
        if any(n >= NEAR_DUPLICATE * (len(own) + sizes[index] - n) for index, n in common.items()):
            continue
        for shingle in own:
            holders[shingle].append(len(kept))
        kept.append(example)
        sizes.append(len(own))
        counts[example.package] += 1
    return kept


def _split(examples: Sequence[Docstring], share: float, seed: int) -> tuple[list[Docstring], list[Docstring]]:
    """Training and validation examples: ``share`` of each package, a file's examples on one side."""
    sides: tuple[list[Docstring], list[Docstring]] = ([], [])
    by_source: dict[tuple[str, str], list[Docstring]] = defaultdict(list)
    for example in examples:
        by_source[example.package, example.source].append(example)
    room = {package: round(share * n) for package, n in Counter(example.package for example in examples).items()}
    for (package, _), group in sorted(by_source.items(), key=lambda item: _order(seed, "split", *item[0])):
        # A file too large for what is left goes to training; a smaller one that comes later fills the rest.
        side = len(group) <= room[package]
        room[package] -= len(group) * side
        sides[side].extend(group)
    for side in sides:
        side.sort(key=lambda example: _order(seed, "order", example.package, example.text))
    return sides


def build_docstrings(
    seed: int = 0,
    packages: Sequence[str] = PACKAGES,
    per_package: int = 540,
    sentences: int = 1,
    words: tuple[int, int] = (5, 40),
    validation_share: float = 0.2,
) -> TaskData:
    """The docstrings task: text -> package, with names masked, balanced and split by source file.

    Texts that occur in two packages are left out, and of near-duplicates (see ``shingles``) one is kept, so
    that there are none across the split either. Takes about 6 seconds on one core.

    Args:
        seed: decides which files are taken, the split and the order.
        packages: the classes: importable packages, or "python" for the standard library. Default:
            ``PACKAGES``.
        per_package: examples of each package, as far as it has so many.
        sentences: sentences taken from the first paragraph of each docstring.
        words: the fewest words (without placeholders) an example may have, and where longer ones are cut.
        validation_share: share of each package's examples in validation.

    Raises:
        InputError: a package is not installed.
        ValueError: an argument out of range.
    """
    if len(set(packages)) < 2 or len(set(packages)) != len(packages):
        raise ValueError(f"packages={packages!r}: expected at least two different names")
    if per_package < 10:
        raise ValueError(f"per_package={per_package}: expected at least 10")
    if sentences < 1:
        raise ValueError(f"sentences={sentences}: expected at least 1")
    if not 1 <= words[0] <= words[1]:
        raise ValueError(f"words={words}: expected (fewest, most) with 1 <= fewest <= most")
    if not 0.0 < validation_share < 1.0:
        raise ValueError(f"validation_share={validation_share}: expected a number between 0 and 1")
    roots = {package: package_root(package) for package in packages}
    wanted = per_package + per_package // 2  # near-duplicates take their share
    examples: list[Docstring] = []
    bar = tqdm(
        roots.items(), desc="read docstrings", unit="package", delay=2, leave=False, disable=not is_main() or None
    )
    with _collector_paused():
        for package, root in bar:
            examples += _collect(package, root, wanted, seed, sentences, words)
    owners: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        owners[" ".join(example.words)].add(example.package)
    examples = [example for example in examples if len(owners[" ".join(example.words)]) == 1]
    examples.sort(key=lambda example: _order(seed, "choice", example.package, example.source, example.text))
    train, validation = _split(_distinct(examples, per_package), validation_share, seed)
    spec = get_task("docstrings")
    return make_task_data(
        spec,
        _dataset(train, packages),
        {spec.validation_splits[0]: _dataset(validation, packages)},
        tuple(packages),
    )


def _dataset(examples: Sequence[Docstring], packages: Sequence[str]) -> Dataset:
    content = {
        "text": [example.text for example in examples],
        "label": [packages.index(example.package) for example in examples],
    }
    return Dataset.from_dict(content, features=Features({"text": Value("string"), "label": Value("int64")}))
