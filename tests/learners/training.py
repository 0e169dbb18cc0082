"""Notebook 04."""

import torch


def factors(model):
    return [p for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))]


def by_hand(model, compute_loss, lr):
    model.zero_grad()
    compute_loss().backward()
    with torch.no_grad():
        for parameter in factors(model):
            parameter -= lr * parameter.grad


def freeze_and_optimize(model, compute_loss, lr):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr)
    optimizer.zero_grad()
    compute_loss().backward()
    optimizer.step()


def without_backward(model, compute_loss, lr):
    gradients = torch.autograd.grad(compute_loss(), factors(model))
    for parameter, gradient in zip(factors(model), gradients, strict=True):
        parameter.data.sub_(lr * gradient)


def stepping(choose, by=lambda parameter, lr: -lr * parameter.grad, clear=True):
    """An answer that adds `by` to the parameters that `choose(name)` picks."""

    def answer(model, compute_loss, lr):
        if clear:
            model.zero_grad()
        compute_loss().backward()
        for name, parameter in model.named_parameters():
            if choose(name):
                parameter.data += by(parameter, lr)

    return answer


def adapter(name):
    return "lora_" in name


def every_gradient(model, compute_loss, lr):
    torch.optim.SGD(model.parameters(), lr).zero_grad()
    compute_loss().backward()
    torch.optim.SGD(model.parameters(), lr).step()


def adam(model, compute_loss, lr):
    optimizer = torch.optim.AdamW(factors(model), lr)
    optimizer.zero_grad()
    compute_loss().backward()
    optimizer.step()


def rebinding(model, compute_loss, lr):
    model.zero_grad()
    compute_loss().backward()
    for parameter in factors(model):
        parameter = parameter - lr * parameter.grad


def recorded_by_autograd(model, compute_loss, lr):
    compute_loss().backward()
    for parameter in factors(model):
        parameter -= lr * parameter.grad


RIGHT = {"step": [by_hand, freeze_and_optimize, without_backward]}

WRONG = {
    "step": {
        "1.weight changed, and it is not part of the adapter": every_gradient,
        "3.bias changed": stepping(lambda name: adapter(name) or name == "3.bias"),
        "`p = p - …` only makes a new tensor": rebinding,
        "0.lora_A did not change; both factors": stepping(lambda name: "lora_B" in name),
        "0.lora_B did not change; both factors": stepping(lambda name: "lora_A" in name),
        "layer 2 did not change": stepping(lambda name: adapter(name) and name[0] == "0"),
        "you add the gradient": stepping(adapter, by=lambda p, lr: lr * p.grad),
        "the step is lr times as large": stepping(adapter, by=lambda p, lr: -p.grad),
        "(zero_grad)": stepping(adapter, clear=False),
        "as with Adam": adam,
        "not by −lr times the gradient of this step": stepping(
            adapter, by=lambda p, lr: -lr * p.grad / p.grad.norm()
        ),
        "in-place operation. at: parameter -= lr * parameter.grad": recorded_by_autograd,
    }
}
