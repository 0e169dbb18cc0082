"""A chat model that writes the one-line docstring of a function, and scores of what it writes."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_course.docstrings import Function
from lora_lib import scores
from lora_lib.tokens import IGNORE, Batch, Example

INSTRUCTION = "Write the one-line docstring of a Python function."
END = "<|im_end|>"  # a turn of the chat is over
MAX_NEW = 80  # tokens; the longest docstring has 72
Message = dict[str, str]


def turns(function: Function, answered: bool = False) -> list[Message]:
    """What the user asks of a function and, if `answered`, what a good assistant says."""
    asked = {"role": "user", "content": function.name + function.signature}
    return [asked, {"role": "assistant", "content": function.summary}][: 1 + answered]


def conversation(function: Function, shots: Sequence[Function] = ()) -> list[Message]:
    """The messages up to the answer: the instruction, answered examples (`shots`), the question."""
    system = {"role": "system", "content": INSTRUCTION}
    return [system, *(m for shot in shots for m in turns(shot, True)), *turns(function)]


def prompt_of(tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation, written as the model's chat template says, up to where the
    assistant speaks."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def chat_example(tokenizer, messages: Sequence[Message], answer: str) -> Example:
    """A conversation with its answer and the end token; only these two are to be predicted."""
    prompt = prompt_of(tokenizer, messages)
    said = tokenizer(answer + END, add_special_tokens=False).input_ids
    return Example(prompt + said, len(prompt))


def docstring_examples(
    tokenizer, functions: Sequence[Function], shots: Sequence[Function] = ()
) -> list[Example]:
    return [chat_example(tokenizer, conversation(f, shots), f.summary) for f in functions]


def text_examples(tokenizer, texts: Sequence[str], max_tokens: int = 256) -> list[Example]:
    """Texts alone, cut after so many tokens: everything but the first token is predicted."""
    return [Example(tokenizer(text).input_ids[:max_tokens], 1) for text in texts]


# --- losses --------------------------------------------------------------------------------------


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats over what a Batch asks to be predicted.

    Scores of the 49,152 tokens are computed there only, which saves most of the output layer's
    work and memory. Rows are padded on the right, where a causal model does not look.
    """
    batch = batch.to(model.device)
    hidden = model.model(batch.input_ids).last_hidden_state
    asked = batch.labels != IGNORE
    return F.cross_entropy(model.lm_head(hidden[asked]), batch.labels[asked])


def bits_per_character(
    model: nn.Module, tokenizer, examples: Sequence[Example], batch_size: int = 64
) -> float:
    """Bits over all that is to be predicted, divided by its characters; the end token counts as
    one. Unlike bits per token it does not depend on how a tokenizer cuts. Raises ValueError if
    there are no examples."""
    bits_per_token = scores.bits_per_character(model, examples, batch_size, answer_loss)
    end = tokenizer.convert_tokens_to_ids(END)
    said = [ids[first:] for ids, first in examples]
    texts = [tokenizer.decode([i for i in ids if i != end]) for ids in said]
    characters = sum(map(len, texts)) + sum(ids.count(end) for ids in said)
    return bits_per_token * sum(map(len, said)) / characters


# --- writing -------------------------------------------------------------------------------------


class Answer(NamedTuple):
    text: str
    ended: bool  # by itself, with the end token

    @property
    def is_one_line(self) -> bool:
        return self.ended and "\n" not in self.text.strip()


@torch.inference_mode()
def write(
    model: nn.Module,
    tokenizer,
    conversations: Sequence[Sequence[Message]],
    max_new: int = MAX_NEW,
    batch_size: int = 200,
) -> list[Answer]:
    """What the model says next in every conversation: always the likeliest token (greedy), until
    the end token or `max_new` tokens."""
    prompts = [prompt_of(tokenizer, messages) for messages in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    end = tokenizer.convert_tokens_to_ids(END)
    answers = {}
    with scores.mode(model, training=False):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            made = _greedy(model, tokenizer, [prompts[i] for i in rows], end, max_new)
            for row, ids in zip(rows, made, strict=True):
                said = list(takewhile(lambda token: token != end, ids))
                answers[row] = Answer(tokenizer.decode(said), end in ids)
    return [answers[row] for row in range(len(prompts))]


def _greedy(
    model: nn.Module, tokenizer, prompts: list[list[int]], end: int, max_new: int
) -> list[list[int]]:
    # Padded on the left, so that all end where the model goes on.
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    made = model.generate(
        **padded.to(model.device),
        max_new_tokens=max_new,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )
    return made[:, padded.input_ids.shape[1] :].tolist()


class Writing(NamedTuple):
    """Of answers beside the docstrings: the share that is one line and ends by itself, and the mean
    share of words in common (F1: twice the common words over all words of both)."""

    one_line: float
    words: float


def score_writing(answers: Sequence[Answer], functions: Sequence[Function]) -> Writing:
    """Raises ValueError unless there is one answer for each function."""
    pairs = list(zip(answers, functions, strict=True))
    one_line = sum(answer.is_one_line for answer in answers)
    words = sum(words_in_common(answer.text, function.summary) for answer, function in pairs)
    return Writing(one_line / len(pairs), words / len(pairs))


def words_in_common(a: str, b: str) -> float:
    """From 0 to 1; case and punctuation do not count."""
    words = [Counter(re.findall(r"\w+", text.lower())) for text in (a, b)]
    total = sum(map(Counter.total, words))
    return 2 * (words[0] & words[1]).total() / total if total else 0.0
