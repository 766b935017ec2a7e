"""Blocks exported to ONNX and run by ONNX Runtime on the CPU; `pip install .[onnx]`."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .cases import Case
from .problem import BlockProblem

PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def missing(case: Case) -> str | None:
    """Why a case cannot run, or None."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (pip install '.[onnx]')"
    return None if case.dtype == "float32" else "measured in float32 only"


class _Module(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def export(problem: BlockProblem) -> Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]:
    """Replaces a forward of ``problem`` by ONNX Runtime's of the same graph, with torch's number of threads."""

    def exported(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        import onnxruntime

        file = io.BytesIO()
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(_Module(forward).eval(), (problem.x[0],), dynamo=True, verbose=False)
        program.save(file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads would go on spinning after a run, into the time of the provider that comes next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])

    return exported
