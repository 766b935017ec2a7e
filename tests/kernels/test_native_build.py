"""The native build: what it reports, how setup.py finds torch, how it fails, what the libraries depend on."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

import lpaf_kernels

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(lpaf_kernels.__file__).parent
LIBRARIES = ("_ops_cpu.so", "_ops_cuda.so")


def library(name: str) -> Path:
    path = PACKAGE / name
    if not path.is_file():
        pytest.skip(f"{name} was not built")
    return path


def program(*names: str) -> str:
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    return found


@pytest.fixture
def native():
    return pytest.importorskip("lpaf_kernels._native", reason="the native libraries were not built")


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py as a module, with none of its environment variables set."""
    pytest.importorskip("setuptools")
    for name in (
        "LPAF_NATIVE",
        "LPAF_CUDA",
        "LPAF_TORCH_DIR",
        "CUDACXX",
        "CUDA_HOME",
        "CUDA_PATH",
        "MAX_JOBS",
    ):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("lpaf_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source_tree(tmp_path):
    """A copy of the files that a build reads, without any library built in place."""
    pytest.importorskip("setuptools")
    tree = tmp_path / "source"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for name in ("csrc", "lpaf_kernels", "python"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    return tree


def run_setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    cleared = {name: value for name, value in os.environ.items() if not name.startswith("LPAF_")}
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=tree, env=cleared | environment, capture_output=True, text=True)


def warnings_of(done: subprocess.CompletedProcess) -> list[str]:
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if line.startswith("warning: lpaf-kernels:")]


def libraries_in(tree: Path) -> list[Path]:
    return [path for path in tree.rglob("*") if path.suffix in (".so", ".pyd")]


# build_info and the host helpers


def test_build_info_describes_the_build(native):
    info = native.build_info()
    assert list(info) == [
        "version",
        "compiler",
        "cpp_standard",
        "torch_version",
        "torch_stable_abi_floor",
        "isa_levels",
        "cuda_version",
        "cuda_archs",
    ]
    assert info["version"] == lpaf_kernels.__version__
    assert re.match(r"\w+ \d+\.\d+", info["compiler"])
    assert info["cpp_standard"] >= 202002
    assert re.match(r"\d+\.\d+", info["torch_version"])
    assert info["torch_stable_abi_floor"] == "2.10"
    assert info["isa_levels"]
    if (PACKAGE / "_ops_cuda.so").exists():
        assert re.match(r"\d+\.\d+", info["cuda_version"])
        assert info["cuda_archs"] == ["sm_80", "sm_90", "sm_100", "compute_100"]
    else:
        assert info["cuda_version"] is None
        assert info["cuda_archs"] is None


@pytest.mark.parametrize("threads", [1, 3])
def test_host_keep_threshold_is_exact(native, threads):
    import numpy as np

    scores = np.random.default_rng(0).integers(-50, 50, size=100_003).astype(np.float32)
    scores[::7] = -0.0
    for keep in (0.001, 0.5, 0.9):
        kept = int(keep * scores.size + 0.5)
        last = np.argsort(-scores, kind="stable")[kept - 1]
        value, tie_index = native.keep_threshold(scores, keep, threads=threads)
        assert (value, tie_index) == (scores[last], last + 1)
    assert native.keep_threshold(scores, 0.0) == (float("inf"), 0)
    assert native.keep_threshold(scores, 1.0) == (float("-inf"), scores.size)


def test_host_keep_threshold_refuses_bad_input(native):
    import numpy as np

    with pytest.raises(TypeError, match="float32"):
        native.keep_threshold(np.zeros(3), 0.5)
    with pytest.raises(ValueError, match=r"share in \[0, 1\]"):
        native.keep_threshold(np.zeros(3, np.float32), 1.5)
    with pytest.raises(ValueError, match="threads is 0"):
        native.keep_threshold(np.zeros(3, np.float32), 0.5, threads=0)
    with pytest.raises(ValueError, match="contiguous"):
        native.keep_threshold(np.zeros((3, 4), np.float32).T, 0.5)
    with pytest.raises(ValueError, match="NaN"):
        native.keep_threshold(np.array([1, np.nan], np.float32), 0.5)


