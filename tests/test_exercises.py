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
SLIPS = {  # name: [(in the solution, written by mistake, what the test says)]
    "relative_mse": [
        ("/ h[l].detach()", "/ h[l]", "above and below"),
        ("h_aux[l], h[l].detach())", "h_aux[l], h[l])", "above and below"),
        (".square().mean()", ".square().mean(-1).mean() * 16", "layer 1: 16 times"),
        ("h_aux[l], h[l].detach())", "h_aux[l].detach(), h[l].detach())", "detach h alone")],
    "embedding": [
        ("torch.zeros(", "0.01 * torch.ones(", "no leaves"), ("hook.remove()", "pass", "attached"),
        ("    try:\n        yield [d]\n    finally:\n    ", "    yield [d]\n", "attached"),
        ("x + d", "x + 2 * d", "as far as d"),
        ("x + d", "x + d * (ids[0] % 2 * 2 - 1)[..., None]", "one d for all tokens"),
        ("x + d", "x.detach() + d", "no gradient"),
        ("x + d", "(x + x.detach()) / 2 + d", "another gradient (full)"),
        ("dtype=dtype", "dtype=weight.dtype", "half precision")],
    "several_steps": [
        ("            g = gradient_at(th_aux, model, batch)\n", "", "where the tensors then are"),
        ("range(n - 1)", "range(n)", "steps(1) went"), ("[*B, *A]", "B", "every B and every A"),
        ('getattr(m, "aux_A"', 'getattr(m, "lora_A"', "without a trained LoRA"),
        ("m.aux_A.requires_grad_()", "m.aux_A", "requires no gradient"),
        ("    ascend(th_aux", "    norm = ascend(th_aux", "not of a later one"),
        ("range(n - 1)", "range(min(n, 2) - 1)", "another gradient")],
    "least_moved": [
        ("(terms.detach() / sizes)", "terms.detach()", "not relative to the size"),
        (" K / chosen", " 1.0", "not 1"), ("+ 1) // 2", ") // 2", "rounded up"),
        (".argsort()[", ".argsort(descending=True)[", "moved most"),
        ("torch.stack([h[l].", "torch.stack([h[l - 1].", "layer itself"),
        ("torch.stack([h[l].", "torch.stack([h_aux[l].", "not of h'"),
        ("for l in layers])", "for l in range(len(layers))])", "layer itself")],
    "asam": [
        ("rho * t * over", "rho * over", "loss is l_SFT at"),
        ("p.grad = None", "pass", "gone from .grad"),
        ("over_norm(tg, norm)", "(tg / norm)", "without a target"),
        ("norm = joint_norm(Tg)", "norm = joint_norm(grads_of(th))", "loss is l_SFT at"),
        ("with inplace(model):", "if True:", "must come back"),
        ("backward_into(moved, batch, th)", "moved.backward()", "underflow"),
        ("backward_into(sft, batch, th)", "sft.backward()", "underflow"),
        ("backward_into(moved, batch, th)", "(batch.loss_scale * moved).backward()",
         "still in .grad")],
    "yes_no": [
        ('("no", "yes")', '("yes", "no")', "choices are"), ('int(r["answer"])', "1", "gold is"),
        ('isinstance(r.get("answer"), bool)', "r", "invalid literal"),
        ("}?\\n", "}\\n", "the prompt")]}


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


@pytest.mark.parametrize("name, right, wrong, said",
                         [(name, *slip) for name, slips in SLIPS.items() for slip in slips])
def test_a_slip_is_caught_and_named(name, right, wrong, said, tmp_path):
    path, = (FOLDER / "solutions").glob(f"ex?_{name}.py")
    text = path.read_text(encoding="utf-8")
    assert text.count(right) == 1
    (tmp_path / path.name).write_text(text.replace(right, wrong), encoding="utf-8")
    with pytest.raises((AssertionError, pytest.fail.Exception), match=re.escape(said)):
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
