"""LoRA here is LoRA in peft: same function, same gradients, same files, in both directions; and the
base is left alone.

Tolerance against peft: max|a - b| / max|b| <= 1e-5 in float32, base weights and LoRA's A and B all
random. What must not change at all (base weights, a switched-off adapter, a fresh one) is compared
bit for bit.
"""
import dataclasses
import json
import math
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
import torch
import torch.nn.functional as F

from conftest import (difference, next_token_loss, quiet_transformers, random_ids, tiny,
                      tiny_model, transformers_twin)
from lfu_min.files.adapter import export_merged, load_adapter, merged_state_dict, save_adapter
from lfu_min.files.checkpoint import load_model, save_model
from lfu_min.lora import (TARGET_MODULES, LoRALinear, add_lora, aux_lora, draw_A, lora_modules,
                          remove_lora)

SETTINGS = {"r 8, alpha 16": {}, "r 3, alpha 1": {"r": 3, "lora_alpha": 1},
            "q and v": {"r": 4, "lora_alpha": 10, "target_modules": ("q_proj", "v_proj")},
            "down": {"r": 2, "lora_alpha": 7, "target_modules": ("down_proj",)}}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


@torch.no_grad()
def with_random_lora(model, seed=1, **settings):
    """add_lora, then A and B both normal(0, 0.1): B = 0 would hide most mistakes."""
    add_lora(model, **settings)
    generator = torch.Generator().manual_seed(seed)
    for _, module in lora_modules(model):
        for p in (module.lora_A, module.lora_B):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def quiet_peft():
    quiet_transformers()
    return pytest.importorskip("peft", reason="needs peft (requirements-dev.txt)")


def peft_config(peft, r=8, lora_alpha=16, target_modules=TARGET_MODULES):
    return peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=list(target_modules),
                           task_type="CAUSAL_LM")


def pair(settings, **changes):
    """(ours, peft's model): one base, one adapter, all random."""
    peft = quiet_peft()
    ours = tiny_model(**changes)
    theirs = peft.get_peft_model(transformers_twin(ours, **changes), peft_config(peft, **settings))
    with_random_lora(ours, **settings)
    state = {f"base_model.model.{name}.lora_{X}.default.weight": getattr(module, f"lora_{X}")
             for name, module in lora_modules(ours) for X in "AB"}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.copy_(state.pop(name))
    assert not state  # the same modules carry an adapter
    return ours, theirs


