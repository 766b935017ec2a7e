"""The public surface and what importing needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lpaf_kernels
from lpaf_kernels import _library

PUBLIC = [
    "DecodedEmbedding",
    "DecodedLinear",
    "DecodedOutput",
    "GraphRunner",
    "KeepThreshold",
    "LowRankAttention",
    "LowRankFFN",
    "LowRankPlusSparseLinear",
    "LowRankSparseLinear",
    "MaskedLinear",
    "MixedRankLinear",
    "Norm",
    "PackedMask",
    "SharedDecodedLinear",
    "SharedLowRankLinear",
    "__version__",
    "accumulate_movement_",
    "build_info",
    "clear_paths",
    "decoded_embedding",
    "draw_paths",
    "explain",
    "fold_kept",
    "fuse",
    "keep_threshold",
    "lowrank_attention",
    "lowrank_ffn",
    "lowrank_sparse_linear",
    "masked_linear",
    "packed_lowrank_sparse_linear",
    "set_thresholds",
    "sparsity_statistics",
    "swap_linears",
    "unfuse",
    "update_importance_",
    "update_sensitivity_",
    "use_provider",
    "weighted_singular_values",
    "weighted_svd",
    "zero_pruned_",
]


def run_python(code: str, **environment: str) -> str:
    root = str(Path(lpaf_kernels.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_is_locked():
    assert sorted(lpaf_kernels.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(lpaf_kernels, name) is not None
        if name != "__version__":
            assert getattr(lpaf_kernels, name).__doc__


def test_every_schema_is_an_operator():
    for schema in _library.SCHEMAS:
        name = schema.partition("(")[0]
        assert getattr(torch.ops.lpaf_kernels, name).default is not None
        for key in ("CPU", "CUDA"):
            assert _library.has_kernel(name, key)


def test_build_info():
    info = lpaf_kernels.build_info()
    assert info["version"] == lpaf_kernels.__version__
    assert info["torch"] == torch.__version__
    assert set(info["native"]) == {"cpu", "cuda"}
    assert (info["build"] is None) == ("build_missing" in info)


def test_import_needs_only_torch():
    blocked = ["triton", "transformers", "numpy", "datasets", "pybind11", "lpaf_kernels._native"]
    out = run_python(
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "import lpaf_kernels, torch\n"
        "layer = lpaf_kernels.LowRankSparseLinear.from_linear(torch.nn.Linear(8, 6), rank=2, keep=0.5)\n"
        "layer(torch.ones(3, 8)).sum().backward()\n"
        "info = lpaf_kernels.build_info()\n"
        "assert info['build'] is None and 'reinstall' in info['build_missing'], info\n"
        "print('ok')"
    )
    assert out.strip() == "ok"


def test_native_can_be_disabled():
    out = run_python("import lpaf_kernels; print(lpaf_kernels.build_info()['native'])", LPAF_KERNELS_DISABLE_NATIVE="1")
    assert out.count("LPAF_KERNELS_DISABLE_NATIVE=1") == 2


@pytest.mark.skipif(_library.NATIVE["cpu"] != "loaded", reason="the fallbacks are what the other tests already run")
def test_fallbacks_pass_the_same_tests():
    files = [
        str(Path(__file__).with_name(f"test_{stem}.py"))
        for stem in ("decoded_embedding", "keep_threshold", "masked_linear", "pruning_updates")
    ]
    out = run_python(
        "import pytest\n"
        f"code = pytest.main(['-q', '-p', 'no:cacheprovider', *{files!r}])\n"
        "print('failed' if code else 'passed')",
        LPAF_KERNELS_DISABLE_NATIVE="1",
    )
    assert out.rstrip().endswith("\npassed"), out


def test_a_broken_library_is_reported_not_raised(tmp_path, monkeypatch):
    monkeypatch.delenv(_library.DISABLE_NATIVE, raising=False)
    broken = tmp_path / "_ops_cpu.so"
    broken.write_bytes(b"not a library")
    assert "failed to load _ops_cpu.so" in _library._load(broken, True, "a compiler is installed")
    missing = _library._load(tmp_path / "absent.so", True, "a compiler is installed")
    assert "absent.so is missing" in missing
    assert "a compiler is installed" in missing
    assert _library._load(broken, False, "no CUDA here") == "not loaded: no CUDA here"
