"""Claim: what the lecture shows is what happens. explain's numbers are those of train.py's first
step and of the definition (definitions.py); the notebook runs, and its outputs are not stale.
"""
import json
import re
import subprocess
import sys

import pytest
import torch

from conftest import difference, tiny, tiny_batch
import definitions
from definitions import l_sft, pairs, run, total_norm
import train
from lfu_min.engine import passes
from lfu_min.engine.system import ROOT
from lfu_min.methods import AUXILIARIES
from lfu_min.model import LlamaConfig
from lfu_min.teach import explain, relatives

LECTURE = ROOT / "docs" / "lecture.ipynb"


# ---- explain: the numbers ----

def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def check_against_definition(aux):
    """Every number of `observe`, from the three passes of the definition and loops."""
    model, (ids, labels) = tiny(), tiny_batch()
    both, values, moved = definitions.definition(model, ids, labels, aux, alpha=0.3)
    of_sft, _, _ = definitions.definition(model, ids, labels, aux, alpha=0.3, lam=0.0)
    start, attach = definitions.KINDS[aux](model, torch.Generator().manual_seed(7))
    with torch.no_grad():
        h, z = run(model, ids)
        h_aux, z_aux = run(model, ids, **attach(moved))
    of_cons = flat(both.values()) - flat(of_sft.values())

    batch = passes.make_batch(ids, labels, generator=torch.Generator().manual_seed(7))
    seen = explain.observe(model, batch, AUXILIARIES[aux], alpha=0.3)
    near = lambda x: pytest.approx(x, rel=1e-8)
    for name in ("sft", "consistency", "ascent_norm", "sft_grad_norm", "consistency_grad_norm"):
        assert seen[name].item() == near(values[name])
    assert seen["sft_of_th"] == near(seen["sft_attached"]) == near(l_sft(z, labels).item())
    assert seen["sft_worse"] == near(l_sft(z_aux, labels).item()) and z_aux is not z
    assert seen["sft_worse"] > seen["sft_attached"]
    assert seen["moved"] == near(0.3) == total_norm([moved[n] - start[n] for n in moved])
    cons_norm, sft_norm = of_cons.norm().item(), flat(of_sft.values()).norm().item()
    assert seen["share"] == near(cons_norm / (cons_norm + sft_norm))
    angle = torch.dot(of_cons, flat(of_sft.values())).item() / cons_norm / sft_norm
    assert seen["gradient_cosine"].item() == near(angle)
    where = pairs(labels)
    for l, movement in enumerate(seen["movement"], 1):
        gone = sum((h_aux[l][b, t] - h[l][b, t]).square().sum() for b, t in where)
        size = sum(h[l][b, t].square().sum() for b, t in where)
        assert movement.item() == near((gone / size).sqrt().item())
    assert seen["th"] == (56, sum(p.numel() for p in passes.trained(model)))
    assert seen["th_aux"] == (len(moved), sum(t.numel() for t in moved.values()))


@pytest.mark.parametrize("aux", definitions.KINDS)
def test_every_number_is_the_definitions(aux):
    check_against_definition(aux)


@pytest.mark.slow
@pytest.mark.parametrize("name, mistake", [
    ("ascend", lambda th_aux, g, alpha: explain.ascend(th_aux, g, -alpha)),
    ("ascend", lambda th_aux, g, alpha: explain.ascend(th_aux, g, alpha * 1.01)),
    ("mse", lambda h, h_aux, layers: explain.mse(h, h_aux, list(layers)[:-1])),
    ("size", lambda tensors: (len(tensors), sum(t.numel() for t in tensors) + 1))])
def test_a_planted_mistake_is_seen(name, mistake, monkeypatch):
    right = getattr(explain, name)

    def wrong(*args):
        with monkeypatch.context() as m:
            m.setattr(explain, name, right)
            return mistake(*args)
    monkeypatch.setattr(explain, name, wrong)
    with pytest.raises(AssertionError):
        check_against_definition("lora")


def test_observing_changes_nothing():
    model, (ids, labels) = tiny(dtype=torch.float32), tiny_batch()
    weights = {n: w.clone() for n, w in model.state_dict().items()}
    before = model.hidden_states(ids)
    explain.observe(model, passes.make_batch(ids, labels), AUXILIARIES["inplace"])
    assert all(torch.equal(w, weights[n]) for n, w in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(model.hidden_states(ids), before))


