"""The trained LoRA on disk: peft's adapter folders, read and written, and export into a plain model
folder.

Called by train.py, eval.py and sweep.py. Verified in tests/test_lora.py: peft computes the same
logits from our files, and we from peft's.
"""
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from .checkpoint import open_weights, read_json, save_model
from ..lora import TARGET_MODULES, add_lora, check_rank, lora_modules, remove_lora
from ..model import Linear

# Fields of adapter_config.json that do not change what a plain LoRA computes; any other must be
# unset.
PLAIN_FIELDS = {
    "peft_type", "peft_version", "task_type", "base_model_name_or_path", "auto_mapping",
    "revision", "inference_mode", "r",
    "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "init_lora_weights",
    "loftq_config", "eva_config",
    "corda_config", "megatron_config", "megatron_core", "layers_pattern", "runtime_config",
    "qalora_group_size",
    "ensure_weight_tying"}


def save_adapter(model, out_dir, base_model_name_or_path=None, state_dict=None):
    """Write the trained LoRA as peft does: adapter_model.safetensors and adapter_config.json in
    out_dir.

    state_dict: where the tensors are taken from; default: the model's own.
    """
    modules = lora_modules(model)
    if not modules:
        raise ValueError("the model has no LoRA to save: add_lora(model) first")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    state_dict = model.state_dict() if state_dict is None else state_dict
    tensors = {f"base_model.model.{name}.{leaf}.weight": state_dict[f"{name}.{leaf}"].contiguous().cpu()
               for name, _ in modules for leaf in ("lora_A", "lora_B")}
    save_file(tensors, str(out_dir / "adapter_model.safetensors"), metadata={"format": "pt"})
    first = modules[0][1]
    targets = {name.rpartition(".")[2] for name, _ in modules}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "r": first.r, "lora_alpha": int(first.lora_alpha) if first.lora_alpha % 1 == 0
        else first.lora_alpha,
        "target_modules": [t for t in TARGET_MODULES if t in targets],
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "revision": None,
        "init_lora_weights": True, "use_rslora": False, "use_dora": False, "modules_to_save": None,
        "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {},
        "alpha_pattern": {}}
    (out_dir / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n",
                                                 encoding="utf-8")


def load_adapter(model, adapter_dir):
    """Attach a peft LoRA adapter, in place, as add_lora does (trainable, base frozen); a LoRA on
    the model is replaced.

    Raises ValueError: not a plain LoRA adapter, or tensors that are missing, unexpected or of
    another shape.
    """
    adapter_dir = Path(adapter_dir)
    config = read_json(adapter_dir / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{adapter_dir}: peft_type {config.get('peft_type')!r} is not "
                         "implemented, only 'LORA'")
    for name, value in config.items():  # anything but a plain LoRA computes something else
        if name not in PLAIN_FIELDS and value and (name, value) != ("bias", "none"):
            raise ValueError(f"{adapter_dir}: {name} = {value!r} is not implemented, only plain "
                             "LoRA is")
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian"):
        raise ValueError(f"{adapter_dir}: init_lora_weights = {config['init_lora_weights']!r} "
                         "changes the base weights, "
                         "which is not implemented")
    lacking = [name for name in ("r", "lora_alpha", "target_modules") if not config.get(name)]
    if lacking:
        raise ValueError(f"{adapter_dir}/adapter_config.json lacks {', '.join(lacking)}")
    check_rank(config["r"], config["lora_alpha"])
    file = adapter_dir / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    # peft's in-memory keys say lora_A.default.weight, its files lora_A.weight; both are read.
    with open_weights(file) as f:
        stored = {key.replace(".default.weight", ".weight"): f.get_tensor(key) for key in f.keys()}
    targets = config["target_modules"]
    if isinstance(targets, str):  # "all-linear" or a pattern: the file's keys say which
        targets = {key.split(".")[-3] for key in stored if key.count(".") > 2}
    if not isinstance(targets, (list, set)) or not set(targets) <= set(TARGET_MODULES):
        raise ValueError(f"{adapter_dir}: target_modules {targets!r}: known are "
                         f"{', '.join(TARGET_MODULES)}")
    wanted = {}  # key in the file -> expected shape
    for name, linear in model.named_modules():
        if isinstance(linear, Linear) and name.rpartition(".")[2] in targets:
            wanted[f"base_model.model.{name}.lora_A.weight"] = (config["r"], linear.in_features)
            wanted[f"base_model.model.{name}.lora_B.weight"] = (linear.out_features, config["r"])
    problems = [f"missing {key}" for key in wanted if key not in stored]
    problems += [f"unexpected {key}" for key in stored if key not in wanted]
    problems += [f"{key} has shape {tuple(stored[key].shape)}, expected {shape}"
                 for key, shape in wanted.items()
                 if key in stored and tuple(stored[key].shape) != shape]
    if problems:
        rest = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"{file} does not fit the model: " + "; ".join(problems[:4]) + rest)
    remove_lora(model)
    add_lora(model, config["r"], config["lora_alpha"], tuple(targets), generator=torch.Generator())
    with torch.no_grad():
        for name, module in lora_modules(model):
            module.lora_A.copy_(stored[f"base_model.model.{name}.lora_A.weight"])
            module.lora_B.copy_(stored[f"base_model.model.{name}.lora_B.weight"])
    return model


@torch.no_grad()
def merged_state_dict(model):
    """The state dict of a model without LoRA that computes the same: W + (lora_alpha / r) B A,
    added in float32."""
    modules = dict(lora_modules(model))
    merged = {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if leaf in ("lora_A", "lora_B"):
            continue
        if owner in modules and leaf == "weight":
            m = modules[owner]
            delta = (m.lora_alpha / m.r) * (m.lora_B @ m.lora_A)  # (out, in)
            tensor = (tensor.to(delta.dtype) + delta).to(tensor.dtype)
        merged[name] = tensor
    return merged


def export_merged(model, base_dir, out_dir):
    """Write a Hugging Face folder with the LoRA merged into the weights; config and tokenizer come
    from base_dir.

    The model itself is left as it is. transformers' from_pretrained and load_model read the folder.
    """
    if Path(out_dir).resolve() == Path(base_dir).resolve():
        raise ValueError(f"{out_dir} is the base model's own folder: name another one to export to")
    save_model(model, out_dir, base_dir, state_dict=merged_state_dict(model))
