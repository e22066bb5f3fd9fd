"""Benchmarks on real files, as lm-evaluation-harness defines them. One reader a file format, one
function a task kind.

A task is a function (model, tokenizer, docs, options, task, count) -> (list of Result, list of
dictionaries, one an example); KINDS at the end lists them with their readers. To add one, write
both and add a line. Examples of one line of each file:

    gsm8k       {"question": "...", "answer": "... #### 18"}
    piqa        {"goal": "...", "sol1": "...", "sol2": "..."}          labels file: 0 or 1 a line
    arc         {"question": {"stem": "...", "choices": [{"text": "...", "label": "A"}, ...]},
                 "answerKey": "A"}
    hellaswag   {"activity_label": "...", "ctx_a": "...", "ctx_b": "...", "endings": ["...", ...],
                 "label": 2}
    lambada     {"text": "... the last word is asked for"}

Called by eval.py --task NAME=FILE[,LABELS]. Verified in tests/test_eval_tasks.py: extraction on
hand-made answers, and every number against a computation with transformers on the same examples.
"""
import math
import random
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..files import data, jsons
from .measures import Result, answer_nll, mean_result, ratio_result, reply, score, text_nats


@dataclass
class Options:
    """How a task runs; eval.py fills it from its flags."""
    few_shot: int = 0
    shots: list = None  # Task's
    seed: int = 1234  # of the shots
    template: str = "plain"  # of exact and nll, which use the training prompt
    wording: str = "Question: {question}\nAnswer:"  # of gsm8k: the harness's
    max_new_tokens: int = 256
    batch_size: int = 16
    window: int = 1024  # tokens, of perplexity
    stride: int = None  # tokens; None: half the window
    on_progress: object = None


class Task(NamedTuple):
    """One file to ask from."""
    label: str
    kind: str  # of KINDS
    docs: list
    count: int = None  # the first that are asked; None: all
    shots: list = None  # docs to draw the shots from; None: its own, without the asked one


class Doc(NamedTuple):
    """A prompt and its choices (multiple choice; gold is an index) or its target (then choices is
    empty)."""
    prompt: str
    target: str
    choices: tuple = ()
    gold: int = 0


# ---- reading files

def read_records(path, *fields):
    """[(where, object)] of a .jsonl file, or a .json file with a list; each object has all of
    `fields`, as text."""
    records = jsons.read_records(path)
    for where, record in records:
        for name in fields:
            if name not in record:
                raise ValueError(f"{where}: the field {name!r} is missing")
            text_only(record[name], name, where)
    return records


def text_only(value, name, where):
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a string, not {jsons.json_type(value)}")
    return value


def gold_labels(records, labels, of, choices):
    """The index of every record's right choice: from the file `labels`, one a line, or where it is
    None from the field "label". choices: how many choices each record has."""
    values = [record.get("label") for _, record in records]
    if labels:
        values = jsons.read_text(labels).split()
        if len(values) != len(records):
            raise ValueError(f"{labels} has {len(values)} labels, {of} has {len(records)} examples")
    for (where, _), value, count in zip(records, values, choices):
        if value is None:
            raise ValueError(f"{where}: no label; name a file with one a line: NAME=FILE,LABELS")
        if not re.fullmatch(r"[0-9]{1,9}", str(value).strip()) or int(value) >= count:
            raise ValueError(f"{where}: the label {jsons.short(value)} should be within "
                             f"0-{count - 1}")
    return [int(value) for value in values]


def choice_doc(where, prompt, choices, gold):
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise ValueError(f"{where}: the choice {jsons.short(choice)} should be a non-empty "
                             "string")
    return Doc(prompt, choices[gold], tuple(choices), gold)


def read_piqa(path, labels=None):
    records = read_records(path, "goal", "sol1", "sol2")
    golds = gold_labels(records, labels, path, [2] * len(records))
    return [choice_doc(where, f"Question: {r['goal']}\nAnswer:", (r["sol1"], r["sol2"]), gold)
            for (where, r), gold in zip(records, golds)]


def read_arc(path):
    """AI2's form (question.stem, question.choices) and Hugging Face's (question, choices.text,
    choices.label)."""
    docs = []
    for where, r in jsons.read_records(path):
        question, key = r.get("question"), r.get("answerKey")
        try:
            if isinstance(question, dict):
                texts, names = map(list, zip(*((c["text"], c["label"])
                                               for c in question["choices"])))
                question = question["stem"]
            else:
                texts, names = r["choices"]["text"], r["choices"]["label"]
                if not isinstance(texts, list) or [*map(type, names)] != [str] * len(texts):
                    raise TypeError
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{where}: choices with text and label are needed") from None
        text_only(question, "the question", where)
        if key not in names:
            raise ValueError(f"{where}: answerKey {jsons.short(key)} is none of the labels "
                             f"{jsons.short(names)}")
        docs.append(choice_doc(where, f"Question: {question}\nAnswer:", texts, names.index(key)))
    return docs


