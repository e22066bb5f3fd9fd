"""Benchmarks on real files, as lm-evaluation-harness defines them. One reader a file format, one
function a task kind.

A task is a function (model, tokenizer, docs, options) -> (list of Result, list of per-example
dictionaries); KINDS at the end lists them with their readers. To add one, write both and add a
line. Examples of one line of each file:

    gsm8k       {"question": "...", "answer": "... #### 18"}
    piqa        {"goal": "...", "sol1": "...", "sol2": "..."}              labels file: 0 or 1 a line
    arc         {"question": {"stem": "...", "choices": [{"text": "...", "label": "A"}, ...]}, "answerKey": "A"}
    hellaswag   {"activity_label": "...", "ctx_a": "...", "ctx_b": "...", "endings": ["...", ...], "label": 2}
    lambada     {"text": "... the last word is asked for"}

Called by eval.py --task NAME=FILE[,LABELS]. Verified in tests/test_eval_tasks.py: extraction on
hand-made answers, and every number against a computation with transformers on the same examples.
"""
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..files import data
from .measures import answer_nll, begin, mean_result, ratio_result, reply, Result, score, text_nats


@dataclass
class Options:
    """How a task runs; eval.py fills it from its flags."""
    few_shot: int = 0
    # docs to draw the shots from; None: the task's own file, without the asked one
    shots: list = None
    seed: int = 1234  # of the shots
    template: str = "plain"  # of exact and nll, which use the training prompt
    # of gsm8k; the harness's unless --wording asks otherwise
    wording: str = "Question: {question}\nAnswer:"
    max_new_tokens: int = 256
    batch_size: int = 16
    window: int = 1024  # tokens, of perplexity
    stride: int = None  # tokens; None: half the window
    on_progress: object = None


class Doc(NamedTuple):
    """A prompt and its choices (multiple choice; gold is an index) or its target (then choices is
    empty)."""
    prompt: str
    target: str
    choices: tuple = ()
    gold: int = 0


# ---- reading files

def read_text(path, encoding="utf-8-sig"):  # -sig: a BOM in front is no part of the first line
    try:
        return Path(path).read_bytes().decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.object[error.start]:#04x} at {error.start} is not "
                         "UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def read_records(path, fields):
    """[(where, object)] of a .jsonl file, or of a .json file with a list; each object has all of
    `fields`."""
    text = read_text(path)
    try:
        if Path(path).suffix == ".json":
            records = [(f"{path}, item {i}", record)
                       for i, record in enumerate(json.loads(text), 1)]
        else:
            records = []
            for i, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    records.append((f"{path}, line {i}", json.loads(line)))
    except (ValueError, TypeError) as error:
        where = f"{path}, line {i}" if Path(path).suffix != ".json" else path
        raise ValueError(f"{where}: not valid JSON ({error}); one object a line is needed") from None
    if not records:
        raise ValueError(f"{path} holds no example")
    for where, record in records:
        lacking = [name for name in fields if not isinstance(record, dict) or name not in record]
        if lacking:
            raise ValueError(f"{where}: the field {lacking[0]!r} is missing; needed are "
                             f"{', '.join(fields)}")
    return records


def choose_gold(labels, i, record, names, choices, where):
    """The index of the right choice: line i of the labels file, or a field of the record;
    checked."""
    value = labels[i] if labels is not None else next((record[name] for name in names
                                                       if name in record), None)
    if value is None:
        raise ValueError(f"{where}: no label; write --task NAME=FILE,LABELS with a file of one "
                         "label a line")
    if not re.fullmatch(r"\d+", str(value).strip()) or int(value) >= choices:
        raise ValueError(f"{where}: the label {value!r} should be a number from 0 to {choices - 1}")
    return int(value)


def read_labels(path, count, of):
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    if len(lines) != count:
        raise ValueError(f"{path} has {len(lines)} labels, {of} has {count} examples")
    return lines


def read_piqa(path, labels=None):
    records = read_records(path, ("goal", "sol1", "sol2"))
    labels = labels and read_labels(labels, len(records), path)
    return [choice_doc(f"Question: {r['goal']}\nAnswer:", (r["sol1"], r["sol2"]),
                       choose_gold(labels, i, r, ("label",), 2, where))
            for i, (where, r) in enumerate(records)]


def read_arc(path, labels=None):
    """AI2's form (question.stem, question.choices) and Hugging Face's (question, choices.text,
    choices.label)."""
    docs = []
    for where, r in read_records(path, ("question", "answerKey")):
        question = r["question"]
        try:
            if isinstance(question, dict):
                stem, options = question["stem"], [(c["text"], c["label"])
                                                   for c in question["choices"]]
            else:
                stem, options = question, list(zip(r["choices"]["text"], r["choices"]["label"]))
            names = [label for _, label in options]
            docs.append(choice_doc(f"Question: {stem}\nAnswer:", tuple(text for text, _ in options),
                                   names.index(r["answerKey"])))
        except (KeyError, TypeError):
            raise ValueError(f"{where}: choices with text and label are needed") from None
        except ValueError:
            raise ValueError(f"{where}: answerKey {r['answerKey']!r} is none of the labels {names}") from None
    return docs


