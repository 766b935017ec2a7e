"""Layer-wise distillation: its value by hand, what it leaves alone, and runs of every kind of method with it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_kill import assert_same_run, chosen, command, kill_and_resume
from transformers import AutoModelForSequenceClassification

from launch import launch
from lpaf.errors import InputError
from lpaf.models.truncate import truncate
from lpaf.recipes.compress import Compression, compress
from lpaf.recipes.options import CompressOptions
from lpaf.recipes.prepare import prepare
from lpaf.recipes.study import read_study
from lpaf.retrain.layer_distillation import LayerDistillation, real_positions, teaching_layers
from lpaf.retrain.trainer import StageTrainer
from tiny import build

LENGTHS = (5, 9, 2)
GENERATION = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
SEQUENCES = {
    "bart": {
        "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40,
    },
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2},
}  # fmt: skip


def padded(lengths=LENGTHS, left: bool = False) -> dict[str, torch.Tensor]:
    """A batch of sentences of these lengths, padded on one side."""
    width = max(lengths)
    mask = torch.tensor([[1] * length + [0] * (width - length) for length in lengths])
    mask = mask.flip(1) if left else mask
    ids = torch.randint(5, 40, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1]), "index": torch.arange(3)}


def pair(model_type: str = "bert", **changes) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A teacher, and a student whose weights are a little off."""
    teacher, student = build(model_type, **changes).eval(), build(model_type, **changes).eval()
    disturb(student)
    return teacher, student


def disturb(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def run(model: torch.nn.Module, batch: dict[str, torch.Tensor], passes: int = 1):
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}
    return model(**{name: torch.cat([tensor] * passes) for name, tensor in inputs.items()}, output_hidden_states=True)


def loss(teacher: torch.nn.Module, student: torch.nn.Module, batch, weight: float = 1.0) -> torch.Tensor:
    (name, value), *others = LayerDistillation(teacher, weight)(student, run(student, batch), batch).items()
    assert (name, others) == ("layer_distillation", [])
    return value


def by_hand(student, teacher, real: torch.Tensor) -> float:
    """The sum over layers of the mean over examples of the mean over what is real, in loops."""
    total = 0.0
    for layer, (found, wanted) in enumerate(zip(student, teacher, strict=True)):
        if layer > 0:  # the embeddings' output comes first
            squared = (found.detach().double() - wanted.detach().double()).square()
            rows = [float(squared[row, keep].mean()) for row, keep in enumerate(real)]
            total += sum(rows) / len(rows)
    return total


# the value --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "deberta-v2", "modernbert"])
def test_value_is_that_by_hand(model_type):
    teacher, student = pair(model_type)
    batch = padded()
    with torch.no_grad():
        states = [run(model, batch).hidden_states for model in (student, teacher)]
        expected = by_hand(*states, batch["attention_mask"].bool())
        assert expected > 1e-3
        torch.testing.assert_close(float(loss(teacher, student, batch, weight=15.0)), 15 * expected, rtol=1e-5, atol=0)


def test_padding_does_not_matter():
    """Neither what stands there, nor how much of it there is."""
    teacher, student = pair()
    batch = padded()
    expected = loss(teacher, student, batch)
    other = {name: tensor.clone() for name, tensor in batch.items()}
    other["input_ids"][batch["attention_mask"] == 0] = 7
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    torch.testing.assert_close(loss(teacher, student, other), expected)
    for name in ("input_ids", "attention_mask"):
        other[name] = torch.nn.functional.pad(batch[name], (0, 6))
    torch.testing.assert_close(loss(teacher, student, other), expected)
    alone = []
    for row, length in enumerate(LENGTHS):
        alone.append(loss(teacher, student, {name: tensor[row : row + 1, :length] for name, tensor in inputs(batch)}))
    torch.testing.assert_close(torch.stack(alone).mean(), expected)


def inputs(batch):
    return [(name, tensor) for name, tensor in batch.items() if tensor.dim() == 2]


def test_a_model_without_difference_has_no_loss():
    teacher, student = build("bert").eval(), build("bert").eval()
    assert loss(teacher, student, padded()) == 0.0