def test_half_precision_is_what_it_says(monkeypatch):
    """float32 in the place of half precision is float32, bit for bit; the rounded stream is rounded
    after each block; three more bits are a better cosine."""
    model, batch = tiny(dtype=torch.float32), passes.make_batch(*tiny_batch())
    plain = passes.states(model, batch)
    rounded = explain.states_in(None, torch.bfloat16, model, batch)
    assert torch.equal(rounded[1], plain[1].bfloat16().float())
    assert not torch.equal(rounded[2], plain[2].bfloat16().float())
    seen = explain.observe(model, batch, AUXILIARIES["reps"])["half_cosine"]
    assert seen["fp16"].mean() > seen["bf16"].mean() > seen["bf16 stream"].mean() > 0
    assert seen["bf16"][0] > 0.9999 > seen["bf16 stream"][0]  # d_1 stands behind block 1's products
    monkeypatch.setattr(explain, "HALF", {"fp32": (torch.float32, torch.float32)})
    seen = explain.observe(model, batch, AUXILIARIES["reps"])
    assert difference(seen["half_cosine"]["fp32"], torch.ones(4)) < 1e-6
    assert torch.equal(seen["half_ratio"]["fp32"], torch.ones(4))


# ---- explain: train.py's first step, and its words ----

@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--aux", "lora"], ["--aux", "reps", "--template", "alpaca"],
    ["--aux", "inplace", "--seed", "3", "--lam", "2", "--alpha", "0.5"]])
def test_it_is_train_pys_first_step(flags, tmp_path, capsys):
    flags = [*flags, "--batch-size", "4"]
    _, (record,) = train.main([*flags, "--max-steps", "1", "--out", str(tmp_path / "run"),
                               "--device", "cpu"])
    seen = explain.main([*flags, "--device", "cpu"])
    for name in ("sft", "consistency", "ascent_norm", "sft_grad_norm", "consistency_grad_norm"):
        assert seen[name].item() == pytest.approx(record[name], rel=1e-5)
    assert seen["share"] == pytest.approx(record["consistency_share"], rel=1e-5)
    assert seen["consistency_per_layer"].tolist() == pytest.approx(record["consistency_per_layer"],
                                                                   rel=1e-4)
    shown = capsys.readouterr().out
    assert f"{seen['sft_worse']:.6f}" in shown and f"{seen['gradient_cosine']:.3f}" in shown


@pytest.mark.slow
def test_the_numbers_by_kind_are_those_of_train_pys_log(tmp_path, capsys):
    """Of two batches, with a learning rate at which nothing is learned."""
    flags = ["--batch-size", "4", "--alpha", "0.3", "--device", "cpu"]
    found = explain.main([*flags, "--kinds", "2"])
    rows = capsys.readouterr().out.splitlines()
    assert list(found) == list(AUXILIARIES) == [row.split()[0] for row in rows[1:]]
    for aux, values in found.items():
        _, log = train.main([*flags, "--aux", aux, "--max-steps", "2", "--lr", "1e-12",
                             "--out", str(tmp_path / aux)])
        for ours, name in (("share", "consistency_share"), ("gradient_cosine",) * 2,
                           ("movement",) * 2, ("ascent_norm",) * 2, ("consistency",) * 2):
            logged = torch.tensor([record[name] for record in log], dtype=torch.float64)
            assert difference(values[ours].double(), logged) < 1e-3
    low, high = found["lora"]["share"].min(), found["lora"]["share"].max()
    assert f"{low:.0%} - {high:.0%}" in rows[1] and low < high
    with pytest.raises(ValueError, match="--kinds 0"):
        explain.main(["--kinds", "0"])


def test_the_share_says_which_lambda_has_another_share():
    """docs/method.md, Which numbers to watch; and rise is about alpha * ||g||."""
    model, batch = tiny(), passes.make_batch(*tiny_batch())

    def share(lam):
        batch.generator = torch.Generator().manual_seed(7)
        model.zero_grad()
        return explain.watched(model, [batch], lam, 0.01)["lora"]
    s, wanted = share(5.0)["share"].item(), 0.25
    other = 5.0 * wanted / (1 - wanted) * (1 - s) / s
    assert share(other)["share"].item() == pytest.approx(wanted, rel=1e-6) and s != wanted
    found = share(5.0)
    assert found["rise"].item() == pytest.approx(0.01 * found["ascent_norm"].item(), rel=0.05)


class Letters:
    """A tokenizer of the letters a to z."""
    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


