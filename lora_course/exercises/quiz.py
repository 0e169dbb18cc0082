"""Ten ideas that are easily got wrong, each asked twice: before the course and after it.

The two sittings are parallel: question n of both is about the same idea, in other clothes. So the
difference of the scores says something about the course, and not about the questions.
"""

from collections.abc import Sequence

from lora_course.claims import say
from lora_course.exercises import progress
from lora_course.exercises.checker import Choice
from lora_course.tables import show_table

IDEAS = (  # and the notebook that is about it
    ("noise is the yardstick of rank", "01"),
    ("where memory goes", "01"),
    ("what the factors hold", "02"),
    ("why exactly one factor starts at zero", "02"),
    ("α / r changes with r", "02, 06"),
    ("a new head is trained and saved", "03"),
    ("one seed ranks nothing", "04, 06"),
    ("what LoRA costs in use", "05"),
    ("a low rank can suffice without being found", "01, 04"),
    ("LoRA adapts what a base knows", "04, 07"),
)


class Quiz:
    """Call it with ten letters, one a question, "-" where you cannot tell. It never raises.

    With `explain`, every wrong letter is told the misconception behind it; without, only the score
    is shown, and where in the course each idea is met.
    """

    def __init__(self, name: str, questions: Sequence[Choice], explain: bool):
        self.name, self.questions, self.explain = name, tuple(questions), explain

    def __call__(self, answers: str, explain: bool | None = None) -> None:
        letters = self.letters(answers)
        self._ask(letters or "-" * 10, self.explain if explain is None else explain)
        if letters is None:
            say(f'Write ten letters from a to d, "-" where you cannot tell; this is {answers!r}.')
        elif letters == "-" * 10:
            print('Not attempted yet. Write ten letters, "-" where you cannot tell.')
        else:
            progress.record_quiz(self.name, letters)
            say(f"{self.score(letters)} of 10 are right; guessing gives two or three.")
            self._show_ideas(letters)

    def letters(self, answers: object) -> str | None:
        """The answers without spaces, in small letters; None if they are not ten such letters."""
        letters = "".join(answers.lower().split()) if isinstance(answers, str) else ""
        return letters if len(letters) == 10 and set(letters) <= set("abcd-") else None

    def score(self, answers: object) -> int:
        """How many of the ten are right; the marks of a submission, when a class is graded."""
        pairs = zip(self.questions, self.letters(answers) or "-" * 10, strict=True)
        return sum(letter == question.right for question, letter in pairs)

    def _ask(self, letters: str, explain: bool) -> None:
        for question, letter in zip(self.questions, letters, strict=True):
            question.ask()
            if letter != "-":
                mistake = question.judge(letter)
                verdict = f" Not right: {mistake}" if mistake else f" Right. {question.why}"
                say(f"Your answer: {letter}.{verdict if explain else ''}")
            print()

    def _show_ideas(self, letters: str) -> None:
        """Both sittings side by side, if progress is recorded and both were taken."""
        sittings = {quiz: progress.quiz_answers(quiz.name) for quiz in (before, after)}
        sittings[self] = letters
        taken = {quiz: given for quiz, given in sittings.items() if given and quiz.letters(given)}
        rows = [
            [idea, notebook, *(_mark(quiz.questions[n], given[n]) for quiz, given in taken.items())]
            for n, (idea, notebook) in enumerate(IDEAS)
        ]
        show_table(["idea", "notebook", *(quiz.name for quiz in taken)], rows)


def _mark(question: Choice, letter: str) -> str:
    return "right" if letter == question.right else "—" if letter == "-" else "not right"


def _quiz(name: str, questions: Sequence[dict], explain: bool) -> Quiz:
    choices = []
    for number, fields in enumerate(questions, start=1):
        question = f"{number}. {fields.pop('question')}"
        choices.append(Choice(f"quiz {name} {number}", question, **fields))
    return Quiz(name, choices, explain)


