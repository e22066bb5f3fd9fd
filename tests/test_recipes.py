"""Claim: the recipes of README.md, "Change it", and of docs/method.md under the same heading work
as they stand there: each piece at the end of the file that its first line names.

Done in a copy of the repository, as a reader would: the code first, and tests ask for what is
missing; then the definitions, and they agree; then the table that a test prints, pasted.
"""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from lfu_min.engine.system import ROOT
from test_docs import blocks

pytestmark = pytest.mark.slow

HEAD = re.compile(r"^# ((?:lfu_min|tests)/[\w/]+\.py)\b", re.M)
NEW = {"KINDS": ("lower", "inplace-mlp"), "MOVES": ("sign",), "TERMS": ("l1", "worst-layer")}
NAMES = [name for names in NEW.values() for name in names]
SLIPS = [  # file, in the recipe, written by mistake, what the tests say
    ("distances.py", "h[l].detach()) for l in layers])\nD", "h[l]) for l in layers])\nD", "detach"),
    ("distances.py", ".max()[None]", ".mean()[None]", "worst-layer"),
    ("moves.py", "g], alpha)", "g], -alpha)", "sign"),
    ("auxiliaries.py", "// 2]", "// 2 - 1]", "lower"),
    ("auxiliaries.py", 'IN_PLACE.add("inplace-mlp")', "", "are_marked"),
    ("auxiliaries.py", '".mlp." in n', '".self_attn." in n', "inplace-mlp")]


def recipes():
    """[(file, code)] of both pages, in their order."""
    found = []
    for page in ("README.md", "docs/method.md"):
        for block in blocks(ROOT / page):
            if block.language == "python" and HEAD.match(block.text):
                _, *parts = HEAD.split(block.text)
                found += zip(parts[::2], (f"# {code}" for code in parts[1::2]))
    return found


def add(copy, files):
    for file, code in recipes():
        if file.startswith(files):
            with open(copy / file, "a", encoding="utf-8") as f:
                f.write("\n\n" + code)


def python(copy, *words):
    done = subprocess.run([sys.executable, *words], cwd=copy, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout + done.stderr


def pytest_in(copy, *words):
    return python(copy, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *words)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with all recipes and definitions in their places."""
    target = tmp_path_factory.mktemp("recipes") / "lfu_min"
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(
        ".git", "runs", "__pycache__", ".pytest_cache", "shared"))
    add(target, "lfu_min/")
    status, said = pytest_in(target, "tests/test_methods.py", "-k",
                             "has_a_definition or worst-layer")
    assert status == 1 and all(name in said for name in NAMES), said
    assert "3 failed, 1 passed, 10 skipped" in said, said  # what compares with a definition skips
    add(target, "tests/")
    return target


def test_every_recipe_is_there():
    files = [file.rpartition("/")[2] for file, _ in recipes()]
    assert sorted(files) == sorted(["distances.py"] * 2 + ["moves.py"] + ["auxiliaries.py"] * 2
                                   + ["tasks.py"] + ["definitions.py"] * 2)


def test_the_tests_accept_the_new_parts(copy):
    status, said = pytest_in(copy, "tests/test_methods.py", "tests/test_lfu.py", "-k",
                             f"has_a_definition or {' or '.join(NAMES)}")
    assert status == 0, said
    assert int(re.search(r"(\d+) passed", said)[1]) > 100


@pytest.mark.parametrize("file, right, wrong, said", SLIPS)
def test_a_slip_in_a_recipe_is_seen(file, right, wrong, said, copy):
    path = copy / "lfu_min" / "methods" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    try:
        status, output = pytest_in(copy, "tests/test_methods.py", "-x", "-k", " or ".join(NAMES))
    finally:
        path.write_text(text, encoding="utf-8")
    assert status == 1 and said in output


def test_a_new_kinds_table_is_asked_for_and_printed(copy):
    page = copy / "docs" / "method.md"
    for name in NEW["KINDS"]:
        only = "tests/test_ownership.py", "-k", f"table_of_ownership and {name}"
        status, said = pytest_in(copy, *only)
        assert status == 1
        table = "\n".join(line.partition("| ")[1] + line.partition("| ")[2]
                          for line in said.splitlines() if re.match(r"E +\| ", line))
        with open(page, "a", encoding="utf-8") as f:
            f.write(f"\n### `--aux {name}`\n\n{table}\n")
        status, said = pytest_in(copy, *only)
        assert status == 0, said
    assert "no and yes" in page.read_text(encoding="utf-8")  # the MLPs' weights alone move


def test_the_flags_offer_them(copy):
    for flags in (["--compare", "l1", "--aux", "lower", "--move", "sign"],
                  ["--compare", "worst-layer", "--aux", "inplace-mlp"]):
        status, said = python(copy, "train.py", *flags, "--max-steps", "2", "--batch-size", "2",
                              "--device", "cpu")
        assert status == 0, said
    status, said = python(copy, "train.py", "--shard", "--aux", "inplace-mlp")
    assert status == 2 and "--shard --aux inplace-mlp" in said
    lines = [{"question": f"What is {a} + {a}?", "right": str(2 * a), "wrong": "the river"}
             for a in (3, 4, 5)]
    (copy / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, said = python(copy, "eval.py", "--task", "pairs=pairs.jsonl", "--device", "cpu")
    assert status == 0 and re.search(r"pairs +acc +\d", said), said
