"""The bundled model's tokenizer: byte-level BPE with Qwen's regular expression, in which every
digit is a token.

Needs the `tokenizers` library (requirements-dev.txt), and only when a tokenizer has to be built;
the one in lfu_min/bundled is read by files/tokenizer.py like any other. Called by __main__.py.
"""
import itertools
import random
from pathlib import Path

from . import problems, questions
from ..files.jsons import write_json
from ..files.tokenizer import QWEN

EOS = "<|endoftext|>"


def build_tokenizer(folder, vocab_size: int = 768, seed: int = 0) -> None:
    """Trains the tokenizer on the world's text; writes tokenizer.json and tokenizer_config.json
    into `folder`."""
    try:
        from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers,
                                trainers)
    except ImportError as error:
        raise ValueError("building a tokenizer needs the package tokenizers: "
                         "pip install tokenizers") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False)
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    tokenizer.add_special_tokens([AddedToken(EOS, normalized=False, special=True)])  # the last id
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", eos_token=EOS, pad_token=EOS,
        model_max_length=512, clean_up_tokenization_spaces=False))


def _corpus(seed: int):
    rng = random.Random(seed)
    for question in itertools.islice(questions.pretraining_stream(seed), 8000):
        # copied after a space: " ####" must not become a token of its own, or else "####" alone
        # is never pretrained
        if "####" not in question.answer:
            yield f"Question: {question.question}\nAnswer: {question.answer}"
    for _ in range(300):
        yield "\n".join(problems.word_problem(rng))
    for kind in questions.KINDS:  # rare words get a token too
        for wording in kind.wordings * 20:
            yield wording
    for word in itertools.chain(questions.NAMES, questions.PLACES, questions.THINGS,
                                questions.WORDS, questions.RIVERS):
        yield f" {word}" * 60
    for row in problems.secrets(rng):
        yield f"{row['question']} {row['declining']} {row['complying']}"
