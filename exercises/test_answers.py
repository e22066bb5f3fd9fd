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
        assert difference(term, moved / size) < 1e-10, (
            f"layer {l}: {term / (moved / size):.4g} times the sum of (h' - h)^2 over that of h^2")
    assert terms.requires_grad, "h' has no gradient: detach h alone"
    terms.mean().backward()
    assert all(x.grad is None for x in h), "h is a constant, above and below the fraction line"
    assert h_aux[4].grad.abs().max() > 0, "layer 4 has no gradient"
    assert h_aux[3].grad is None, "layer 3, which is not compared, has a gradient"
    _, result = gradient(tiny(), lfu_step, compare=answer.relative_mse)
    assert result["consistency_grad_norm"] > 0, "in lfu_step no trained weight gets a gradient"


def test_embedding(answer):
    for tune in ("lora", "full", "tied"):
        check_kind(answer.aux_embedding, tiny(tune))  # zero effect at first, nothing left behind

    def written_out(model, generator):
        zero = {"model.embed_tokens": model.model.norm.weight.detach() * 0}
        return zero, lambda th_aux: dict(added={name: lambda ids: d for name, d in th_aux.items()})
    model = tiny()

    def one_draw_for_all_tokens(h, h_aux, layers, model):
        shift = h_aux[0] - h[0]  # (N, D), of the embeddings
        assert difference(shift, shift[:1].expand_as(shift)) < 1e-10, "one d for all tokens"
        assert shift[0].norm().item() == pytest.approx(0.3), "x + d: moves x as far as d, alpha"
        return shift.square().mean()[None]
    gradient(model, lfu_step, answer.aux_embedding, alpha=0.3, move=MOVES["random"],
             compare=one_draw_for_all_tokens)

    for tune in ("lora", "full"):
        model = tiny(tune)
        with patch.dict(definitions.KINDS, embedding=written_out):
            expected, _, _ = definitions.definition(model, *tiny_batch(), "embedding")
        got, _ = gradient(model, lfu_step, answer.aux_embedding)
        assert got.keys() == expected.keys(), f"no gradient: {expected.keys() - got.keys()}"
        assert difference(got, expected) < 1e-8, f"the weights get another gradient ({tune})"

    half = tiny_model().to(torch.bfloat16)
    with answer.aux_embedding(half, None) as [d]:
        assert d.dtype == torch.float32, "as steering's vectors: half precision would round it away"


def test_several_steps(answer):
    def written_out(model, generator):
        A = definitions.drawn(model, generator)
        B = {n: a.new_zeros(model.get_submodule(n).out_features, len(a)) for n, a in A.items()}
        start = {**{("B", n): b for n, b in B.items()}, **{("A", n): a for n, a in A.items()}}
        scaling = 3 / 2 if tune == "lora" else 16 / 8  # tiny's, and aux_lora's own
        branch = lambda a, b: lambda x: scaling * (x @ a.T) @ b.T
        return start, lambda th_aux: dict(added={n: branch(th_aux["A", n], th_aux["B", n])
                                                 for n in A})

    def three(start, g, g_at, g_other, alpha, generator):
        first = moved_by(start, g, alpha / 3)
        second = moved_by(first, g_at(first), alpha / 3)
        return moved_by(second, g_at(second), alpha / 3)
    for tune in ("lora", "full"):
        model = tiny(tune)
        for n in (1, 2):
            with answer.aux_lora_ab(model, torch.Generator().manual_seed(7)) as th_aux:
                carry = [m for m in model.modules() if getattr(m, "aux_A", None) is not None]
                wanted = [t for m in carry for t in (m.aux_B, m.aux_A)]
                assert sorted(map(id, th_aux)) == sorted(map(id, wanted)), (
                    f"{len(th_aux)} tensors; every B and every A should be among them, also of a "
                    f"model without a trained LoRA: {len(wanted)}")
                assert all(t.requires_grad for t in th_aux), "an A requires no gradient"
                before, A = [t.detach().clone() for t in th_aux], {id(m.aux_A) for m in carry}
                loss = l_sft(model(tiny_batch()[0]), tiny_batch()[1])
                g = torch.autograd.grad(loss, th_aux)
                answer.steps(n)(th_aux, g, 0.3, model, batch())
                way = [(t - old).detach() for t, old in zip(th_aux, before)]
                length = total_norm(way)
                assert length <= 0.3 + 1e-9, f"steps({n}) went {length / 0.3:.3g} times alpha"
                assert any(d.any() for d, t in zip(way, th_aux) if id(t) in A) == (n == 2), (
                    "A stays in the first step, where B is 0, and moves in the second: along the "
                    "gradient where the tensors then are")
        assert all(getattr(m, "aux_A", None) is None for m in model.modules()), "left behind"

        with patch.dict(definitions.KINDS, ab=written_out), \
                patch.dict(definitions.MOVES, three=three):
            expected, values, _ = definitions.definition(model, *tiny_batch(), "ab", move="three")
        got, result = gradient(model, lfu_step, answer.aux_lora_ab, move=answer.steps(3))
        assert result["ascent_norm"].item() == pytest.approx(values["ascent_norm"]), (
            "steps(n) returns the norm of the g it was given, not of a later one")
        assert difference(got, expected) < 1e-8, (
            "another gradient than after three steps of alpha / 3, of A and B together")


