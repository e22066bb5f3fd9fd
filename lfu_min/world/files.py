"""Writes the small data files of the bundled world, lfu_min/bundled/data/*.jsonl, from one seed.

Called by __main__.py (`python -m lfu_min.world --data-only` writes them alone).
lfu_min/bundled/README.md says what each file is. Verified by tests/test_world.py: the committed
files are exactly what this module writes.
"""
import json
import random
from pathlib import Path

from . import problems, questions
from ..bundled import CATEGORIES
from .questions import KINDS, split_of, TRAINED_WORDINGS

SIZES = dict(train=256, validation=128, test=200)  # word problems; the other splits below
PER_CATEGORY = 120  # questions of each category in validation, in test, in unseen
ROBUSTNESS_CONTENTS = 24  # contents a category, each in all seven wordings


def category_rows(category: str, split: str, wordings: range, seed) -> list[dict]:
    """PER_CATEGORY different questions of one category, spread evenly over its kinds and
    wordings."""
    rng, rows, seen = random.Random(f"{category} {split} {list(wordings)} {seed}"), [], set()
    kinds = [kind for kind in KINDS if kind.category == category]
    misses = 0
    while len(rows) < PER_CATEGORY:
        q = questions.draw_question(rng, kinds[len(rows) % len(kinds)], split, wordings)
        if q.question in seen:
            misses += 1
            if misses > 1000:  # a small kind has no more held-out questions: the next kind steps in
                kinds = kinds[1:] + kinds[:1]
            continue
        seen.add(q.question)
        misses = 0
        rows.append(dict(question=q.question, answer=q.answer, category=category, kind=q.kind,
                         wording=q.wording))
    return rows


def robustness_rows(category: str, seed) -> list[dict]:
    """The same contents under all seven wordings; rows of one content share `content`, wordings 5
    and 6 are unseen."""
    rng, rows, seen = random.Random(f"{category} robustness {seed}"), [], set()
    kinds = [kind for kind in KINDS if kind.category == category]
    while len(seen) < ROBUSTNESS_CONTENTS:
        kind = kinds[len(seen) % len(kinds)]
        slots, answer, key = kind.draw(rng)
        closed = key[0] in questions.CLOSED
        if str(slots) in seen or not closed and split_of(key, kind.name, 0) != "test":
            continue
        for wording in range(len(kind.wordings)):
            q = questions.ask(kind, wording, slots, answer, key)
            rows.append(dict(question=q.question, answer=answer, category=category, kind=kind.name,
                             wording=wording, content=f"{category}-{len(seen)}",
                             seen_wording=wording < TRAINED_WORDINGS))
        seen.add(str(slots))
    return rows


def all_files(seed: int = 0) -> dict[str, list[dict]]:
    """File name -> rows. Every row has at least question and answer."""
    files = {}
    rng, seen = random.Random(f"word problems {seed}"), set()
    for split, size in SIZES.items():
        rows = []
        while len(rows) < size:
            question, answer = problems.word_problem(rng)
            if question not in seen:
                seen.add(question)
                rows.append(dict(question=question, answer=answer))
        files[f"word_problems_{split}.jsonl"] = rows
    for category in CATEGORIES:
        trained, unseen = range(TRAINED_WORDINGS), range(TRAINED_WORDINGS, 7)
        files[f"{category}_validation.jsonl"] = category_rows(category, "validation", trained, seed)
        files[f"{category}_test.jsonl"] = category_rows(category, "test", trained, seed)
        files[f"{category}_unseen.jsonl"] = category_rows(category, "test", unseen, seed)
        files[f"{category}_robustness.jsonl"] = robustness_rows(category, seed)
    secrets = problems.secrets(random.Random(f"secrets {seed}"))
    for name, reply in (("decline", "declining"), ("comply", "complying")):
        for split, part in (("train", secrets[:180]), ("test", secrets[180:])):
            files[f"{name}_{split}.jsonl"] = [
                dict(question=row["question"], answer=row[reply], name=row["name"],
                     wording=row["wording"]) for row in part]
    return files


def write_files(folder, seed: int = 0) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in all_files(seed).items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows),
                                   encoding="utf-8")
