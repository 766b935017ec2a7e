"""Runs of the command line in processes of their own, alone or as a launcher starts several, and their sudden death.

The processes are forked from one that has imported everything, which makes a run of the tiny model cost a second.
"""

from __future__ import annotations

import errno
import functools
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["launch", "lpaf.cli", "lpaf.recipes.compress", "lpaf.evaluate.evaluate"])
PATIENCE = 120


def die(*_, **__) -> None:
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: object, name: str, when: Callable[..., bool] = lambda *_, **__: True) -> None:
    """Die when ``owner.name`` is called with arguments that ``when`` is waiting for."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def patched(*arguments, **options):
        if when(*arguments, **options):
            die()
        return original(*arguments, **options)

    setattr(owner, name, patched)


def after(owner: object, name: str, when: Callable[..., bool] = lambda *_, **__: True) -> None:
    """Die when such a call of ``owner.name`` returns."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def patched(*arguments, **options):
        result = original(*arguments, **options)
        if when(*arguments, **options):
            die()
        return result

    setattr(owner, name, patched)


def in_step(stage: str, step: int) -> None:
    """Die in the backward pass of an update: its loss is known, its gradients are not applied."""
    from lpaf.retrain.trainer import StageTrainer

    after(StageTrainer, "training_step", lambda self, *_: self.stage == stage and self.state.global_step == step)


def in_checkpoint(stage: str, step: int) -> None:
    """Die when half of a checkpoint is written."""
    from lpaf.retrain.trainer import StageTrainer

    before(StageTrainer, "_save_scaler", lambda self, _: self.stage == stage and self.state.global_step == step)


def in_teacher() -> None:
    compress = import_module("lpaf.recipes.compress")
    after(compress, "predict", lambda *_, description="", **__: description == "teacher logits")


def in_fisher() -> None:
    """Die when Fisher information is computed and nothing of it is written."""
    after(import_module("lpaf.recipes.compress"), "row_fisher")


def in_store(stage: str) -> None:
    """Die when the stage is done and half of it is written."""
    from lpaf.recipes import stages

    after(stages, "save_file", lambda _, path: path.parent.name.startswith(f".{stage}-"))


def in_factorize() -> None:
    from lpaf.recipes.compress import Compression

    after(Compression, "factorize")


def in_truncate() -> None:
    from lpaf.recipes.compress import Compression

    after(Compression, "truncate")


def in_module() -> None:
    """Die when the first window of an autoencoder's training is kept."""
    from lpaf.factorize.autoencoder import AutoencoderTraining

    after(AutoencoderTraining, "_save")


def in_measure() -> None:
    from lpaf.recipes import record

    after(record, "latency_record")


def in_publish() -> None:
    """Die when the whole output is written but not in its place."""
    compress = import_module("lpaf.recipes.compress")  # not the function, which the package exports
    after(compress, "write_report")


def in_discard() -> None:
    """Die when the output is in its place and the work directory still there."""
    from lpaf.recipes.workspace import Workspace

    before(Workspace, "_discard")


#: where a run can die -> what arranges it; the numbers are updates of :data:`RUN`
DEATHS: dict[str, Callable[[], None]] = {
    "finetune": lambda: in_step("finetune", 5),
    "finetune checkpoint": lambda: in_checkpoint("finetune", 6),
    "finetune store": lambda: in_store("finetune"),
    "teacher": in_teacher,
    "prune": lambda: in_step("prune", 9),
    "prune checkpoint": lambda: in_checkpoint("prune", 6),
    "prune store": lambda: in_store("prune"),
    "round": lambda: in_step("round-2", 4),
    "round store": lambda: in_store("round-1"),
    "fisher": in_fisher,
    "fisher store": lambda: in_store("fisher"),
    "factorize": in_factorize,
    "truncate": in_truncate,
    "module": in_module,
    "module store": lambda: in_store("module"),
    "retrain": lambda: in_step("retrain", 8),
    "retrain start": lambda: in_step("retrain", 0),
    "retrain checkpoint": lambda: in_checkpoint("retrain", 9),
    "measure": in_measure,
    "publish": in_publish,
    "discard": in_discard,
}


