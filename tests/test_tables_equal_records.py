"""The tidy tables hold what the first records hold: every row, every number, to the last bit.

It goes when the first records go.
"""

import json
from dataclasses import asdict, replace

import pandas as pd

from lora_course.experiments.change import load_changes
from lora_course.experiments.counting import load_baselines
from lora_course.experiments.forgetting import SETTINGS, load_forgetting
from lora_course.experiments.geometry import COUNTS, load_geometry
from lora_course.experiments.runs import CENTRE, RESULTS, Run, chosen_rate, load_results, run_of
from lora_course.results import RESULTS as TABLES
from lora_course.results import at_chosen_rate, load_runs, load_table

PATHS = {"classifier": (None, "classifier")} | {
    f"blocks.{layer}.{part}.{name}": (layer, name)
    for layer in range(4)
    for part, names in (("attention", "qkvo"), ("feed_forward", "12"))
    for name in (("W_" if part == "attention" else "linear") + n for n in names)
}


def rows_of(table: pd.DataFrame) -> list[dict]:
    """A dict a row; None where there is no value."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def test_every_run_is_the_same():
    new = rows_of(load_runs())
    old = load_results()
    assert len(new) == len(old) == 838
    for row, record in zip(new, old, strict=True):
        flat = dict(record)
        flat |= {f"validation_{name}": value for name, value in flat.pop("validation").items()}
        flat |= flat.pop("test")
        losses = flat.pop("losses")
        assert [float(loss) for loss in row.pop("losses").split()] == losses
        assert {name: row[name] for name in flat} == flat
        assert all(value is None for name, value in row.items() if name not in flat)
        for name, value in flat.items():
            assert type(row[name]) is type(value), name


def test_every_chosen_rate_is_the_same():
    for by in ("bits", "exact_match"):
        chosen = at_chosen_rate(load_runs(), by)
        old = load_results()
        at_it = [run for run in map(run_of, old) if run.lr == chosen_rate(old, run, by)]
        assert [run_of(row) for row in rows_of(chosen)] == at_it
        assert len(at_it) >= 450


def test_every_change_is_the_same():
    k90, cuts = rows_of(load_table("k90")), rows_of(load_table("cuts"))
    for record in load_changes():
        key = {name: record[name] for name in ("method", "script", "lr", "seed")}
        # Every other setting is the centre's.
        assert asdict(replace(CENTRE, **key)) == {name: record[name] for name in asdict(CENTRE)}
        for path, value in record["k90"].items():
            layer, matrix = PATHS[path]
            noise = record["k90_of_noise"][path]
            row = {"layer": layer, "matrix": matrix, "k90": value, "k90_of_noise": noise}
            assert k90.pop(0) == key | row
        for rank, scores in record["cut"].items():
            assert cuts.pop(0) == key | {"rank": int(rank)} | scores
    assert k90 == cuts == []


def test_every_track_is_the_same():
    rows = rows_of(load_table("forgetting"))
    for record in load_forgetting():
        key = {name: record[name] for name in ("rate", "lr", "seed")}
        run = replace(SETTINGS[record["name"]], lr=record["lr"], seed=record["seed"])
        assert asdict(run) == {name: record[name] for name in asdict(Run())}
        for look in record["track"]:
            assert rows.pop(0) == {"setting": record["name"]} | key | look
    assert rows == []


def test_every_direction_is_the_same():
    geometry = load_geometry()
    similarity = rows_of(load_table("similarity"))[::-1]
    for record in geometry["similarity"]:
        layer, matrix = PATHS[record["path"]]
        key = {name: record[name] for name in ("pair", "seed", "side")}
        for i, line in zip(COUNTS, record["phi"], strict=False):
            for j, phi in zip(COUNTS, line, strict=False):
                here = {"layer": layer, "matrix": matrix, "i": i, "j": j, "phi": phi}
                assert similarity.pop() == key | here
    projections = rows_of(load_table("projections"))
    for record in geometry["projection"]:
        layer, matrix = PATHS[record.pop("path")]
        assert projections.pop(0) == record | {"layer": layer, "matrix": matrix}
    intruders = rows_of(load_table("intruders"))
    attention = [place for place in PATHS.values() if place[1].startswith("W_")]
    for record in geometry["intruders"]:
        key = {name: record[name] for name in ("method", "seed")}
        for (layer, matrix), count in zip(attention, record["counts"], strict=True):
            here = {"layer": layer, "matrix": matrix, "intruders": count}
            assert intruders.pop(0) == key | here
    assert similarity == projections == intruders == []


def test_every_counted_score_is_the_same():
    assert rows_of(load_table("counting")) == load_baselines()


def test_provenance_is_kept_word_for_word():
    facts = json.loads((TABLES / "provenance.json").read_text("utf-8"))
    old = RESULTS.parent
    expected = {"sweep": json.loads((old / "sweep.provenance.json").read_text("utf-8"))}
    for name, file in (("weight_changes", "change"), ("forgetting", "forgetting"),
                       ("geometry", "geometry"), ("counting", "baselines")):  # fmt: skip
        expected[name] = json.loads((old / f"{file}.json").read_text("utf-8"))["provenance"]
    assert facts == expected