def hellaswag_clean(text):
    text = text.strip().replace(" [title]", ". ")
    lines = (line.rpartition("]") for line in text.split("\n"))  # a "[" without "]" is not sought
    text = "\n".join(re.sub(r"\[.*?\]", "", a + end) + b for a, end, b in lines)
    return text.replace("  ", " ")


def read_hellaswag(path, labels=None):
    records = read_records(path, "activity_label", "ctx_a", "ctx_b")
    for where, r in records:
        if not isinstance(r.get("endings"), list) or not r["endings"]:
            raise ValueError(f"{where}: endings should be a list of strings")
        r["endings"] = [hellaswag_clean(text_only(end, "an ending", where)) for end in r["endings"]]
    golds = gold_labels(records, labels, path, [len(r["endings"]) for _, r in records])
    docs = []
    for (where, r), gold in zip(records, golds):
        prompt = f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}"
        docs.append(choice_doc(where, hellaswag_clean(prompt), r["endings"], gold))
    return docs


def read_lambada(path):
    docs = []
    for where, r in read_records(path, "text"):
        context, _, word = r["text"].rpartition(" ")
        if not word:
            raise ValueError(f"{where}: the text ends in a blank, so it has no last word")
        docs.append(Doc(context, word))
    return docs


def read_questions(path):
    return data.read_examples(path)  # Example(prompt, answer)


def read_gsm8k(path):
    docs = [Doc(*example) for example in data.read_examples(path, questions=True)]
    for i, doc in enumerate(docs, 1):
        if strict_answer(doc.target) == INVALID:
            raise ValueError(f"{path}, example {i}: the answer has no line '#### N'")
    return docs


def read_lines(path):
    text = jsons.read_text(path, "utf-8")  # every byte of the file counts in bits per byte
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    return re.findall(r"[^\n]*\n|[^\n]+", text)


# ---- GSM8K: finding the number in an answer

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
    text = re.sub(r"[,$]", "", text).rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()


def right_number(reply, target):
    """GSM8K's strict match of a reply with an answer that ends in `#### number`."""
    return normalise(strict_answer(reply)) == normalise(target)


# ---- the task kinds

def with_shots(docs, options, count=None, wording="{question}"):
    """The prompts of the first `count` docs, each behind options.few_shot solved ones, which the
    seed and its place draw: "a b\\n\\nc d\\n\\ne". Whatever asks the same is never drawn."""
    def ask(doc):
        return wording.replace("{question}", doc.prompt)

    prompts, shots = [], docs if options.shots is None else options.shots
    places = {}  # a question -> where it stands among the shots
    for place, doc in enumerate(shots):
        places.setdefault(doc.prompt, []).append(place)
    for i, doc in enumerate(docs[:count]):
        pool = shots
        for place in reversed(places.get(doc.prompt, [])):
            pool = pool[:place] + pool[place + 1:]
        if options.few_shot > len(pool):
            raise ValueError(f"few-shot {options.few_shot}: at most {len(pool)}, as there are")
        drawn = random.Random(f"{options.seed} {i}").sample(pool, options.few_shot)
        prompts.append("\n\n".join([*(f"{ask(shot)} {shot.target}" for shot in drawn), ask(doc)]))
    return prompts


def gsm8k(model, tokenizer, docs, options, task="gsm8k", count=None):
    """Generated answers; exact match of the number, by strict and by flexible extraction."""
    prompts = with_shots(docs, options, count, options.wording)
    positions = model.config.max_position_embeddings
    room = positions - options.max_new_tokens
    if room < 1:
        raise ValueError(f"max-new-tokens {options.max_new_tokens} should be below {positions}: "
                         "prompt and answer share the model's positions")
    ids = [data.text_ids(tokenizer, prompt)[-room:] for prompt in prompts]
    replies = reply(model, tokenizer, ids, options.max_new_tokens, UNTIL, options.batch_size,
                    options.on_progress)
    rows = []
    for prompt, text, doc in zip(prompts, replies, docs):
        gold, strict, flexible = normalise(doc.target), strict_answer(text), flexible_answer(text)
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
                    options.batch_size, options.on_progress, template=options.template)
    rows = [dict(prompt=doc.prompt, reply=text, target=doc.answer,
                 match=text.strip() == doc.answer.strip()) for doc, text in zip(docs, replies)]
    return [mean_result(task, "exact_match", [row["match"] for row in rows])], rows


