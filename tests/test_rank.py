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


@pytest.mark.parametrize(
    ("measure", "values", "expected"),
    [
        (lambda values: singular_values(values.diag()).tolist(), [1, 3, 2], [3, 2, 1]),
        (lambda values: cumulative_energy(values).tolist(), [2, 1, 1], [4 / 6, 5 / 6, 1]),
        (k90, [3, 0.1], 1),
        (k90, [1] * 10, 9),
        (lambda values: k90(values, share=1), [1] * 10, 10),
        (effective_rank, [2, 2, 2, 0], 3),
        (effective_rank, [5, 0], 1),
        (stable_rank, [2, 2, 2, 0], 3),
        (stable_rank, [2, 1], 5 / 4),
    ],
)
def test_measures_of_values_that_are_known(measure, values, expected):
    assert measure(torch.tensor(values).double()) == pytest.approx(expected)


MEANINGLESS = [
    ([0.0, 0.0], "every singular value is zero; compare two models that differ"),
    ([], "every singular value is zero"),
    ([1.0, math.nan], "a singular value is nan; .*train the model anew"),
    ([math.inf, 1.0], "a singular value is inf; .*train the model anew"),
]


@pytest.mark.parametrize(
    ("measure", "given", "words"),
    [
        *((measure, (torch.tensor(values),), words)
          for measure in (cumulative_energy, k90, effective_rank, stable_rank)
          for values, words in MEANINGLESS),
        *((k90, (torch.ones(3), share), f"share is {share}; it must be above 0 and at most 1")
          for share in (-0.1, 0, 2.0, math.nan)),
        *((analyze_weight_change_rank, (30, 20, rank), f"rank is {rank}; a 20 × 30 .* 1 to 20")
          for rank in (0, 21)),
    ],
)  # fmt: skip
def test_no_measure_makes_a_number_of_what_means_nothing(measure, given, words):
    with pytest.raises(ValueError, match=words):
        measure(*given)


def test_noise_has_the_shape_and_norm_of_the_matrix_its_seed_and_half_of_all_directions(matrix):
    noise = noise_like(3 * matrix)
    assert noise.shape == matrix.shape
    torch.testing.assert_close(noise.norm(), 3 * matrix.norm())
    assert torch.equal(noise, noise_like(3 * matrix))
    assert not torch.equal(noise, noise_like(3 * matrix, seed=1))
    assert 0.45 < k90(singular_values(noise_like(torch.ones(128, 128)))) / 128 < 0.58


@pytest.mark.parametrize("rank", [0, 1, 7, 20])
def test_the_low_rank_part_leaves_exactly_the_smaller_singular_values(matrix, rank):
    part = low_rank_part(matrix, rank)
    assert torch.linalg.matrix_rank(part) == rank
    rest = singular_values(matrix)[rank:].square().sum().sqrt()
    assert (matrix - part).norm().item() == pytest.approx(rest.item(), abs=1e-4)


@pytest.mark.parametrize("rank", [0, 2, 128])
def test_the_changes_of_linear_weights_are_cut_and_nothing_else(rank):
    models = []
    for seed in (0, 1):  # two models that differ in every parameter
        torch.manual_seed(seed)
        models.append(SmallTransformer(20, 32, 2, 1, num_classes=3, max_len=8).eval())
    before, after = models
    unchanged = {name: t.clone() for name, t in after.state_dict().items()}
    changes = weight_changes(before, after)
    assert changes.keys() == {p for p, m in before.named_modules() if isinstance(m, nn.Linear)}
    weights = after.classifier.weight - before.classifier.weight
    torch.testing.assert_close(changes["classifier"], weights)
    assert not any(change.requires_grad for change in changes.values())
    cut = with_changes_cut(before, after, rank)
    for path, change in weight_changes(before, cut).items():
        assert (singular_values(change)[rank:] < 1e-5).all(), path
    assert torch.equal(cut.token_embedding.weight, after.token_embedding.weight)
    assert torch.equal(cut.classifier.bias, after.classifier.bias)
    assert all(torch.equal(t, unchanged[name]) for name, t in after.state_dict().items())
    if rank == 128:
        ids = torch.arange(16).view(2, 8)
        torch.testing.assert_close(cut(ids), after(ids), atol=1e-5, rtol=0)
