"""lpaf bench --step: every stage's step trains, and the command prints them side by side."""

from __future__ import annotations

import json

import pytest
import torch

from lpaf.cli import main
from lpaf.evaluate.step import STAGES, TrainingStep
from lpaf.models.targets import encoder_linears
from lpaf_kernels import LowRankPlusSparseLinear, MaskedLinear, MixedRankLinear
from tiny import build, write_model


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_trains_what_the_stage_trains(stage, bf16):
    dense = build("bert")
    ids = torch.randint(5, 40, (4, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1, 0])}
    step = TrainingStep(stage, dense, 4, inputs, bf16=bf16, compiled=False)
    before = {name: parameter.detach().clone() for name, parameter in step.model.named_parameters()}
    layer = {
        "pruning": MaskedLinear,
        "pruning-movement": MaskedLinear,
        "losparse": LowRankPlusSparseLinear,
        "mixed-rank": MixedRankLinear,
    }.get(stage)
    if layer is not None:
        assert all(isinstance(linear, layer) for linear in encoder_linears(step.model).values())
    for _ in range(3):
        step()
    moved = {name for name, p in step.model.named_parameters() if not torch.equal(p, before[name])}
    query = next(iter(encoder_linears(dense)))
    suffixes = {
        "fine-tuning": ("weight",),
        "pruning": ("weight", "scores"),
        "pruning-movement": ("weight", "scores"),
        "pruning-hard": ("weight",),
        "pruning-published": ("weight", "scores"),
        "losparse": ("down", "up", "sparse"),
        "mixed-rank": ("lowrank.down", "lowrank.up"),
    }[stage]
    assert {f"{query}.{suffix}" for suffix in suffixes} <= moved
    assert all(p.isfinite().all() for p in step.model.parameters())
    if layer is MaskedLinear:
        masks = [module.mask() for module in step.model.modules() if isinstance(module, MaskedLinear)]
        assert all(mask.float().mean() < 0.8 for mask in masks)
    if stage == "pruning-hard":
        assert all((linear.weight == 0).float().mean() > 0.2 for linear in encoder_linears(step.model).values())


@pytest.mark.slow
def test_a_compiled_step_trains():
    ids = torch.randint(5, 40, (4, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1, 0])}
    losses = []
    for compiled in (False, True):
        step = TrainingStep("pruning", build("bert").eval(), 4, inputs, bf16=False, compiled=compiled)
        step.model.eval()
        for _ in range(3):
            step()
        losses.append([p.detach().clone() for p in step.model.parameters()])
    for eager, compiled in zip(*losses, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


def test_published_masks_are_ours():
    """The sorted mask of the published step and the selected one of ours compute the same layer and gradients."""
    torch.manual_seed(0)
    ids = torch.randint(5, 40, (4, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1, 0])}
    ours, published = (
        TrainingStep(stage, build("bert"), 4, inputs, bf16=False, compiled=False)
        for stage in ("pruning", "pruning-published")
    )
    outputs = []
    for step in (ours, published):
        step.model.eval()
        generator = torch.Generator().manual_seed(1)
        for linear in encoder_linears(step.model).values():
            linear.scores.data = torch.randn(linear.scores.shape, generator=generator)
        if step is ours:
            step.callbacks[0].pruner.update_masks(step.model, 0.5)
        logits = step.model(**step.inputs).logits
        logits.square().sum().backward()
        outputs.append([logits, *(linear.scores.grad for linear in encoder_linears(step.model).values())])
    for actual, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(actual, expected)


def test_command_prints_every_stage(tmp_path, capsys):
    model = str(write_model(tmp_path / "m"))
    arguments = ["bench", "--model", model, "--step", "--batch", "2", "--length", "6", "--rounds", "2", "--rank", "4"]
    assert main([*arguments, "--json", "--device", "cpu"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["stage"] for row in rows] == list(STAGES)
    assert rows[0]["ratio"] == 1.0
    assert all(row["step_ms"] > 0 and row["rank"] == 4 and row["batch"] == 2 for row in rows)
    assert main([*arguments, "--stages", "fine-tuning,losparse", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "losparse" in printed
    assert "mixed-rank" not in printed


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--step", "--stages", "sleeping"], "--stages sleeping: expected some of fine-tuning"),
        (
            ["--step", "--mode", "compiled", "--stages", "mixed-rank"],
            "--stages mixed-rank: expected some of fine-tuning",
        ),
        (["--rank", "0"], "--rank: is for --step"),
        (["--step", "--batch", "1,2"], "--batch 1,2: --step takes one"),
        (["--step", "--mode", "graphed"], "--mode graphed: --step takes eager or compiled"),
        (["--step", "--dtype", "bfloat16"], "--dtype bfloat16: --step keeps float32 weights"),
        (["--step", "--fuse"], "--fuse: is for inference"),
        (["--step", "--length", "64"], "--length 64: the model takes at most 32 tokens"),
        (["--step", "--length", "8", "--rank", "33"], "--rank 33: above min"),
        (["--step", "--rounds", "1"], "--rounds 1: must be at least 2"),
        (["--rank", "3"], "--rank: is for --step"),
        (["--bf16"], "--bf16: is for --step"),
    ],
)
def test_bad_input(arguments, text, tmp_path, capsys):
    model = str(write_model(tmp_path / "m"))
    assert main(["bench", "--model", model, "--device", "cpu", *arguments]) == 2
    assert text in capsys.readouterr().err
