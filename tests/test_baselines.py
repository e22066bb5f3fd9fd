"""Claim: every baseline and ablation that train.py offers (--method) does what its definition says
(baseline_definitions.py, 1e-8 in float64), and zero strength is plain SFT, bit for bit.

The tests run over the dictionary BASELINES: a new entry is tested by being there, and fails by name
until its definition is written. For each one a planted mistake shows that it would be seen.
"""
import inspect

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from baseline_definitions import DEFINITIONS, MISTAKES, noise, weights
from conftest import difference, quiet_transformers, tiny, tiny_batch, transformers_twin
from definitions import l_sft, run
from lfu_min.bundled import BUNDLED
from lfu_min.engine import passes
from lfu_min.files import data
from lfu_min.files.checkpoint import load_model
from lfu_min.files.tokenizer import load_tokenizer
from lfu_min.methods import BASELINES, backward, baselines, lfu_backward, prompt_examples
from lfu_min.methods.baselines import embedding_noise, real_lengths
from lfu_min.methods.by_name import SETTINGS
from lfu_min.training import sdft

LENGTHS = [9, 7, 9]  # real tokens of tiny_batch's rows, of 9
ZERO = {"neftune": dict(alpha=0.0), "sam": dict(rho=0.0), "l1": dict(lam=0.0),
        "l2": dict(lam=0.0), "logit_kl": dict(lam=0.0), "attached": dict(lam=0.0)}
STRONG = {"neftune": dict(alpha=9.0), "gem": dict(beta=0.5, h="linear"), "sam": dict(rho=0.3),
          "l1": dict(lam=2.0), "l2": dict(lam=0.7), "logit_kl": dict(lam=3.0, alpha=0.3),
          "attached": dict(lam=3.0, alpha=0.3)}


def generator(seed=7):
    return torch.Generator().manual_seed(seed)


def added(name, model, ids, labels, seed=7, **settings):
    """({name: gradient}, values) of backward from empty .grad."""
    model.zero_grad()
    values = backward(name, model, ids, labels, generator(seed), **settings)
    return grads(model), values


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def defined(name, model, ids, labels, seed=7, lengths=LENGTHS, mistake=None, **settings):
    return DEFINITIONS[name](model, ids, labels, lengths, generator(seed), mistake, **settings)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ---- each against its definition ----

def test_every_baseline_has_a_definition_and_a_planted_mistake():
    for written in (DEFINITIONS, MISTAKES):
        lacking = BASELINES.keys() ^ written.keys()
        assert not lacking, f"{', '.join(lacking)}: write it out in baseline_definitions.py"
    assert SETTINGS.keys() == {*BASELINES, "lfu"}


@pytest.mark.parametrize("settings", ["default", "strong"])
@pytest.mark.parametrize("tune", ["lora", "full", "tied"])
@pytest.mark.parametrize("name", BASELINES)
def test_gradient_and_loss_equal_the_definition(name, tune, settings):
    model, batch = tiny(tune), tiny_batch()
    settings = STRONG.get(name, {}) if settings == "strong" else {}
    loss, expected = defined(name, model, *batch, **settings)
    got, values = added(name, model, *batch, **settings)
    assert difference(got, expected) <= 1e-8
    assert values["loss"].item() == pytest.approx(loss.item(), rel=1e-10)
    assert all(value.dtype == torch.float64 and not value.requires_grad
               for value in values.values())


@pytest.mark.slow
@pytest.mark.parametrize("name, mistake", [(n, m) for n in MISTAKES for m in MISTAKES[n]])
def test_planted_mistake_is_seen(name, mistake):
    model, batch = tiny(), tiny_batch()
    got, _ = added(name, model, *batch)
    with sdpa_kernel(SDPBackend.MATH):  # second derivatives, which only this one has
        wrong, right = (defined(name, model, *batch, mistake=m)[1] for m in (mistake, None))
    assert difference(got, right) <= 1e-8 and difference(got, wrong) > 1e-5


