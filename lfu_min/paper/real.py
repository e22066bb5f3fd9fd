"""LfU and its rivals on a real model and real files.

    python -m lfu_min.paper.real gsm8k --model DIR --files DIR

Fine-tunes once over 200 short examples of one data set (GSM8K or Dolly), then asks what was learned
(nats a token of held-out answers) and what else was kept: PIQA, Wikipedia text, the other data set.
SFT with a seed of its own chooses one of six learning rates for all methods: the one that is best
on examples used for nothing else, after one pass. Writes docs/results/real_NAME.md (--epochs 3:
real_NAME_3_epochs.md); an interrupted call goes on where it stopped when it is given again.

--files has all of FILES, under these names. With --recorded nothing is run, and neither model nor
files are needed: the page has what measured.jsonl has.
"""
import argparse
from functools import partial
import hashlib
import json
from pathlib import Path
import random

from ..engine import system
from ..files import data, hashes, jsons
from ..files.tokenizer import load_tokenizer
from ..scoring import tasks
from ..scoring.measures import mean_result
from . import jobs, measures, report
from .experiments import Experiment

FILES = ("gsm8k_train.jsonl", "gsm8k_test.jsonl", "dolly_3k.json", "piqa_valid.jsonl",
         "piqa_valid_labels.lst", "wikipedia_30.txt")
EXAMPLES, BATCH, MAX_LEN = 200, 4, 128  # of at most MAX_LEN tokens
VALIDATION, HELD_OUT, OTHERS, SOLVED, CHOICES, CHARACTERS = 100, 150, 100, 20, 200, 20_000
RATES = ("2e-4", "5e-4", "1e-3", "2e-3", "4e-3", "8e-3")
TUNING_SEED = 100  # used for nothing else
# In the order in which they are run. On SmolLM2 lora's consistency gradient begins five to ten
# times as long as l_SFT's with lambda 5 (docs/method.md, Which numbers to watch), with 1 about as
# long.
METHODS = {"SFT": {"aux": "none"}, "LfU-lora": {"aux": "lora"}, "LfU-reps": {"aux": "reps"},
           "LfU-inplace": {"aux": "inplace"}, "LfU-lora lam 1": {"aux": "lora", "lam": "1"},
           "NEFTune": {"method": "neftune"}, "SAM": {"method": "sam"}}
COLUMNS = ("learned nll", "right", "piqa acc", "piqa margin", "wikipedia bits", "other nll",
           "consistency_share", "gradient_cosine", "first movement")
NAMES = {"gsm8k": "200 GSM8K problems; the other set is Dolly",
         "dolly": "200 instructions of Dolly; the other set is GSM8K"}


def identity(model, files):
    """"name-1a2b3c4d" of a model and its data: the model's folder, and what all the files hold.
    ValueError where one is missing."""
    found = [hashes.model_hashes(model), {name: hashes.file_hash(files / name) for name in FILES}]
    digits = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:8]
    return f"{Path(model).resolve().name}-{digits}"


def recorded_identity(name, record):
    """The identity whose runs of `name` the record has. ValueError where it is not one."""
    found = sorted({run.split(f" {name} ")[0] for run, _ in jobs.recorded(record)
                    if f" {name} " in run})
    if len(found) != 1:
        raise ValueError(f"--recorded: {record} has runs of {' and '.join(found) or 'no model'}: "
                         "name one with --model and --files")
    return found[0]


def split(name, files, fits):
    """{part: records} of a data set, of the examples for which fits(record) is true: train,
    validation (choose the learning rate), held-out."""
    def some(file):
        rows = [row for _, row in jsons.read_records(files / file) if fits(row)]
        random.Random(0).shuffle(rows)
        return rows
    if name == "gsm8k":
        rows, held_out = some("gsm8k_train.jsonl"), some("gsm8k_test.jsonl")[:HELD_OUT]
    else:
        rows = some("dolly_3k.json")
        held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    return {"train": rows[VALIDATION:], "validation": rows[:VALIDATION], "held-out": held_out}


def parts(name, s):
    """{part: file} of split(), written unless they are there, or nothing is run."""
    files = {part: s.runs / "data" / f"{name}-{part}.jsonl"
             for part in ("train", "validation", "held-out")}
    if not s.recorded and not all(file.is_file() for file in files.values()):
        tokenizer = load_tokenizer(s.model)
        rows = split(name, s.files, lambda row: len(data.encode_example(
            tokenizer, data.as_example(row))[0]) <= MAX_LEN)
        if len(rows["train"]) < EXAMPLES or not rows["held-out"]:
            raise ValueError(f"{s.files}, {name}: {EXAMPLES + VALIDATION} examples of at most "
                             f"{MAX_LEN} tokens are needed, and some held out; there are "
                             f"{len(rows['train']) + len(rows['validation'])}")
        for part, file in files.items():
            jobs.data_file(file, rows[part])
    return files


