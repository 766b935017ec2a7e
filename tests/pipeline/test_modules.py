"""Offline compression of chosen modules: what is chosen, how much is stored, what reloads, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import lpaf_kernels
from lpaf.cli import main
from lpaf.errors import InputError
from lpaf.factorize.autoencoder import Decoded
from lpaf.factorize.baselines import kronecker, tucker
from lpaf.factorize.offline import ModuleSettings, compress_module, fold_norms, plan_module
from lpaf.models.checkpoint import save_compressed
from lpaf.models.conv1d import use_linears
from lpaf.models.count import encoder_params
from lpaf.models.decoded import build_layers, describe, install, layer_tensors, remake
from lpaf.models.modules import module_groups
from lpaf.recipes.compress import Compression, compress
from lpaf.recipes.options import CompressOptions
from lpaf.recipes.prepare import prepare
from tiny import build, write_text_model

# which matrices -------------------------------------------------------------------------------------------------------


def test_names_are_roles_and_embeddings():
    model = build("bert")
    embeddings, key, down = module_groups(model, ["embeddings", "key", "output-dense"])
    assert embeddings.shapes == {"bert.embeddings.word_embeddings": (40, 32)}
    assert list(key.shapes) == [f"bert.encoder.layer.{i}.attention.self.key" for i in range(2)]
    assert down.shapes["bert.encoder.layer.0.output.dense"] == (32, 48)
    assert key.joinable
    assert not embeddings.joinable


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["keys"], "did you mean key?"),
        (["gate"], "expected names out of embeddings, query, key"),
        (["key", "down", "output-dense"], "output-dense is named twice"),
    ],
)
def test_unknown_names_are_refused(names, message):
    with pytest.raises(ValueError, match="--modules") as error:
        module_groups(build("bert"), names)
    assert message in str(error.value)


def test_embeddings_of_two_stacks_are_refused():
    with pytest.raises(ValueError, match="no single table of token embeddings"):
        module_groups(build("t5"), ["embeddings"])


# how much is stored ---------------------------------------------------------------------------------------------------

CASES = [
    ("svd", {}),
    ("svd", {"concatenate": True}),
    ("autoencoder", {"keep_norms": True, "cosine": 0.5}),
    ("autoencoder", {"concatenate": True, "decoder": "mlp1", "keep_norms": True}),
    ("autoencoder", {"decoder": "mlp2"}),
    ("prune-l1", {}),
    ("prune-l1", {"concatenate": True}),
    ("kronecker", {"concatenate": True}),
    ("tucker", {}),
    ("tucker", {"concatenate": True}),
]


def compressed(model: torch.nn.Module, names: list[str], method: str, ratio: float = 4.0, **settings):
    """The plans after ``model`` was compressed in place."""
    plans = []
    for group in module_groups(model, names):
        quick = {"module_updates": 20} if method == "autoencoder" else {}
        plan = plan_module(group, method, ModuleSettings(ratio, **quick, **settings), seed=0)
        install(model, build_layers(model, compress_module(plan, group.weights(model)), plan.joint))
        plans.append(plan)
    return plans


def numbers(tensors: dict[str, torch.Tensor]) -> float:
    """How many numbers of 4 bytes tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 4


