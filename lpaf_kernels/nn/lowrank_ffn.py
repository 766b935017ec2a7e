"""The feed-forward block of a transformer layer, from low-rank layers."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.lowrank_ffn import lowrank_ffn
from ..ops.lowrank_sparse_linear import ACTIVATIONS
from ._block import check_layer, check_norm, dropout_p, finish, finish_apart, kept_columns, norm_arguments
from .lowrank_sparse_linear import LowRankSparseLinear


class LowRankFFN(nn.Module):
    """norm(dropout(second(act(first(x)))) + residual) in one operator; gated: second(act(gate(x)) first(x)).

    The layers, the normalisation and their parameters are the given ones, not copies.

    Args:
        first: [in -> hidden], without activation of its own.
        second: [hidden -> out], likewise.
        activation: "none", "gelu", "gelu_tanh", "relu", "silu" or "tanh". Default: "gelu".
        gate: [in -> hidden], without kept columns (SwiGLU: activation "silu"). Default: none.
        norm: nn.LayerNorm or nn.RMSNorm over the outputs, or over the inputs with ``norm_first``. Default: none.
        norm_first: normalise x, not the result. Default: False.
        dropout: chance of each entry of second's result to become 0 in training mode, in [0, 1). Default: 0.

    Shapes:
        x [..., in], residual [..., out] or None, output [..., out].

    Raises:
        TypeError, ValueError: an argument of the wrong type, or sizes that do not fit.
    """

    def __init__(
        self,
        first: LowRankSparseLinear,
        second: LowRankSparseLinear,
        *,
        activation: str = "gelu",
        gate: LowRankSparseLinear | None = None,
        norm: nn.Module | None = None,
        norm_first: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_layer("first", first)
        check_layer("second", second, inputs=first.out_features)
        if gate is not None:
            check_layer("gate", gate, inputs=first.in_features, outputs=first.out_features)
            if gate.kept.shape[0]:
                raise ValueError(f"gate: expected a layer without kept columns, got {gate.kept.shape[0]}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        check_norm(norm, first.in_features if norm_first else second.out_features)
        self.first = first
        self.second = second
        self.gate = gate
        self.norm = norm
        self.dropout = nn.Dropout(dropout)
        self.activation = activation
        self.norm_first = norm_first

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out]."""
        return run_ffn(
            x,
            self.first,
            self.second,
            activation=self.activation,
            gate=self.gate,
            residual=residual,
            norm=self.norm,
            norm_first=self.norm_first,
            dropout=self.dropout,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, norm_first={self.norm_first}"


def run_ffn(
    x: Tensor,
    first: LowRankSparseLinear,
    second: LowRankSparseLinear,
    *,
    activation: str,
    gate: LowRankSparseLinear | None = None,
    residual: Tensor | None = None,
    norm: nn.Module | None = None,
    norm_first: bool = False,
    dropout: nn.Dropout | None = None,
) -> Tensor:
    """:func:`lowrank_ffn` with the parameters of these modules, as they are now."""
    apart = finish_apart(x)
    y = lowrank_ffn(
        x,
        first.down,
        first.up,
        first.bias,
        second.down,
        second.up,
        second.bias,
        activation=activation,
        kept1=kept_columns(first),
        kept2=kept_columns(second),
        gate=None if gate is None else (gate.down, gate.up, gate.bias),
        residual=None if apart else residual,
        norm=None if apart and not norm_first else norm_arguments(norm),
        norm_first=norm_first,
        dropout_p=dropout_p(dropout),
    )
    return finish(y, residual, None if norm_first else norm) if apart else y
