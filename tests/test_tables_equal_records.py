"""The tidy tables hold what the first records hold: every row, every number, to the last bit.

It goes when the first records go.
"""

import json
from dataclasses import asdict, replace

import pandas as pd

from lora_course.experiments.forgetting import SETTINGS
from lora_course.experiments.geometry import COUNTS
from lora_course.experiments.runs import CENTRE, Run
from lora_course.results import RESULTS, at_chosen_rate, load_runs, load_table


def old(name: str) -> dict | list:
    text = (RESULTS / name).read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()] if "jsonl" in name else json.loads(text)


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
    records = old("sweep.jsonl")
    assert len(new) == len(records) == 838
    for row, record in zip(new, records, strict=True):
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
    """The rate that the first records choose: the best of seed 0 in Georgian, lower rates first."""
    names = [name for name in asdict(CENTRE) if name not in ("script", "seed", "lr")]
    for by in ("bits", "exact_match"):
        best = {}
        for record in sorted(old("sweep.jsonl"), key=lambda record: record["lr"]):
            scores = record["validation"]
            if (record["script"], record["seed"]) == ("georgian", 0):
                score = scores.get("accuracy", -scores.get("bits", 0))
                if by == "exact_match" and "bits" in scores:
                    score = scores[by] - 1e-6 * scores["bits"]
                key = tuple(record[name] for name in names)
                if key not in best or score > best[key][0]:
                    best[key] = score, record["lr"]
        expected = [
            {name: record[name] for name in asdict(CENTRE)}
            for record in old("sweep.jsonl")
            if record["lr"] == best[tuple(record[name] for name in names)][1]
        ]
        chosen = at_chosen_rate(load_runs(), by)[list(asdict(CENTRE))]
        assert rows_of(chosen) == expected and len(expected) >= 450


def test_every_change_is_the_same():
    k90, cuts = rows_of(load_table("k90")), rows_of(load_table("cuts"))
    for record in old("change.json")["runs"]:
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
    for record in old("forgetting.json")["runs"]:
        key = {name: record[name] for name in ("rate", "lr", "seed")}
        run = replace(SETTINGS[record["name"]], lr=record["lr"], seed=record["seed"])
        assert asdict(run) == {name: record[name] for name in asdict(Run())}
        for look in record["track"]:
            assert rows.pop(0) == {"setting": record["name"]} | key | look
    assert rows == []


def test_every_direction_is_the_same():
    geometry = old("geometry.json")
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
    assert rows_of(load_table("counting")) == old("baselines.json")["scores"]


def test_provenance_is_kept_word_for_word():
    expected = {"sweep": old("sweep.provenance.json")}
    for name, file in (("weight_changes", "change"), ("forgetting", "forgetting"),
                       ("geometry", "geometry"), ("counting", "baselines")):  # fmt: skip
        expected[name] = old(f"{file}.json")["provenance"]
    assert json.loads((RESULTS / "provenance.json").read_text("utf-8")) == expected