# How setup.py finds its tools


def fake_torch(folder: Path) -> Path:
    header = folder / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    return folder / "torch"


def test_finds_the_installed_torch_without_importing_it():
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('lpaf_setup', 'setup.py')\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.find_torch(), 'torch' in sys.modules)\n"
    )
    pytest.importorskip("setuptools")
    environment = {name: value for name, value in os.environ.items() if name != "LPAF_TORCH_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    found, imported = done.stdout.split()
    expected = Path(importlib.util.find_spec("torch").origin).parent
    assert (Path(found), imported) == (expected.resolve(), "False")


def test_named_torch_comes_first(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("LPAF_TORCH_DIR", str(fake_torch(tmp_path)))
    assert setup_py.find_torch() == (tmp_path / "torch").resolve()


def test_isolated_build_finds_torch_in_site_packages(setup_py, monkeypatch, tmp_path):
    torch = fake_torch(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert setup_py.find_torch() == torch.resolve()


def test_missing_torch_says_where_it_looked(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("LPAF_TORCH_DIR", str(tmp_path))
    with pytest.raises(setup_py.NativeBuildError, match=f"{re.escape(str(tmp_path))}.*LPAF_TORCH_DIR"):
        setup_py.find_torch()


def test_nvcc_named_by_the_environment_comes_first(setup_py, monkeypatch):
    monkeypatch.setenv("CUDACXX", "/somewhere/nvcc")
    assert setup_py.find_nvcc() == "/somewhere/nvcc"


def test_jobs_are_limited_by_the_cpus(setup_py, monkeypatch):
    assert 1 <= setup_py.parallel_jobs() <= os.cpu_count()
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup_py.parallel_jobs() == 3


@pytest.mark.parametrize(("name", "value"), [("LPAF_NATIVE", "yes"), ("LPAF_CUDA", "1"), ("MAX_JOBS", "0")])
def test_bad_environment_value_is_named(source_tree, name, value):
    done = run_setup(source_tree, "build", **{"LPAF_CUDA": "off", name: value})
    assert done.returncode != 0
    assert f"{name}='{value}'" in done.stderr
    assert "Traceback" not in done.stderr


# Builds that cannot be native


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"LPAF_TORCH_DIR": "/nonexistent"}, "no torch"),
        ({"CXX": "/nonexistent/c++"}, "configure step failed"),
    ],
    ids=["no torch", "no compiler"],
)
def test_pure_python_build_has_one_warning(source_tree, environment, reason):
    done = run_setup(source_tree, "build", LPAF_CUDA="off", **environment)
    assert done.returncode == 0, done.stderr
    (warning,) = warnings_of(done)
    assert "pure Python" in warning
    assert reason in warning
    assert any((source_tree / "build").glob("lib*/lpaf_kernels/__init__.py"))
    assert not libraries_in(source_tree)

    done = run_setup(source_tree, "build", LPAF_CUDA="off", LPAF_NATIVE="required", **environment)
    assert done.returncode != 0
    assert reason in done.stderr


def test_required_build_shows_the_end_of_the_failing_log(source_tree):
    (source_tree / "csrc" / "native.cpp").write_text("#error this line must be shown\n")
    for name in ("keep_threshold.cpp", "masked_linear.cpp", "pruning_updates.cpp"):
        (source_tree / "csrc" / "cpu" / name).write_text("")
    program("c++", "g++", "clang++")
    done = run_setup(source_tree, "build", LPAF_CUDA="off", LPAF_NATIVE="required")
    assert done.returncode != 0
    assert "compile step failed" in done.stderr
    assert "this line must be shown" in done.stderr


