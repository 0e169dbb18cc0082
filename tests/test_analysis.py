import math

import pytest
import torch
from torch import nn

from lora_lib.model import SmallTransformer
from lora_lib.rank import (
    analyze_weight_change_rank,
    cumulative_energy,
    effective_rank,
    k90,
    low_rank_part,
    noise_like,
    singular_values,
    stable_rank,
    weight_changes,
    with_changes_cut,
)


@pytest.fixture
def matrix():
    return torch.randn(20, 30, generator=torch.Generator().manual_seed(0))


def test_a_simulated_change_of_rank_8_is_held_by_8_components():
    torch.manual_seed(42)
    values, energy = analyze_weight_change_rank(768, 768, 8)
    assert len(values) == len(energy) == 768
    assert energy[7] == pytest.approx(1, abs=1e-9)
    assert energy[6] < 0.99
    assert k90(values) <= 8
    assert values[8] < 1e-6 * values[0]


def test_a_simulated_change_may_have_any_shape():
    values, energy = analyze_weight_change_rank(d_in=30, d_out=20, simulated_rank=5)
    assert len(values) == len(energy) == 20


@pytest.mark.parametrize("rank", [0, 21])
def test_a_rank_that_the_matrix_cannot_have_is_refused(rank):
    with pytest.raises(ValueError, match=rf"simulated_rank is {rank}; a 20 × 30 .* 1 to 20"):
        analyze_weight_change_rank(30, 20, rank)


def test_singular_values_are_those_of_a_diagonal_matrix():
    assert singular_values(torch.diag(torch.tensor([1.0, 3, 2]))).tolist() == pytest.approx(
        [3, 2, 1]
    )
    assert singular_values(torch.zeros(2, 5)).dtype == torch.float64


def test_cumulative_energy_is_the_share_of_the_squares():
    energy = cumulative_energy(torch.tensor([2.0, 1.0, 1.0]))
    assert energy.tolist() == pytest.approx([4 / 6, 5 / 6, 1])


def test_k90_counts_the_values_that_hold_nine_tenths():
    assert k90(torch.tensor([3.0, 0.1])) == 1
    assert k90(torch.ones(10).double()) == 9
    assert k90(torch.ones(10).double(), share=1) == 10


MEASURES = [cumulative_energy, k90, effective_rank, stable_rank]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.0, 0.0], "every singular value is zero; compare two models that differ"),
        ([], "every singular value is zero"),
        ([1.0, math.nan], "a singular value is nan; .*train the model anew"),
        ([math.inf, 1.0], "a singular value is inf; .*train the model anew"),
    ],
)
def test_no_measure_makes_a_number_of_values_that_mean_nothing(measure, values, words):
    with pytest.raises(ValueError, match=words):
        measure(torch.tensor(values))


@pytest.mark.parametrize("share", [-0.1, 0, 2.0, math.nan])
def test_a_share_that_no_values_can_hold_is_refused(share):
    with pytest.raises(ValueError, match=f"share is {share}; it must be above 0 and at most 1"):
        k90(torch.ones(3), share)


def test_the_whole_energy_needs_no_more_values_than_there_are():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        values = torch.rand(64, generator=generator).sort(descending=True).values
        assert k90(values, share=1) == 64


def test_effective_and_stable_rank_count_equal_values():
    equal = torch.tensor([2.0, 2, 2, 0])
    assert effective_rank(equal) == pytest.approx(3)
    assert stable_rank(equal) == pytest.approx(3)
    assert stable_rank(torch.tensor([2.0, 1.0])) == pytest.approx(5 / 4)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1)


def test_noise_has_the_shape_and_norm_of_the_matrix_and_its_seed(matrix):
    noise = noise_like(3 * matrix)
    assert noise.shape == matrix.shape
    torch.testing.assert_close(noise.norm(), 3 * matrix.norm())
    assert torch.equal(noise, noise_like(3 * matrix))
    assert not torch.equal(noise, noise_like(3 * matrix, seed=1))


def test_noise_needs_about_half_of_its_directions():
    assert 0.45 < k90(singular_values(noise_like(torch.ones(128, 128)))) / 128 < 0.58


@pytest.mark.parametrize("rank", [0, 1, 7, 20])
def test_the_low_rank_part_leaves_exactly_the_smaller_singular_values(matrix, rank):
    part = low_rank_part(matrix, rank)
    assert torch.linalg.matrix_rank(part) == rank
    rest = singular_values(matrix)[rank:].square().sum().sqrt()
    assert (matrix - part).norm().item() == pytest.approx(rest.item(), abs=1e-4)


@pytest.fixture
def before_and_after():
    """Two models that differ in every parameter."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(SmallTransformer(20, 32, 2, 1, num_classes=3, max_len=8).eval())
    return models


def test_weight_changes_are_given_for_every_linear_layer(before_and_after):
    before, after = before_and_after
    changes = weight_changes(before, after)
    assert changes.keys() == {p for p, m in before.named_modules() if isinstance(m, nn.Linear)}
    torch.testing.assert_close(
        changes["classifier"], after.classifier.weight - before.classifier.weight
    )
    assert not any(change.requires_grad for change in changes.values())


def test_changes_cut_to_full_rank_give_the_tuned_model(before_and_after):
    before, after = before_and_after
    ids = torch.arange(16).view(2, 8)
    cut = with_changes_cut(before, after, 128)
    torch.testing.assert_close(cut(ids), after(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [0, 2])
def test_only_the_changes_of_linear_weights_are_cut(before_and_after, rank):
    before, after = before_and_after
    unchanged = {name: t.clone() for name, t in after.state_dict().items()}
    cut = with_changes_cut(before, after, rank)
    for path, change in weight_changes(before, cut).items():
        assert singular_values(change)[rank:].max() < 1e-5, path
    assert torch.equal(cut.token_embedding.weight, after.token_embedding.weight)
    assert torch.equal(cut.classifier.bias, after.classifier.bias)
    assert all(torch.equal(t, unchanged[name]) for name, t in after.state_dict().items())
