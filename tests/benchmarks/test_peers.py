"""Peers are loaded from a checkout that the user names; here from stand-ins with the same interface."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.cases import FfnCase, LinearCase
from benchmarks.environment import Ceilings, describe
from benchmarks.errors import InputError
from benchmarks.gate import Gate
from benchmarks.measure import Measurement, Session
from benchmarks.peers import PEERS, load_peers
from benchmarks.problem import make_problem
from benchmarks.providers import choose

CPU = torch.device("cpu")

LOSPARSE = """
import torch
from torch import nn


class LinearLoSparse(nn.Module):
    def __init__(self, in_feature, out_feature, reduced_rank, has_bias=True, has_sparse=True):
        super().__init__()
        self.left = nn.Linear(reduced_rank, out_feature, bias=False)
        self.right = nn.Linear(in_feature, reduced_rank, bias=False)
        self.sparse = nn.Linear(in_feature, out_feature, bias=False) if has_sparse else None
        self.bias = nn.Parameter(torch.zeros(out_feature))

    def initialize_weight(self, left_weight, right_weight, sparse_weight=None, bias=None):
        self.left.weight = nn.Parameter(left_weight)
        self.right.weight = nn.Parameter(right_weight)
        if self.sparse is not None:
            self.sparse.weight = nn.Parameter(sparse_weight)
        self.bias = nn.Parameter(bias)

    def prune_sparse(self):
        self.nonzero = self.sparse.weight.abs().sum(1).nonzero().flatten()
        self.sparse_weight_pruned = nn.Parameter(self.sparse.weight[self.nonzero])

    def forward(self, x):
        batch, length, _ = x.shape
        assert batch != 1
        y = self.left(self.right(x))
        if self.sparse is not None:
            wide = torch.zeros(batch, length, y.shape[-1])
            wide[..., self.nonzero] = x @ self.sparse_weight_pruned.T
            y = y + wide
        return y + self.bias
"""

FLASHSVD = """
import torch.nn.functional as F


def flashsvd_ffn(P, V1, U2, V2, b1, b2, BL=64, BD=128, BH=64, BR1=32, BR2=32):
    assert P.dim() == 3
    return F.gelu(P @ V1 + b1) @ U2 @ V2 + b2
"""


def checkout(root, name, text):
    file = root / PEERS[name].file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return f"{name}={root}"


@pytest.mark.parametrize("kept", [0, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_losparse_is_gated_like_the_others(tmp_path, kept, dtype, direction):
    peer = load_peers([checkout(tmp_path, "losparse", LOSPARSE)])["losparse"]
    case = LinearCase(40, 24, 6, kept, 16, dtype, direction)
    problem = make_problem(case, CPU)
    runner = peer.build(problem)
    assert Gate(problem).check(runner).failed is None
    assert runner.run().keys() == ({"y"} if direction == "forward" else {"y", "d_x", "d_down", "d_up", "d_bias"})
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("rows", [1, 17])
def test_losparse_is_not_run_on_an_odd_m(tmp_path, rows):
    extra = load_peers([checkout(tmp_path, "losparse", LOSPARSE)])
    session = Session(CPU, describe(CPU), Ceilings(1e10, 1e11), choose(["chain"], CPU, extra))
    measurement = Measurement(LinearCase(40, 24, 6, 2, rows), session)
    assert "even M" in measurement.failed["losparse"]
    assert set(measurement.rounds.runners) == {"chain"}


def test_a_wrong_peer_fails_the_gate(tmp_path):
    peer = load_peers([checkout(tmp_path, "losparse", LOSPARSE.replace("return y + self.bias", "return y"))])
    problem = make_problem(LinearCase(40, 24, 6, 2, 16), CPU)
    assert "error" in Gate(problem).check(peer["losparse"].build(problem)).failed


def test_flashsvd_is_gated_on_the_block(tmp_path):
    peer = load_peers([checkout(tmp_path, "flashsvd", FLASHSVD)])["flashsvd"]
    case = FfnCase(hidden=24, intermediate=48, rank=6, batch=2, length=8)
    problem = make_problem(case, CPU)
    assert Gate(problem).check(peer.build(problem)).failed is None
    assert peer.unavailable(case, CPU) == "runs on cuda only"
    assert peer.unavailable(case, torch.device("cuda")) is None
    assert peer.unavailable(LinearCase(40, 24, 6, 2, 16), torch.device("cuda")) == "does not run linear"


def test_loading_leaves_the_import_path_alone(tmp_path):
    before = list(sys.path)
    load_peers([checkout(tmp_path, "losparse", LOSPARSE)])
    assert sys.path == before
    assert "utils" not in sys.modules


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"utils\.py is missing; PATH must be a checkout of github\.com/yxli2123/LoS"):
        load_peers([f"losparse={tmp_path}"])
    with pytest.raises(InputError, match=r"utils\.py has no LinearLoSparse"):
        load_peers([checkout(tmp_path, "losparse", "x = 1\n")])
    with pytest.raises(InputError, match=r"utils\.py cannot be imported: ModuleNotFoundError"):
        load_peers([checkout(tmp_path, "losparse", "import no_such_module\n")])


@pytest.mark.parametrize("argument", ["losparse", "someone=/tmp", "=", ""])
def test_bad_arguments_are_refused(argument):
    with pytest.raises(InputError, match="NAME=PATH"):
        load_peers([argument])
