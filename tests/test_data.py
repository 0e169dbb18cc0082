import itertools
import os
import subprocess
import sys
import unicodedata

import pytest
import torch

from lora_lib import names
from lora_lib.files import write_atomically
from lora_lib.names import (
    BASE_SCRIPT,
    SCRIPTS,
    SECOND_SCRIPT,
    SPLITS,
    Pair,
    cache_folder,
    load_pairs,
    load_spellings,
    split_of,
)
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
    padding_fraction,
    pair_examples,
)

ALL_SCRIPTS = (BASE_SCRIPT, SECOND_SCRIPT, *SCRIPTS)


# --- names ---------------------------------------------------------------------------------------


def letters(name):
    decomposed = unicodedata.normalize("NFD", name)
    return "".join(c for c in decomposed if c.isalnum()).casefold()


def test_no_town_of_the_test_or_validation_split_is_trained_on_in_any_script():
    towns = {
        split: {letters(pair.latin) for script in ALL_SCRIPTS for pair in load_pairs(script, split)}
        for split in SPLITS
    }
    assert not towns["train"] & towns["test"]
    assert not towns["train"] & towns["validation"]
    assert not towns["validation"] & towns["test"]


@pytest.mark.parametrize(
    ("name", "split"),
    [("Hrazdan", "train"), ("Moscow", "validation"), ("Tbilisi", "validation"), ("Sparta", "test")],
)
def test_the_split_of_a_name_never_changes(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("name", "other"),
    [("San José", "SAN JOSE"), ("Saint-Denis", "saint denis"), ("N'Djamena", "N‘Djaména")],
)
def test_accents_case_and_punctuation_do_not_move_a_name_to_another_split(name, other):
    assert split_of(name) == split_of(other) == split_of(letters(name))


def test_a_tenth_of_the_pairs_is_for_testing_and_a_tenth_for_validation():
    sizes = {s: sum(len(load_pairs(script, s)) for script in ALL_SCRIPTS) for s in SPLITS}
    assert sizes["test"] / sum(sizes.values()) == pytest.approx(0.1, abs=0.01)
    assert sizes["validation"] / sum(sizes.values()) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_every_name_is_wholly_in_its_script(script):
    def scripts_of(name):  # "GEORGIAN LETTER AN" -> "GEORGIAN"; modifiers belong to every script
        names = (unicodedata.name(c) for c in name if c.isalpha())
        return {n.split()[0].split("-")[0] for n in names} - {"MODIFIER"}

    for split in SPLITS:
        for latin, target in load_pairs(script, split):
            assert scripts_of(latin) == {"LATIN"}
            assert scripts_of(target) == {script.upper()}


def test_no_pair_stands_twice_and_names_are_composed_and_of_comparable_length():
    pairs = [pair for split in SPLITS for pair in load_pairs("hangul", split)]
    assert len(set(pairs)) == len(pairs)
    for pair in pairs:
        n_latin, n_target = (len(unicodedata.normalize("NFD", name)) for name in pair)
        assert all(name == unicodedata.normalize("NFC", name) for name in pair)
        assert max(n_latin, n_target) <= 40
        assert 0.4 <= n_target / n_latin <= 2.5


def test_changing_the_returned_list_does_not_change_what_the_next_call_returns():
    pairs = load_pairs("greek", "test")
    load_pairs("greek", "test").clear()
    assert load_pairs("greek", "test") == pairs


def test_an_unknown_script_is_refused_with_the_ones_there_are():
    with pytest.raises(ValueError, match=r"'klingon'.*georgian"):
        load_pairs("klingon", "train")


def test_an_unknown_split_is_refused_with_the_ones_there_are():
    with pytest.raises(ValueError, match=r"'dev'.*validation"):
        load_pairs("greek", "dev")


def test_spellings_hold_every_pair_of_the_split_grouped_by_latin_name():
    spellings = load_spellings("georgian", "test")
    pairs = {(latin, target) for latin, targets in spellings.items() for target in targets}
    assert pairs == set(load_pairs("georgian", "test"))
    assert max(map(len, spellings.values())) > 1


def test_a_limit_keeps_the_first_names_with_all_their_spellings():
    spellings = load_spellings("georgian", "test")
    first = load_spellings("georgian", "test", limit=20)
    assert list(first.items()) == list(spellings.items())[:20]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_keeps_no_names_is_refused(limit):
    with pytest.raises(ValueError, match=f"limit is {limit}; it must be at least 1, or None"):
        load_spellings("georgian", "test", limit)


# --- the cache -----------------------------------------------------------------------------------

TIMED_LOAD = """
import time
from lora_lib.names import load_pairs
start = time.process_time()
n = len(load_pairs("georgian", "train"))
print(n, time.process_time() - start)
"""


