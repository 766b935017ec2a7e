"""The matrices that ``--modules`` names: the token embeddings, or one role in every layer."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import InputError
from .decoded import tied_output_layer
from .targets import find_targets

Shape = tuple[int, int]

EMBEDDINGS = "embeddings"
#: other names of roles, as the paper has them
ALIASES = {"output-dense": "down"}


@dataclass(frozen=True)
class ModuleGroup:
    """One kind of matrix.

    Args:
        name: as ``--modules`` has it: "embeddings", or the role of a linear ("key", "output-dense", ...).
        shapes: module name -> [n, m] of its weight, in the order of the model. Rows are tokens, or output neurons.
        tied: whether the output layer has the same weight. Default: False.
    """

    name: str
    shapes: dict[str, Shape]
    tied: bool = False

    @property
    def embeds(self) -> bool:
        """Whether it is the token embeddings."""
        return self.name == EMBEDDINGS

    @property
    def params(self) -> int:
        """Weights of all its matrices."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def joinable(self) -> bool:
        """Whether there are several matrices, of one shape."""
        return len(self.shapes) > 1 and len(set(self.shapes.values())) == 1

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Module name -> its weight, detached."""
        return {name: model.get_submodule(name).weight.detach() for name in self.shapes}


def module_groups(model: nn.Module, names: Sequence[str]) -> list[ModuleGroup]:
    """The groups called ``names`` in a dense ``model``.

    Raises:
        InputError: a name that the model does not have or that comes twice, or embeddings that several stacks share.
    """
    roles: dict[str, dict[str, Shape]] = {}
    for target in find_targets(model):
        roles.setdefault(target.role, {})[target.name] = tuple(model.get_submodule(target.name).weight.shape)
    called = {alias: role for alias, role in ALIASES.items() if role in roles}
    known = (EMBEDDINGS, *roles, *called)
    groups, taken = [], set()
    for name in names:
        role = called.get(name, name)
        if role not in (EMBEDDINGS, *roles):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected names out of {', '.join(known)}"
            raise InputError(f"--modules {name}: {type(model).__name__} has none; {hint}")
        if role in taken:
            raise InputError(f"--modules {','.join(names)}: {name} is named twice")
        taken.add(role)
        if role == EMBEDDINGS:
            groups.append(ModuleGroup(name, _embeddings(model), tied=tied_output_layer(model) is not None))
        else:
            groups.append(ModuleGroup(name, roles[role]))
    return groups


def _embeddings(model: nn.Module) -> dict[str, Shape]:
    embedding = model.get_input_embeddings()
    places = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding) and module.weight is embedding.weight
    ]
    if type(embedding) is not nn.Embedding or len(places) != 1:
        raise InputError(
            f"--modules {EMBEDDINGS}: {type(model).__name__} has no single table of token embeddings that could be "
            "replaced; leave it out"
        )
    return {places[0]: tuple(embedding.weight.shape)}
