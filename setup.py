"""Build lpaf-kernels: two Python packages and, where a compiler and torch are found, their native libraries.

CMakeLists.txt describes the native part; this file finds torch and nvcc, runs CMake with Ninja, and puts the
libraries beside the Python sources of ``lpaf_kernels`` (in the wheel, or in the source tree for an editable
install). Anything missing, or a build that fails, gives a pure-Python install and one warning line.

Environment variables
=====================

==================  ========================================================================================
``LPAF_NATIVE``     ``auto`` (default): build the libraries if possible. ``required``: fail where that is not
                    possible, and show the end of the failing log. ``off``: pure Python.
``LPAF_CUDA``       ``auto`` (default): build the CUDA library where nvcc is found. ``required``: fail without
                    it. ``off``: never build it.
``LPAF_TORCH_DIR``  The ``torch`` package directory to build against (it holds ``include`` and ``lib``).
                    Default: the torch that this interpreter would import.
``CUDACXX``         The nvcc to use. Default: the one on PATH, then that of ``$CUDA_HOME``, ``$CUDA_PATH`` or
                    /usr/local/cuda.
``CXX``             The C++20 compiler to use (read by CMake). Default: the system's.
``MAX_JOBS``        Number of parallel compiler processes. Default: the CPUs this process may use.
==================  ========================================================================================
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY_NAMES = re.compile(r"^_(native|ops_cpu|ops_cuda)\b.*\.(so|pyd)$")
LOG_TAIL_LINES = 40


class NativeBuildError(RuntimeError):
    """The native libraries cannot be built; ``log`` is what the failing tool printed."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log

    def explain(self) -> str:
        """Return the reason followed by the end of the log."""
        tail = "\n".join(self.log.rstrip().splitlines()[-LOG_TAIL_LINES:])
        return f"{self}\n{tail}" if tail else str(self)


def choice(name: str) -> str:
    """Return the value of the environment variable ``name``: ``auto``, ``required`` or ``off``."""
    value = os.environ.get(name, "auto").lower()
    if value not in ("auto", "required", "off"):
        raise SystemExit(f"{name}={value!r} is not one of auto, required, off")
    return value


