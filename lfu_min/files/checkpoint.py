"""Hugging Face folders on disk <-> model.Llama: config.json and safetensors, read strictly and
written back.

Called by train.py, eval.py and adapter.export_merged. Strict means: every parameter is filled
exactly once, and what is missing, unexpected or misshapen is named; a model this code does not
implement is refused, never half-loaded. Verified in tests/test_checkpoint.py against folders
written by transformers (v4 and v5 config forms, shards).
"""
import json
import math
from pathlib import Path
import shutil

import torch
from safetensors import safe_open, SafetensorError
from safetensors.torch import save_file

from ..model import Llama, LlamaConfig


def parse_config(raw):
    """LlamaConfig from the dictionary in config.json, in the form of transformers 4 (rope_theta,
    rope_scaling) or 5 (rope_parameters). Raises ValueError naming the first feature that model.py
    does not implement."""
    if raw.get("model_type") != "llama":
        raise ValueError(f"model_type {raw.get('model_type')!r} is not implemented; this is a "
                         "Llama (model_type 'llama')")
    for name, only in (("hidden_act", "silu"), ("attention_dropout", 0.0),
                       ("quantization_config", None)):
        if raw.get(name, only) not in (only, None):
            raise ValueError(f"config.json: {name} = {raw[name]!r} is not implemented, only "
                             f"{only!r}")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads")
    missing = [name for name in required if name not in raw]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    heads = raw["num_attention_heads"]
    kv_heads = raw.get("num_key_value_heads") or heads
    check_numbers({**{name: raw[name] for name in required}, "num_key_value_heads": kv_heads,
                   "max_position_embeddings": raw.get("max_position_embeddings", 2048)}, int)
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    check_numbers({"head_dim": head_dim}, int)
    if heads % kv_heads or head_dim % 2:
        raise ValueError(f"config.json: num_attention_heads {heads} must be a multiple of "
                         "num_key_value_heads "
                         f"{kv_heads}, and head_dim {head_dim} must be even")
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name) or {}, dict):
            raise ValueError(f"config.json: {name} = {raw[name]!r} should be an object or null")
    rope = dict(raw.get("rope_scaling") or {}, **(raw.get("rope_parameters") or {}))
    theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise ValueError("config.json: partial_rotary_factor other than 1 is not implemented")
    scaling = {}
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor",
                 "original_max_position_embeddings")
        lacking = [name for name in names if name not in rope]
        if lacking:
            raise ValueError(f"config.json: RoPE type 'llama3' lacks {', '.join(lacking)}")
        scaling = {name: rope[name] for name in names}
        check_numbers(scaling, (int, float))
    elif kind != "default":
        raise ValueError(f"config.json: RoPE type {kind!r} is not implemented, only 'default' and "
                         "'llama3'")
    check_numbers({"rope_theta": theta, "rms_norm_eps": raw.get("rms_norm_eps", 1e-6)},
                  (int, float))
    return LlamaConfig(
        **{name: raw[name] for name in required}, num_key_value_heads=kv_heads, head_dim=head_dim,
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(theta), rope_scaling=scaling,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)))


def check_numbers(values, kind):
    for name, value in values.items():
        if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:
            what = "integer" if kind is int else "number"
            raise ValueError(f"config.json: {name} = {value!r} should be a positive {what}")


def read_json(path):
    """The object in a JSON file. Raises ValueError naming the file, and the line where it is
    broken."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def load_config(path):
    """LlamaConfig of a model folder."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; a model is a folder with config.json and "
                         "*.safetensors")
    return parse_config(read_json(path / "config.json"))


def weight_files(path):
    """{tensor name: file} of a model folder, from its index or its single file."""
    index = Path(path) / "model.safetensors.index.json"
    single = Path(path) / "model.safetensors"
    if single.is_file():
        with open_weights(single) as f:
            return {name: single for name in f.keys()}
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str)
                                                       for file in weight_map.values()):
            raise ValueError(f"{index} has no weight_map of tensor names to files")
        return {name: Path(path) / file for name, file in weight_map.items()}
    raise ValueError(f"{path} holds neither model.safetensors nor model.safetensors.index.json")


def open_weights(file):
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from None


def stored_tensors(names, files):
    """(name, tensor) one after the other; a file is opened anew after 16 MiB, so that no more of it
    stays mapped."""
    left = list(reversed(names))
    while left:
        file, mapped = files[left[-1]], 0
        with open_weights(file) as reader:
            while left and files[left[-1]] == file and mapped < 2**24:
                tensor = reader.get_tensor(left[-1])
                mapped += tensor.nbytes
                yield left.pop(), tensor