@pytest.mark.parametrize(("method", "settings"), CASES)
def test_the_stated_ratio_is_that_of_the_saved_file(tiny_model, tmp_path, method, settings):
    """Latent rows, decoders, norms and places are counted: the file holds so many numbers, and so much less than
    before."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    dense = numbers(model.state_dict())
    plans = compressed(model, ["embeddings", "key", "output-dense"], method, **settings)
    save_compressed(model, AutoTokenizer.from_pretrained(tiny_model), tmp_path / "small", method)
    file = load_file(tmp_path / "small" / "model.safetensors")
    assert dense - numbers(file) == pytest.approx(sum(plan.group.params - plan.stored for plan in plans), abs=3)
    for plan in plans:
        assert plan.ratio >= 4.0 * (1 - 1 / plan.stored)
        names = [name for name in file if any(name.startswith(f"{module}.") for module in plan.group.shapes)]
        biases = {f"{module}.bias" for module in plan.group.shapes}
        stored = numbers({name: file[name] for name in names if name not in biases})
        assert plan.stored - 1 < stored <= plan.stored


def test_encoder_parameters_count_a_shared_decoder_once():
    model = build("bert")
    before = encoder_params(model)
    plans = compressed(model, ["key", "query"], "autoencoder", concatenate=True, decoder="mlp1", keep_norms=True)
    assert encoder_params(model) == before - sum(plan.group.params - plan.stored for plan in plans)


def test_the_svd_of_a_module_is_the_best_of_its_rank():
    model = build("bert")
    (group,) = module_groups(model, ["output-dense"])
    plan = plan_module(group, "svd", ModuleSettings(3.0), seed=0)
    weights = group.weights(model)
    for name, one in compress_module(plan, weights).items():
        tail = torch.linalg.svdvals(weights[name].double())[plan.sizes[name] :]
        error = (weights[name] - one.weight()).double().norm()
        assert float(error) == pytest.approx(float(tail.norm()), rel=1e-5)


def test_together_is_no_worse_than_apart_at_the_same_latent_size():
    """A decoder of all layers costs less, so that latent rows are longer."""
    model = build("bert")
    (group,) = module_groups(model, ["key"])
    apart, joint = (plan_module(group, "svd", ModuleSettings(3.0, concatenate=c), seed=0) for c in (False, True))
    assert joint.sizes[next(iter(group.shapes))] > apart.sizes[next(iter(group.shapes))]
    assert joint.stored <= group.params / 3


@pytest.mark.parametrize(("method", "settings"), CASES)
def test_layers_are_made_again_from_their_descriptions(method, settings):
    """As a resumed run does, from what it kept."""
    model = build("bert")
    for group in module_groups(model, ["embeddings", "key"]):
        quick = {"module_updates": 20} if method == "autoencoder" else {}
        plan = plan_module(group, method, ModuleSettings(3.0, **quick, **settings), seed=0)
        layers = build_layers(model, compress_module(plan, group.weights(model)), plan.joint)
        entries = describe({layer: name for name, layer in layers.items()})
        again = remake(model, json.loads(json.dumps(entries)), layer_tensors(layers))
        for name, layer in layers.items():
            assert type(again[name]) is type(layer)
            assert torch.equal(again[name].weight, layer.weight)


def test_pruning_keeps_the_largest_weights():
    model = build("bert")
    (group,) = module_groups(model, ["key"])
    weights = group.weights(model)
    for joint in (False, True):
        plan = plan_module(group, "prune-l1", ModuleSettings(3.0, concatenate=joint), seed=0)
        parts = compress_module(plan, weights)
        kept = [parts[name].weight() != 0 for name in weights]
        for name, mask in zip(weights, kept, strict=True):
            assert torch.equal(parts[name].weight()[mask], weights[name][mask])
        stacks = [(torch.stack(list(weights.values())), torch.stack(kept))] if joint else zip(weights.values(), kept)
        for weight, mask in stacks:
            assert weight[mask].abs().min() >= weight[~mask].abs().max()


def test_a_kronecker_product_is_found_again():
    torch.manual_seed(0)
    a, b = torch.randn(8, 4), torch.randn(6, 12)
    (source,) = kronecker([torch.kron(a, b)], (8, 4, 6, 12))
    torch.testing.assert_close(source.weight(), torch.kron(a, b), rtol=1e-4, atol=1e-4)


def test_a_tucker_decomposition_is_found_again():
    pytest.importorskip("tensorly")
    torch.manual_seed(0)
    left, right = torch.randn(20, 3), torch.randn(16, 3)
    weights = [left @ torch.randn(3, 3) @ right.T for _ in range(2)]
    for weight, source in zip(weights, tucker(weights, (2, 3, 3)), strict=True):
        torch.testing.assert_close(source.weight(), weight, rtol=1e-3, atol=1e-3)


def test_norms_of_a_linear_decoder_go_into_the_latent_rows():
    torch.manual_seed(0)
    norms = torch.rand(6) + 0.5
    decoded = Decoded(torch.randn(6, 2), [(torch.randn(2, 5), None)], norms)
    folded = fold_norms(decoded)
    assert folded.norms is None
    torch.testing.assert_close(folded.weight(), decoded.weight())
    torch.testing.assert_close(folded.weight().norm(dim=1), norms)


def test_a_ratio_that_leaves_nothing_is_refused_with_the_arithmetic():
    (group,) = module_groups(build("bert"), ["key"])
    with pytest.raises(ValueError, match=r"leaves key \[32, 32\] 1024 / 40 = 26 numbers.*takes 64; pass at most 16$"):
        plan_module(group, "svd", ModuleSettings(40.0), seed=0)


def test_matrices_of_several_widths_cannot_share_a_decoder():
    model = build("bert")
    groups = module_groups(model, ["key"])
    alone = type(groups[0])("key", dict(list(groups[0].shapes.items())[:1]))
    with pytest.raises(ValueError, match="--concatenate: key is one matrix"):
        plan_module(alone, "svd", ModuleSettings(3.0, concatenate=True), seed=0)


# the layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "settings"), CASES)
def test_layers_compute_what_the_matrices_would(method, settings):
    """Dense layers with the decoded matrices in them give the same logits."""
    if method == "tucker":
        pytest.importorskip("tensorly")
    model = build("bert").eval()
    dense = copy.deepcopy(model)
    compressed(model, ["embeddings", "key", "output-dense"], method, **settings)
    with torch.no_grad():
        for name, module in dense.named_modules():
            other = model.get_submodule(name)
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding) and type(other) is not type(module):
                module.weight.copy_(other.weight)
    ids = torch.randint(5, 40, (3, 9))
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "settings"), CASES)
def test_copies_keep_shared_decoders_together_and_train(method, settings):
    model = build("bert")
    compressed(model, ["embeddings", "key"], method, **settings)
    twin = copy.deepcopy(model)
    assert sorted(twin.state_dict()) == sorted(model.state_dict())
    twin(torch.randint(5, 40, (2, 7)), labels=torch.tensor([0, 1])).loss.backward()
    names = [name for name, _ in twin.named_parameters() if "word_embeddings" in name or ".key." in name]
    assert names
    assert all(twin.get_parameter(name).grad is not None for name in names)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("model_class", [AutoModelForMaskedLM, AutoModelForCausalLM])
@pytest.mark.parametrize("decoder", ["linear", "mlp1"])
def test_a_tied_output_layer_decodes_the_same_latent_rows(tiny_model, tmp_path, model_class, decoder):
    """The file has the embeddings once, the logits are those of the decoded table, and a reloaded model keeps them."""
    directory = tiny_model
    if model_class is AutoModelForCausalLM:
        directory = write_text_model(tmp_path / "gpt2", "gpt2")
    model = use_linears(model_class.from_pretrained(directory)).eval()
    output = model.get_output_embeddings()
    assert output.weight is model.get_input_embeddings().weight
    before = output.weight.detach().clone()
    plans = compressed(model, ["embeddings"], "autoencoder", decoder=decoder, keep_norms=True)
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = torch.randint(5, 30, (2, 7))
    logits = model(ids).logits
    embeddings = model.get_input_embeddings()
    torch.testing.assert_close(embeddings(ids).norm(dim=-1), before[ids].norm(dim=-1))
    table = embeddings.table(norms=False)
    assert not torch.allclose(table.norm(dim=1), before.norm(dim=1), rtol=1e-2), "norms are for looking up"
    expected = seen[0] @ table.T + (0 if output.bias is None else output.bias)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    save_compressed(model, AutoTokenizer.from_pretrained(directory), tmp_path / "small", "autoencoder")
    file = load_file(tmp_path / "small" / "model.safetensors")
    latent = plans[0].sizes[next(iter(plans[0].group.shapes))]
    assert [name for name in file if name.endswith("latent")] != []
    assert sum(tensor.shape[-1:] == (latent,) and tensor.shape[0] == table.shape[0] for tensor in file.values()) == 1
    again = model_class.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(again(ids).logits, logits)
    again(ids).logits.sum().backward()  # trains through both uses
    assert again.get_input_embeddings().latent.grad is not None
    body = AutoModel.from_pretrained(tmp_path / "small").eval()  # has no output layer
    assert isinstance(body.get_input_embeddings(), lpaf_kernels.DecodedEmbedding)


# whole runs -----------------------------------------------------------------------------------------------------------

MODULES = {"modules": "embeddings,key,output-dense", "compression_ratio": 3.0, "rank": None}


def options(tiny_options: dict, **more) -> CompressOptions:
    return CompressOptions(**{**tiny_options, "prune_epochs": 2.0} | MODULES | more)


@pytest.mark.parametrize("method", ["svd", "autoencoder"])
def test_a_run_reloads_bit_for_bit(tiny_options, method):
    quick = {"module_updates": 20, "decoder": "mlp1", "keep_norms": True} if method == "autoencoder" else {}
    model, report = compress(options(tiny_options, method=method, concatenate=True, **quick))
    again = AutoModelForSequenceClassification.from_pretrained(tiny_options["output"]).eval()
    ids = torch.randint(5, 30, (3, 8))
    assert torch.equal(again(ids).logits, model(ids).logits)
    found = report["modules"]
    assert list(found) == ["embeddings", "key", "output-dense"]
    file = load_file(Path(tiny_options["output"]) / "model.safetensors")
    saved = sum(tensor.numel() for tensor in file.values())
    dense = sum(tensor.numel() for tensor in AutoModelForSequenceClassification.from_pretrained(
        tiny_options["model"], num_labels=len(model.config.id2label)).state_dict().values())  # fmt: skip
    assert dense - saved == sum(each["weights"] - each["stored"] for each in found.values())
    assert report["metric"]["factorized"] is not None
    assert all(each["ratio"] >= 3 for each in found.values())
    card = (Path(tiny_options["output"]) / "README.md").read_text()
    assert "Module `embeddings`" in card


def test_embeddings_alone_are_inspected_and_evaluated(tiny_options, capsys):
    """No matrix of a layer is compressed: there are no ranks to show."""
    compress(options(tiny_options, method="svd", modules="embeddings"))
    assert main(["inspect", "--model", tiny_options["output"], "--pictures", f"{tiny_options['output']}-pictures"]) == 0
    assert "smaller embeddings" in " ".join(capsys.readouterr().out.split())
    asked = ["--model", tiny_options["output"], "--task", "text-classification", "--data-dir", tiny_options["data_dir"]]
    assert main(["evaluate", *asked, "--json"]) == 0
    report = json.loads((Path(tiny_options["output"]) / "report.json").read_text())
    metrics = json.loads(capsys.readouterr().out)["metrics"]["validation"]
    assert metrics["accuracy"] == report["metric"]["compressed"]


def test_offline_is_without_training_unless_asked(tiny_options):
    del tiny_options["retrain_epochs"]
    _, report = compress(options(tiny_options, method="svd"))
    assert set(report["training"]) == {"finetune"}
    assert report["config"]["retrain_epochs"] == 0


def test_a_new_head_is_trained_after_compression(tiny_options):
    """Compressed as pre-trained, then fine-tuned: nothing is fine-tuned before, and nothing teaches."""
    del tiny_options["finetune_epochs"]
    _, report = compress(options(tiny_options, method="svd"))
    assert set(report["training"]) == {"retrain"}
    assert "teacher" not in report["seconds"]


def test_the_metric_may_decide_when_to_stop(tiny_options, monkeypatch):
    from lpaf.factorize import autoencoder

    monkeypatch.setattr(autoencoder, "WINDOW", 5)
    quick = {"module_updates": 10, "decoder": "mlp1", "stop_on": "metric"}
    asked = options(tiny_options, method="autoencoder", modules="key,query", **quick)
    _, report = compress(asked)
    assert report["metric"]["factorized"] is not None


def test_settings_of_single_modules(tiny_options, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('[embeddings]\ncompression-ratio = 5\ndecoder = "mlp1"\n[key]\nconcatenate = true\n')
    asked = options(tiny_options, method="autoencoder", module_settings=str(file), module_updates=5)
    _, report = compress(asked)
    found = report["modules"]
    assert found["embeddings"]["ratio"] >= 5
    assert found["embeddings"]["form"] == "mlp1 decoder"
    assert found["key"]["joint"]
    assert not found["output-dense"]["joint"]
    assert found["output-dense"]["ratio"] < 4


def test_resume_with_other_module_settings_is_refused(tiny_options, tmp_path):
    settings = tmp_path / "settings.toml"
    asked = options(tiny_options, method="autoencoder", module_settings=str(settings))
    settings.write_text("[key]\ncompression-ratio = 3\n")
    Compression(prepare(asked), "")
    settings.write_text("[key]\ncompression-ratio = 4\n")
    with pytest.raises(InputError, match="the interrupted run had module_settings_data"):
        Compression(prepare(dataclasses.replace(asked, resume=True)), "")


@pytest.mark.parametrize("concatenate", [False, True])
def test_fisher_information_weighs_the_rows(concatenate):
    """fwsvd is the best of its rank for ||diag(F)^(1/2) (W - A B)||_F, of all layers together where they are."""
    model = build("bert")
    (group,) = module_groups(model, ["key"])
    torch.manual_seed(0)
    fisher = {name: torch.rand(rows, dtype=torch.float64) + 0.01 for name, (rows, _) in group.shapes.items()}
    plan = plan_module(group, "fwsvd", ModuleSettings(4.0, concatenate=concatenate), seed=0)
    weights = group.weights(model)
    parts = compress_module(plan, weights, fisher)
    together = [list(weights)] if concatenate else [[name] for name in weights]
    for names in together:
        rows = torch.cat([fisher[name] for name in names]).sqrt()[:, None]
        weight, rebuilt = (
            torch.cat([of(name) for name in names]).double() for of in (weights.get, lambda n: parts[n].weight())
        )
        tail = torch.linalg.svdvals(rows * weight)[plan.sizes[names[0]] :]
        assert float((rows * (weight - rebuilt)).norm()) == pytest.approx(float(tail.norm()), rel=1e-4)


@pytest.mark.parametrize("method", ["fwsvd", "autoencoder"])
def test_fisher_information_is_computed_kept_and_read(tiny_options, tmp_path, method):
    """The file that a run saves gives the same model again."""
    quick = {"module_updates": 20, "fisher_transform": "x^0.9"} if method == "autoencoder" else {}
    asked = {"method": method, "finetune_epochs": 0.0, "retrain_epochs": 0.0, **quick}
    trained = {**tiny_options, "output": str(tmp_path / "first"), "save_dense": str(tmp_path / "dense")}
    compress(options(trained, method="svd"))
    asked |= {"model": str(tmp_path / "dense")}
    file = str(tmp_path / "fisher.safetensors")
    found = {}
    for name, fisher in {"computed": "compute", "read": file}.items():
        more = {"save_fisher": file, "fisher_samples": 24} if fisher == "compute" else {}
        _, report = compress(options(tiny_options, output=str(tmp_path / name), fisher=fisher, **asked, **more))
        found[name] = load_file(tmp_path / name / "model.safetensors")
        assert report["fisher"]["examples"] == 24
    assert "bert.embeddings.word_embeddings" in load_file(file)
    assert all(torch.equal(tensor, found["computed"][name]) for name, tensor in found["read"].items())


WRONG = [
    ({"modules": "keys"}, "--modules keys"),
    ({"compression_ratio": 1.0}, "--compression-ratio 1: must be above 1"),
    ({"compression_ratio": math.nan}, "--compression-ratio nan"),
    ({"compression_ratio": 500.0}, "--compression-ratio 500: leaves embeddings"),
    ({"compression_ratio": None}, "--modules: their size is missing"),
    ({"rank": 4}, "--rank: is the size of the whole encoder"),
    ({"method": "svd", "cosine": 0.5}, "--cosine: is for --method autoencoder"),
    ({"method": "svd", "stop_on": "loss"}, "--stop-on: is for --method autoencoder"),
    ({"method": "lpaf"}, "--modules: --method lpaf has no use for it"),
    ({"modules": None}, "--method autoencoder: compresses chosen modules"),
    (
        {"modules": None, "method": "svd", "rank": 4, "concatenate": True, "compression_ratio": None},
        "--concatenate: is",
    ),
    ({"cosine": 1.5}, "--cosine 1.5: must be in [0, 1]"),
    ({"cosine": 1.0}, "--cosine 1: compares the rows of embeddings in all but their lengths; pass a smaller one, or"),
    ({"decoder": "mlp3"}, "--decoder 'mlp3': expected one of linear, mlp1, mlp2"),
    ({"module_lr": 0.0}, "--module-lr 0: must be above 0"),
    ({"module_batch": 0}, "--module-batch 0: must be at least 1"),
    ({"calibration": "train"}, "--calibration train: is for whole encoders"),
    ({"prune_epochs": 1.0}, "--prune-epochs: is for pruning"),
    ({"fisher_transform": "log"}, "--fisher-transform log: there is nothing to transform"),
    ({"fisher": "compute", "fisher_transform": "x^3"}, "--fisher-transform 'x^3': expected one of x^0.1, x^0.5"),
    ({"fisher": "nowhere.safetensors"}, "--fisher nowhere.safetensors: no such file"),
    ({"fisher_samples": 3}, "--fisher-samples: is for Fisher information"),
    ({"method": "fwsvd", "fisher_transform": "log"}, "--fisher-transform: is for --method autoencoder"),
    ({"method": "kronecker", "fisher": "compute"}, "--fisher: --method kronecker has no use for Fisher information"),
]


@pytest.mark.parametrize(("more", "message"), WRONG)
def test_bad_options_are_refused_in_one_line(tiny_options, more, message):
    with pytest.raises(InputError, match=r"^--") as error:
        compress(options(tiny_options, **{"method": "autoencoder"} | more))
    assert str(error.value).startswith(message.partition(":")[0])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path(tiny_options["output"]).exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[keys]\ncosine = 0.1\n", "[keys] is not among --modules"),
        ("[key]\ncosines = 0.1\n", "[key] cosines: is unknown; expected one of compression_ratio"),
        ('[key]\ncosine = "x"\n', "[key] cosine = 'x': expected float"),
        ("key = 3\n", "key = 3: expected a table [key]"),
        ("[key\n", "cannot be read"),
        ("[key]\ncosine = 3\n", "--cosine 3: must be in [0, 1]"),
    ],
)
def test_bad_settings_files_are_refused_in_one_line(tiny_options, tmp_path, text, message):
    (tmp_path / "settings.toml").write_text(text)
    asked = options(tiny_options, method="autoencoder", module_settings=str(tmp_path / "settings.toml"))
    with pytest.raises(ValueError, match="--module-settings") as error:
        compress(asked)
    assert message in str(error.value)


def test_damaged_checkpoints_are_refused(tiny_options):
    compress(options(tiny_options, method="svd", concatenate=True))
    config = Path(tiny_options["output"]) / "config.json"
    content = json.loads(config.read_text())
    content["quantization_config"]["modules"]["encoder.layer.0.attention.self.key"]["rank"] += 1
    config.write_text(json.dumps(content))
    with pytest.raises((RuntimeError, ValueError), match=r"mismatched_sizes|its configuration asks for"):
        AutoModelForSequenceClassification.from_pretrained(tiny_options["output"])
