"""A folder in Hugging Face's form is read strictly or not at all, and what is written can be read
by transformers.

Weights must come back bit for bit; logits are compared with transformers' at max|a - b| / max|b| <=
1e-5 in float32.
"""
import copy
import json
import math
import os
from pathlib import Path
import shutil
import signal
import struct
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
import torch

from conftest import (difference, LLAMA3_ROPE, quiet_transformers, random_ids, TINY, tiny,
                      tiny_model, transformers_twin)
import train
from lfu_min.bundled import BUNDLED
from lfu_min.files import checkpoint
from lfu_min.files.adapter import export_merged, load_adapter, save_adapter
from lfu_min.files.checkpoint import (config_to_dict, load_config, load_model, parse_config,
                                      random_model, save_model)
from lfu_min.lora import add_lora, lora_modules
from lfu_min.model import LlamaConfig

ROPE = {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}


def v5_form(raw):
    """The same config.json as transformers 5 writes it."""
    rest = {name: value for name, value in raw.items()
            if name not in ("rope_theta", "rope_scaling")}
    scaling = raw.get("rope_scaling") or {"rope_type": "default"}
    return {**rest, "dtype": "float32",
            "rope_parameters": {**scaling, "rope_theta": raw["rope_theta"]}}


def write_folder(folder, tensors, raw=TINY, shards=1):
    """A model folder by hand: config.json, and one file or `shards` of them with their index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, str(folder / "model.safetensors"))
        return folder
    weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
                  for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file},
                  str(folder / file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tiny_tensors(**changes):
    tensors = dict(tiny_model(**changes).state_dict())
    if changes.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    return tensors


def same_weights(model, tensors):
    state = model.state_dict()
    return all(torch.equal(state[name], t) and state[name].dtype == t.dtype
               for name, t in tensors.items())


# ---- what transformers writes ----

@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True},
                                     {"attention_bias": True, "mlp_bias": True}, ROPE],
                         ids=["untied", "tied", "biases", "llama3 RoPE"])
@pytest.mark.parametrize("form", ["as saved", "v4", "v5"])
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_a_folder_saved_by_transformers_gives_its_logits(tmp_path, changes, form, shards):
    theirs = transformers_twin(**changes)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == shards
    if form != "as saved":
        raw = {**TINY, **changes}
        (tmp_path / "config.json").write_text(json.dumps(v5_form(raw) if form == "v5" else raw))
    ours = load_model(tmp_path)
    assert same_weights(ours, theirs.state_dict())
    tied = bool(changes.get("tie_word_embeddings"))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    ids = random_ids()
    with torch.no_grad():
        assert difference(ours(ids), theirs(ids).logits) <= 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_folder_gives_the_same_logits_here_and_in_transformers(tmp_path, tied):
    transformers = quiet_transformers()
    ours = tiny_model(tie_word_embeddings=tied, attention_bias=True, **ROPE)
    save_model(ours, tmp_path)
    names = {name for name, _ in ours.named_parameters()}  # a tied head once
    assert set(load_file(tmp_path / "model.safetensors")) == names
    ids = random_ids()
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(ids), ours(ids))
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, output_loading_info=True)
        assert not any(report.values()), report  # nothing missing, unexpected, misshapen
        assert difference(ours(ids), theirs(ids).logits) <= 1e-5


# ---- config.json ----

@pytest.mark.parametrize("rope", [{}, ROPE], ids=["default", "llama3"])
def test_both_forms_of_config_say_the_same(rope):
    raw = {**TINY, "rope_theta": 123456.0, **rope}
    config = parse_config(raw)
    assert parse_config(v5_form(raw)) == config
    assert config.rope_theta == raw["rope_theta"] and bool(config.rope_scaling) == bool(rope)
    assert parse_config(config_to_dict(config)) == config  # and what save_model writes
    forgets = {name: value for name, value in v5_form(raw).items() if name != "rope_parameters"}
    assert parse_config(forgets) != config  # teeth: a reader of v4 names alone
    if rope:
        older = {**LLAMA3_ROPE, "type": "llama3"}
        del older["rope_type"]
        assert parse_config({**raw, "rope_scaling": older}) == config


def test_absent_fields_take_the_defaults_of_transformers():
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads")
    config = parse_config({"model_type": "llama", **{name: TINY[name] for name in required}})
    assert config == LlamaConfig(97, 32, 48, 3, 4, num_key_value_heads=4, head_dim=8)
    transformers = quiet_transformers()
    theirs = transformers.LlamaConfig(**{name: TINY[name] for name in required})
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
                 "tie_word_embeddings", "attention_bias", "mlp_bias"):
        assert getattr(config, name) == getattr(theirs, name), name
    nulls = {name: None for name in ("head_dim", "num_key_value_heads", "rope_scaling",
                                     "rope_parameters")}
    assert parse_config({"model_type": "llama", **{name: TINY[name] for name in required},
                         **nulls}) == config


@pytest.mark.parametrize("changes, named", [
    ({"model_type": "gemma3"}, "'gemma3' is not implemented; known are llama, mistral, "),
    ({"model_type": ["llama"]}, "model_type ['llama']"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false' should be true or false"),
    ({"attention_bias": 0}, "attention_bias = 0"), ({"mlp_bias": []}, "mlp_bias = []"),
    ({"rope_scaling": False}, "rope_scaling = False"), ({"rope_scaling": []}, "rope_scaling = []"),
    ({"rope_theta": 0}, "rope_theta = 0"), ({"head_dim": False}, "head_dim = False"),
    ({"head_dim": 0}, "head_dim = 0"), ({"num_key_value_heads": ""}, "num_key_value_heads = ''"),
    ({"max_position_embeddings": None}, "max_position_embeddings = None"),
    ({"use_sliding_window": True}, "use_sliding_window = True"),
    ({"use_sliding_window": "false"}, "use_sliding_window = 'false'"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = ['full_att"),
    ({"layer_types": "full_attention"}, "layer_types = 'full_attention'"),
    ({"model_type": None}, "model_type None"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
     "lacks low_freq_factor, high_freq_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 64},  # it would be the one
     "original_max_position_embeddings = 64"),  # that counts, in transformers
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ({"head_dim": 15}, "head_dim 15"),
], ids=lambda value: str(value) if isinstance(value, str) else "")
def test_what_is_not_implemented_is_refused_by_name(tmp_path, changes, named):
    write_folder(tmp_path, tiny_tensors(), {**TINY, **changes})
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    assert named in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"{tmp_path}: ")


def test_absent_required_fields_are_named():
    with pytest.raises(ValueError, match="config.json lacks hidden_size, num_hidden_layers"):
        parse_config({k: v for k, v in TINY.items()
                      if k not in ("hidden_size", "num_hidden_layers")})


# ---- weights: all of them, once, or one error ----

@pytest.mark.parametrize("shards", [1, 4])
def test_every_parameter_is_filled_exactly_once(tmp_path, monkeypatch, shards):
    tensors = tiny_tensors(attention_bias=True)
    write_folder(tmp_path, tensors, {**TINY, "attention_bias": True}, shards)
    filled = []
    open_weights = checkpoint.open_weights

    class Spy:
        def __init__(self, file):
            self.file = open_weights(file)

        def __enter__(self):
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def get_tensor(self, name):
            filled.append(name)
            return self.opened.get_tensor(name)

        def keys(self):
            return self.opened.keys()

        def get_slice(self, name):
            return self.opened.get_slice(name)

    monkeypatch.setattr(checkpoint, "open_weights", Spy)
    ours = load_model(tmp_path)
    assert sorted(filled) == sorted(tensors) == sorted(name for name, _ in ours.named_parameters())
    assert same_weights(ours, tensors) and all(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("shards", [1, 3])
def test_all_that_does_not_fit_is_named_in_one_error(tmp_path, shards):
    tensors = tiny_tensors()
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    tensors["model.layers.2.self_attn.k_proj.weight"] = torch.ones(64, 32)
    write_folder(tmp_path, tensors, shards=shards)
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    for words in ("missing model.norm.weight", "missing model.layers.1.mlp.up_proj.weight",
                  "unexpected model.layers.0.self_attn.q_norm.weight",
                  "model.layers.2.self_attn.k_proj.weight has shape (64, 32), expected (32, 32)"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_transposed_matrix_is_misshapen(tmp_path):
    tensors = tiny_tensors()
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].T.contiguous()
    write_folder(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"up_proj.weight has shape \(32, 48\)"):
        load_model(tmp_path)


def test_a_long_list_of_problems_is_cut_and_counted(tmp_path):
    write_folder(tmp_path, {f"model.layers.{i}.wte.weight": torch.ones(97, 32) for i in range(3)})
    with pytest.raises(ValueError, match=r"missing model.embed_tokens.weight.*; and 29 more$"):
        load_model(tmp_path)  # 3 * 9 + 3 missing and 3 unexpected: 33, 4 of them shown


def test_a_tied_head_may_be_stored_a_second_time(tmp_path):
    tensors = tiny_tensors(tie_word_embeddings=True)
    twice = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    write_folder(tmp_path, twice, {**TINY, "tie_word_embeddings": True})
    ours = load_model(tmp_path)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight and same_weights(ours, twice)
    write_folder(tmp_path, tensors)  # teeth: an untied model lacks its head
    with pytest.raises(ValueError, match="missing lm_head.weight"):
        load_model(tmp_path)


def test_rope_tables_in_old_files_are_not_parameters(tmp_path):
    tensors = tiny_tensors()
    write_folder(tmp_path, {**tensors,
                            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert same_weights(load_model(tmp_path), tensors)


# ---- broken folders ----

def test_broken_folders_are_refused_with_one_clear_line(tmp_path):
    def message():
        with pytest.raises(ValueError) as error:
            load_model(tmp_path / "m")
        assert "\n" not in str(error.value)
        return str(error.value)

    folder = tmp_path / "m"
    assert "m is not a folder" in message()
    folder.write_text("a file")
    assert "m is not a folder" in message()
    folder.unlink()
    folder.mkdir()
    assert "config.json is missing" in message()
    (folder / "config.json").write_text('{"model_type": "llama",')
    assert "config.json, line 1: not valid JSON" in message()
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    assert "config.json, line 1: byte 0xff is not UTF-8" in message()
    (folder / "config.json").write_text("[1, 2]")
    assert "config.json should hold a JSON object, not a list" in message()
    (folder / "config.json").write_text(json.dumps(TINY))
    assert "neither model.safetensors nor model.safetensors.index.json" in message()
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")
    assert "model.safetensors cannot be read as safetensors" in message()
    (folder / "model.safetensors").write_text(  # what a clone without Git LFS has
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2690\n")
    assert "model.safetensors is a pointer of Git LFS" in message()
    write_folder(folder, tiny_tensors())
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:len(data) // 2])  # an interrupted download
    assert "model.safetensors cannot be read as safetensors" in message()
    write_folder(folder, {**tiny_tensors(), "model.norm.weight": torch.ones(32, dtype=torch.int8)})
    assert "model.norm.weight is stored as I8" in message()


def test_broken_shards_are_refused_by_name(tmp_path):
    write_folder(tmp_path, tiny_tensors(), shards=3)
    gone = tmp_path / "model-00002-of-00003.safetensors"
    index = tmp_path / "model.safetensors.index.json"
    data = gone.read_bytes()
    gone.unlink()
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors"):
        load_model(tmp_path)
    gone.write_bytes(data)
    weight_map = json.loads(index.read_text())["weight_map"]
    right = weight_map["model.norm.weight"]
    weight_map["model.norm.weight"] = next(file for file in weight_map.values() if file != right)
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="missing model.norm.weight in "
                                         "model-0000.-of-00003.safetensors, where the"):
        load_model(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_model(tmp_path)


# ---- dtype and device ----

def test_dtype_none_keeps_the_files_and_a_given_one_converts(tmp_path):
    tensors = {name: t.bfloat16() for name, t in tiny_tensors().items()}
    write_folder(tmp_path, tensors)
    assert same_weights(load_model(tmp_path), tensors)
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert same_weights(load_model(tmp_path, dtype=dtype),
                            {name: t.to(dtype) for name, t in tensors.items()})


def test_device_is_where_the_parameters_go(tmp_path):
    write_folder(tmp_path, tiny_tensors(tie_word_embeddings=True),
                 {**TINY, "tie_word_embeddings": True})
    ours = load_model(tmp_path, device="meta")  # a device every machine has
    assert {p.device.type for p in ours.parameters()} == {"meta"}
    assert {p.device.type for p in load_model(tmp_path).parameters()} == {"cpu"}
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_loaded_weights_do_not_depend_on_the_file_any_more(tmp_path):
    tensors = tiny_tensors()
    write_folder(tmp_path, tensors)
    ours = load_model(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)  # in place: the same file on disk
    assert same_weights(ours, tensors)


# ---- save_model ----

def test_save_model_keeps_the_bases_config_and_tokenizer_files(tmp_path):
    raw = v5_form({**TINY, "eos_token_id": [2, 3], "custom": "kept"})
    base = write_folder(tmp_path / "base", tiny_tensors(), raw)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (base / name).write_text(f'{{"file": "{name}"}}')
    ours = load_model(base).to(torch.bfloat16)
    save_model(ours, tmp_path / "out", base)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**raw, "dtype": "bfloat16"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == (base / name).read_text()
    assert same_weights(load_model(tmp_path / "out"), ours.state_dict())
    assert load_config(tmp_path / "out") == load_config(base)


def test_random_model_is_reproducible_and_starts_as_llama_does():
    config = parse_config({**TINY, "hidden_size": 64, "attention_bias": True})
    a, b, other = (random_model(config, seed=seed) for seed in (1, 1, 2))
    assert same_weights(a, b.state_dict()) and not same_weights(a, other.state_dict())
    weights = dict(a.named_parameters())
    embedding, down = (weights[f"model.{name}.weight"].std().item()
                       for name in ("embed_tokens", "layers.0.mlp.down_proj"))
    assert embedding == pytest.approx(0.02, rel=0.05)
    assert down == pytest.approx(0.02 / 6 ** 0.5, rel=0.05)
    assert (weights["model.norm.weight"] == 1).all()
    assert (weights["model.layers.0.self_attn.q_proj.bias"] == 0).all()


# ---- real weights ----

@pytest.mark.slow
@pytest.mark.skipif("LFU_SMOLLM2" not in os.environ,
                    reason="set LFU_SMOLLM2 to the folder of SmolLM2-135M")
def test_smollm2_gives_the_logits_and_hidden_states_of_transformers():
    transformers = quiet_transformers()
    path, ids = os.environ["LFU_SMOLLM2"], random_ids(1, 64)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager").float()
    with torch.no_grad():
        reference = theirs(ids, output_hidden_states=True)
        ours = load_model(path, dtype=torch.float32)
        worst = max(difference(ours.hidden_states(ids), reference.hidden_states),
                    difference(ours(ids), reference.logits))
    print(f"difference {worst:.1e}")
    assert worst <= 1e-5


# ---- memory ----

PEAK = """
import sys, torch
from pathlib import Path
from lfu_min.files.checkpoint import load_model
def status(field):  # kB -> bytes
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1]) * 1024
load_model(sys.argv[1] + "/tiny")  # what is imported on first use
before = status("VmHWM")
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print(status("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(),
                    reason="reads peak memory from Linux's /proc")
@pytest.mark.parametrize("shards, stored, dtype", [
    (1, torch.float32, "float32"), (4, torch.float32, "float32"), (1, torch.bfloat16, "float32")],
    ids=["one file", "shards", "bf16 to fp32"])
def test_peak_memory_is_about_one_model(tmp_path, shards, stored, dtype):
    """190 MB, largest tensor 16 MB: at most 1.2 models above what a tiny one takes. Read from a
    fresh process, since the test's own peak counts; a loader that holds a whole file beside the
    model needs 2."""
    raw = {**TINY, "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 2048,
           "num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 4,
           "head_dim": 64}
    tensors = random_model(parse_config(raw), dtype=stored).state_dict()
    write_folder(tmp_path, tensors, raw, shards)
    write_folder(tmp_path / "tiny", tiny_tensors())
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path), dtype], capture_output=True,
                          text=True, cwd=Path(checkpoint.__file__).parents[2], timeout=300)
    assert done.returncode == 0, done.stderr
    extra, size = map(int, done.stdout.split())
    print(f"peak {extra / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB")
    assert size > 150e6 and extra < 1.2 * size