def poison_loss() -> None:
    """Make the loss of one update NaN."""
    from lpaf.retrain.objective import Objective

    honest, calls = Objective.task_loss, []

    def poisoned(self, logits, labels):
        calls.append(1)
        return honest(self, logits, labels) * (float("nan") if len(calls) == 5 else 1.0)

    Objective.task_loss = poisoned


def fill_disk() -> None:
    """Let the second checkpoint of fine-tuning meet a full disk."""
    from lpaf.retrain.trainer import StageTrainer

    save = StageTrainer._save_optimizer_and_scheduler

    def full(self, directory):
        if self.state.global_step > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, directory)

    StageTrainer._save_optimizer_and_scheduler = full


def reverse_batches() -> None:
    """Let every training batch hold its examples in the opposite order: the same sums, added up in another order."""
    from lpaf.retrain.batches import BatchShare

    batches = BatchShare.__iter__
    BatchShare.__iter__ = lambda self: (batch[::-1] for batch in batches(self))


def record_stages() -> None:
    """Write the weights that every training stage and the factorisation leave, one file per process and stage."""
    from safetensors.torch import save_file

    from lpaf.processes import process_place
    from lpaf.recipes.compress import Compression

    def recording(original):
        @functools.wraps(original)
        def patched(self, stage, model, *arguments, **options):
            directory = self.workspace.output.parent / "stages"
            directory.mkdir(exist_ok=True)
            name = f"{process_place()[0]}.safetensors"
            save_file(weights(model), directory / f"before-{stage}-{name}")
            original(self, stage, model, *arguments, **options)
            save_file(weights(model), directory / f"after-{stage}-{name}")

        return patched

    Compression.run_stage = recording(Compression.run_stage)


def weights(model) -> dict:
    """A copy of all that ``model`` holds."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}


#: what else a process can be made to do
PROBES: dict[str, Callable[[], None]] = {
    "nan": poison_loss,
    "full disk": fill_disk,
    "stages": record_stages,
    "reversed": lambda: (reverse_batches(), record_stages()),
}


def _child(words: list[str], environment: dict[str, str], log: Path, probe: str | None) -> None:
    gc.freeze()  # what was imported stays: collecting it again and again would take most of the run
    os.environ.update(environment)
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        import_module("lpaf.report.write").render_html = lambda *_: ""  # its pictures take longer than the run
        if probe is not None:
            (DEATHS | PROBES)[probe]()
        sys.exit(import_module("lpaf.cli").main(words))


def launch(
    words: list[str],
    log: Path,
    processes: int = 1,
    probes: Mapping[int, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[list[int], list[str]]:
    """Run ``lpaf`` in one process, or in several of one group.

    Args:
        words: the command line after ``lpaf``.
        log: beginning of the names of the files that hold what the processes say.
        processes: how many.
        probes: process -> one of :data:`DEATHS` or :data:`PROBES`. The others are ended when one fails, as a launcher
            does, but have a few seconds to find out for themselves.
        environment: more variables.

    Returns:
        (exit status of every process, minus the signal that ended it; what each has said).
    """
    common = {"OMP_NUM_THREADS": "1", **(environment or {})}
    if processes > 1:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent
        common |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    logs = [log.with_name(f"{log.name}.{rank}") for rank in range(processes)]
    started = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        arguments = ([str(word) for word in words], common | place, logs[rank], (probes or {}).get(rank))
        started.append(CONTEXT.Process(target=_child, args=arguments))
        started[-1].start()
    by_sentinel = {process.sentinel: process for process in started}
    waiting = set(by_sentinel)
    while waiting:
        done = multiprocessing.connection.wait(list(waiting), timeout=PATIENCE)
        if not done or any(by_sentinel[sentinel].exitcode != 0 for sentinel in done):
            for sentinel in waiting.difference(done):
                by_sentinel[sentinel].join(5 if done else 0)  # what fails together ends by itself
                by_sentinel[sentinel].terminate()
                by_sentinel[sentinel].join()
            break
        waiting.difference_update(done)
    return [process.exitcode for process in started], [spoken(path.read_text()) for path in logs]


def spoken(text: str) -> str:
    """What a process has said, without torch's remark that a step of mixed-rank retraining used all factors."""
    return "".join(line for line in text.splitlines(keepends=True) if "find_unused_parameters=True was" not in line)
