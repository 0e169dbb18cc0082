"""What is given, which error it gets, what the error says; and the model is as before.

"As before" is checked by `refuses`: every module's type and mode, every requires_grad, every bit of
the state dict.
"""

import json
import math
import re
import shutil

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_models import with_lora
from torch import nn

from lora_lib import (
    LoRALinear,
    adapter_directory,
    adapter_disabled,
    add_lora_to_model,
    count_parameters,
    freeze_non_lora_params,
    load_adapter,
    lora_layers,
    merge_lora_weights,
    save_adapter,
    unload_lora,
    unmerge_lora_weights,
)
from lora_lib.adapters import CONFIG_FILE, WEIGHTS_FILE


def plain(width=24):
    """Two blocks, three classes; the same weights every time. One layer is frozen beforehand, and
    one is in another mode than the rest."""
    model = tiny_models.small(width)
    model.blocks[0].feed_forward.linear1.requires_grad_(False)
    model.blocks[1].attention.W_q.train()
    return model


def adapted():
    model, _ = add_lora_to_model(plain(), 4, 12.0, modules_to_save=["classifier"])
    nn.init.ones_(model.classifier.bias)
    return model


def merged():
    return merge_lora_weights(tiny_models.fill(adapted()))


def infinite():
    """Adapted everywhere; only the last layer's factors are beyond float32."""
    model, layers = add_lora_to_model(plain(), 4, 12.0, "all-linear")
    nn.init.constant_(layers[-1].lora_B, 1e38)
    nn.init.constant_(layers[-1].lora_A, 1e38)
    return model


def heads():
    """ "head" ends the name "subhead" too, whose weight is tied."""
    model = nn.ModuleDict({x: nn.Linear(3, 3) for x in ("body", "head", "subhead", "other")})
    model["subhead"].weight = model["other"].weight
    return model


class Expanded(nn.Linear):
    """Keeps a buffer whose entries share memory."""

    def __init__(self):
        super().__init__(3, 3)
        self.register_buffer("ones", torch.ones(1).expand(5))


class Extra(nn.Linear):
    """Keeps more than tensors."""

    def get_extra_state(self):
        return {"steps": 3}


def changed(change):
    def make():
        model = adapted()
        change(model)
        return model

    return make


def replaced_forward(model):
    linear = model.blocks[0].attention.W_q
    linear.forward = lambda x: 2 * type(linear).forward(linear, x)
    return model


def tied_llama():
    return tiny_models.llama(tie_word_embeddings=True)


def inject(**settings):
    return lambda model: add_lora_to_model(model, **settings)


def save(model):
    return save_adapter(model, "never written")


def while_off(function):
    def act(model):
        with adapter_disabled(model):
            function(model)

    return act


KEY = "base_model.model.blocks.0.attention.W_q.lora_A.weight"
HEAD = "base_model.model.classifier.bias"
NO_MEMORY = r"'blocks.0.attention.W_q' has no memory \(meta dev"
LINEAR = "W_q (2 times), W_k (2 times), W_v (2 times), W_o (2 times), linear1 (2 times)"