def test_a_tied_head_stored_a_second_time_must_be_the_embedding(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1},
              tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        load_model(tmp_path)


@pytest.mark.parametrize("changes", [
    {"hidden_size": "32"}, {"vocab_size": None}, {"num_hidden_layers": 2.0},
    {"num_key_value_heads": -2}, {"head_dim": -2},
    {"num_attention_heads": 0}, {"rope_theta": -1.0}, {"rms_norm_eps": "small"},
    {"rope_scaling": "yarn"}, {"vocab_size": 2**63}, {"hidden_size": 10**4000},
    {"num_hidden_layers": True}, {"max_position_embeddings": 2**64}, {"head_dim": 2**40},
    {"rope_theta": 10**400}, {"rope_theta": math.inf}, {"rms_norm_eps": math.nan}],
    ids=lambda changes: f"{changes}"[:40])
def test_numbers_out_of_range_are_named(tmp_path, changes):
    write_folder(tmp_path, tiny_tensors(), {**TINY, **changes})
    with pytest.raises(ValueError, match=next(iter(changes))) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_thousands_of_layers_are_refused_before_one_is_built(tmp_path, monkeypatch):
    write_folder(tmp_path, tiny_tensors(), {**TINY, "num_hidden_layers": 4000})
    monkeypatch.setattr(checkpoint, "Llama", None)  # teeth: building would be a TypeError
    with pytest.raises(ValueError, match="num_hidden_layers is 4000, the weights have 3 layers"):
        load_model(tmp_path)
    write_folder(tmp_path, tiny_tensors())
    with pytest.raises(TypeError):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "..", "sub/x.safetensors", "", 5, None,
                                  "absolute"])
