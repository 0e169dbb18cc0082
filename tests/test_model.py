"""The transformer, and what ships: the base and its adapters."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_course.experiments.pretrain import save_pretrained
from lora_lib.adapters import load_adapter
from lora_lib.model import MultiHeadAttention, SmallTransformer, classifier_from
from lora_lib.names import SCRIPTS, SPLITS, load_pairs
from lora_lib.pretrained import BASE_FILE, adapter_directory, load_pretrained, read_metadata
from lora_lib.scores import evaluate
from lora_lib.tokens import Tokenizer

VOCAB = 30

# --- the transformer -----------------------------------------------------------------------------


def small(**settings):
    torch.manual_seed(0)
    return SmallTransformer(VOCAB, 16, 4, 2, **settings, max_len=12).eval()


@pytest.fixture
def language_model():
    return small(num_classes=VOCAB, language_model=True)


def test_what_a_model_is_is_said_and_never_guessed_from_its_numbers(ids):
    assert small(num_classes=VOCAB, language_model=True)(ids).shape == (4, 8, VOCAB)
    assert small(num_classes=3)(ids).shape == (4, 3)
    assert small(num_classes=VOCAB)(ids).shape == (4, VOCAB)  # as many classes as tokens


def test_no_position_sees_the_future(language_model, ids):
    changed = ids.clone()
    changed[:, 6] = (ids[:, 6] + 1) % VOCAB
    before, after = language_model(ids), language_model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert ((before[:, 6:] - after[:, 6:]).abs().amax(dim=-1) > 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_the_classifier_reads_the_last_token_of_each_row_and_no_padding(ids, dtype):
    classifier, mask = small(num_classes=3), torch.arange(8) < torch.tensor([[3], [8], [1], [6]])
    one_by_one = [classifier(row[None, : int(m.sum())]) for row, m in zip(ids, mask, strict=True)]
    padded = ids.masked_fill(~mask, Tokenizer.PAD)
    torch.testing.assert_close(classifier(padded, mask.to(dtype)), torch.cat(one_by_one))
    assert not torch.allclose(classifier(padded), torch.cat(one_by_one), atol=1e-6)


def test_a_key_value_cache_gives_the_logits_of_the_whole_sequence_up_to_max_len(language_model):
    ids, cache = torch.arange(13)[None], {}
    pieces = [language_model(ids[:, :4], cache=cache)]
    with pytest.raises(ValueError, match="with a filled cache give one token at a time; 2 were"):
        language_model(ids[:, 4:6], cache=cache)  # and the cache is as before
    pieces += [language_model(ids[:, t : t + 1], cache=cache) for t in range(4, 12)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), language_model(ids[:, :12]))
    for given, kept in ((ids, None), (ids[:, 12:], cache)):
        with pytest.raises(ValueError, match=r"13 tokens .* 12 positions \(max_len\)"):
            language_model(given, cache=kept)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MultiHeadAttention(10, 4), r"d_model 10 .* n_heads 4"),
        (lambda: MultiHeadAttention(8, 0), "n_heads 0; choose a positive number"),
        (lambda: small(num_classes=3, language_model=True), "num_classes is 3; .* its 30 tokens"),
        (lambda: load_pretrained(dropout=-0.1), "dropout is -0.1; it must be at least 0 and"),
        (lambda: load_pretrained(dropout=1), "dropout is 1; it must be at least 0 and"),
        (lambda: adapter_directory("latin"), r"'latin'; there are armenian, georgian"),
    ],
)
def test_what_there_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("training", [False, True])
def test_classifier_from_keeps_the_body_and_draws_a_head_of_its_type_and_mode(base, training):
    base.bfloat16().train(training)
    body = {n: p for n, p in base.named_parameters() if not n.startswith("classifier")}
    model = classifier_from(base, num_classes=2)
    named = dict(model.named_parameters())
    assert model is base
    assert all(named[name] is parameter for name, parameter in body.items())
    assert model.classifier.weight.shape == (2, 128)
    assert model.classifier.training == training
    scores = model(torch.tensor([[1, 7, 2]]))
    assert scores.shape == (1, 2) and scores.dtype == torch.bfloat16


# --- the base that ships -------------------------------------------------------------------------


def test_the_base_is_a_language_model_on_the_cpu_in_eval_mode_that_every_pair_fits_into():
    model, tokenizer = load_pretrained()
    assert model.is_language_model
    assert model.token_embedding.num_embeddings == len(tokenizer)
    assert not any(module.training for module in model.modules())
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    pairs = [pair for split in SPLITS for pair in load_pairs("cyrillic", split)]
    assert max(len(tokenizer.pair(*pair)) for pair in pairs) <= model.max_len


@pytest.mark.parametrize("said", [{}, {"language_model": True}, {"language_model": False}])
def test_what_save_pretrained_writes_is_loaded_bit_for_bit(tmp_path, said):
    config = dict(vocab_size=31, d_model=16, n_heads=4, n_layers=2, num_classes=31) | said
    model = SmallTransformer(**{"language_model": True} | config)  # older files do not say it
    tokenizer, path = Tokenizer("абвгдежзийклмнопрстуфхцчш"), tmp_path / "base.safetensors"
    save_pretrained(model, tokenizer, config, {"date": "today"}, path)
    loaded, loaded_tokenizer = load_pretrained(path)
    weights = loaded.state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert loaded.is_language_model == model.is_language_model
    assert loaded_tokenizer.characters == tokenizer.characters
    assert read_metadata(path)["provenance"] == {"date": "today"}


def test_the_base_trains_with_the_dropout_that_is_asked_for():
    ids = torch.randint(5, 20, (2, 9))
    with torch.no_grad():
        expected = load_pretrained()[0](ids)
        for dropout, same in ((0.0, True), (None, False), (0.5, False)):
            trained = load_pretrained(dropout=dropout)[0].train()(ids)
            assert torch.allclose(trained, expected, atol=1e-5) == same


def cut(size):
    return lambda path: path.write_bytes(BASE_FILE.read_bytes()[:size])


def altered(**config):
    """The base with other settings in its configuration."""

    def write(path):
        metadata = read_metadata() | {"config": read_metadata()["config"] | config}
        strings = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
        save_file(load_file(BASE_FILE), path, strings)

    return write


@pytest.mark.parametrize(
    ("write", "error", "words"),
    [
        (lambda path: None, FileNotFoundError, r"no base model at .*base\.safetensors.*git check"),
        *((cut(n), ValueError, "is not a complete.*git checkout") for n in (0, 1000, 3_000_000)),
        (lambda path: save_file({"weight": torch.ones(2)}, path, {"config": "{}"}), ValueError,
         "not a base model.*lacks characters, provenance"),
        (altered(width=128), ValueError, "do not fit.*unexpected keyword argument 'width'"),
        (altered(n_heads=3), ValueError, "do not fit.*not divisible by n_heads 3"),
        (altered(n_layers=5), ValueError, r"do not fit its configuration[\s\S]*Missing key"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_base_is_refused(tmp_path, write, error, words):
    write(tmp_path / "base.safetensors")
    with pytest.raises(error, match=words):
        load_pretrained(tmp_path / "base.safetensors")


# --- the adapters that ship ----------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_shipped_adapter_takes_less_than_400_kB_and_says_how_it_was_made(script):
    directory = adapter_directory(script)
    assert sum(path.stat().st_size for path in directory.iterdir()) < 400_000
    facts = json.loads((directory / "provenance.json").read_text())
    assert facts["command"] == f"python -m lora_lib.experiments.adapters {script}"
    assert facts["test"].keys() == {"exact_match", "error_rate", "bits"}


def test_the_recorded_scores_of_a_shipped_adapter_are_measured_again(base, tokenizer):
    directory = adapter_directory("georgian")
    recorded = json.loads((directory / "provenance.json").read_text())["test"]
    measured = evaluate(load_adapter(base, directory), tokenizer, "georgian")
    # On other hardware rounding may tip a letter of one or two of the 303 names.
    assert measured._asdict() == pytest.approx(recorded, abs=0.007)