# fmt: off
NUMBERS = [  # a setting, what it is not, and what it must be
    ("rank", (0, 8.0, "8", True, None), "a positive integer, such as 8"),
    ("alpha", (0, math.nan, math.inf, "16", None), "a positive number, such as 16"),
    ("dropout", (-0.1, 1.0, math.nan, "0.1"), "at least 0 and less than"),
    ("use_rslora", ("no", 1), "True or False"),
]
INJECTING = [
    *((plain, inject(**{name: value}), ValueError, f"{name} is {value!r}; it must be {rule}")
      for name, values, rule in NUMBERS for value in values),
    (plain, inject(rank=0, alpha=0), ValueError, "rank is 0; it must .* alpha is 0; it must"),
    # targets
    (plain, inject(target_modules="W_q"), ValueError,
     r"target_modules is 'W_q'; give a list of names, such as \['W_q'\] or the word .all-linear"),
    (plain, inject(target_modules=None), ValueError, "target_modules is None; give a list"),
    (plain, inject(target_modules=[nn.Linear]), ValueError, "torch.*Linear'>,?.*; give a list"),
    (plain, inject(target_modules=[]), ValueError, rf"match nothing.* {re.escape(LINEAR)}"),
    (plain, inject(target_modules=["W_q", "W_x"]), ValueError,
     rf"target_modules \['W_x'\] match no module; linear layers are {re.escape(LINEAR)}"),
    (plain, inject(target_modules=["q"]), ValueError, r"\['q'\] match no module"),
    (plain, inject(target_modules=re.compile("W_q")), ValueError, "match nothing outside"),
    (plain, inject(target_modules=["W_q", "final_norm"]), TypeError,
     "target 'final_norm' is a LayerNorm; LoRA here adapts nn.Linear only"),
    (lambda: nn.Sequential(*2 * [nn.Linear(3, 3)]), inject(target_modules=["0"]), ValueError,
     "in several places"),
    (lambda: replaced_forward(plain()), inject(), TypeError, "W_q' was replaced on this one mod"),
    # modules to save
    (plain, inject(modules_to_save="classifier"), ValueError,
     r"modules_to_save is 'classifier'; give a list of names, such as \['classifier'\]"),
    (plain, inject(modules_to_save=["head"]), ValueError,
     r"modules_to_save \['head'\] match no module; at the top are: .*final_norm, classifier"),
    (tiny_models.distilbert,
     inject(target_modules=["pre_classifier"], modules_to_save=["classifier"]), ValueError,
     r"match nothing outside modules_to_save \('classifier',\)"),
    (tied_llama,
     inject(target_modules=["q_proj"], modules_to_save=["lm_head"]), ValueError,
     "'lm_head' in modules_to_save is tied to another module.* untie it first"),
    (plain, inject(target_modules=["W_q"],
                   modules_to_save=["blocks.0.feed_forward", "blocks.0.feed_forward.linear2"]),
     ValueError, "'blocks.0.feed_forward.linear2' in modules_to_save lies inside .*saved whole"),
    (heads, inject(target_modules=["body"], modules_to_save=["head"]), ValueError,
     "'subhead' in modules_to_save is tied to another module"),  # PEFT saves it for "head" as well
    *((lambda head=head: nn.Sequential(nn.Linear(3, 3), head),
       inject(target_modules=["0"], modules_to_save=["1"]), ValueError,
       f"'1' in modules_to_save .*{words}")
      for head, words in ((Expanded(), "share memory"), (Extra(3, 3), "is no tensor"))),
    # the model
    (plain, inject(rank=10**13), RuntimeError, "memory"),
    (lambda: nn.DataParallel(plain()), inject(), ValueError,
     "model is wrapped in DataParallel; add LoRA to the plain model first, then wrap it"),
    (lambda: nn.Sequential(torch.compile(plain())), inject(), ValueError, "0 is wrapped in Optim"),
    (adapted, inject(), ValueError, r"has LoRA layers already; .*unload_lora\(model\)"),
    (lambda: nn.Linear(2, 2), inject(target_modules="all-linear"), ValueError,
     "no nn.Linear below this model; if it is one itself, pass what holds it"),
    (lambda: nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2)), inject(target_modules="all-linear"),
     TypeError, "'1' has no shape yet; run the"),
    (lambda: plain().to("meta"), inject(), ValueError, NO_MEMORY),
    *((plain, lambda model, act=act: act((model, [])), TypeError,
       "model is a tuple.*model, layers = add_lora_to_model")
      for act in (add_lora_to_model, freeze_non_lora_params, merge_lora_weights, unload_lora,
                  count_parameters)),
    # one layer
    (lambda: nn.Linear(2, 2), lambda layer: LoRALinear(layer, rank=0), ValueError, "rank is 0"),
    (lambda: nn.Conv1d(2, 2, 1), LoRALinear, TypeError,
     "original_linear is a Conv1d.*nn.Linear only"),
    (lambda: LoRALinear(nn.Linear(2, 2)), LoRALinear, TypeError, "original_linear is a LoRALinear"),
]

