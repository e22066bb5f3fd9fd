"""Hugging Face folders on disk <-> model.Llama: config.json and safetensors, read strictly and
written back.

Called by all that loads or saves a model. Strict means: every parameter is filled
exactly once, and what is missing, unexpected or misshapen is named; a model this code does not
implement is refused, never half-loaded. Verified in tests/test_checkpoint.py against folders
written by transformers (v4 and v5 config forms, shards).
"""
import math
from pathlib import Path
import shutil
from typing import NamedTuple

import torch
from safetensors import safe_open, SafetensorError
from safetensors.torch import save_file

from .jsons import check_file, read_json, short, shown, write_json, written_aside
from ..model import Llama, LlamaConfig

class Family(NamedTuple):
    """What one model_type means. Others are refused by name."""
    architecture: str  # transformers' class
    flags: tuple = ()  # fields of LlamaConfig that config.json may set, true or false
    always: dict = {}  # fields that it need not set
    defaults: dict = {}  # where config.json is silent: transformers'; {} are Llama's


FAMILIES = {
    "llama": Family("LlamaForCausalLM", flags=("attention_bias", "mlp_bias")),
    "mistral": Family("MistralForCausalLM", defaults=dict(
        num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)),
    "qwen2": Family("Qwen2ForCausalLM", always=dict(qkv_bias=True), defaults=dict(
        num_key_value_heads=32, max_position_embeddings=32768)),
    "qwen3": Family("Qwen3ForCausalLM", flags=("attention_bias",), always=dict(qk_norm=True),
                    defaults=dict(num_key_value_heads=32, head_dim=128,
                                  max_position_embeddings=32768)),
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads")
ROPE_FIELDS = {"default": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                         "original_max_position_embeddings")}
DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names of what can be loaded
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                   "special_tokens_map.json", "generation_config.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "chat_template.jinja")
LFS = b"version https://git-lfs"  # what a clone without Git LFS has in a large file's place
LAYERS = 4096  # at most: each takes memory and time before it has weights
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def parse_config(raw):
    """LlamaConfig from the dictionary in config.json, in the form of transformers 4 (rope_theta,
    rope_scaling) or 5 (rope_parameters). Raises ValueError naming the first feature that model.py
    does not implement, or the first value that makes no sense.

    Mistral's sliding_window is a full attention up to that length, so max_position_embeddings is
    set to it where it is the shorter one: longer texts are not taken.
    """
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"model_type {short(name, 40)} is not implemented; known are "
                         f"{', '.join(FAMILIES)}")
    family = FAMILIES[name]
    raw = {**family.defaults, **raw}
    check_only(raw)
    missing = [name for name in SIZES if name not in raw]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    heads = raw["num_attention_heads"]
    kv_heads = first(raw.get("num_key_value_heads"), heads)
    positions = raw.get("max_position_embeddings", 2048)
    window = first(raw.get("sliding_window") if name == "mistral" else None, positions)
    sizes = {**{name: raw[name] for name in SIZES}, "num_key_value_heads": kv_heads,
             "max_position_embeddings": positions}
    check_numbers({**sizes, "sliding_window": window}, int)
    sizes["max_position_embeddings"] = min(positions, window)
    sizes["head_dim"] = head_dim = first(raw.get("head_dim"), raw["hidden_size"] // heads)
    check_numbers({"head_dim": head_dim}, int)
    check_numbers({"num_attention_heads * head_dim": heads * head_dim}, int)
    if sizes["num_hidden_layers"] > LAYERS:
        raise ValueError(f"config.json: num_hidden_layers = {sizes['num_hidden_layers']} should be "
                         f"at most {LAYERS:,}")
    if heads % kv_heads or head_dim % 2:
        raise ValueError(f"config.json: num_attention_heads {heads} must be a multiple of "
                         f"num_key_value_heads {kv_heads}, and head_dim {head_dim} must be even")
    eps = raw.get("rms_norm_eps", 1e-6)
    check_numbers({"rms_norm_eps": eps}, float)
    flags = {name: first(raw.get(name), False) for name in ("tie_word_embeddings", *family.flags)}
    for flag, value in flags.items():
        if not isinstance(value, bool):  # "false" would count as true
            raise ValueError(f"config.json: {flag} = {short(value)} should be true or false")
    return LlamaConfig(**sizes, **flags, **family.always, **parse_rope(raw), rms_norm_eps=eps,
                       model_type=name)


def first(*values):
    """The first that is not None; None where there is none."""
    return next((value for value in values if value is not None), None)


def check_only(raw):
    """Raise ValueError naming a field of config.json that asks for what model.py has not."""
    for name, only in (("hidden_act", "silu"), ("attention_dropout", 0.0),
                       ("quantization_config", None), ("original_max_position_embeddings", None),
                       ("use_sliding_window", False)):
        if raw.get(name, only) not in (only, None):
            raise ValueError(f"config.json: {name} = {short(raw[name])} is not implemented, "
                             f"only {only!r}")
    layers = first(raw.get("layer_types"), ["full_attention"])
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        raise ValueError(f"config.json: layer_types = {short(layers)} is not implemented, only "
                         "'full_attention' for each layer")


def parse_rope(raw):
    """rope_theta and rope_scaling of LlamaConfig, as a dictionary. Where config.json has both
    forms, rope_scaling is the one that counts, as in transformers 5."""
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(first(raw.get(name), {}), dict):
            raise ValueError(f"config.json: {name} = {short(raw[name])} should be an object or "
                             "null")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1):
        raise ValueError("config.json: partial_rotary_factor other than 1 is not implemented")
    theta = first(rope.get("rope_theta"), raw.get("rope_theta"), 10000.0)
    check_numbers({"rope_theta": theta}, float)
    kind = str(first(rope.get("rope_type"), rope.get("type"), "default"))
    if kind not in ROPE_FIELDS:
        raise ValueError(f"config.json: RoPE type {short(kind)} is not implemented, only "
                         "'default' and 'llama3'")
    lacking = [name for name in ROPE_FIELDS[kind] if name not in rope]
    if lacking:
        raise ValueError(f"config.json: RoPE type {kind!r} lacks {', '.join(lacking)}")
    scaling = {name: rope[name] for name in ROPE_FIELDS[kind]}
    check_numbers(scaling, float)
    if scaling and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:  # divides by zero
        raise ValueError("config.json: RoPE's low_freq_factor should be below its "
                         "high_freq_factor")
    return dict(rope_theta=float(theta), rope_scaling=scaling)