before = _quiz(
    "before",
    [
        dict(
            question="A weight change of shape 256 × 256 holds 90 % of its energy (of the sum of "
            "its squared singular values) in 130 of 256 directions. What does that say?",
            options={
                "a": "It is low-rank: nearly half of its directions are hardly used.",
                "b": "Nothing so far: random numbers give about 130 as well.",
                "c": "Its rank is 130, since so many singular values count.",
                "d": "No change of rank 8 could do as well in its place.",
            },
            right="b",
            why="A measure of structure says something only beside what no structure gives.",
            misconceptions={
                "a": "random numbers, which have no structure, give half of the directions too.",
                "c": "the rank counts every direction that is not exactly zero, here 256.",
                "d": "whether another change, of low rank, does as well is about training.",
            },
        ),
        dict(
            question="Training a 7-billion-parameter model with LoRA at rank 16 takes a little "
            "more memory than you have. You go to rank 8. What does that save?",
            options={
                "a": "Half of the memory, since half as many parameters are trained.",
                "b": "All that the optimizer took; at rank 8 it keeps next to nothing.",
                "c": "Nothing at all: the rank has no part in how much memory is taken.",
                "d": "Very little: the frozen weights and activations take most of it.",
            },
            right="d",
            why="The factors and what the optimizer keeps for them are a small part already.",
            misconceptions={
                "a": "the trained part halves, and it was a few per cent of the whole.",
                "b": "it keeps two numbers for each trained one, half as many as before.",
                "c": "factors, gradients and optimizer state do shrink; they are only small.",
            },
        ),
        dict(
            question="A weight of shape 1,000 × 1,000 gets LoRA factors of rank 10. How many "
            "numbers are trained?",
            options={
                "a": "10, the rank",
                "b": "10,000, as 10 × 1,000",
                "c": "20,000, as 10 × (1,000 + 1,000)",
                "d": "1,000,000, the whole change",
            },
            right="c",
            why="A has 10 rows of 1,000, B 1,000 rows of 10.",
            misconceptions={
                "a": "the rank is a side of the factors, not the number of their entries.",
                "b": "that is one factor; there are two.",
                "d": "the change has that many entries, all made of the factors' few.",
            },
        ),
        dict(
            question="LoRA starts with A random and B zero. Why not both at zero?",
            options={
                "a": "Each factor's gradient contains the other, so neither would move.",
                "b": "The model would not start where the pretrained model stands.",
                "c": "It would work as well, with a first step that does not count.",
                "d": "The optimizer would divide by a gradient of zero and break off.",
            },
            right="a",
            why="At A = B = 0 both gradients are zero, at every step.",
            misconceptions={
                "b": "with either factor at zero B A is zero, and so it is with both.",
                "c": "nothing changes in the first step, so nothing changes in the second.",
                "d": "Adam adds a small number below; the step is zero, without an error.",
            },
        ),
        dict(
            question="LoRA's change is (α / r) · B A. Rank 4 and rank 16 are compared at one α "
            "and one learning rate, and rank 16 does worse. What follows?",
            options={
                "a": "The task needs no more than rank 4, so a higher one is wasted.",
                "b": "Rank 16 has too many parameters for this task and overfits.",
                "c": "Little: B A was multiplied by a quarter of what it was at rank 4.",
                "d": "α is without influence, since it was the same in both runs.",
            },
            right="c",
            why="Rank and step size changed together.",
            misconceptions={
                "a": "the factor in front of B A fell too; perhaps rank 16 trained too slowly.",
                "b": "overfitting is seen in training against validation, not in this.",
                "d": "what acts is α / r, and that changed.",
            },
        ),
        dict(
            question="You give a pretrained model a new, random output layer for your classes, put "
            "LoRA on its attention layers and freeze the rest. And the new layer?",
            options={
                "a": "It has to be trained as a whole, and saved with the factors.",
                "b": "It may stay frozen: the factors learn to fit themselves to it.",
                "c": "It gets factors too; a random layer is adapted like any other.",
                "d": "It is trained anyway: freezing only concerns pretrained layers.",
            },
            right="a",
            why="It knows nothing yet, and no file but yours holds it.",
            misconceptions={
                "b": "they may, in part, and the layer they fit is in no file: lost once you stop.",
                "c": "a change of low rank beside random weights leaves them mostly random.",
                "d": "freezing looks at no history: what is not switched on does not train.",
            },
        ),
        dict(
            question="One run at rank 8 gets 55.1 % right, one at rank 16 gets 56.0 %. What do you "
            "report?",
            options={
                "a": "Rank 16 is better by nine tenths of a point.",
                "b": "Rank does not matter; both get about 55 %.",
                "c": "Rank 16 is better, and 32 would be better still.",
                "d": "These two runs cannot tell the ranks apart.",
            },
            right="d",
            why="Another seed can move either run by as much.",
            misconceptions={
                "a": "one seed was tried; another can turn the order round.",
                "b": "not to know a difference is not to know that there is none.",
                "c": "the first difference is not shown, and the second was not measured.",
            },
        ),
        dict(
            question="Does LoRA make a model slower when it is used, after training?",
            options={
                "a": "No: so few parameters cannot take any time worth measuring.",
                "b": "Only while the factors stand beside the weights, not added to them.",
                "c": "Yes, always: a model with B A is a larger model than one without it.",
                "d": "No: the factors are needed while training and are then thrown away.",
            },
            right="b",
            why="Added to W they cost nothing; beside it they are two more products in each layer.",
            misconceptions={
                "a": "two small products are still two more calls in every layer.",
                "c": "W + (α / r) B A has the shape of W, so the sum costs what W did.",
                "d": "without them the model is the pretrained one again.",
            },
        ),
        dict(
            question="Full fine-tuning changes a weight in about 45 of 128 directions. Can LoRA of "
            "rank 8 do nearly as well?",
            options={
                "a": "Perhaps: another change, of rank 8, may serve as well. Try it.",
                "b": "No: eight directions hold only a part of what has to change.",
                "c": "Yes: its eight largest directions are all that counts in the end.",
                "d": "Only if the other 37 directions turn out to be pure noise.",
            },
            right="a",
            why="What full fine-tuning finds is one change that works, not the only one.",
            misconceptions={
                "b": "LoRA does not copy this change; it looks for one of its own.",
                "c": "cutting a change to its largest directions can cost nearly everything.",
                "d": "LoRA does not need to come near this change at all.",
            },
        ),
        dict(
            question="For which task is LoRA a poor choice?",
            options={
                "a": "One of many tasks that share a large pretrained model.",
                "b": "One for which there are only a few hundred examples.",
                "c": "One to which the pretrained model brings nothing.",
                "d": "One whose training does not fit into your memory.",
            },
            right="c",
            why="LoRA adapts what is there; where there is nothing, it has nothing to adapt.",
            misconceptions={
                "a": "that is where small adapters are worth most.",
                "b": "then a pretrained model helps most, and few trained numbers may do.",
                "d": "optimizer state is what LoRA saves.",
            },
        ),
    ],
    explain=False,
)

