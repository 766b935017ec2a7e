"""How lowrank_attention is chosen for, measured and explained: by its own kernels, or its layers one by one."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from lpaf_kernels import LowRankAttention, LowRankSparseLinear, explain, use_provider
from lpaf_kernels.ops import lowrank_attention as op
from lpaf_kernels.triton.launch import LAUNCHES
from lpaf_kernels.tuning import AttentionShape, Gpu, Plan, Table, dispatch, tune_attention
from lpaf_kernels.tuning import lowrank_attention as plans
from lpaf_kernels.tuning import tune_lowrank_attention as tune

GPU = Gpu("NVIDIA Test GPU", 90, "3.6")
RANKS = (80, 80, 80, 80)
SHAPE = AttentionShape(
    "lowrank_attention", "forward", "bfloat16", 768, 12, 12, 64, 768, RANKS, (0, 0, 0, 0), False, 128
)
SIZES = (768, 12, 12, 64, 768, RANKS, (0, 0, 0, 0), False)
BLOCK = Plan(
    "block", ("project-128x0x64-w8-s3-p1-r272", "attend-64x64x64-w4-s2-p1-r144", "close-16x64x64-w4-s2-p1-r144"), 2.0
)
CHAIN = Plan("chain", (), 3.0)


def choose(shape: AttentionShape, gpu: Gpu = GPU) -> str:
    return dispatch.choose(shape, 4096, gpu).provider


def directions(shape: AttentionShape) -> list[str]:
    return [choose(shape._replace(direction=direction)) for direction in ("forward", "training", "backward")]


def test_table_round_trip(write) -> None:
    other = SHAPE._replace(kv_heads=4, rotary=True, kept=(5, 0, 0, 7), length=512)
    entries = {SHAPE: {16: (BLOCK, CHAIN), 4096: (CHAIN,)}, other: {512: (CHAIN,)}}
    assert Table.load(write(entries)).entries == entries


def test_the_rule_takes_the_block_for_every_forward(write) -> None:
    """A forward that autograd records too: nothing but its arguments is saved. There is no other backward."""
    assert directions(SHAPE) == ["block", "block", "chain"]
    assert dispatch.choose(SHAPE, 128, GPU).microseconds is None


@pytest.mark.parametrize("arch", [75, 80, 86, 90, 100, 103, 120])
def test_the_rule_names_its_architectures(write, arch: int) -> None:
    assert choose(SHAPE, Gpu("Some GPU", arch, "3.6")) == ("block" if arch in (80, 90, 100, 103) else "chain")


@pytest.mark.parametrize(
    ("change", "provider"),
    [
        ({"length": 512}, "block"),
        ({"length": 513}, "chain"),
        ({"ranks": (272, 272, 272, 300)}, "block"),  # o runs as a layer
        ({"ranks": (80, 80, 273, 80)}, "chain"),
        ({"ranks": (81, 265, 270, 80)}, "block"),  # k begins at column 81, v at 346: one and two columns more
        ({"ranks": (81, 265, 271, 80)}, "chain"),
        ({"head_dim": 48}, "chain"),
        ({"head_dim": 128, "ranks": (272, 272, 272, 80)}, "block"),
        ({"head_dim": 128, "rotary": True, "ranks": (272, 272, 272, 80)}, "block"),
        ({"dtype": "float32"}, "chain"),
        ({"dtype": "float32", "ranks": (64, 64, 68, 300)}, "block"),
    ],
)
def test_the_rule_takes_what_a_launch_holds(write, change: dict, provider: str) -> None:
    assert choose(SHAPE._replace(**change)) == provider


def test_without_triton_the_chain_serves(write) -> None:
    bare = Gpu(GPU.name, 90, None)
    assert choose(SHAPE, bare) == "chain"
    with use_provider("block"), pytest.raises(RuntimeError, match="'block' was forced"):
        choose(SHAPE, bare)


def test_nearest_shape_serves_if_its_launches_hold_the_rank(write) -> None:
    write({SHAPE: {4096: (BLOCK, CHAIN)}})
    for near in ({"length": 190}, {"ranks": (112, 112, 112, 112)}, {"kv_heads": 12, "heads": 16}):
        assert dispatch.choose(SHAPE._replace(**near), 4096, GPU) == BLOCK
    write({SHAPE._replace(ranks=(120, 120, 120, 120)): {4096: (BLOCK, CHAIN)}})
    for beyond in ((120, 120, 145, 120), (120, 120, 120, 145)):
        assert dispatch.choose(SHAPE._replace(ranks=beyond), 4096, GPU) == CHAIN
    # Another length, another head, turned heads: a different matter, so the rule.
    for other in ({"length": 20}, {"head_dim": 32}, {"rotary": True}):
        found = dispatch.choose(SHAPE._replace(ranks=(120, 120, 120, 120), **other), 4096, GPU)
        assert found == Plan("block")


def test_use_provider(write) -> None:
    with use_provider("block"):
        assert directions(SHAPE._replace(length=4096)) == ["block", "block", "chain"]
        # Nothing else can run what no launch holds.
        assert directions(SHAPE._replace(ranks=(300, 80, 80, 80))) == ["chain"] * 3
        assert directions(SHAPE._replace(head_dim=48)) == ["chain"] * 3
    for name in ("chain", "two_kernels"):
        with use_provider(name):
            assert directions(SHAPE) == ["chain"] * 3


def attention(rank: int, dtype: torch.dtype = torch.bfloat16) -> LowRankAttention:
    q, o = (LowRankSparseLinear(768, 768, rank, 38, dtype=dtype) for _ in "qo")
    k, v = (LowRankSparseLinear(768, 256, rank, dtype=dtype) for _ in "kv")
    return LowRankAttention(q, k, v, o, 12, num_kv_heads=4)


def test_explain(write) -> None:
    assert explain(attention(80), 4096, length=128).plan.provider == "cpu"
    choice = explain(attention(80), 4096, gpu=GPU, length=128)
    text = "lowrank_attention forward 768->12/4x64->768 ranks 80, 80, 80, 80 kept 38, 0, 0, 38 length 128 bfloat16"
    assert f"{text}, 4096 rows: block" in str(choice)
    assert "default.json, a rule" in str(choice)
    assert explain(attention(80), 4096, gpu=GPU).plan.provider == "chain"  # one sequence
    assert explain(attention(80), 4096, "backward", GPU, length=128).plan.provider == "chain"
    assert explain(attention(80, torch.float64), 128, gpu=GPU).plan.provider == "chain"
    with use_provider("block"):
        assert explain(attention(80), 4096, gpu=GPU).reason == "forced by use_provider"
    with pytest.raises(ValueError, match="length: expected at least 0, got -1"):
        explain(attention(80), 4096, gpu=GPU, length=-1)


def small(sequences: int = 2, **changes) -> plans.Problem:
    """The operator's arguments, small and in bfloat16."""
    shape = SHAPE._replace(
        in_features=7, heads=2, kv_heads=1, head_dim=32, out_features=6, ranks=(3, 2, 4, 5), kept=(2, 0, 1, 3), length=5
    )
    return tune.make_attention_problem(sequences, shape._replace(**changes), torch.bfloat16, "cpu")


