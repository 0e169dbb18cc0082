"""Directions of weight changes, forgetting on the way, and the tables of both: they are whole, they
agree with the sweep, and slices of them come out again."""

import math
import unicodedata
from dataclasses import replace
from itertools import islice

import numpy as np
import pandas as pd
import pytest
import torch

from lora_course import directions
from lora_course.experiments import forgetting
from lora_course.experiments.geometry import projections
from lora_course.experiments.questions import SEEDS, method
from lora_course.experiments.runs import chosen_rate
from lora_course.experiments.skills import SKILLS, examples_of
from lora_course.experiments.weight_changes import CUTS
from lora_course.results import load_runs, load_table
from lora_lib.names import SCRIPTS, load_pairs
from lora_lib.tokens import Tokenizer
from lora_lib.training import fit

RUNS = load_runs()


def orthonormal(d, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, count, generator=generator))[0]


# --- subspaces and intruders ---------------------------------------------------------------------


def test_similarity_is_the_share_of_the_smaller_subspace_that_lies_in_the_larger():
    a = orthonormal(40, 12)
    for one, other, share in (
        (a, a, 1),
        (a, a @ orthonormal(12, 12, seed=1), 1),  # another basis
        (a[:, 3:6], a, 1),
        (a, a[:, 3:6], 1),
        (a[:, :4], a[:, 4:], 0),
        (a[:, :4], a[:, 2:6], 0.5),
    ):
        assert directions.subspace_similarity(one, other) == pytest.approx(share, abs=1e-5)
    for d, i, j in ((64, 16, 16), (128, 8, 64), (256, 64, 1)):  # by chance
        found = [directions.subspace_similarity(orthonormal(d, i, s), orthonormal(d, j, 1000 + s))
                 for s in range(40)]  # fmt: skip
        assert np.mean(found) == pytest.approx(max(i, j) / d, rel=0.1)


def test_a_strong_new_direction_is_an_intruder_and_a_weak_one_is_not():
    diagonal = torch.diag(torch.arange(16.0, 0, -1))  # its singular vectors are the axes
    assert directions.nearest_cosines(diagonal, diagonal).tolist() == pytest.approx([1.0] * 10)
    assert directions.intruder_dimensions(diagonal, -2 * diagonal) == 0
    new = torch.full((16, 1), 0.25)  # cosine 1/4 with every axis
    strong = diagonal + 1000 * new @ new.T
    assert directions.nearest_cosines(diagonal, strong)[0].item() == pytest.approx(0.25, abs=0.01)
    assert directions.intruder_dimensions(diagonal, strong, k=1) == 1
    assert directions.intruder_dimensions(diagonal, strong, k=1, epsilon=0.2) == 0
    assert directions.intruder_dimensions(diagonal, diagonal + 1e-3 * new @ new.T) == 0


# --- forgetting ----------------------------------------------------------------------------------


def looks(*bits, **key):
    rows = [{"step": 10 * i, "learned": new, "old": old} for i, (new, old) in enumerate(bits)]
    return pd.DataFrame(rows).assign(**key)


TRACK = (8.0, 0.5), (4.0, 2.5), (5.0, 3.0), (1.0, 7.0)


def test_a_skill_is_read_between_two_looks_in_a_straight_line():
    for learned, old in ((8.0, 0.5), (6.0, 1.5), (4.0, 2.5), (3.0, 5.0), (1.0, 7.0),
                         (4.5, 2.25)):  # twice on the way: the first time counts  # fmt: skip
        assert forgetting.bits_at(looks(*TRACK), "old", learned) == pytest.approx(old)
    for learned in (0.99, 8.01):
        with pytest.raises(ValueError, match=f"never reached {learned} bits on what it learns"):
            forgetting.bits_at(looks(*TRACK), "old", learned)


def test_runs_are_compared_where_all_of_them_have_been_and_in_the_order_of_seeds():
    slow, slower = ((8.0, 0.5), (2.0, 6.5)), ((8.0, 0.5), (3.0, 6.5))
    table = pd.concat([looks(*TRACK, setting="a", rate="half", seed=1),
                       looks(*slow, setting="a", rate="half", seed=0),
                       looks(*slower, setting="a", rate="full's", seed=0),
                       looks(*TRACK, setting="b", rate="half", seed=0)])  # fmt: skip
    assert forgetting.reached_by_all(table) == 2.0
    assert forgetting.reached_by_all(table, ("half", "full's")) == 3.0
    assert forgetting.bits_by_seed(table, "a", "half", "old", 2.0) == pytest.approx([6.5, 6.0])


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