def nll(model, tokenizer, file, count=None):
    """Nats a token of the answers in a file."""
    docs = data.read_examples(file)
    return tasks.nll(model, tokenizer, docs, tasks.Options(batch_size=8), count=count)[0][0].value


def scores(run, model, files, held_out, other):
    """What a run learned and kept, {column: number}; run None: the model itself. Shares in per
    cent, losses in nats a token, the margin in nats a question. held_out, other: files."""
    trained, tokenizer = measures.loaded(run, model)
    options = tasks.Options(batch_size=8)
    piqa = tasks.read_piqa(files / "piqa_valid.jsonl", files / "piqa_valid_labels.lst")
    accuracy, rows = tasks.choice(trained, tokenizer, piqa, options, "piqa", CHOICES)
    margins = [(1 - 2 * row["gold"]) * (row["loglikelihoods"][0] - row["loglikelihoods"][1])
               for row in rows]
    text = "".join(tasks.read_lines(files / "wikipedia_30.txt"))[:CHARACTERS]
    bits = tasks.perplexity(trained, tokenizer, [text], options)[0][1]
    return {"learned nll": nll(trained, tokenizer, held_out),
            "other nll": nll(trained, tokenizer, other, OTHERS),
            "piqa acc": 100 * accuracy[0].value,
            "piqa margin": mean_result("piqa", "margin", margins).value,
            "wikipedia bits": bits.value}


def solved(run, model, files):
    """GSM8K problems answered right, in per cent, by the last number of the reply; near nothing for
    a small model, and slow, so it is measured of the model itself and of the first seed."""
    (_, flexible), _ = tasks.gsm8k(*measures.loaded(run, model),
                                   tasks.read_gsm8k(files / "gsm8k_test.jsonl"),
                                   tasks.Options(batch_size=8, max_new_tokens=128), count=SOLVED)
    return {"right": 100 * flexible.value}


def validation(run, model, file):
    """What chooses the learning rate: the loss on examples that are used for nothing else."""
    return {"validation nll": nll(*measures.loaded(run, model), file)}


def job(setting, seed, name, s):
    """(flags, folder, measures) of jobs.py for one setting and seed; setting None: the model."""
    own, (other,) = parts(name, s), NAMES.keys() - {name}
    measure = {"scores": partial(scores, model=s.model, files=s.files, held_out=own["held-out"],
                                 other=parts(other, s)["held-out"])}
    if seed == TUNING_SEED:
        measure = {"validation": partial(validation, model=s.model, file=own["validation"])
                   } | measure
    if seed == s.seeds[0]:
        measure["solved"] = partial(solved, model=s.model, files=s.files)
    if setting is None:
        return None, s.runs / f"{s.runs.name} {name} base", measure
    file = s.runs / "data" / f"{name}-{seed}.jsonl"
    if not s.recorded:
        jobs.data_file(file, random.Random(seed).sample(
            [row for _, row in jsons.read_records(own["train"])], EXAMPLES))
    epochs = 1 if seed == TUNING_SEED else s.epochs
    words = {"examples": EXAMPLES, "batch-size": BATCH} | setting | (
        {"epochs": epochs} if epochs > 1 else {}) | {"seed": seed}
    folder = " ".join([s.runs.name, name, *(f"{k}={v}" for k, v in words.items())])
    return ({"model": s.model, "data": file, "epochs": epochs, "batch-size": BATCH, "accumulate": 1,
             "max-len": MAX_LEN, "save-every": 10, "seed": seed} | setting,
            s.runs / folder, measure | {"log": measures.log})


def tuning(name, s):
    """{learning rate: job} of SFT, with the seed that chooses one of them."""
    return {lr: job(METHODS["SFT"] | {"lr": lr}, TUNING_SEED, name, s) for lr in RATES}


def choose(name, s, record):
    """The best learning rate for SFT, of RATES."""
    runs = {lr: (flags, folder, {"validation": own["validation"]})
            for lr, (flags, folder, own) in tuning(name, s).items()}
    if s.recorded and jobs.missing(runs, record):
        raise ValueError(f"--recorded: {record} lacks the runs that choose the learning rate; "
                         "without --recorded they are made")
    jobs.announce(runs, record, s.jobs)
    found = jobs.all_measured(runs, s.jobs, s.threads, record)
    return min(RATES, key=lambda lr: found[lr]["validation nll"])


def some_methods(text):
    """"SFT,LfU-lora" -> those of METHODS, for argparse."""
    found = text.split(",")
    if not set(found) <= METHODS.keys():
        raise argparse.ArgumentTypeError(f"{text!r} should be some of {','.join(METHODS)}")
    return {row: METHODS[row] for row in found}


def main(argv=None):
    """Run what is missing of a name, write its page and print it; returns its text."""
    file, text = page(argv)
    jsons.write_text(file, text)
    print(text)
    return text