def test_a_broken_block_warns_once_and_the_layers_serve(write, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered for CUDA, on CPU tensors that seem to lie on GPU. A feed-forward block's plan still serves."""
    monkeypatch.setattr(dispatch, "current_gpu", lambda index: GPU)
    tried = []

    def fail(plan, problem, *_):
        tried.append(plan.provider)
        raise RuntimeError("no C compiler\nmore")

    monkeypatch.setattr(plans, "forward", fail)
    given = small()
    expected = op.chain(*given)
    with use_provider("block"), pytest.raises(RuntimeError, match="no C compiler"):
        op._lowrank_attention_cuda(*given)
    with pytest.warns(UserWarning, match="block failed and is not used again: no C compiler"):
        assert torch.equal(op._lowrank_attention_cuda(*given), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(op._lowrank_attention_cuda(*given), expected)
    assert tried == ["block", "block"]
    assert choose(SHAPE) == "chain"
    ffn = dispatch.FfnShape("lowrank_ffn", "forward", "bfloat16", 768, 3072, 768, (80, 80), (0, 0), 0)
    assert dispatch.choose(ffn, 4096, GPU).provider == "block"


def test_what_the_block_gets_and_gives(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "current_gpu", lambda index: GPU)
    seen = []

    def forward(plan, problem, arch):
        seen.append(problem)
        return torch.zeros(10, 6).bfloat16()

    monkeypatch.setattr(plans, "forward", forward)
    given = small(rotary=True)
    given = given._replace(
        x=given.x.transpose(0, 1).contiguous().transpose(0, 1),
        residual=torch.randn(2, 5, 6).bfloat16(),
        down_qkv=given.down_qkv.t().contiguous().t(),
        attn_mask=torch.ones(2, 1, 1, 5, dtype=torch.bool).expand(2, 2, 5, 5),
        max_seqlen=None,
    )
    assert op._lowrank_attention_cuda(*given).shape == (2, 5, 6)
    rows = given._replace(attn_mask=torch.ones(5, 5).expand(2, 2, 5, 5))
    op._lowrank_attention_cuda(*rows)
    bounds = torch.tensor([0, 4, 10])
    flat = given._replace(
        x=given.x.reshape(10, 7), residual=None, attn_mask=None, cu_seqlens=bounds, cos=None, sin=None
    )
    assert op._lowrank_attention_cuda(*flat).shape == (10, 6)
    padding, square, variable = seen
    for problem in seen:
        assert problem.x.shape == (10, 7)
        assert problem.x.is_contiguous()
        assert problem.down_qkv.is_contiguous()
    assert padding.residual.shape == (10, 6)
    assert padding.attn_mask.shape == (2, 2, 1, 5)
    assert square.attn_mask.shape == (2, 2, 5, 5)
    assert padding.cos.shape == (5, 32)
    assert (padding.max_seqlen, variable.max_seqlen) == (5, 6)
    assert variable.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"sequences": 0}])
