"""Layers that stand in for dense ones: put into a model, described in a checkpoint, and made again from there.

A description is the entry that the configuration has for a module:

* ``{"rank", "kept"}``: a ``LowRankSparseLinear``;
* ``{"shared": NAME}``: a ``SharedLowRankLinear`` that has its ``down`` from module NAME;
* ``{"latent", "hidden", "bias", "norms"}``: a ``DecodedEmbedding`` or ``DecodedLinear``;
* ``{"shared": NAME, "norms"}``: a ``SharedDecodedLinear`` that has its decoder from module NAME;
* ``{"sparse"}``, ``{"kronecker"}``, ``{"tucker"}``, the last two also with ``"shared": NAME``: a
  ``ReconstructedEmbedding`` or ``ReconstructedLinear`` of that source;
* ``{"tied": NAME}``: the output layer that decodes the embeddings of module NAME.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lpaf_kernels import (
    DecodedEmbedding,
    DecodedLinear,
    DecodedOutput,
    LowRankSparseLinear,
    SharedDecodedLinear,
    SharedLowRankLinear,
)

from .conv1d import features
from .reconstructed import (
    RECONSTRUCTED,
    SOURCES,
    ReconstructedEmbedding,
    ReconstructedLinear,
    ReconstructedOutput,
    Source,
    make_source,
)

Entry = dict[str, Any]
#: what stands in for linears and embeddings
DECODED = (DecodedEmbedding, DecodedLinear)
#: what stands in for linears, and stores other numbers than their weights
STORED = (LowRankSparseLinear, DecodedLinear, ReconstructedLinear)


def build_layers(model: nn.Module, parts: Mapping[str, Any], joint: bool) -> dict[str, nn.Module]:
    """The layers that are to take the places of dense ones; ``model`` stays as it is.

    Args:
        parts: module name -> what stands in for its weight: a :class:`~.reconstructed.Source`, or ``latent`` [n, k],
            ``layers`` and ``norms`` [n] or None, as :class:`~lpaf.factorize.autoencoder.Decoded` has them.
        joint: whether the first matrix stores the decoder of all.
    """
    layers: dict[str, nn.Module] = {}
    for name, part in parts.items():
        dense = model.get_submodule(name)
        owner = next(iter(layers.values()), None) if joint else None
        if isinstance(part, Source):
            embeds = isinstance(dense, nn.Embedding)
            source = part.to(dense.weight)
            layers[name] = (
                ReconstructedEmbedding(source, dense.padding_idx) if embeds else ReconstructedLinear(source, dense.bias)
            )
        else:
            layers[name] = _decoded_layer(part, dense, owner)
    return layers


def _decoded_layer(part: Any, dense: nn.Module, owner: nn.Module | None) -> nn.Module:
    like = dense.weight
    latent = part.latent.to(like)
    decoder = [(weight.to(like), None if bias is None else bias.to(like)) for weight, bias in part.layers]
    norms = None if part.norms is None else part.norms.to(like)
    if isinstance(dense, nn.Embedding):
        return DecodedEmbedding.from_parts(latent, decoder, norms, dense.padding_idx)
    if isinstance(owner, LowRankSparseLinear):
        return SharedLowRankLinear.of(owner, latent, dense.bias)
    if len(decoder) == 1 and norms is None and decoder[0][1] is None:
        return LowRankSparseLinear.from_factors(latent, decoder[0][0], dense.bias)
    bias = None if dense.bias is None else dense.bias.detach().clone()
    if isinstance(owner, DecodedLinear):
        return SharedDecodedLinear.of(owner, latent, norms, bias)
    return DecodedLinear.from_parts(latent, decoder, norms, bias)


def install(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put ``layers`` in the places of dense ones, in place."""
    for name, layer in layers.items():
        dense = model.get_submodule(name)
        if isinstance(dense, nn.Embedding):
            replace_embeddings(model, name, layer)
        else:
            model.set_submodule(name, layer.train(dense.training))


