"""DoRA, PiSSA and LoRA+ compute what PEFT's do, and start at the base model."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_course.experiments import variant_costs
from lora_course.results import load_table
from lora_course.variants import DoRALinear, lora_plus, start_at_strongest
from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.lora import LoRALinear

# What transformers says when PEFT loads.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def dora(linear, rank, alpha):
    layer = DoRALinear(LoRALinear(linear, rank, alpha))
    return layer, (layer.lora.lora_A, layer.lora.lora_B, layer.magnitude)


def pissa(linear, rank, alpha):
    layer = LoRALinear(linear, rank, alpha)
    start_at_strongest(layer)
    return layer, (layer.lora_A, layer.lora_B)


VARIANTS = {  # ours, and what PEFT is told
    dora: dict(use_dora=True),
    pissa: dict(init_lora_weights="pissa"),
}


def pefts(linear, rank, alpha, **settings):
    settings |= dict(r=rank, lora_alpha=alpha, target_modules=["0"])
    layer = get_peft_model(nn.Sequential(linear), LoraConfig(**settings)).base_model.model[0]
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    if settings.get("use_dora"):
        factors.append(layer.lora_magnitude_vector["default"].weight)
    return layer, factors


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("d_in, d_out, rank", [(12, 7, 4), (7, 12, 3)])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.__name__)
def test_a_variant_starts_at_the_base_and_computes_what_pefts_does(
    variant, d_in, d_out, rank, bias
):
    torch.manual_seed(0)
    x, alpha = torch.randn(5, d_in), 3.0 * rank
    linear, twin = (nn.Linear(d_in, d_out, bias) for _ in range(2))
    twin.load_state_dict(linear.state_dict())
    W, plain = linear.weight.detach().clone(), linear(x).detach()
    ours, factors = variant(linear, rank, alpha)
    theirs, their_factors = pefts(twin, rank, alpha, **VARIANTS[variant])
    torch.testing.assert_close(ours(x), plain)
    torch.testing.assert_close(ours.weight, W)
    if variant is pissa:
        torch.testing.assert_close(ours.delta_weight(), theirs.get_delta_weight("default"))
        assert torch.linalg.matrix_norm(ours.original.weight, 2) < torch.linalg.matrix_norm(W, 2)
    with torch.no_grad():  # as if trained
        for factor, their_factor in zip(factors, their_factors, strict=True):
            factor += 0.3 * torch.randn(factor.shape)
            their_factor.copy_(factor)
    results = []
    for layer, trained in ((ours, factors), (theirs, their_factors)):
        leaf = x.clone().requires_grad_()
        output = layer(leaf)
        gradients = torch.autograd.grad((output * output.detach().sin()).sum(), (leaf, *trained))
        results.append((output, *gradients))
    assert (results[0][0] - plain).abs().max() > 0.1
    for mine, peft in zip(*results, strict=True):
        torch.testing.assert_close(mine, peft, rtol=0, atol=1e-5 * peft.abs().max().item())


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def test_lora_plus_gives_every_parameter_the_rate_that_peft_gives_it():
    ours = add_lora_to_model(small(), 2, 4.0, "all-linear")[0]
    freeze_non_lora_params(ours)
    theirs = get_peft_model(small(), LoraConfig(r=2, target_modules=["0", "2"]))
    trained = [p for p in ours.parameters() if p.requires_grad]
    optimizers = (
        lora_plus(ours, 16.0)(trained, 1e-3),
        create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0),
    )
    rates = []
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        names = {p: name for name, p in model.named_parameters()}
        rates.append(
            {names[p].removeprefix("base_model.model.").replace(".default.weight", ""): group["lr"]
             for group in optimizer.param_groups for p in group["params"]}
        )  # fmt: skip
    assert rates[0] == rates[1] and len(rates[0]) == 4
    assert set(rates[0].values()) == {1e-3, 16e-3}


def test_pissa_keeps_what_a_trained_layer_computes():
    layer = LoRALinear(nn.Linear(4, 3), 2)
    nn.init.ones_(layer.lora_B)
    x = torch.randn(5, 4)
    before = layer(x)
    start_at_strongest(layer)
    torch.testing.assert_close(layer(x), before)


class Masked(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


def test_what_no_variant_can_stand_on_is_refused():
    linear = nn.Linear(4, 3)
    for make in (DoRALinear, start_at_strongest):
        # A square Conv1D has the right shape, the wrong way round.
        for layer in (linear, LoRALinear(Masked(4, 3), 2), LoRALinear(Conv1D(4, 4), 2)):
            with pytest.raises(TypeError, match=r"on a plain nn\.Linear; got"):
                make(layer)
    with pytest.raises(RuntimeError, match=r"size of tensor"):
        start_at_strongest(LoRALinear(linear, 4))  # of three singular values
    with_lora = add_lora_to_model(small(), 2, 4.0, ["0"])[0]
    for model, ratio in ((nn.Sequential(linear), 16.0), (with_lora, 0.0)):
        with pytest.raises(ValueError, match=rf"a positive ratio; got [01] and {ratio}"):
            lora_plus(model, ratio)


def numbers_trained(case):
    """By method, from the shapes of the decoder: four square layers a block, and three that go to
    its inner width or come from it."""
    d, n, r = case.width, case.inner_width, case.rank
    lora = case.depth * r * (4 * 2 * d + 3 * (d + n))
    dora = lora + case.depth * (4 * d + 2 * n + d)  # one length for every output
    norms_and_embedding = case.depth * 2 * d + 2 * d
    full = case.depth * (4 * d * d + 3 * d * n) + norms_and_embedding
    return {"LoRA": lora, "DoRA": dora, "DoRA, PEFT's": dora, "full fine-tuning": full}


def test_as_many_numbers_are_trained_as_shapes_say_here_and_in_what_was_recorded():
    small = replace(variant_costs.BLOCKS, width=128, batch=1, length=8, dtype="float32")
    found = variant_costs.measure(small, torch.device("cpu"), seconds=0)
    assert {row["method"]: row["trainable"] for row in found} == numbers_trained(small)
    recorded = load_table("variant_costs").set_index("method")
    assert recorded.trainable.to_dict() == numbers_trained(variant_costs.BLOCKS)
