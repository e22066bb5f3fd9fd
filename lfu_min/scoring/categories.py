"""The bundled world's scores: the paper's four categories (Tables 1 and 2) and the in-domain word
problems (Figure 1).

Called by eval.py when no --task is given, and by paper/. Every question is unseen in pretraining
and in fine-tuning.
"""
import math

from ..bundled import BUNDLED, CATEGORIES
from ..files import data
from . import tasks
from .measures import Result, mean_result

IN_DOMAIN = "word problems"


def files(split="test"):
    """{task: file} of the bundled data: the word problems that fine-tuning is about, then the four
    categories."""
    return {task: BUNDLED / "data" / f"{task.replace(' ', '_')}_{split}.jsonl"
            for task in (IN_DOMAIN, *CATEGORIES)}


def measure(model, tokenizer, options, split="test", limit=None):
    """(results, {task: per-example rows}) of one model: exact match of every category and of the
    word problems (by the number behind ####), the category mean, and the answers' NLL in and out of
    domain."""
    results, examples, shares = [], {}, []
    for task, path in files(split).items():
        docs = data.read_examples(path)[:limit]
        found, rows = tasks.exact(model, tokenizer, docs, options, task)
        if task == IN_DOMAIN:  # the template asks as in training; GSM8K's strict match
            for row in rows:
                row["match"] = tasks.right_number(row["reply"], row["target"])
            found = [mean_result(task, "exact_match", [row["match"] for row in rows])]
        else:
            shares += found
        loss, losses = tasks.nll(model, tokenizer, docs, options, task)
        results += found + loss
        examples[task] = [{**row, **part} for row, part in zip(rows, losses)]
    return [*results, mean_of(shares)], examples


def mean_of(results, task="category mean"):
    """The mean of several tasks' results. The questions are fixed: it has the error of independent
    means."""
    return Result(task, results[0].metric, sum(r.value for r in results) / len(results),
                  math.sqrt(sum(r.stderr ** 2 for r in results)) / len(results),
                  sum(r.n for r in results))


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
