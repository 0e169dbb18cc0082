"""What an adapter learns first: `python -m lora_course.experiments.grammar`.

A Georgian name ends in -i where the Latin one ends in a consonant, and mostly not where it ends in
a vowel. The table `grammar` has a row for LoRA of every rank in RANKS and every seed: the share of
Georgian letters in what it writes, of -i after consonants and after other vowels, and of names
right. Settings and learning rates are those of the question "rank". A minute on a GPU.
"""

from dataclasses import replace

from lora_course.experiments.questions import SEEDS, lora
from lora_course.experiments.recording import in_parallel, record_tables, workers_argument
from lora_course.experiments.runs import Run, chosen_rate, prepare_model, train
from lora_course.georgian import CONSONANTS, LATIN, OTHER_VOWELS, share_with_i
from lora_course.results import load_runs
from lora_lib.model import default_device
from lora_lib.names import load_spellings
from lora_lib.scores import transliterate

RANKS = (1, 2, 4, 8, 16)


def measure(run: Run) -> dict:
    """The row of one run."""
    model, tokenizer = prepare_model(run)
    train(run, model.to(default_device()), tokenizer)
    spellings = load_spellings("georgian", "test")
    towns = list(spellings)
    written = dict(zip(towns, transliterate(model, tokenizer, towns), strict=True))
    letters = [letter for name in written.values() for letter in name if letter.isalpha()]
    return {
        "rank": run.rank,
        "lr": run.lr,
        "seed": run.seed,
        "georgian_letters": sum(letter in LATIN for letter in letters) / len(letters),
        "i_after_consonant": share_with_i(written, CONSONANTS),
        "i_after_vowel": share_with_i(written, OTHER_VOWELS),
        "names_right": sum(name in spellings[town] for town, name in written.items()) / len(towns),
    }


def main() -> None:
    workers, recorded = workers_argument(__doc__), load_runs()
    settings = [replace(run, lr=chosen_rate(recorded, run)) for run in map(lora, RANKS)]
    runs = [replace(run, seed=seed) for run in settings for seed in SEEDS]
    rows = in_parallel(measure, runs, workers)
    record_tables("grammar", default_device(), {"grammar": rows})


if __name__ == "__main__":
    main()
