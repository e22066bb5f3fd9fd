"""What an answer must do. Red until it is written:  python -m pytest exercises -k relative_mse

Each test takes the module exN_<name of the test>.py beside this file. tests/test_exercises.py runs
the same functions on solutions/, on the empty exercises, and on answers with a slip in them.
"""
import importlib.util
import json
from pathlib import Path
import sys
import tempfile
from unittest.mock import patch

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent)]

from conftest import difference, tiny, tiny_batch, tiny_model
import definitions
from definitions import l_sft, moved_by, run, total_norm
import eval as scoring
from lfu_min import load_model, load_tokenizer
from lfu_min.bundled import BUNDLED
from lfu_min.engine.passes import make_batch
from lfu_min.lfu import lfu_step
from lfu_min.methods import MOVES
from lfu_min.scoring import tasks
from test_methods import check_kind


def load(name, folder=HERE):
    """The module exN_<name>.py of a folder."""
    path, = folder.glob(f"ex?_{name}.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def answer(request):
    return load(request.node.name.removeprefix("test_"))


# ---- helpers ----

def batch(seed=7):
    return make_batch(*tiny_batch(), generator=torch.Generator().manual_seed(seed))


def gradient(model, step, *args, **parts):
    """{name: gradient} of a step from empty `.grad`s, and what it returned."""
    model.zero_grad()
    result = step(model, batch(), *args, **parts)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, result


def states(seed):
    """Five tensors (7, 16), the embedding's and four layers'; each layer larger than the last."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda l: 3.0 ** l * torch.randn(7, 16, dtype=torch.float64, generator=generator)
    return [draw(l).requires_grad_() for l in range(5)]


def nearby(h, sizes):
    """h' = h + a change of the given size, relative to h, in each of layers 1 to 4."""
    changes = [0.0, *sizes]
    return [(x + size * x.roll(1, 0)).detach().requires_grad_() for x, size in zip(h, changes)]


# ---- the exercises ----

def test_relative_mse(answer):
    h, h_aux, layers = states(1), states(2), [1, 2, 4]
    terms = answer.relative_mse(h, h_aux, layers)
    assert terms.shape == (3,), "one term for each layer compared"
    for term, l in zip(terms, layers):
        moved = sum((a - b) ** 2 for a, b in zip(h_aux[l].flatten(), h[l].flatten()))
        size = sum(b ** 2 for b in h[l].flatten())
        assert difference(term, moved / size) < 1e-10
    terms.mean().backward()
    assert all(x.grad is None for x in h), "h is a constant, above and below the fraction line"
    assert h_aux[4].grad.abs().max() > 0 and h_aux[3].grad is None
    _, result = gradient(tiny(), lfu_step, compare=answer.relative_mse)
    assert result["consistency_grad_norm"] > 0


def test_embedding(answer):
    for tune in ("lora", "full", "tied"):
        check_kind(answer.aux_embedding, tiny(tune))  # zero effect at first, nothing left behind

    def written_out(model, generator):
        zero = {"model.embed_tokens": model.model.norm.weight.detach() * 0}
        return zero, lambda th_aux: dict(added={name: lambda ids: d for name, d in th_aux.items()})
    model = tiny()
    with patch.dict(definitions.KINDS, embedding=written_out):
        expected, _, _ = definitions.definition(model, *tiny_batch(), "embedding")
    got, _ = gradient(model, lfu_step, answer.aux_embedding)
    assert difference(got, expected) < 1e-8

    half = tiny_model().to(torch.bfloat16)
    with answer.aux_embedding(half, None) as [d]:
        assert d.dtype == torch.float32, "as steering's vectors: half precision would round it away"

    def one_draw_for_all_tokens(h, h_aux, layers, model):
        shift = h_aux[0] - h[0]  # (N, D), of the embeddings
        assert difference(shift, shift[:1].expand_as(shift)) < 1e-10
        assert shift[0].norm().item() == pytest.approx(0.3)
        return shift.square().mean()[None]
    gradient(model, lfu_step, answer.aux_embedding, alpha=0.3, move=MOVES["random"],
             compare=one_draw_for_all_tokens)


def test_several_steps(answer):
    def written_out(model, generator):
        A = definitions.drawn(model, generator)
        B = {n: a.new_zeros(model.get_submodule(n).out_features, len(a)) for n, a in A.items()}
        start = {**{("B", n): b for n, b in B.items()}, **{("A", n): a for n, a in A.items()}}
        branch = lambda a, b: lambda x: 3 / 2 * (x @ a.T) @ b.T  # tiny's scaling
        return start, lambda th_aux: dict(added={n: branch(th_aux["A", n], th_aux["B", n])
                                                 for n in A})

    def three(start, g, g_at, g_other, alpha, generator):
        first = moved_by(start, g, alpha / 3)
        second = moved_by(first, g_at(first), alpha / 3)
        return moved_by(second, g_at(second), alpha / 3)
    model = tiny()
    with patch.dict(definitions.KINDS, ab=written_out), patch.dict(definitions.MOVES, three=three):
        expected, values, _ = definitions.definition(model, *tiny_batch(), "ab", move="three")
    got, result = gradient(model, lfu_step, answer.aux_lora_ab, move=answer.steps(3))
    assert difference(got, expected) < 1e-8, "each of the n steps is 1/n of alpha long"
    assert result["ascent_norm"].item() == pytest.approx(values["ascent_norm"]), "of the first g"

    for n, moves in ((1, False), (2, True)):
        model.zero_grad()
        with answer.aux_lora_ab(model, torch.Generator().manual_seed(7)) as th_aux:
            before = {id(t): t.detach().clone() for t in th_aux}
            A = [m.aux_A for m in model.modules() if getattr(m, "aux_A", None) is not None]
            assert len(th_aux) == 2 * len(A) == 2 * 28 and {id(a) for a in A} <= before.keys()
            loss = l_sft(model(tiny_batch()[0]), tiny_batch()[1])
            g = torch.autograd.grad(loss, th_aux)
            answer.steps(n)(th_aux, g, 0.3, model, batch())
            assert total_norm(t.detach() - before[id(t)] for t in th_aux) <= 0.3 + 1e-9
            assert any(not torch.equal(a, before[id(a)]) for a in A) == moves, f"A, of {n} steps"
    assert all(m.aux_A is None for m in model.modules() if hasattr(m, "aux_A"))


def test_least_moved(answer):
    h = states(1)
    h_aux = nearby(h, [0.04, 0.03, 0.02, 0.01])  # the later, the larger, and the less for its size
    full = torch.stack([(h_aux[l] - h[l]).square().mean() for l in range(1, 5)]).detach()
    terms = answer.least_moved(h, h_aux, [1, 2, 3, 4])
    assert terms.shape == (4,), "a zero for each layer left out"
    assert difference(terms, torch.tensor([0, 0, 2, 2]) * full) < 1e-10, "relative to the size"
    assert difference(terms.mean(), full[2:].mean()) < 1e-10
    terms.mean().backward()
    assert all(x.grad is None for x in h), "h is a constant"
    pull = (h_aux[3] - h[3]) / h[3].numel()  # 2 (h' - h) / (N D), half of it
    assert difference(h_aux[3].grad, pull) < 1e-10, "the choice has no gradient"
    assert h_aux[1].grad is None or not h_aux[1].grad.any()
    odd = answer.least_moved(h, h_aux, [2, 3, 4])
    assert difference(odd, torch.tensor([0, 1.5, 1.5]) * full[1:]) < 1e-10
    sizes = [1.0, 1.0, 9.0, 1.0, 30.0]  # irregular, and a layer between that is not compared
    h = [size * x.detach() for size, x in zip(sizes, h)]
    h_aux = [x + far * torch.ones_like(x) for x, far in zip(h, [0, 0.5, 0, 0.01, 300.0])]
    moved = [((h_aux[l] - h[l]).norm() / h[l].norm()).item() for l in (1, 3, 4)]
    kept = [l > 0 for l in answer.least_moved(h, h_aux, [1, 3, 4]).tolist()]
    assert kept == [far < max(moved) for far in moved], "the size is that of the layer itself"
    _, result = gradient(tiny(), lfu_step, compare=answer.least_moved)
    assert (result["consistency_per_layer"] > 0).sum() == 2


def test_asam(answer):
    for tune in ("lora", "full"):
        model, (ids, labels) = tiny(tune), tiny_batch()
        th = {n: p for n, p in model.named_parameters() if p.requires_grad}
        before = {n: p.detach().clone() for n, p in th.items()}
        sft = l_sft(run(model, ids)[1], labels)
        g = dict(zip(th, torch.autograd.grad(sft, th.values())))
        T = {n: p.detach().abs() + 0.02 for n, p in th.items()}
        norm = total_norm([T[n] * g[n] for n in th])
        moved = {n: (p + 0.3 * T[n] * T[n] * g[n] / norm).detach().requires_grad_()
                 for n, p in th.items()}
        worse = l_sft(run(model, ids, weights=moved)[1], labels)
        expected = dict(zip(th, torch.autograd.grad(worse, moved.values())))
        got, result = gradient(model, answer.asam_step, rho=0.3, eta=0.02)
        assert difference(got, expected) < 1e-8, "the gradient at w + rho T^2 g / ||T g||"
        assert difference(result["sft"], sft) < 1e-10
        assert difference(result["loss"], worse) < 1e-10
        assert all(torch.equal(p, before[n]) for n, p in th.items()), "the weights must come back"
        answer.asam_step(model, batch(), rho=0.3, eta=0.02)
        twice = {n: p.grad for n, p in th.items()}
        assert difference(twice, {n: 2 * d for n, d in expected.items()}) < 1e-8, "adds to .grad"
        answer.asam_step(model, make_batch(ids, torch.full_like(labels, -100)))
        assert all(p.grad.isfinite().all() for p in th.values()), "without a target g is 0"


def test_yes_no(answer):
    rows = [{"passage": "Ann has 3 nuts.", "question": "has ann nuts", "answer": True},
            {"passage": "Ann has 3 nuts.", "question": "has ann pens", "answer": False},
            {"passage": "Ben is older than Kay.", "question": "is kay older", "answer": False}]
    with tempfile.TemporaryDirectory() as folder:
        good, bad = Path(folder, "good.jsonl"), Path(folder, "bad.jsonl")
        good.write_text("".join(json.dumps(row) + "\n" for row in rows))
        bad.write_text(json.dumps(rows[0]) + "\n" + json.dumps({**rows[1], "answer": "no"}) + "\n")
        docs = answer.read_yes_no(good)
        with pytest.raises(ValueError, match=r"line 2\b"):
            answer.read_yes_no(bad)
        assert docs[0].prompt == "Ann has 3 nuts.\nQuestion: has ann nuts?\nAnswer:"
        assert [(doc.choices, doc.gold, doc.target) for doc in docs] == [
            (("no", "yes"), 1, "yes"), (("no", "yes"), 0, "no"), (("no", "yes"), 0, "no")]
        with patch.dict(tasks.KINDS, {"yes-no": answer.YES_NO}):
            results = scoring.main(["--task", f"yes-no={good}", "--device", "cpu"])

    model, tokenizer = load_model(BUNDLED, dtype=torch.float32), load_tokenizer(BUNDLED)

    @torch.no_grad()
    def log_p(prompt, reply):
        context, tokens = tokenizer.encode(prompt), tokenizer.encode(reply)
        p = model(torch.tensor([context + tokens]))[0].log_softmax(-1)
        return sum(p[len(context) + i - 1, token] for i, token in enumerate(tokens))
    right = [(log_p(doc.prompt, " yes") > log_p(doc.prompt, " no")) == row["answer"]
             for doc, row in zip(docs, rows)]
    acc, = [r["value"] for r in results if r["metric"] == "acc"]
    assert acc == pytest.approx(sum(right) / 3)