def timed_load():
    """CPU seconds of the first load_pairs of a new process."""
    output = subprocess.run([sys.executable, "-c", TIMED_LOAD], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    n, seconds = output.stdout.split()
    assert int(n) == len(load_pairs("georgian", "train"))
    return float(seconds)


def test_a_cache_cut_off_is_prepared_anew_and_the_next_start_is_fast(tmp_path, monkeypatch):
    load_pairs("georgian", "train")
    (prepared,) = cache_folder().glob("*-georgian.json")
    content = prepared.read_text("utf-8")
    monkeypatch.setenv("LORA_LIB_CACHE", str(tmp_path))
    (tmp_path / prepared.name).write_text(content[:1000], "utf-8")

    first = timed_load()
    assert first < 6  # about 3 on an idle machine
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in cache_folder().iterdir()}
    assert (tmp_path / prepared.name).read_text("utf-8") == content
    assert timed_load() < first / 4  # about an eighth


def test_a_cache_folder_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch):
    pairs = load_pairs("georgian", "train")
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_LIB_CACHE", str(tmp_path / "file" / "folder"))
    names._pairs_by_split.cache_clear()
    assert load_pairs("georgian", "train") == pairs


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask to speak of")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_is_written_with_the_permissions_of_any_other_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", b"content")
    finally:
        os.umask(before)
    assert (tmp_path / "file").read_bytes() == b"content"
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    path = tmp_path / "file"
    write_atomically(path, b"old")
    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
            patch.setattr(os, function, full)
            write_atomically(path, b"new")
        assert list(tmp_path.iterdir()) == [path]
        assert path.read_bytes() == b"old"