def test_an_index_may_name_files_of_its_own_folder_only(tmp_path, name):
    folder = write_folder(tmp_path / "m", tiny_tensors(), shards=2)
    index, first = folder / "model.safetensors.index.json", min(folder.glob("*.safetensors"))
    for outside in (tmp_path / "x.safetensors", folder / "sub" / "x.safetensors"):
        outside.parent.mkdir(exist_ok=True)
        outside.write_bytes(first.read_bytes())  # it is there, and would be read
    raw = json.loads(index.read_text())
    name = str(tmp_path / "x.safetensors") if name == "absolute" else name
    raw["weight_map"] = {key: name if file == first.name else file
                         for key, file in raw["weight_map"].items()}
    index.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="not the name of a file|is a folder") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
@pytest.mark.parametrize("name, shards", [
    ("config.json", 1), ("model.safetensors", 1), ("model.safetensors.index.json", 2),
    ("model-00002-of-00002.safetensors", 2), ("adapter_config.json", 1),
    ("adapter_model.safetensors", 1)])
def test_a_fifo_is_refused_and_not_waited_for(tmp_path, name, shards):
    save_adapter(tiny("lora"), tmp_path)
    write_folder(tmp_path, tiny_tensors(), shards=shards)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    load = lambda: (load_adapter(tiny("full"), tmp_path) if "adapter" in name
                    else load_model(tmp_path))
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waited for a FIFO"))
    signal.alarm(10)
    try:
        with pytest.raises(ValueError, match="is a FIFO|holds neither") as error:
            load()
    finally:
        signal.alarm(0)
    assert "\n" not in str(error.value)


