"""Exercise 6, a benchmark: `python -m pytest exercises -k yes_no`

BoolQ (arXiv 1905.10044) asks for yes or no. A line of its file:

    {"question": "is a tomato a fruit", "passage": "The tomato is ...", "answer": true}

Make it a task of eval.py. The standard harness asks

    The tomato is ...
    Question: is a tomato a fruit?
    Answer:

and takes "no" or "yes", in this order, whichever the model finds more likely. Score it as PIQA is
scored: multiple choice by log-likelihood exists already, so what is missing is a reader.

Do not trust the file. An answer that is no true or false is refused with the line's number: the
string "false" is true in Python.

In the library: scoring/tasks.py, KINDS; then `python eval.py --task yes-no=FILE`.
"""
from lfu_min.scoring.tasks import choice, choice_doc, read_records


def read_yes_no(path):
    """[Doc, ...] of a BoolQ file. ValueError, with the line, for an answer that is not true or
    false."""
    raise NotImplementedError("read_records checks fields of text; choice_doc makes a Doc")


YES_NO = (read_yes_no, choice, None)  # KINDS' entry: reader, measure, default limit
