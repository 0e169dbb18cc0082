import copy
import itertools
import math
from collections import OrderedDict
from unittest.mock import MagicMock

import pytest
import torch
from tiny_models import same, with_lora
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lora_lib import add_lora_to_model, freeze_non_lora_params
from lora_lib.model import SmallTransformer
from lora_lib.names import Pair, load_pairs, load_spellings
from lora_lib.scores import (
    accuracy,
    bits_per_character,
    classification_loss,
    error_rate,
    evaluate,
    language_model_loss,
    score_names,
    transliterate,
)
from lora_lib.tasks import SyntheticDataset, TokenDataset, create_synthetic_data
from lora_lib.tokens import Example, Tokenizer, batches_by_length, make_batch, pair_examples
from lora_lib.training import adapt, fit, train_model, training_steps, warm_up_then_decay

VOCAB = 12
NAMES = ["Gori", "San José", "Omsk", "Novosibirsk", "Tula"]


def tiny_language_model():
    torch.manual_seed(0)
    return SmallTransformer(VOCAB, 16, 2, 1, VOCAB, max_len=16, language_model=True)


def write(model, names, **settings):
    return transliterate(model, Tokenizer("abcdef"), names, **settings)


def tiny_classifier():
    torch.manual_seed(0)
    return SmallTransformer(40, 16, 2, 1, num_classes=2, max_len=16)


def batches(n):
    examples = [Example([1, 5 + i, 2, 11 - i, 5 + i, 3], 3) for i in range(6)]
    return list(itertools.islice(batches_by_length(examples, 4, seed=0), n))


@pytest.fixture
def loader():
    torch.manual_seed(0)
    return DataLoader(SyntheticDataset(create_synthetic_data(200, 40, 16)), 32)


# --- the loop ------------------------------------------------------------------------------------


