"""The bundled world's scores: the paper's four categories (Tables 1 and 2) and the in-domain word
problems (Figure 1).

Called by eval.py when no --task is given. Every question is unseen in pretraining and in
fine-tuning.
"""
import math

from ..files import data

from . import tasks
from .measures import Result
from ..bundled import BUNDLED, CATEGORIES

IN_DOMAIN = "word problems"


def files(split="test"):
    """{task: file} of the bundled data: the word problems that fine-tuning is about, then the four
    categories."""
    folder = BUNDLED / "data"
    return {IN_DOMAIN: folder / f"word_problems_{split}.jsonl",
            **{category: folder / f"{category}_{split}.jsonl" for category in CATEGORIES}}


def measure(model, tokenizer, options, split="test", limit=None):
    """(results, {task: per-example rows}) of one model: exact match of every category and of the
    word problems (by the number behind ####), the category mean, and the answers' NLL in and out of
    domain."""
    results, examples, means = [], {}, []
    for task, path in files(split).items():
        docs = data.read_examples(path)[:limit]
        if task == IN_DOMAIN:  # the template asks as in training; GSM8K's strict match
            found, rows = tasks.exact(model, tokenizer, docs, options, task)
            for row, doc in zip(rows, docs):
                row["match"] = tasks.normalise(tasks.strict_answer(row["reply"])) == tasks.normalise(doc.answer)
            found = [tasks.mean_result(task, "exact_match", [row["match"] for row in rows])]
        else:
            found, rows = tasks.exact(model, tokenizer, docs, options, task)
            means.append(found[0])
        loss, losses = tasks.nll(model, tokenizer, docs, options, task)
        results += found + loss
        examples[task] = [{**row, **part} for row, part in zip(rows, losses)]
    # The questions are fixed: the mean over categories has the errors of four independent means.
    results.append(Result("category mean", "exact_match", sum(r.value for r in means) / len(means),
                          math.sqrt(sum(r.stderr ** 2 for r in means)) / len(means),
                          sum(r.n for r in means)))
    return results, examples


def add_ranks(by_run):
    """Append to each run's results its mean rank over the four categories: 1 is best, ties share
    their ranks' mean.

    by_run: {run: results}, at least two runs; changed in place.
    """
    score = {run: {r.task: r.value for r in results if r.metric == "exact_match"}
             for run, results in by_run.items()}
    for run, results in by_run.items():
        ranks = []
        for category in CATEGORIES:
            others = [score[other][category] for other in by_run]
            above = sum(x > score[run][category] for x in others)
            equal = sum(x == score[run][category] for x in others)
            ranks.append(above + (equal + 1) / 2)
        results.append(Result("mean rank", "rank", sum(ranks) / len(ranks), math.nan, len(ranks)))