def find_torch() -> Path:
    """Return the directory of the ``torch`` package without importing it.

    Looks at ``LPAF_TORCH_DIR``; without it, where this interpreter would import torch from, then in the
    interpreter's own site-packages (which an isolated build hides from the import system).
    """
    named = os.environ.get("LPAF_TORCH_DIR")
    if named:
        candidates = [Path(named)]
    else:
        spec = importlib.util.find_spec("torch")
        candidates = [Path(location) for location in (spec.submodule_search_locations or [])] if spec else []
        candidates.append(Path(sysconfig.get_path("platlib")) / "torch")
    for candidate in candidates:
        if (candidate / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            return candidate.resolve()
    looked = ", ".join(str(candidate) for candidate in candidates)
    raise NativeBuildError(f"no torch with the stable C++ interface in {looked}; LPAF_TORCH_DIR names one")


def find_tool(module: str, program: str) -> str:
    """Return the path of a build tool: its PyPI package's copy if installed, else the one on PATH."""
    spec = importlib.util.find_spec(module)
    scripts = [Path(sysconfig.get_path("scripts")), Path(sys.executable).parent]
    if spec is not None and spec.submodule_search_locations:
        scripts.insert(0, Path(next(iter(spec.submodule_search_locations))) / "data" / "bin")
    found = next((path for folder in scripts if (path := shutil.which(program, path=str(folder)))), None)
    found = found or shutil.which(program)
    if found is None:
        raise NativeBuildError(f"{program} was not found; pip install {module}")
    return found


def find_nvcc() -> str | None:
    """Return the path of nvcc, or None."""
    named = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if named:
        return named
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return next((path for home in homes if home and (path := shutil.which("nvcc", path=f"{home}/bin"))), None)


def parallel_jobs() -> int:
    """Return the number of compiler processes to run at once."""
    named = os.environ.get("MAX_JOBS", "")
    if named:
        if not named.isdigit() or int(named) < 1:
            raise SystemExit(f"MAX_JOBS={named!r} is not a positive integer")
        return int(named)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(command: list[str]) -> None:
    """Run ``command``, passing its output on; raise NativeBuildError with that output if it fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise NativeBuildError(f"{command[0]} could not be run: {error}") from error
    print(done.stdout, flush=True)
    if done.returncode != 0:
        step = "compile" if "--build" in command else "CMake configure"
        raise NativeBuildError(f"the native {step} step failed with status {done.returncode}", done.stdout)


def warn(message: str) -> None:
    """Print the one warning line of an incomplete build."""
    print(f"warning: lpaf-kernels: {message}", file=sys.stderr, flush=True)


class CMakeBuild(build_ext):
    """Build every native library with one CMake project."""

    def run(self) -> None:
        self._libraries: list[Path] = []
        native = choice("LPAF_NATIVE")
        try:
            built = self._build_with_cuda_if_possible(native)
        except NativeBuildError as error:
            if native == "required":
                raise SystemExit(f"lpaf-kernels: LPAF_NATIVE=required, but {error.explain()}") from error
            warn(f"installing pure Python, without native kernels: {error} (LPAF_NATIVE=required shows why)")
            built = []
        destination = self._destination()
        destination.mkdir(parents=True, exist_ok=True)
        for stale in destination.iterdir():
            if LIBRARY_NAMES.search(stale.name):
                stale.unlink()
        for library in built:
            # Renamed into place: a process that has the old library mapped keeps it.
            fresh = shutil.copy2(library, destination / f".{library.name}.new")
            self._libraries.append(Path(fresh).replace(destination / library.name))

    def _destination(self) -> Path:
        package = "lpaf_kernels"
        return ROOT / package if self.inplace or self.editable_mode else Path(self.build_lib) / package

    def _build_with_cuda_if_possible(self, native: str) -> list[Path]:
        cuda = choice("LPAF_CUDA")
        nvcc = None if cuda == "off" else find_nvcc()
        must_have_cuda = cuda == "required" or (native == "required" and nvcc is not None)
        if cuda == "required" and nvcc is None:
            raise SystemExit("lpaf-kernels: LPAF_CUDA=required, but nvcc was not found; CUDACXX names one")
        if nvcc is None:
            return self._build("cpu", None)
        try:
            return self._build("cuda", nvcc)
        except NativeBuildError as error:
            if must_have_cuda:
                raise SystemExit(f"lpaf-kernels: the CUDA kernels are required, but {error.explain()}") from error
            built = self._build("cpu", None)
            warn(f"installing without CUDA kernels: {error} (LPAF_CUDA=required shows why)")
            return built

    def _build(self, name: str, nvcc: str | None) -> list[Path]:
        torch = find_torch()
        cmake, ninja = find_tool("cmake", "cmake"), find_tool("ninja", "ninja")
        try:
            import pybind11
        except ImportError as error:
            raise NativeBuildError("pybind11 was not found; pip install pybind11") from error
        build = Path(self.build_temp).resolve() / f"native-{name}"
        output = build / "lib"
        # A configuration made by an isolated build names tools that are gone: start afresh.
        shutil.rmtree(build, ignore_errors=True)
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DLPAF_VERSION={self.distribution.get_version()}",
            f"-DLPAF_TORCH_DIR={torch}",
            f"-DLPAF_CUDA={'ON' if nvcc else 'OFF'}",
        ]
        if nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        run(configure)
        run([cmake, "--build", str(build), "--parallel", str(parallel_jobs())])
        return sorted(path for path in output.iterdir() if LIBRARY_NAMES.search(path.name))

    def get_source_files(self) -> list[str]:
        """Return the files that an sdist needs besides the Python sources."""
        files = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.is_file())
        return ["CMakeLists.txt", *map(str, files)]

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "lpaf_kernels"
        return [str(package / library.name) for library in getattr(self, "_libraries", [])]

    def get_output_mapping(self) -> dict[str, str]:
        if not (self.inplace or self.editable_mode):
            return {}
        return dict(zip(self.get_outputs(), (str(library) for library in self._libraries)))


def main() -> None:
    """Run setuptools; everything static is in pyproject.toml."""
    native_off = choice("LPAF_NATIVE") == "off"
    setup(
        # One extension stands for all libraries: it makes the wheel a platform wheel and runs build_ext.
        ext_modules=[] if native_off else [Extension("lpaf_kernels._native", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )


if __name__ == "__main__":
    main()
