"""The exercises of the course; each notebook has a module of its own here."""

from collections.abc import Iterator
from importlib import import_module

MODULES = (*(f"ex0{n}" for n in range(1, 8)), "transfer")


def everything() -> Iterator:
    """Every exercise and question of the course, in the order of the notebooks."""
    from lora_course.exercises.checker import Check

    for name in MODULES:
        for item in vars(import_module(f"lora_course.exercises.{name}")).values():
            if isinstance(item, Check):
                yield item
