"""Ways to run a case, by name: our own, and the baselines that they are held against.

A provider turns a problem into a :class:`Runner`. Everything a real program does once (packing, multiplying out the
dense weight, compiling, capturing a graph) happens while it is built; what is timed is the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lpaf_kernels
from lpaf_kernels import LowRankSparseLinear

from .cases import Case, Form
from .errors import InputError
from .problem import FfnProblem, LinearProblem

Problem = LinearProblem | FfnProblem
Outputs = dict[str, Tensor]
Enter = Callable[[], Any]


@dataclass(frozen=True)
class Runner:
    """One provider ready to run one problem.

    Args:
        call: set index -> raw result, the timed part. Called inside ``context``.
        outputs: raw result -> outputs by name, as the problem's reference names them.
        context: makes the context manager that calls run in (no_grad, a forced provider); entered outside of what
            is timed. Default: none.
        graphed: whether the call replays a CUDA graph, whose memory was taken when it was captured. Default: False.
        repeats: how many times one call does the work, once for every copy of x. Default: 1.
    """

    call: Callable[[int], Any]
    outputs: Callable[[Any], Outputs]
    context: Enter = nullcontext
    graphed: bool = False
    repeats: int = 1

    def run(self, index: int = 0) -> Outputs:
        """Call once and name the outputs."""
        with self.context():
            return self.outputs(self.call(index))


Build = Callable[[Any], Runner]


@dataclass(frozen=True)
class Provider:
    """A named way to run cases.

    Args:
        name: as on the command line and in the rows.
        summary: what it is, for ``--help`` and the documentation.
        builds: operation -> what makes a runner of its problem; an operation that is missing cannot be run.
        form: how it holds the weight, which decides its operations and bytes. Default: "factors".
        devices: where it runs. Default: "cpu" and "cuda".
        default: the devices where it is measured unless others are named. Default: none.
        refuse: case -> why it cannot run it, or None. Default: runs all.
    """

    name: str
    summary: str
    builds: Mapping[str, Build] = field(repr=False)
    form: Form = "factors"
    devices: tuple[str, ...] = ("cpu", "cuda")
    default: tuple[str, ...] = ()
    refuse: Callable[[Case], str | None] = lambda case: None

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        """Why it cannot run ``case`` on ``device``, or None."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if case.op not in self.builds:
            return f"does not run {case.op}"
        return self.refuse(case)

    def build(self, problem: Problem) -> Runner:
        """Everything that is not timed."""
        return self.builds[problem.case.op](problem)


def linear_runner(
    problem: LinearProblem,
    forward: Callable[[Tensor], Tensor],
    leaves: Mapping[str, Tensor],
    collect: Callable[[Outputs], Outputs] = lambda outputs: outputs,
    view: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    context: Enter = nullcontext,
) -> Runner:
    """The runner of ``forward``: x -> y; in training with the gradients of x and of ``leaves``.

    Args:
        forward: called with every set's x in turn.
        leaves: gradient name -> parameter, such as {"d_up": up}.
        collect: turns the outputs {"y", "d_x", *leaves} into those of the reference, untimed. Default: they are.
        view: reshapes x and dy, untimed; y and dx are reshaped back. Default: [M, features].
        context: further context of every call.
    """
    training = problem.training
    xs = [view(x).detach().requires_grad_(training) for x in problem.x]
    grads = [view(grad) for grad in problem.grad]
    parameters = tuple(leaves.values())

    def infer(index: int) -> tuple[Tensor, ...]:
        return (forward(xs[index]),)

    def train(index: int) -> tuple[Tensor, ...]:
        y = forward(xs[index])
        return (y, *torch.autograd.grad(y, (xs[index], *parameters), grads[index]))

    def outputs(raw: tuple[Tensor, ...]) -> Outputs:
        named = dict(zip(("y", "d_x", *leaves) if training else ("y",), raw, strict=True))
        for name, features in (("y", problem.case.out_features), ("d_x", problem.case.in_features)):
            if name in named:
                named[name] = named[name].reshape(-1, features)
        return collect(named)

    @contextmanager
    def entered() -> Iterator[None]:
        with torch.set_grad_enabled(training), context():
            yield

    return Runner(train if training else infer, outputs, entered)


def ffn_runner(
    problem: FfnProblem,
    forward: Callable[[Tensor], Tensor],
    view: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    context: Enter = nullcontext,
) -> Runner:
    """The runner of ``forward``: x -> y; arguments as for :func:`linear_runner`."""
    xs = [view(x) for x in problem.x]

    @contextmanager
    def entered() -> Iterator[None]:
        with torch.no_grad(), context():
            yield

    return Runner(lambda index: forward(xs[index]), lambda y: {"y": y.reshape(-1, problem.case.hidden)}, entered)


