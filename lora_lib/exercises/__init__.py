"""The exercises of the course; each notebook has a module of its own here."""

from collections.abc import Iterator
from importlib import import_module

MODULES = (
    "rank",
    "layer",
    "transformer",
    "training",
    "merging",
    "hyperparameters",
    "final",
    "transfer",
)


def everything() -> Iterator:
    """Every exercise and question of the course, in the order of the notebooks."""
    from lora_lib.exercises.engine import Exercise

    for name in MODULES:
        for item in vars(import_module(f"lora_lib.exercises.{name}")).values():
            for exercise in item.values() if isinstance(item, dict) else (item,):
                if isinstance(exercise, Exercise):
                    yield exercise