@pytest.mark.parametrize("name", BASELINES)
def test_the_values_beside_the_loss(name):
    """sft is l_SFT of the model as it stands, except where the method is another model or data."""
    model, (ids, labels) = tiny(), tiny_batch()
    got, values = added(name, model, ids, labels)
    plain = l_sft(run(model, ids)[1], labels).item()
    if name in ("neftune", "prompt"):
        assert values["sft"] == values["loss"] and abs(values["sft"].item() - plain) > 1e-4
    else:
        assert values["sft"].item() == pytest.approx(plain, rel=1e-10)
    if name in ("sft", "neftune", "prompt", "sam"):
        assert values["sft_grad_norm"].item() == pytest.approx(
            passes.joint_norm(list(got.values())).item(), rel=1e-10)
    if name in ("l1", "l2"):
        assert values["loss"] == values["sft"] + 5.0 * values["penalty"] > values["sft"]
    if name == "sam":  # to first order the loss rises by rho * ||g||
        rise = added(name, model, ids, labels, rho=1e-5)[1]["loss"].item() - plain
        assert rise == pytest.approx(1e-5 * values["ascent_norm"].item(), rel=0.01)


# ---- what every step leaves alone ----

@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("name", SETTINGS)
def test_weights_hooks_and_the_global_generator_stay(name, tune):
    model, batch = tiny(tune, torch.float32), tiny_batch()
    before, state = {n: w.clone() for n, w in model.state_dict().items()}, torch.get_rng_state()
    modules = [type(m) for m in model.modules()]
    added(name, model, *batch)
    assert equal(dict(model.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), state), "draws from torch's global generator"
    assert [type(m) for m in model.modules()] == modules
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["neftune", "sam"])
def test_an_exception_on_the_way_leaves_nothing_behind(name, monkeypatch):
    model, batch, calls = tiny(), tiny_batch(), []

    def fails_at_last(*args):
        calls.append(args)
        if len(calls) == (2 if name == "sam" else 1):
            raise RuntimeError("planted")
        return passes.sft_loss(*args)
    monkeypatch.setattr(baselines, "sft_loss", fails_at_last)
    before = {n: w.clone() for n, w in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="planted"):
        added(name, model, *batch)
    assert equal(dict(model.state_dict()), before) and not grads(model)
    assert not model.model.embed_tokens._forward_hooks


@pytest.mark.parametrize("name", BASELINES)
def test_gradients_add_to_what_is_there(name):
    model, one, two = tiny(), tiny_batch(1), tiny_batch(2)
    (first, _), (second, alone) = added(name, model, *one), added(name, model, *two)
    added(name, model, *one)
    on_top = backward(name, model, *two, generator())
    assert equal(grads(model), {n: first[n] + second[n] for n in first})
    assert equal(on_top, alone) and difference(second, first) > 0.1


@pytest.mark.parametrize("name", BASELINES)
def test_batches_without_targets_add_zero(name):
    model, (ids, labels) = tiny("tied"), tiny_batch()
    before, _ = added(name, model, ids, labels)
    values = backward(name, model, ids, torch.full_like(labels, -100), generator())
    assert equal(grads(model), before)
    assert all(value.count_nonzero() == 0 for value in values.values())  # nan counts as nonzero


@pytest.mark.parametrize("name", ZERO)
def test_zero_strength_is_plain_sft(name):
    for tune, dtype in (("lora", torch.float64), ("full", torch.float32)):
        model, batch = tiny(tune, dtype), tiny_batch()
        got, values = added(name, model, *batch, **ZERO[name])
        expected, plain = added("sft", model, *batch)
        if name in ("logit_kl", "attached"):  # the wider LoRA branch may add in another order
            near = 1e-12 if dtype == torch.float64 else 1e-5
            for key, own in expected.items():
                assert (got[key] - own).abs().max() <= near * own.abs().max(), key
            assert values["loss"].item() == pytest.approx(plain["loss"].item(), rel=near)
        else:
            assert equal(got, expected) and values["loss"] == plain["loss"]