def check_numbers(values, kind):
    """Raise ValueError unless all values are positive, and integers (kind int) or any numbers
    (float) that a model can have."""
    what, types, limit = ("integer", int, 2**28) if kind is int else ("number", (int, float), 1e30)
    for name, value in values.items():
        if not isinstance(value, types) or isinstance(value, bool) or not 0 < value < limit:
            raise ValueError(f"config.json: {name} = {short(value, 40)} should be a positive "
                             f"{what} below {limit:,}")


def load_config(path):
    """LlamaConfig of a model folder."""
    path = Path(path)
    check_format(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; a model is a folder with config.json and "
                         "*.safetensors")
    raw = read_json(path / "config.json")
    try:
        return parse_config(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# Weights that are no safetensors: what makes safetensors of them. (Later transformers load a GGUF
# file but do not save it, and have no script for Meta's form.)
IN_PLACE = ("python -c \"from transformers import AutoModelForCausalLM as M; "
            "M.from_pretrained('{folder}'%s).save_pretrained('{folder}')\"")
CONVERT = {
    "*.gguf": ("pip install 'transformers<5' gguf && " + IN_PLACE % ", gguf_file='{file}'"
               + " (tokenizer.json is the original model's)"),
    "consolidated*.pth": (
        "pip install 'transformers<4.47' accelerate && python -m "
        "transformers.models.llama.convert_llama_weights_to_hf --input_dir '{folder}' "
        "--output_dir '{folder}-hf' --num_shards {n} --llama_version 3.1 (or 3, 3.2)"),
    "pytorch_model*.bin": "pip install transformers && " + IN_PLACE % "",
    "adapter_model.bin": (
        "python -c \"import torch; from safetensors.torch import save_file; "
        "save_file(torch.load('{folder}/{file}', weights_only=True), "
        "'{folder}/adapter_model.safetensors')\""),
}


def check_format(path):
    """Raise ValueError, with the command that converts them, where the weights in the folder (or
    the one file) `path` are no safetensors."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and any(path.glob("*.safetensors")):
        return
    for pattern, command in CONVERT.items():
        found = sorted(folder.glob(pattern))
        if found and (path.is_dir() or path in found):
            file = found[0] if path.is_dir() else path
            raise ValueError(f"{file} is not safetensors; to convert it, in a virtual environment: "
                             + command.format(folder=folder, file=file.name, n=len(found)))


def stored_weights(path):
    """{tensor name: (file, shape)} of a model folder, from the headers of its single file or of
    the files that its index names."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return {name: (single, shape) for name, shape in read_shapes(single).items()}
    if not index.is_file():
        raise ValueError(f"{path} holds neither {single.name} nor {index.name}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map of tensor names to files")
    for name, file in weight_map.items():
        good = isinstance(file, str) and file.isprintable() and len(file) < 256
        if not good or file in ("", "..") or Path(file).name != file:  # "../x" leads out of it
            raise ValueError(f"{index} puts {shown(name)} into {short(file)}, which is not the "
                             "name of a file in this folder")
    shapes = {file: read_shapes(path / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in shapes[file]:
            raise ValueError(f"{path}: missing {shown(name)} in {file}, where the index puts it")
    return {name: (path / file, shapes[file][name]) for name, file in weight_map.items()}


def open_weights(file):
    check_file(file)
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        with open(file, "rb") as start:
            if start.read(len(LFS)) == LFS:
                raise ValueError(f"{file} is a pointer of Git LFS, not the weights themselves: "
                                 "`git lfs pull` in that folder fetches them") from None
        raise ValueError(f"{file} cannot be read as safetensors: "
                         f"{shown(str(error), 200)}") from None


def read_shapes(file):
    """{tensor name: shape} from a safetensors file's header. Raises ValueError naming a tensor
    that is not of float16, bfloat16, float32 or float64."""
    shapes = {}
    with open_weights(file) as reader:
        for name in reader.keys():
            stored = reader.get_slice(name)
            if stored.get_dtype() not in DTYPES:
                raise ValueError(f"{file}: {shown(name)} is stored as {stored.get_dtype()}; only "
                                 f"{', '.join(DTYPES)} are implemented, not quantised weights")
            shapes[name] = tuple(stored.get_shape())
    return shapes


def check_shapes(stored, wanted, misfit):
    """Raise ValueError unless the two {tensor name: shape} are the same: `misfit`, then the first
    four that are missing, unexpected or of another shape."""
    problems = [f"missing {shown(name)}" for name in wanted if name not in stored]
    problems += [f"unexpected {shown(name)}" for name in stored if name not in wanted]
    problems += [f"{shown(name)} has shape {short(stored[name])}, expected {shape}"
                 for name, shape in wanted.items() if stored.get(name, shape) != shape]
    if problems:
        rest = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"{misfit}: " + "; ".join(problems[:4]) + rest)


def empty_model(path, config, shapes):
    """A Llama without memory for its parameters, whose names and shapes are those in `shapes`."""
    layers = {name.split(".")[2] for name in shapes if name.startswith("model.layers.")}
    if len(layers) != config.num_hidden_layers:  # or else a million of them would be built first
        raise ValueError(f"{path} does not fit its config.json: num_hidden_layers is "
                         f"{config.num_hidden_layers}, the weights have {len(layers)} layers")
    with torch.device("meta"):
        model = Llama(config)
    if config.tie_word_embeddings and HEAD in shapes:  # stored a second time, or under this name
        rest = {name: shape for name, shape in shapes.items() if name != HEAD}
        shapes = {EMBEDDING: shapes[HEAD], **rest}
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}  # a tied head once
    check_shapes(shapes, wanted, f"{path} does not fit its config.json")
    return model


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
    unexpected or of another shape or dtype than they should have.
    """
    path, config = Path(path), load_config(path)
    stored = {name: where for name, where in stored_weights(path).items()
              if not name.endswith("rotary_emb.inv_freq")}  # old files carry a RoPE table
    model = empty_model(path, config, {name: shape for name, (_, shape) in stored.items()})
    files = {name: file for name, (file, _) in stored.items()}
    for name, tensor in stored_tensors(files, files):  # a view of the file: copied here
        tensor = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor))
    if config.tie_word_embeddings:
        head, embedding = model.lm_head, model.model.embed_tokens
        twice = HEAD in stored and EMBEDDING in stored
        if twice and not torch.equal(head.weight, embedding.weight):
            raise ValueError(f"{path}: config.json ties the head to the embedding, but {HEAD} "
                             "differs")
        head.weight = embedding.weight = (embedding if EMBEDDING in stored else head).weight
    return model


def config_to_dict(config, dtype=torch.float32):
    """config.json's content in transformers 4's form, which transformers 5 reads too. Raises
    ValueError where no model of config.model_type is like this."""
    family = FAMILIES[config.model_type]
    raw = {"architectures": [family.architecture], "hidden_act": "silu",
           "torch_dtype": str(dtype).removeprefix("torch."), **vars(config)}
    for name in ("attention_bias", "mlp_bias", "qkv_bias", "qk_norm"):
        if name not in family.flags:
            del raw[name]
    if "sliding_window" in family.defaults:
        raw["sliding_window"] = None
    scaling = config.rope_scaling
    raw["rope_scaling"] = dict(scaling, rope_type="llama3") if scaling else None
    if parse_config(raw) != config:
        raise ValueError(f"a model of model_type {config.model_type!r} cannot be like {config}")
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
        state_dict.pop(HEAD, None)
    dtype = next(iter(state_dict.values())).dtype
    raw, copied = config_to_dict(model.config), []
    if base_dir:
        raw, copied = read_json(Path(base_dir) / "config.json"), tokenizer_files(base_dir)
    raw["dtype" if "dtype" in raw else "torch_dtype"] = str(dtype).removeprefix("torch.")
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json(out_dir / "config.json", raw)
    for file in copied:
        with written_aside(out_dir / file.name) as temporary:
            shutil.copyfile(file, temporary)
    write_tensors(out_dir / "model.safetensors", state_dict)


def tokenizer_files(folder):
    """Those of TOKENIZER_FILES that lie in a model folder, to be copied. Raises ValueError for a
    link out of it: a folder from elsewhere could point to a file of yours, which would then be
    given away with the model. (Hugging Face's cache links to blobs/ beside snapshots/.)"""
    files = [Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]
    inside = Path(folder).resolve()
    for file in files:
        real = file.resolve()
        if inside not in real.parents and real.parent != inside.parent.parent / "blobs":
            raise ValueError(f"{file} is a link to {real}, out of the model's folder, and is not "
                             "copied with the model: put the file itself there")
    return files


def write_tensors(file, tensors):
    """Write {name: tensor} as safetensors. Raises ValueError if that fails (full disk); an older
    file is then still whole."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with written_aside(file) as temporary:
        try:
            save_file(tensors, str(temporary), metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from None


def random_model(config, seed=0, std=0.02, dtype=torch.float32):
    """A Llama with normal(0, std) weights and gains of one: for pretraining and tests."""
    generator = torch.Generator().manual_seed(seed)
    model = Llama(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = std / math.sqrt(2 * config.num_hidden_layers) if into_stream else std  # GPT-2's
            torch.nn.init.normal_(parameter, 0.0, scale, generator=generator)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return model.to(dtype)
