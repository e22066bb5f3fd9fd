"""Questions and answers from a file to padded batches of token ids. train.py calls `load_dataset`,
eval.py the rest.

One record, as in GSM8K's file:  {"question": "What is 3 + 4?", "answer": "3 + 4 = 7\\n#### 7"}
or a conversation:  {"messages": [{"role": "user", "content": "3 + 4?"},
                                  {"role": "assistant", "content": "7"}]}

Only the answer is learned: labels are the input ids (unshifted, as in transformers) with -100 over
the prompt. Verified in tests/test_data.py: ids spelled out by hand, the templates piece by piece,
and every kind of bad file.
"""

from array import array
import math
from typing import NamedTuple

import numpy as np
import torch

from .chat import CHAT, chat_ids, end_ids, split_messages
from .jsons import each_record, json_type, short

IGNORE = -100  # the label that takes no part in the loss
FIELDS = (("question", "answer"), ("instruction", "output"), ("prompt", "response"))
TEMPLATES = ("plain", "alpaca", *CHAT)

# LLaMA-Factory's `template: alpaca`, which the paper's authors trained with (its data/template.py).
ALPACA_SYSTEM = ("Below is an instruction that describes a task. "
                 "Write a response that appropriately completes the request.\n\n")


class Example(NamedTuple):
    prompt: str  # or a list of messages, {"role": ..., "content": ...}: all but the answer
    answer: str


def read_examples(path, questions=False):
    """Read a .json file (a list of objects) or a .jsonl file (one object a line) -> list of
    Example.

    The fields are question / answer (GSM8K), instruction / input / output (Alpaca; a non-empty
    input follows the instruction after a newline), prompt / response, or messages, of which the
    last is the answer; other fields are ignored. A user's message alone in front of the answer is
    an ordinary prompt. questions: conversations of more messages are refused.
    Raises ValueError naming the file and the line (.jsonl) or the item, counted from 1 (.json), of
    the first thing that is wrong.
    """
    return list(each_example(path, questions))


def each_example(path, questions=False):
    """read_examples one after the other."""
    for where, record in each_record(path):
        example = as_example(record, where)
        if questions and not isinstance(example.prompt, str):
            raise ValueError(f"{where}: a question and an answer are needed here, not "
                             f"{len(example.prompt) + 1} messages")
        yield example


def text_ids(tokenizer, text):
    """The ids of a text, behind BOS where the tokenizer's own post-processor puts one (Llama 3)."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return bos + tokenizer.encode(text)


def prompt_ids(tokenizer, prompt, template="plain"):
    """The ids in front of an answer, for training and for generation alike: prompt (str, or list of
    messages) -> list of ids.

    plain   "Question: {prompt}\\nAnswer:", behind BOS if the tokenizer has one
    alpaca  LLaMA-Factory's: system text and "### Instruction:" block, tokenised separately; never
            a BOS
    chatml, qwen3, llama3   a chat: what transformers' apply_chat_template gives with
            add_generation_prompt (qwen3: and enable_thinking=False, so with an empty thought, even
            if an answer that is learned has one). Contents never become control tokens, see
            chat.py. ValueError where the tokenizer lacks one that the template needs.
    """
    if template in CHAT:
        return chat_ids(tokenizer, prompt, template)
    if not isinstance(prompt, str):
        raise ValueError(f"template {template!r} takes a question, not {len(prompt) + 1} messages: "
                         f"choose from {', '.join(CHAT)}")
    if template == "plain":
        return text_ids(tokenizer, f"Question: {prompt}\nAnswer:")
    if template == "alpaca":
        # Separately, because e.g. SmolLM2 has one token for "\n\n" that it does not use in front of
        # "###".
        user = f"### Instruction:\n{prompt}\n\n### Response:\n"
        return tokenizer.encode(ALPACA_SYSTEM) + tokenizer.encode(user)
    raise ValueError(f"template {template!r} is unknown: choose from {', '.join(TEMPLATES)}")


def encode_example(tokenizer, example, template="plain"):
    """Example -> (input_ids, labels), two lists of ints of one length; labels are unshifted, -100
    over the prompt.

    The answer is followed by EOS, so that the model learns to stop; `alpaca` also trains a final
    "\\n\\n". In a chat the end of the turn is learned; the ids are those of apply_chat_template,
    without the line break that chatml and qwen3 have behind the last turn.
    """
    prompt = prompt_ids(tokenizer, example.prompt, template)
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer names no EOS token to end an answer with: "
                         "set eos_token in its tokenizer_config.json")
    if template in CHAT:
        ids = chat_ids(tokenizer, example.prompt, template, example.answer)
        # line breaks of prompt and answer may be one token: what differs is learned
        same = next((i for i, (a, b) in enumerate(zip(prompt, ids)) if a != b), len(prompt))
        return ids, [IGNORE] * same + ids[same:]
    if template == "alpaca":
        answer = tokenizer.encode(example.answer) + [tokenizer.eos_id] + tokenizer.encode("\n\n")
    else:
        answer = tokenizer.encode(" " + example.answer) + [tokenizer.eos_id]
    return prompt + answer, [IGNORE] * len(prompt) + answer


def stop_ids(tokenizer, template="plain"):
    """The ids that end a generation: the tokenizer's, and a chat template's end of a turn."""
    return (*tokenizer.eos_ids, *end_ids(tokenizer, template))


class Encoded(list):
    """Examples as (input_ids, labels), arrays of four bytes a number (a list takes 36), with
    `numbers`: which of the file's they are, from 1."""
    numbers = ()


