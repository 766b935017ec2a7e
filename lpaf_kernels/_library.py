"""Operator schemas, native libraries and fallback registration.

Every operator of the namespace ``lpaf_kernels`` is declared here, in Python, so that the schemas exist
whether or not a native library was built. A native library registers implementations only. For every
(operator, dispatch key) that no native library serves, the operator's own module registers its implementation
through torch, see :func:`register_fallback`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

NAMESPACE = "lpaf_kernels"
DISABLE_NATIVE = "LPAF_KERNELS_DISABLE_NATIVE"

# The arguments of a feed-forward block.
_FFN = (
    "Tensor x, Tensor down1, Tensor up1, Tensor? kept1, Tensor? bias1, Tensor down2, Tensor up2,"
    " Tensor? kept2, Tensor? bias2, Tensor? down_gate, Tensor? up_gate, Tensor? bias_gate, Tensor? residual,"
    " Tensor? norm_weight, Tensor? norm_bias, str activation, str norm, float eps"
)
# Those of a self-attention block.
_ATTENTION = (
    "Tensor x, Tensor down_qkv, Tensor up_q, Tensor? kept_q, Tensor up_k, Tensor? kept_k, Tensor up_v,"
    " Tensor? kept_v, Tensor? bias_qkv, Tensor down_o, Tensor up_o, Tensor? kept_o, Tensor? bias_o,"
    " Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, Tensor? attn_mask, Tensor? cu_seqlens, Tensor? cos,"
    " Tensor? sin, int? max_seqlen, int num_heads, int num_kv_heads, bool is_causal, float scale, str norm, float eps"
)
# Those of an embedding that is decoded from latent rows: a layer's weight is [in, out], the last norms [vocab].
_DECODED = (
    "Tensor ids, Tensor latent, Tensor weight1, Tensor? bias1, Tensor? weight2, Tensor? bias2, Tensor? weight3,"
    " Tensor? bias3, Tensor? norms"
)
SCHEMAS = (
    f"decoded_embedding({_DECODED}, int padding_idx) -> Tensor",
    f"decoded_embedding_forward({_DECODED}) -> Tensor",
    f"decoded_embedding_backward(Tensor grad, {_DECODED}, int padding_idx, bool[8] needs) -> (Tensor d_latent,"
    " Tensor d_weight1, Tensor d_bias1, Tensor d_weight2, Tensor d_bias2, Tensor d_weight3, Tensor d_bias3,"
    " Tensor d_norms)",
    "keep_threshold(Tensor[] scores, float keep, bool across, Tensor[]? weights) -> (Tensor value, Tensor tie_index)",
    "masked_linear(Tensor x, Tensor weight, Tensor scores, Tensor value, Tensor tie_index, Tensor? bias) -> Tensor",
    "masked_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor scores, Tensor value,"
    " Tensor tie_index, bool[4] needs) -> (Tensor d_x, Tensor d_weight, Tensor d_scores, Tensor d_bias)",
    "masked_linear_weight(Tensor weight, Tensor scores, Tensor value, Tensor tie_index, ScalarType dtype) -> Tensor",
    "masked_linear_grads(Tensor grad_weight, Tensor weight, Tensor scores, Tensor value, Tensor tie_index)"
    " -> (Tensor d_weight, Tensor d_scores)",
    "masked_linear_pack(Tensor scores, Tensor value, Tensor tie_index) -> Tensor bits",
    "masked_linear_packed(Tensor x, Tensor weight, Tensor? scores, Tensor bits, int rows, int cols, Tensor? bias)"
    " -> Tensor",
    "masked_linear_packed_backward(Tensor grad, Tensor x, Tensor weight, Tensor bits, int rows, int cols,"
    " ScalarType scores_dtype, bool[4] needs)"
    " -> (Tensor d_x, Tensor d_weight, Tensor d_scores, Tensor d_bias)",
    "masked_linear_packed_weight(Tensor weight, Tensor bits, int rows, int cols, ScalarType dtype) -> Tensor",
    "masked_linear_packed_grads(Tensor grad_weight, Tensor weight, Tensor bits, int rows, int cols,"
    " ScalarType scores_dtype) -> (Tensor d_weight, Tensor d_scores)",
    "lowrank_sparse_linear(Tensor x, Tensor down, Tensor up, Tensor? kept, Tensor? bias, str activation,"
    " bool training) -> (Tensor y, Tensor z, Tensor pre)",
    "lowrank_sparse_linear_backward(Tensor grad, Tensor x, Tensor down, Tensor up, Tensor? kept, Tensor z,"
    " Tensor saved, str activation, bool[4] needs)"
    " -> (Tensor d_x, Tensor d_down, Tensor d_up, Tensor d_bias)",
    "lowrank_sparse_linear_forward(Tensor x, Tensor down, Tensor up, Tensor? kept, Tensor? bias, bool keep_z)"
    " -> (Tensor y, Tensor z)",
    "lowrank_sparse_linear_gradients(Tensor grad, Tensor x, Tensor down, Tensor up, Tensor? kept, Tensor z,"
    " bool needs_x, bool needs_down, bool needs_up, bool needs_bias)"
    " -> (Tensor d_x, Tensor d_down, Tensor d_up, Tensor d_bias)",
    f"lowrank_attention({_ATTENTION}) -> Tensor",
    f"lowrank_attention_forward({_ATTENTION}) -> Tensor",
    f"lowrank_ffn({_FFN}, bool training) -> Tensor",
    f"lowrank_ffn_forward({_FFN}) -> Tensor",
    f"lowrank_ffn_backward(Tensor grad, {_FFN}, bool[13] needs) -> (Tensor d_x, Tensor d_down1, Tensor d_up1,"
    " Tensor d_bias1, Tensor d_down2, Tensor d_up2, Tensor d_bias2, Tensor d_down_gate, Tensor d_up_gate,"
    " Tensor d_bias_gate, Tensor d_residual, Tensor d_norm_weight, Tensor d_norm_bias)",
    "weighted_svd(Tensor weight, SymInt rank, Tensor? row_weights) -> (Tensor a, Tensor b)",
    "accumulate_movement(Tensor(a!)[] scores, Tensor[] weights, Tensor[] grads, float lr) -> ()",
    "update_importance(Tensor(a!)[] importance, Tensor[] weights, Tensor[] grads, float beta) -> ()",
    "update_sensitivity(Tensor(a!)[] sensitivity, Tensor(b!)[] uncertainty, Tensor[] weights, Tensor[] grads,"
    " float beta1, float beta2) -> Tensor",
    "zero_pruned(Tensor(a!)[] weights, Tensor[] scores, Tensor[] values, Tensor[] tie_indices) -> ()",
    "sparsity_statistics(Tensor[] weights) -> Tensor",
)

library = torch.library.Library(NAMESPACE, "DEF")
for _schema in SCHEMAS:
    library.define(_schema)


def _load(file: Path, needed: bool, reason: str) -> str:
    """Load one native library and return its state in words."""
    if os.environ.get(DISABLE_NATIVE) == "1":
        return f"not loaded: {DISABLE_NATIVE}=1"
    if not needed:
        return f"not loaded: {reason}"
    if not file.is_file():
        return (
            f"not built: {file.name} is missing; reinstall lpaf-kernels where {reason} to build it,"
            " until then the operators run through torch"
        )
    try:
        torch.ops.load_library(file)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        return f"failed to load {file.name}: {reason}; rebuild lpaf-kernels for torch {torch.__version__}"
    return "loaded"


_here = Path(__file__).parent
NATIVE: dict[str, str] = {
    "cpu": _load(_here / "_ops_cpu.so", True, "a C++20 compiler is installed"),
    "cuda": _load(
        _here / "_ops_cuda.so",
        torch.version.cuda is not None,
        "nvcc is installed" if torch.version.cuda is not None else "this torch is built without CUDA",
    ),
}


def has_kernel(name: str, key: str) -> bool:
    """Whether operator ``name`` already has a kernel for dispatch key ``key``."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def register_fallback(name: str, kernel: Callable, keys: tuple[str, ...] = ("CPU", "CUDA")) -> None:
    """Register ``kernel`` for those of the dispatch ``keys`` of operator ``name`` that no native library serves."""
    for key in keys:
        if not has_kernel(name, key):
            library.impl(name, kernel, key)


def register_mutation(name: str, mutated: int) -> None:
    """Count a call of operator ``name`` as a change of the tensors in its first ``mutated`` arguments, all lists.

    Torch's own in-place operators do that; a backward that saved such a tensor then raises.
    """
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    def mutate(*arguments):
        for tensors in arguments[:mutated]:
            torch.autograd.graph.increment_version(tensors)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return operator(*arguments)

    library.impl(name, mutate, "ADInplaceOrView")


def register_autocast(name: str, cast: Callable) -> None:
    """Under autocast call operator ``name`` with ``cast(dtype, *arguments)`` in place of its arguments.

    ``torch.library.register_autocast`` casts every floating argument; masked_linear must not cast its scores.
    """

    def make(device_type: str, key: str) -> Callable:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def autocast(*arguments):
            arguments = cast(torch.get_autocast_dtype(device_type), *arguments)
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return getattr(getattr(torch.ops, NAMESPACE), name).default(*arguments)

        return autocast

    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        library.impl(name, make(device_type, key), key)
