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
from lpaf_kernels.nn.graphed import capture

from . import exported
from .cases import Case, Form
from .errors import InputError
from .problem import (
    LAYER_NORM_EPS,
    BlockProblem,
    EncoderLayer,
    Factors,
    Linear,
    LinearProblem,
    MaskedProblem,
    dense_linear,
    encoder_layer,
)

Problem = LinearProblem | MaskedProblem | BlockProblem
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
    problem: LinearProblem | MaskedProblem,
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


def block_runner(problem: BlockProblem, forward: Callable[[Tensor], Tensor], context: Enter = nullcontext) -> Runner:
    """The runner of ``forward``: x [batch, length, hidden] -> y; without gradients, in ``context``."""

    @contextmanager
    def entered() -> Iterator[None]:
        with torch.no_grad(), context():
            yield

    return Runner(lambda index: forward(problem.x[index]), lambda y: {"y": y}, entered)


def _leaf(problem: Problem, tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(problem.training)


def _dense_linear(problem: LinearProblem) -> Runner:
    weight, bias = _leaf(problem, problem.dense_weight), _leaf(problem, problem.bias)
    return linear_runner(problem, lambda x: F.linear(x, weight, bias), {"d_weight": weight, "d_bias": bias})


Wrap = Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]


def _autocast(problem: MaskedProblem, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``forward`` in the case's dtype, with an autocast of its own: it keeps no cast from the call before."""

    def cast(x: Tensor) -> Tensor:
        with torch.autocast(problem.device.type, problem.dtype, enabled=problem.dtype != torch.float32):
            return forward(x)

    return cast


def _dense_masked(problem: MaskedProblem) -> Runner:
    weight, bias = _leaf(problem, problem.masked_weight), _leaf(problem, problem.bias)
    forward = _autocast(problem, lambda x: F.linear(x, weight, bias))
    return linear_runner(problem, forward, {"d_pruned": weight, "d_bias": bias})


class _StraightThrough(torch.autograd.Function):
    """The mask in float32, whose gradient is passed to the scores."""

    @staticmethod
    def forward(ctx, scores, value):
        return (scores >= value).to(scores.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _masked_leaves(problem: MaskedProblem) -> dict[str, Tensor]:
    tensors = {"d_weight": problem.weight, "d_scores": problem.scores, "d_bias": problem.bias}
    return {name: _leaf(problem, tensor) for name, tensor in tensors.items()}


def _chain_masked(problem: MaskedProblem, wrap: Wrap = lambda forward: forward, context: Enter = nullcontext) -> Runner:
    leaves = _masked_leaves(problem)
    weight, scores, bias = leaves.values()
    value = problem.threshold.value

    def forward(x: Tensor) -> Tensor:
        return F.linear(x, weight * _StraightThrough.apply(scores, value), bias)

    return linear_runner(problem, wrap(_autocast(problem, forward)), leaves, context=context)


def _ours_masked(problem: MaskedProblem, force: str | None = None) -> Runner:
    leaves = _masked_leaves(problem)
    weight, scores, bias = leaves.values()

    def forward(x: Tensor) -> Tensor:
        return lpaf_kernels.masked_linear(x, weight, scores, problem.threshold, bias)

    return linear_runner(problem, _autocast(problem, forward), leaves, context=_forced(force))


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


def chain_linear(factors: Factors) -> Linear:
    """The factors one after the other."""
    down, up, bias = factors.down, factors.up.t().contiguous(), factors.bias
    return lambda x: F.linear(F.linear(x, down), up, bias)


def _module(factors: Factors) -> Linear:
    return _layer(factors.down, factors.up, None, factors.bias, False)


def _by_layers(
    problem: BlockProblem,
    make: Callable[[Factors], Linear],
    wrap: Wrap = lambda forward: forward,
    context: Enter = nullcontext,
) -> Runner:
    """The blocks in plain torch around linears that ``make`` makes."""
    layers = [(layer, [make(factors) for factors in (*layer.attention, *layer.ffn)]) for layer in problem.layers]

    def forward(x: Tensor) -> Tensor:
        for layer, linears in layers:
            x = encoder_layer(x, layer, problem.case, linears)
        return x

    return block_runner(problem, wrap(forward), context)


def _compiled(chain: Callable[..., Runner], b2b: bool) -> Build:
    """A runner under torch.compile: max-autotune on CUDA, the default mode on the CPU."""

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

        runner = chain(problem, wrap=wrap)
        with torch._inductor.config.patch(b2b_gemm_pass=b2b):
            runner.run()
        return runner

    return build


def _exported(block: Callable[..., Runner]) -> Build:
    """A runner in ONNX Runtime."""
    return lambda problem: block(problem, wrap=exported.export(problem))


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


def _fused(layer: EncoderLayer, case: Case) -> Callable[[Tensor], Tensor]:
    """A layer's blocks as whole operators."""

    def norm(parameters: Any) -> lpaf_kernels.Norm | None:
        return None if parameters is None else lpaf_kernels.Norm("layer", *parameters, LAYER_NORM_EPS)

    attention_norm, ffn_norm = norm(layer.attention_norm), norm(layer.ffn_norm)
    blocks: list[Callable[[Tensor], Tensor]] = []
    if layer.attention:
        q, k, v, o = layer.attention
        packed = (torch.cat([q.down, k.down, v.down]), q.up, k.up, v.up, torch.cat([q.bias, k.bias, v.bias]), *o)
        blocks.append(
            lambda x: lpaf_kernels.lowrank_attention(x, *packed, num_heads=case.heads, residual=x, norm=attention_norm)
        )
    if layer.ffn:
        first, second = layer.ffn
        blocks.append(
            lambda x: lpaf_kernels.lowrank_ffn(
                x, *first, *second, residual=None if ffn_norm is None else x, norm=ffn_norm
            )
        )

    def forward(x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x)
        return x

    return forward


def _ours_block(problem: BlockProblem, force: str | None = None) -> Runner:
    layers = [_fused(layer, problem.case) for layer in problem.layers]

    def forward(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return block_runner(problem, forward, _forced(force))


def _graphed(build: Callable[..., Runner]) -> Build:
    """The runner's calls in one CUDA graph, one call for each copy of x, as a layer is part of a model's graph."""

    def captured(problem: Problem) -> Runner:
        runner = build(problem)

        def every_set() -> Any:
            # Kept for the gate; the memory of the other results is used anew within the graph.
            first = runner.call(0)
            for index in range(1, problem.sets):
                runner.call(index)
            return first

        with runner.context():
            graph, first = capture(every_set)

        def replay(_: int) -> Any:
            graph.replay()
            return first

        return Runner(replay, runner.outputs, graphed=True, repeats=problem.sets)

    return captured


BLOCKS = ("ffn", "attention", "encoder")


def _builds(
    linear: Build | None,
    block: Build,
    wrap: Callable[[Callable[..., Runner]], Build] = lambda build: build,
    masked: Build | None = None,
) -> dict[str, Build]:
    """Operation -> how it is built: single linears, masked ones, and all kinds of blocks alike."""
    singles = {"linear": linear, "masked": masked}
    builds = {op: wrap(build) for op, build in singles.items() if build is not None}
    return builds | {op: wrap(block) for op in BLOCKS}


_dense_block = functools.partial(_by_layers, make=dense_linear)
_chain_block = functools.partial(_by_layers, make=chain_linear)


def _ours_forced(name: str) -> Provider:
    return Provider(
        f"ours_{name}",
        f"ours, made to use {name}",
        _builds(functools.partial(_ours_linear, force=name), functools.partial(_ours_block, force=name)),
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
            "F.linear on the dense weight (for masked cells the pruned one)",
            _builds(_dense_linear, _dense_block, masked=_dense_masked),
            form="dense",
            default=EVERYWHERE,
        ),
        Provider(
            "dense_compile",
            'torch.compile of the dense blocks, mode="max-autotune" on CUDA',
            _builds(None, _dense_block, functools.partial(_compiled, b2b=False)),
            form="dense",
        ),
        Provider(
            "dense_onnxruntime",
            "the dense blocks, exported to ONNX Runtime",
            _builds(None, _dense_block, _exported),
            form="dense",
            devices=("cpu",),
            refuse=exported.missing,
        ),
        Provider(
            "chain",
            "F.linear, F.linear and, where columns are kept, F.linear and index_add_, eager; for masked cells"
            " F.linear on weight * mask, both in float32",
            _builds(_chain_linear, _chain_block, masked=_chain_masked),
            default=EVERYWHERE,
        ),
        Provider(
            "chain_graph",
            "the chain, replayed from a CUDA graph",
            _builds(_chain_linear, _chain_block, _graphed, _chain_masked),
            devices=("cuda",),
            default=("cuda",),
        ),
        Provider(
            "compile",
            'torch.compile of the chain, mode="max-autotune" on CUDA',
            _builds(_chain_linear, _chain_block, functools.partial(_compiled, b2b=False), _chain_masked),
        ),
        Provider(
            "onnxruntime",
            "the chain, exported to ONNX Runtime",
            _builds(None, _chain_block, _exported),
            devices=("cpu",),
            refuse=exported.missing,
        ),
        Provider(
            "compile_b2b",
            "the same with Inductor's b2b_gemm pass",
            _builds(_chain_linear, _chain_block, functools.partial(_compiled, b2b=True)),
            devices=("cuda",),
        ),
        Provider(
            "ours",
            "LowRankSparseLinear (masked_linear, lowrank_attention, lowrank_ffn for their cells), with its own choice"
            " of implementation",
            _builds(_ours_linear, _ours_block, masked=_ours_masked),
            default=EVERYWHERE,
        ),
        Provider(
            "ours_layers",
            "blocks of LowRankSparseLinear layers, one by one",
            _builds(None, functools.partial(_by_layers, make=_module)),
        ),
        Provider(
            "ours_graph",
            "ours, replayed from a CUDA graph",
            _builds(_ours_linear, _ours_block, _graphed, _ours_masked),
            devices=("cuda",),
            default=("cuda",),
        ),
        *(_ours_forced(name) for name in ("one_kernel", "two_kernels", "chain", "dense")),
        *(
            Provider(
                f"ours_{name}",
                f"masked_linear, made to use {name}",
                {"masked": functools.partial(_ours_masked, force=name)},
                devices=("cuda",),
                default=("cuda",),
            )
            for name in ("cast", "kernels")
        ),
        Provider(
            "ours_block",
            "ours, the blocks made to run as Triton's",
            _builds(None, functools.partial(_ours_block, force="block")),
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