def test_two_passes_are_both_compared():
    teacher, student = pair()
    student.train()  # dropout makes them differ
    batch = padded()
    torch.manual_seed(0)
    outputs = run(student, batch, passes=2)
    found = LayerDistillation(teacher, 1.0)(student, outputs, batch)["layer_distillation"]
    halves = [SimpleNamespace(hidden_states=half) for half in zip(*(s.chunk(2) for s in outputs.hidden_states))]
    assert not torch.equal(halves[0].hidden_states[1], halves[1].hidden_states[1])
    wanted = run(teacher, batch).hidden_states
    expected = sum(by_hand(half.hidden_states, wanted, batch["attention_mask"].bool()) for half in halves) / 2
    torch.testing.assert_close(float(found.detach()), expected, rtol=1e-5, atol=0)


def test_only_the_student_learns():
    teacher, student = pair()
    teacher.train()  # the term sees to it that it has no dropout
    loss(teacher, student, padded()).backward()
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    moved = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert {name for name, _ in student.named_parameters()} - moved == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias",
    }  # fmt: skip
    assert all(bool(parameter.grad.any()) for name, parameter in student.named_parameters() if name in moved)


def test_teacher_runs_in_the_students_precision():
    teacher, student = build("bert").eval(), build("bert").eval()
    batch = padded()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = run(student, batch)
    assert outputs.hidden_states[1].dtype == torch.float32  # behind a LayerNorm
    values = {bf16: LayerDistillation(teacher, 1.0, bf16)(student, outputs, batch) for bf16 in (True, False)}
    assert values[True]["layer_distillation"] == 0.0 < values[False]["layer_distillation"]


# layers and stacks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [(3, 3, [0, 1, 2]), (3, 12, [3, 7, 11]), (4, 6, [1, 2, 4, 5]), (1, 6, [5]), (5, 6, [1, 2, 3, 4, 5])],
)
def test_students_of_fewer_layers_follow_spaced_ones(student, teacher, expected):
    assert teaching_layers(student, teacher) == expected


@pytest.mark.parametrize("student", [0, 7])
def test_students_of_no_or_more_layers_are_refused(student):
    with pytest.raises(ValueError, match=f"student: must have 1 to 6 layers, as its teacher, got {student}"):
        teaching_layers(student, 6)


