"""Compile kernels for any NVIDIA architecture, without a GPU, and read what the assembler made of them.

The host code of an operator runs on meta tensors and its launches are recorded (:func:`.launch.recording`); each is
compiled with exactly the specialisations (alignments, sizes of 1) that a real launch would have.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .launch import Call

# Bytes of shared memory that one program may use (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
INSTRUCTIONS = {"mma.sync": r"\bmma\.sync", "wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma"}
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses.

    ``registers`` per thread, ``stack`` bytes per thread (anything spilled), ``shared`` bytes per program, and which
    matrix ``instructions`` its PTX holds.
    """

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    instructions: tuple[str, ...]

    def faults(self, instruction: str | None = None) -> list[str]:
        """Why this kernel must not ship: stack, shared memory beyond the limit, the ``instruction`` missing."""
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of stack")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, the limit is {SHARED_LIMIT[self.arch]}")
        if instruction is not None and instruction not in self.instructions:
            found.append(f"expected {instruction}, found {', '.join(self.instructions) or 'no matrix instruction'}")
        return found


def specialisation(call: Call) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list]]:
    """(signature, constants, attributes) of ``call``, as triton's launcher would specialise them."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(call.constants)
    attributes: dict[tuple[int, ...], list] = {}
    for index, (name, value) in enumerate(zip(call.kernel.arg_names, call.arguments)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif value == 1:
            signature[name] = "constexpr"
            constants[name] = 1
            continue
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    for name in call.constants:
        signature[name] = "constexpr"
    return {name: signature[name] for name in call.kernel.arg_names}, constants, attributes


def compile_call(call: Call, arch: int) -> Resources:
    """Compile one recorded launch for compute capability ``arch`` (80, 90 or 100)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialisation(call)
    source = ASTSource(call.kernel, signature, constants, attributes)
    options = {"num_warps": call.num_warps, "num_stages": call.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack = _usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    instructions = tuple(name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, ptx))
    return Resources(call.kernel.__name__, arch, registers, stack, compiled.metadata.shared, instructions)


def compile_calls(calls: Iterable[Call], archs: Iterable[int] = (80, 90, 100)) -> Iterator[tuple[Call, Resources]]:
    """Every call compiled for every architecture, equal ones once."""
    seen = set()
    for call in calls:
        signature, constants, attributes = specialisation(call)
        key = repr((call.kernel.__name__, signature, constants, attributes, call.num_warps, call.num_stages))
        if key in seen:
            continue
        seen.add(key)
        for arch in archs:
            yield call, compile_call(call, arch)


@cache
def _cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread of the one kernel in ``cubin``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(found[1]), int(found[2])
