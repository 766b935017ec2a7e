"""The masked language model of the studies, made of a tiny encoder without a head."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig, BertModel, BertTokenizerFast

from benchmarks.studies import embedding_norms, masked_lm
from benchmarks.studies.masked_lm import TASK, bias_of_frequencies, main, make
from lpaf.data import load_task, tokenize
from lpaf.errors import InputError
from lpaf.evaluate.evaluate import evaluate_directory
from lpaf.models.checkpoint import load_dense, load_tokenizer
from lpaf.retrain.trainer import StageTrainer

WORDS = ("once", "upon", "a", "time", "the", "cat", "saw", "dog", "##s", ".")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """Directory of a BERT without a head."""
    directory = tmp_path_factory.mktemp("encoder")
    vocabulary = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    BertTokenizerFast(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    for name, count in (("train", 160), ("validation", 60)):
        tales = (f"once upon a time the {rng.choice(('cat', 'dog'))} saw a dogs ." for _ in range(count))
        (folder / f"{name}.txt").write_text(" ".join(tales))
    return folder


SIZES = {"epochs": 3, "learning_rate": 5e-3, "batch_size": 8, "max_length": 24, "checkpoint_steps": 8, "device": "cpu"}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return AutoModelForMaskedLM.from_pretrained(directory).state_dict()


@pytest.fixture(scope="module")
def made(encoder, text, tmp_path_factory) -> tuple[Path, dict[str, float]]:
    output = tmp_path_factory.mktemp("made") / "mlm"
    return output, make(text, output, body=True, model=encoder, **SIZES)


def test_bias_is_the_logarithm_of_the_frequencies(encoder, text):
    model, trained = load_dense(encoder, None, TASK.problem)
    assert not trained
    tokenizer = load_tokenizer(encoder)
    data = load_task(TASK, data_dir=text)
    bias_of_frequencies(model, tokenize(data.train, tokenizer, TASK, 24))
    shares = model.cls.predictions.bias.exp()
    assert float(shares.detach().sum()) == pytest.approx(1.0, abs=1e-5)
    words = data.train["text"][0].split()
    for token in ("once", "cat", "."):  # the words; [CLS] and [SEP] of the blocks count too, and [MASK] never
        share = shares[tokenizer.convert_tokens_to_ids(token)] / shares[tokenizer.convert_tokens_to_ids("[MASK]")]
        assert float(share.detach()) == pytest.approx(words.count(token) + 1, rel=1e-4)


def test_training_teaches_hidden_words(made, text):
    output, found = made
    assert found["before"] < 15.5, "it knows the frequencies"
    assert found["after"] < 0.7 * found["before"]
    again = evaluate_directory(str(output), "mlm", data_dir=str(text), max_length=24, device="cpu")
    assert again["metrics"]["validation"]["perplexity"] == pytest.approx(found["after"], rel=1e-5)


def test_head_alone_leaves_the_body_as_it_is(encoder, text, tmp_path):
    found = make(text, tmp_path / "mlm", model=encoder, validation_blocks=20, **SIZES | {"epochs": 1})
    assert found["after"] < found["before"]
    body = BertModel.from_pretrained(encoder, add_pooling_layer=False).state_dict()
    after = weights(tmp_path / "mlm")
    assert all(torch.equal(after[f"bert.{name}"], tensor) for name, tensor in body.items())


def test_interrupted_run_resumes_to_the_same_weights(made, encoder, text, tmp_path, monkeypatch):
    step = StageTrainer.training_step

    def stopping(self, *arguments):
        if self.state.global_step == 10:
            raise KeyboardInterrupt
        return step(self, *arguments)

    output = tmp_path / "mlm"
    monkeypatch.setattr(StageTrainer, "training_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        make(text, output, body=True, model=encoder, **SIZES)
    monkeypatch.undo()
    gc.collect()  # with the interrupted run, the lock that it holds
    assert not output.exists()
    with pytest.raises(InputError, match="pass --resume"):
        make(text, output, body=True, model=encoder, **SIZES)
    with pytest.raises(InputError, match="the interrupted run had seed = 0"):
        make(text, output, body=True, model=encoder, **SIZES, seed=1, resume=True)
    found = make(text, output, body=True, model=encoder, **SIZES, resume=True)
    assert found["after"] == made[1]["after"]
    before, after = weights(made[0]), weights(output)
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert [path.name for path in tmp_path.iterdir()] == ["mlm"]


def test_command_line(encoder, text, tmp_path, monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr(masked_lm, "make", lambda **options: asked.update(options))
    assert main(["--text", str(text), "--output", str(tmp_path / "mlm"), "--body", "--learning-rate", "1e-3"]) == 0
    assert asked["body"]
    assert asked["learning_rate"] == 1e-3
    monkeypatch.undo()
    capsys.readouterr()
    assert main(["--text", str(tmp_path), "--output", str(tmp_path / "mlm"), "--model", encoder]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"masked_lm: --data-dir {tmp_path}: no train.* in it; add one of ")
    assert said.count("\n") == 1


def test_perplexity_of_nothing_learned_is_the_vocabulary(encoder, text):
    """With a head of zeros every token is as likely."""
    model, _ = load_dense(encoder, None, TASK.problem)
    for parameter in model.cls.parameters():
        parameter.data.zero_()
    tokenizer = load_tokenizer(encoder)
    blocks = tokenize(load_task(TASK, data_dir=text).train, tokenizer, TASK, 24)
    assert masked_lm.perplexity(model, tokenizer, blocks) == pytest.approx(5 + len(WORDS), rel=1e-5)


def test_norms_where_rows_are_looked_up_and_where_they_give_logits(made, text, capsys):
    """Each use has a table of its own."""
    directory, _ = made
    tables = embedding_norms.tables(torch.randn(40, 12), 3.0)
    torch.testing.assert_close(tables["norms"].norm(dim=1), tables["dense"].norm(dim=1))
    assert torch.linalg.matrix_rank(tables["rebuilt"]) == 40 * 12 // 3 // (40 + 12)
    words = ["--model", directory, "--data-dir", text, "--max-length", 24, "--ratios", 2, 3]
    embedding_norms.main([str(word) for word in words])
    head, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert head == "| looked up | output layer | 2x | 3x |"
    assert len(rows) == len(embedding_norms.USES)
    shown = {tuple(cell.strip() for cell in row.split("|")[1:3]): row.split("|")[4].strip() for row in rows}
    assert len(set(shown.values())) > 2, "uses differ"