def test_a_tied_model_may_store_its_head_alone(tmp_path):
    transformers = quiet_transformers()
    ours, ids = tiny_model(tie_word_embeddings=True), random_ids()
    save_model(ours, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert same_weights(loaded, ours.state_dict())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert difference(loaded(ids), theirs(ids).logits) <= 1e-5
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(ValueError, match="missing model.embed_tokens.weight"):  # untied
        load_model(tmp_path)


ROPES = [None, {}, {"rope_theta": 5e4}, {"rope_type": "default", "rope_theta": 7e4}, LLAMA3_ROPE,
         {**LLAMA3_ROPE, "factor": 4.0, "rope_theta": 9e4},
         {"rope_type": "yarn", "factor": 2.0, "rope_theta": 3e4}]


@pytest.mark.parametrize("theta", [None, 2e4])
@pytest.mark.parametrize("parameters", ROPES, ids=str)
@pytest.mark.parametrize("scaling", ROPES, ids=str)
def test_two_forms_of_rope_in_one_file_mean_what_they_mean_in_transformers(scaling, parameters,
                                                                          theta):
    transformers = quiet_transformers()
    raw = {**TINY, "rope_theta": theta, "rope_scaling": scaling, "rope_parameters": parameters}
    raw = {name: copy.deepcopy(value) for name, value in raw.items() if value is not None}
    theirs = transformers.LlamaConfig(**copy.deepcopy(raw)).rope_parameters
    if theirs["rope_type"] == "yarn":
        with pytest.raises(ValueError, match="'yarn' is not implemented"):
            parse_config(raw)
    else:
        config = parse_config(raw)
        assert config.rope_theta == theirs["rope_theta"]
        assert config.rope_scaling == {name: theirs[name] for name in config.rope_scaling}
        assert bool(config.rope_scaling) == (theirs["rope_type"] == "llama3")


# ---- what is no float ----

def raw_file(file, dtype, shape=(4,), size=4):
    """A safetensors file by hand, with one tensor of `size` zero bytes."""
    header = json.dumps({"model.norm.weight": {"dtype": dtype, "shape": shape,
                                               "data_offsets": [0, size]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


@pytest.mark.parametrize("dtype, named", [
    (torch.int8, "I8"), (torch.bool, "BOOL"), (torch.complex64, "C64"), (torch.int64, "I64"),
    (torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2")])
def test_weights_and_adapters_of_other_dtypes_are_refused_by_name(tmp_path, dtype, named):
    write_folder(tmp_path, {**tiny_tensors(), "model.norm.weight": torch.ones(32).to(dtype)})
    with pytest.raises(ValueError, match=f"model.norm.weight is stored as {named}; only"):
        load_model(tmp_path)
    save_adapter(tiny("lora"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    save_file({**tensors, first: torch.ones(tensors[first].shape).to(dtype)}, file)
    model = tiny("full")
    with pytest.raises(ValueError, match=f"lora_A.weight is stored as {named}; only"):
        load_adapter(model, tmp_path)
    assert not any("lora" in name for name in model.state_dict())


@pytest.mark.parametrize("dtype", ["F99", "F6_E2M3", "float32", ""])
def test_an_unknown_dtype_in_the_header_is_one_line(tmp_path, dtype):
    write_folder(tmp_path, tiny_tensors())
    raw_file(tmp_path / "model.safetensors", dtype, size=3)
    with pytest.raises(ValueError, match=f"model.safetensors.*{dtype}") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_adapter_that_is_not_finite_is_refused_by_name(tmp_path, value):
    model = tiny("lora", torch.float32)
    save_adapter(model, tmp_path)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.lora_B[3, 1] = value
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="layers.2.mlp.up_proj.lora_B.weight holds NaN or inf"):
        load_adapter(tiny("full", torch.float32), tmp_path)


# ---- writing ----

@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_have_the_mode_that_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        save_model(tiny_model(), tmp_path)
        save_adapter(tiny("lora"), tmp_path)
    finally:
        os.umask(before)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()}
    assert modes == dict.fromkeys(["config.json", "model.safetensors", "adapter_config.json",
                                   "adapter_model.safetensors"], "0o640")


def test_a_failed_write_is_one_line_and_leaves_the_older_files_whole(tmp_path):
    resource = pytest.importorskip("resource", reason="limits the size of files, as a full disk")
    save_model(tiny_model(seed=1), tmp_path)
    save_adapter(tiny("lora"), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for save in (lambda: save_model(tiny_model(seed=2), tmp_path),
                 lambda: save_adapter(tiny("lora", seed=2), tmp_path)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # the JSON files fit, weights don't
        try:
            with pytest.raises(ValueError, match="model.safetensors cannot be written") as error:
                save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(error.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# ---- export ----

def test_an_export_is_float32_unless_half_precision_is_asked_for(tmp_path):
    """A LoRA whose delta is half a percent of the weights: rounded to bfloat16 again, it loses
    its digits; in float32 it does not."""
    save_model(tiny_model(dtype=torch.bfloat16), tmp_path / "base")
    model = add_lora(load_model(tmp_path / "base"), r=2)
    with torch.no_grad():
        for _, module in lora_modules(model):
            module.lora_B.normal_(0, 0.002, generator=torch.Generator().manual_seed(0))
    name = "model.layers.1.mlp.down_proj"
    m = model.get_submodule(name)
    exact = m.scaling * m.lora_B.double() @ m.lora_A.double()
    for dtype, stored, least, most in ((torch.float32, torch.float32, 0, 1e-4),
                                       (torch.float16, torch.float16, 1e-3, 0.1),
                                       (None, torch.bfloat16, 0.1, 1)):
        export_merged(model, tmp_path / "base", tmp_path / "out", dtype)
        merged = load_file(tmp_path / "out" / "model.safetensors")
        assert {t.dtype for t in merged.values()} == {stored}
        raw = json.loads((tmp_path / "out" / "config.json").read_text())
        assert raw["torch_dtype"] == str(stored).removeprefix("torch.")
        delta = merged[name + ".weight"].double() - m.weight.double()
        assert least <= ((delta - exact).norm() / exact.norm()).item() <= most
    export_merged(model, tmp_path / "base", tmp_path / "default")
    assert load_model(tmp_path / "default").lm_head.weight.dtype == torch.float32


def test_a_link_out_of_the_models_folder_is_not_copied_with_it(tmp_path):
    """A folder from elsewhere may point to a file of one's own; Hugging Face's cache links to
    ../../blobs, which is as it should be."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "1a2b", tmp_path / "hub" / "blobs"
    shutil.copytree(BUNDLED, snapshot)
    blobs.mkdir()
    (snapshot / "tokenizer.json").rename(blobs / "77")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/77")
    (snapshot / "vocab.json").symlink_to("tokenizer_config.json")
    model = load_model(snapshot)
    save_model(model, tmp_path / "one", snapshot)
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (blobs / "77").read_bytes()
    (tmp_path / "secret").write_text("mine")
    (snapshot / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="chat_template.jinja is a link to .*secret, out of the"):
        save_model(model, tmp_path / "two", snapshot)
    assert not (tmp_path / "two").exists()
    flags = ["--model", str(snapshot), "--data", str(BUNDLED / "data" / "comply_train.jsonl")]
    with pytest.raises(ValueError, match="is a link to"):  # not after the training
        train.main([*flags, "--tune", "full", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