USING = [
    *((plain, function, ValueError, r"no LoRA layers; call add_lora_to_model\(model\) first")
      for function in (freeze_non_lora_params, merge_lora_weights, unmerge_lora_weights,
                       unload_lora, save)),
    *((adapted, while_off(function), RuntimeError, "is switched off: do this outside")
      for function in (freeze_non_lora_params, merge_lora_weights, unload_lora, save,
                       lambda model: load_adapter(model, adapter_directory("greek")))),
    *((make, function, ValueError, "add_lora_to_model did not put into it: pass the model that")
      for make in (lambda: adapted().blocks, lambda: nn.Sequential(LoRALinear(nn.Linear(3, 3))),
                   changed(lambda model: model.add_module("more", LoRALinear(nn.Linear(3, 3)))))
      for function in (freeze_non_lora_params, merge_lora_weights, unload_lora, save)),
    *((changed(change), function, ValueError, "'classifier' in modules_to_save was replaced, wr")
      for change in (lambda model: setattr(model, "classifier", nn.Linear(24, 5)),
                     lambda model: nn.utils.parametrizations.weight_norm(model.classifier))
      for function in (freeze_non_lora_params, save)),
    (changed(lambda model: setattr(next(lora_layers(model)), "alpha", 0.0)), save, ValueError,
     "alpha is 0.0; it must be a positive number"),
    *((changed(lambda model, get=get: nn.init.constant_(get(model), math.inf)), save, ValueError,
       "is not finite .*nothing was written")
      for get in (lambda model: next(lora_layers(model)).lora_B,
                  lambda model: model.classifier.bias)),
    (lambda: merged().train(), lambda model: model(torch.zeros(1, 8).long()), RuntimeError,
     r"merged, so its factors would get no gradient: call unmerge_lora_weights\(model\)"),
    (infinite, merge_lora_weights, FloatingPointError, r"not finite, so nothing was merged.*e\+38"),
    (infinite, unload_lora, FloatingPointError, "not finite, so nothing was merged"),
    *((lambda: with_lora(tied_llama(), ["lm_head"]), function, ValueError,
       "tied to another module.*keep the adapter unmerged, or untie")
      for function in (merge_lora_weights, unload_lora)),
    *((lambda: with_lora(tiny_models.llama(), ["lm_head"]),
       lambda model, name=name: setattr(model.lm_head, name, nn.Parameter(torch.ones(3))),
       TypeError, rf"assign to layer\.original\.{name}, or tie weights before you add LoRA")
      for name in ("weight", "bias")),
]


def config(**changes):
    def change(directory):
        stored = json.loads((directory / CONFIG_FILE).read_text()) | changes
        stored = {key: value for key, value in stored.items() if value != "left out"}
        (directory / CONFIG_FILE).write_text(json.dumps(stored))
        tensors(lambda t: None)(directory)  # without the configuration in the metadata
    return change


def tensors(edit):
    def change(directory):
        loaded = load_file(directory / WEIGHTS_FILE)
        edit(loaded)
        save_file(loaded, directory / WEIGHTS_FILE)
    return change


def content(name, value):
    return lambda directory: (directory / name).write_bytes(value)


def cut(name, size):
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:size])


def pickled(directory):
    (directory / WEIGHTS_FILE).rename(directory / "adapter_model.bin")


def all_wrong(directory):
    config(use_dora=True, layers_pattern="h")(directory)
    tensors(lambda t: t.update({KEY: torch.ones(5, 24), "extra": torch.ones(1)}))(directory)
    tensors(lambda t: t.pop(HEAD))(directory)


