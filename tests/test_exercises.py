"""Claim: every exercise can be solved where it says, in under 30 lines, and its test tells an
answer from none and from one with a slip.

The exercises' own tests (exercises/test_answers.py) are not collected here: they are red until
somebody solves them. This file calls them on other answers.
"""
import ast
import importlib.util
import inspect
import re

import pytest

from lfu_min.engine.system import ROOT

pytestmark = pytest.mark.slow

FOLDER = ROOT / "exercises"
spec = importlib.util.spec_from_file_location("test_answers", FOLDER / "test_answers.py")
answers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(answers)

NAMES = [path.stem[len("ex1_"):] for path in sorted(FOLDER.glob("ex?_*.py"))]
SLIPS = {  # name: [(in the solution, written by mistake)]
    "relative_mse": [("/ h[l].detach()", "/ h[l]"), ("h_aux[l], h[l].detach())", "h_aux[l], h[l])"),
                     (".square().mean()", ".square().mean(-1).mean() * 16")],
    "embedding": [("torch.zeros(", "0.01 * torch.ones("), ("hook.remove()", "pass"),
                  ("    try:\n        yield [d]\n    finally:\n    ", "    yield [d]\n"),
                  ("x + d", "x + 2 * d")],
    "several_steps": [("            g = gradient_at(th_aux, model, batch)\n", ""),
                      ("range(n - 1)", "range(n)"), ("[*B, *A]", "B")],
    "least_moved": [("(terms.detach() / sizes)", "terms.detach()"), (" K / chosen", " 1.0"),
                    (".argsort()[", ".argsort(descending=True)["), ("+ 1) // 2", ") // 2"),
                    ("torch.stack([h[l].", "torch.stack([h[l - 1]."),
                    ("for l in layers])", "for l in range(len(layers))])")],
    "asam": [("rho * t * over", "rho * over"), ("p.grad = None", "pass"),
             ("over_norm(tg, norm)", "(tg / norm)"),
             ("norm = joint_norm(Tg)", "norm = joint_norm(grads_of(th))"),
             ("with inplace(model):", "if True:")],
    "yes_no": [('("no", "yes")', '("yes", "no")'), ("isinstance(r.get(\"answer\"), bool)", "r"),
               ("}?\\n", "}\\n")]}


def check(name, answer):
    getattr(answers, f"test_{name}")(answer)


def test_every_exercise_has_a_test_a_solution_and_a_place_in_the_page():
    tests = [name for name in vars(answers) if name.startswith("test_")]
    assert [f"test_{name}" for name in NAMES] == tests and NAMES == list(SLIPS) and len(NAMES) == 6
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"`(ex\d_\w+\.py)`", page) == [p.name for p in sorted(FOLDER.glob("ex*.py"))]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    check(name, answers.load(name, FOLDER / "solutions"))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_exercise_fails_and_says_what_to_do(name):
    with pytest.raises(NotImplementedError, match=r"\w+ \w+ \w+"):
        check(name, answers.load(name))


@pytest.mark.parametrize("name, right, wrong",
                         [(name, *slip) for name, slips in SLIPS.items() for slip in slips])
def test_a_slip_is_caught(name, right, wrong, tmp_path):
    path, = (FOLDER / "solutions").glob(f"ex?_{name}.py")
    text = path.read_text(encoding="utf-8")
    assert text.count(right) == 1
    (tmp_path / path.name).write_text(text.replace(right, wrong), encoding="utf-8")
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(name, answers.load(name, tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_a_solution_has_the_exercises_functions_and_under_30_lines(name):
    empty, solved = answers.load(name), answers.load(name, FOLDER / "solutions")
    own = lambda module: {n: str(inspect.signature(f)) for n, f in vars(module).items()
                          if inspect.isfunction(f) and f.__module__ == module.__name__}
    assert own(empty) == own(solved)
    path, = (FOLDER / "solutions").glob(f"ex?_{name}.py")
    functions = [node for node in ast.parse(path.read_text(encoding="utf-8")).body
                 if isinstance(node, ast.FunctionDef)]
    assert sum(f.end_lineno - f.lineno + 1 for f in functions) < 30


def test_lines_have_at_most_100_columns():
    wide = [f"{path.name}:{i}" for path in FOLDER.glob("**/*.py")
            for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > 100]
    assert not wide
