"""Claim: generate() gives, token for token, what transformers' greedy generate gives, for prompts
of unequal length in one batch, and stops exactly where it should. Tolerance: none; ids are equal.

The planted mistakes at the end (positions that count the padding, a mask that shows it) are caught
by the same check.
"""
import os
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import quiet_transformers, tiny_model, transformers_twin
from lfu_min.files.checkpoint import load_model
from lfu_min.scoring.generate import choose, generate

module = sys.modules["lfu_min.scoring.generate"]  # not the function of that name
LENGTHS = (1, 7, 30, 12, 30, 3)


def some_prompts(lengths=LENGTHS, vocab=97, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=g).tolist() for n in lengths]


def theirs_one_by_one(twin, prompts, new, stop_ids=()):
    """transformers' greedy continuation of each prompt alone: no batch, no padding, so nothing to
    get wrong."""
    results = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = twin.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                                do_sample=False, eos_token_id=list(stop_ids) or None,
                                pad_token_id=0)[0, len(prompt):].tolist()
        ends = [i for i, token in enumerate(out) if token in stop_ids]
        results.append(out[:ends[0]] if ends else out)
    return results


@pytest.fixture(scope="module", params=[{},
                                        {"tie_word_embeddings": True, "num_key_value_heads": 4}],
                ids=["K<H", "K=H, tied"])
def pair(request):
    model = tiny_model(**request.param)
    twin = transformers_twin(model, **request.param)
    twin.generation_config.eos_token_id = None
    return model, twin


@pytest.mark.slow
def test_the_batch_equals_transformers_on_each_prompt_alone(pair):
    model, twin = pair
    expected = theirs_one_by_one(twin, some_prompts(), 40)
    assert generate(model, some_prompts(), 40) == expected
    assert generate(model, some_prompts(), 40, batch_size=2) == expected
    assert len(set(map(tuple, expected))) == len(LENGTHS), "rows that differ, to test their order"


@pytest.mark.slow
def test_a_stop_id_ends_its_row_alone_and_is_not_part_of_the_result(pair):
    model, twin = pair
    free = theirs_one_by_one(twin, some_prompts(), 40)
    # one row ends at once, others later, some perhaps never
    stop_ids = (free[2][0], free[0][5], free[3][20])
    expected = theirs_one_by_one(twin, some_prompts(), 40, stop_ids)
    assert generate(model, some_prompts(), 40, stop_ids) == expected
    assert expected[2] == [] and len({len(row) for row in expected}) > 2


def test_a_row_ends_where_the_models_positions_end():
    model = tiny_model(max_position_embeddings=32)
    rows = generate(model, some_prompts((30, 5, 32, 31)), 100)
    assert [len(row) for row in rows] == [2, 27, 0, 1]
    longer = generate(tiny_model(max_position_embeddings=256), some_prompts((30, 5, 32, 31)), 100)
    assert [b[:len(a)] for a, b in zip(rows, longer)] == rows


def test_finished_ends_a_row_and_sees_its_ids():
    model, seen = tiny_model(), []
    rows = generate(model, some_prompts(), 40,
                    finished=lambda ids: seen.append(list(ids)) or len(ids) == 3)
    assert [len(row) for row in rows] == [3] * len(LENGTHS)
    assert all(row in seen for row in rows)


def test_the_models_state_and_the_prompts_are_left_alone():
    model, prompts = tiny_model(), some_prompts()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    progress = []
    generate(model, prompts, 5, batch_size=4,
             on_progress=lambda done, total: progress.append((done, total)))
    assert prompts == some_prompts()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert progress == [(4, 6), (6, 6)]
    assert generate(model, [], 5) == [] and generate(model, prompts, 0) == [[]] * len(prompts)


