"""Claim: docs/method.md is right about gradients: which tensors learn from which loss, and what its
derivations say.

The tables are derived from autograd: lfu_step runs on a small model whose layers 1 and 2 of 4 are
compared, and every call of its `backward_into` notes whose `.grad` changed. The derivations are
checked in float64, mostly by how a quantity grows with alpha.
"""
import contextlib
from pathlib import Path
import re

import pytest
import torch

from conftest import TINY, tiny, tiny_batch
from definitions import KINDS, definition, pairs, run, total_norm
from lfu_min import lfu
from lfu_min.engine import passes
from lfu_min.files.checkpoint import parse_config
from lfu_min.lfu import ascend, lfu_step
from lfu_min.lora import aux_lora, lora_modules
from lfu_min.methods import AUXILIARIES, lfu_backward

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parent.parent / "docs" / "method.md"
COLUMNS = ("l_SFT", "g of Eq 2", "l_cons")
ROWS = ("trained embedding", "trained head that is the embedding",
        "trained weights of blocks 1 and 2", "trained weights of blocks 3 and 4",
        "trained final norm", "trained head", "auxiliary tensors", "auxiliary A", "frozen weights")


# ---- the tables of gradient ownership ----

def written(aux, page):
    """{row: [cell, cell, cell]} of the page's table under the heading of this kind; None: there is
    no such heading."""
    section = re.search(rf"^#+ `--aux {aux}`$(.*?)(?=^#|\Z)", page, re.S | re.M)
    if section is None:
        return None
    lines = [line for line in section[1].splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert tuple(head[1:]) == COLUMNS
    return {row[0]: row[1:] for row in rows}


def as_markdown(table):
    lines = [("tensors", *COLUMNS), ["---"] * 4, *([row, *cells] for row, cells in table.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row_of(name, tied):
    if "embed_tokens" in name:
        return ROWS[1] if tied else ROWS[0]
    if "layers" in name:
        return ROWS[2] if int(name.split(".")[2]) < 2 else ROWS[3]
    return "trained head" if "lm_head" in name else "trained final norm"


def derived(aux, monkeypatch, backward=passes.backward_into, layers=(1, 2)):
    """The same table from what lfu_step does to every tensor of two models: one with a trained
    LoRA, embedding, final norm and head; of one whose head is the embedding that row alone. The
    ascent is offered the A of an auxiliary LoRA as well."""
    tied = one_table(tiny("tied"), True, aux, monkeypatch, backward, layers)
    model = tiny()
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or not name.startswith("model.layers"))
    found = one_table(model, False, aux, monkeypatch, backward, layers)
    return {row: found.get(row) or tied[row] for row in ROWS if row in found or row == ROWS[1]}


def one_table(model, tied, aux, monkeypatch, backward, layers):
    arrived, moved, rows = [], [], {row: [] for row in ROWS}
    for name, p in model.named_parameters():
        rows[row_of(name, tied) if p.requires_grad else "frozen weights"].append(p)

    def noted(loss, batch, th, th_aux=()):
        own = {id(p) for p in passes.trained(model)}
        every = [t for tensors in rows.values() for t in tensors]
        before = [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in every]
        norm = backward(loss, batch, th, th_aux)
        got = {id(t) for t, old in zip(every, before) if t.grad is not None
               and not torch.equal(t.grad, old)}
        arrived.append(got & own if not arrived else got)  # what th_aux gets first is Eq 2's g
        return norm

    @contextlib.contextmanager
    def attached(model, generator):
        own = {id(p) for p in model.parameters()}
        with AUXILIARIES[aux](model, generator) as th_aux:
            rows["auxiliary tensors"] += [t for t in th_aux if id(t) not in own]
            rows["auxiliary A"] += [m.aux_A.requires_grad_() for m in model.modules()
                                    if getattr(m, "aux_A", None) is not None]
            yield [*th_aux, *rows["auxiliary A"]]

    def move(th_aux, g, alpha, model, batch):
        before = [t.detach().clone() for t in th_aux]
        norm = ascend(th_aux, g, alpha)
        moved.append({id(t) for t, old in zip(th_aux, before) if not torch.equal(t, old)})
        return norm
    with monkeypatch.context() as patch:
        patch.setattr(lfu, "backward_into", noted)
        batch = passes.make_batch(*tiny_batch(), generator=torch.Generator().manual_seed(7))
        lfu_step(model, batch, attached, layers=list(layers), move=move)
    (of_sft, of_cons), (by_g,) = arrived, moved

    def cell(tensors, hit):
        return " and ".join(sorted({"yes" if id(t) in hit else "no" for t in tensors}))
    return {row: [cell(tensors, hit) for hit in (of_sft, by_g, of_cons)]
            for row, tensors in rows.items() if tensors}


@pytest.mark.parametrize("aux", AUXILIARIES)
def test_the_table_of_ownership_is_what_autograd_says(aux, monkeypatch):
    found = derived(aux, monkeypatch)
    assert written(aux, PAGE.read_text(encoding="utf-8")) == found, (
        f"docs/method.md should have, under a heading `--aux {aux}`,\n\n{as_markdown(found)}\n")


def test_up_to_the_last_layer_all_but_an_untied_head_learns_from_l_cons(monkeypatch):
    found = derived("reps", monkeypatch, layers=(1, 2, 3, 4))
    assert {row for row, (_, _, cons) in found.items() if cons == "yes"} == set(ROWS[:5])


def test_a_lora_alone_learns_from_both_losses_with_all_layers_compared(monkeypatch):
    found = one_table(tiny(), False, "lora", monkeypatch, passes.backward_into, (1, 2, 3, 4))
    trained = {row: cells for row, cells in found.items() if row.startswith("trained")}
    assert trained == {row: ["yes", "no", "yes"] for row in ROWS[2:4]}


def test_planted_mistakes_in_ownership_are_seen(monkeypatch):
    """A second backward without `inputs`: the auxiliary tensors would learn from l_cons. And any
    cell of the page that says the other thing."""
    def everywhere(loss, batch, th, th_aux=()):
        loss.backward()
        return torch.zeros(())
    page, found = PAGE.read_text(encoding="utf-8"), derived("lora", monkeypatch)
    assert derived("lora", monkeypatch, everywhere) != found == written("lora", page)
    for row, cells in found.items():
        for i, cell in enumerate(cells):
            other = [*cells[:i], "no" if cell == "yes" else "yes", *cells[i + 1:]]
            wrong = page.replace(as_markdown({row: cells}).splitlines()[2],
                                 as_markdown({row: other}).splitlines()[2])
            assert written("lora", wrong) != found


# ---- two passes ----

def test_a_model_with_dropout_is_refused():
    """Its two passes would draw two masks."""
    with pytest.raises(ValueError, match="attention_dropout"):
        parse_config({**TINY, "attention_dropout": 0.1})


@pytest.mark.parametrize("disturbed", [None, "dropout", "other weights"])
def test_two_passes_through_two_models_differ_without_any_ascent(disturbed):
    """At alpha 0 h' is h, but for dropout, whose passes draw two masks, or where something moves
    the trained weights between the passes."""
    model = tiny("full")

    def move(th_aux, g, alpha, model, batch):
        if disturbed == "other weights":
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.add_(0.01)
        return ascend(th_aux, g, alpha)
    if disturbed == "dropout":
        torch.manual_seed(0)
        model.model.layers[0].mlp.register_forward_hook(
            lambda mlp, x, out: torch.nn.functional.dropout(out, 0.1))
    batch = passes.make_batch(*tiny_batch())
    found = lfu_step(model, batch, AUXILIARIES["reps"], alpha=0.0, move=move)["consistency"]
    assert (found > 0) == (disturbed is not None)


# ---- the derivations ----

def of_consistency(aux, alpha=0.1, mistake=None):
    """{name: gradient of l_cons alone} of the definition, as it is or with a mistake planted."""
    model, batch = tiny("full"), tiny_batch()
    both = definition(model, *batch, aux, lam=1.0, alpha=alpha, mistake=mistake)[0]
    sft = definition(model, *batch, aux, lam=0.0, alpha=alpha)[0]
    return {n: both[n] - sft[n] for n in both}


def dot(a, b):
    return sum((a[n] * b[n]).sum().item() for n in a)


def norm(a):
    return total_norm(a.values())


@pytest.mark.slow
@pytest.mark.parametrize("aux", AUXILIARIES)
def test_what_the_detach_is_for(aux):
    """With h detached the gradient of l_cons grows as alpha. Without, two almost equal terms cancel
    and the rest grows as alpha squared. With h' detached it is the opposite one, to first order."""
    small, large = ({mistake: of_consistency(aux, alpha, mistake)
                     for mistake in (None, "no detach", "detach on the other side")}
                    for alpha in (1e-4, 1e-3))
    assert norm(large[None]) / norm(small[None]) == pytest.approx(10, rel=0.05)
    assert norm(large["no detach"]) / norm(small["no detach"]) == pytest.approx(100, rel=0.05)
    other = small["detach on the other side"]
    assert dot(small[None], other) / norm(small[None]) / norm(other) < -0.999


@pytest.mark.parametrize("aux", ["lora", "reps"])
def test_h_moves_with_th_all_the_same(aux):
    """After a small step of th down the gradient of l_cons, th_aux held: h' has moved towards where
    h was, h has moved by about as much in the same direction, and h' - h has changed far less."""
    model, (ids, labels) = tiny("full"), tiny_batch()
    gradient = of_consistency(aux, alpha=1e-3)
    moved = definition(model, ids, labels, aux, alpha=1e-3)[2]
    _, attach = KINDS[aux](model, torch.Generator().manual_seed(7))
    at = {n: p.detach() for n, p in model.named_parameters()}
    after = {n: p - 1e-2 * gradient[n] for n, p in at.items()}

    @torch.no_grad()
    def both(weights):
        h, h_aux = (run(model, ids, **{"weights": weights, **more})[0]
                    for more in ({}, attach(moved)))
        return (torch.stack([x[l][b, t] for l in range(1, 5) for b, t in pairs(labels)])
                for x in (h, h_aux))
    (h, h_aux), (h_after, h_aux_after) = both(at), both(after)
    of_h, of_h_aux = h_after - h, h_aux_after - h_aux
    print(f"{aux}: change of h {of_h.norm():.2e}, of h' {of_h_aux.norm():.2e}, "
          f"of h' - h {(of_h_aux - of_h).norm():.2e}; length of h' - h {(h_aux - h).norm():.3e}, "
          f"then {(h_aux_after - h_after).norm():.3e}")
    assert (of_h_aux * (h_aux - h)).sum() < 0 and (of_h * (h_aux - h)).sum() < 0
    assert (of_h_aux - of_h).norm() < 0.05 * of_h.norm()


def test_in_a_second_step_A_would_have_a_gradient():
    """Beside tests/test_lfu.py: test_zero_B_gives_A_exactly_no_gradient_so_B_alone_moves."""
    model, batch = tiny(), passes.make_batch(*tiny_batch())
    with aux_lora(model, torch.Generator().manual_seed(0)) as B:
        A = [module.aux_A.requires_grad_() for _, module in lora_modules(model)]
        for moved in (False, True):
            loss = passes.sft_loss(model, passes.last_state(model, batch), batch)
            of_A, of_B = (torch.autograd.grad(loss, x, retain_graph=True) for x in (A, B))
            assert all((g.count_nonzero() > 0) == moved for g in of_A)
            ascend(B, of_B, 0.1)


@pytest.mark.parametrize("aux", AUXILIARIES)
def test_normalising_takes_the_size_of_g_out_of_the_step(aux):
    """l_SFT divided by 1000 times as many tokens: ||g|| is a thousandth, h' - h the same."""
    one, many = (lfu_backward(tiny(), *tiny_batch(), aux, num_target_tokens=divisor,
                              generator=torch.Generator().manual_seed(7))
                 for divisor in (50, 50_000))
    assert one["ascent_norm"].item() == pytest.approx(1000 * many["ascent_norm"].item(), rel=1e-9)
    assert one["consistency"].item() == pytest.approx(many["consistency"].item(), rel=1e-9)


def test_alpha_is_the_length_before_loras_scaling():
    """Twice the scaling of an auxiliary LoRA is twice the h' - h of one alpha, so alpha means
    something else in every kind."""
    terms = []
    for scaling in (3, 6):
        model = tiny()
        for _, module in lora_modules(model):
            module.lora_alpha = scaling
            module.lora_B.data.zero_()  # the model itself is the same
        terms.append(lfu_backward(model, *tiny_batch(), "lora", alpha=1e-4,
                                  generator=torch.Generator().manual_seed(7))["consistency"].item())
    assert terms[1] == pytest.approx(4 * terms[0], rel=0.01)


def test_inplace_the_two_gradients_never_point_against_each_other():
    """To first order in alpha, with J the derivative of the compared states and g of l_SFT:
    <g, gradient of l_cons> = 2 alpha ||J g||^2 / (K N D ||g||)."""
    model, (ids, labels), alpha = tiny("full"), tiny_batch(), 1e-5
    g = definition(model, ids, labels, "inplace", lam=0.0)[0]
    cons = of_consistency("inplace", alpha)
    at = {n: p.detach() for n, p in model.named_parameters()}
    where = pairs(labels)

    def compared(weights):
        h = run(model, ids, weights)[0]
        return torch.stack([h[l][b, t] for l in range(1, 5) for b, t in where])  # (K N, D)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, Jg = torch.func.jvp(compared, (at,), (g,))
    expected = 2 * alpha * Jg.square().sum().item() / Jg.numel() / norm(g)
    assert dot(g, cons) == pytest.approx(expected, rel=1e-3) and expected > 0