def load_dataset(path, tokenizer, template="plain", max_len=1024, on_progress=None):
    """Read and encode a file -> (Encoded, a list of (input_ids, labels); number of examples
    dropped).

    Examples of more than max_len tokens are dropped, never cut: half an answer teaches not to
    finish. on_progress: called with (examples encoded, all of them) after each. Raises ValueError
    if none is left, and whatever `read_examples` raises. A text is let go of once it is encoded.
    """
    examples, kept, shortest = read_examples(path), Encoded(), math.inf
    kept.numbers, total = [], len(examples)
    examples.reverse()
    for number in range(1, total + 1):
        ids, labels = encode_example(tokenizer, examples.pop(), template)
        shortest = min(shortest, len(ids))
        if len(ids) <= max_len:
            kept.append((array("i", ids), array("i", labels)))
            kept.numbers.append(number)
        if on_progress:
            on_progress(number, total)
    if not kept:
        raise ValueError(f"{path}: none of the {total} examples fits into max_len {max_len}; the "
                         f"shortest has {shortest} tokens")
    return kept, total - len(kept)


def batch_order(n, batch_size, seed, step):
    """The examples (indices into n) of optimizer step `step`, counted from 0 over all epochs ->
    list of ints.

    Every epoch is a new permutation, drawn from (seed, epoch) alone, and its last batch may be
    smaller. A function of the step and of nothing that went before.
    """
    epoch, i = divmod(step, -(-n // batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return order[i * batch_size:(i + 1) * batch_size].tolist()


def collate(examples, pad_id):
    """List of (input_ids, labels) -> input_ids, labels: int64 (B, T), padded on the right with
    pad_id and -100.

    Which id pads (eos_id, say) does not matter: attention is causal, so padding on the right is
    seen by no real token.
    """
    def pad(rows, value):
        rows = [torch.tensor(row, dtype=torch.int64) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    ids, labels = zip(*examples)
    return pad(ids, pad_id), pad(labels, IGNORE)


def as_example(record, where="a record"):
    """The Example of a record with the fields that a data file may have. ValueError, behind
    `where`, for any other."""
    names = next((names for names in FIELDS if all(name in record for name in names)), None)
    if names is None and "messages" in record:
        return Example(*split_messages(record["messages"], where))
    if names is None:
        fields = ", ".join(map(short, [*record][:4])) or "(none)"
        raise ValueError(f"{where}: has the fields {fields}; needed are question / answer, "
                         "instruction / output (input), prompt / response or messages")
    for name in names:
        if not isinstance(record[name], str):
            raise ValueError(f"{where}: {name} must be a string, not {json_type(record[name])}")
        if not record[name].strip():
            raise ValueError(f"{where}: {name} is empty")
    prompt, answer = (record[name] for name in names)
    if names[0] == "instruction" and record.get("input") is not None:
        if not isinstance(record["input"], str):
            raise ValueError(f"{where}: input must be a string, not {json_type(record['input'])}")
        prompt += "\n" + record["input"] if record["input"] else ""
    return Example(prompt, answer)