def test_what_the_kernels_never_get(change: dict, write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "current_gpu", lambda index: GPU)
    monkeypatch.setattr(plans, "forward", lambda *_: pytest.fail("the kernels were called"))
    given = small(change.get("sequences", 2))
    given = tune.double(given) if "dtype" in change else given
    with use_provider("block"):
        assert torch.equal(op._lowrank_attention_cuda(*given), op.chain(*given))


def test_short_sequences_take_short_tiles() -> None:
    def tile(length: int) -> int:
        problem = small(4096 // length, ranks=RANKS, kept=(0, 0, 0, 0), heads=12, kv_heads=12, length=length)
        return plans.block_launches(Plan("block"), problem, problem.shape("forward"), 90)[1].block_m

    assert [tile(length) for length in (16, 60, 128)] == [16, 64, 128]


def test_plans_to_measure_hold_the_rank() -> None:
    for rank in (16, 80, 130, 260, 300):
        for arch in (80, 90, 100):
            shape = SHAPE._replace(ranks=(rank,) * 4)
            found = tune.attention_plans(shape, 4096, arch)
            assert found[0] == Plan("chain")
            assert (len(found) > 1) == (rank <= 260)
            for plan in found[1:]:
                assert plan.provider == "block"
                assert all(arch in LAUNCHES[name].archs for name in plan.launches)
                assert dispatch._holds(plan, shape, arch)
                assert tuple(LAUNCHES[name].kernel for name in plan.launches) == plans.FORWARD
    wide = tune.attention_plans(SHAPE._replace(ranks=(80, 80, 80, 300)), 4096, 90)
    assert {len(plan.launches) for plan in wide[1:]} == {2}


def test_ranking_drops_what_is_wrong_and_sorts_by_time(monkeypatch) -> None:
    """On the CPU: the chain, and a block that is the chain again or wrong."""
    right, wrong = (Plan("block", (name,)) for name in list(LAUNCHES)[:2])
    monkeypatch.setattr(tune, "attention_plans", lambda *_: [Plan("chain"), right, wrong])
    problem = small(60, rotary=True)

    def forward(plan, given, arch):
        chained = op.chain(*given._replace(x=given.x.view(60, 5, 7)))
        return chained.view(300, 6) * (1 if plan == right else 2)

    monkeypatch.setattr(tune, "forward", forward)
    with pytest.warns(UserWarning, match="is wrong"):
        ranked = tune.rank_attention_plans(problem, GPU, lambda calls: [float(-i) for i in range(len(calls))])
    assert ranked == (right._replace(microseconds=-1.0), Plan("chain", (), -0.0))


def test_tuning_needs_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, so nothing is refused")
    with pytest.raises(RuntimeError, match="torch finds no CUDA device"):
        tune_attention([SIZES], output=tmp_path / "table.json")


def test_batches_fill_the_rows_with_whole_sequences() -> None:
    assert tune.batches([16, 128, 700]) == [(1, 128), (5, 128), (1, 512)]


def test_measurements_are_written_one_by_one(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "this_gpu", lambda: GPU)
    monkeypatch.setattr(tune, "make_attention_problem", lambda sequences, shape, dtype: sequences)
    monkeypatch.setattr(tune, "rank_attention_plans", lambda sequences, gpu, times: (BLOCK, CHAIN))
    lines: list[str] = []
    path = tune_attention([SIZES], batches=[(1, 128), (32, 128), (2, 512)], report=lines.append)
    assert Table.load(path).entries == {
        SHAPE: {128: (BLOCK, CHAIN), 4096: (BLOCK, CHAIN)},
        SHAPE._replace(length=512): {1024: (BLOCK, CHAIN)},
    }
    assert lines[0].endswith("length 128 128 rows: block 2.0 us, chain 3.0 us")


@pytest.mark.parametrize(
    "sizes",
    [
        SIZES[:-1],
        (768, 12, 5, *SIZES[3:]),
        (*SIZES[:5], (80, 80, 80, 0), (0, 0, 0, 0), False),
        (*SIZES[:5], (80, 80, 80), (0, 0, 0), False),
        (*SIZES[:3], 63, *SIZES[4:7], True),
    ],
)
def test_bad_shapes_are_explained(sizes: tuple, write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "this_gpu", lambda: GPU)
    with pytest.raises(ValueError, match="shapes: expected"):
        tune_attention([sizes])
    with pytest.raises(ValueError, match=r"batches: expected \(sequences, length\), got \(0, 128\)"):
        tune_attention([SIZES], batches=[(0, 128)])