def hellaswag_clean(text):
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def read_hellaswag(path, labels=None):
    records = read_records(path, ("activity_label", "ctx_a", "ctx_b", "endings"))
    labels = labels and read_labels(labels, len(records), path)
    docs = []
    for i, (where, r) in enumerate(records):
        prompt = hellaswag_clean(f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}")
        gold = choose_gold(labels, i, r, ("label",), len(r["endings"]), where)
        docs.append(choice_doc(prompt, tuple(map(hellaswag_clean, r["endings"])), gold))
    return docs


def read_lambada(path, labels=None):
    docs = []
    for where, r in read_records(path, ("text",)):
        context, _, word = r["text"].rpartition(" ")
        if not word:
            raise ValueError(f"{where}: the text ends in a blank, so it has no last word")
        docs.append(Doc(context, word))
    return docs


def choice_doc(prompt, choices, gold):
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise ValueError(f"a choice should be a non-empty string, not {choice!r} (question: "
                             f"{prompt!r})")
    return Doc(prompt, choices[gold], choices, gold)


def read_questions(path, labels=None):
    return data.read_examples(path)  # Example(prompt, answer)


def read_gsm8k(path, labels=None):
    examples = data.read_examples(path)
    for i, example in enumerate(examples, 1):
        if strict_answer(example.answer) == INVALID:
            raise ValueError(f"{path}, example {i}: the answer has no line '#### N'")
    return examples


# ---- GSM8K: finding the number in an answer
# --------------------------------------------------------------------------

INVALID = "[invalid]"
UNTIL = ("Question:", "</s>", "<|im_end|>")


def strict_answer(text):
    """The harness's strict-match: the first `#### number`."""
    found = re.findall(r"#### (\-?[0-9\.\,]+)", text)
    return found[0].strip() if found else INVALID


def flexible_answer(text):
    """The harness's flexible-extract: the last thing that looks like a number, be it "$18.00" or
    "..."."""
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return next(group for group in found[-1] if group).strip() if found else INVALID