def load_model(path, device="cpu", dtype=None):
    """A model.Llama filled from the Hugging Face folder `path`, which needs config.json and
    safetensors weights only.

    path:   folder with one model.safetensors, or shards and their index.
    device: where the parameters go. dtype: their dtype; None keeps the file's.
    Weights are streamed tensor by tensor, so peak memory is about one model.
    Raises ValueError: not a folder, an unknown model_type or feature, or tensors that are missing,
    unexpected or of another shape than config.json says (all of them in one message).
    """
    config = load_config(path)
    files = weight_files(path)
    with torch.device("meta"):  # shapes without memory
        model = Llama(config)
    wanted = dict(model.named_parameters())  # a tied head appears once, as the embedding
    # old files carry a RoPE table
    names = [name for name in files if not name.endswith("rotary_emb.inv_freq")]
    if config.tie_word_embeddings:  # some tied checkpoints store the head a second time
        names = [name for name in names if name != "lm_head.weight"]
    problems = [f"missing {name}" for name in wanted if name not in files]
    problems += [f"unexpected {name}" for name in names if name not in wanted]
    for file in sorted({files[name] for name in names}):
        with open_weights(file) as f:
            stored = set(f.keys())
            for name in (name for name in names if files[name] == file):
                if name not in stored:
                    problems.append(f"missing {name} in {file.name}, where the index puts it")
                elif name in wanted and (shape := tuple(f.get_slice(name).get_shape())) != tuple(wanted[name].shape):
                    problems.append(f"{name} has shape {shape}, config.json says "
                                    f"{tuple(wanted[name].shape)}")
    if problems:
        rest = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{path} does not fit its config.json: " + "; ".join(problems[:8]) + rest)
    for name, tensor in stored_tensors(names, files):  # a view of the file: copied below
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is stored as {tensor.dtype}; quantised weights are "
                             "not implemented")
        tensor = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
        if "lm_head.weight" in files:
            with open_weights(files["lm_head.weight"]) as f:
                if not torch.equal(f.get_tensor("lm_head.weight").to(model.lm_head.weight),
                                   model.lm_head.weight):
                    raise ValueError(f"{path}: config.json ties the head to the embedding, but "
                                     "lm_head.weight differs")
    return model


def config_to_dict(config, dtype=torch.float32):
    """config.json's content in transformers 4's form, which transformers 5 reads too."""
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
           "torch_dtype": str(dtype).removeprefix("torch."), **vars(config)}
    raw["rope_scaling"] = dict(config.rope_scaling,
                               rope_type="llama3") if config.rope_scaling else None
    return raw


def save_model(model, out_dir, base_dir=None, state_dict=None):
    """Write a Hugging Face folder: config.json and model.safetensors, and the tokenizer files of
    base_dir beside them.

    base_dir's own config.json is kept where there is one (ids of special tokens, say), with the
    dtype corrected.
    state_dict: what to write instead of the model's own, under the same names. A tied head is
    written once. transformers' from_pretrained and load_model read the folder.
    """
    out_dir = Path(out_dir)
    state_dict = dict(model.state_dict() if state_dict is None else state_dict)
    if any(name.endswith(("lora_A", "lora_B")) for name in state_dict):
        raise ValueError("the model has a LoRA: save_adapter writes it, export_merged writes the "
                         "merged model")
    if model.config.tie_word_embeddings:
        state_dict.pop("lm_head.weight", None)
    dtype = next(iter(state_dict.values())).dtype
    raw = read_json(Path(base_dir) / "config.json") if base_dir else config_to_dict(model.config, dtype)
    out_dir.mkdir(parents=True, exist_ok=True)
    raw["dtype" if "dtype" in raw else "torch_dtype"] = str(dtype).removeprefix("torch.")
    (out_dir / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    if base_dir:
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                     "special_tokens_map.json",
                     "generation_config.json", "added_tokens.json", "vocab.json", "merges.txt",
                     "chat_template.jinja"):
            if (Path(base_dir) / name).is_file():
                shutil.copyfile(Path(base_dir) / name, out_dir / name)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state_dict.items()}
    save_file(tensors, str(out_dir / "model.safetensors"), metadata={"format": "pt"})


def random_model(config, seed=0, std=0.02, dtype=torch.float32, device="cpu"):
    """A Llama with normal(0, std) weights and gains of one: for pretraining, tests and
    benchmarks."""
    generator = torch.Generator().manual_seed(seed)
    model = Llama(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            # GPT-2's: smaller, by depth
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = std / math.sqrt(2 * config.num_hidden_layers) if into_stream else std
            torch.nn.init.normal_(parameter, 0.0, scale, generator=generator)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return model.to(device=device, dtype=dtype)