def test_the_example_is_marked_where_its_tokens_are_supervised():
    ids = torch.tensor([[2, 0, 1, 3, 4, 25, 25], [1, 1, 1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, -100, 3, 4, -100, -100], [-100] + [1] * 6])
    batch = passes.make_batch(ids, labels)
    assert explain.example(Letters(), batch) == "cab>>>de<<<"
    assert explain.row(batch, 1) == ([1] * 7, [1, 2, 3, 4, 5, 6])
    rows = [line.split(maxsplit=3) for line in explain.border(Letters(), batch, 2).splitlines()]
    assert rows[1:] == [["1", "'a'", "-100", "nothing that counts"],
                        ["2", "'b'", "-100", "'d', and counts"],
                        ["3", "'d'", "'d'", "'e', and counts"]]


def test_bars_are_as_long_as_their_values():
    assert explain.bars([0.5, 2.0, 1.0], width=8) == ["##", "########", "####"]


@pytest.mark.parametrize("flags, said", [
    (["--aux", "none"], "invalid choice"), (["--lam", "0"], "--lam 0"),
    (["--steps", "3"], "--steps"), (["--alpha", "-1"], "--alpha"),
    (["--data", "nowhere.jsonl"], "nowhere"), (["--model", "nowhere", "--data", "x"], "nowhere"),
    (["--max-len", "3"], "max_len 3")])
def test_bad_input_is_one_line(flags, said):
    with pytest.raises((ValueError, OSError), match=re.escape(said)):
        explain.main(flags)


@pytest.mark.slow
def test_the_script_ends_with_status_2_and_one_line():
    done = subprocess.run([sys.executable, "-m", "lfu_min.teach.explain", "--alpha", "x"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1


# ---- relatives ----

@pytest.mark.slow
def test_passes_and_operations_of_the_relatives(monkeypatch):
    config = LlamaConfig(29, 16, 20, 2, 4, 2, 4)
    monkeypatch.setattr(relatives, "SHAPES", {"SmolLM2-135M": config})
    found = {name: relatives.count.count_step(config, step, 2, 16)
             for name, step in relatives.STEPS.items()}
    passes_of = {name: forwards for name, (forwards, _, _) in found.items()}
    known = {"sft": 1, "neftune": 1, "gem": 1, "l1": 1, "l2": 1, "sam": 2, "logit_kl": 2,
             "lfu lora": 2, "lfu reps": 2, "lfu inplace": 2, "lfu two-steps": 3}
    assert known.items() <= passes_of.items()
    flops = {name: count for name, (_, count, _) in found.items()}
    assert flops["sam"] == 2 * flops["sft"] == 2 * flops["neftune"]
    assert flops["sft"] < flops["lfu reps"] < flops["sam"]  # the second pass needs no head
    rows = relatives.main(["--repeats", "1", "--batch", "2", "--tokens", "16"])
    assert rows["sam"][:2] == (2, 2.0) and all(row[3] > 0 for row in rows.values())
    with pytest.raises(ValueError, match="--tokens 1"):
        relatives.main(["--tokens", "1"])


# ---- the lecture ----

def cells():
    return json.loads(LECTURE.read_text(encoding="utf-8"))["cells"]


def printed(cell):
    return "".join("".join(out.get("text", "")) for out in cell["outputs"])


def test_the_lectures_outputs_are_there_and_without_an_error():
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {out["output_type"] for cell in code for out in cell["outputs"]}
    assert "error" not in kinds and "display_data" in kinds
    text = LECTURE.read_text(encoding="utf-8")
    assert not re.search(r"/(root|home|tmp|work|Users)/", text), "a machine's path"
    for cell in cells():
        wide = [line for line in "".join(cell["source"]).splitlines() if len(line) > 100]
        assert all(line.startswith("|") for line in wide)  # a table's row


@pytest.mark.slow
def test_the_lecture_runs_and_prints_what_it_says():
    """In a fresh kernel. Every cell puts out what it did when it was committed, a text or a
    picture; the table compared with the numbers by hand is the same to the digit."""
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient (requirements-dev.txt)")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient (requirements-dev.txt)")
    pytest.importorskip("ipykernel", reason="needs ipykernel (requirements-dev.txt)")
    book = nbformat.read(LECTURE, as_version=4)
    nbclient.NotebookClient(book, timeout=1800, kernel_name="python3",
                            resources={"metadata": {"path": str(LECTURE.parent)}}).execute()
    kinds = lambda cell: [out["output_type"] for out in cell["outputs"]]
    tables = 0
    for new, old in zip(book.cells, cells(), strict=True):
        if new.cell_type == "code":
            assert kinds(new) == kinds(old)
            if "by hand" in printed(old):
                assert printed(new) == printed(old)
                tables += 1
    assert tables == 1
