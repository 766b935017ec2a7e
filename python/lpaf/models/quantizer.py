"""Reload compressed checkpoints through plain transformers.

transformers rebuilds non-standard layers through a quantizer that it finds by
``config.quantization_config.quant_method``. Importing :mod:`lpaf` registers one under "lpaf":
``AutoModelFor*.from_pretrained(dir)`` then swaps every matrix named in the configuration for an (empty)
``LowRankSparseLinear`` before the weights are read.

transformers is lenient with quantized checkpoints (wrong shapes and missing tensors load silently), so the quantizer
checks both itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lpaf_kernels import LowRankPlusSparseLinear, LowRankSparseLinear, swap_linears

from ..errors import InputError
from .blocks import Sizes, removable_layers, removed_sizes
from .conv1d import use_linears
from .decoded import depends, describe, make, tensor_shapes, tie_output
from .t5 import leave_out_casts
from .targets import encoder_linears

QUANT_METHOD = "lpaf"
#: 2: parts of layers are gone; 3: layers with decoders, or that share what another stores
FORMAT_VERSION = 3
#: bytes to a multiple of which torch aligns its tensors on the CPU
ALIGNMENT = 64


@register_quantization_config(QUANT_METHOD)
class CompressionConfig(QuantizationConfigMixin):
    """What a compressed checkpoint needs to rebuild its layers; saved as ``quantization_config`` in config.json.

    Args:
        modules: module name, relative to the base model ("encoder.layer.0.attention.self.query"), -> its description
            (:mod:`.decoded`), such as {"rank", "kept"}.
        method: the ``--method`` that made the checkpoint, for information.
        rank: instead of ``modules``, for a dense checkpoint: factorise every encoder linear at this rank on the fly
            (plain truncated SVD, no retraining).
        keep: with ``rank``: share of output neurons whose residual is kept in S. Default: 0.
        format_version: version of this layout. Default: the first that has what is asked for.
        layers: layer name, relative to the base model -> [attention heads, feed-forward neurons] that it has left, 0
            where the block is gone; for layers that have less than the configuration says. Default: none.
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        method: str | None = None,
        rank: int | None = None,
        keep: float = 0.0,
        format_version: int | None = None,
        quant_method: str = QUANT_METHOD,
        layers: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method: expected {QUANT_METHOD!r}, got {quant_method!r}")
        if format_version is None:
            decoded = any("rank" not in entry for entry in (modules or {}).values())
            format_version = 3 if decoded else 2 if layers else 1
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
        self.layers = {name: list(sizes) for name, sizes in (layers or {}).items()}

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: layout 1 has no ``layers``."""
        written = super().to_dict()
        if not self.layers:
            del written["layers"]
        return written


def base_name(model: nn.Module, name: str) -> str:
    """``name`` relative to the base model, so that a checkpoint loads under any head."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def remove_parts(model: nn.Module, config: CompressionConfig) -> None:
    """Remove from the layers of a dense ``model`` what ``config`` says they lack, or InputError."""
    found = {base_name(model, layer.name): layer for layer in removable_layers(model)} if config.layers else {}
    for name, (heads, neurons) in config.layers.items():
        sizes = found[name].sizes if name in found else Sizes(0, 0)
        if not (0 <= heads <= sizes.heads and 0 <= neurons <= sizes.neurons):
            raise InputError(
                f"model: the checkpoint has {heads} heads and {neurons} neurons in {name!r}, which "
                f"{type(model).__name__} does not have; its config.json does not belong to this model class"
            )
        found[name].shrink(Sizes(heads, neurons))


def compression_config(model: nn.Module, method: str | None) -> CompressionConfig:
    """The configuration that rebuilds the compressed layers of ``model`` and leaves out what it lacks.

    Raises InputError for a model that is still being pruned.
    """
    for name, module in model.named_modules():
        if isinstance(module, LowRankPlusSparseLinear):
            raise InputError(f"model: {name} still has a dense S; detach the pruner, then save")
    modules = describe({module: base_name(model, name) for name, module in model.named_modules()})
    layers = {base_name(model, name): list(sizes) for name, sizes in removed_sizes(model).items()}
    return CompressionConfig(modules=modules, method=method, layers=layers)


@torch.no_grad()
def align(model: nn.Module) -> None:
    """Move the tensors of ``model`` on the CPU to addresses that torch's own have.

    Loaded ones lie as they do in the file, and a product of matrices rounds by how its operands are aligned: the
    reloaded model is to give the logits, bit for bit, of the one that was saved.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


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
        remove_parts(model, config)
        names = {base_name(model, name): name for name, _ in model.named_modules()}
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        made: dict[str, nn.Module] = {}
        for relative, entry in sorted(config.modules.items(), key=lambda item: depends(item[1])):
            if "tied" in entry and relative not in names:
                continue  # an output layer, which the base model and other heads do not have
            if relative not in names:
                raise InputError(
                    f"model: the checkpoint compresses {relative!r}, which {type(model).__name__} does not have; "
                    "its config.json does not belong to this model class"
                )
            name = names[relative]
            if "tied" in entry:
                tie_output(model, name, made[entry["tied"]])
            else:
                layer = make(entry, model.get_submodule(name), made.get(entry.get("shared")))
                model.set_submodule(name, layer)
            made[relative] = model.get_submodule(name)
            self._shapes[name] = tensor_shapes(made[relative])
        leave_out_casts(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        if not self.pre_quantized:
            config = self.quantization_config
            use_linears(model)
            swap_linears(model, rank=config.rank, keep=config.keep, names=list(encoder_linears(model)))
            leave_out_casts(model)
            self.quantization_config = compression_config(model, method="svd")
            model.config.quantization_config = self.quantization_config
            self.pre_quantized = True
            return model
        for name, shapes in self._shapes.items():
            module = model.get_submodule(name)
            self._check_tensors(name, module, shapes)
            if isinstance(module, LowRankSparseLinear) and module.kept.numel():
                module.check_kept()
            if self._dtype is not None:
                module.to(self._dtype)
        for layer in removable_layers(model) if self.quantization_config.layers else ():
            for role in layer.roles:
                linear = layer.linear(role)
                if isinstance(linear, nn.Linear):
                    shape = linear.out_features, linear.in_features
                    self._check_tensors(
                        f"{layer.name}.{layer.roles[role]}", linear, {"weight": shape, "bias": shape[:1]}
                    )
        align(model)
        return model

    @staticmethod
    def _check_tensors(name: str, module: nn.Module, expected: Mapping[str, tuple[int, ...]]) -> None:
        tensors = dict((*module.named_parameters(), *module.named_buffers()))
        for key, tensor in tensors.items():
            if tuple(tensor.shape) != expected[key]:
                raise InputError(
                    f"model: tensor {name}.{key} has shape {list(tensor.shape)}, its configuration asks for "
                    f"{list(expected[key])}; the checkpoint's weights and config.json do not belong together"
                )
            if tensor.numel() and not getattr(tensor, "_is_hf_initialized", False):
                raise InputError(f"model: tensor {name}.{key} is missing from the checkpoint; it was not saved whole")

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