def _leaf(problem: Problem, tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(problem.training)


def _dense_linear(problem: LinearProblem) -> Runner:
    weight, bias = _leaf(problem, problem.dense_weight), _leaf(problem, problem.bias)
    return linear_runner(problem, lambda x: F.linear(x, weight, bias), {"d_weight": weight, "d_bias": bias})


def _dense_ffn(problem: FfnProblem) -> Runner:
    (first, second), bias1, bias2 = problem.dense_weights, problem.bias1, problem.bias2
    return ffn_runner(problem, lambda x: F.linear(F.gelu(F.linear(x, first, bias1)), second, bias2))


Wrap = Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]


def _chain_linear(problem: LinearProblem, wrap: Wrap = lambda forward: forward, context: Enter = nullcontext) -> Runner:
    rank, kept = problem.case.rank, problem.kept
    u, s = (_leaf(problem, part) for part in problem.down.split([rank, problem.case.kept]))
    v = _leaf(problem, problem.up.t().contiguous())
    bias = _leaf(problem, problem.bias)

    def low_rank(x: Tensor) -> Tensor:
        return F.linear(F.linear(x, u), v, bias)

    def with_kept(x: Tensor) -> Tensor:
        return low_rank(x).index_add_(1, kept, F.linear(x, s))

    leaves = {"d_u": u, "d_v": v, "d_bias": bias}
    if problem.case.kept:
        leaves["d_s"] = s

    def collect(outputs: Outputs) -> Outputs:
        if problem.training:
            parts = [outputs.pop(name) for name in ("d_u", "d_s") if name in outputs]
            outputs |= {"d_down": torch.cat(parts), "d_up": outputs.pop("d_v").t()}
        return outputs

    forward = with_kept if problem.case.kept else low_rank
    return linear_runner(problem, wrap(forward), leaves, collect, context=context)


def _chain_ffn(problem: FfnProblem, wrap: Wrap = lambda forward: forward, context: Enter = nullcontext) -> Runner:
    down1, bias1, down2, bias2 = problem.down1, problem.bias1, problem.down2, problem.bias2
    up1, up2 = problem.up1.t().contiguous(), problem.up2.t().contiguous()

    def forward(x: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(F.linear(x, down1), up1, bias1))
        return F.linear(F.linear(hidden, down2), up2, bias2)

    return ffn_runner(problem, wrap(forward), context=context)


