"""nn.Linear stored as a low-rank product plus a few full rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops._checks import check_floating, check_fraction, check_integer, check_shape
from ..ops.lowrank_sparse_linear import ACTIVATIONS, check_kept, packed_lowrank_sparse_linear
from ..ops.weighted_svd import weighted_svd


class LowRankSparseLinear(nn.Module):
    """y = act((x u) v + scatter(x s, kept) + bias), in place of an nn.Linear with weight (u v + s)^T.

    Args:
        in_features, out_features: sizes of the input and output.
        rank: r, 0 (sparse only) to min(in_features, out_features).
        kept: number of kept output columns of S (placed at the first outputs until a checkpoint says
            otherwise), or their sorted unique positions. Default: 0, low rank only.
        bias: whether to add a bias. Default: True.
        activation: None, "gelu", "gelu_tanh", "relu", "silu" or "tanh", applied to the output. Default: None.
        device, dtype: of the parameters.

    Shapes:
        down [rank + kept, in], up [rank, out], bias [out] (parameters); kept int32 [kept] (buffer).
        Input [..., in], output [..., out].

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """

    kept: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        kept: int | Tensor = 0,
        bias: bool = True,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            check_integer(name, value, 1, None)
        check_integer("rank", rank, 0, min(in_features, out_features))
        if activation is not None and activation not in ACTIVATIONS[1:]:
            raise ValueError(f"activation: expected None or one of {', '.join(ACTIVATIONS[1:])}, got {activation!r}")
        if isinstance(kept, Tensor):
            check_kept(kept, out_features)
            positions = kept.to(device=device, dtype=torch.int32)
        else:
            check_integer("kept", kept, 0, out_features)
            positions = torch.arange(kept, device=device, dtype=torch.int32)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.activation = activation
        self.down = nn.Parameter(torch.empty(rank + positions.shape[0], in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(rank, out_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("kept", positions)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int, keep: float = 0.0, row_weights: Tensor | None = None
    ) -> LowRankSparseLinear:
        """Factorise ``linear``: u v is its weighted truncated SVD and S the residual of its worst rows.

        Args:
            linear: the layer; its dtype and device are kept, its bias is copied.
            rank: r, 1 to min(in, out), or 0 with ``keep`` > 0.
            keep: share of the output neurons (rounded) whose residual W - (u v)^T is kept in full: those with
                the largest residual norm. Default: 0.0.
            row_weights: [out], see :func:`weighted_svd`. Default: none.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        keep = check_fraction("keep", keep)
        out_features, in_features = linear.weight.shape
        kept = math.floor(keep * out_features + 0.5)
        check_integer("rank", rank, 0 if kept else 1, min(in_features, out_features))
        with torch.no_grad():
            weight = linear.weight.to(torch.promote_types(linear.weight.dtype, torch.float32))
            if rank:
                rows = None if row_weights is None else row_weights.to(weight.device)
                a, b = weighted_svd(weight, rank, rows)
            else:
                a, b = weight.new_empty(out_features, 0), weight.new_empty(0, in_features)
            residual = weight - a @ b
            chosen = residual.norm(dim=1).topk(kept).indices.sort().values
            return cls._build(a, b, linear.bias, chosen, residual[chosen], linear.weight.dtype)

    @classmethod
    def from_factors(
        cls,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None = None,
        kept: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> LowRankSparseLinear:
        """Build the layer of weight a b + S from a [out, r], b [r, in] and bias [out]; all copied.

        ``rows`` [kept, in] are the rows of S that are not zero, at the sorted outputs ``kept``. Default: none.
        """
        check_floating("a", a)
        check_floating("b", b)
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
            raise ValueError(f"a, b: expected shapes [out, r] and [r, in], got {list(a.shape)} and {list(b.shape)}")
        if bias is not None:
            check_floating("bias", bias)
            check_shape("bias", bias, a.shape[0], because="the rows of a")
        if (kept is None) != (rows is None):
            raise ValueError("kept, rows: expected both or none")
        if kept is None:
            kept, rows = torch.empty(0, dtype=torch.int32, device=a.device), b.new_empty(0, b.shape[1])
        check_kept(kept, a.shape[0])
        check_floating("rows", rows)
        check_shape("rows", rows, kept.shape[0], b.shape[1], because="the length of kept and the columns of b")
        with torch.no_grad():
            return cls._build(a, b, bias, kept, rows, a.dtype)

    @classmethod
    def _build(
        cls, a: Tensor, b: Tensor, bias: Tensor | None, kept: Tensor, s: Tensor, dtype: torch.dtype
    ) -> LowRankSparseLinear:
        layer = cls(
            b.shape[1],
            a.shape[0],
            a.shape[1],
            kept=torch.empty(kept.shape, dtype=torch.int32, device="meta"),
            bias=bias is not None,
            device="meta",
            dtype=dtype,
        )
        layer.down = nn.Parameter(torch.cat([b, s]).to(dtype))
        layer.up = nn.Parameter(a.t().to(dtype, copy=True).contiguous())
        layer.kept = kept.to(torch.int32)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(dtype, copy=True))
        return layer

    @property
    def u(self) -> Tensor:
        """[in, r], a view of ``down``."""
        return self.down[: self.rank].t()

    @property
    def v(self) -> Tensor:
        """[r, out], ``up``."""
        return self.up

    @property
    def s(self) -> Tensor:
        """[in, kept], a view of ``down``."""
        return self.down[self.rank :].t()

    @property
    def weight(self) -> Tensor:
        """The dense [out, in] weight (u v + S)^T, built at each access; for readers of nn.Linear.weight."""
        wide = torch.promote_types(self.down.dtype, torch.float32)
        dense = self.up.t().to(wide) @ self.down[: self.rank].to(wide)
        return dense.index_add(0, self.kept, self.down[self.rank :].to(wide)).to(self.down.dtype)

    def reset_parameters(self) -> None:
        """Draw u and v so that u v has the variance of nn.Linear's first weight; S is zero, bias as there."""
        if self.down.is_meta:
            return
        bound = 1.0 / math.sqrt(self.in_features)
        with torch.no_grad():
            self.down[: self.rank].uniform_(-bound, bound)
            self.down[self.rank :].zero_()
            if self.rank:
                spread = math.sqrt(3.0 / self.rank)
                self.up.uniform_(-spread, spread)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return packed_lowrank_sparse_linear(x, self.down, self.up, self.kept, self.bias, self.activation)

    def to_dense(self) -> nn.Linear:
        """Return the nn.Linear of the same function (everything copied)."""
        if self.activation is not None:
            raise ValueError(
                f"activation: expected a layer without activation, got {self.activation!r}; apply it"
                " after the dense layer"
            )
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.detach())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear

    def check_kept(self) -> None:
        """Raise ValueError unless ``kept`` holds sorted unique output positions, one per row of S in
        ``down``.

        For loaders that write the tensors without ``load_state_dict``.
        """
        check_kept(self.kept, self.out_features)
        check_shape("kept", self.kept, self.down.shape[0] - self.rank, because="the rows of S in down")

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        key = prefix + "kept"
        if key in state_dict:
            try:
                check_kept(state_dict[key], self.out_features)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{key}: {error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank},"
            f" kept={self.kept.shape[0]}, bias={self.bias is not None}"
        )
        return text if self.activation is None else f"{text}, activation={self.activation!r}"


