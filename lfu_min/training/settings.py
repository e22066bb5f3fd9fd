"""train.py's flags: what they are, what they default to, and which values are refused."""
from pathlib import Path
import sys

from ..bundled import BUNDLED, here
from ..engine import system
from ..files import data, jsons
from ..lora import check_rank
from ..methods import AUXILIARIES, BASELINES, DISTANCES, IN_PLACE, MOVES

# Defaults that depend on the model. AUTHORS: the released scripts' recipe for an 8B Llama.
# BUNDLED_MODEL: chosen for the bundled model on its validation split (docs/defaults.md says how).
AUTHORS = dict(epochs=3.0, batch_size=4, accumulate=4, lr=1e-4, max_len=2048)
BUNDLED_MODEL = dict(epochs=10.0, batch_size=16, accumulate=1, lr=5e-3, max_len=256,
                     model=str(BUNDLED), data=str(BUNDLED / "data" / "word_problems_train.jsonl"))

# The flags that belong to a method, with the names that its step gives them, and their defaults.
TAKES = {"lfu": dict(aux="aux", lam="lam", alpha="alpha", layers="layers", move="move",
                     compare="compare"),
         "sft": {}, "neftune": dict(neftune_alpha="alpha"), "prompt": {},
         "gem": dict(gem_beta="beta"), "sam": dict(rho="rho"), "l1": dict(lam="lam"),
         "l2": dict(lam="lam"), "logit_kl": dict(lam="lam", alpha="alpha"),
         "attached": dict(lam="lam", alpha="alpha")}
USUAL = dict(aux="lora", lam=5.0, alpha=0.1, layers="all", move="ascent", compare="mse",
             neftune_alpha=5.0, gem_beta=0.7, rho=0.05)

MOST, SEEDS = 10**9, 2**60  # larger numbers are slips; torch's generators end at 2**64

# The flags that may be others when a run is resumed: they change no number of it. (Of the model and
# the data the files must be the same, wherever they lie.)
FREE = {"model", "data", "eval_data", "device", "activation_checkpointing", "out", "save_every",
        "keep", "resume", "verify"}


def parser():
    p = system.Parser(
        prog="train.py", description="Fine-tune a model with LfU, or with what it is compared to.",
        epilog="Defaults stand in brackets; where there are two: for the bundled model / with "
               "--model.")
    g = p.add_argument_group("model and data")
    g.add_argument("--model", help="Hugging Face folder [the bundled one / required]")
    g.add_argument("--data", help=".json or .jsonl file of examples [256 word problems / required]")
    g.add_argument("--eval-data", metavar="FILE", help="examples whose loss is measured before the "
                   "first step, after every tenth part of the run and at its end; none trains")
    g.add_argument("--template", choices=data.TEMPLATES, default="plain",
                   help="how a question becomes a prompt [plain]")
    g.add_argument("--max-len", type=int, help="tokens; longer examples are dropped [256 / 2048]")
    g = p.add_argument_group("LfU")
    g.add_argument("--aux", choices=(*AUXILIARIES, "none"),
                   help="auxiliary components; none = --method sft [lora]")
    g.add_argument("--lam", type=float, help="lambda, weight of the consistency loss, or of l1's "
                   "and l2's penalty; 0 = plain SFT [5]")
    g.add_argument("--alpha", type=float, help="length of the ascent step [0.1]")
    g.add_argument("--layers",
                   help="layers compared: all, early, middle, late or a-b (1-based) [all]")
    g.add_argument("--move", choices=MOVES,
                   help="how the auxiliary components move; other-batch = along the gradient of a "
                        "second, shuffled batch, as in the authors' code [ascent]")
    g.add_argument("--compare", choices=DISTANCES,
                   help="distance between the two models [mse]")
    g = p.add_argument_group("what LfU is compared with")
    g.add_argument("--method", choices=("lfu", *BASELINES), default="lfu",
                   help="prompt = every token trained; l1, l2, logit_kl = Table 6; "
                   "attached = LfU with h not detached [lfu]")
    g.add_argument("--neftune-alpha", type=float, help="size of neftune's noise [5]")
    g.add_argument("--gem-beta", type=float, help="gem's temperature; 1 = SFT's gradient [0.7]")
    g.add_argument("--rho", type=float, help="length of sam's ascent step [0.05]")
    g = p.add_argument_group("what is trained")
    g.add_argument("--tune", choices=("lora", "full"), default="lora",
                   help="train a LoRA, or all weights [lora]")
    g.add_argument("--r", type=int, default=8, help="LoRA rank [8]")
    g.add_argument("--lora-alpha", type=float, default=16.0, help="LoRA's scaling is this / r [16]")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=float, help="passes over the data [10 / 3]")
    g.add_argument("--max-steps", type=int, help="optimizer steps, in place of --epochs")
    g.add_argument("--batch-size", type=int, help="examples a micro-batch [16 / 4]")
    g.add_argument("--accumulate", type=int, help="micro-batches an optimizer step [1 / 4]")
    g.add_argument("--lr", type=float, help="peak learning rate [0.005 / 0.0001]")
    the_run(p)
    return p


