"""The benchmark measures what it says, refuses to compare what is not equal, and can be resumed."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_course import figures
from lora_course.experiments import benchmark, contestants, large
from lora_course.experiments.benchmark import (
    cases,
    describe,
    find,
    load_benchmark,
    measure,
    middle,
    peak_bytes,
    profile_step,
    quick_cases,
    ratio,
    run_jobs,
    saved_bytes,
)
from lora_course.experiments.contestants import (
    TARGETS,
    Case,
    Contestant,
    Disagreement,
    build,
    entrants,
    factors,
    forward_pass,
    make,
)
from lora_course.experiments.fused import share_inputs
from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.lora import LoRALinear, lora_layers

CPU = torch.device("cpu")
STACK = Case("projections", width=32, depth=2, length=24, rank=4)
DECODER = Case("decoder", width=128, depth=1, batch=2, length=8, rank=2)

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def contestant(name, case):
    return Contestant(make(name, build(case, CPU), case), case, forward_pass(case, CPU))


# --- one case ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stack():
    return measure(STACK, CPU, seconds=0, at_least=3)


def facts(record, key):
    return {name: each[key] for name, each in record["contestants"].items()}


def test_every_contestant_takes_as_many_turns(stack):
    assert list(stack["contestants"]) == entrants(STACK)
    assert stack["failed"] == {}
    assert {len(times) for times in facts(stack, "ms").values()} == {3}
    assert all(t > 0 for times in facts(stack, "ms").values() for t in times)


def test_every_library_trains_the_same_parameters(stack):
    trainable = facts(stack, "trainable")
    layers, d = 3 * STACK.depth, STACK.width
    assert trainable.pop("frozen") == 0
    assert trainable.pop("full") == layers * d * d
    assert set(trainable.values()) == {layers * STACK.rank * 2 * d}


def test_flops_are_those_of_the_formulas(stack):
    flops = facts(stack, "flops")
    d, layers = STACK.width, 3 * STACK.depth
    product = 2 * STACK.length * d * d * layers
    assert flops["frozen"] == 2 * product
    assert flops["full"] == 3 * product
    for name in ("lora_lib", "PEFT", "loralib", "lora_lib, fused"):
        assert flops[name] == 2 * product + 6 * STACK.length * STACK.rank * 2 * d * layers


def test_saved_bytes_count_every_storage_once_and_no_parameter(stack):
    saved = facts(stack, "saved_bytes")
    x = 4 * STACK.length * STACK.width  # bytes; q, k and v save the same x
    z = 4 * STACK.length * STACK.rank
    assert saved["frozen"] == 0
    assert saved["full"] == STACK.depth * x
    assert saved["lora_lib"] == saved["PEFT"] == saved["loralib"] == STACK.depth * (x + 3 * z)


def test_memory_is_weights_optimizer_state_and_what_a_step_adds(stack):
    resident, step = facts(stack, "resident_bytes"), facts(stack, "step_bytes")
    weights = 4 * 3 * STACK.depth * STACK.width**2
    assert resident["frozen"] == weights
    assert resident["full"] - 3 * weights == 4 * 3 * STACK.depth  # Adam's step counts
    assert weights < resident["lora_lib"] < resident["full"]
    assert step["full"] >= weights + facts(stack, "saved_bytes")["full"]  # gradients, activations
    assert step["full"] > step["lora_lib"] > step["frozen"] > 0
    assert peak_bytes(stack, "full") == resident["full"] + step["full"]


def test_float32_contestants_agree_to_rounding(stack):
    for name in ("PEFT", "loralib", "lora_lib, fused"):
        found = stack["contestants"][name]["differences"]
        assert found["output"] < 1e-6 and found["gradients"] < 1e-5


@pytest.mark.parametrize(
    "dropout, most", [(0.0, 1 / 3), (0.1, 0.7)]
)  # with dropout every layer keeps a masked x of its own, PEFT in float32
def test_on_a_bfloat16_base_peft_saves_casts_of_x_and_lora_lib_does_not(dropout, most):
    case = replace(STACK, width=64, length=256, dtype="bfloat16", dropout=dropout)
    ours, theirs = (saved_bytes(contestant(name, case)) for name in ("lora_lib", "PEFT"))
    assert ours <= most * theirs


def test_counting_saved_bytes_leaves_nothing_in_memory():
    """A graph whose nodes save their own outputs must not be kept by the one who looks."""
    alive = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            alive.append(weakref.ref(ctx))
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy

    entry = contestant("lora_lib", STACK)
    run = entry.run
    entry.run = lambda model: (Noted.apply(run(model)[0]).exp(), None)  # exp saves its output
    assert saved_bytes(entry) > 0
    gc.collect()
    assert len(alive) == 1 and alive[0]() is None


def test_a_failed_job_keeps_no_memory_while_the_next_one_runs(tmp_path):
    models = []

    def fails():
        model = nn.Linear(4, 4)
        models.append(weakref.ref(model))
        raise torch.OutOfMemoryError(f"too large: {model}")

    def next_one():
        assert models[0]() is None
        return record_of("next")

    with pytest.raises(torch.OutOfMemoryError):
        run_jobs({"big": fails, "next": next_one}, tmp_path / "out.jsonl", CPU, 60, facts={})
    assert "next" in (tmp_path / "out.jsonl").read_text()


def test_unloaded_is_made_of_plain_layers_and_computes_what_lora_computes():
    case = replace(STACK, mode="inference")
    unloaded, lora = (contestant(name, case) for name in ("lora_lib, unloaded", "lora_lib"))
    assert not any(lora_layers(unloaded.model))
    outputs = [c.run(c.model)[0] for c in (unloaded, lora)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_contestants_share_the_frozen_weights_but_full_has_its_own():
    base = build(STACK, CPU)
    weights = {id(p) for p in base.parameters()}
    for name in entrants(STACK):
        inside = {id(p) for p in make(name, base, STACK).parameters()}
        assert not weights & inside if name == "full" else weights <= inside
    assert not any(p.requires_grad for p in base.parameters())
    assert [type(m) for m in base.layers[0].values()] == [nn.Linear] * 3


def test_compiled_models_are_compiled_block_by_block_and_their_base_is_not():
    case = replace(DECODER, mode="compiled")  # compiling itself takes a minute: not here
    base = build(case, CPU)
    model = make("lora_lib", base, case)
    assert all(block._compiled_call_impl for block in model.layers)
    assert not any(block._compiled_call_impl for block in base.layers)


def test_a_profiler_that_fails_costs_no_times(monkeypatch):
    def broken(contestant, device):
        raise RuntimeError("no profiler here")

    monkeypatch.setattr(benchmark, "profile_step", broken)
    record = measure(DECODER, CPU, seconds=0, at_least=1)
    assert record["failed"] == {"profile": "RuntimeError('no profiler here')"}
    assert all(record["contestants"][name]["ms"] for name in entrants(DECODER))


def test_a_profile_tells_thin_products_from_those_with_W():
    case = replace(DECODER, rank=3)
    spent = {name: profile_step(contestant(name, case), CPU) for name in ("lora_lib", "frozen")}
    for times in spent.values():
        assert times["products with W"] > 0 and times["attention"] > 0
    assert spent["lora_lib"]["products with A or B"] > 0
    assert "products with A or B" not in spent["frozen"]
    assert spent["lora_lib"]["optimizer"] > 0 == spent["frozen"].get("optimizer", 0)


# --- what is not equal is not compared ------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [0.5, 2.0])
def test_a_rival_with_another_scaling_is_not_compared(monkeypatch, wrong, dtype):
    def rescaled(model, case):
        model = contestants._peft(model, case)
        for module in model.modules():
            if hasattr(module, "scaling"):
                module.scaling["default"] *= wrong
        return model

    monkeypatch.setitem(contestants.MAKE, "PEFT", rescaled)
    with pytest.raises(Disagreement, match="gradients"):
        measure(replace(STACK, dtype=dtype), CPU, seconds=0, at_least=1)


def test_a_rival_that_adapts_other_layers_is_not_compared(monkeypatch):
    def fewer(model, case):
        add_lora_to_model(model, case.rank, 2.0 * case.rank, ("q_proj",))
        freeze_non_lora_params(model)
        return model

    monkeypatch.setitem(contestants.MAKE, "PEFT", fewer)
    with pytest.raises(Disagreement, match="other layers"):
        measure(STACK, CPU, seconds=0, at_least=1)


def test_a_contestant_that_cannot_run_does_not_cost_the_others_their_turn(monkeypatch):
    def too_large(model, case):
        raise torch.OutOfMemoryError("no more memory")

    monkeypatch.setitem(contestants.MAKE, "PEFT", too_large)
    record = measure(STACK, CPU, seconds=0, at_least=1)
    assert record["failed"] == {"PEFT": "OutOfMemoryError('no more memory')"}
    assert list(record["contestants"]) == [name for name in entrants(STACK) if name != "PEFT"]


# --- the faster variant ---------------------------------------------------------------------------


def test_fused_layers_give_the_same_outputs_and_gradients_in_float64():
    case = replace(DECODER, depth=2)
    base = build(case, CPU).double()
    plain, fused = (make(name, base, case).double() for name in ("lora_lib", "lora_lib, fused"))
    x = torch.randn(2, 8, 128, dtype=torch.float64)
    results = []
    for model in (plain, fused):
        leaf = x.clone().requires_grad_()
        output = model(inputs_embeds=leaf).last_hidden_state
        output.sin().sum().backward()
        gradients = [factor.grad for both in factors(model).values() for factor in both]
        results.append([output, leaf.grad, *gradients])
    assert len(results[0]) == 2 + 2 * 7 * case.depth
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_fused_layer_can_be_called_alone_and_again():
    model = make("lora_lib, fused", build(STACK, CPU), STACK)
    plain = make("lora_lib", build(STACK, CPU), STACK)
    x = torch.randn(5, STACK.width)
    for name in ("v_proj", "v_proj", "q_proj"):
        torch.testing.assert_close(model.layers[0][name](x), plain.layers[0][name](x))


@pytest.mark.parametrize("settings", [dict(bias=True), dict(dropout=0.1)])
def test_layers_that_cannot_be_fused_are_refused(settings):
    linear = nn.Linear(8, 8, bias=settings.pop("bias", False))
    with pytest.raises(ValueError, match="without bias and without dropout"):
        share_inputs(nn.Sequential(LoRALinear(linear, **settings)))


@pytest.mark.parametrize("change", ["merged", "other scaling"])
def test_layers_that_would_be_computed_wrongly_together_are_refused(change):
    model = make("lora_lib", build(STACK, CPU), STACK)
    layer = model.layers[0]["k_proj"]
    if change == "merged":
        layer.merge()
    else:
        layer.scaling *= 2
    with pytest.raises(ValueError, match="not merged and have one scaling"):
        share_inputs(model)


# --- jobs and their file --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """`--quick` twice with the same file."""
    path = tmp_path_factory.mktemp("benchmark") / "benchmark_cpu.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["benchmark", "--quick", "--out", str(path)])
        benchmark.main()
        before = path.read_text("utf-8")
        benchmark.main()
    return before, path.read_text("utf-8"), load_benchmark("cpu", path.parent)


def test_the_quick_benchmark_runs_every_kind_of_case_and_nothing_twice(quick):
    before, after, rows = quick
    assert before == after
    assert [row["name"] for row in rows] == [describe(case) for case in quick_cases()]
    for row in rows:
        assert row["failed"] == {}
        assert list(row["contestants"]) == entrants(Case(**row["case"]))
        assert row["provenance"]["peft"] and row["provenance"]["threads"] == 1


def test_the_quick_large_model_runs(monkeypatch, tmp_path):
    path = tmp_path / "large.jsonl"
    monkeypatch.setattr("sys.argv", ["large", "--quick", "--out", str(path)])
    large.main()
    rows = large.load_large(path)
    assert [list(row["contestants"]) for row in rows] == [
        entrants(large.TINY),
        ["full"],
        entrants(replace(large.TINY, mode="checkpointed")),
        ["full"],
    ]
    assert [row["case"]["dtype"] for row in rows if "full" in row["contestants"]] == [
        "float32",
        "bfloat16",
    ]
    kept, recomputed = (rows[i]["contestants"]["lora_lib"]["step_bytes"] for i in (0, 2))
    assert recomputed < kept


def record_of(name):
    return {"case": {}, "contestants": {"lora_lib": {"ms": [1.0]}}, "failed": {}}


def test_a_job_that_fails_does_not_keep_the_next_from_running(tmp_path, capsys):
    def fail():
        raise RuntimeError("broken")

    path = tmp_path / "results.jsonl"
    jobs = {"first": fail, "second": lambda: record_of("second")}
    with pytest.raises(RuntimeError, match="broken"):
        run_jobs(jobs, path, CPU, seconds=60, facts={"provenance": "here"})
    [row] = map(json.loads, path.read_text("utf-8").splitlines())
    assert row["name"] == "second" and row["provenance"] == "here"
    assert "first failed: RuntimeError('broken')" in capsys.readouterr().err


def test_no_job_is_started_after_the_time(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    run_jobs({"first": lambda: record_of("first")}, path, CPU, seconds=-1, facts={})
    assert path.read_text("utf-8") == ""
    assert "before first" in capsys.readouterr().out


def test_numbers_are_read_from_the_record():
    record = {
        "case": {"width": 8, "dtype": "float32"},
        "contestants": {"a": {"ms": [1.0, 2.0, 9.0]}, "b": {"ms": [2.0, 2.0, 3.0]}},
    }
    assert middle(record, "a") == 2.0
    assert ratio(record, "a", "b") == 1.0  # median of 0.5, 1 and 3
    assert find([record], width=8) is record
    with pytest.raises(ValueError, match="0 of 1 cases have the settings"):
        find([record], width=16)


# --- the large model ------------------------------------------------------------------------------


def test_the_arithmetic_counts_what_the_model_has():
    case = replace(large.TINY, vocabulary=50)
    base = build(case, CPU)
    assert large.decoder_parameters(case) == sum(p.numel() for p in base.parameters())
    model = make("lora_lib", base, case)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert large.lora_parameters(case) == trainable


def test_the_large_model_is_llama_2_7b():
    assert large.decoder_parameters(large.SEVEN_B) == 6_738_415_616
    assert large.lora_parameters(large.SEVEN_B) == 39_976_960
    assert large.lora_bytes(large.SEVEN_B) == pytest.approx(14.1e9, rel=0.01)
    assert large.full_bytes(large.SEVEN_B, 16) == pytest.approx(108e9, rel=0.01)


def test_the_guess_leaves_room_for_activations():
    depth = large.guess_depth(large.SEVEN_B, 16, memory=80 * 2**30)
    fits = large.full_bytes(replace(large.SEVEN_B, depth=depth), 16) + 8e9
    assert fits <= 80 * 2**30 < fits + 16 * 210e6


@pytest.mark.parametrize("guess", [0, 1, 4, 5, 6, 9, 40])
@pytest.mark.parametrize("limit, most, expected", [(5, 8, 5), (9, 8, 8), (1, 8, 1)])
def test_the_deepest_model_that_fits_is_found_from_any_guess(guess, limit, most, expected):
    tried = []

    def attempt(depth):
        assert 1 <= depth <= most
        tried.append(depth)
        return {"depth": depth} if depth <= limit else None

    assert large.deepest(attempt, guess, most) == {"depth": expected}
    assert len(tried) == len(set(tried))


def test_no_depth_that_fits_is_an_error():
    with pytest.raises(RuntimeError, match="not even one block"):
        large.deepest(lambda depth: None, guess=2, most=8)


def test_full_fine_tuning_that_runs_out_of_memory_is_no_record(monkeypatch):
    def step(self):
        raise torch.OutOfMemoryError("no more memory")

    monkeypatch.setattr(Contestant, "step", step)
    assert large.train_full(large.TINY, 8, CPU, depth=1) is None


# --- the figure -----------------------------------------------------------------------------------


def test_the_figure_draws_the_ratios_it_is_given_and_the_floor():
    ratios = {"lora_lib": [1.4, 0.8], "frozen": [0.6, 0.7]}
    decoder = {"full": (200.0, 40.0), "lora_lib": (164.0, 18.0)}
    figure = figures.step_times({"CPU": ratios, "GPU": ratios}, (128, 4096), decoder)
    for ax, title in zip(figure.axes[:2], ("CPU", "GPU"), strict=True):
        lines = {line.get_label(): list(map(float, line.get_ydata())) for line in ax.lines}
        assert ax.get_title("left") == title
        assert lines["lora_lib"] == [1.4, 0.8] and lines["frozen"] == [0.6, 0.7]
        assert lines["full"] == [1, 1]
        assert lines["2/3 of full: the floor in FLOPs"] == [2 / 3, 2 / 3]
    bars = figure.axes[2].patches
    assert [bar.get_width() for bar in bars] == [200.0, 164.0]
    texts = [text.get_text() for text in figure.axes[2].texts]
    assert {"200 ms, 40 GB", "164 ms, 18 GB", "recorded"} == set(texts)


# --- what is recorded -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_is_recorded_with_every_contestant(device):
    rows = load_benchmark(device)
    assert {row["name"] for row in rows} == {describe(c) for c in cases(torch.device(device))}
    for row in rows:
        assert list(row["contestants"]) == entrants(Case(**row["case"])) and not row["failed"]
        assert row["provenance"]["device"].startswith(device)


def test_every_measurement_of_the_large_model_is_recorded():
    rows = {row["name"]: row for row in large.load_large()}
    for mode in ("train", "checkpointed"):
        case = replace(large.SEVEN_B, mode=mode)
        row = rows.pop(describe(case))
        assert {*row["contestants"], *row["failed"]} == set(entrants(case))
        assert "lora_lib" in row["contestants"]
    assert {name: list(row["contestants"]) for name, row in rows.items()} == {
        f"full, {bytes_each} bytes a parameter": ["full"] for bytes_each in large.FULL_RECIPES
    }
    assert all(row["provenance"]["device"].startswith("cuda") for row in large.load_large())


def test_targets_name_layers_of_their_models():
    for case in (STACK, DECODER, Case("course")):
        names = {path.rpartition(".")[2] for path, _ in build(case, CPU).named_modules()}
        assert set(TARGETS[case.model]) <= names