def test_failed_build_leaves_no_stale_library(source_tree):
    stale = source_tree / "lpaf_kernels" / "_ops_cpu.so"
    stale.touch()
    done = run_setup(source_tree, "build_ext", "--inplace", LPAF_CUDA="off", LPAF_TORCH_DIR="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert not stale.exists()


def test_switched_off_build_is_silent(source_tree):
    done = run_setup(source_tree, "build", LPAF_NATIVE="off")
    assert done.returncode == 0, done.stderr
    assert warnings_of(done) == []
    assert not libraries_in(source_tree)


def test_source_distribution_can_be_built_from(source_tree):
    done = run_setup(source_tree, "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (source_tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    native = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert native | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} <= names
    assert {"lpaf_kernels/__init__.py", "python/lpaf/__init__.py"} <= names


@pytest.mark.slow
def test_native_build_from_a_copy(source_tree):
    program("c++", "g++", "clang++")
    done = run_setup(source_tree, "build", LPAF_CUDA="off", LPAF_NATIVE="required")
    assert done.returncode == 0, done.stderr
    built = {path.name.partition(".")[0] for path in (source_tree / "build").glob("lib*/lpaf_kernels/*.so")}
    assert built == {"_native", "_ops_cpu"}
    assert warnings_of(done) == []


# What the built libraries depend on


@pytest.mark.parametrize("name", LIBRARIES)
def test_only_the_stable_interface_of_torch_is_used(name):
    path = library(name)
    done = subprocess.run([program("nm"), "-D", "--undefined-only", path], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1].partition("@")[0] for line in done.stdout.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    unstable = [symbol for symbol in symbols if re.match(r"_ZN?K?S?t?\d*(at|c10|torch|caffe2)", symbol)]
    unstable += [symbol for symbol in symbols if "torch" in symbol and not re.match(r"(aoti_)?torch_", symbol)]
    assert unstable == []


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_hold_no_path_of_the_build_machine(name):
    path = library(name)
    done = subprocess.run([program("readelf"), "-d", path], capture_output=True, text=True, check=True)
    assert "RUNPATH" not in done.stdout
    assert "RPATH" not in done.stdout
    assert str(ROOT).encode() not in path.read_bytes()


def test_cuda_library_loads_without_a_gpu():
    path = library("_ops_cuda.so")
    code = (
        "import sys, torch\n"
        "library = torch.library.Library('lpaf_kernels', 'DEF')\n"
        "library.define('masked_linear_weight(Tensor weight, Tensor scores, Tensor value,'\n"
        "               ' Tensor tie_index, ScalarType dtype) -> Tensor')\n"
        "library.define('keep_threshold(Tensor[] scores, float keep, bool across, Tensor[]? weights)'\n"
        "               ' -> (Tensor value, Tensor tie_index)')\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "for name in ('masked_linear_weight', 'keep_threshold'):\n"
        "    print(torch._C._dispatch_has_kernel_for_dispatch_key('lpaf_kernels::' + name, 'CUDA'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_cuda_kernels_use_no_stack():
    path = library("_ops_cuda.so")
    tool = program("cuobjdump")
    done = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    stacks = re.findall(r"STACK:(\d+)", done.stdout)
    assert stacks
    assert set(stacks) == {"0"}
    assert {"sm_80", "sm_90", "sm_100"} <= set(re.findall(r"sm_\d+", done.stdout))


@pytest.mark.slow
def test_build_refuses_a_cuda_kernel_with_a_stack(source_tree):
    """Where cuobjdump is not installed this is the proof: the compiler flags make a stack an error."""
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        pytest.skip("nvcc is not installed")
    for name in ("masked_linear.cpp", "keep_threshold.cpp", "pruning_updates.cpp"):
        (source_tree / "csrc" / "cpu" / name).write_text("")
    for name in ("keep_threshold.cu", "pruning_updates.cu"):
        (source_tree / "csrc" / "cuda" / name).write_text("")
    (source_tree / "csrc" / "cuda" / "masked_linear.cu").write_text(
        "__global__ void kernel(const int* index, float* out) {\n"
        "    float local[64];\n"
        "    for (int i = 0; i < 64; ++i) local[index[i] & 63] = static_cast<float>(i);\n"
        "    out[threadIdx.x] = local[index[threadIdx.x] & 63];\n"
        "}\n"
    )
    done = run_setup(source_tree, "build", LPAF_NATIVE="required")
    assert done.returncode != 0
    assert "local memory" in done.stderr.lower()
