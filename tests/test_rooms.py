"""Claim: every room of the package has one purpose, and imports go one way.

The order below is the order of reading: a file may import what stands above it, and itself. Within
a room everything may import everything. Lines have at most 100 columns, and five files carry the
method.
"""
import ast
from pathlib import Path

import pytest

from lfu_min.engine.system import ROOT

# room -> the rooms it may import
MAY = {
    "model": set(),
    "bundled": set(),
    "lora": {"model"},
    "steering": {"model"},
    "files": {"model", "lora"},
    "engine": {"model", "lora"},
    "lfu": {"model", "lora", "steering", "engine"},
    "methods": {"model", "lora", "steering", "engine", "lfu", "files"},
    "scoring": {"model", "lora", "engine", "lfu", "files", "bundled"},
    "training": {"model", "lora", "engine", "lfu", "methods", "files", "scoring", "bundled"},
    "world": {"model", "files", "engine", "scoring", "bundled"},
    "cost": {"model", "lora", "engine", "lfu", "methods", "files", "scoring"},
}
ALL = {*MAY, "paper", "teach", "cost", "world"}
MAY |= {"paper": ALL, "teach": ALL, "__init__": ALL, "train.py": ALL - {"paper", "teach", "cost"},
        "eval.py": ALL - {"paper", "teach", "cost", "training", "methods"}}
METHOD = ("lfu_min/model.py", "lfu_min/lora.py", "lfu_min/steering.py", "lfu_min/lfu.py",
          "train.py")


def room_of(path):
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) == 1 else parts[1].removesuffix(".py")


def imports(text, path):
    """The rooms of lfu_min that a file imports, at any depth of its code."""
    found = set()
    package = ["lfu_min", *path.relative_to(ROOT / "lfu_min").parts[:-1]] if (
        path.is_relative_to(ROOT / "lfu_min")) else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            names = [[*module, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "lfu_min" and len(name) > 1}
        found |= {name[0] + ".py" for name in names if name[0] in ("train", "eval")}
    return found


def wrong_arrows(text, path):
    room = room_of(path)
    return sorted(found for found in imports(text, path) - {room} - MAY[room] if found in ALL
                  or found.endswith(".py"))


FILES = [*ROOT.glob("lfu_min/**/*.py"), ROOT / "train.py", ROOT / "eval.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    assert room_of(path) in MAY, f"{path.name}: which room is this? Say in MAY what it may import"
    assert not wrong_arrows(path.read_text(encoding="utf-8"), path)


@pytest.mark.parametrize("where, line, wrong", [
    ("lfu_min/model.py", "from .lora import add_lora", "lora"),
    ("lfu_min/lfu.py", "def f():\n    from .methods import moves", "methods"),
    ("lfu_min/scoring/tasks.py", "from ..world.questions import KINDS", "world"),
    ("lfu_min/files/data.py", "import lfu_min.lfu", "lfu"),
    ("lfu_min/engine/passes.py", "from .. import lfu", "lfu"),
    ("lfu_min/training/loop.py", "import train", "train.py")])
def test_a_wrong_arrow_is_seen(where, line, wrong):
    assert wrong_arrows(line, ROOT / where) == [wrong]


def test_few_modules_stand_in_the_hall():
    assert {path.name for path in ROOT.glob("lfu_min/*.py")} == {
        "__init__.py", "model.py", "lora.py", "steering.py", "lfu.py"}


def test_lines_have_at_most_100_columns():
    wide = [f"{path.relative_to(ROOT)}:{i}" for path in [*FILES, *ROOT.glob("tests/*.py")]
            for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > 100 and line.isascii()]
    assert not wide


def code_lines(path):
    """Lines that hold code: no blank ones, comments or docstrings."""
    lines = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, (ast.stmt, ast.expr)) and not docstring and not (
                isinstance(node, ast.Constant) and isinstance(node.value, str)):
            lines |= {node.lineno, node.end_lineno}
    return len(lines)


def test_five_files_of_at_most_600_lines_carry_the_method():
    assert sum(code_lines(ROOT / name) for name in METHOD) <= 600
    for name in METHOD:
        functions = [node for node in ast.walk(ast.parse(Path(ROOT / name).read_text()))
                     if isinstance(node, ast.FunctionDef)]
        assert all(node.end_lineno - node.lineno <= 60 for node in functions), name