def the_run(p):
    g = p.add_argument_group("the run")
    g.add_argument("--seed", type=int, default=42, help="[42]")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    g.add_argument("--dtype", choices=("auto", *system.DTYPES), default="auto",
                   help="of matrix products; auto = fp16 on CUDA, else fp32 [auto]")
    g.add_argument("--activation-checkpointing", action="store_true",
                   help="less memory, one more forward a backward")
    g.add_argument("--shard", action="store_true",
                   help="with torchrun: every process holds a part of the model")
    g.add_argument("--out", help="folder for the run, new or empty [a new runs/<aux>-NNN, or "
                   "<method>-NNN]")
    g = p.add_argument_group("a run that was interrupted, or is finished")
    g.add_argument("--resume", metavar="RUN", help="go on with this run, with its settings")
    g.add_argument("--save-every", type=int, default=100,
                   help="steps from one checkpoint to the next; 0 = only at Ctrl-C and SIGTERM "
                        "[100]")
    g.add_argument("--keep", type=int, help="checkpoints kept, the latest; also when the run is "
                   "finished [1, and none of a finished run]")
    g.add_argument("--verify", metavar="RUN", help="say whether model, data and adapter still are "
                   "the files that this run recorded, and do nothing else")


def get_settings(argv=None):
    """The settings in argv (None: the command line), defaults filled in. Raises ValueError."""
    s = parser().parse_args(argv)
    system.check_not_empty(s)
    if s.verify:
        usual = vars(parser().parse_args([]))
        for name in sorted(usual.keys() - {"verify", "model", "data"}):
            if getattr(s, name) != usual[name]:
                raise ValueError(f"{system.flag(name)} has no part in --verify; leave one out")
        return s
    if s.resume:
        s = settings_of_run(s.resume, argv)
    elif s.max_steps is not None and s.epochs is not None:
        raise ValueError("--max-steps stands in place of --epochs: leave one out")
    for name, value in (BUNDLED_MODEL if s.model is None else AUTHORS).items():
        if getattr(s, name) is None:
            setattr(s, name, value)
    if s.data is None:
        raise ValueError("--data is missing: with --model, name a .json or .jsonl file of examples")
    system.check_positive(s, ("r", "lora_alpha", "epochs", "max_steps", "batch_size", "accumulate",
                              "lr", "max_len", "gem_beta", "keep"), below=MOST)
    for name in ("lam", "alpha", "neftune_alpha", "rho", "seed", "save_every"):
        value = getattr(s, name)
        if value is not None and not 0 <= value < SEEDS:
            raise ValueError(f"{system.flag(name)} {value!s:.40} should be a number from 0 "
                             f"to {SEEDS:.0e}")
    check_rank(s.r, s.lora_alpha)
    if not s.resume:
        fill_method(s)
    if s.shard and s.method not in ("lfu", "sft", "prompt"):
        raise ValueError(f"--shard --method {s.method}: its step is not made for models in parts; "
                         "choose lfu, sft or prompt")
    if s.shard and s.aux in IN_PLACE:
        raise ValueError(f"--shard --aux {s.aux}: each process's ascent would move the one model "
                         "they share; choose --aux lora or reps")
    if s.shard and s.move not in ("ascent", "descent", "random"):
        raise ValueError(f"--shard --move {s.move}: on models in parts only moves without a pass "
                         "of their own are known to work; choose ascent, descent or random")
    if s.compare == "logit-kl" and s.aux in IN_PLACE and s.tune == "full":
        raise ValueError(f"--compare logit-kl --aux {s.aux} --tune full: the head that makes the "
                         "logits would move itself; choose --tune lora, or --aux lora or reps")
    return s


