"""Which models are scored: a base and runs of train.py, what they are called, which of them differ
in nothing but the seed.

Called by eval.py; pictures.py takes the names of methods from here.
"""
from pathlib import Path
from typing import NamedTuple

from ..bundled import BUNDLED, here
from ..engine.system import spare_threads
from ..files import hashes
from ..files.adapter import check_adapter, load_adapter
from ..files.checkpoint import load_model
from ..files.data import TEMPLATES
from ..files.jsons import read_json, short
from ..lora import remove_lora

# Fields of settings.json that tell no two settings apart: the seed, what the method's name says,
# where the run was made, and what follows from other fields. The data's hash stands for the data.
ASIDE = {"seed", "method", "aux", "model", "data", "out", "device", "activation_checkpointing",
         "shard", "per_step", "per_epoch", "steps", "examples", "dropped", "versions", "platform",
         "git_commit", "save_every", "keep", "eval_data", "eval_data_sha256", "resume", "verify",
         "resumed", "model_sha256", "saved_sha256"}
LFU = {"lam", "alpha", "layers", "move", "compare"}  # nor these, where there is no LfU
ADAPTER = "adapter_config.json"


class Run(NamedTuple):
    """One column of the results: the base (folder None) or a run."""
    name: str  # the folder as it was given, or "base"
    folder: Path = None
    settings: dict = {}  # settings.json; empty where there is none


def method(run):
    """What a run is called: "SFT", "LfU-<aux>" or the word of --method; what has no settings.json,
    the base too, by its name."""
    if not run.settings:
        return run.name
    name, aux = run.settings.get("method", "lfu"), run.settings.get("aux", "lora")
    if name == "sft" or name == "lfu" and (aux == "none" or run.settings.get("lam") == 0):
        return "SFT"
    return f"LfU-{aux}" if name == "lfu" else name


def find_runs(names, model=None):
    """(path of the base, [base, run, run, ...]).

    names: folders of train.py, or peft adapters; model: the base. Where it is None the runs must
    name it, the same one each; without runs it is the bundled model. Raises ValueError.
    """
    found, base = [], model
    for name in dict.fromkeys(names):
        folder = Path(name)
        if name == "base":
            raise ValueError("base is what the model itself is called: name that run ./base")
        if not folder.is_dir():
            raise ValueError(f"{name} is not a folder; a run is a folder that train.py wrote")
        adapter, settings = folder / ADAPTER, folder / "settings.json"
        if settings.is_file() and not read_json(settings).get("saved_sha256", True):
            raise ValueError(f"{name} has not finished: python train.py --resume {name}")
        if not adapter.is_file() and not (folder / "config.json").is_file():
            raise ValueError(f"{name} holds neither adapter_config.json nor config.json: no run")
        found.append(Run(name, folder, read_settings(settings) if settings.is_file() else {}))
        if model is not None:
            continue
        own = found[-1].settings.get("model")
        if not own and adapter.is_file():
            own = read_json(adapter).get("base_model_name_or_path")
        if not own:
            raise ValueError(f"{name} does not say what it was trained from: name it with --model")
        if not isinstance(own, str):
            raise ValueError(f"{name} names {short(own)} as its base, which is no folder")
        own = here(own)
        if base is not None and Path(own) != Path(base):
            raise ValueError(f"{name} comes from {own}, others from {base}: use separate calls")
        base = own
    return base or str(BUNDLED), [Run("base"), *found]


def other_base(base, runs):
    """A line for each run that was not trained from the files in the folder `base`, by the hashes
    in its settings.json."""
    told, now = [], None
    for run in runs:
        if recorded := run.settings.get("model_sha256"):
            now = now or hashes.model_hashes(base)
            other = [name for name in sorted({*recorded, *hashes.read_of_model(base)})
                     if recorded.get(name) != now.get(name)]
            if other:
                told.append(f"note: {run.name} was trained from another {', '.join(other)} than "
                            f"{base} has")
    return told


def read_settings(file):
    """settings.json, where what is read of it here is what train.py writes."""
    settings = read_json(file)
    other = settings.get("method", "lfu") != "lfu"  # which has no lam
    for name, fits in (("model", lambda x: isinstance(x, str)),
                       ("method", lambda x: isinstance(x, str)),
                       ("aux", lambda x: isinstance(x, str)),
                       ("seed", lambda x: isinstance(x, int)),
                       ("model_sha256", lambda x: isinstance(x, dict)),
                       ("template", lambda x: x in TEMPLATES),
                       ("lam", lambda x: isinstance(x, (int, float)) and 0 <= x < 1e30
                        or x is None and other)):
        if name in settings and not fits(settings[name]):
            raise ValueError(f"{file}: {name} = {short(settings[name])} is nothing that train.py "
                             "writes")
    return settings


def each_model(base, runs, device, dtype):
    """Yields (run, model): the base's weights stay, adapters come and go, and a fully trained model
    is in memory beside the base, one at a time. Raises ValueError for an adapter that does not fit
    the base, before anything is yielded."""
    model = load_model(base, device, dtype)
    spare_threads(sum(p.numel() for p in model.parameters()))
    adapters = [run for run in runs if run.folder and (run.folder / ADAPTER).is_file()]
    for run in adapters:
        check_adapter(model, run.folder)
    for run in runs:
        if run.folder is None:
            yield run, model
        elif run in adapters:
            yield run, load_adapter(model, run.folder)
            remove_lora(model)
        else:
            yield run, load_model(run.folder, device, dtype)


def templates(runs, chosen=None):
    """{run's name: template}: `chosen`, or each run's own. What has none, the base and foreign
    adapters, takes the first run's, or else plain."""
    own = {run.name: run.settings.get("template") for run in runs}
    default = next(filter(None, own.values()), "plain")
    return {name: chosen or template or default for name, template in own.items()}


def by_seed(runs):
    """{column: [run, ...]}: runs that differ in nothing but the seed share a column. Columns are
    called by their method, and where that is not enough, by the settings in which they differ.

    ValueError if two runs of one setting have one seed: they would count as two.
    """
    groups = {}  # (method, settings as text) -> {seed: run}
    for run in runs:
        aside = ASIDE | LFU if method(run) == "SFT" else ASIDE
        setting = tuple(f"{key} {value}" for key, value in sorted(run.settings.items())
                        if key not in aside)
        seeds = groups.setdefault((method(run), setting), {})
        other = seeds.setdefault(run.settings.get("seed"), run)
        if other is not run:
            raise ValueError(f"--over-seeds: {other.name} and {run.name} are one setting with one "
                             f"seed, {run.settings.get('seed')}; name one of them")
    columns = {}
    for (name, own), seeds in groups.items():
        others = [setting for same, setting in groups if same == name and setting != own]
        told = [text for text in own if any(text not in other for other in others)]
        columns[" ".join([name, *told])] = list(seeds.values())
    return columns


def short_names(names):
    """{run: its folder's name, or the whole path where two folders have the same name}."""
    short = [Path(name).name for name in names]
    return {name: name if short.count(last) > 1 else last for name, last in zip(names, short)}