@pytest.mark.parametrize("name", BASELINES)
def test_padding_and_a_row_without_targets_change_nothing(name):
    """One row more and three columns more. (NEFTune draws for every position, so other numbers.)"""
    model, (ids, labels) = tiny(), tiny_batch()
    wide, wide_labels = torch.full((4, 12), 5), torch.full((4, 12), -100)
    wide[:3, :9], wide_labels[:3, :9] = ids, labels
    settings = dict(alpha=0.0) if name == "neftune" else {}
    got = added(name, model, wide, wide_labels, **settings)[0]
    assert difference(got, added(name, model, ids, labels, **settings)[0]) <= 1e-10


@pytest.mark.parametrize("name", BASELINES)
def test_micro_batches_add_up_to_the_step(name):
    """With the step's divisor (and lam / 2) two micro-batches give the mean loss over all tokens:
    the gradient of the definition, its divisor and lam changed alike."""
    model, lam = tiny(), {"lam": 2.5} if "lam" in SETTINGS[name] else {}
    total, expected = 0, {}
    model.zero_grad()
    batches = [passes.make_batch(*tiny_batch(seed), divisor=40, generator=generator(seed))
               for seed in (1, 2)]
    results = [BASELINES[name](model, batch, **lam) for batch in batches]
    got = grads(model)
    for seed, batch in zip((1, 2), batches):
        model.zero_grad()
        batch.divisor, batch.generator = len(batch.targets), generator(seed)
        share = batch.divisor / 40
        scaled = {"lam": 2.5 / share} if lam else {}
        result = BASELINES[name](model, batch, **scaled)
        total += share * result.get("loss", result["sft"]).item()
        expected = {n: share * g + expected.get(n, 0) for n, g in grads(model).items()}
    assert difference(got, expected) <= 1e-10
    assert sum(r.get("loss", r["sft"]) for r in results).item() == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("name", BASELINES)
def test_float16s_loss_scale_is_divided_out(name):
    """What reaches .grad is the same at any loss scale."""
    model, got = tiny("lora", torch.float32), []
    for scale in (1.0, 512.0):
        model.zero_grad()
        BASELINES[name](model, passes.make_batch(*tiny_batch(), loss_scale=scale,
                                                 generator=generator()))
        got.append(grads(model))
    assert difference(*got) <= 1e-4


# ---- NEFTune ----

def test_noise_has_the_real_length_per_row_and_none_on_padding():
    model, batch = tiny(), passes.make_batch(*tiny_batch(), generator=generator())
    assert real_lengths(batch).tolist() == LENGTHS
    got = embedding_noise(model, batch, alpha=5.0)
    assert difference(got, noise((3, 9, 16), LENGTHS, generator(), 5.0, torch.float64)) <= 1e-14
    assert got[1, 7:].count_nonzero() == 0 and got[1, :7].count_nonzero() == 7 * 16
    bound = 5 / (7 * 16) ** 0.5  # row 1's own length, not the batch's
    assert 0.9 * bound < got[1].abs().max() <= bound
    batch.generator = generator()
    padded = embedding_noise(model, batch, alpha=5.0, padded=True)
    assert difference(padded, noise((3, 9, 16), [9, 9, 9], generator(), 5.0,
                                    torch.float64)) <= 1e-14


def test_noise_has_neftunes_length():
    """E ||noise||^2 = alpha^2 / 3, whatever the length and width."""
    model = tiny()
    ids = torch.zeros(4, 200, dtype=torch.int64)
    labels = torch.where(torch.arange(200) < torch.tensor([[50], [100], [150], [200]]), ids, -100)
    got = embedding_noise(model, passes.make_batch(ids, labels, generator=generator()), alpha=6.0)
    assert got.flatten(1).norm(dim=1) == pytest.approx(torch.full((4,), 12.0 ** 0.5), rel=0.05)


def test_every_micro_batch_draws_anew():
    model, batch = tiny(), passes.make_batch(*tiny_batch(), generator=generator())
    assert difference(embedding_noise(model, batch, 5.0), embedding_noise(model, batch, 5.0)) > 0.1