def test_preparing_names_on_a_full_disk_leaves_no_files_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    pairs = load_pairs("georgian", "train")
    monkeypatch.setenv("LORA_LIB_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "replace", full)
    names._pairs_by_split.cache_clear()
    assert load_pairs("georgian", "train") == pairs
    assert list(tmp_path.iterdir()) == []


def test_without_the_variable_the_cache_is_the_users_own(monkeypatch):
    monkeypatch.delenv("LORA_LIB_CACHE")
    assert cache_folder().name == "lora_lib"


# --- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_decoding_gives_back_every_name_that_was_encoded(script):
    names = [name for pair in load_pairs(script, "test") for name in pair]
    tokenizer = Tokenizer.from_names(names, min_count=1)
    assert [tokenizer.decode(tokenizer.encode(name)) for name in names] == names


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_the_shipped_vocabulary_knows_all_but_two_characters_in_a_thousand(script, tokenizer):
    ids = [
        i for pair in load_pairs(script, "test") for name in pair for i in tokenizer.encode(name)
    ]
    assert ids.count(Tokenizer.UNK) / len(ids) < 0.002


def test_an_unknown_character_becomes_UNK_and_is_shown_as_the_replacement_character():
    tokenizer = Tokenizer("ab")
    assert tokenizer.encode("axb") == [6, Tokenizer.UNK, 7]
    assert tokenizer.decode([6, Tokenizer.UNK, 7]) == "a\ufffdb"


def test_characters_are_counted_after_decomposition_and_rare_ones_left_out():
    tokenizer = Tokenizer.from_names(["é", "e", "é", "x"], min_count=2)
    assert tokenizer.characters == "e\u0301"
    assert len(tokenizer) == 6 + 2


def test_a_pair_is_BOS_latin_SEP_target_EOS():
    tokenizer = Tokenizer("aб")
    assert tokenizer.prompt("a") == [1, 6, 2]
    assert tokenizer.pair("a", "бб") == [1, 6, 2, 7, 7, 3]
    assert tokenizer.name("б") == [1, 7, 3]


def test_a_tag_stands_before_arabic_and_no_other_script():
    tokenizer = Tokenizer("aا")
    assert tokenizer.prompt("a", "arabic") == [1, 6, 2, Tokenizer.ARABIC]
    assert tokenizer.pair("a", "ا", "arabic") == [1, 6, 2, Tokenizer.ARABIC, 7, 3]
    assert tokenizer.prompt("a", "cyrillic") == tokenizer.prompt("a", "greek") == [1, 6, 2]
    (example,) = pair_examples([Pair("a", "ا")], tokenizer, "arabic")
    assert example.first_target == 4


def test_decoding_leaves_out_the_other_special_tokens():
    assert Tokenizer("ab").decode([0, 1, 6, 2, 5, 7, 3, 0]) == "ab"


def test_a_vocabulary_with_a_character_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        Tokenizer("aba")


# --- batches -------------------------------------------------------------------------------------


def test_only_what_follows_SEP_is_to_be_predicted():
    (example,) = pair_examples([Pair("ab", "c")], Tokenizer("abc"))
    assert example == Example([1, 6, 7, 2, 8, 3], first_target=4)


def test_a_batch_shifts_labels_by_one_and_ignores_prompt_and_padding():
    batch = make_batch([Example([1, 7, 2, 8, 3], first_target=3), Example([1, 9, 3], 1)])
    assert batch.input_ids.tolist() == [[1, 7, 2, 8], [1, 9, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, IGNORE, 8, 3], [9, 3, IGNORE, IGNORE]]


def test_a_batch_moves_to_a_device_with_both_tensors():
    batch = make_batch([Example([1, 7, 3], 1)]).to("meta")
    assert batch.input_ids.device.type == batch.labels.device.type == "meta"


def numbered(n):
    """Examples of many lengths; the first token tells which example it is."""
    return [Example([100 + i] * (2 + i * 7 % 13), 1) for i in range(n)]


@pytest.mark.parametrize("pool", [1, 3, 16])
def test_every_epoch_gives_every_example_once(pool):
    batches = batches_by_length(numbered(50), 4, seed=0, pool=pool)
    for _ in range(2):
        epoch = list(itertools.islice(batches, 13))  # 12 batches of 4 and one of 2
        seen = [row[0] for batch in epoch for row in batch.input_ids.tolist()]
        assert sorted(seen) == list(range(100, 150))


def test_the_seed_decides_the_order():
    def first(seed):
        batches = batches_by_length(numbered(50), 4, seed)
        return [batch.input_ids.tolist() for batch in itertools.islice(batches, 20)]

    assert first(1) == first(1) != first(2)


def test_batches_by_length_need_far_less_padding_than_plain_shuffling(tokenizer):
    examples = pair_examples(load_pairs("georgian", "train"), tokenizer)

    def padding(pool):
        batches = batches_by_length(examples, 64, seed=0, pool=pool)
        return padding_fraction(list(itertools.islice(batches, 41)))

    assert padding(pool=16) < 0.15 < 0.25 < padding(pool=1)


def test_the_padding_fraction_is_taken_over_all_positions():
    batches = [make_batch([Example([1] * 5, 1), Example([1] * 3, 1)]), make_batch(numbered(1))]
    assert padding_fraction(batches) == pytest.approx(2 / 9)


def test_no_examples_are_refused():
    with pytest.raises(ValueError, match="no examples"):
        next(batches_by_length([], 4, seed=0))


# --- task A --------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_right_and_wrong_pairs_alternate(script):
    pairs = same_town_pairs(script, "test")
    assert len(pairs) > 0.9 * 2 * len(load_pairs(script, "test"))
    assert [pair.label for pair in pairs] == [1, 0] * (len(pairs) // 2)


def test_right_pairs_are_recorded_and_wrong_ones_are_hard_but_wrong():
    spellings = load_spellings("georgian", "test")
    first_letters = {}
    for latin, target in load_pairs("georgian", "test"):
        first_letters.setdefault(target, set()).add(latin[0])
    pairs = same_town_pairs("georgian", "test")
    for right, wrong in zip(pairs[::2], pairs[1::2], strict=True):
        assert right.latin == wrong.latin
        assert right.target in spellings[right.latin]
        assert wrong.target not in spellings[wrong.latin]
        assert wrong.latin[0] in first_letters[wrong.target]
        assert abs(len(wrong.target) - len(right.target)) <= 2


def test_the_wrong_pairs_are_the_same_every_time_and_a_limit_keeps_the_first():
    pairs = same_town_pairs("greek", "test")
    assert same_town_pairs("greek", "test") == pairs
    assert same_town_pairs("greek", "test", limit=10) == pairs[:20]


def test_task_a_reads_the_pair_without_EOS(tokenizer):
    pairs = same_town_pairs("greek", "test", limit=1)
    dataset = same_town_dataset(pairs, tokenizer)
    item = dataset[0]
    expected = tokenizer.pair(pairs[0].latin, pairs[0].target)
    assert [*item["input_ids"].tolist(), Tokenizer.EOS] == expected
    assert [int(dataset[i]["label"]) for i in range(len(dataset))] == [1, 0]


def test_collate_pads_on_the_right_and_marks_the_tokens():
    dataset = TokenDataset([[5, 6, 7], [8]], [0, 1])
    batch = TokenDataset.collate([dataset[0], dataset[1]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["label"].tolist() == [0, 1]


def test_a_dataset_needs_a_label_for_every_sequence():
    with pytest.raises(ValueError, match="2 sequences but 1 labels"):
        TokenDataset([[5], [6]], [0])


# --- the synthetic task --------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_three_quarters_of_the_tokens_come_from_the_part_of_the_class(num_classes):
    ids, labels = create_synthetic_data(300, 1000, 32, num_classes)
    assert ids.shape == (300, 32)
    assert labels.unique().tolist() == list(range(num_classes))
    parts = ids // (1000 // num_classes)
    assert ((parts == labels[:, None]).sum(dim=1) == 24).all()
    assert ((parts == (labels[:, None] + 1) % num_classes).sum(dim=1) == 8).all()


def test_torchs_seed_decides_the_synthetic_data():
    def drawn(seed):
        torch.manual_seed(seed)
        return create_synthetic_data(10, 100, 8)[0]

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize("num_classes", [1, 11])
def test_a_number_of_classes_that_the_vocabulary_cannot_hold_is_refused(num_classes):
    with pytest.raises(ValueError, match=rf"num_classes is {num_classes}.*vocab_size \(10\)"):
        create_synthetic_data(5, 10, 8, num_classes)


def test_the_synthetic_dataset_has_the_lessons_items():
    dataset = SyntheticDataset(20, vocab_size=1000, seq_len=32)
    assert len(dataset) == 20
    assert dataset[0]["input_ids"].shape == (32,)
    assert dataset[0]["label"].shape == ()
