"""Many processes, as torchrun and accelerate launch start them: who is who, what all agree on, and who speaks.

In one process everything here returns at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import InputError

T = TypeVar("T")

#: how long a process waits for one that downloads, writes, or waits for a stage of another run; the launcher ends all
#: at once when one dies
PATIENCE = timedelta(days=1)
#: what a launcher tells every process
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: accelerate's switches for what splits a model over processes -> its name
SHARDERS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism configuration",
}
#: key in the group's store: how many processes have failed
FAILURES = "lpaf/failures"


def launched() -> bool:
    """Whether a launcher started this process, which accelerate then trains as one of a group, be it of one."""
    return "LOCAL_RANK" in os.environ or int(os.environ.get("WORLD_SIZE") or 1) > 1


def start() -> None:
    """Join the group of the processes that a launcher started; again, or in a single process: nothing.

    CPU tensors travel by gloo, CUDA tensors by nccl; each process takes the GPU of its LOCAL_RANK.

    Raises:
        InputError: a launcher's environment is incomplete, or it asks for a model split over processes.
    """
    if launched() and not dist.is_initialized():
        missing = [name for name in PLACE if name not in os.environ]
        if missing:
            raise InputError(
                f"LOCAL_RANK or WORLD_SIZE is set, but {', '.join(missing)} not; start processes with torchrun or "
                "accelerate launch, or unset it"
            )
        gpus = torch.cuda.device_count()
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
        if int(os.environ["LOCAL_RANK"]) < gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    for switch, name in SHARDERS.items():
        if os.environ.get(switch, "").lower() in ("1", "true", "yes"):
            raise InputError(
                f"{switch}=true: {name} splits every matrix over the processes, but pruning ranks and factorisation "
                "decomposes whole ones; launch with plain data parallelism (torchrun, accelerate launch --multi_gpu)"
            )


def stop() -> None:
    """Leave the group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def process_place() -> tuple[int, int]:
    """(rank of this process, number of processes); (0, 1) without ``torch.distributed``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return process_place()[0] == 0


def say(text: str) -> None:
    """Print ``text`` to stderr, once for all processes."""
    if is_main():
        print(text, file=sys.stderr)


def my_share(items: Sequence[T]) -> Sequence[T]:
    """Every n-th of ``items``, for the n processes."""
    me, processes = process_place()
    return items[me::processes]


def exchange(value: Any = None, failure: Exception | None = None) -> list:
    """``value`` of every process, in their order.

    Args:
        value: what this process found; anything that pickles.
        failure: why it found nothing.

    Raises:
        Exception: ``failure`` itself.
        InputError, RuntimeError: another process passed a ``failure``: bad input as it was, else an error that tells.
    """
    processes = process_place()[1]
    outcomes: list = [None] * processes
    if processes == 1:
        outcomes = [(value, None)]
    else:
        told = failure if isinstance(failure, InputError) else failure and f"{type(failure).__name__}: {failure}"
        dist.all_gather_object(outcomes, (value, told))
    if failure is not None:
        raise failure
    for process, (_, told) in enumerate(outcomes):
        if told is not None:
            raise told if isinstance(told, InputError) else RuntimeError(f"process {process} failed ({told})")
    return [value for value, _ in outcomes]


@contextmanager
def together() -> Iterator[None]:
    """A block that no process leaves before all are through it; a failure in one is a failure in all.

    What is inside must not wait for other processes where it may fail.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    exchange(failure=failure)


def from_main(compute: Callable[[], T]) -> T:
    """What ``compute`` returns in the main process, in every process; and so with its failure."""
    value, failure = None, None
    if is_main():
        try:
            value = compute()
        except Exception as error:
            failure = error
    return exchange(value, failure)[0]


@contextmanager
def main_first() -> Iterator[None]:
    """A block that one process of every machine runs before the others: what it downloads is there for them.

    A failure in one is a failure in all.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        exchange()
    with together():
        yield
    if first:
        exchange()


def first_to_fail() -> bool:
    """Whether no other process has failed before this one, which is then the one to say why."""
    if process_place()[1] == 1:
        return True
    try:
        return dist.distributed_c10d._get_default_store().add(FAILURES, 1) == 1
    except RuntimeError:  # the store is gone with the main process that held it
        return False


def another_failed() -> bool:
    """Whether another process has said why it fails: what this one meets is the consequence."""
    if process_place()[1] == 1:
        return False
    try:
        return dist.distributed_c10d._get_default_store().check([FAILURES])
    except RuntimeError:
        return False