def test_an_attention_mask_says_what_is_padding():
    """A row may end in tokens that are not supervised: without the mask they count as padding."""
    model, (ids, labels) = tiny(), tiny_batch()
    mask = torch.ones_like(ids)
    mask[2, 8:] = 0
    labels[2, 8:] = -100
    lengths = [9, 9, 8]  # row 1 ends in two tokens of another turn
    for name in ("neftune", "prompt"):
        expected = defined(name, model, ids, labels, lengths=lengths)[1]
        assert difference(added(name, model, ids, labels, attention_mask=mask)[0], expected) <= 1e-8
        assert difference(added(name, model, ids, labels)[0], expected) > 1e-3
        assert difference(added(name, model, ids, labels)[0],
                          defined(name, model, ids, labels, lengths=[9, 7, 8])[1]) <= 1e-8
    with pytest.raises(ValueError, match="on the right"):
        added("neftune", model, ids, labels, attention_mask=mask.flip(1))
    with pytest.raises(ValueError, match="shape"):
        added("prompt", model, ids, labels, attention_mask=mask[:, :8])
    for name in ("lfu", "sam"):  # what asks nothing of the mask looks at it all the same
        with pytest.raises(ValueError, match="on the right"):
            added(name, model, ids, labels, attention_mask=mask.flip(1).tolist())


