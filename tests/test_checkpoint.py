"""A folder in Hugging Face's form is read strictly or not at all, and what is written can be read
by transformers.

Weights must come back bit for bit; logits are compared with transformers' at max|a - b| / max|b| <=
1e-5 in float32.
"""
import json
import os
from pathlib import Path
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
import torch

from conftest import LLAMA3_ROPE, TINY, difference, quiet_transformers, random_ids, tiny_model, transformers_twin
from lfu_min.files import checkpoint
from lfu_min.files.checkpoint import config_to_dict, load_config, load_model, parse_config, random_model, save_model
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
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
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
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == bool(changes.get("tie_word_embeddings"))
    ids = random_ids()
    with torch.no_grad():
        assert difference(ours(ids), theirs(ids).logits) <= 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_folder_gives_the_same_logits_here_and_in_transformers(tmp_path, tied):
    transformers = quiet_transformers()
    ours = tiny_model(tie_word_embeddings=tied, attention_bias=True, **ROPE)
    save_model(ours, tmp_path)
    # head once
    assert set(load_file(tmp_path / "model.safetensors")) == {name for name, _ in ours.named_parameters()}
    ids = random_ids()
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(ids), ours(ids))
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
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
                 "tie_word_embeddings",
                 "attention_bias", "mlp_bias"):
        assert getattr(config, name) == getattr(theirs, name), name
    nulls = {name: None for name in ("head_dim", "num_key_value_heads", "rope_scaling",
                                     "rope_parameters")}
    assert parse_config({"model_type": "llama", **{name: TINY[name] for name in required},
                         **nulls}) == config


@pytest.mark.parametrize("changes, named", [
    ({"model_type": "qwen3"}, "'qwen3'"),
    ({"model_type": None}, "model_type None"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
     "lacks low_freq_factor, high_freq_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
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
                  "model.layers.2.self_attn.k_proj.weight has shape (64, 32), config.json says "
                  "(32, 32)"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_transposed_matrix_is_misshapen(tmp_path):
    tensors = tiny_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].T.contiguous()
    write_folder(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"up_proj.weight has shape \(32, 48\)"):
        load_model(tmp_path)


def test_a_long_list_of_problems_is_cut_and_counted(tmp_path):
    write_folder(tmp_path, {"transformer.wte.weight": torch.ones(97, 32)})
    with pytest.raises(ValueError, match=r"missing model.embed_tokens.weight.*; and 23 more$"):
        load_model(tmp_path)  # 3 * 9 + 3 missing and 1 unexpected: 31, 8 of them shown


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
    assert "config.json is not valid JSON" in message() and "line 1" in message()
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    assert "config.json is not valid JSON" in message()
    (folder / "config.json").write_text("[1, 2]")
    assert "config.json should hold a JSON object, not a list" in message()
    (folder / "config.json").write_text(json.dumps(TINY))
    assert "neither model.safetensors nor model.safetensors.index.json" in message()
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")
    assert "model.safetensors cannot be read as safetensors" in message()
    write_folder(folder, tiny_tensors())
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:len(data) // 2])  # an interrupted download
    assert "model.safetensors cannot be read as safetensors" in message()
    write_folder(folder, {**tiny_tensors(), "model.norm.weight": torch.ones(32, dtype=torch.int8)})
    assert "model.norm.weight is stored as torch.int8" in message()


def test_broken_shards_are_refused_by_name(tmp_path):
    write_folder(tmp_path, tiny_tensors(), shards=3)
    gone, index = tmp_path / "model-00002-of-00003.safetensors", tmp_path / "model.safetensors.index.json"
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
    (tmp_path / "model.safetensors").write_bytes(b"\0" * (tmp_path / "model.safetensors").stat().st_size)
    assert same_weights(ours, tensors)


# ---- save_model ----

def test_save_model_keeps_the_bases_config_and_tokenizer_files(tmp_path):
    raw = v5_form({**TINY, "eos_token_id": [2, 3], "custom": "kept"})
    base = write_folder(tmp_path / "base", tiny_tensors(), raw)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (base / name).write_text(f'{{"file": "{name}"}}')
    ours = load_model(base).to(torch.bfloat16)
    save_model(ours, tmp_path / "out", base)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**raw, "dtype": "bfloat16"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == (base / name).read_text()
    assert same_weights(load_model(tmp_path / "out"), ours.state_dict())
    assert load_config(tmp_path / "out") == load_config(base)


def test_random_model_is_reproducible_and_starts_as_llama_does():
    config = parse_config({**TINY, "hidden_size": 64, "attention_bias": True})
    a, b, other = random_model(config,
                               seed=1), random_model(config, seed=1), random_model(config, seed=2)
    assert same_weights(a, b.state_dict()) and not same_weights(a, other.state_dict())
    weights = dict(a.named_parameters())
    assert weights["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["model.layers.0.mlp.down_proj.weight"].std().item() == pytest.approx(0.02 / 6 ** 0.5, rel=0.05)
    assert (weights["model.norm.weight"] == 1).all() and (weights["model.layers.0.self_attn.q_proj.bias"] == 0).all()


# ---- real weights ----

@pytest.mark.slow
@pytest.mark.skipif("LFU_SMOLLM2" not in os.environ,
                    reason="set LFU_SMOLLM2 to the folder of SmolLM2-135M")
def test_smollm2_gives_the_logits_and_hidden_states_of_transformers():
    transformers = quiet_transformers()
    path, ids = os.environ["LFU_SMOLLM2"], random_ids(1, 64)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").float()
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
def status(field):                                                          # kB -> bytes
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1]) * 1024
load_model(sys.argv[1] + "/tiny")                                           # what is imported on first use
before = status("VmHWM")
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print(status("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(),
                    reason="reads peak memory from Linux's /proc")
@pytest.mark.parametrize("shards, stored, dtype",
                         [(1, torch.float32, "float32"), (4, torch.float32, "float32"),
                                                   (1, torch.bfloat16, "float32")],
                         ids=["one file", "shards", "bf16 to fp32"])
def test_peak_memory_is_about_one_model(tmp_path, shards, stored, dtype):
    """190 MB, largest tensor 16 MB: at most 1.2 models above what a tiny one takes. Read from a
    fresh process, since the test's own peak counts; a loader that holds a whole file beside the
    model needs 2."""
    raw = {**TINY, "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 2048,
           "num_hidden_layers": 10,
           "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    tensors = random_model(parse_config(raw), dtype=stored).state_dict()
    write_folder(tmp_path, tensors, raw, shards)
    write_folder(tmp_path / "tiny", tiny_tensors())
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path), dtype], capture_output=True,
                          text=True,
                          cwd=Path(checkpoint.__file__).parents[1], timeout=300)
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
    {"rope_scaling": "yarn"}], ids=str)
def test_numbers_out_of_range_are_named(tmp_path, changes):
    model = tiny_model()
    save_model(model, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **changes}))
    with pytest.raises(ValueError, match=next(iter(changes))) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)