def test_a_shorter_student_follows_the_layers_that_it_is_given():
    teacher, _ = pair(num_hidden_layers=4)
    student, batch = truncate(teacher, 2).eval(), padded()
    own, wanted = (run(model, batch).hidden_states for model in (student, teacher))
    expected = by_hand(own, (wanted[0], wanted[2], wanted[4]), batch["attention_mask"].bool())
    torch.testing.assert_close(float(loss(teacher, student, batch)), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("model_type", SEQUENCES)
def test_both_stacks_of_an_encoder_decoder_have_padding_of_their_own(model_type):
    models = []
    for _ in range(2):
        config = transformers.AutoConfig.for_model(model_type, **GENERATION, **SEQUENCES[model_type])
        torch.manual_seed(0)
        models.append(transformers.AutoModelForSeq2SeqLM.from_config(config).eval())
    teacher, student = models
    disturb(student)
    answers = padded((4, 1, 6))
    real = answers["attention_mask"].bool()
    batch = padded() | {"labels": answers["input_ids"].masked_fill(~real, -100)}
    batch["decoder_input_ids"] = teacher.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    found, wanted = run(student, batch), run(teacher, batch)
    expected = by_hand(found.encoder_hidden_states, wanted.encoder_hidden_states, batch["attention_mask"].bool())
    assert len(found.encoder_hidden_states) == 4
    expected += by_hand(found.decoder_hidden_states, wanted.decoder_hidden_states, real)
    torch.testing.assert_close(float(loss(teacher, student, batch)), expected, rtol=1e-5, atol=0)
    batch["decoder_attention_mask"] = real.long()
    del batch["labels"]
    torch.testing.assert_close(float(loss(teacher, student, batch)), expected, rtol=1e-4, atol=0)


def test_decoders_by_their_attention_mask():
    teacher, student = pair("gpt2")
    batch = padded(left=True)
    found, wanted = (run(model, batch).hidden_states for model in (student, teacher))
    expected = by_hand(found, wanted, batch["attention_mask"].bool())
    torch.testing.assert_close(float(loss(teacher, student, batch)), expected, rtol=1e-5, atol=0)


def test_without_any_mask_every_position_is_real():
    shape = torch.Size((2, 3))
    assert real_positions("hidden_states", {"input_ids": torch.ones(shape)}, shape).all()
    labels = {"labels": torch.tensor([0, 1]), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    found = real_positions("decoder_hidden_states", labels, shape)
    assert torch.equal(found, labels["attention_mask"].bool()), "classes say nothing of positions"


# whole runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({}, ("prune", "retrain")),
        pytest.param(
            {"pruner": "lottery-ticket", "rounds": 1}, ("round-1", "prune", "retrain"), marks=pytest.mark.slow
        ),
        ({"method": "losparse", "rank": None, "ratio": 0.4}, ("prune", "retrain")),
        ({"method": "svd", "bf16": True}, ("retrain",)),
        ({"method": "kd", "rank": None, "ratio": 0.5}, ("retrain",)),
    ],
)
def test_every_method_is_taught_in_pruning_and_retraining(changes, stages, tiny_options):
    options = tiny_options | {"distill": "layer", "retrain_lr": 2e-3, "prune_lr": 2e-3} | changes
    if "prune" not in stages:
        del options["prune_lr"]
    model, report = compress(CompressOptions(**options), command="")
    trained = {stage for stage, history in report["training"].items() if "layer_distillation" in history[0]}
    assert trained == set(stages)
    for stage in stages:
        last = report["training"][stage][-1]
        consistency = last.get("consistency", 0.0)
        assert last["loss"] == pytest.approx(last["task"] + last["layer_distillation"] + consistency, rel=1e-4)
        assert "distillation" not in last, "alpha_output is 0"
    assert "teacher" not in report["seconds"], "no logits are wanted"
    config = json.loads((Path(options["output"]) / "report.json").read_text())["config"]
    assert (config["distill"], config["distill_output"], config["distill_layer"]) == ("layer", 0.0, 15.0)
    reloaded = AutoModelForSequenceClassification.from_pretrained(options["output"]).state_dict()
    assert reloaded.keys() == model.state_dict().keys(), "nothing of the teacher is saved"
    assert all(torch.equal(reloaded[name], tensor) for name, tensor in model.state_dict().items())


def test_layers_come_nearer_to_their_teachers(tiny_options):
    """Nearer than the same updates bring them when the layers hardly count."""
    found = {}
    for weight in (15.0, 0.01):
        options = tiny_options | {"method": "svd", "distill": "layer", "distill_layer": weight, "retrain_epochs": 8}
        options |= {"output": f"{tiny_options['output']}-{weight:g}", "retrain_lr": 5e-3, "checkpoint_steps": 0}
        _, report = compress(CompressOptions(**options), command="")
        history = report["training"]["retrain"]
        found[weight] = [history[at]["layer_distillation"] / weight for at in (0, -1)]
    assert found[15.0][1] < 0.9 * found[15.0][0]
    assert found[15.0][1] < 0.9 * found[0.01][1]


def test_logits_teach_beside_the_whole_task_loss(tiny_options):
    options = tiny_options | {"distill": "layer", "distill_output": 2.0, "distill_layer": 0.5}
    _, report = compress(CompressOptions(**options | {"consistency": False}), command="")
    for stage in ("prune", "retrain"):
        last = report["training"][stage][-1]
        expected = last["task"] + 2 * last["distillation"] + last["layer_distillation"]
        assert last["loss"] == pytest.approx(expected, rel=1e-4)


def test_weight_of_the_layers_may_be_zero(tiny_options):
    options = tiny_options | {"distill": "layer", "distill_output": 1.0, "distill_layer": 0.0}
    _, report = compress(CompressOptions(**options), command="")
    assert {"task", "distillation"} < report["training"]["prune"][0].keys()
    assert "layer_distillation" not in report["training"]["prune"][0]


