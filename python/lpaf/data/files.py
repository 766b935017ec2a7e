"""Rows of csv, json, jsonl and parquet files, each with the line it came from.

The readers of ``datasets`` guess types (the csv text "NA" becomes null, "007" becomes 7) and cannot say which
line is at fault. These take every value as it is written and name file and line of the first row that cannot
be read.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ..errors import InputError

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
#: of files that hold running text, without rows
TEXT_SUFFIX = ".txt"

#: (place in the file, {column: value})
Row = tuple[str, dict[str, Any]]


def read_rows(path: Path, argument: str) -> list[Row]:
    """All rows of a file as (place, {column: value}).

    The place is "line 7", counted from 1, or "row 7" of parquet and of the array under "data". Values of csv files are
    strings.

    Args:
        path: the file; its suffix says what it holds. A .json file is an array of objects, an object with
            such an array under "data", or JSON lines.
        argument: the option that named the file, for messages.

    Raises:
        InputError: the file is missing, empty or of another kind, or a row cannot be read.
    """
    readers = {".csv": _csv_rows, ".json": _json_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if path.suffix.lower() not in readers:
        raise InputError(f"{argument} {path}: unknown kind of file; pass one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"{argument} {path}: no such file; pass a file that exists")
    try:
        rows = list(readers[path.suffix.lower()](path, argument))
    except OSError as error:
        raise InputError(f"{argument} {path}: cannot be read ({error.strerror or error}); check the file") from error
    if not rows:
        raise InputError(f"{argument} {path}: is empty; pass a file with at least one row")
    return rows


def read_text(path: Path, argument: str) -> str:
    """The whole of a text file; InputError where it is missing, empty or not UTF-8."""
    if not path.is_file():
        raise InputError(f"{argument} {path}: no such file; pass a file that exists")
    try:
        text = "".join(line for _, line in _lines(path, argument))
    except OSError as error:
        raise InputError(f"{argument} {path}: cannot be read ({error.strerror or error}); check the file") from error
    if not text.strip():
        raise InputError(f"{argument} {path}: is empty; pass a file with text")
    return text


def bad_row(argument: str, path: Path, place: str, fault: str, remedy: str = "fix or remove the row") -> InputError:
    """The one-line error for a row."""
    return InputError(f"{argument} {path}: {place}: {fault}; {remedy}")


def _lines(path: Path, argument: str) -> Iterator[tuple[int, str]]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise bad_row(
                    argument, path, f"line {number}", f"not UTF-8 ({error.reason})", "save the file as UTF-8"
                ) from error
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _csv_rows(path: Path, argument: str) -> Iterator[Row]:
    reader = csv.reader((text for _, text in _lines(path, argument)), strict=True)
    header: list[str] = []
    while True:
        line = f"line {reader.line_num + 1}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise bad_row(argument, path, line, f"not valid csv ({error})") from error
        if not values:
            continue
        if not header:
            header = values
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated:
                raise bad_row(argument, path, line, f"column {repeated[0]!r} occurs twice", "rename one of the two")
        elif len(values) != len(header):
            raise bad_row(argument, path, line, f"{len(values)} fields, the header has {len(header)}")
        else:
            yield line, dict(zip(header, values, strict=True))


def _object(value: Any, path: Path, argument: str, place: str) -> Row:
    if not isinstance(value, dict):
        raise bad_row(argument, path, place, f"not a JSON object but a {type(value).__name__}")
    return place, value


def _jsonl_rows(path: Path, argument: str) -> Iterator[Row]:
    for line, text in _lines(path, argument):
        if text.strip():
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise bad_row(argument, path, f"line {line}", f"not valid JSON ({error.msg})") from error
            yield _object(value, path, argument, f"line {line}")


def _json_rows(path: Path, argument: str) -> Iterator[Row]:
    text = "".join(text for _, text in _lines(path, argument))
    first = text.lstrip()[:1]
    if first == "[":
        yield from _array_rows(text, text.index("["), path, argument)
        return
    try:
        value = json.loads(text) if first else {}
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _jsonl_rows(path, argument)
            return
        raise bad_row(argument, path, f"line {error.lineno}", f"not valid JSON ({error.msg})") from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        yield from (_object(row, path, argument, f"row {number}") for number, row in enumerate(value["data"], start=1))
    elif first:
        yield _object(value, path, argument, "line 1")


def _array_rows(text: str, start: int, path: Path, argument: str) -> Iterator[Row]:
    """Objects of a JSON array, decoded one by one so that each one's line is known."""
    decoder = json.JSONDecoder()
    line, counted = 1, 0

    def skip(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    at = skip(start + 1)
    closed = text[at : at + 1] == "]"
    at += closed
    while not closed:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise bad_row(argument, path, f"line {error.lineno}", f"not valid JSON ({error.msg})") from error
        yield _object(value, path, argument, f"line {line}")
        at = skip(end)
        separator = text[at : at + 1]
        if separator not in (",", "]"):
            line += text.count("\n", counted, at)
            raise bad_row(argument, path, f"line {line}", "not valid JSON (expected ',' or ']' after the object)")
        closed = separator == "]"
        at = skip(at + 1)
    if text[at:].strip():
        line = text.count("\n", 0, at) + 1
        raise bad_row(argument, path, f"line {line}", "not valid JSON (text after the array)")


def _parquet_rows(path: Path, argument: str) -> Iterator[Row]:
    if path.stat().st_size == 0:
        return
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{argument} {path}: not a readable parquet file ({reason}); write it again") from error
    yield from ((f"row {number}", row) for number, row in enumerate(table.to_pylist(), start=1))