def test_the_loop_is_clipped_descent_one_step_a_batch():
    model = tiny_language_model().eval()
    by_hand, given = copy.deepcopy(model), batches(3)
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    for loss in training_steps(model, given, optimizer, max_norm=0.5):
        rate = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] /= 2  # whoever iterates may change it
        expected = language_model_loss(by_hand, given[len(losses)])
        losses.append(loss)
        assert loss == expected.item()
        gradients = torch.autograd.grad(expected, list(by_hand.parameters()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                parameter -= rate * gradient * min(1, 0.5 / norm)
    assert len(losses) == 3 and norm > 0.5
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_fit_lowers_the_loss_takes_no_batch_too_many_and_may_run_out_of_them():
    given = iter(batches(61))
    losses = fit(tiny_language_model(), given, 60, lr=1e-2)
    assert len(losses) == 60 and sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert len(list(given)) == 1
    assert fit(tiny_language_model(), batches(1), 40, 1e-2) == losses[:1]


def test_fit_trains_in_train_mode_with_gradients_of_norm_1_at_most():
    model, modes = tiny_language_model().eval(), []
    before = [p.detach().clone() for p in model.parameters()]

    def steep(model, batch):
        modes.append(model.training)
        return 1e4 * language_model_loss(model, batch)

    fit(model, batches(1), 40, 1e-2, loss_function=steep, optimizer=torch.optim.SGD)
    moved = [p - old for p, old in zip(model.parameters(), before, strict=True)]
    length = torch.cat([change.flatten() for change in moved]).norm().item()
    assert length == pytest.approx(1e-2 / 40 / 0.1, rel=1e-3)  # the first of 40 rates, times 1
    assert modes == [True] and not model.training


def test_the_learning_rate_rises_over_a_tenth_of_the_steps_and_falls_to_zero():
    shares = [warm_up_then_decay(step, 100) for step in range(101)]
    assert shares[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert shares[10:] == pytest.approx([(100 - i) / 90 for i in range(10, 101)])
    for steps in (1, 5, 7, 11, 240, 500):
        assert max(warm_up_then_decay(step, steps) for step in range(steps)) <= 1


@pytest.mark.filterwarnings("error")
def test_the_same_seed_gives_the_same_training(base, tokenizer):
    pairs = load_pairs("georgian", "train")[:20]
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = with_lora(copy.deepcopy(base))
        losses = adapt(model, tokenizer, pairs, steps=3, lr=1e-2, batch_size=4, seed=seed)
        results.append((losses, model.state_dict()))
    (one, weights), (again, weights_again), (other, _) = results
    assert one == again != other and same(weights, weights_again)


def test_every_module_is_afterwards_in_the_mode_it_had_and_scores_do_not_depend_on_it(
    loader, base, tokenizer
):
    steps = itertools.repeat(next(iter(loader)))
    for use in (
        lambda model: fit(model, steps, 2, 1e-3, loss_function=classification_loss),
        lambda model: train_model(model, loader, loader, epochs=1),
        lambda model: accuracy(model, loader),
    ):
        model = tiny_classifier().train()
        model.blocks[0].eval()
        before = [module.training for module in model.modules()]
        use(model)
        assert [module.training for module in model.modules()] == before
    scores = evaluate(base, tokenizer, "georgian", limit=5)
    assert evaluate(base.train(), tokenizer, "georgian", limit=5) == scores
    assert all(module.training for module in base.modules())
    model = tiny_classifier().eval()
    assert accuracy(model, loader) == accuracy(model.train(), loader)


# --- when training goes wrong --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda model: fit(model, batches(3), 0, 1e-3), "steps is 0; it must be at least 1"),
        (lambda model: fit(model, [], 3, 1e-3), "no batches to train on; give at least one"),
        (lambda model: accuracy(model, []), "the loader gives no batches; give at least one"),
        (lambda model: adapt(model, Tokenizer("a"), [], steps=1, lr=1e-3), "at least one"),
        (lambda model: bits_per_character(model, []), "give at least one example"),
        (lambda model: score_names([], {}), "no names to score; give at least one"),
        (lambda model: score_names(["a"], {"A": ("a",), "B": ("b",)}), "longer"),
        (lambda model: fit(model.requires_grad_(False), [], 3, 1e-3), "no parameter has requires_"),
        (lambda model: train_model(model.requires_grad_(False), [], []), "nothing to train"),
        (lambda model: write(model, ["abc"], max_new=0), "max_new is 0; it must be at least 1"),
        (lambda model: write(model, "abc"), r"'abc'; give a list of names: \['abc'\]"),
        (lambda model: write(model, ["a" * 200]), "200 characters leaves no room .*max_len"),
    ],
)
def test_what_cannot_be_trained_written_or_scored_is_refused(use, words):
    with pytest.raises((ValueError, TypeError), match=words):
        use(tiny_language_model())


@pytest.mark.parametrize(("first", "value"), [(1, math.nan), (7, math.inf)])
def test_a_loss_that_is_not_finite_stops_fit_with_the_weights_of_the_step_before(first, value):
    calls = itertools.count(1)

    def broken(model, batch):
        return language_model_loss(model, batch) * (value if next(calls) >= first else 1)

    model = tiny_language_model()
    words = rf"loss is {value} at step {first} .*0\.001.*lower the learning rate or the scaling"
    with pytest.raises(FloatingPointError, match=words):
        fit(model, batches(30), 30, lr=1e-3, loss_function=broken)
    assert all(t.isfinite().all() for t in model.state_dict().values())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("targets", "factors", "expect"),
    [("all-linear", 6, pytest.warns), (["0", "1"], 4, pytest.raises)],
)
def test_factors_that_no_gradient_reaches_are_named(targets, factors, expect):
    body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = nn.Sequential(OrderedDict(body=body, head=nn.Linear(4, 1)))
    add_lora_to_model(model, target_modules=targets)
    freeze_non_lora_params(model)

    def checkpointed(model, x):  # in its reentrant form, of layers whose input needs no gradient
        return model.head(checkpoint(model.body, x, use_reentrant=True)).sum()

    words = rf"4 of {factors} trainable parameters got no gradient .*\(body\.0\.lora_A, body\.0"
    with expect(UserWarning if expect is pytest.warns else ValueError, match=words):
        fit(model, [torch.ones(2, 4)], 1, 1e-3, loss_function=checkpointed)


@pytest.mark.parametrize("finished", [3, 0])
def test_an_interrupt_in_a_step_returns_the_losses_so_far(capsys, finished):
    calls = itertools.count()

    def loss_function(model, batch):
        if next(calls) == finished:
            raise KeyboardInterrupt  # what Ctrl-C and the stop button do
        return language_model_loss(model, batch)

    losses = fit(tiny_language_model(), batches(10), 10, lr=1e-3, loss_function=loss_function)
    assert losses == fit(tiny_language_model(), batches(10), 10, lr=1e-3)[:finished]
    assert f"interrupted after {finished} of 10 steps" in capsys.readouterr().out


# --- task B --------------------------------------------------------------------------------------


def test_the_loss_of_a_uniform_model_is_the_log_of_the_vocabulary():
    model = tiny_language_model()
    for parameter in model.classifier.parameters():
        nn.init.zeros_(parameter)
    assert language_model_loss(model, *batches(1)).item() == pytest.approx(math.log(VOCAB))
    examples = pair_examples([Pair("ab", "c"), Pair("a", "def")], Tokenizer("abcdef"))
    assert bits_per_character(model, examples) == pytest.approx(math.log2(VOCAB))