def test_sampling_follows_the_probabilities_inside_the_nucleus_and_repeats_with_its_seed():
    logits = torch.log(torch.tensor([[0.15, 0.5, 0.05, 0.3]])).expand(4000, 4)
    draw = lambda t, p: choose(logits, t, p, torch.Generator().manual_seed(0))
    share = torch.bincount(draw(1.0, 1.0), minlength=4) / 4000
    assert (share - torch.tensor([0.15, 0.5, 0.05, 0.3])).abs().max() < 0.03  # 4 standard errors
    assert set(draw(1.0, 0.7).tolist()) == {1, 3} and set(draw(1.0, 0.5).tolist()) == {1}
    assert set(draw(1e-320, 1.0).tolist()) == set(draw(1.0, 1e-320).tolist()) == {1}
    hot, cold = (torch.bincount(draw(t, 1.0), minlength=4)[2] for t in (5.0, 0.2))
    assert hot > 4000 * 0.15 and cold == 0
    again = [generate(tiny_model(), some_prompts(), 9, temperature=1.0,
                      generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


@pytest.mark.parametrize("arguments, words", [
    (([[1], []], 5), "prompt 1"), (([[97]], 5), "0-96"), (([[-1]], 5), "0-96"),
    (([[1] * 257], 5), "256"), (([[1]], -1), "max_new_tokens = -1")])
def test_unusable_input_is_refused_by_name(arguments, words):
    with pytest.raises(ValueError, match=words):
        generate(tiny_model(), *arguments)
    with pytest.raises(ValueError, match="top_p"):
        generate(tiny_model(), [[1]], 1, top_p=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_gives_nan_or_inf_gives_no_tokens(bad):
    """argmax would take a NaN for the likeliest token. Here the second step meets it."""
    model = tiny_model()
    [first, _], = generate(model, [[3]], 2)
    assert first != 3
    with torch.no_grad():
        model.model.embed_tokens.weight[first] = bad
    assert generate(model, [[3]], 1) == [[first]]
    for temperature in (0.0, 1e-6):
        with pytest.raises(ValueError, match="prompt 1: the model's logits are NaN or infinite"):
            generate(model, [[4], [3]], 2, stop_ids=generate(model, [[4]], 1)[0],
                     temperature=temperature)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["positions count the padding", "the mask shows the padding"])
def test_planted_mistakes_are_caught(pair, mistake, monkeypatch):
    model, twin = pair
    def wrong(prompts, device, right=module.left_pad):
        ids, attend, positions = right(prompts, device)
        if mistake.startswith("positions"):  # RoPE sees differences alone: stretch, do not shift
            return ids, attend, positions + (positions > 0) * (~attend).sum(1, keepdim=True)
        return ids, torch.ones_like(attend), positions
    monkeypatch.setattr(module, "left_pad", wrong)
    assert generate(model, some_prompts(), 40) != theirs_one_by_one(twin, some_prompts(), 40)


def operations(run):
    """Floating point operations of run(): what a machine's mood does not change."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_it_takes_no_more_operations_than_transformers(pair):
    """Without the cache, or with logits of every position of the prompt, it would."""
    model, twin = pair
    prompts = some_prompts()
    ids, attend, _ = module.left_pad(prompts, "cpu")
    there = operations(lambda: twin.generate(
        ids, attention_mask=attend.long(), max_new_tokens=32, do_sample=False, eos_token_id=None,
        pad_token_id=0))
    assert 0 < operations(lambda: generate(model, prompts, 32)) <= there


@pytest.mark.slow
def test_smollm2_equals_transformers():
    path = os.environ.get("LFU_SMOLLM2")
    if not path:
        pytest.skip("LFU_SMOLLM2 names no folder with SmolLM2-135M-Instruct")
    transformers = quiet_transformers()
    from lfu_min.files.tokenizer import load_tokenizer
    tokenizer, model = load_tokenizer(path), load_model(path, dtype=torch.float32)
    twin = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    bags = "Tom has 3 bags with 4 apples in each and eats 2. How many are left?"
    texts = ["Question: What is 3 + 4?\nAnswer:", "The capital of France is",
             f"Question: {bags}\nAnswer:", "Once upon a time"]
    prompts = [tokenizer.encode(text) for text in texts]
    ours = generate(model, prompts, 48, tokenizer.eos_ids)
    assert ours == theirs_one_by_one(twin, prompts, 48, tokenizer.eos_ids)