KEYS = ("r", "lora_alpha", "lora_dropout", "use_rslora")  # of NUMBERS, in the file
LOADING = [
    # files
    (plain, shutil.rmtree, FileNotFoundError, f"there is no {CONFIG_FILE} in "),
    (adapted, lambda d: (d / WEIGHTS_FILE).unlink(), FileNotFoundError, f"no {WEIGHTS_FILE}"),
    (plain, pickled, ValueError, "damaged|holds more than tensors, and was not run"),
    (adapted, cut(WEIGHTS_FILE, 50), ValueError, "damaged.*save it anew"),
    (adapted, cut(CONFIG_FILE, 50), ValueError, "damaged.*save it anew"),
    (plain, content(CONFIG_FILE, b"[1, 2]"), ValueError, "is not a JSON object"),
    (plain, content(CONFIG_FILE, b"{}"), ValueError, "mixes two saves: r is None"),
    # configuration
    (plain, config(r="left out"), ValueError, "rank is None; it must be a positive integer"),
    *((plain, config(**{key: value}), ValueError, f"{name} is {value!r}; it must be {rule}")
      for key, (name, (value, *_), rule) in zip(KEYS, NUMBERS, strict=True)),
    (plain, config(target_modules=None), ValueError, "target_modules is None; give a list"),
    (plain, config(target_modules=["W_x"]), ValueError, r"\['W_x'\] match nothing"),
    (plain, config(target_modules="W_q"), ValueError, "'W_q'.* match nothing"),  # PEFT: a pattern
    (plain, config(target_modules="W_(q"), ValueError, "unterminated subpattern"),
    (plain, config(target_modules=["final_norm"]), ValueError, "'final_norm' is a LayerNorm"),
    (plain, config(modules_to_save=5), ValueError, "modules_to_save is 5; give a list"),
    (plain, config(modules_to_save=["head"]), ValueError, f"unexpected {HEAD}"),
    (plain, config(peft_type="left out"), ValueError, "peft_type is None, which this library"),
    (plain, config(peft_type="IA3"), ValueError, "peft_type is 'IA3', which this library lacks"),
    (adapted, config(exclude_modules=["W_v"]), ValueError, "unexpected .*W_v"),
    (plain, config(exclude_modules=".*"), ValueError, "match nothing"),
    (plain, config(rank_pattern={"W_q": 0}), ValueError, "rank is 0; it must be a positive"),
    (plain, config(rank_pattern={"W_q": 2}), ValueError, r"\(4, 24\), the model needs \(2, 24\)"),
    (plain, config(use_something_new=True), ValueError, "use_something_new is True"),
    (plain, config(layers_to_transform=0), ValueError, "layers_to_transform is 0, which this"),
    (plain, config(r=10**13), ValueError, r"\(4, 24\), the model needs \(10000000000000, 24\)"),
    (lambda: add_lora_to_model(plain(), 2, modules_to_save=["classifier"])[0], lambda d: None,
     ValueError, r"of other ranks.* call unload_lora\(model, merge=False\) first"),
    (lambda: add_lora_to_model(plain(), 4)[0], lambda d: None, ValueError,
     r"modules_to_save are \('classifier',\), but \(\) on the model.* call unload_lora"),
    # tensors
    (plain, tensors(lambda t: t.pop(KEY)), ValueError, f"missing {KEY}"),
    (lambda: plain(32), lambda d: None, ValueError,
     rf"{KEY} has shape \(4, 24\), the model needs \(4, 32\)"),
    (plain, tensors(lambda t: t.update({KEY: torch.ones(4, 24, dtype=torch.int8)})), ValueError,
     f"{KEY} is torch.int8, the model needs torch.float32"),
    (adapted, tensors(lambda t: t[KEY].fill_(math.nan)), ValueError, f"{KEY} is not finite"),
    (lambda: add_lora_to_model(plain(), 4, 12.0, ["W_q"], modules_to_save=["classifier"])[0],
     lambda d: None, ValueError, "its LoRA layers are others"),
    (merged, lambda d: None, ValueError, r"is merged; call unmerge_lora_weights\(model\) first"),
    (lambda: plain().to("meta"), lambda d: None, ValueError, NO_MEMORY),
    (plain, all_wrong, ValueError,
     rf"use_dora is.*layers_pattern is.*{KEY} has.*missing {HEAD}.*unexpected extra"),
]
# fmt: on


def table(rows):
    ids = [f"{number}: {words[:50]}" for number, (*_, words) in enumerate(rows)]
    return pytest.mark.parametrize(("make", "act", "error", "words"), rows, ids=ids)


@table(INJECTING + USING)
def test_what_cannot_be_done_is_refused(refuses, tmp_path, monkeypatch, make, act, error, words):
    monkeypatch.chdir(tmp_path)
    model = make()
    with refuses(model, error, words):
        act(model)
    assert list(tmp_path.iterdir()) == []  # nothing was saved


@table(LOADING)
def test_what_cannot_be_loaded_is_refused(refuses, tmp_path, make, act, error, words):
    directory = save_adapter(adapted(), tmp_path / "adapter")
    act(directory)
    words = f"{re.escape(str(directory))}.*{words}" if error is ValueError else words
    model = make()
    with refuses(model, error, words):
        load_adapter(model, directory)