def page(argv=None):
    """(file, text) of the page, what is missing being run."""
    p = system.Parser(prog="python -m lfu_min.paper.real", description=__doc__.split("\n\n")[0],
                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("name", choices=NAMES, help="what is learned")
    p.add_argument("--model", help="Hugging Face folder")
    p.add_argument("--files", type=Path, help=f"folder with {', '.join(FILES)}")
    p.add_argument("--runs", type=Path, default=Path("runs/real"), help="where runs are kept")
    p.add_argument("--out", type=Path, default=Path("docs/results"), help="where the page goes")
    p.add_argument("--jobs", type=int, default=2, help="runs at one time")
    p.add_argument("--threads", type=int, default=1, help="CPU threads a run")
    p.add_argument("--seeds", type=jobs.seeds, default="0,1,2", help="training seeds")
    p.add_argument("--epochs", type=int, default=1, help="passes over the examples")
    p.add_argument("--methods", type=some_methods, default=",".join(METHODS),
                   help="what is run; the page has what is recorded of the others as well")
    p.add_argument("--recorded", action="store_true",
                   help=f"run nothing: a page of what {jobs.RECORD} has")
    s = p.parse_args(argv)
    system.check_positive(s, ("jobs", "threads", "epochs"))
    if TUNING_SEED in s.seeds:
        raise ValueError(f"--seeds {TUNING_SEED}: it chooses the learning rate, and nothing else")
    record = s.out / jobs.RECORD
    if (s.model is None) != (s.files is None) or s.model is None and not s.recorded:
        raise ValueError("--model and --files are needed, both, or --recorded alone")
    # another model, or other files, are other runs
    s.runs = s.runs / (identity(s.model, s.files) if s.model else recorded_identity(s.name, record))
    best = choose(s.name, s, record)
    todo = {("base", None): job(None, s.seeds[0], s.name, s)} | {
        (row, seed): job(setting | {"lr": best}, seed, s.name, s)
        for row, setting in METHODS.items() for seed in s.seeds}
    if s.epochs == 1:
        todo |= {(f"SFT at {lr}, seed {TUNING_SEED}", None): one
                 for lr, one in tuning(s.name, s).items()}
    known = jobs.recorded(record)
    resting = METHODS.keys() - s.methods.keys() if not s.recorded else {row for row, _ in todo}
    done = {(row, seed): (flags, folder, {
        measure: own[measure] for measure in own
        if row not in resting or (folder.name, measure) in known})
        for (row, seed), (flags, folder, own) in todo.items()}
    jobs.announce(done, record, s.jobs)
    found, by = jobs.all_measured(done, s.jobs, s.threads, record), {}
    for row, seed in todo:
        by.setdefault(row, []).append(found[row, seed])
    by = {row: numbers for row, numbers in by.items() if any(numbers)}
    seen = "once" if s.epochs == 1 else f"{s.epochs} times"
    shows = (f"{NAMES[s.name]}. Examples have at most {MAX_LEN} tokens and are seen {seen}, in "
             f"batches of {BATCH}; learning rate {best}"
             + (", chosen for one pass" if s.epochs > 1 else "") +
             f". Measured on {HELD_OUT} held-out examples, "
             f"{CHOICES} questions of PIQA, {CHARACTERS:,} characters of Wikipedia, {OTHERS} "
             f"examples of the other set; right: of {SOLVED} problems, by the last number of the "
             "reply, with one seed")
    lacking = {}
    for row, seed in todo:
        if done[row, seed][2].keys() < todo[row, seed][2].keys():
            lacking.setdefault(row, []).append(str(seed))
    if lacking:
        shows += ". Not run yet, or in part: " + "; ".join(
            row if seeds == ["None"] else f"{row} with seed {', '.join(seeds)}"
            for row, seeds in lacking.items())
    experiment = Experiment(shows, None, (), ("validation nll", *COLUMNS))
    model = s.runs.name.rpartition("-")[0]
    command = f"python -m lfu_min.paper.real {s.name} --model {model} --files data"
    if s.seeds != jobs.seeds(p.get_default("seeds")):
        command += f" --seeds {','.join(map(str, s.seeds))}"
    if s.methods != METHODS:
        command += f" --methods '{','.join(s.methods)}'"
    command += f" --epochs {s.epochs}" if s.epochs > 1 else ""
    command += " --recorded" if s.recorded and lacking else ""  # else it is the same page
    own = f"real_{s.name}" + (f"_{s.epochs}_epochs" if s.epochs > 1 else "")
    text = report.page(own, experiment, by, s.seeds,
                       {row: setting | {"lr": best} for row, setting in METHODS.items()
                        if row in by}, None,
                       command, jobs.machines(done, record))
    return s.out / f"{own}.md", text


if __name__ == "__main__":
    system.command_line(main)