class SharedLowRankLinear(LowRankSparseLinear):
    """A LowRankSparseLinear without S whose ``down`` is that of another layer: matrices [out_i, in] that were
    compressed together, [W_1; W_2; ...] = [A_1; A_2; ...] B, store B once.

    ``owner`` is held, not registered: the state_dict of a model that holds both layers has ``down`` under the owner's
    name alone, and a copy of that model keeps the two together.

    Args:
        owner: the layer that stores ``down``; without kept rows, and not shared itself.
        out_features, bias, device, dtype: as for :class:`LowRankSparseLinear`.

    Shapes:
        up [rank, out], bias [out] (parameters). Input [..., in], output [..., out].

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, or an owner with kept rows.
    """

    def __init__(
        self,
        owner: LowRankSparseLinear,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(owner, LowRankSparseLinear) or isinstance(owner, SharedLowRankLinear):
            raise TypeError(f"owner: expected a LowRankSparseLinear that is not shared, got {type(owner).__name__}")
        if owner.kept.numel():
            raise ValueError(f"owner: expected a layer without kept rows, got {owner.kept.numel()}")
        check_integer("out_features", out_features, 1, None)
        nn.Module.__init__(self)
        self._owner = [owner]
        self.in_features, self.out_features, self.rank = owner.in_features, out_features, owner.rank
        self.activation = None
        self.up = nn.Parameter(torch.empty(self.rank, out_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("kept", torch.empty(0, device=device, dtype=torch.int32))
        self.reset_parameters()

    @classmethod
    def of(cls, owner: LowRankSparseLinear, a: Tensor, bias: Tensor | None = None) -> SharedLowRankLinear:
        """The layer of weight a B from a [out, r] and bias [out], copied, with ``owner``'s B [r, in]."""
        check_floating("a", a)
        check_shape("a", a, a.shape[0], owner.rank, because="the rank of owner")
        layer = cls(owner, a.shape[0], bias=bias is not None, device="meta", dtype=a.dtype)
        layer.kept = torch.empty(0, dtype=torch.int32, device=a.device)
        with torch.no_grad():
            layer.up = nn.Parameter(a.t().contiguous().clone())
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach().to(a.dtype, copy=True))
        return layer

    @property
    def owner(self) -> LowRankSparseLinear:
        """The layer that stores ``down``."""
        return self._owner[0]

    @property
    def down(self) -> Tensor:
        """[rank, in], the owner's."""
        return self.owner.down

    def reset_parameters(self) -> None:
        """Draw ``up`` and the bias as :class:`LowRankSparseLinear` does; ``down`` is the owner's to draw."""
        if self.up.is_meta:
            return
        with torch.no_grad():
            if self.rank:
                spread = math.sqrt(3.0 / self.rank)
                self.up.uniform_(-spread, spread)
            if self.bias is not None:
                bound = 1.0 / math.sqrt(self.in_features)
                self.bias.uniform_(-bound, bound)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, shared"