after = _quiz(
    "after",
    [
        dict(
            question="Two weight changes of shape 128 × 128: the first has a k90 of 66, the second "
            "of 30; Gaussian noise has 65. What follows?",
            options={
                "a": "Both are low-rank, since neither needs all 128 directions.",
                "b": "The first has rank 66, and the second has rank 30.",
                "c": "The first takes LoRA of rank 66, for the second 30 is enough.",
                "d": "The second has structure; the first looks like noise.",
            },
            right="d",
            why="Each number is held against what no structure gives.",
            misconceptions={
                "a": "noise needs 65 of them; by that measure it would be low-rank too.",
                "b": "k90 counts the directions that hold 90 % of the energy; the rank counts all.",
                "c": "what rank LoRA takes is a question about training, not about this change.",
            },
        ),
        dict(
            question="A 7B model with LoRA at r = 16 just does not fit. What helps most?",
            options={
                "a": "Go to r = 8: it halves what is trained, and the memory with it.",
                "b": "Keep the base in fewer bits, or cut down the activations.",
                "c": "Merge the adapter while training, so that only W is kept.",
                "d": "Freeze A as well, so that the base needs no gradients.",
            },
            right="b",
            why="Base weights and activations dominate; the factors with their optimizer state are "
            "little.",
            misconceptions={
                "a": "it halves the adapter's part, which is a small part of the whole.",
                "c": "a merged layer has nothing to train, and the base weighs the same.",
                "d": "the base has no gradients already, and it stays in memory.",
            },
        ),
        dict(
            question="A feed-forward weight of shape 512 × 128 gets LoRA factors of rank 4. How "
            "many numbers are trained?",
            options={
                "a": "2,560, as 4 × (512 + 128)",
                "b": "4,096, as 4 × (512 + 512)",
                "c": "2,048, as 4 × 512",
                "d": "262,144, as 4 × 512 × 128",
            },
            right="a",
            why="A is 4 × 128 and B is 512 × 4.",
            misconceptions={
                "b": "that takes the weight for square; A's long side is d_in, 128.",
                "c": "that is B alone; A has 4 × 128 more.",
                "d": "the sides are added, not multiplied; this is four times the whole weight.",
            },
        ),
        dict(
            question="You merged an adapter, set A and B to zero, and train on. What happens?",
            options={
                "a": "A new adapter is learned on top of the merged weights.",
                "b": "Only B is learned at first, then A follows, as always.",
                "c": "Nothing is learned: both gradients are zero, at every step.",
                "d": "The merged change is undone, and training starts again.",
            },
            right="c",
            why="B = 0 with A drawn anew starts afresh; both at zero is stuck.",
            misconceptions={
                "a": "the gradient of A contains B and that of B contains A; both are zero.",
                "b": "after an ordinary start B moves first, for A is random; here A is zero too.",
                "d": "the merged weight is a plain weight now and keeps its change.",
            },
        ),
        dict(
            question="You go from r = 8, α = 16 to r = 32, leave α at 16, and the result changes. "
            "What follows?",
            options={
                "a": "Rank and step size changed together; tune the rate at each rank.",
                "b": "The task needs another rank than 8: a higher one if it got better.",
                "c": "α has no influence on this, since it was left where it was.",
                "d": "The larger adapter overfits, as four times as much is trained.",
            },
            right="a",
            why="The scaling α / r fell to a quarter, so more than the capacity differs.",
            misconceptions={
                "b": "two things changed at once: the rank, and the scaling from 2 to 0.5.",
                "c": "what acts is α / r, and that changed.",
                "d": "nothing here separates overfitting from a smaller step.",
            },
        ),
        dict(
            question="A classifier trained with LoRA scores well. Loaded into a freshly built "
            "classifier on the same base, its adapter is no better than chance. Most likely",
            options={
                "a": "the learning rate was too high, so that the factors fit nothing else.",
                "b": "the new head is not in the file; this one is random again.",
                "c": "the factors were loaded without being merged into the weights.",
                "d": "the base has to be fine-tuned once more before it can take it.",
            },
            right="b",
            why="A new head has to be named in modules_to_save, to be trained and stored whole.",
            misconceptions={
                "a": "then it would not have scored well before.",
                "c": "merged or not, the model computes the same.",
                "d": "the base is frozen and the same; nothing in it needs training.",
            },
        ),
        dict(
            question="Three seeds each: rank 4 gets .52 to .55, rank 8 gets .53 to .56. A fourth "
            "seed of rank 4 gets .57. What follows?",
            options={
                "a": "Nothing new: the spreads of the two ranks overlap.",
                "b": "Rank 4 is better after all: it holds the best result.",
                "c": "That seed is the one to use for rank 4 from now on.",
                "d": "Rank 8 needs further seeds until it is ahead again.",
            },
            right="a",
            why="A difference counts once it is larger than what the seed alone does.",
            misconceptions={
                "b": "the best of four runs is luck as much as rank; compare the spreads.",
                "c": "a seed that was lucky on these towns need not be on others.",
                "d": "to stop once the wished-for order appears is to choose the result.",
            },
        ),
        dict(
            question="When does LoRA add nothing to the time a forward pass takes?",
            options={
                "a": "Always: the factors are small beside the weights.",
                "b": "When one batch mixes the adapters of several users.",
                "c": "Once merged: its layers are plain linear layers again.",
                "d": "When the rank is 8 or less, so that A and B are thin.",
            },
            right="c",
            why="Merged, the model has the base's layers and does the base's arithmetic.",
            misconceptions={
                "a": "unmerged, every targeted layer runs two more small products.",
                "b": "a mixed batch needs the adapters unmerged, so it pays for them.",
                "d": "a low rank makes the extra work small, not nought.",
            },
        ),
        dict(
            question="Full fine-tuning's change, cut to rank 8, writes few names right. LoRA "
            "trained at rank 8 writes nearly as many as full fine-tuning. How can both be?",
            options={
                "a": "They cannot: the SVD gives the best change of rank 8 there is.",
                "b": "Training looks among the changes of rank 8; cutting does not.",
                "c": "LoRA's change grows beyond rank 8 when it is trained for long.",
                "d": "LoRA may change the embeddings and norms, which cutting leaves.",
            },
            right="b",
            why="Cutting keeps what is largest in one change; training finds a change that works.",
            misconceptions={
                "a": "best at imitating that matrix, entry by entry; not best at the task.",
                "c": "B A cannot have a rank above r, however long it is trained.",
                "d": "everything but the factors is frozen.",
            },
        ),
        dict(
            question="Your base knows nothing of the task, you have plenty of data and compute, "
            "and training from scratch reaches the same score. What do you use?",
            options={
                "a": "LoRA of a higher rank: rank makes up for what a base lacks.",
                "b": "LoRA all the same, since it beats training from scratch.",
                "c": "Several adapters, added up, as each brings something else.",
                "d": "The simplest that reaches it; LoRA has no base to build on.",
            },
            right="d",
            why="LoRA adapts what a base knows. Measure first what that is worth for the task.",
            misconceptions={
                "a": "rank lets a change be richer; it brings no knowledge.",
                "b": "here it does not, as you just read; it depends on the task.",
                "c": "a sum of adapters still changes the same base.",
            },
        ),
    ],
    explain=True,
)
