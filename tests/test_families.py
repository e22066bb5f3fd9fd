"""Mistral, Qwen 2.5 and Qwen 3 are what transformers computes, as test_model.py, test_lora.py and
test_checkpoint.py say of Llama; and the method's gradient is its definition's for each.

Tolerance: max|a - b| / max|b| <= 1e-5 in float32 (the definition: 1e-8 in float64), all weights
random, biases and norm gains included.
"""
import json
import os
from pathlib import Path
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
import torch

from conftest import (difference, next_token_loss, quiet_transformers, random_ids, randomise, TINY,
                      tiny_batch, tiny_model, transformers_twin)
from definitions import definition
from lfu_min import model as model_module
from lfu_min.cost import count
from lfu_min.files.adapter import export_merged, load_adapter, save_adapter
from lfu_min.files.checkpoint import (FAMILIES, config_to_dict, load_config, load_model,
                                      parse_config, save_model)
from lfu_min.lfu import lfu_step
from lfu_min.lora import TARGET_MODULES, add_lora
from lfu_min.methods import AUXILIARIES, lfu_backward
from lfu_min.model import Attention, Llama, rotate
from test_lora import logits_of, pair, peft_config, quiet_peft, with_random_lora
from test_model import their_states, twins

MEMBERS = {
    "Mistral": {"model_type": "mistral", "sliding_window": None},
    "Qwen 2.5": {"model_type": "qwen2", "head_dim": None, "rope_theta": 1e6,
                 "use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1},
    "Qwen 2.5, tied": {"model_type": "qwen2", "head_dim": None, "tie_word_embeddings": True},
    "Qwen 3": {"model_type": "qwen3", "rope_theta": 1e6, "attention_bias": False},
    "Qwen 3, tied, biases": {"model_type": "qwen3", "tie_word_embeddings": True,
                             "attention_bias": True},
}
every_member = pytest.mark.parametrize("changes", MEMBERS.values(), ids=MEMBERS.keys())
three = pytest.mark.parametrize("name", ["Mistral", "Qwen 2.5", "Qwen 3"])


# ---- the model ----

@every_member
def test_logits_states_and_gradients_equal_transformers(changes):
    ours, theirs = twins({**changes, "num_hidden_layers": 2})
    ids = random_ids()
    reference = their_states(theirs, ids)
    forward = max(difference(ours(ids), reference.logits),
                  difference(ours.hidden_states(ids), reference.hidden_states))
    next_token_loss(ours(ids), ids).backward()
    next_token_loss(reference.logits, ids).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    backward = difference({name: p.grad for name, p in ours.named_parameters()}, expected)
    print(f"difference {forward:.1e}, of gradients {backward:.1e}")
    assert max(forward, backward) <= 1e-5


def norm_behind_rope(ours, monkeypatch):
    def forward(self, y, norm=None):
        return y.view(*y.shape[:2], -1, self.head_dim).transpose(1, 2)
    norms = {}
    def late(x, cos, sin):
        x = rotate(x, cos, sin)
        attention = ours.model.layers[norms.setdefault("calls", 0) // 2].self_attn
        norm = attention.q_norm if norms["calls"] % 2 == 0 else attention.k_norm
        norms["calls"] += 1
        return norm(x)
    monkeypatch.setattr(Attention, "heads", forward)
    monkeypatch.setattr(model_module, "rotate", late)


def norm_over_all_heads(ours, monkeypatch):
    def heads(self, y, norm=None):
        z = y if norm is None else torch.nn.functional.rms_norm(y, y.shape[-1:], eps=norm.eps)
        z = z.view(*y.shape[:2], -1, self.head_dim)
        return (z if norm is None else z * norm.weight).transpose(1, 2)
    monkeypatch.setattr(Attention, "heads", heads)


def norms_of_q_and_k_swapped(ours, monkeypatch):
    for block in ours.model.layers:
        a = block.self_attn
        a.q_norm, a.k_norm = a.k_norm, a.q_norm


def no_norm(ours, monkeypatch):
    for block in ours.model.layers:
        block.self_attn.q_norm = block.self_attn.k_norm = None


def bias_dropped(leaf):
    def drop(ours, monkeypatch):
        for block in ours.model.layers:
            getattr(block.self_attn, leaf).bias = None
    drop.__name__ = f"bias_of_{leaf}_dropped"
    return drop


MISTAKES = [("Qwen 3", mistake) for mistake in (norm_behind_rope, norm_over_all_heads,
                                                norms_of_q_and_k_swapped, no_norm)]
MISTAKES += [("Qwen 2.5", bias_dropped(leaf)) for leaf in ("q_proj", "k_proj", "v_proj")]


@pytest.mark.parametrize("name, mistake", MISTAKES, ids=lambda x: getattr(x, "__name__", x))
def test_a_planted_mistake_breaks_parity(name, mistake, monkeypatch):
    ours, theirs = twins(MEMBERS[name])
    ids = random_ids()
    mistake(ours, monkeypatch)
    with torch.no_grad():
        assert difference(ours(ids), their_states(theirs, ids).logits) > 1e-3


def test_qwen_3_decodes_with_a_cache_as_in_the_full_pass():
    ours, ids = tiny_model(**MEMBERS["Qwen 3"]), random_ids(T=40)
    with torch.no_grad():
        cache = [None] * 3
        pieces = [ours(ids[:, a:b], cache=cache) for a, b in ((0, 30), (30, 31), (31, 40))]
        assert difference(torch.cat(pieces, dim=1), ours(ids)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_q_and_k_are_computed_in_float32(dtype):
    ours, seen = tiny_model(dtype=dtype, **MEMBERS["Qwen 3"]), set()
    for block in ours.model.layers:
        for norm in (block.self_attn.q_norm, block.self_attn.k_norm):
            norm.register_forward_hook(lambda m, inputs, out: seen.update({inputs[0].dtype,
                                                                           out.dtype}))
    states = ours.hidden_states(random_ids(T=20))
    assert seen == {torch.float32} and {h.dtype for h in states} == {torch.float32}


# ---- config.json ----

def test_a_window_as_long_as_the_text_changes_nothing_and_longer_texts_are_not_taken():
    """Mistral 7B v0.1: a window of 4096, 32768 positions. What is longer than the window would be
    something else in transformers, so the window is all that a model takes here."""
    changes = {"model_type": "mistral", "sliding_window": 40}
    ours, theirs = twins(changes)
    assert ours.config.max_position_embeddings == 40
    ids = random_ids(T=41)
    with torch.no_grad():
        assert difference(ours(ids[:, :40]), theirs(ids[:, :40]).logits) <= 1e-5
        assert difference(ours(ids)[:, -1], theirs(ids).logits[:, -1]) > 1e-3  # teeth
    assert parse_config({**TINY, **changes, "sliding_window": None}).max_position_embeddings == 256
    assert parse_config({**TINY, **changes, "sliding_window": 999}).max_position_embeddings == 256
    for window in (0, "4096", 2.5, True, -1):
        with pytest.raises(ValueError, match="sliding_window = "):
            parse_config({**TINY, **changes, "sliding_window": window})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_fields_take_the_defaults_of_transformers(model_type):
    required = {name: TINY[name] for name in ("vocab_size", "intermediate_size",
                                              "num_hidden_layers")}
    required |= {"hidden_size": 256, "num_attention_heads": 32}
    config = parse_config({"model_type": model_type, **required})
    theirs = getattr(quiet_transformers(), FAMILIES[model_type].architecture).config_class(
        **required)
    assert config.num_key_value_heads == theirs.num_key_value_heads
    assert config.head_dim == (getattr(theirs, "head_dim", None) or 8)
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.rope_theta == (getattr(theirs, "rope_theta", None)  # transformers 4
                                 or theirs.rope_parameters["rope_theta"])
    window = getattr(theirs, "sliding_window", None) or theirs.max_position_embeddings
    assert config.max_position_embeddings == min(theirs.max_position_embeddings, window)


@every_member
def test_what_is_written_means_the_same(changes):
    config = parse_config({**TINY, **changes})
    raw = config_to_dict(config)
    assert parse_config(raw) == config and raw["model_type"] == changes["model_type"]
    assert raw["architectures"] == [FAMILIES[changes["model_type"]].architecture]
    config.qk_norm = not config.qk_norm  # a Mistral with norms, a Qwen 3 without
    with pytest.raises(ValueError, match="cannot be like") as error:
        config_to_dict(config)
    assert "\n" not in str(error.value)


# ---- folders, in both directions ----

@every_member
def test_folders_give_the_same_logits_in_both_directions(tmp_path, changes):
    transformers, ids = quiet_transformers(), random_ids(T=30)
    theirs = transformers_twin(**changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert difference(logits_of(ours, ids), logits_of(theirs, ids)) <= 1e-5
    save_model(ours, tmp_path / "ours")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True)
    assert type(again) is type(theirs) and not any(report.values()), report
    assert difference(logits_of(again, ids), logits_of(theirs, ids)) <= 1e-5
    assert torch.equal(logits_of(load_model(tmp_path / "ours"), ids), logits_of(ours, ids))


@three
def test_the_merged_folder_gives_the_same_logits_in_transformers(tmp_path, name):
    ids, changes = random_ids(T=30), MEMBERS[name]
    transformers_twin(**changes).save_pretrained(tmp_path / "base")
    model = with_random_lora(load_model(tmp_path / "base"))
    export_merged(model, tmp_path / "base", tmp_path / "merged")
    theirs = quiet_transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert theirs.config.model_type == changes["model_type"]
    assert difference(logits_of(theirs, ids), logits_of(model, ids)) <= 1e-5
    base = load_model(tmp_path / "base")
    assert difference(logits_of(base, ids), logits_of(model, ids)) > 1e-3  # teeth: not merged


@pytest.mark.parametrize("name", ["Qwen 2.5", "Qwen 3"])
def test_a_missing_bias_or_norm_is_named(tmp_path, name):
    save_model(tiny_model(**MEMBERS[name]), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {key: t for key, t in load_file(file).items()
               if not key.endswith(("k_proj.bias", "k_norm.weight"))}
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"missing model.layers.0.self_attn.k_(proj.bias|norm)"):
        load_model(tmp_path)


# ---- adapters ----

@pytest.mark.slow
@three
def test_adapters_are_pefts_in_both_directions(tmp_path, name):
    peft, ids, changes = quiet_peft(), random_ids(T=30), MEMBERS[name]
    ours, theirs = pair({}, **changes)
    worst = difference(logits_of(ours, ids), logits_of(theirs, ids))
    print(f"difference {worst:.1e}")
    assert worst <= 1e-5
    save_adapter(ours, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(transformers_twin(tiny_model(**changes), **changes),
                                            str(tmp_path / "ours"))
    assert difference(logits_of(loaded, ids), logits_of(ours, ids)) <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(tiny_model(**changes), tmp_path / "theirs")
    assert torch.equal(logits_of(loaded, ids), logits_of(ours, ids))
    keys = set(load_file(tmp_path / "ours" / "adapter_model.safetensors"))
    assert len(keys) == 2 * 3 * len(TARGET_MODULES)
    with torch.no_grad():  # teeth
        ours.model.layers[0].self_attn.k_proj.lora_B.zero_()
    assert difference(logits_of(ours, ids), logits_of(theirs, ids)) > 1e-3


# ---- the method ----

def smaller(name, tune):
    """A tiny random member in float64, to be trained; no LoRA's B is zero."""
    config = parse_config({**TINY, **MEMBERS[name], "vocab_size": 29, "hidden_size": 16,
                           "intermediate_size": 20, "head_dim": 4, "rms_norm_eps": 1e-5})
    model = Llama(config)
    if tune == "lora":
        add_lora(model, r=2, lora_alpha=3)
    return randomise(model).double()


@three
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("aux", AUXILIARIES)
def test_the_gradient_of_a_step_equals_the_definition(aux, tune, name):
    model, batch = smaller(name, tune), tiny_batch()
    expected, values, _ = definition(model, *batch, aux)
    result = lfu_backward(model, *batch, aux=aux, generator=torch.Generator().manual_seed(7))
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    worst = difference(got, expected)
    print(f"{name}, {aux}, {tune}: difference {worst:.1e}")
    assert worst <= 1e-8 and result["consistency"].item() == pytest.approx(values["consistency"])
    if tune == "full":  # biases and norms learn, too
        assert all(got[n].norm() > 0 for n, _ in model.named_parameters())
    wrong, _, _ = definition(model, *batch, aux, mistake="detach on the other side")
    assert difference(got, wrong) > 1e-3  # teeth


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen 2.5", "Qwen 3"])
def test_counting_and_running_agree_to_the_byte(name):
    config = parse_config({**TINY, **MEMBERS[name], "num_hidden_layers": 1})
    with count.Meter() as real:
        model = count.prepared_model(config, "full", torch.float16)
        lfu_step(model, count.half_supervised(2, 24, torch.float16))
    assert count.count_step(config, lfu_step, 2, 24, "full", torch.float16)[2] == real.peak


# ---- weights that are no safetensors ----

def other_format(folder, name):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    (folder / name).write_bytes(b"weights")
    return folder


@pytest.mark.parametrize("name, words", [
    ("pytorch_model.bin", "M.from_pretrained('{}').save_pretrained('{}')"),
    ("pytorch_model-00001-of-00002.bin", "M.from_pretrained('{}').save_pretrained('{}')"),
    ("x-Q8_0.gguf", "M.from_pretrained('{}', gguf_file='x-Q8_0.gguf').save_pretrained('{}')"),
    ("consolidated.00.pth", "--input_dir '{}' --output_dir '{}-hf' --num_shards 1 --ll")])
def test_other_formats_are_refused_with_the_command_that_converts_them(tmp_path, name, words):
    folder = other_format(tmp_path / "m", name)
    (tmp_path / "m" / "config.json").unlink()  # the format comes first
    for path in (folder, folder / name):
        with pytest.raises(ValueError, match="is not safetensors; to convert it, in a") as error:
            load_config(path)
        assert words.format(folder, folder) in str(error.value) and name in str(error.value)
        assert "\n" not in str(error.value)
    save_model(tiny_model(), folder)  # both: safetensors are what counts
    load_model(folder)


def command_of(folder):
    with pytest.raises(ValueError) as error:
        load_model(folder)
    return str(error.value).partition("pip install transformers && ")[2]


@pytest.mark.slow
@three
def test_the_command_for_bin_makes_a_folder_that_loads(tmp_path, name):
    quiet_transformers()
    theirs = transformers_twin(**MEMBERS[name])
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    done = subprocess.run(command_of(tmp_path), shell=True, capture_output=True, text=True,
                          env={**os.environ, "PATH": f"{Path(sys.executable).parent}:"
                                                     f"{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr
    ids = random_ids(T=30)
    assert difference(logits_of(load_model(tmp_path), ids), logits_of(theirs, ids)) <= 1e-5
