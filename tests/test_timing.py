"""What is timed is equal, its sizes are those of formulas, and the table of results is complete."""

from dataclasses import asdict, astuple, replace

import pytest
import torch

from lora_course.experiments import timed_models, timing
from lora_course.experiments.timing import load_timing, measure, record

CPU = torch.device("cpu")
STACK = timed_models.Case("projections", width=32, depth=2, length=24, rank=4)
DECODER = timed_models.Case("decoder", width=128, depth=1, batch=2, length=16, rank=3)
WHOLE = replace(DECODER, depth=2, vocabulary=50, dtype="bfloat16")
SIZES = ("trainable", "resident_bytes", "saved_bytes")

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def test_sizes_are_those_of_formulas():
    d, n, r, layers = STACK.width, STACK.length, STACK.rank, 3 * STACK.depth
    W, AB = layers * d * d, layers * r * 2 * d
    x, z = 4 * n * d, 4 * n * r  # bytes; q, k and v save the same x
    # Adam has two means, and a count for each parameter.
    lora = AB, 4 * W + 3 * 4 * AB + 4 * 2 * layers, STACK.depth * (x + 3 * z)
    expected = {
        "frozen": (0, 4 * W, 0),
        "full": (W, 3 * 4 * W + 4 * layers, STACK.depth * x),
        **dict.fromkeys(("lora_lib", "PEFT", "loralib"), lora),
    }
    rows = {row["method"]: row for row in measure(STACK, CPU, seconds=0, at_least=3)}
    for method, sizes in expected.items():
        assert tuple(rows[method][name] for name in SIZES) == sizes, method
    assert {len(row["ms"]) for row in rows.values()} == {3}  # all take as many turns
    for method in ("PEFT", "loralib"):
        assert rows[method]["output_difference"] < 1e-6 > rows[method]["gradient_difference"]


def test_a_ratio_is_that_of_one_round_and_only_of_those_who_took_turns(tmp_path):
    times = {"lora_lib": [1, 2, 9], "frozen": [2, 2, 3], "full, 8 bytes a parameter": [5, 5, 5]}
    rows = [{**asdict(WHOLE), "method": name, "ms": ms} for name, ms in times.items()]
    rows += [{**asdict(STACK), "method": "lora_lib", "ms": [7]}]
    record(rows, {"processor": "CPU", "resident_bytes": 1, "step_bytes": 1}, tmp_path / "table")
    over = timing.ratio(load_timing(tmp_path / "table"), "frozen")
    assert over.tolist()[:2] == [1, 1]  # the median of 0.5, 1 and 3
    assert over.isna().tolist() == [False, False, True, True]


def test_all_is_recorded_with_where_and_when():
    table = load_timing()
    expected = {
        ("CPU" if device == CPU else "GPU", *astuple(case), method)
        for device in (CPU, torch.device("cuda"))
        for case in timing.cases(device)
        for method in timed_models.methods(case)
    }
    expected |= {
        ("GPU", *astuple(case), method)
        for case, chosen in timed_models.SEVEN_B_CASES
        for method in chosen
    }
    assert set(map(tuple, table[[*timing.CASE, "method"]].values)) == expected
    assert len(expected) == len(table)
    assert table[["date", "device", "torch", "peft", "threads"]].notna().all(axis=None)
    assert (table["ms"].notna() | table["failed"].notna()).all()


def test_seven_b_is_llama_2_7b():
    table = load_timing().query("vocabulary > 0 and depth == 32 and mode == 'checkpointed'")
    table = table.set_index("method")
    assert table.resident_bytes["frozen"] == 2 * 6_738_415_616
    assert table.trainable["lora_lib"] == 39_976_960


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_recorded_is_measured_again(dtype):
    """All but times and peaks, which are the machine's. PEFT's casts of x are among the saved."""
    case = timed_models.Case("projections", dtype=dtype)
    table = load_timing().query("processor == 'CPU' and width == 128 and model == 'projections'")
    table = table.query("dtype == @dtype").set_index("method")
    for row in measure(case, CPU, seconds=0, at_least=1):
        for name in SIZES:
            assert table.loc[row["method"], name] == row[name]
    most = {"float32": 1, "bfloat16": 1 / 3}[dtype]
    assert table.loc["lora_lib", "saved_bytes"] <= most * table.loc["PEFT", "saved_bytes"]