# --- what is recorded, and slices of it, computed again ------------------------------------------


def test_every_table_is_whole_with_five_seeds_at_the_chosen_rates():
    for name, keys, rows in (
        ("similarity", ["pair", "layer", "matrix", "side", "i", "j"], 10_000),
        ("projections", ["rank", "layer", "matrix"], 80),
        ("intruders", ["method", "layer", "matrix"], 240),
        ("k90", ["method", "script", "layer", "matrix"], 500),
        ("cuts", ["rank"], 45),
        ("forgetting", ["setting", "rate", "step"], 455),
    ):
        table = load_table(name)
        seeds = table.groupby(keys, dropna=False).seed.agg(set)
        assert len(table) == rows and seeds.map(set(SEEDS).__eq__).all(), name
        numbers = table.select_dtypes("number").drop(columns="layer", errors="ignore")
        assert numbers.map(math.isfinite).all(axis=None), name
    assert set(load_table("cuts")["rank"]) == set(CUTS)
    changes = load_table("k90")
    assert set(map(tuple, changes[["method", "script"]].drop_duplicates().values)) == {
        ("full", "georgian"), ("full", "greek"), ("full", "cyrillic"), ("full-sgd", "georgian"),
    }  # fmt: skip
    for name, rate in changes.groupby("method").lr.unique().items():
        assert list(rate) == [chosen_rate(RUNS, method(name))]
    tracks = load_table("forgetting")
    assert set(tracks.step) == {*forgetting.MEASURED_AT, 500}
    assert list(tracks)[-4:] == ["learned", *SKILLS]


def test_the_first_looks_of_a_track_are_measured_again(monkeypatch):
    recorded = load_table("forgetting").query("setting == 'LoRA r=8'")
    names = ["learned", "Arabic"]  # two of four save half of the time
    monkeypatch.setattr(
        forgetting, "examples_of", lambda *a: {n: examples_of(*a)[n] for n in names}
    )
    monkeypatch.setattr(forgetting, "default_device", lambda: torch.device("cpu"))
    # Ten steps of 500: the look after the last one is then the recorded look at step 10.
    monkeypatch.setattr(
        forgetting, "fit", lambda model, batches, *a: fit(model, islice(batches, 10), *a)
    )
    first = recorded[recorded.rate.eq("chosen") & recorded.seed.eq(0)]
    run = replace(forgetting.SETTINGS["LoRA r=8"], lr=first.lr.iloc[0])
    again = forgetting.measure(run)
    assert [again[0][name] for name in names] == pytest.approx(list(first[names].iloc[0]), abs=1e-3)
    # Another machine differs by 0.01; the tolerance tells seeds and rates apart:
    assert [again[1][name] for name in names] == pytest.approx(list(first[names].iloc[1]), abs=0.06)
    others = recorded[recorded.step.eq(10) & ~recorded.index.isin(first.index)].learned
    assert (others - again[1]["learned"]).abs().min() > 0.1


def test_what_the_projections_say_of_w_is_computed_again(base):
    weights = directions.linear_weights(base)
    for recorded in load_table("projections")[:12:5].to_dict("records"):
        path, rank = f"blocks.{recorded['layer']}.attention.{recorded['matrix']}", recorded["rank"]
        factors = {path: (torch.randn(rank, 128), torch.randn(128, rank), 2.0)}
        again = projections(weights[path], factors, path, recorded["seed"])
        for key in ("layer", "norm of W", "within W", "within random"):
            assert again[key] == pytest.approx(recorded[key], rel=1e-3), key
    weight = torch.diag(torch.arange(8.0, 0, -1))
    along = {"classifier": (torch.eye(8)[:2], torch.eye(8)[:, :2], 3.0)}  # the strongest two
    found = projections(weight, along, "classifier", seed=0)
    assert found["within ΔW"] == pytest.approx(math.hypot(8, 7), rel=1e-5)
    assert found["norm of ΔW"] == pytest.approx(3 * math.sqrt(2), rel=1e-5)
