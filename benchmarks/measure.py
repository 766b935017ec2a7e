"""One case from its tensors to its rows: build, gate, time."""

from __future__ import annotations

import datetime
import gc
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .cases import Case
from .environment import Ceilings, Environment
from .gate import Gate, Verdict
from .problem import make_problem
from .providers import Provider, Runner
from .rows import Row
from .timing import Rounds, peak_bytes


def new_run() -> str:
    """An id for the rows of one command."""
    return f"{datetime.datetime.now(datetime.timezone.utc):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


@dataclass(frozen=True)
class Session:
    """What the cases of one command share."""

    device: torch.device
    environment: Environment
    ceilings: Ceilings
    providers: Mapping[str, Provider]
    run: str = field(default_factory=new_run)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


class Measurement:
    """A case whose providers are built and have passed the gate or not, ready for interleaved rounds.

    Args:
        case: what to measure.
        session: where, and with which providers.

    Attributes:
        failed: provider -> why it has no time: it cannot run the case, raised, or failed the gate.
        rounds: of the providers that passed.
    """

    def __init__(self, case: Case, session: Session) -> None:
        self.case = case
        self.session = session
        self.failed: dict[str, str] = {}
        self.verdicts: dict[str, Verdict] = {}
        self.peaks: dict[str, int | None] = {}
        self.rounds = Rounds({}, session.device, 1)
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            problem = make_problem(case, session.device)
            gate = Gate(problem)
        except torch.OutOfMemoryError as error:
            self.failed = dict.fromkeys(session.providers, f"not run: {_reason(error)}")
            return
        runners: dict[str, Runner] = {}
        for name, provider in session.providers.items():
            why = provider.unavailable(case, session.device)
            if why is not None:
                self.failed[name] = f"not run: {why}"
                continue
            try:
                runner = provider.build(problem)
                verdict = self.verdicts[name] = gate.check(runner)
                if verdict.failed is None:
                    self.peaks[name] = peak_bytes(runner, session.device)
                    runners[name] = runner
                else:
                    self.failed[name] = f"gate: {verdict.failed}"
            except Exception as error:  # A provider that raises is a result; the others are still measured.
                self.failed[name] = _reason(error)
        if session.device.type == "cuda":
            # After an illegal access nothing that this process measures is true: this raises.
            torch.cuda.synchronize(session.device)
        del gate
        gc.collect()
        self.rounds = Rounds(runners, session.device, problem.sets)

    def time(self, seconds: float) -> None:
        """Run the interleaved rounds that fit in ``seconds``."""
        if self.rounds.runners:
            for _ in range(self.rounds.affordable(seconds)):
                self.rounds.round()

    def rows(self) -> list[Row]:
        """One row per provider, after :meth:`time` or rounds of one's own."""
        timings = self.rounds.timings()
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        rows = []
        for name, provider in self.session.providers.items():
            timing, verdict = timings.get(name), self.verdicts.get(name)
            flops, moved = self.case.flops(provider.form), self.case.bytes(provider.form)
            least = self.session.ceilings.seconds(flops, moved)
            error = None if verdict is None else verdict.error
            rows.append(
                {
                    "op": self.case.op,
                    **self.case.shape,
                    "dtype": self.case.dtype,
                    "direction": self.case.direction,
                    "provider": name,
                    "median_us": None if timing is None else 1e6 * timing.median,
                    "p20_us": None if timing is None else 1e6 * timing.p20,
                    "p80_us": None if timing is None else 1e6 * timing.p80,
                    "rounds": len(self.rounds.samples.get(name, ())),
                    "bytes": moved,
                    "flops": flops,
                    "roofline_share": None if timing is None else least / timing.median,
                    "peak_bytes": self.peaks.get(name),
                    "max_error": error if error is not None and math.isfinite(error) else None,
                    "max_error_allowed": None if verdict is None else verdict.allowed,
                    "max_error_of": None if verdict is None else verdict.output,
                    "failed": self.failed.get(name),
                    "ceiling_bandwidth": self.session.ceilings.bandwidth,
                    "ceiling_flops": self.session.ceilings.flops,
                    **self.session.environment.columns(),
                    "time": now,
                    "run": self.session.run,
                }
            )
        return rows
