"""Reload compressed checkpoints through plain transformers.

transformers rebuilds non-standard layers through a quantizer that it finds by
``config.quantization_config.quant_method``. Importing :mod:`lpaf` registers one under "lpaf":
``AutoModelFor*.from_pretrained(dir)`` then swaps every matrix named in the configuration for an (empty)
``LowRankSparseLinear`` before the weights are read.

transformers is lenient with quantized checkpoints (wrong shapes and missing tensors load silently), so the quantizer
checks both itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lpaf_kernels import LowRankPlusSparseLinear, LowRankSparseLinear, swap_linears

from ..errors import InputError
from .conv1d import features, use_linears
from .targets import encoder_linears

QUANT_METHOD = "lpaf"
FORMAT_VERSION = 1


@register_quantization_config(QUANT_METHOD)
class CompressionConfig(QuantizationConfigMixin):
    """What a compressed checkpoint needs to rebuild its layers; saved as ``quantization_config`` in config.json.

    Args:
        modules: matrix name, relative to the base model ("encoder.layer.0.attention.self.query"), -> {"rank", "kept"}.
        method: the ``--method`` that made the checkpoint, for information.
        rank: instead of ``modules``, for a dense checkpoint: factorise every encoder linear at this rank on the fly
            (plain truncated SVD, no retraining).
        keep: with ``rank``: share of output neurons whose residual is kept in S. Default: 0.
        format_version: version of this layout.
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, int]] | None = None,
        method: str | None = None,
        rank: int | None = None,
        keep: float = 0.0,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method: expected {QUANT_METHOD!r}, got {quant_method!r}")
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"format_version: this checkpoint has layout {format_version}, this lpaf reads up to {FORMAT_VERSION}; "
                "upgrade lpaf-kernels"
            )
        if (modules is None) == (rank is None):
            raise ValueError("CompressionConfig: pass exactly one of modules (a checkpoint's layout) and rank")
        self.quant_method = QUANT_METHOD
        self.modules = {name: dict(entry) for name, entry in modules.items()} if modules is not None else None
        self.method = method
        self.rank = rank
        self.keep = keep
        self.format_version = format_version


def base_name(model: nn.Module, name: str) -> str:
    """``name`` relative to the base model, so that a checkpoint loads under any head."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def compression_config(model: nn.Module, method: str | None) -> CompressionConfig:
    """The configuration that rebuilds the ``LowRankSparseLinear`` layers of ``model``.

    Raises InputError for a model that is still being pruned.
    """
    for name, module in model.named_modules():
        if isinstance(module, LowRankPlusSparseLinear):
            raise InputError(f"model: {name} still has a dense S; detach the pruner, then save")
    modules = {
        base_name(model, name): {"rank": module.rank, "kept": module.kept.numel()}
        for name, module in model.named_modules()
        if isinstance(module, LowRankSparseLinear)
    }
    return CompressionConfig(modules=modules, method=method)


@register_quantizer(QUANT_METHOD)
class CompressionQuantizer(HfQuantizer):
    """Swaps layers on the meta device before loading, checks them afterwards."""

    requires_calibration = False

    def _process_model_before_weight_loading(
        self, model: nn.Module, dtype: torch.dtype | None = None, **_: Any
    ) -> None:
        self._dtype = dtype
        if not self.pre_quantized:
            return
        config = self.quantization_config
        names = {base_name(model, name): name for name, _ in model.named_modules()}
        for relative, entry in config.modules.items():
            if relative not in names:
                raise InputError(
                    f"model: the checkpoint compresses {relative!r}, which {type(model).__name__} does not have; "
                    "its config.json does not belong to this model class"
                )
            name = names[relative]
            linear = model.get_submodule(name)
            model.set_submodule(
                name,
                LowRankSparseLinear(
                    *features(linear),
                    rank=entry["rank"],
                    kept=entry.get("kept", 0),
                    bias=linear.bias is not None,
                    device=linear.weight.device,
                    dtype=linear.weight.dtype,
                ),
            )

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        if not self.pre_quantized:
            config = self.quantization_config
            use_linears(model)
            swap_linears(model, rank=config.rank, keep=config.keep, names=list(encoder_linears(model)))
            self.quantization_config = compression_config(model, method="svd")
            model.config.quantization_config = self.quantization_config
            self.pre_quantized = True
            return model
        modules = self.quantization_config.modules
        for name, module in model.named_modules():
            if isinstance(module, LowRankSparseLinear):
                self._check_loaded(name, module, modules[base_name(model, name)])
                if self._dtype is not None:
                    module.to(self._dtype)
        return model

    @staticmethod
    def _check_loaded(name: str, module: LowRankSparseLinear, entry: Mapping[str, int]) -> None:
        rank, kept = entry["rank"], entry.get("kept", 0)
        expected = {
            "down": (rank + kept, module.in_features),
            "up": (rank, module.out_features),
            "bias": (module.out_features,),
            "kept": (kept,),
        }
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for key, tensor in tensors.items():
            if tuple(tensor.shape) != expected[key]:
                raise InputError(
                    f"model: tensor {name}.{key} has shape {list(tensor.shape)}, its configuration asks for "
                    f"{list(expected[key])}; the checkpoint's weights and config.json do not belong together"
                )
            if tensor.numel() and not getattr(tensor, "_is_hf_initialized", False):
                raise InputError(f"model: tensor {name}.{key} is missing from the checkpoint; it was not saved whole")
        if kept:
            module.check_kept()

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Every compressed tensor is an ordinary parameter: the Trainer may train a reloaded model."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True
