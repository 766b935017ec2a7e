"""Work on many matrices, shared out among the processes of a torch.distributed group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from ..processes import exchange, process_place

Shape = tuple[int, int]
Results = dict[str, tuple[torch.Tensor, ...]]


def eigen_cost(shape: Shape) -> int:
    """What the SVD of a matrix [n, m] costs, up to a factor: n m min(n, m)."""
    return shape[0] * shape[1] * min(shape)


def share_out(costs: Mapping[str, int], processes: int) -> list[list[str]]:
    """The names for each process: the most expensive first, each to the process with the least work so far."""
    shares: list[list[str]] = [[] for _ in range(processes)]
    work = [0] * processes
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        least = work.index(min(work))
        shares[least].append(name)
        work[least] += costs[name]
    return shares


def on_all_processes(
    costs: Mapping[str, int], compute: Callable[[Sequence[str]], Results], device: torch.device
) -> Results:
    """The tensors that ``compute`` makes of every name, the same in every process.

    With ``torch.distributed`` initialised, each process computes its share of the names and broadcasts the results;
    otherwise this one computes all.

    Args:
        costs: name -> relative cost, the same mapping in every process.
        compute: names -> {name: tensors on ``device``}.
        device: of the tensors; one that the group's backend can send.

    Raises:
        RuntimeError: ``compute`` failed in another process. In the one where it failed, its own exception.
    """
    me, processes = process_place()
    shares = share_out(costs, processes)
    if processes == 1:
        return compute(shares[0])
    found: Results = {}
    failure: Exception | None = None
    try:
        found = compute(shares[me])
    except Exception as error:  # every process has to hear of it before one may leave
        failure = error
    kinds = {name: [(tensor.shape, tensor.dtype) for tensor in tensors] for name, tensors in found.items()}
    for owner, theirs in enumerate(exchange(kinds, failure)):
        for name in shares[owner]:
            if owner == me:
                found[name] = tuple(tensor.contiguous() for tensor in found[name])
            else:
                found[name] = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in theirs[name])
            for tensor in found[name]:
                dist.broadcast(tensor, src=owner)
    return found