def _compiled(chain: Callable[..., Runner], b2b: bool) -> Build:
    """The chain under torch.compile: max-autotune on CUDA, the default mode on the CPU."""

    def build(problem: Problem) -> Runner:
        torch._dynamo.reset()
        cuda = problem.device.type == "cuda"
        mode = "max-autotune" if cuda else None

        def wrap(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            compiled = torch.compile(forward, mode=mode, dynamic=False)
            if not cuda:
                return compiled

            def stepped(x: Tensor) -> Tensor:
                # Tells the graphs of max-autotune that the last step's outputs are done with.
                torch.compiler.cudagraph_mark_step_begin()
                return compiled(x)

            return stepped

        runner = chain(problem, wrap)
        with torch._inductor.config.patch(b2b_gemm_pass=b2b):
            runner.run()
        return runner

    return build


def _layer(down: Tensor, up: Tensor, kept: Tensor | None, bias: Tensor, training: bool) -> LowRankSparseLinear:
    """A LowRankSparseLinear around these tensors."""
    layer = LowRankSparseLinear(
        down.shape[1],
        up.shape[1],
        up.shape[0],
        kept=0 if kept is None else kept,
        device=down.device,
        dtype=down.dtype,
    )
    for name, tensor in (("down", down), ("up", up), ("bias", bias)):
        setattr(layer, name, nn.Parameter(tensor, requires_grad=training))
    return layer.train(training)


def _forced(name: str | None) -> Enter:
    return nullcontext if name is None else lambda: lpaf_kernels.use_provider(name)


def _ours_linear(problem: LinearProblem, force: str | None = None) -> Runner:
    kept = problem.kept if problem.case.kept else None
    layer = _layer(problem.down, problem.up, kept, problem.bias, problem.training)
    leaves = {"d_down": layer.down, "d_up": layer.up, "d_bias": layer.bias}
    return linear_runner(problem, layer, leaves, context=_forced(force))


def _ours_ffn(problem: FfnProblem, force: str | None = None) -> Runner:
    layers = (problem.down1, problem.up1, problem.bias1, problem.down2, problem.up2, problem.bias2)
    return ffn_runner(problem, lambda x: lpaf_kernels.lowrank_ffn(x, *layers), context=_forced(force))


def _graphed(build: Callable[..., Runner]) -> Build:
    """The runner's calls in one CUDA graph, one call for each copy of x, as a layer is part of a model's graph."""

    def captured(problem: Problem) -> Runner:
        runner = build(problem)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with runner.context():
            with torch.cuda.stream(stream):
                for _ in range(3):
                    runner.call(0)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                # Kept for the gate; the memory of the other results is used anew within the graph.
                first = runner.call(0)
                for index in range(1, problem.sets):
                    runner.call(index)

        def replay(_: int) -> Any:
            graph.replay()
            return first

        return Runner(replay, runner.outputs, graphed=True, repeats=problem.sets)

    return captured


def _both(linear: Build, ffn: Build, wrap: Callable[[Callable[..., Runner]], Build] = lambda build: build):
    return {"linear": wrap(linear), "ffn": wrap(ffn)}


def _ours_forced(name: str) -> Provider:
    return Provider(
        f"ours_{name}",
        f"ours, made to use {name}",
        _both(functools.partial(_ours_linear, force=name), functools.partial(_ours_ffn, force=name)),
        devices=("cuda",),
        default=("cuda",),
        refuse=lambda case: (
            "multiplies the weights out for inference only" if name == "dense" and case.direction != "forward" else None
        ),
    )


EVERYWHERE = ("cpu", "cuda")
PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(
            "dense",
            "F.linear on the dense weight",
            _both(_dense_linear, _dense_ffn),
            form="dense",
            default=EVERYWHERE,
        ),
        Provider(
            "chain",
            "F.linear, F.linear and, where columns are kept, F.linear and index_add_, eager",
            _both(_chain_linear, _chain_ffn),
            default=EVERYWHERE,
        ),
        Provider(
            "chain_graph",
            "the chain, replayed from a CUDA graph",
            _both(_chain_linear, _chain_ffn, _graphed),
            devices=("cuda",),
            default=("cuda",),
        ),
        Provider(
            "compile",
            'torch.compile of the chain, mode="max-autotune" on CUDA',
            _both(_chain_linear, _chain_ffn, functools.partial(_compiled, b2b=False)),
        ),
        Provider(
            "compile_b2b",
            "the same with Inductor's b2b_gemm pass",
            _both(_chain_linear, _chain_ffn, functools.partial(_compiled, b2b=True)),
            devices=("cuda",),
        ),
        Provider(
            "ours",
            "LowRankSparseLinear (lowrank_ffn for ffn), with its own choice of implementation",
            _both(_ours_linear, _ours_ffn),
            default=EVERYWHERE,
        ),
        Provider(
            "ours_graph",
            "ours, replayed from a CUDA graph",
            _both(_ours_linear, _ours_ffn, _graphed),
            devices=("cuda",),
            default=("cuda",),
        ),
        *(_ours_forced(name) for name in ("one_kernel", "two_kernels", "chain", "dense")),
        Provider(
            "ours_block",
            "lowrank_ffn, made to run in one pass",
            {"ffn": functools.partial(_ours_ffn, force="block")},
            devices=("cuda",),
            default=("cuda",),
        ),
    )
}


def choose(names: Sequence[str], device: torch.device, extra: Mapping[str, Provider]) -> dict[str, Provider]:
    """The providers named, in registry order; "default" and "all" stand for those of the device.

    Args:
        names: as on the command line.
        device: where they run.
        extra: peers, measured in any case.

    Raises:
        InputError: an unknown name, or one that does not run on the device.
    """
    wanted: set[str] = set()
    for name in names:
        if name == "default":
            wanted |= {key for key, provider in PROVIDERS.items() if device.type in provider.default}
        elif name == "all":
            wanted |= {key for key, provider in PROVIDERS.items() if device.type in provider.devices}
        elif name not in PROVIDERS:
            raise InputError(f"--providers {name}: expected default, all, or some of {', '.join(PROVIDERS)}")
        elif device.type not in PROVIDERS[name].devices:
            raise InputError(
                f"--providers {name}: runs on {' and '.join(PROVIDERS[name].devices)}, not on {device.type}"
            )
        else:
            wanted.add(name)
    return {name: provider for name, provider in PROVIDERS.items() if name in wanted} | dict(extra)
