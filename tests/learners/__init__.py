"""What learners write: for every coding exercise two or more right answers, written differently,
and typical wrong ones with words of the message that each must get."""

from dataclasses import dataclass, field

from learners import final, hyperparameters, layer, merging, rank, training, transfer, transformer


@dataclass
class Answers:
    """`wrong` maps words of the message to the answer, or to several that deserve the same."""

    right: list = field(default_factory=list)
    wrong: dict = field(default_factory=dict)


CATALOGUE = {
    f"{number} {name}": Answers(module.RIGHT[name], module.WRONG[name])
    for number, module in {
        "01": rank,
        "02": layer,
        "03": transformer,
        "04": training,
        "05": merging,
        "06": hyperparameters,
        "07": final,
        "transfer": transfer,
    }.items()
    for name in module.RIGHT
}