def remake(model: nn.Module, entries: Mapping[str, Entry], tensors: Mapping[str, torch.Tensor]) -> dict[str, nn.Module]:
    """The layers of descriptions, with the values that ``layer_tensors`` read.

    Args:
        entries: module name -> description.
    """
    layers: dict[str, nn.Module] = {}
    for name, entry in sorted(entries.items(), key=lambda item: depends(item[1])):
        layer = make(entry, model.get_submodule(name), layers.get(entry.get("shared")))
        prefix = f"{name}/"
        layer.load_state_dict(
            {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        )
        layers[name] = layer
    return {name: layers[name] for name in entries}


def layer_tensors(layers: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Everything that ``layers`` store, by "module name/tensor name", on the CPU."""
    return {
        f"{name}/{key}": tensor.detach().cpu().clone()
        for name, layer in layers.items()
        for key, tensor in layer.state_dict().items()
    }


def replace_embeddings(model: nn.Module, name: str, embedding: nn.Module) -> None:
    """Put ``embedding`` in place of the token embeddings ``name``, and an output layer that decodes it in place of one
    that was tied to them."""
    dense, output = model.get_submodule(name), tied_output_layer(model)
    model.set_submodule(name, embedding.train(dense.training))
    if output is not None:
        tie_output(model, output, embedding)


def tied_output_layer(model: nn.Module) -> str | None:
    """Name of the layer that gives every token's logits, where it has the weight of the token embeddings; else None."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is None or output.weight is not model.get_input_embeddings().weight:
        return None
    return next((name for name, module in model.named_modules() if module is output), None)


def tie_output(model: nn.Module, name: str, embedding: nn.Module) -> None:
    """Let the output layer ``name`` decode ``embedding``; transformers is to tie its weight no more, as it has none."""
    output = model.get_submodule(name)
    tied = tied_output(embedding, output.bias)
    model.set_submodule(name, tied.train(output.training))
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        keys = getattr(model, attribute, None)
        if keys:
            setattr(model, attribute, {target: source for target, source in keys.items() if target != f"{name}.weight"})


def tied_output(embedding: nn.Module, bias: nn.Parameter | None) -> nn.Module:
    """The output layer that decodes ``embedding``."""
    if isinstance(embedding, ReconstructedEmbedding):
        return ReconstructedOutput(embedding, bias)
    return DecodedOutput(embedding, False if bias is None else bias)


def describe(names: Mapping[nn.Module, str]) -> dict[str, Entry]:
    """Descriptions of all those layers that stand in for dense ones, by their names."""
    entries = {name: _entry(module, names) for module, name in names.items()}
    return {name: entry for name, entry in entries.items() if entry is not None}


def _entry(module: nn.Module, names: Mapping[nn.Module, str]) -> Entry | None:
    if isinstance(module, SharedLowRankLinear):
        return {"shared": names[module.owner]}
    if isinstance(module, LowRankSparseLinear):
        return {"rank": module.rank, "kept": module.kept.numel()}
    if isinstance(module, (DecodedOutput, ReconstructedOutput)):
        return {"tied": names[module.embedding]}
    if isinstance(module, RECONSTRUCTED):
        owner = next((names[other] for other in names if getattr(other, "source", None) is module.source.owner), None)
        return module.source.describe() | ({} if module.source.owner is None else {"shared": owner})
    if isinstance(module, SharedDecodedLinear):
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
        return tied_output(owner, dense.bias)
    if "rank" in entry:
        bias = dense.bias is not None
        return LowRankSparseLinear(*features(dense), rank=entry["rank"], kept=entry.get("kept", 0), bias=bias, **like)
    if not entry.keys().isdisjoint(SOURCES):
        source = make_source(entry, None if owner is None else owner.source, **like)
        if isinstance(dense, nn.Embedding):
            return ReconstructedEmbedding(source, dense.padding_idx)
        return ReconstructedLinear(source, dense.bias)
    if isinstance(dense, nn.Embedding):
        return DecodedEmbedding(*dense.weight.shape, *_sizes(entry), padding_idx=dense.padding_idx, **like)
    inputs, outputs = features(dense)
    if isinstance(owner, LowRankSparseLinear):
        return SharedLowRankLinear(owner, outputs, bias=dense.bias is not None, **like)
    if owner is not None:
        return SharedDecodedLinear(owner, outputs, dense.bias is not None, entry["norms"], **like)
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
    """Numbers of 4 bytes that a layer stores in place of a dense weight, rounded up: all but a linear's bias; what it
    shares counts with its owner. Values count as such whatever their dtype, places by their bytes."""
    tensors: dict[str, torch.Tensor] = dict((*module.named_parameters(), *module.named_buffers()))
    counted = (
        tensor.numel() * (1 if tensor.is_floating_point() else tensor.element_size() / 4)
        for name, tensor in tensors.items()
        if name != "bias"
    )
    return math.ceil(sum(counted))
