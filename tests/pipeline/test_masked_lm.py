"""Masked language modelling: which words are hidden, what is scored, and models compressed for it."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from test_kill import assert_same_run, kill_and_resume, story
from test_processes import assert_same_training, difference, run
from transformers import AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

import lpaf
from lpaf.cli import main
from lpaf.data import get_task, load_task, tokenize
from lpaf.data.masking import CHOSEN, NO_WORD, WordMasker, step_draws, uniform
from lpaf.data.tasks import PROBLEMS
from lpaf.data.texts import IGNORED
from lpaf.errors import InputError
from lpaf.evaluate.evaluate import evaluate_directory
from lpaf.evaluate.metrics import compute_metrics, example_scores
from lpaf.evaluate.predict import NotNumbersError, task_outputs, token_losses
from lpaf.models.checkpoint import load_dense, load_task_model, load_tokenizer, save_compressed
from lpaf.models.count import matrix_shapes
from lpaf.models.outputs import forward_inputs, head_at, logits_at
from lpaf.models.targets import LAYER_LINEARS, encoder_linears
from lpaf.report.study import EXAMPLE_SCORES
from lpaf.report.summary import loading_snippet
from lpaf.retrain.batches import Collator
from lpaf.retrain.objective import Objective
from lpaf.retrain.trainer import StageTrainer, TrainOptions, train_stage
from lpaf_kernels import LowRankSparseLinear, swap_linears
from tiny import (
    MASKED_VOCABULARY,
    SEQ2SEQ,
    build_masked,
    masked_tokenizer,
    stories,
    word_tokenizer,
    write_masked_model,
    write_model,
    write_rows,
    write_text_model,
)

MLM = get_task("mlm")
PROBLEM = MLM.problem
ID = {token: index for index, token in enumerate(MASKED_VOCABULARY)}
SPECIAL = [ID[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]


def tales(count: int, seed: int) -> list[dict]:
    """Stories some of whose words have two pieces."""
    return [{"text": row["text"].replace("film", "films").replace("good ", "goodly ")} for row in stories(count, seed)]


def documents(*texts: str) -> Dataset:
    return Dataset.from_dict({"text": list(texts)})


def blocks_of(count: int = 40, length: int = 16, seed: int = 3) -> Dataset:
    return tokenize(documents(*(row["text"] for row in tales(count, seed))), masked_tokenizer(), MLM, length)


def original(row: dict) -> list[int]:
    """The tokens of a block before words were hidden."""
    return [token if label == IGNORED else label for token, label in zip(row["input_ids"], row["labels"], strict=True)]


# which words are hidden -----------------------------------------------------------------------------------------------


def test_draws_decide_word_by_word_and_token_by_token():
    masker = WordMasker(mask_token=4, vocabulary=50)
    ids = torch.tensor([[2, 10, 11, 12, 13, 14, 3]])
    words = torch.tensor([[NO_WORD, 0, 1, 1, 1, 2, NO_WORD]])
    draws = torch.full((1, 3, 9), 0.5, dtype=torch.float64)  # longer than the row
    draws[0, 0, 1] = CHOSEN - 1e-6  # the word of three tokens
    draws[0, 0, 2] = CHOSEN  # not below
    draws[0, 1, 2:5] = torch.tensor([0.7999, 0.8, 0.9], dtype=torch.float64)
    draws[0, 2, 3] = 0.9999
    hidden, labels = masker(ids, words, draws)
    assert hidden.tolist() == [[2, 10, 4, 49, 13, 14, 3]], "the mask token, a random one, itself"
    assert labels.tolist() == [[IGNORED, IGNORED, 11, 12, 13, IGNORED, IGNORED]]


def test_share_of_words_and_fates_of_their_tokens():
    """Within five standard deviations of the binomial distribution of each."""
    rows, length, vocabulary = 500, 120, 40
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, vocabulary, (rows, length), generator=generator)
    words = (torch.arange(length) // 3).expand(rows, length).clone()  # words of three tokens
    words[:, :3] = NO_WORD
    hidden, labels = WordMasker(4, vocabulary)(ids, words, uniform(generator, rows, length))
    chosen = labels != IGNORED
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(hidden[~chosen], ids[~chosen])
    assert not chosen[:, :3].any()
    by_word = chosen[:, 3:].unflatten(1, (-1, 3))
    assert torch.equal(by_word.all(-1), by_word.any(-1)), "whole words"

    def near(found: torch.Tensor, share: float) -> bool:
        return abs(float(found.double().mean()) - share) < 5 * math.sqrt(share * (1 - share) / found.numel())

    assert near(by_word[..., 0], 0.15)
    assert near(hidden[chosen] == 4, 0.8)
    other = hidden[chosen][hidden[chosen] != 4]
    changed = other != ids[chosen][hidden[chosen] != 4]
    assert near(changed, 0.5 * (1 - 1 / vocabulary)), "a random token may be the one that was there"
    counts = torch.bincount(other[changed], minlength=vocabulary).double()
    counts = counts[torch.arange(vocabulary) != 4]  # a random 4 counts as the mask token
    assert (counts - counts.mean()).abs().max() < 6 * counts.mean().sqrt()


def test_words_hidden_again_are_those_of_the_new_draws():
    masker, generator = WordMasker(4, 40), torch.Generator().manual_seed(0)
    ids, words = torch.randint(5, 40, (30, 20)), torch.arange(20).expand(30, 20)
    first, second = uniform(generator, 30, 20), uniform(generator, 30, 20)
    once = masker(ids, words, first)
    assert not torch.equal(once[0], masker(ids, words, second)[0])
    for found, expected in zip(masker.again(*once, words, second), masker(ids, words, second), strict=True):
        assert torch.equal(found, expected)


def test_draws_of_a_step_follow_from_seed_and_step():
    drawn = {key: step_draws(*key, 8, 20, "cpu") for key in itertools.product((0, 1), (0, 1, 2))}
    torch.rand(3)
    for key, draws in drawn.items():
        assert draws.shape == (8, 3, 20)
        assert torch.equal(draws, step_draws(*key, 8, 20, "cpu"))
    assert len({float(draws[0, 0, 0]) for draws in drawn.values()}) == len(drawn)


# blocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [4, 7, 16, 64])
def test_every_token_is_in_one_block_between_the_special_ones(length):
    texts = [row["text"] for row in tales(30, seed=0)]
    tokenizer = masked_tokenizer()
    blocks = tokenize(documents(*texts[:4], "", *texts[4:]), tokenizer, MLM, length)
    each = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    stream = each[0] + [token for ids in each[1:] for token in (ID["[SEP]"], *ids)]
    rows = [original(row) for row in blocks]
    assert [token for row in rows for token in row[1:-1]] == stream
    assert {(row[0], row[-1]) for row in rows} == {(ID["[CLS]"], ID["[SEP]"])}
    assert blocks["length"] == [len(row) for row in rows]
    assert set(blocks["length"][:-1]) <= {length}
    assert all(set(row) == {1} for row in blocks["attention_mask"])


def test_words_are_whole_but_where_a_block_ends():
    tokenizer = masked_tokenizer()
    blocks = tokenize(documents("the films", "goodly films is bad. " * 40), tokenizer, MLM, 7)
    for row in blocks:
        tokens = tokenizer.convert_ids_to_tokens(original(row))
        assert row["words"][0] == row["words"][-1] == NO_WORD
        number = -1
        for place, (token, word) in enumerate(zip(tokens, row["words"], strict=True)):
            if token in ("[CLS]", "[SEP]"):
                assert word == NO_WORD
                continue
            number += not token.startswith("##") or tokens[place - 1] == "[CLS]"  # a piece alone is a word of its block
            assert word == number
        chosen = {word for word, label in zip(row["words"], row["labels"], strict=True) if label != IGNORED}
        assert all((word in chosen) == (label != IGNORED) for word, label in zip(row["words"], row["labels"]))
    assert any(tokenizer.convert_ids_to_tokens(original(row)[1]).startswith("##") for row in blocks)


def test_special_tokens_are_never_chosen():
    """Nor those that stand in the text, nor what the vocabulary does not know."""
    text = "the [MASK] is zebra [SEP] good [PAD] unheard . " * 60
    blocks = tokenize(documents(text, text), masked_tokenizer(), MLM, 20)
    labels = [label for row in blocks["labels"] for label in row if label != IGNORED]
    assert set(labels) == {ID["the"], ID["is"], ID["good"], ID["."]}
    for row in blocks:
        special = [token in SPECIAL for token in original(row)]
        assert [word == NO_WORD for word in row["words"]] == special


def test_hidden_words_are_the_same_everywhere():
    """They depend on the blocks alone; the numbers are a record, so that no change of the draws goes unnoticed."""
    texts = [row["text"] for row in tales(60, seed=5)]
    torch.manual_seed(1)
    first = tokenize(documents(*texts), masked_tokenizer(), MLM, 12).to_list()
    torch.manual_seed(2)
    assert tokenize(documents(*texts), masked_tokenizer(), MLM, 12).to_list() == first
    fewer = tokenize(documents(*texts[:20]), masked_tokenizer(), MLM, 12).to_list()
    assert fewer[:-1] == first[: len(fewer) - 1], "not on what follows"
    chosen = [[place for place, label in enumerate(row["labels"]) if label != IGNORED] for row in first[:6]]
    assert chosen == [[], [8], [4], [10], [1, 2, 5, 9], [10]]
    text = "[CLS] [MASK] ##s is great ##s the film ##s [MASK] bright [SEP]"
    assert masked_tokenizer().convert_ids_to_tokens(first[4]["input_ids"]) == text.split()


def test_files_are_those_of_running_text(tmp_path):
    (tmp_path / "train.txt").write_text("the film\n\nis good\n")
    write_rows(tmp_path / "validation.jsonl", [{"text": "the film"}, {"text": ""}, {"text": "is bad"}])
    found = load_task("mlm", data_dir=tmp_path)
    assert found.train["text"] == ["the film\n\nis good\n"]
    assert found.validation["validation"]["text"] == ["the film", "", "is bad"]
    assert (found.labels, found.num_labels) == (None, 0)
    assert get_task("mlm").lower_is_better
    assert get_task("mlm").max_length == 128
    assert get_task("mlm").hub == get_task("language-modeling").hub


# logits and losses ----------------------------------------------------------------------------------------------------


def batch_of(count: int = 6, length: int = 12) -> dict[str, torch.Tensor]:
    """Blocks of several lengths."""
    blocks = blocks_of(length=length)
    return Collator(masked_tokenizer(), PROBLEM)([*blocks.select(range(count - 1)).to_list(), blocks[len(blocks) - 1]])


#: encoders of the tested table
TYPES = [name for name in LAYER_LINEARS if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES and name not in SEQ2SEQ]


@torch.no_grad()
@pytest.mark.parametrize("name", TYPES)
def test_head_at_some_positions_says_what_it_says_at_all(name):
    model, batch = build_masked(name).eval(), batch_of()
    positions = batch["labels"] != IGNORED
    inputs = forward_inputs(model, batch)
    whole = model(**inputs, output_hidden_states=True)
    shape = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, __, output: shape.append(output.shape))
    with head_at(model, positions):
        some = model(**inputs, output_hidden_states=True)
    handle.remove()
    assert shape == [(1, int(positions.sum()), len(MASKED_VOCABULARY))], "computed there only"
    torch.testing.assert_close(logits_at(some.logits, positions), whole.logits[positions])
    torch.testing.assert_close(logits_at(whole.logits, positions), whole.logits[positions])
    for found, expected in zip(some.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(found, expected)
    assert model(**inputs).logits.shape == whole.logits.shape, "the hook is gone"


@torch.no_grad()
def test_body_without_hidden_states_computes_all_logits():
    model, batch = build_masked("bert").eval(), batch_of()
    positions = batch["labels"] != IGNORED
    whole = model(**forward_inputs(model, batch)).logits
    model.base_model.register_forward_hook(lambda _, __, outputs: (outputs.last_hidden_state,))
    model.forward = lambda **inputs: type("Outputs", (), {"logits": model.cls(model.bert(**inputs)[0])})
    with head_at(model, positions):
        logits = model(**forward_inputs(model, batch)).logits
    assert logits.shape == whole.shape
    assert torch.equal(logits_at(logits, positions), whole[positions])


@torch.no_grad()
def test_loss_is_that_of_the_model_itself():
    model, batch = build_masked("bert").eval(), batch_of()
    positions = batch["labels"] != IGNORED
    assert 0 < positions.sum() < batch["attention_mask"].sum() < positions.numel(), "there is padding"
    inputs = forward_inputs(model, batch)
    own = model(**inputs, labels=batch["labels"]).loss
    for logits, labels in (
        (model(**inputs).logits, batch["labels"]),
        (model(**inputs).logits[positions], batch["labels"][positions]),
    ):
        loss, _ = Objective(PROBLEM)(logits, labels, None)
        torch.testing.assert_close(loss, own)


@torch.no_grad()
def test_losses_are_those_of_each_block_whatever_the_batch():
    model, blocks, tokenizer = build_masked("bert").eval(), blocks_of(), masked_tokenizer()
    one, many = (token_losses(model, blocks, tokenizer, size, problem=PROBLEM) for size in (1, 16))
    assert one.dtype == torch.float64
    torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-6)
    for index in (0, len(blocks) // 2, len(blocks) - 1):
        batch = Collator(tokenizer, PROBLEM)([blocks[index]])
        logits = model(**forward_inputs(model, batch)).logits
        expected = F.cross_entropy(logits[0], batch["labels"][0], reduction="sum", ignore_index=IGNORED)
        torch.testing.assert_close(one[index], expected.double(), rtol=1e-5, atol=1e-6)


def test_perplexity_weighs_hidden_tokens_and_blocks_may_have_none():
    losses, tokens = [2.0, 0.0, 9.0], [1, 0, 3]
    assert compute_metrics(MLM, losses, tokens) == {"perplexity": pytest.approx(math.exp(11 / 4))}
    assert example_scores(MLM, losses, tokens).tolist() == [-2.0, 0.0, -3.0]
    with pytest.raises(ValueError, match="labels are all 0"):
        compute_metrics(MLM, [0.0], [0])


def test_batch_without_a_hidden_word_has_no_loss_and_moves_nothing():
    objective = Objective(PROBLEM, distill=0.5, consistency=1.0)
    model, batch = build_masked("bert"), batch_of()
    labels = torch.full_like(batch["labels"], IGNORED)
    positions = (labels != IGNORED).repeat(2, 1)
    inputs = {name: torch.cat((value, value)) for name, value in forward_inputs(model, batch).items()}
    with head_at(model, positions):
        logits = logits_at(model(**inputs).logits, positions)
    loss, parts = objective(logits, labels[labels != IGNORED], logits[: len(logits) // 2])
    _, usual = Objective(PROBLEM, distill=0.5, consistency=1.0)(
        torch.randn(4, 7), torch.zeros(2).long(), torch.rand(2, 7)
    )
    assert parts.keys() == usual.keys()
    loss.backward()
    assert float(loss.detach()) == 0.0
    gradients = [parameter.grad for parameter in model.parameters()]
    assert not any(gradient is None or gradient.any() for gradient in gradients), "many processes wait for each"


def test_models_of_nan_are_not_scored():
    model, blocks = build_masked("bert"), blocks_of()
    with torch.no_grad():
        list(encoder_linears(model).values())[-1].weight[0, 0] = math.nan
    with pytest.raises(NotNumbersError):
        task_outputs(model, MLM, blocks, blocks, masked_tokenizer(), None)


# training -------------------------------------------------------------------------------------------------------------


def trained(directory: Path, blocks: Dataset, monkeypatch, epochs: float = 2.0, resume: bool = False, stop: int = -1):
    """(the words that a model of its own saw hidden in every update, its weights after training)."""
    seen, step = [], StageTrainer.compute_loss
    masked = StageTrainer.hidden_anew

    def record(self, batch):
        found = masked(self, batch)
        seen.append((batch["input_ids"], batch["labels"], found["input_ids"], found["labels"]))
        return found

    def stopping(self, *arguments, **options):
        if self.state.global_step == stop:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "hidden_anew", record)
        patch.setattr(StageTrainer, "compute_loss", stopping)
        model = build_masked("bert")
        options = TrainOptions(epochs, 2e-3, batch_size=8, seed=0, checkpoint_steps=2)
        objective = Objective(PROBLEM)
        torch.manual_seed(0)
        try:
            train_stage("t", model, masked_tokenizer(), blocks, objective, options, directory, resume=resume)
        except KeyboardInterrupt:
            return seen, None
    return seen, model.state_dict()


def test_every_update_hides_other_words_and_a_resumed_run_the_same(tmp_path, monkeypatch):
    blocks = blocks_of(length=12)
    seen, weights = trained(tmp_path / "whole", blocks, monkeypatch)
    assert len(seen) == 2 * math.ceil(len(blocks) / 8)
    assert any(len(ids) < 8 for ids, *_ in seen), "the last batch of an epoch is short"
    truths = {}
    for ids, labels, hidden, chosen in seen:
        truth = torch.where(labels == IGNORED, ids, labels)
        assert torch.equal(truth, torch.where(chosen == IGNORED, hidden, chosen)), "the text is what it was"
        assert not torch.equal(labels, chosen)
        for row, label in zip(truth.tolist(), chosen.tolist(), strict=True):
            truths.setdefault(tuple(row), set()).add(tuple(label))
    twice = [len(found) for found in truths.values()]
    assert np.mean(twice) > 1.8, "hardly a block has the same words hidden in both epochs"
    first, _ = trained(tmp_path / "killed", blocks, monkeypatch, stop=5)
    rest, resumed = trained(tmp_path / "killed", blocks, monkeypatch, resume=True)
    for found, expected in zip([*first[:4], *rest], seen, strict=True):
        assert all(map(torch.equal, found, expected))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())


# the whole pipeline ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_masked_model(tmp_path_factory.mktemp("masked") / "bert")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tales")
    write_rows(folder / "train.jsonl", tales(150, 1))
    (folder / "validation.txt").write_text("\n".join(row["text"] for row in tales(60, 2)))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "deberta-v2", "modernbert"])
def test_reload_is_bitwise_equal_and_keeps_the_tie(tmp_path, name):
    source = str(write_masked_model(tmp_path / "m", name))
    dense, trained = load_dense(source, None, PROBLEM)
    assert trained
    assert not any("decoder" in matrix or "lm_head" in matrix for matrix in matrix_shapes(dense)), (
        "the head stays dense"
    )
    swap_linears(dense.eval(), rank=4, keep=0.2, names=list(encoder_linears(dense)))
    save_compressed(dense, load_tokenizer(source), tmp_path / "small", "svd")
    ids = torch.randint(5, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        again = AutoModelForMaskedLM.from_pretrained(tmp_path / "small", dtype=dtype).eval()
        assert torch.equal(again(input_ids=ids).logits, dense.to(dtype)(input_ids=ids).logits)
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
        assert any(isinstance(module, LowRankSparseLinear) for module in again.modules())
    assert type(load_task_model(str(tmp_path / "small"))) is type(dense), "its architecture says what it is for"


def options_of(model, data, output, **more) -> lpaf.CompressOptions:
    values = {
        "model": str(model), "task": "mlm", "data_dir": str(data), "output": str(output), "rank": 4, "batch_size": 16,
        "finetune_lr": 5e-3, "retrain_lr": 5e-3, "finetune_epochs": 1, "prune_epochs": 1, "retrain_epochs": 1,
        "checkpoint_steps": 0, "bench_batch": 2, "bench_length": 16, "max_length": 24,
    }  # fmt: skip
    return lpaf.CompressOptions(**values | more)


RUNS = {
    "svd": {"calibration": "train"},
    "lpaf": {"prune_lr": 2e-3},
    "losparse": {"prune_lr": 2e-3, "rank": None, "ratio": 0.4, "distill": "layer"},
    "cofi": {"prune_lr": 2e-3, "rank": None, "ratio": 0.5},
    "kd": {"rank": None, "ratio": 0.5},
}


@pytest.fixture(scope="module", params=RUNS)
def finished(request, model, data, tmp_path_factory):
    """(model, report, options) of a run."""
    folder = tmp_path_factory.mktemp("run")
    more = {"save_dense": str(folder / "dense"), "finetune_epochs": 6, **RUNS[request.param]}
    options = options_of(model, data, folder / "out", method=request.param, **more)
    compressed, report = lpaf.compress(options, command="lpaf compress ...")
    return compressed, report, options


@torch.no_grad()
def test_run_reloads_and_evaluate_repeats_it(finished, tmp_path):
    model, report, options = finished
    assert report["problem"] == PROBLEM
    taught = "layer_distillation" if options.distill == "layer" else "distillation"
    assert {"task", taught} <= set(report["training"]["retrain"][-1])
    again = AutoModelForMaskedLM.from_pretrained(options.output)
    ids = torch.randint(5, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    rows = tmp_path / "rows.jsonl"
    given = {"data_dir": options.data_dir, "max_length": options.max_length}
    found = evaluate_directory(options.output, "mlm", predictions=str(rows), **given)
    assert found["metrics"] == report["metric"]["details"]["compressed"]
    if options.method == "svd":
        fused = evaluate_directory(options.output, "mlm", fuse=True, **given)["metrics"]["validation"]
        assert fused == pytest.approx(found["metrics"]["validation"], rel=1e-4)
    dense = evaluate_directory(options.save_dense, "mlm", **given)["metrics"]["validation"]
    assert dense == pytest.approx(report["metric"]["details"]["dense"]["validation"], rel=1e-5)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(len(lines)))
    scored = [line for line in lines if line["tokens"]]
    assert all(line["loss"] is None for line in lines if not line["tokens"])
    mean = np.average([line["loss"] for line in scored], weights=[line["tokens"] for line in scored])
    assert math.exp(mean) == pytest.approx(report["metric"]["compressed"])


def test_training_lowers_the_perplexity(finished):
    _, report, _ = finished
    assert report["metric"]["dense"] < 15, "a model that knows nothing has 34, the number of tokens"
    assert report["metric"]["compressed"] < 20


def test_card_and_report_say_how_to_use_it(finished, capsys):
    _, report, options = finished
    card = (Path(options.output) / "README.md").read_text()
    assert "pipeline_tag: fill-mask\n" in card
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/directory", options.output)
    exec(code.replace("A text with a", "the").replace("word", "is"), {})
    assert capsys.readouterr().out.strip() in MASKED_VOCABULARY
    config = json.loads((Path(options.output) / "report.json").read_text())["config"]
    assert config["max_length"] == 24
    assert report["metric"]["name"] == "perplexity"


def test_every_problem_has_its_words():
    assert set(EXAMPLE_SCORES) == set(PROBLEMS)
    classes = {re.search(r"AutoModelFor\w+", loading_snippet(problem))[0] for problem in PROBLEMS}
    assert len(classes) == len(PROBLEMS) - 1, "classifiers and regressors share one"


def test_commands(finished, capsys):
    _, report, options = finished
    assert main(["bench", "--model", options.output, "--rounds", "2", "--length", "8", "--batch", "2"]) == 0
    assert main(["inspect", "--model", options.output]) == 0
    capsys.readouterr()
    words = ["evaluate", "--model", options.output, "--task", "mlm", "--data-dir", options.data_dir, "--json"]
    assert main([*words, "--max-length", "24"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == report["metric"]["details"]["compressed"]
    assert main([*words, "--num-beams", "3"]) == 2
    assert capsys.readouterr().err == "lpaf evaluate: --num-beams: is for summarisation, not for --task mlm\n"


def test_a_head_for_hidden_words_gives_way_to_a_classifier_where_steps_are_timed(model, capsys):
    words = ["bench", "--step", "--model", str(model), "--rounds", "2", "--batch", "2", "--length", "8", "--rank", "4"]
    assert main([*words, "--stages", "fine-tuning"]) == 0
    assert "fine-tuning" in capsys.readouterr().out


def test_model_without_a_head_gets_one(tmp_path, data):
    """As the built-in MiniLM; without training it has nothing to say."""
    bare = write_model(tmp_path / "bare")
    with pytest.raises(InputError, match=r"--finetune-epochs 0: .* has no trained head for task mlm"):
        lpaf.compress(options_of(bare, data, tmp_path / "out", method="svd", finetune_epochs=0), command="")
    with pytest.raises(InputError, match=r"has no trained task head \(cls\..* is missing\); pass a masked language"):
        evaluate_directory(str(bare), "mlm", data_dir=str(data))
    _, report = lpaf.compress(options_of(bare, data, tmp_path / "out", method="svd", finetune_epochs=2), command="")
    assert [entry["task"] for entry in report["training"]["finetune"]]


# bad input ------------------------------------------------------------------------------------------------------------


def write_decoder(directory: Path) -> Path:
    """A BERT that looks back only."""
    return write_masked_model(directory, is_decoder=True)


def write_without_mask(directory: Path) -> Path:
    build_masked("bert").save_pretrained(directory)
    tokenizer = word_tokenizer("bart")
    tokenizer.save_pretrained(directory)
    return directory


def write_without_words(directory: Path) -> Path:
    """A tokenizer that cuts texts into characters, without splitting them into words before."""
    import tokenizers
    import transformers

    build_masked("bert").save_pretrained(directory)
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({"[MASK]": 0, "[UNK]": 1, "a": 2, " ": 3}, [], unk_token="[UNK]")
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]").save_pretrained(directory)
    return directory


REFUSED = {
    "gpt2": (
        lambda path: write_text_model(path, "gpt2"),
        {},
        r"--model .*: a gpt2 writes from left to right; .* causal",
    ),
    "bart": (lambda path: write_text_model(path, "bart"), {}, r"--model .*: a bart writes from left to right"),
    "decoder": (write_decoder, {}, r"--model .*: a bert writes from left to right"),
    "no mask": (write_without_mask, {}, r"--model .*: its tokenizer has no mask token, which --task mlm"),
    "no words": (write_without_words, {}, r"--model .*: its tokenizer takes whole texts for one word"),
    "length": (write_masked_model, {"max_length": 41}, r"--max-length 41: the model takes at most 40 tokens"),
    "short": (write_masked_model, {"max_length": 3}, r"--max-length 3: pass a number of at least 4"),
    "beams": (write_masked_model, {"num_beams": 3}, r"--num-beams: is for summarisation, not for --task mlm"),
    "n-best": (write_masked_model, {"n_best": 3}, r"--n-best: is for question answering, not for --task mlm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(data, tmp_path, case):
    write, more, message = REFUSED[case]
    directory = write(tmp_path / "m")
    with pytest.raises(InputError, match=f"^{message}") as caught:
        lpaf.compress(options_of(directory, data, tmp_path / "out", **more), command="")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_contrastive_pruning_is_refused(model, data, tmp_path):
    with pytest.raises(InputError, match=r"^--pruner cap: contrasts sentences"):
        lpaf.compress(options_of(model, data, tmp_path / "out", pruner="cap"), command="")


def test_tokenizer_that_is_not_fast_is_refused():
    class Slow:
        name_or_path, mask_token_id, is_fast = "slow", 4, False

    with pytest.raises(InputError, match=r"^--model slow: its tokenizer is not a fast one"):
        WordMasker.of(Slow())


@pytest.mark.parametrize("text", ["zebra", "the"])
def test_text_without_a_hidden_word_is_refused(model, data, tmp_path, text):
    """All unknown, or so short that none is chosen."""
    file = tmp_path / "v.txt"
    file.write_text(text)
    with pytest.raises(InputError, match=r"^--task mlm: no word of 1 documents was chosen to be hidden"):
        evaluate_directory(str(model), "mlm", validation_file=str(file))


def test_causal_models_are_sent_to_the_other_perplexity(model, data):
    with pytest.raises(InputError, match=r"a bert sees the tokens .* that of hidden words \(--task mlm\) an encoder"):
        evaluate_directory(str(model), "language-modeling", data_dir=str(data))


def test_help_tells_the_two_perplexities_apart(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "language-modeling for causal models" in text
    assert "mlm for encoders" in text


# death and many processes ---------------------------------------------------------------------------------------------


def words_of(model: Path, data: Path, output: Path, **more) -> list[str]:
    values = {
        "model": model, "task": "mlm", "data-dir": data, "output": output, "rank": 4, "batch-size": 16,
        "max-length": 16, "finetune-lr": 2e-3, "retrain-lr": 2e-3, "finetune-epochs": 1, "prune-epochs": 1,
        "retrain-epochs": 1, "checkpoint-steps": 2, "bench-batch": 2, "bench-length": 16, "method": "svd",
        "max-train-samples": 70,
    }  # fmt: skip
    return ["compress", *(str(word) for name, value in (values | more).items() for word in (f"--{name}", value))]


@pytest.mark.parametrize("death", ["finetune", pytest.param("retrain", marks=pytest.mark.slow)])
def test_killed_run_resumes_to_the_same_weights(model, data, tmp_path, death):
    outputs = [tmp_path / kind / "out" for kind in ("whole", "killed")]
    for output in outputs:
        output.parent.mkdir()
    epochs = {"finetune-epochs": 2}
    run(words_of(model, data, outputs[0], **epochs), outputs[0])
    kill_and_resume(words_of(model, data, outputs[1], **epochs), outputs[1], death)
    assert_same_run(outputs[1], outputs[0])


def test_two_processes_end_with_the_weights_of_one(data, tmp_path):
    """They hide the same words: 70 blocks leave a last batch of six, whose shares hold different numbers of them."""
    steady = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = write_masked_model(tmp_path / "m", **steady)
    outputs = {processes: tmp_path / str(processes) / "out" for processes in (1, 2)}
    for processes, output in outputs.items():
        output.parent.mkdir()
        run(words_of(model, data, output, **{"checkpoint-steps": 0}), output, processes)
    files = [output / "model.safetensors" for output in outputs.values()]
    assert difference(*files, without=("key.bias",)) < 1e-3, "other words would make 2"
    assert_same_training(*(story(output) for output in outputs.values()))


# real texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_minilm_learns_to_tell_hidden_words_and_forgets_when_compressed(masked_minilm, wikitext, tmp_path):
    directory, said = masked_minilm
    before, after = (float(number) for number in re.findall(r"perplexity ([\d.]+)", said))
    assert after < 0.5 * before
    given = {"validation_file": str(wikitext / "validation.txt"), "finetune_epochs": 0, "retrain_epochs": 0}
    given |= {"model": str(directory), "task": "mlm", "method": "svd", "bench_batch": 1, "bench_length": 16}
    found = []
    for ratio in (0.8, 0.4):
        output = str(tmp_path / str(ratio))
        _, report = lpaf.compress(lpaf.CompressOptions(**given, rank="auto", ratio=ratio, output=output), command="")
        found.append(report["metric"]["compressed"])
    assert report["metric"]["dense"] == pytest.approx(after, rel=0.25), "256 blocks and all"
    assert report["metric"]["dense"] < found[0] < found[1]
    again = evaluate_directory(output, "mlm", validation_file=given["validation_file"])
    assert again["metrics"]["validation"]["perplexity"] == pytest.approx(found[1], rel=1e-5)