def test_cap_keeps_its_own_weights_and_is_taught_by_the_layers_too(tiny_options):
    options = tiny_options | {"distill": "layer", "pruner": "cap"}
    _, report = compress(CompressOptions(**options), command="")
    last = report["training"]["prune"][-1]
    parts = [0.1 * last["task"], 0.9 * last["distillation"], last["layer_distillation"]]
    parts += [value for name, value in last.items() if name.startswith("contrast_")]
    assert len(parts) > 4
    assert last["loss"] == pytest.approx(sum(parts), rel=1e-4)
    assert "distillation" not in report["training"]["retrain"][-1]
    assert "layer_distillation" in report["training"]["retrain"][-1]


def test_checkpoints_hold_the_student_alone(tiny_options, monkeypatch):
    """The same tensors as those of a run without a teacher, which stays as it is."""
    saved, original = [], StageTrainer._save_checkpoint

    def watch(self, model, trial):
        original(self, model, trial)
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        saved[-1] |= {(self.stage, name) for name in load_file(checkpoint / "model.safetensors")}

    monkeypatch.setattr(StageTrainer, "_save_checkpoint", watch)
    for distill in ("layer", 0.0):
        saved.append(set())
        options = CompressOptions(
            **tiny_options | {"distill": distill, "output": f"{tiny_options['output']}-{distill}"}
        )
        run = Compression(prepare(options), "")
        dense = run.finetune()
        train = run.with_teacher(dense)
        assert train.column_names == run.train.column_names, "no logits are wanted"
        before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
        student = copy.deepcopy(dense)
        run.prune(student, train, dense)
        assert student.state_dict().keys() == before.keys()
        assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    assert {stage for stage, _ in saved[0]} == {"finetune", "prune"}
    assert saved[0] == saved[1]


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tiny_data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    statuses, said = launch(layer_wise(tiny_model, tiny_data, output), output.parent / "log")
    assert statuses == [0], said
    return output


def layer_wise(model: Path, data: Path, output: Path) -> list[str]:
    return command(model, data, output, *chosen("lpaf"), "--distill", "layer", "--distill-output", "1")


@pytest.mark.parametrize("death", ["prune", "retrain"])
def test_killed_run_resumes_to_the_same_weights(undisturbed, tiny_model, tiny_data, tmp_path, death):
    kill_and_resume(layer_wise(tiny_model, tiny_data, tmp_path / "out"), tmp_path / "out", death)
    assert_same_run(tmp_path / "out", undisturbed)
    assert "layer_distillation" in json.loads((undisturbed / "report.json").read_text())["training"]["retrain"][0]


# options --------------------------------------------------------------------------------------------------------------


def test_a_study_teaches_layer_by_layer_where_there_is_a_teacher(tmp_path):
    lines = ["[options]", 'model = "m"', 'task = "sst2"', 'distill = "layer"', "distill_layer = 5"]
    lines += ["[methods.kd]", 'method = "kd"', "ratio = 0.5", "[methods.first]", 'method = "truncate"', "ratio = 0.5"]
    (tmp_path / "study.toml").write_text("\n".join(lines))
    file = read_study(tmp_path / "study.toml")
    taught, alone = (file.settings(label, (), 0, {}) for label in ("kd", "first"))
    assert (taught["distill"], taught["distill_layer"]) == ("layer", 5)
    assert not {"distill", "distill_layer"} & alone.keys()
    (tmp_path / "study.toml").write_text("\n".join([*lines, 'distill = "layer"']))
    with pytest.raises(InputError, match="--distill layer: --method truncate has no teacher"):
        read_study(tmp_path / "study.toml")


def test_defaults_of_the_paper_are_the_same_run():
    implied = CompressOptions("m", "sst2", "out", distill="layer")
    assert implied == CompressOptions("m", "sst2", "out", distill="layer", distill_output=0, distill_layer=15)
    assert CompressOptions("m", "sst2", "out").distill_layer is None


def test_a_temperature_without_logits_is_refused():
    with pytest.raises(InputError, match="--temperature: is for logits, which --distill layer leaves out"):
        CompressOptions("m", "sst2", "out", distill="layer", temperature=3.0)
    CompressOptions("m", "sst2", "out", distill="layer", distill_output=1.0, temperature=3.0)