def settings_of_run(run, argv=None):
    """The settings that the folder `run` recorded, with the FREE ones among those in argv in their
    place. Raises ValueError for a flag in argv that says something else than the record, and for a
    record that train.py did not write."""
    file = Path(run) / "settings.json"
    if not Path(run).is_dir():
        raise ValueError(f"--resume {run}: there is no such folder; a run is a folder that "
                         "train.py wrote")
    recorded, p = jsons.read_json(file), parser()
    names = vars(p.parse_args([])).keys() - {"out", "resume", "verify"}
    takes = TAKES.get(str(recorded.get("method")), {})
    may_be_null = {"max_steps", "keep", "eval_data",
                   *(USUAL.keys() - TAKES["lfu"].keys() - takes.keys())}
    lacking = sorted(name for name in names - may_be_null if recorded.get(name) is None)
    if lacking:
        raise ValueError(f"{file} has no {', '.join(lacking)}: no run of this train.py, or one of "
                         "an earlier version")
    flags = []  # the record as a command line: the parser checks it like any other
    for name in sorted(names):
        value, flag = recorded.get(name), system.flag(name)
        if value is not None and value is not False:
            flags.append(flag if value is True else f"{flag}={value}")
    try:
        own = p.parse_args(flags)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    s = p.parse_args([*flags, *(sys.argv[1:] if argv is None else argv)])
    s.dtype = own.dtype if s.dtype == "auto" else s.dtype
    for name in sorted(names - FREE):
        if getattr(s, name) != getattr(own, name):
            raise ValueError(f"{system.flag(name)} {getattr(s, name)}: the run has "
                             f"{getattr(own, name)}, and goes on only with that")
    if s.out and Path(s.out).resolve() != Path(run).resolve():
        raise ValueError(f"--out {s.out}: a run goes on in its own folder; leave it out")
    s.out = run
    s.model, s.data = here(s.model), here(s.data)
    s.eval_data = s.eval_data and here(s.eval_data)
    if s.eval_data and not Path(s.eval_data).exists():
        raise ValueError(f"--eval-data {s.eval_data} is gone; if it lies elsewhere now, or another "
                         "file will do, name it with --eval-data")
    return s


def decisive(s):
    """The settings that decide the numbers of a run: what a checkpoint belongs to. For JSON."""
    names = vars(parser().parse_args([])).keys() - FREE
    return {name: getattr(s, name) for name in
            sorted(names | {"steps", "per_step", "processes", "data_sha256", "model_sha256"})}


def fill_method(s):
    """Fill in the flags of s.method; `--aux none` and `--lam 0` make it sft. Raises ValueError for
    a flag that was given and that it does not take."""
    if s.method == "lfu" and s.aux == "none":
        s.method = "sft"
    takes = {"aux": "aux"} if (s.method, s.aux) == ("sft", "none") else TAKES.get(s.method, {})
    for name, usual in USUAL.items():
        value, flag = getattr(s, name), system.flag(name)
        if value is None:
            setattr(s, name, usual if name in takes or name in TAKES["lfu"] else None)
        elif name not in takes:
            raise ValueError(f"{flag} {value} has no part in --method {s.method}; leave one out")
    if s.method == "lfu" and s.lam == 0:
        s.method = "sft"
    if s.method not in ("lfu", "logit_kl", "attached"):
        s.aux = "none"  # nothing auxiliary is attached


def method_settings(s, count):
    """The settings of the step BASELINES[s.method]; its lam is shared among the `count`
    micro-batches of an optimizer step."""
    values = {setting: getattr(s, flag) for flag, setting in TAKES.get(s.method, {}).items()}
    return values | {"lam": values["lam"] / count} if "lam" in values else values