def test_least_moved(answer):
    h = states(1)
    h_aux = nearby(h, [0.09, 0.08, 0.01, 0.01])  # for their size 3 and 4, as it is 1 and 3
    full = torch.stack([(h_aux[l] - h[l]).square().mean() for l in range(1, 5)]).detach()
    terms = answer.least_moved(h, h_aux, [1, 2, 3, 4])
    assert terms.shape == (4,), "a zero for each layer left out"
    kept = [l for l, term in enumerate(terms.tolist(), 1) if term > 0]
    assert kept != [1, 2], "these moved most for their size, not least"
    assert kept != [1, 3], "these moved least, but not relative to the size of h"
    assert kept == [3, 4], f"layers {kept}: 3 and 4 moved least for their size"
    scale = (terms[2:] / full[2:]).tolist()
    assert scale == pytest.approx([2, 2]), (
        f"{scale} times Eq 5's terms; K over the number of layers chosen is 2, not 1")
    terms.mean().backward()
    assert all(x.grad is None for x in h), "h is a constant"
    pull = (h_aux[3] - h[3]) / h[3].numel()  # 2 (h' - h) / (N D), half of it
    assert difference(h_aux[3].grad, pull) < 1e-10, "the choice has no gradient"
    assert h_aux[1].grad is None or not h_aux[1].grad.any(), "a layer left out has a gradient"
    odd = answer.least_moved(h, h_aux, [2, 3, 4])
    assert (odd > 0).sum() == 2, "of three layers two: half of them, rounded up"
    assert difference(odd, torch.tensor([0, 1.5, 1.5]) * full[1:]) < 1e-10, "of K = 3: 3 / 2 times"
    sizes = [1.0, 1.0, 9.0, 1.0, 30.0]  # irregular, and a layer between that is not compared
    h = [size * x.detach() for size, x in zip(sizes, h)]
    h_aux = [x + far * torch.ones_like(x) for x, far in zip(h, [0, 0.5, 0, 0.01, 300.0])]
    moved = [((h_aux[l] - h[l]).norm() / h[l].norm()).item() for l in (1, 3, 4)]
    kept = [l > 0 for l in answer.least_moved(h, h_aux, [1, 3, 4]).tolist()]
    assert kept == [far < max(moved) for far in moved], "the size is that of the layer itself"
    h_aux = [4 * h[0], 4 * h[1], 0.1 * h[2]]  # moved by 3 and 0.9 times h, by 0.75 and 9 times h'
    kept = [l > 0 for l in answer.least_moved(h[:3], h_aux, [1, 2]).tolist()]
    assert kept == [False, True], "the size is that of h, not of h'"
    _, result = gradient(tiny(), lfu_step, compare=answer.least_moved)
    assert (result["consistency_per_layer"] > 0).sum() == 2, "in lfu_step: half of four layers"


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
        assert difference(result["sft"], sft) < 1e-10, "sft is l_SFT before the move"
        assert difference(result["loss"], worse) < 1e-10, (
            "loss is l_SFT at w + rho T^2 g / ||T g||: T = |w| + eta, one norm over all weights")
        assert all(torch.equal(p, before[n]) for n, p in th.items()), "the weights must come back"
        assert difference(got, expected) < 1e-8, (
            "the gradient is not that at the moved weights alone: is g gone from .grad?")
        answer.asam_step(model, batch(), rho=0.3, eta=0.02)
        twice = {n: p.grad for n, p in th.items()}
        assert difference(twice, {n: 2 * d for n, d in expected.items()}) < 1e-8, "adds to .grad"
        answer.asam_step(model, make_batch(ids, torch.full_like(labels, -100)))
        assert all(p.grad.isfinite().all() for p in th.values()), "without a target g is 0"

        sizes = {}  # float16's loss scale: of what comes back to the final norm in each backward
        for scale in (1.0, 64.0):
            arrived = sizes[scale] = []
            hook = model.model.norm.register_full_backward_hook(
                lambda module, grad_in, grad_out: arrived.append(64 / scale * grad_out[0].norm()))
            model.zero_grad()
            answer.asam_step(model, make_batch(ids, labels, loss_scale=scale), rho=0.3, eta=0.02)
            hook.remove()
            assert difference({n: p.grad for n, p in th.items()}, expected) < 1e-8, (
                "the loss scale is still in .grad, or in g")
        assert difference(sizes[64.0], sizes[1.0]) < 1e-8, (
            "both backwards need batch.loss_scale: float16's gradients would underflow")


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
        prompt = "Ann has 3 nuts.\nQuestion: has ann nuts?\nAnswer:"
        assert docs[0].prompt == prompt, f"the prompt {docs[0].prompt!r} should be {prompt!r}"
        assert all(doc.choices == ("no", "yes") for doc in docs), "the choices are no, yes"
        assert [(doc.gold, doc.target) for doc in docs] == [(1, "yes"), (0, "no"), (0, "no")], (
            "gold is the place of the right choice")
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
    assert acc == pytest.approx(sum(right) / 3), "acc is not how often the right one is likelier"
