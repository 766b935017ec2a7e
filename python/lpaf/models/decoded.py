"""Layers that stand in for dense ones: put into a model, described in a checkpoint, and made again from there.

A description is the entry that the configuration has for a module:

* ``{"rank", "kept"}``: a ``LowRankSparseLinear``;
* ``{"shared": NAME}``: a ``SharedLowRankLinear`` that has its ``down`` from module NAME;
* ``{"latent", "hidden", "bias", "norms"}``: a ``DecodedEmbedding`` or ``DecodedLinear``, or with ``"shared": NAME`` a
  ``DecodedLinear`` that has its decoder from module NAME;
* ``{"tied": NAME}``: the output layer that decodes the embeddings of module NAME.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lpaf_kernels import DecodedEmbedding, DecodedLinear, DecodedOutput, LowRankSparseLinear, SharedLowRankLinear

from .conv1d import features
from .modules import ModuleGroup

Entry = dict[str, Any]
#: what stands in for linears and embeddings
DECODED = (DecodedEmbedding, DecodedLinear)
#: what stands in for linears, and stores other numbers than their weights
STORED = (LowRankSparseLinear, DecodedLinear)


def put_in(model: nn.Module, group: ModuleGroup, decoded: Mapping[str, Any], joint: bool) -> None:
    """Replace the matrices of a group by what stands in for them, in place.

    Args:
        decoded: module name -> ``latent`` [n, k], ``layers`` and ``norms`` [n] or None, as
            :class:`~lpaf.factorize.autoencoder.Decoded` has them.
        joint: whether the first matrix stores the decoder of all.
    """
    owner = None
    for name, one in decoded.items():
        dense = model.get_submodule(name)
        like = dense.weight
        latent = one.latent.to(like)
        layers = [(weight.to(like), None if bias is None else bias.to(like)) for weight, bias in one.layers]
        norms = None if one.norms is None else one.norms.to(like)
        if group.embeds:
            layer = DecodedEmbedding.from_parts(latent, layers, norms, dense.padding_idx)
            replace_embeddings(model, name, layer)
            continue
        if len(layers) == 1 and norms is None and layers[0][1] is None:
            if owner is not None:
                layer = SharedLowRankLinear.of(owner, latent, dense.bias)
            else:
                layer = LowRankSparseLinear.from_factors(latent, layers[0][0], dense.bias)
        elif owner is not None:
            layer = DecodedLinear.from_parts(latent, owner, norms, dense.bias)
        else:
            layer = DecodedLinear.from_parts(latent, layers, norms, dense.bias)
        if joint and owner is None:
            owner = layer
        model.set_submodule(name, layer.train(dense.training))


def replace_embeddings(model: nn.Module, name: str, embedding: DecodedEmbedding) -> None:
    """Put ``embedding`` in place of the token embeddings ``name``, and an output layer that decodes it in place of one
    that was tied to them."""
    dense = model.get_submodule(name)
    output = output_layer(model)
    tied = output is not None and model.get_submodule(output).weight is dense.weight
    model.set_submodule(name, embedding.train(dense.training))
    if tied:
        tie_output(model, output, embedding)


def output_layer(model: nn.Module) -> str | None:
    """Name of the layer that gives every token's logits, None where there is none."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is output), None) if output else None


def tie_output(model: nn.Module, name: str, embedding: DecodedEmbedding) -> None:
    """Let the output layer ``name`` decode ``embedding``; transformers is to tie its weight no more, as it has none."""
    output = model.get_submodule(name)
    tied = DecodedOutput(embedding, output.bias)
    model.set_submodule(name, tied.train(output.training))
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        keys = getattr(model, attribute, None)
        if keys:
            setattr(model, attribute, {target: source for target, source in keys.items() if target != f"{name}.weight"})


def describe(model: nn.Module, relative: Mapping[nn.Module, str]) -> dict[str, Entry]:
    """Descriptions of all layers of ``model`` that stand in for dense ones, by their names in ``relative``."""
    entries = {module: _entry(module, relative) for module in model.modules()}
    return {relative[module]: entry for module, entry in entries.items() if entry is not None}


def _entry(module: nn.Module, names: Mapping[nn.Module, str]) -> Entry | None:
    if isinstance(module, SharedLowRankLinear):
        return {"shared": names[module.owner]}
    if isinstance(module, LowRankSparseLinear):
        return {"rank": module.rank, "kept": module.kept.numel()}
    if isinstance(module, DecodedOutput):
        return {"tied": names[module.embedding]}
    if isinstance(module, DecodedLinear) and module.owner is not None:
        return {"shared": names[module.owner], "norms": module.norms is not None}
    if isinstance(module, DECODED):
        widths = [layer.weight.shape[0] for layer in module.decoder]
        bias = module.decoder[0].bias is not None
        return {"latent": widths[0], "hidden": widths[1:], "bias": bias, "norms": module.norms is not None}
    return None


def depends(entry: Entry) -> bool:
    """Whether a description names a module that has to be made before."""
    return "shared" in entry or "tied" in entry


def make(entry: Entry, dense: nn.Module, owner: nn.Module | None) -> nn.Module:
    """The empty layer of a description in place of ``dense``, on its device and in its dtype.

    Args:
        owner: the layer that a description with "shared" or "tied" names.
    """
    like: dict[str, Any] = {"device": dense.weight.device, "dtype": dense.weight.dtype}
    if "tied" in entry:
        return DecodedOutput(owner, dense.bias)
    if "rank" in entry:
        bias = dense.bias is not None
        return LowRankSparseLinear(*features(dense), rank=entry["rank"], kept=entry.get("kept", 0), bias=bias, **like)
    if isinstance(dense, nn.Embedding):
        return DecodedEmbedding(*dense.weight.shape, *_sizes(entry), padding_idx=dense.padding_idx, **like)
    inputs, outputs = features(dense)
    if isinstance(owner, LowRankSparseLinear):
        return SharedLowRankLinear(owner, outputs, bias=dense.bias is not None, **like)
    if owner is not None:
        return DecodedLinear.sharing(owner, outputs, norms=entry["norms"], bias=dense.bias is not None, **like)
    latent, hidden, decoder_bias, norms = _sizes(entry)
    return DecodedLinear(
        inputs, outputs, latent, hidden, decoder_bias=decoder_bias, norms=norms, bias=dense.bias is not None, **like
    )


def _sizes(entry: Entry) -> tuple[int, Sequence[int], bool, bool]:
    return entry["latent"], entry["hidden"], entry["bias"], entry["norms"]


def tensor_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter and buffer of a module and what is in it."""
    return {name: tuple(tensor.shape) for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def stored_params(module: nn.Module) -> int:
    """Numbers that a layer stores in place of a dense weight: all but a linear's bias; what it shares counts with its
    owner."""
    tensors: dict[str, torch.Tensor] = dict((*module.named_parameters(), *module.named_buffers()))
    return sum(tensor.numel() for name, tensor in tensors.items() if name != "bias")