def test_the_loss_counts_labelled_positions_only():
    model = tiny_language_model().eval()
    short, long = Example([1, 5, 2, 7, 3], 3), Example([1, 6, 6, 6, 6, 2, 8, 8, 8, 3], 6)
    logits = model(make_batch([short]).input_ids).log_softmax(-1)
    by_hand = -(logits[0, 2, 7] + logits[0, 3, 3]) / 2
    one, other, both = (
        language_model_loss(model, make_batch(e)) for e in ([short], [long], [short, long])
    )
    torch.testing.assert_close(one, by_hand)
    torch.testing.assert_close(both, (2 * one + 4 * other) / 6)


def test_names_are_written_in_the_order_given_token_by_most_likely_token(base, tokenizer):
    def alone(name):  # one at a time, without a cache
        ids = prompt = tokenizer.prompt(name)
        while ids[-1] != Tokenizer.EOS:
            ids = [*ids, base(torch.tensor([ids]))[0, -1].argmax().item()]
        return tokenizer.decode(ids[len(prompt) :])

    written = transliterate(base, tokenizer, NAMES)
    assert written == [alone(name) for name in NAMES]
    assert written[2] == "Омск"
    assert transliterate(base, tokenizer, []) == []
    assert transliterate(base, tokenizer, ["Novosibirsk"], max_new=3) == [written[3][:3]]


def test_the_error_rate_is_the_edit_distance_over_the_length_and_scores_are_means():
    cases = (("горы", "гори", 1 / 4), ("гор", "гори горл", 1 / 4), ("горло", "гори горло", 0),
             ("", "гори", 1), ("горигори", "го", 3))  # fmt: skip
    for written, accepted, rate in cases:
        assert error_rate(written, accepted.split()) == rate
    spellings = {"Gori": ("гори", "горі"), "Omsk": ("омск",), "Tula": ("тула",)}
    exact, rate = score_names(["горі", "омсс", "т"], spellings)
    assert exact == pytest.approx(1 / 3)
    assert rate == pytest.approx((0 + 1 / 4 + 3 / 4) / 3)


@pytest.mark.parametrize(("script", "tag"), [("cyrillic", None), ("arabic", "arabic")])
def test_evaluate_scores_every_name_once_and_every_pair(base, tokenizer, script, tag):
    scores = evaluate(base, tokenizer, script, "validation", limit=25)
    spellings = load_spellings(script, "validation", limit=25)
    pairs = [Pair(latin, s) for latin, accepted in spellings.items() for s in accepted]
    assert len(pairs) > 25
    written = transliterate(base, tokenizer, list(spellings), script=tag)
    assert (scores.exact_match, scores.error_rate) == score_names(written, spellings)
    examples = pair_examples(pairs, tokenizer, tag)
    assert scores.bits == pytest.approx(bits_per_character(base, examples, batch_size=7))
    assert scores.exact_match > 0.2


# --- classification ------------------------------------------------------------------------------


def test_classes_are_read_up_to_each_rows_mask_and_accuracy_is_the_share_of_right_ones():
    model = tiny_classifier().eval()
    dataset = TokenDataset([[5, 6, 7], [8], [9], [4]], [1, 0, 1, 1])
    together = classification_loss(model, dataset.collate([*dataset]))
    apart = [classification_loss(model, dataset.collate([item])) for item in dataset]
    torch.testing.assert_close(together, sum(apart) / 4)
    nn.init.zeros_(model.classifier.weight)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))  # says 1, whatever it reads
    assert accuracy(model, DataLoader(dataset, 3, collate_fn=dataset.collate)) == 0.75


def test_train_model_learns_the_synthetic_task_in_the_same_loop(loader):
    model, by_hand = tiny_classifier(), tiny_classifier()
    torch.manual_seed(0)
    history = train_model(model, loader, loader, epochs=8, lr=3e-3)
    assert history["train_loss"][-1] < 0.5 * history["train_loss"][0]
    assert history["test_acc"][-1] == accuracy(model, loader) > 0.95
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(by_hand.parameters(), 3e-3, weight_decay=0.01)
    losses = list(training_steps(by_hand, loader, optimizer, classification_loss))
    mean = sum(loss * len(batch["label"]) for loss, batch in zip(losses, loader, strict=True)) / 200
    assert history["train_loss"][0] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("which", ["train_loader", "test_loader"])
def test_an_interrupt_returns_the_epochs_that_were_finished(loader, capsys, which):
    interrupted = MagicMock()
    interrupted.__iter__.side_effect = [iter(loader), KeyboardInterrupt]  # in the second epoch
    loaders = {"train_loader": loader, "test_loader": loader, which: interrupted}
    history = train_model(tiny_classifier(), **loaders, epochs=3)
    assert [len(values) for values in history.values()] == [1, 1, 1]
    assert "interrupted after 1 of 3 epochs" in capsys.readouterr().out