@pytest.mark.slow
def test_the_padded_form_is_transformers_hook():
    """integrations/neftune.py on the same weights, with the same random numbers."""
    quiet_transformers()
    from transformers.integrations.neftune import activate_neftune
    model, (ids, labels) = tiny("full", torch.float32), tiny_batch()
    theirs = transformers_twin(model).train()
    activate_neftune(theirs, 5.0)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        loss = theirs(input_ids=ids, labels=labels).loss
    loss.backward()
    got, values = added("neftune", model, ids, labels, alpha=5.0, padded=True)
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    assert difference(got, expected) <= 1e-4
    assert values["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert difference(added("neftune", model, ids, labels, alpha=5.0)[0], expected) > 1e-2


@pytest.mark.parametrize("name", BASELINES)
def test_activation_checkpointing_changes_nothing(name):
    """A block that runs again must see the noise and the auxiliary LoRA of its first run."""
    model, batch = tiny(), tiny_batch()
    got, _ = added(name, model, *batch)
    model.activation_checkpointing = True
    assert difference(added(name, model, *batch)[0], got) <= 1e-10
    assert model.activation_checkpointing


# ---- instruction modelling ----

def test_prompt_examples_train_every_token_but_the_padding():
    examples = [([1, 5, 6, 2], [-100, -100, 6, 2]), ([1, 4, 2], [-100, 4, 2])]
    ids, labels = data.collate(prompt_examples(examples), pad_id=2)
    assert labels.tolist() == [[1, 5, 6, 2], [1, 4, 2, -100]]
    assert examples[0][1] == [-100, -100, 6, 2]  # the caller's list is as it was


def test_prompt_by_name_is_the_data_step():
    model, (ids, labels) = tiny(), tiny_batch()
    examples = [(ids[b, :n].tolist(), labels[b, :n].tolist()) for b, n in enumerate(LENGTHS)]
    batch = passes.make_batch(*data.collate(prompt_examples(examples), pad_id=0))
    got, values = added("prompt", model, ids, labels)
    model.zero_grad()
    result = BASELINES["prompt"](model, batch)
    assert difference(grads(model), got) <= 1e-12
    assert result["sft"].item() == pytest.approx(values["loss"].item(), rel=1e-12)


# ---- GEM ----

def test_gem_linear_has_the_gradient_of_beta_times_a_sharpened_cross_entropy():
    """d/dz_j = q_j - [j = y], that of beta * CE(z / beta, y); at beta = 1 plain SFT's."""
    model, (ids, labels) = tiny("full"), tiny_batch()
    for beta in (0.3, 0.7, 1.0):
        sharpened = beta * l_sft(run(model, ids)[1] / beta, labels)
        expected = dict(zip(weights(model), torch.autograd.grad(sharpened,
                                                                list(weights(model).values()))))
        got, _ = added("gem", model, ids, labels, beta=beta, h="linear")
        assert difference(got, expected) <= 1e-10
    assert difference(got, added("sft", model, ids, labels)[0]) <= 1e-10


@pytest.mark.parametrize("h", ["linear", "logsigmoid"])
def test_gems_gradient_of_the_logits(h):
    """q_j w_j - [j = y] sum_i q_i w_i, with a head that hands the logits through."""
    z = torch.randn(4, 29, dtype=torch.float64, generator=generator()).requires_grad_()
    y = torch.tensor([3, 0, 28, 3])
    head = torch.nn.Module()
    head.lm_head = torch.nn.Identity()
    loss, nll = baselines.gem_sums(head, z, y, 0.7, h)
    got, = torch.autograd.grad(loss, z)
    q = (z.detach() / 0.7).softmax(-1)
    w = torch.sigmoid(0.01 * (z.detach() - z.detach()[range(4), y][:, None]))
    w = w if h == "logsigmoid" else torch.ones_like(w)
    expected = q * w
    expected[range(4), y] -= (q * w).sum(-1)
    assert difference(got, expected) <= 1e-14
    assert nll.item() == pytest.approx(torch.nn.functional.cross_entropy(z, y, reduction="sum")
                                       .item())


@pytest.mark.parametrize("tune", ["lora", "tied"])
def test_gem_in_chunks_is_gem(tune, monkeypatch):
    """And no more logits than a chunk's exist at one time."""
    model, batch, rows = tiny(tune), tiny_batch(), []
    whole, _ = added("gem", model, *batch)
    model.lm_head.register_forward_hook(lambda head, x, z: rows.append(len(z)))
    for chunk in (3, 7):
        monkeypatch.setattr(passes, "HEAD_CHUNK", chunk)
        rows.clear()
        assert difference(added("gem", model, *batch)[0], whole) <= 1e-10
        assert max(rows) == chunk and sum(rows) == 2 * 17  # forward, and again in the backward


# ---- names and settings ----

@pytest.mark.parametrize("aux", ["lora", "reps", "inplace", "none"])
def test_lfu_by_name_is_lfu(aux):
    model, batch = tiny(), tiny_batch()
    settings = dict(aux=aux, lam=3.0, alpha=0.2, layers="2-3")
    got, values = added("lfu", model, *batch, **settings)
    model.zero_grad()
    result = lfu_backward(model, *batch, generator=generator(), **settings)
    assert equal(grads(model), got)
    assert values["loss"] == result["sft"] + 3.0 * result["consistency"]


def test_defaults_by_name_are_the_steps():
    defaults = {name: inspect.signature(step).parameters for name, step in BASELINES.items()}
    assert {(n, s): defaults[n][s].default for n in BASELINES for s in SETTINGS[n]} == {
        ("neftune", "alpha"): 5.0, ("neftune", "lengths"): None, ("neftune", "padded"): False,
        ("gem", "beta"): 0.7, ("gem", "h"): "logsigmoid", ("sam", "rho"): 0.05,
        ("l1", "lam"): 5.0, ("l2", "lam"): 5.0, ("logit_kl", "lam"): 5.0,
        ("logit_kl", "alpha"): 0.1, ("attached", "lam"): 5.0, ("attached", "alpha"): 0.1}


@pytest.mark.parametrize("name, settings, named", [
    ("adam", {}, "'adam'"), ("SAM", {}, "'SAM'"), ("sam", dict(alpha=0.1), "'alpha'"),
    ("sft", dict(lam=1.0), "'lam'"), ("neftune", dict(alpha=-1), "alpha = -1"),
    ("neftune", dict(alpha=float("nan")), "alpha = nan"), ("gem", dict(beta=0), "beta = 0"),
    ("gem", dict(beta="x"), "beta = 'x'"), ("gem", dict(h="relu"), "'relu'"),
    ("sam", dict(rho=float("inf")), "rho = inf"), ("l1", dict(lam=-0.5), "lam = -0.5"),
    ("lfu", dict(rho=1), "'rho'"), ("lfu", dict(aux="sam"), "'sam'"),
    ("lfu", dict(layers="0-9"), "'0-9'")])
def test_unknown_names_and_settings_are_refused_in_one_line(name, settings, named):
    model, batch = tiny(), tiny_batch()
    with pytest.raises(ValueError) as error:
        added(name, model, *batch, **settings)
    assert named in str(error.value) and "\n" not in str(error.value)
    assert not grads(model)


def test_sam_refuses_weights_that_would_round_its_step_away():
    model = tiny("full", torch.bfloat16)
    with pytest.raises(ValueError, match="float32"):
        added("sam", model, *tiny_batch())


# ---- SDFT ----

@pytest.mark.parametrize("text, reference, taken", [
    ("3 + 4 makes 7", "3 + 4 = 7\n#### 7", True), ("It is 7.0", "#### 7", True),
    ("It is 1,007.", "#### 1007", True), ("It is $7.", "It costs $7.", True),
    ("It is 8", "#### 7", False), ("7, or 8", "#### 7", False), ("seven", "#### 7", False),
    ("-7", "#### 7", False), ("no number at all", "It is cold", True),
    ("in 12 words", "It had 7 and was cold", True), ("", "It is cold", False),
    (" \n", "It is cold", False), ("The Reference Answer is 7", "#### 7", False),
    ("Now it's your turn: 7", "#### 7", False), ("Your turn. 7", "#### 7", False),
    ("It is your turn, 7", "#### 7", True), ("MY RESPONSE: 7", "#### 7", False)])
def test_which_rewrites_are_accepted(text, reference, taken):
    assert sdft.accepted(text, reference) == taken


def test_accepted_rewrites_replace_answers_and_are_counted(monkeypatch):
    model, tokenizer = load_model(BUNDLED, dtype=torch.float32), load_tokenizer(BUNDLED)
    examples = [data.Example(f"What is {i} + 1?", f"#### {i + 1}") for i in range(4)]
    examples.append(data.Example("long " * 600, "#### 5"))
    replies, seen = [" It makes 1. ", "It makes 3.", "", "All of the time it makes 4", "5"], []

    def generated(model, prompts, max_new_tokens, stop_ids, **settings):
        seen.extend(prompts)
        assert stop_ids == tokenizer.eos_ids and max_new_tokens == limit
        assert all(len(ids) <= model.config.max_position_embeddings for ids in prompts)
        return [tokenizer.encode(reply)[:max_new_tokens] for reply in replies]
    monkeypatch.setattr(sdft, "generate", generated)
    limit = len(tokenizer.encode(replies[3]))
    for limit, kept in ((limit + 1, {0: "It makes 1.", 3: replies[3]}),
                        (limit, {0: "It makes 1."})):  # the last one is cut off, maybe
        got, count = sdft.rewrite(model, tokenizer, examples, max_new_tokens=limit)
        assert count == len(kept)
        assert got == [e._replace(answer=kept.get(i, e.answer)) for i, e in enumerate(examples)]
    prompt = tokenizer.decode(seen[2])
    assert "What is 2 + 1?" in prompt and "#### 3" in prompt and prompt.endswith("\nAnswer:")


def test_a_rewritten_file_can_be_trained_on(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"question": "What is 1 + 1?", "answer": "So {2}"}\n' * 3)
    arguments = ["--data", str(tmp_path / "in.jsonl"), "--max-new-tokens", "8", "--device", "cpu"]
    examples, kept = sdft.main([*arguments, "--out", str(tmp_path / "out.json")])
    assert data.read_examples(tmp_path / "out.json") == examples and len(examples) == 3
    assert f"{kept} of 3 answers" in capsys.readouterr().out
    with pytest.raises(ValueError, match=".json file"):
        sdft.main([*arguments, "--out", str(tmp_path / "out.txt")])
    before = (tmp_path / "out.json").read_bytes()
    with pytest.raises(ValueError, match="--out .* is --data itself"):
        sdft.main(["--data", str(tmp_path / "out.json"), "--out", str(tmp_path / "out.json")])
    assert (tmp_path / "out.json").read_bytes() == before
