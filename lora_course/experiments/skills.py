"""What the base could do before it was adapted, as examples to measure it by."""

from lora_lib.names import BASE_SCRIPT, SCRIPTS, SECOND_SCRIPT, load_pairs
from lora_lib.tokens import Example, Tokenizer, name_examples, pair_examples

TOWNS = 1000
# The first is asked for by the prompt that must now give another script, the second by a prompt of
# its own, the third has no prompt: it goes on with a name of another script.
SKILLS = ("Cyrillic", "Arabic", "names alone")


def examples_of(tokenizer: Tokenizer, script: str, towns: int = TOWNS) -> dict[str, list[Example]]:
    """Test examples: the pairs of `script`, what is learned, and a list for each of SKILLS."""
    others = [s for s in SCRIPTS if s != script]
    names = [
        name
        for s in others
        for name in sorted({p.target for p in load_pairs(s, "test")})[: towns // len(others)]
    ]
    return {
        "learned": pair_examples(load_pairs(script, "test"), tokenizer),
        "Cyrillic": pair_examples(load_pairs(BASE_SCRIPT, "test")[:towns], tokenizer),
        "Arabic": pair_examples(
            load_pairs(SECOND_SCRIPT, "test")[:towns], tokenizer, SECOND_SCRIPT
        ),
        "names alone": name_examples(names, tokenizer),
    }