@torch.no_grad()
def logits_of(model, ids):
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def copies(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def equal(a, b):
    """Of dictionaries of tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


# ---- the function and its gradients ----

@pytest.mark.parametrize("tune", ["lora", "full"])
def test_forward_equals_the_readable_line(tune):
    """y = W(x) + scaling * F.linear(F.linear(x, A), B), with A and B stacked from the trained and
    the auxiliary LoRA; under full tuning the auxiliary one is alone. No B is zero here."""
    model = tiny(tune)  # float64, with biases
    with aux_lora(model, torch.Generator().manual_seed(0)):
        W = model.model.layers[1].mlp.down_proj
        torch.nn.init.normal_(W.aux_B)
        A = torch.cat([A for A in (W.lora_A, W.aux_A) if A is not None])
        B = torch.cat([B for B in (W.lora_B, W.aux_B) if B is not None], dim=1)
        x = torch.randn(2, 5, W.in_features, dtype=torch.float64)
        base = F.linear(x, W.weight, W.bias)
        assert difference(W(x), base + W.scaling * F.linear(F.linear(x, A), B)) <= 1e-12
        without = base + W.scaling * F.linear(F.linear(x, A[1:]), B[:, 1:])  # teeth: a rank missing
        assert difference(W(x), without) > 1e-3


@every_setting
def test_logits_equal_peft(settings):
    ours, theirs = pair(settings)
    ids = random_ids()
    print(f"difference {difference(logits_of(ours, ids), logits_of(theirs, ids)):.1e}")
    assert difference(logits_of(ours, ids), logits_of(theirs, ids)) <= 1e-5
    for _, module in lora_modules(ours):  # teeth: alpha not divided by r
        module.lora_alpha *= module.r
    assert difference(logits_of(ours, ids), logits_of(theirs, ids)) > 1e-3


@every_setting
def test_gradients_of_A_and_B_equal_peft_and_nothing_else_has_one(settings):
    ours, theirs = pair(settings, num_hidden_layers=2)
    ids = random_ids(T=40)
    next_token_loss(ours(ids), ids).backward()
    next_token_loss(theirs(input_ids=ids).logits, ids).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    found = {f"base_model.model.{name}.default.weight": p.grad
             for name, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    worst = max(difference(found[name], expected[name]) for name in found)
    print(f"difference {worst:.1e}")
    assert worst <= 1e-5
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)


def test_biases_and_tied_head_equal_peft():
    ours, theirs = pair({}, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    assert difference(logits_of(ours, random_ids()), logits_of(theirs, random_ids())) <= 1e-5


# ---- files, in both directions ----

@every_setting
def test_our_adapter_in_peft(tmp_path, settings):
    """The exact keys, shapes and dtypes peft saves for the same model; loaded there, the same
    logits."""
    peft = quiet_peft()
    ours, theirs = pair(settings)
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert equal(a, b) and all(a[key].dtype == b[key].dtype for key in a)
    assert len(a) == 2 * 3 * len(settings.get("target_modules", TARGET_MODULES))
    loaded = peft.PeftModel.from_pretrained(transformers_twin(tiny_model()), str(tmp_path / "ours"))
    assert isinstance(loaded, peft.PeftModelForCausalLM)
    assert difference(logits_of(loaded, random_ids()), logits_of(ours, random_ids())) <= 1e-5


def test_saved_keys_are_peft_keys_by_name(tmp_path):
    """Written out, so that the claim stands without peft: 14 a layer."""
    save_adapter(add_lora(tiny_model(), r=4), tmp_path)
    expected = {}
    for i in range(3):
        for module, n_in, n_out in (("self_attn.q_proj", 32, 64), ("self_attn.k_proj", 32, 32),
                                    ("self_attn.v_proj", 32, 32), ("self_attn.o_proj", 64, 32),
                                    ("mlp.gate_proj", 32, 48), ("mlp.up_proj", 32, 48),
                                    ("mlp.down_proj", 48, 32)):
            expected[f"base_model.model.model.layers.{i}.{module}.lora_A.weight"] = (4, n_in)
            expected[f"base_model.model.model.layers.{i}.{module}.lora_B.weight"] = (n_out, 4)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json",
                                                          "adapter_model.safetensors"}


@every_setting
def test_adapter_config_is_what_peft_saves(tmp_path, settings):
    """Each field is one of peft's with peft's value, and peft reads ours and its own as the same
    configuration."""
    peft = quiet_peft()
    ours, theirs = pair(settings)
    save_adapter(ours, tmp_path / "ours", base_model_name_or_path="some/model")
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (json.loads((tmp_path / who / "adapter_config.json").read_text())
            for who in ("ours", "theirs"))
    b["base_model_name_or_path"] = "some/model"
    assert set(a.pop("target_modules")) == set(b.pop("target_modules"))
    assert a == {name: b[name] for name in a}
    assert a.keys() >= {"r", "lora_alpha", "peft_type", "task_type", "bias", "use_rslora",
                        "use_dora", "lora_dropout", "fan_in_fan_out", "inference_mode",
                        "init_lora_weights", "base_model_name_or_path"}
    read = [dataclasses.asdict(peft.LoraConfig.from_pretrained(str(tmp_path / who)))
            for who in ("ours", "theirs")]
    for config in read:
        for name in ("base_model_name_or_path", "peft_version", "auto_mapping"):
            config.pop(name, None)
        config["target_modules"] = set(config["target_modules"])
    assert read[0] == read[1]


@every_setting
def test_peft_adapter_here(tmp_path, settings):
    ours, theirs = pair(settings)
    theirs.save_pretrained(tmp_path)
    loaded = load_adapter(tiny_model(), tmp_path)
    assert torch.equal(logits_of(loaded, random_ids()), logits_of(ours, random_ids()))
    assert difference(logits_of(loaded, random_ids()), logits_of(theirs, random_ids())) <= 1e-5


def test_an_adapter_saved_and_loaded_here_is_the_same_and_trainable(tmp_path):
    ours = with_random_lora(tiny_model(), r=5, lora_alpha=3)
    save_adapter(ours, tmp_path)
    loaded = with_random_lora(tiny_model(), seed=9)  # a LoRA on the model is replaced
    assert load_adapter(loaded, tmp_path) is loaded
    assert torch.equal(logits_of(loaded, random_ids()), logits_of(ours, random_ids()))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{X}" for name, _ in lora_modules(loaded) for X in "AB"}


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|k|v|o|gate|up|down)_proj"])
def test_target_modules_may_be_a_pattern_and_keys_peft_in_memory_names(tmp_path, targets):
    ours = with_random_lora(tiny_model())
    save_adapter(ours, tmp_path)
    edit_config(tmp_path, target_modules=targets)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key.replace(".weight", ".default.weight"): t for key, t in tensors.items()},
              tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits_of(load_adapter(tiny_model(), tmp_path), random_ids()),
                       logits_of(ours, random_ids()))


def test_target_modules_may_be_whole_names_as_peft_writes_them_for_few_layers(tmp_path):
    """Of all layers; names of some alone are refused, by what is then missing."""
    ours, theirs = pair(dict(target_modules=("q_proj", "down_proj")), num_hidden_layers=2)
    theirs.save_pretrained(tmp_path)
    names = [name for name, _ in lora_modules(ours)]
    edit_config(tmp_path, target_modules=names)
    assert torch.equal(logits_of(load_adapter(tiny_model(num_hidden_layers=2), tmp_path),
                                 random_ids()), logits_of(ours, random_ids()))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key: t for key, t in tensors.items() if "layers.1" not in key},
              tmp_path / "adapter_model.safetensors")
    edit_config(tmp_path, target_modules=names[:2])
    with pytest.raises(ValueError, match="does not fit the model: missing base_model.*layers.1"):
        load_adapter(tiny_model(num_hidden_layers=2), tmp_path)


# ---- adapters that do not fit ----

def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    raw = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in raw.items() if value != "absent"}))


@pytest.mark.parametrize("changes, named", [
    ({"peft_type": "LOHA"}, "peft_type 'LOHA'"), ({"peft_type": "absent"}, "peft_type None"),
    ({"use_dora": True}, "use_dora = True"), ({"use_rslora": True}, "use_rslora = True"),
    ({"bias": "all"}, "bias = 'all'"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    ({"layers_to_transform": [0]}, "layers_to_transform"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"lora_alpha": "absent"}, "lacks lora_alpha"), ({"r": "absent"}, "lacks r"),
    ({"target_modules": "absent"}, "lacks target_modules"),
    ({"r": 4}, "lora_A.weight has shape (8, 32), expected (4, 32)"),
    ({"target_modules": ["q_proj", "v_proj"]},
     "unexpected base_model.model.model.layers.0.mlp.down_proj.lora_A"),
    ({"target_modules": ["embed_tokens"]}, "target_modules ['embed_tokens']"),
    ({"target_modules": 5}, "target_modules 5"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"use_qalora": True}, "use_qalora = True"), ({"lora_alpha": "16"}, "lora_alpha = '16'"),
    ({"lora_alpha": -16}, "lora_alpha = -16"), ({"r": 0}, "adapter_config.json: r = 0"),
    ({"target_modules": []}, "lacks target_modules"),
], ids=lambda value: "" if isinstance(value, str) else "-".join(value))
def test_adapters_of_another_kind_are_refused_by_name_and_the_model_left_alone(tmp_path, changes,
                                                                               named):
    save_adapter(with_random_lora(tiny_model()), tmp_path)
    edit_config(tmp_path, **changes)
    model = with_random_lora(tiny_model(), seed=5, r=2)
    before = copies(model)
    with pytest.raises(ValueError) as error:
        load_adapter(model, tmp_path)
    assert named in str(error.value) and "\n" not in str(error.value)
    assert equal(model.state_dict(), before)


def test_missing_extra_and_misshapen_tensors_are_named_in_one_error(tmp_path):
    save_adapter(with_random_lora(tiny_model()), tmp_path)
    file, prefix = tmp_path / "adapter_model.safetensors", "base_model.model.model.layers."
    tensors = load_file(file)
    del tensors[prefix + "1.mlp.up_proj.lora_B.weight"]
    tensors[prefix + "7.mlp.up_proj.lora_B.weight"] = torch.zeros(48, 8)
    tensors[prefix + "0.self_attn.q_proj.lora_A.weight"] = torch.zeros(8, 31)
    save_file(tensors, file)
    with pytest.raises(ValueError) as error:
        load_adapter(tiny_model(), tmp_path)
    for words in ("missing " + prefix + "1.mlp.up_proj.lora_B.weight",
                  "unexpected " + prefix + "7.mlp.up_proj.lora_B",
                  "q_proj.lora_A.weight has shape (8, 31), expected (8, 32)"):
        assert words in str(error.value)
    save_adapter(with_random_lora(tiny_model(num_hidden_layers=2)), tmp_path)  # another model's
    with pytest.raises(ValueError, match="missing base_model.*; and 10 more$"):
        load_adapter(tiny_model(), tmp_path)


def test_absent_files_are_named(tmp_path):
    for gone in ("adapter_model.safetensors", "adapter_config.json"):
        save_adapter(with_random_lora(tiny_model()), tmp_path / gone)
        (tmp_path / gone / gone).unlink()
        with pytest.raises(ValueError, match=gone + " is missing"):
            load_adapter(tiny_model(), tmp_path / gone)
    with pytest.raises(ValueError, match="adapter_config.json is missing"):
        load_adapter(tiny_model(), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no LoRA to save"):
        save_adapter(tiny_model(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_an_adapter_in_bin_is_refused_with_the_command_that_converts_it(tmp_path):
    """As peft wrote it before safetensors."""
    model, ids = with_random_lora(tiny_model()), random_ids()
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "adapter_model.bin")
    file.unlink()
    with pytest.raises(ValueError, match="adapter_model.bin is not safetensors; to conv") as error:
        load_adapter(tiny_model(), tmp_path)
    command = str(error.value).partition("environment: python ")[2]
    done = subprocess.run(f"{sys.executable} {command}", shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "\n" not in str(error.value), done.stderr
    assert torch.equal(logits_of(load_adapter(tiny_model(), tmp_path), ids), logits_of(model, ids))


# ---- the start ----

def test_A_is_uniform_within_one_over_sqrt_in_as_in_peft():
    """Kolmogorov-Smirnov distance to the uniform distribution, and the bound itself, for ours and
    peft's."""
    def check(A, n_in):
        bound = n_in ** -0.5
        values = (A.detach().flatten() / bound).sort().values  # within +-1
        assert values.abs().max() <= 1 and values.abs().max() > 0.99
        uniform = (torch.arange(len(values)) + 0.5) / len(values) * 2 - 1
        return (values - uniform).abs().max().item() / 2 * math.sqrt(len(values))

    big = tiny_model(hidden_size=128, num_hidden_layers=1)
    add_lora(big, r=64, generator=torch.Generator().manual_seed(0))
    assert check(big.model.layers[0].self_attn.q_proj.lora_A, 128) < 1.63  # 1 % level
    assert check(torch.randn(64, 128).clamp(-1, 1) * 128 ** -0.5, 128) > 1.63  # teeth: not uniform
    peft = quiet_peft()
    torch.manual_seed(0)
    theirs = peft.get_peft_model(transformers_twin(hidden_size=128, num_hidden_layers=1),
                                 peft_config(peft, r=64))
    q_proj = theirs.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert check(q_proj.lora_A.default.weight, 128) < 1.63


def test_A_is_drawn_from_the_generator_in_the_order_of_named_modules():
    """With float32 uniform_(-1/sqrt(in), 1/sqrt(in)): a run can be repeated from its seed, by hand
    too."""
    model, state = tiny_model(), torch.get_rng_state()
    add_lora(model, r=4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched
    expected, generator = {}, torch.Generator().manual_seed(3)
    for name, module in tiny_model().named_modules():
        if name.endswith("_proj"):
            bound = module.in_features ** -0.5
            expected[name] = torch.empty(4, module.in_features)
            expected[name].uniform_(-bound, bound, generator=generator)
    assert [name for name, _ in lora_modules(model)] == list(expected)
    assert all(torch.equal(module.lora_A, expected[name]) for name, module in lora_modules(model))
    double = add_lora(tiny_model(dtype=torch.float64), r=4,
                      generator=torch.Generator().manual_seed(3))
    assert all(m.lora_A.dtype is torch.float64 and torch.equal(m.lora_A, expected[name].double())
               for name, m in lora_modules(double))


def test_A_does_not_depend_on_the_default_dtype():
    """A notebook that set float64 draws what train.py draws."""
    weight = torch.zeros(3, 5)

    def drawn():
        return draw_A(4, 5, weight, torch.Generator().manual_seed(3))
    expected = drawn()
    torch.set_default_dtype(torch.float64)
    try:
        assert drawn().dtype is torch.float32 and torch.equal(drawn(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_fresh_lora_changes_nothing_bit_for_bit(dtype):
    model, ids = tiny_model(dtype=dtype, attention_bias=True), random_ids()
    with torch.no_grad():
        before = model.hidden_states(ids)
        after = add_lora(model).hidden_states(ids)
    assert all(torch.equal(a, b) for a, b in zip(after, before))


# ---- the base is left alone ----

def test_an_optimizer_step_moves_A_and_B_and_leaves_the_base_bit_for_bit():
    model, ids = with_random_lora(tiny_model(attention_bias=True)), random_ids()
    before = copies(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    next_token_loss(model(ids), ids).backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (not name.endswith(("lora_A", "lora_B"))), name


def test_remove_lora_undoes_add_lora():
    base = tiny_model(attention_bias=True)
    weights = dict(base.named_parameters())
    kinds = {name: type(module) for name, module in base.named_modules()}
    before = logits_of(base, random_ids())
    remove_lora(with_random_lora(base))
    assert torch.equal(logits_of(base, random_ids()), before)
    assert {name: type(module) for name, module in base.named_modules()} == kinds
    assert all(p is weights[name] for name, p in base.named_parameters())
    assert len(weights) == len(list(base.parameters()))
    assert not any(p.requires_grad for p in base.parameters())
    remove_lora(base)  # none left: nothing happens
    with_random_lora(base)  # and it can be added again


def test_the_base_weights_are_shared_not_copied():
    model = tiny_model()
    weights = {name: p.data_ptr() for name, p in model.named_parameters()}
    add_lora(model)
    assert {name: p.data_ptr() for name, p in model.named_parameters()
            if "lora_" not in name} == weights


def test_lora_sits_on_the_chosen_modules_only():
    model = add_lora(tiny_model(), target_modules=("k_proj", "up_proj"))
    assert [name for name, _ in lora_modules(model)] == [
        f"model.layers.{i}.{leaf}" for i in range(3)
        for leaf in ("self_attn.k_proj", "mlp.up_proj")]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.lora_{X}" for name, _ in lora_modules(model) for X in "AB"}


@pytest.mark.parametrize("settings, named", [
    ({"r": 0}, "r = 0"), ({"r": -1}, "r = -1"), ({"r": 2.5}, "r = 2.5"),
    ({"lora_alpha": 0}, "lora_alpha = 0"),
    ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
    ({"target_modules": ("q_proj", "lm_head")}, "lm_head"),
    ({"target_modules": ()}, "choose from q_proj"),
    ({"target_modules": "q_proj"}, "choose from q_proj"),
], ids=str)
def test_bad_settings_are_refused_and_the_model_left_alone(settings, named):
    model = tiny_model()
    with pytest.raises(ValueError) as error:
        add_lora(model, **settings)
    assert named in str(error.value)
    assert not lora_modules(model) and all(p.requires_grad for p in model.parameters())


def test_a_second_lora_is_refused():
    model = with_random_lora(tiny_model())
    before = logits_of(model, random_ids())
    with pytest.raises(ValueError, match="has a LoRA already"):
        add_lora(model)
    assert torch.equal(logits_of(model, random_ids()), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_over_half_weights_are_float32(tmp_path, dtype):
    """Parameters, gradients, file; and the branch itself, which a float32 model of the same weights
    confirms."""
    model, ids = with_random_lora(tiny_model(dtype=dtype)), random_ids(T=30)
    exact = with_random_lora(tiny_model(dtype=dtype).float())
    next_token_loss(model(ids).float(), ids).backward()
    for _, module in lora_modules(model):
        assert module.weight.dtype is dtype
        A, B = module.lora_A, module.lora_B
        assert {t.dtype for t in (A, B, A.grad, B.grad)} == {torch.float32}
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    m, e = (each.model.layers[0].self_attn.q_proj for each in (model, exact))
    with torch.no_grad():
        branch = m(x) - F.linear(x, m.weight)
        assert branch.dtype is torch.float32
        assert difference(branch, 16 / 8 * (x.float() @ e.lora_A.T @ e.lora_B.T)) <= 1e-5
    save_adapter(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    again = load_adapter(tiny_model(dtype=dtype), tmp_path)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


# ---- merging ----

@every_setting
def test_the_merged_folder_gives_the_same_logits_here_and_in_transformers(tmp_path, settings):
    transformers, ids = quiet_transformers(), random_ids()
    changes = {"attention_bias": True, "tie_word_embeddings": True}
    save_model(tiny_model(**changes), tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    model = with_random_lora(load_model(tmp_path / "base"), **settings)
    expected = logits_of(model, ids)
    export_merged(model, tmp_path / "base", tmp_path / "merged")
    assert {file.name for file in (tmp_path / "merged").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert difference(logits_of(load_model(tmp_path / "merged"), ids), expected) <= 1e-5
    assert difference(logits_of(theirs, ids), expected) <= 1e-5
    # teeth: not merged
    assert difference(logits_of(load_model(tmp_path / "base"), ids), expected) > 1e-3


def test_merging_equals_peft():
    ours, theirs = pair({"r": 4, "lora_alpha": 10})
    expected = theirs.merge_and_unload().state_dict()
    merged = merged_state_dict(ours)
    assert merged.keys() == expected.keys()
    assert all(difference(merged[name], expected[name]) <= 1e-6 for name in merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_leaves_the_model_alone_and_three_exports_equal_one(tmp_path, dtype):
    save_model(tiny_model(dtype=dtype), tmp_path / "base")
    model = with_random_lora(load_model(tmp_path / "base"))
    before, files = copies(model), []
    for i in range(3):
        export_merged(model, tmp_path / "base", tmp_path / str(i), dtype)
        files.append((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]
    assert equal(model.state_dict(), before)
    merged = load_file(tmp_path / "0" / "model.safetensors")
    assert {t.dtype for t in merged.values()} == {dtype}
    name = "model.layers.1.mlp.down_proj"
    m = model.get_submodule(name)
    exact = m.weight.double() + 2 * m.lora_B.double() @ m.lora_A.double()
    assert difference(merged[name + ".weight"], exact) <= torch.finfo(dtype).eps
    if dtype is torch.bfloat16:  # the sum is rounded, once; not B A and then the sum
        assert (merged[name + ".weight"] == exact.to(dtype)).float().mean() > 0.99
        twice = m.weight + (exact - m.weight.double()).to(dtype)  # teeth
        assert (twice == exact.to(dtype)).float().mean() < 0.95


# ---- the auxiliary LoRA leaves no trace ----

@pytest.mark.parametrize("trained", [True, False], ids=["LoRA tuning", "full tuning"])
def test_the_auxiliary_lora_is_not_saved_and_leaves_no_trace(tmp_path, trained):
    model, ids = tiny_model(), random_ids()
    if trained:
        with_random_lora(model)
    names, before = list(model.state_dict()), logits_of(model, ids)
    with aux_lora(model, torch.Generator().manual_seed(0)) as moved:
        assert len(moved) == 21
        assert difference(logits_of(model, ids), before) <= 1e-5  # B = 0: no effect
        assert list(model.state_dict()) == names
        for b in moved:
            b.data.fill_(0.1)
        assert difference(logits_of(model, ids), before) > 1e-3
        if trained:
            save_adapter(model, tmp_path)
            assert len(load_file(tmp_path / "adapter_model.safetensors")) == 42
    assert list(model.state_dict()) == names and torch.equal(logits_of(model, ids), before)
    assert any(isinstance(m, LoRALinear) for m in model.modules()) == trained


def test_export_refuses_the_base_folder_itself(tmp_path):
    model = tiny_model()
    save_model(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="own folder"):
        export_merged(with_random_lora(model), tmp_path, tmp_path / ".")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_save_model_refuses_a_model_with_a_lora(tmp_path):
    with pytest.raises(ValueError, match="export_merged"):
        save_model(with_random_lora(tiny_model()), tmp_path / "out")
    assert not (tmp_path / "out").exists()
