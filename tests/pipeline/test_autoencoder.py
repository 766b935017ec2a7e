"""The autoencoder of one matrix: its sizes, its loss (Eq. 2), the optimum of the linear one, norms, resumed runs."""

from __future__ import annotations

import math

import pytest
import torch

from lpaf.factorize import autoencoder
from lpaf.factorize.autoencoder import (
    AutoencoderOptions,
    AutoencoderTraining,
    Decoded,
    DivergedError,
    decoder_widths,
    largest_unit,
    reconstruction_loss,
    stored_params,
)


def matrix(rows: int = 60, columns: int = 16, seed: int = 0) -> torch.Tensor:
    """A random matrix whose singular values fall, and whose rows have lengths of their own."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    u, s, v = torch.linalg.svd(mixed, full_matrices=False)
    lengths = torch.rand(rows, 1, generator=generator) + 0.5
    return 0.1 * lengths * (u * s * 0.8 ** torch.arange(columns)) @ v


def trained(weight: torch.Tensor, unit: int, row_weights=None, **options) -> autoencoder.Decoded:
    return AutoencoderTraining(weight, unit, AutoencoderOptions(**options), row_weights).run()


# sizes ----------------------------------------------------------------------------------------------------------------


def test_sizes_follow_from_one_unit():
    assert decoder_widths(384, 10, "linear") == (10, 384)
    assert decoder_widths(384, 10, "mlp1") == (10, 20, 384)
    assert decoder_widths(384, 10, "mlp2") == (10, 20, 40, 384)
    # latent rows, two layers with biases, norms
    assert stored_params(1000, 384, 10, "mlp1", norms=True, bias=True) == 10_000 + 220 + 21 * 384 + 1000


@pytest.mark.parametrize("decoder", ["linear", "mlp1", "mlp2"])
@pytest.mark.parametrize(("norms", "bias"), [(False, False), (True, True)])
def test_no_larger_unit_fits(decoder, norms, bias):
    for budget in (900, 5_000, 77_777):
        unit = largest_unit(500, 64, budget, decoder, norms, bias)
        assert unit == 0 or stored_params(500, 64, unit, decoder, norms, bias) <= budget
        assert stored_params(500, 64, unit + 1, decoder, norms, bias) > budget


def test_a_decoder_holds_the_numbers_that_are_counted():
    decoded = trained(matrix(), 3, decoder="mlp2", keep_norms=True, updates=1)
    held = decoded.latent.numel() + decoded.norms.numel()
    held += sum(weight.numel() + bias.numel() for weight, bias in decoded.layers)
    assert held == stored_params(60, 16, 3, "mlp2", norms=True, bias=True)


# the loss -------------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    rows, rebuilt = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    rmse = (rows - rebuilt).square().mean().sqrt()
    cosines = [rows[i] @ rebuilt[i] / rows[i].norm() / rebuilt[i].norm() for i in range(5)]
    distance = 1 - sum(cosines) / 5
    for beta in (0.0, 0.3, 1.0):
        loss = reconstruction_loss(rows, rebuilt, beta)
        torch.testing.assert_close(loss, (1 - beta) * rmse + beta * distance)


def test_weights_count_rows():
    """A row of weight 2 counts like two rows."""
    generator = torch.Generator().manual_seed(0)
    rows, rebuilt = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    twice = torch.tensor([0, 0, 1, 2, 3])
    weights = torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64) * 4 / 5  # of mean 1
    weighted = reconstruction_loss(rows, rebuilt, 0.4, weights)
    torch.testing.assert_close(weighted, reconstruction_loss(rows[twice], rebuilt[twice], 0.4))


def test_rows_of_zeros_and_exact_rows_have_gradients():
    rows = torch.zeros(3, 4)
    rebuilt = torch.zeros(3, 4, requires_grad=True)
    loss = reconstruction_loss(rows, rebuilt, 0.5)
    loss.backward()
    assert loss < 1e-6
    assert rebuilt.grad.isfinite().all()


# training -------------------------------------------------------------------------------------------------------------


def test_a_linear_one_starts_at_the_svd_and_cannot_leave_it():
    """RMSE has no lower value than that of the truncated SVD (Eckart and Young)."""
    weight = matrix()
    tail = torch.linalg.svdvals(weight)[4:]
    optimum = float((tail.square().sum() / weight.numel()).sqrt())
    decoded = trained(weight, 4, updates=1000, bias=False)
    assert decoded.losses[0] == pytest.approx(optimum, rel=1e-4)
    assert min(decoded.losses) >= optimum * (1 - 1e-4)


def test_a_weighted_one_starts_at_the_weighted_svd():
    weight, rows = matrix(), torch.linspace(0.1, 1.9, 60)
    scaled = rows.sqrt()[:, None] * weight
    tail = torch.linalg.svdvals(scaled)[4:]
    optimum = float((tail.square().sum() / weight.numel()).sqrt())
    # the encoder sees rows without their weights: its latent rows are those of an orthogonal projection, which with
    # the weighted decoder is the weighted optimum
    assert trained(weight, 4, rows, updates=1, bias=False).losses[0] == pytest.approx(optimum, rel=1e-4)


@pytest.mark.parametrize("decoder", ["linear", "mlp1", "mlp2"])
def test_training_lowers_the_loss(decoder):
    decoded = trained(matrix(200), 4, decoder=decoder, cosine=0.9, keep_norms=True, updates=1000, learning_rate=2e-3)
    assert min(decoded.losses) < 0.98 * decoded.losses[0]
    rebuilt = reconstruction_loss(matrix(200), decoded.weight(), 0.9)
    assert float(rebuilt) == pytest.approx(min(decoded.losses), rel=1e-3)  # what was best is what is returned


@pytest.mark.parametrize("decoder", ["linear", "mlp1"])
def test_rows_that_an_output_is_tied_to_are_compared_as_they_are_decoded(decoder):
    """Norms are kept for looking rows up; what is trained to least squares is shorter than the rows are."""
    weight = matrix(200)
    decoded = trained(weight, 4, decoder=decoder, cosine=0.5, keep_norms=True, tied=True, updates=1000)
    assert float(reconstruction_loss(weight, decoded.decode(None), 0.5)) == pytest.approx(min(decoded.losses), rel=1e-3)
    torch.testing.assert_close(decoded.weight().norm(dim=1), weight.norm(dim=1))
    assert decoded.decode(None).norm() < 0.98 * weight.norm()


def test_latent_rows_and_a_linear_decoder_have_the_same_scale():
    latent, weight = torch.randn(60, 5), 1e-2 * torch.randn(5, 24)
    before = Decoded(latent, [(weight, torch.randn(24))], torch.rand(60))
    after = before.balanced()
    torch.testing.assert_close(after.weight(), before.weight())
    ((balanced, _),) = after.layers
    torch.testing.assert_close(after.latent.t() @ after.latent, balanced @ balanced.t())
    deep = Decoded(latent, [(weight, None), (torch.randn(24, 24), None)], None)
    assert deep.balanced() is deep


def test_norms_are_those_of_the_rows():
    weight = matrix()
    weight[7] = 0
    decoded = trained(weight, 3, decoder="mlp1", keep_norms=True, updates=500)
    torch.testing.assert_close(decoded.weight().norm(dim=1), weight.norm(dim=1), rtol=1e-5, atol=1e-6)


def test_the_rows_of_every_update_follow_from_the_seed(tmp_path):
    weight, options = matrix(), AutoencoderOptions(batch_size=16)
    whole = AutoencoderTraining(weight, 3, options)._batches()
    seen = [next(whole) for _ in range(10)]
    assert sorted(torch.cat(seen[:3]).tolist()) == sorted(set(torch.cat(seen[:3]).tolist()))  # an epoch repeats none
    later = AutoencoderTraining(weight, 3, options)
    later.update = 7
    again = later._batches()
    for batch in seen[7:]:
        assert torch.equal(next(again), batch)


def test_a_resumed_training_ends_like_a_whole_one(tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "WINDOW", 20)
    weight, options = matrix(), AutoencoderOptions(decoder="mlp1", updates=100, batch_size=16, patience=100)
    whole = AutoencoderTraining(weight, 3, options).run()
    file = tmp_path / "kept.pt"

    class Killed(Exception):
        pass

    def die_late(decoded: autoencoder.Decoded) -> float:
        if len(decoded.losses) == 4:
            raise Killed
        return decoded.losses[-1]

    with pytest.raises(Killed):
        AutoencoderTraining(weight, 3, options, checkpoint=file, score=die_late).run()
    assert file.is_file()
    resumed = AutoencoderTraining(weight, 3, options, checkpoint=file)
    decoded = resumed.run()
    assert decoded.losses == whole.losses
    assert torch.equal(decoded.weight(), whole.weight())
    assert not file.exists()


def test_patience_ends_a_training_that_does_not_improve(monkeypatch):
    monkeypatch.setattr(autoencoder, "WINDOW", 10)
    decoded = trained(matrix(), 4, updates=10_000, patience=3, bias=False)  # a linear one is at its best at once
    assert len(decoded.losses) == 4


def test_another_score_decides_what_is_kept(monkeypatch):
    monkeypatch.setattr(autoencoder, "WINDOW", 10)
    weight = matrix()
    scores = iter([5.0, 1.0, 3.0, 3.0, 3.0])
    kept = {}

    def score(decoded: autoencoder.Decoded) -> float:
        value = next(scores)
        kept[value] = decoded.weight()
        return value

    options = AutoencoderOptions(decoder="mlp1", patience=3)
    decoded = AutoencoderTraining(weight, 3, options, score=score).run()
    assert torch.equal(decoded.weight(), kept[1.0])


def test_a_loss_that_is_no_number_is_an_error():
    with pytest.raises(DivergedError, match="loss is nan"):
        trained(matrix() * math.inf, 3, decoder="mlp1", updates=10)