def normalise(text):
    """What the harness removes from both sides before comparing: commas, dollars, all up to "####
    ", a final dot."""
    for pattern in (r",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


# ---- the task kinds

def with_shots(docs, i, options, ask, target, name=lambda doc: doc):
    """The prompt of docs[i] behind options.few_shot solved examples, drawn by seed and i: "a
    b\\n\\nc d\\n\\ne"."""
    pool = options.shots if options.shots is not None else docs[:i] + docs[i + 1:]
    if options.few_shot > len(pool):
        raise ValueError(f"few-shot {options.few_shot} is more than the {len(pool)} examples "
                         "there are to draw from")
    shots = random.Random(f"{options.seed} {i}").sample(pool, options.few_shot)
    return "\n\n".join([f"{ask(shot)} {target(shot)}" for shot in shots] + [ask(docs[i])])


def gsm8k(model, tokenizer, docs, options, task="gsm8k", count=None):
    """Generated answers; exact match of the number, by strict and by flexible extraction."""
    ask = lambda example: options.wording.replace("{question}", example.prompt)
    prompts = [with_shots(docs, i, options, ask, lambda example: example.answer)
               for i in range(count or len(docs))]
    room = model.config.max_position_embeddings - options.max_new_tokens
    if room < 1:
        raise ValueError(f"max-new-tokens {options.max_new_tokens} leaves no room for a prompt in "
                         "the model's "
                         f"{model.config.max_position_embeddings} positions")
    ids = [(begin(tokenizer) + tokenizer.encode(prompt))[-room:] for prompt in prompts]
    replies = reply(model, tokenizer, ids, options.max_new_tokens, UNTIL, options.batch_size,
                    options.on_progress)
    rows = []
    for prompt, text, doc in zip(prompts, replies, docs):
        gold = normalise(doc.answer)
        strict, flexible = strict_answer(text), flexible_answer(text)
        rows.append(dict(prompt=prompt, reply=text, target=gold, strict=strict, flexible=flexible,
                         strict_match=normalise(strict) == gold,
                         flexible_match=normalise(flexible) == gold))
    return [mean_result(task, "strict-match", [row["strict_match"] for row in rows]),
            mean_result(task, "flexible-extract", [row["flexible_match"] for row in rows])], rows


def exact(model, tokenizer, docs, options, task="exact", count=None):
    """Generated answers under the training prompt; match of the whole string, blanks at both ends
    aside."""
    docs = docs[:count]
    ids = [data.prompt_ids(tokenizer, doc.prompt, options.template) for doc in docs]
    replies = reply(model, tokenizer, ids, options.max_new_tokens, ("Question:",),
                    options.batch_size,
                    options.on_progress)
    rows = [dict(prompt=doc.prompt, reply=text, target=doc.answer,
                 match=text.strip() == doc.answer.strip())
            for doc, text in zip(docs, replies)]
    return [mean_result(task, "exact_match", [row["match"] for row in rows])], rows


def choice(model, tokenizer, docs, options, task, count=None):
    """Multiple choice by log-likelihood: acc takes the likeliest choice, acc_norm the likeliest a
    character."""
    contexts = [with_shots(docs, i, options, lambda doc: doc.prompt, lambda doc: doc.target)
                for i in range(count or len(docs))]
    docs = docs[:count]
    pairs = [(context, " " + text) for context, doc in zip(contexts, docs) for text in doc.choices]
    scores = iter(score(model, tokenizer, pairs, options.batch_size, options.on_progress))
    rows = []
    for context, doc in zip(contexts, docs):
        lls = [next(scores)[0] for _ in doc.choices]
        per_character = [ll / len(text) for ll, text in zip(lls, doc.choices)]
        rows.append(dict(prompt=context, choices=doc.choices, loglikelihoods=lls, gold=doc.gold,
                         acc=lls.index(max(lls)) == doc.gold,
                         acc_norm=per_character.index(max(per_character)) == doc.gold))
    return [mean_result(task, metric, [row[metric] for row in rows])
            for metric in ("acc", "acc_norm")], rows


def last_word(model, tokenizer, docs, options, task="lambada", count=None):
    """LAMBADA: is the last word what greedy decoding gives, and exp of its mean -log p."""
    contexts = [with_shots(docs, i, options, lambda doc: doc.prompt, lambda doc: doc.target)
                for i in range(count or len(docs))]
    docs = docs[:count]
    scores = score(model, tokenizer, [(context, " " + doc.target)
                                      for context, doc in zip(contexts, docs)],
                   options.batch_size, options.on_progress)
    rows = [dict(prompt=context, target=doc.target, loglikelihood=ll, acc=greedy)
            for context, doc, (ll, greedy) in zip(contexts, docs, scores)]
    nats = mean_result(task, "perplexity", [-row["loglikelihood"] for row in rows])
    perplexity = math.exp(nats.value)
    return [mean_result(task, "acc", [row["acc"] for row in rows]),
            nats._replace(value=perplexity, stderr=perplexity * nats.stderr)], rows


def nll(model, tokenizer, docs, options, task="nll", count=None):
    """-log p of the answers under the training prompt, nats a token: what train.py logs as `sft`,
    on any file."""
    docs = docs[:count]
    sums = answer_nll(model, tokenizer, docs, options.template, options.batch_size,
                      options.on_progress)
    rows = [dict(prompt=doc.prompt, target=doc.answer, nats=nats, tokens=tokens)
            for doc, (nats, tokens) in zip(docs, sums)]
    return [ratio_result(task, "nll", [nats for nats, _ in sums],
                         [tokens for _, tokens in sums])], rows


def perplexity(model, tokenizer, docs, options, task="perplexity", count=None):
    """Perplexity a token and bits a UTF-8 byte of a text file (with --limit N: of its first N
    lines)."""
    text = "".join(docs[:count])
    nats = text_nats(model, tokenizer, text, options.window, options.stride,
                     min(options.batch_size, 4),
                     options.on_progress)
    mean, size = mean_result(task, "perplexity", nats), len(text.encode())
    value = math.exp(mean.value)
    scale = len(nats) / math.log(2) / size  # nats a token -> bits a byte
    rows = [dict(tokens=len(nats), bytes=size, nats=nats.sum().item(), window=options.window,
                 stride=options.stride,
                 nats_per_token=[round(x, 6) for x in nats.tolist()])]
    return [mean._replace(value=value, stderr=value * mean.stderr),
            Result(task, "bits_per_byte", mean.value * scale, mean.stderr * scale, mean.n)], rows


def read_lines(path, labels=None):
    text = read_text(path, "utf-8")  # every byte of the file counts in bits per byte
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    return re.findall(r"[^\n]*\n|[^\n]+", text)


GENERATES = 200  # examples of a task that generates, without --limit
KINDS = {  # name: (reader of FILE and LABELS, measure, default limit)
    "gsm8k": (read_gsm8k, gsm8k, GENERATES),
    "exact": (read_questions, exact, GENERATES),
    "piqa": (read_piqa, choice, None),
    "arc": (read_arc, choice, None),
    "hellaswag": (read_hellaswag, choice, None),
    "lambada": (read_lambada, last_word, None),
    "nll": (read_questions, nll, None),
    "perplexity": (read_lines, perplexity, None),
}