def choice(model, tokenizer, docs, options, task, count=None):
    """Multiple choice by log-likelihood: acc takes the likeliest choice, acc_norm the likeliest a
    character. A log-likelihood that is not finite is a ValueError."""
    def right(scores, gold):  # no comparison is true of NaN: it would pass for a wrong answer
        return scores.index(max(scores)) == gold if all(map(math.isfinite, scores)) else math.nan

    prompts, docs = with_shots(docs, options, count), docs[:count]
    pairs = [(prompt, " " + text) for prompt, doc in zip(prompts, docs) for text in doc.choices]
    scores = iter(score(model, tokenizer, pairs, options.batch_size, options.on_progress))
    rows = []
    for prompt, doc in zip(prompts, docs):
        lls = [next(scores)[0] for _ in doc.choices]
        per_character = [ll / len(text) for ll, text in zip(lls, doc.choices)]
        rows.append(dict(prompt=prompt, choices=doc.choices, loglikelihoods=lls, gold=doc.gold,
                         acc=right(lls, doc.gold), acc_norm=right(per_character, doc.gold)))
    return [mean_result(task, metric, [row[metric] for row in rows])
            for metric in ("acc", "acc_norm")], rows


def last_word(model, tokenizer, docs, options, task="lambada", count=None):
    """LAMBADA: is the last word what greedy decoding gives, and exp of its mean -log p."""
    prompts, docs = with_shots(docs, options, count), docs[:count]
    pairs = [(prompt, " " + doc.target) for prompt, doc in zip(prompts, docs)]
    scores = score(model, tokenizer, pairs, options.batch_size, options.on_progress)
    rows = [dict(prompt=prompt, target=doc.target, loglikelihood=ll, acc=greedy)
            for prompt, doc, (ll, greedy) in zip(prompts, docs, scores)]
    nats = mean_result(task, "perplexity", [-row["loglikelihood"] for row in rows])
    return [mean_result(task, "acc", [row["acc"] for row in rows]), exp_result(nats)], rows


def nll(model, tokenizer, docs, options, task="nll", count=None):
    """-log p of the answers under the training prompt, nats a token: what train.py logs as `sft`,
    on any file."""
    docs = docs[:count]
    sums = answer_nll(model, tokenizer, docs, options.template, options.batch_size,
                      options.on_progress)
    rows = [dict(prompt=doc.prompt, target=doc.answer, nats=nats, tokens=tokens)
            for doc, (nats, tokens) in zip(docs, sums)]
    return [ratio_result(task, "nll", *zip(*sums))], rows


def perplexity(model, tokenizer, docs, options, task="perplexity", count=None):
    """Perplexity a token and bits a UTF-8 byte of a text file (with --limit N: of its first N
    lines)."""
    text = "".join(docs[:count])
    nats = text_nats(model, tokenizer, text, options.window, options.stride,
                     min(options.batch_size, 4), options.on_progress)
    mean, size = mean_result(task, "perplexity", nats), len(text.encode())
    scale = len(nats) / math.log(2) / size  # nats a token -> bits a byte
    rows = [dict(tokens=len(nats), bytes=size, nats=nats.sum().item(), window=options.window,
                 stride=options.stride, nats_per_token=[round(x, 6) for x in nats.tolist()])]
    return [exp_result(mean),
            Result(task, "bits_per_byte", mean.value * scale, mean.stderr * scale, mean.n)], rows


def exp_result(nats):
    """A mean of nats as a perplexity; its standard error to first order."""
    value = math.exp(nats.value) if nats.value < 700 else math.inf
    return nats._replace(value=value, stderr=value * nats.stderr)


GENERATES = 200  # examples of a task that generates, without --limit
LABELLED = ("piqa", "hellaswag")  # their readers take a file of labels as well
KINDS = {  # name: (reader of a file, measure, default limit)
    "gsm8k": (read_gsm8k, gsm8k, GENERATES),
    "exact": (read_questions, exact, GENERATES),
    "piqa": (read_piqa, choice, None),
    "arc": (read_arc, choice, None),
    "hellaswag": (read_hellaswag, choice, None),
    "lambada": (read_lambada, last_word, None),
    "nll": (read_questions, nll, None),
    "perplexity": (read_lines, perplexity, None),
}


def read(kind, path, labels=None):
    """The docs of a file, for KINDS[kind]. ValueError for labels that the kind does not read."""
    if labels and kind not in LABELLED:
        raise ValueError(f"{kind} has its answers in {path} itself; leave {labels} out")
    reader = KINDS[kind][0]
    return reader(path, labels) if labels else reader(path)


def measure(task, model, tokenizer, options):
    """(results, {label: rows}) of a Task."""
    results, rows = KINDS[task.kind][1](model, tokenizer, task.docs,
                                        replace(options, shots=task.shots), task.label, task.count)
    return results, {task.label: rows}
