"""The default model's tokenizer: byte-level BPE trained on generated questions, so any text is accepted.

Letters merge within a word and its leading space; digits stay single; a possessive 's splits off. A prompt is
``<bos>question<answer>`` and the model continues with ``answer<eos>``.
"""

import json

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from localdepth.errors import TrainError
from localdepth_train.tasks.families import FAMILIES
from localdepth_train.tasks.off_topic import off_topic
from localdepth_train.tasks.questions import TRAINED_STEPS, Question, Split, questions

__all__ = ["ANSWER", "BOS", "CHAT_TEMPLATE", "EOS", "prompt", "tokenizer_files", "train_tokenizer", "value_ids"]

BOS, EOS, ANSWER = "<bos>", "<eos>", "<answer>"
# One question at a time: the last message, whoever came before.
CHAT_TEMPLATE = "{{ bos_token }}{{ messages[-1]['content'] | trim }}" + ANSWER
_WORDS = r"'s| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
_PER_CELL = 300


def train_tokenizer(n_vocab: int, seed: int) -> Tokenizer:
    """Train on questions of every family and on off-topic text.

    Raises:
        TrainError: when ``n_vocab`` leaves a value, such as a day, in more than one piece.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[BOS, EOS, ANSWER],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    shown = [
        question
        for family in FAMILIES
        for steps in range(1, TRAINED_STEPS + 1)
        for question in questions(family, steps, _PER_CELL, seed, Split.TRAIN)
    ]
    tokenizer.train_from_iterator((f"{q.text}\n{q.answer}" for q in shown + off_topic(len(shown) // 8, seed)), trainer)
    if tokenizer.get_vocab_size() != n_vocab:
        raise TrainError(
            f"n_vocab={n_vocab} cannot be filled; {tokenizer.get_vocab_size()} is the most this text gives"
        )
    value_ids(tokenizer)
    return tokenizer


def value_ids(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Tokens of every value a label can name, the first with its leading space.

    Raises:
        TrainError: when a word is more than one token.
    """
    values = {family.value(state) for family in FAMILIES.values() for state in family.starts}
    ids: dict[str, list[int]] = {value: tokenizer.encode(f" {value}").ids for value in sorted(values)}
    if long := [value for value, pieces in ids.items() if len(pieces) > 1 + sum(map(str.isdigit, value[1:]))]:
        raise TrainError(f"{', '.join(long)} need more than one token a word; raise n_vocab")
    return ids


def prompt(question: Question) -> str:
    """What the model reads before it answers."""
    return f"{BOS}{question.text}{ANSWER}"


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """The files of a checkpoint that carry text: file name -> contents."""
    settings = {"bos_token": BOS, "eos_token": EOS, "chat_template": CHAT_TEMPLATE}
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }
