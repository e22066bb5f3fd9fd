"""Does it learn, does it forget, does it hold?  Scores the bundled model, runs of train.py, or any model.

    python eval.py                                        the bundled model: four categories and word problems
    python eval.py runs/none-000 runs/lora-000            the same for these runs, beside their base
    python eval.py --figure1 --plot figure1.png           trains SFT and LfU first: Figure 1 of the paper in one command
    python eval.py --model DIR --task gsm8k=FILE --task piqa=FILE,LABELS --task perplexity=FILE
    python eval.py RUN ... --wording | --noise | --attack     Figures 5, 6 and 3; --over-seeds: runs of one setting as one
    python eval.py RUN ... --prompt "..." | --chat        answers side by side

The measures live in lfu_min/evaluate.py, tasks.py, categories.py and robustness.py; this file reads
flags, loads one model after the other, and prints.
"""
import argparse
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from lfu_min.scoring import categories, pictures, robustness, tasks

from lfu_min.files import data

from lfu_min.bundled import BUNDLED
from lfu_min.engine import system
from lfu_min.files.adapter import load_adapter
from lfu_min.files.checkpoint import load_config, load_model, read_json
from lfu_min.scoring.measures import reply
from lfu_min.lora import remove_lora
from lfu_min.files.tokenizer import load_tokenizer

# What a run was trained with, apart from its seed: --over-seeds puts runs together that agree in
# all of these.
SETTINGS = ("lr", "alpha", "lam", "layers", "ascent_batch", "tune", "r", "lora_alpha",
            "target_modules", "epochs", "max_steps",
            "batch_size", "accumulate", "group_by_length", "warmup", "clip", "max_len",
            "data_sha256", "template", "dtype")
SHARES = {"exact_match", "strict-match", "flexible-extract", "acc", "acc_norm", "compliance",
          "not refused", "coherent"}


def get_settings(argv):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", metavar="RUN",
                   help="run folders of train.py (or peft adapters with --model)")
    p.add_argument("--model", help="Hugging Face folder of a Llama; default: the runs' base, else "
                                   "the bundled model")
    g = p.add_argument_group("what to measure (default: the bundled world's four categories and "
                             "word problems)")
    g.add_argument("--task", action="append", default=[], metavar="NAME=FILE[,LABELS]",
                   help="repeatable; NAME is one of " + ", ".join(tasks.KINDS))
    g.add_argument("--wording", action="store_true",
                   help="Figure 5: the same questions in several wordings (bundled, "
                   "or every gsm8k task under the templates of --wordings)")
    g.add_argument("--wordings", metavar="FILE",
                   help="JSON {name: template with {question}} (default: five shipped)")
    g.add_argument("--noise", action="store_true",
                   help="Figure 6: states of clean and noised embeddings, by layer")
    g.add_argument("--noise-data", metavar="FILE",
                   help="questions and answers (default: the bundled word problems)")
    g.add_argument("--noise-strength", type=float, default=5.0, help="NEFTune's alpha (default 5)")
    g.add_argument("--attack", action="store_true",
                   help="Figure 3: plain SFT on examples that comply; how many "
                   "requests are complied with after 0, 1, 2, ... steps. The runs' files are not "
                   "touched")
    g.add_argument("--attack-data", metavar="TRAIN,TEST",
                   help="examples that comply, requests (default: bundled)")
    g.add_argument("--attack-steps", default="0,1,2,5,10", help="default 0,1,2,5,10")
    g.add_argument("--attack-lr", type=float, help="default 0.0001 (0.005 on the bundled model)")
    g.add_argument("--attack-batch-size", type=int, default=16, help="default 16")
    g.add_argument("--figure1", action="store_true",
                   help="train SFT and LfU on the bundled model where runs/figure1 "
                   "does not hold them yet (seed --seed), then score them")
    g = p.add_argument_group("how to measure")
    g.add_argument("--limit", type=int,
                   help="the file's first N examples (perplexity: lines). Default: all, but "
                   f"{tasks.GENERATES} for tasks that generate")
    g.add_argument("--few-shot", type=int, default=0, metavar="K",
                   help="K solved examples in front (default 0)")
    g.add_argument("--few-shot-data", metavar="FILE[,LABELS]",
                   help="file to draw them from (default: the task's own, "
                   "never the question itself)")
    g.add_argument("--template", choices=data.TEMPLATES,
                   help="training prompt, of the bundled tasks, exact, nll, "
                   "--attack and --prompt (default: the runs', else plain)")
    g.add_argument("--split", choices=("test", "validation"), default="test",
                   help="of the bundled tasks")
    g.add_argument("--max-new-tokens", type=int, help="default 256 (80 on the bundled model)")
    g.add_argument("--window", type=int, default=1024,
                   help="tokens a window of perplexity (default 1024)")
    g.add_argument("--stride", type=int, help="tokens a window moves on (default: half of it)")
    g.add_argument("--batch-size", type=int, default=16, help="default 16")
    g.add_argument("--seed", type=int, default=1234,
                   help="of few-shot draws, noise, attack, sampling, --figure1")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    g.add_argument("--dtype", choices=("auto", *system.DTYPES), default="auto")
    g = p.add_argument_group("output")
    g.add_argument("--json", metavar="FILE", help="results, settings and every example's output")
    g.add_argument("--plot", metavar="FILE.png",
                   help="a picture of what was measured (needs matplotlib)")
    g.add_argument("--curves", action="store_true",
                   help="with --plot: loss curves of the runs instead of scores")
    g.add_argument("--over-seeds", action="store_true",
                   help="runs that differ in nothing but the seed as one column: mean "
                   "± standard deviation over seeds")
    g = p.add_argument_group("for people")
    g.add_argument("--prompt", action="append", metavar="TEXT", help="answer this; repeatable")
    g.add_argument("--chat", action="store_true",
                   help="answer line after line of the standard input, each on its own")
    g.add_argument("--temperature", type=float, default=0.7, help="0 = greedy (default 0.7)")
    g.add_argument("--top-p", type=float, default=0.9, help="default 0.9")
    s = p.parse_args(argv)
    for name in ("limit", "batch_size", "max_new_tokens", "window", "stride", "attack_batch_size",
                 "attack_lr",
                 "noise_strength"):
        value = getattr(s, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value} should be a positive number")
    if s.few_shot < 0:
        raise ValueError(f"--few-shot {s.few_shot} should be at least 0")
    if not (0 <= s.temperature < math.inf and 0 < s.top_p <= 1):
        raise ValueError(f"--temperature {s.temperature} should be at least 0, --top-p {s.top_p} "
                         "above 0 and at most 1")
    try:
        s.attack_at = sorted({int(step) for step in s.attack_steps.split(",")})
    except ValueError:
        s.attack_at = [-1]
    if s.attack_at[0] < 0:
        raise ValueError(f"--attack-steps {s.attack_steps!r} should be numbers from 0 on, like "
                         "0,1,2,5,10")
    if s.json and not Path(s.json).absolute().parent.is_dir():
        raise ValueError(f"--json {s.json}: the folder {Path(s.json).parent} does not exist")
    if s.curves and not (s.plot and s.runs):
        raise ValueError("--curves needs --plot FILE.png and at least one RUN")
    return s


# ---- which models

class Subject(NamedTuple):
    """One row of the results: the base (folder None) or a run."""
    name: str
    folder: Path = None
    settings: dict = {}


def find_subjects(s):
    """(path of the base, [base, run, run, ...]); the runs must share their base, or --model must
    name it."""
    found, base = [], s.model
    for run in dict.fromkeys(s.runs):
        folder = Path(run)
        if not folder.is_dir():
            raise ValueError(f"{run} is not a folder; a run is a folder that train.py wrote")
        adapter = (folder / "adapter_config.json").is_file()
        if not adapter and not (folder / "config.json").is_file():
            raise ValueError(f"{run} holds neither adapter_config.json nor config.json: no "
                             "finished run of train.py")
        settings = read_json(folder / "settings.json") if (folder / "settings.json").is_file() else {}
        own = settings.get("model") or (read_json(folder / "adapter_config.json").get("base_model_name_or_path")
                                        if adapter else None)
        if own and not Path(own).is_dir() and Path(own).parts[-2:] == BUNDLED.parts[-2:]:
            own = str(BUNDLED)  # the repository has moved since
        if s.model is None:
            if not own:
                raise ValueError(f"{run} does not say which model it was trained from: name it "
                                 "with --model")
            if base is not None and Path(own) != Path(base):
                raise ValueError(f"{run} was trained from {own}, other runs from {base}: score "
                                 "them in separate calls")
            base = own
        found.append(Subject(run, folder, settings))
    return base or str(BUNDLED), [Subject("base"), *found]


def each_model(base, subjects, device, dtype):
    """Yields (subject, model), one model in memory at a time: the base's weights stay, adapters
    come and go."""
    model = load_model(base, device, dtype)
    for subject in subjects:
        if subject.folder is None:
            yield subject, model
        elif (subject.folder / "adapter_config.json").is_file():
            yield subject, load_adapter(model, subject.folder)
            remove_lora(model)
        else:
            yield subject, load_model(subject.folder, device, dtype)


# ---- what to measure

def read_task(text, s):
    """(label, kind, docs, count, shots, default used) of one --task NAME=FILE[,LABELS]."""
    name, equals, rest = text.partition("=")
    file, _, labels = rest.partition(",")
    if name not in tasks.KINDS or not file:
        raise ValueError(f"--task {text!r}: write NAME=FILE or NAME=FILE,LABELS with NAME one of "
                         + ", ".join(tasks.KINDS))
    reader, _, default = tasks.KINDS[name]
    docs = reader(file, labels or None)
    count = min(len(docs), s.limit or default or len(docs))
    if s.few_shot and name in ("exact", "nll", "perplexity"):
        raise ValueError(f"--few-shot goes with the harness's prompts; {name} asks as in "
                         "training, without examples")
    shots = None
    if s.few_shot and s.few_shot_data:
        shots = reader(*s.few_shot_data.split(",", 1))
    return name, docs, count, shots, s.limit is None and count < len(docs)


def plan(s, bundled):
    """[(title, function(model, tokenizer, options) -> (results, {task: rows}))]; every file is read
    here."""
    chosen, todo = [], []
    for text in s.task:
        name, docs, count, shots, cut = read_task(text, s)
        once = sum(t.startswith(name + "=") for t in s.task) == 1
        label = name if once else f"{name} {Path(text.split('=')[1]).stem}"
        chosen.append((label, name, docs, count, shots))
        if cut:
            print(f"{label}: the first {count} of {len(docs)} examples (--limit N for more)")
    if s.wording:
        wordings = robustness.read_wordings(s.wordings or BUNDLED / "gsm8k_wordings.json")
        for label, name, docs, count, shots in chosen:
            if name == "gsm8k":
                def wording(m, t, o, label=label, docs=docs, count=count, shots=shots):
                    o.shots = shots
                    return robustness.gsm8k_wordings(m, t, docs, o, wordings, label, count)
                todo.append((f"{label} wordings", wording))
        if not todo and not bundled:
            raise ValueError("--wording needs --task gsm8k=FILE with a model that is not the "
                             "bundled one")
        if not todo:
            todo.append(("wordings", lambda m, t, o: robustness.bundled_wordings(m, t, o, s.limit)))
    if s.noise:
        examples = data.read_examples(s.noise_data
                                      or categories.files()[categories.IN_DOMAIN])[:s.limit]
        todo.append(("noise", lambda m, t, o: robustness.noise(m, t, examples, o.template, s.noise_strength, s.seed)))
    if s.attack:
        if not (bundled or s.attack_data):
            raise ValueError("--attack needs --attack-data TRAIN,TEST with a model that is not "
                             "the bundled one")
        folder = BUNDLED / "data"
        names = (s.attack_data or f"{folder}/comply_train.jsonl,{folder}/comply_test.jsonl").split(",")
        if len(names) != 2:
            raise ValueError(f"--attack-data {s.attack_data!r}: write TRAIN,TEST, two files")
        train, requests = data.read_examples(names[0]), robustness.read_requests(names[1])[:s.limit]
        todo.append(("attack", lambda m, t, o: robustness.attack(
            m, t, train, requests, o.template, s.attack_at,
            s.attack_lr or (5e-3 if bundled else 1e-4),
            s.attack_batch_size, s.seed, min(o.max_new_tokens, 128), o.batch_size, o.on_progress)))
    if not todo:
        for label, name, docs, count, shots in chosen:
            def task(m, t, o, label=label, name=name, docs=docs, count=count, shots=shots):
                o.shots = shots
                results, rows = tasks.KINDS[name][1](m, t, docs, o, label, count)
                return results, {label: rows}
            todo.append((label, task))
    if not todo:
        if not bundled:
            raise ValueError("this is not the bundled model: say what to measure, for instance "
                             "--task gsm8k=FILE")
        todo.append(("bundled world", lambda m, t, o: categories.measure(m, t, o, s.split, s.limit)))
    return todo


class Progress:
    """'run: task 32/200, 3.1/s, ETA 54 s', rewritten in place on a terminal; called with (done,
    total)."""

    def __init__(self, title):
        self.title, self.total, self.started, self.shown = title, None, time.time(), time.time()

    def __call__(self, done, total):
        now = time.time()
        if total != self.total:
            self.total, self.started = total, now if self.total is not None else self.started
        spent = max(now - self.started, 1e-9)
        if now - self.shown > (0.5 if sys.stderr.isatty() else 30) and done:
            end = "\r" if sys.stderr.isatty() else "\n"
            eta = system.duration(spent / done * (total - done))
            print(f"{self.title} {done}/{total}, {done / spent:.1f}/s, ETA {eta}   ", end=end,
                  file=sys.stderr, flush=True)
            self.shown = now


# ---- printing

def shown(r):
    """'12.5 ± 1.1' in points for shares, plain numbers for the rest."""
    share = r.metric.split(" mean")[0].split(" sd")[0] in SHARES
    scale, digits = (100, 1) if share else (1, 4 if r.metric == "cosine" else 3)
    error = "" if math.isnan(r.stderr) else f" ± {scale * r.stderr:.{digits}f}"
    return f"{scale * r.value:.{digits}f}{error}"


def over_seeds(by_run, subjects):
    """({group: results}, {group: seeds}): runs that differ in the seed alone become one; value and
    stderr of its results are mean and standard deviation over seeds (one seed: as they were).
    Groups are called SFT, LfU lora, ..., and where that is not enough, by the settings in which
    they differ."""
    groups = {}  # (method, settings as text) -> subjects
    for x in subjects:
        method = ("base" if x.folder is None else x.name if not x.settings else
                  "SFT" if x.settings["aux"] == "none" or x.settings["lam"] == 0
                  else f"LfU {x.settings['aux']}")
        groups.setdefault((method, tuple(f"{k} {x.settings.get(k)}" for k in SETTINGS)),
                          []).append(x)
    merged, seeds = {}, {}
    for (method, own), members in groups.items():
        others = [other for same, other in groups if same == method and other != own]
        name = " ".join([method, *(text for i, text in enumerate(own)
                                   if any(other[i] != text for other in others))])
        merged[name] = []
        seeds[name] = [x.settings.get("seed") for x in members]
        for found in zip(*(by_run[x.name] for x in members)):
            values = torch.tensor([r.value for r in found], dtype=torch.float64)
            spread = values.std().item() if len(found) > 1 else found[0].stderr
            merged[name].append(found[0]._replace(value=values.mean().item(), stderr=spread))
    return merged, seeds


def print_table(by_run, meaning="standard error over the n examples"):
    """One line a measure, one column a model: value ± standard error, and n."""
    names, lines = pictures.short_names(by_run), {}
    for run, results in by_run.items():
        for r in results:
            lines.setdefault((r.task, r.metric), {})[run] = r
    cells = [["task", "metric", *names.values(), "n"]]
    for (task, metric), row in lines.items():
        cells.append([task, metric, *[shown(row[name]) if name in row else "-" for name in names],
                      str(next(iter(row.values())).n)])
    widths = [max(len(row[c]) for row in cells) for c in range(len(cells[0]))]
    print()
    for row in cells:
        print("  ".join(cell.ljust(w) if c < 2 else cell.rjust(w)
                        for c, (cell, w) in enumerate(zip(row, widths))))
    print(f"value ± {meaning}; shares in %, nll in nats a token")


def print_verdict(by_run, examples, subjects):
    """Figure 1 in words: what each run learned and forgot, differences taken question by
    question."""
    def gain(run, tasks_):
        deltas = [torch.tensor([float(row["match"]) - float(old["match"])
                                for row, old in zip(examples[run][t], examples["base"][t])])
                  for t in tasks_]
        mean = sum(d.mean().item() for d in deltas) / len(deltas)
        return mean, math.sqrt(sum(d.var().item() / len(d) for d in deltas)) / len(deltas)

    print()
    scores = {}
    for subject in subjects[1:]:
        learned, forgot = gain(subject.name,
                               [categories.IN_DOMAIN]), gain(subject.name, categories.CATEGORIES)
        sft = subject.settings.get("aux") == "none" or subject.settings.get("lam") == 0
        scores.setdefault("SFT" if sft else "LfU", []).append((learned[0], forgot[0]))
        print(f"{subject.name} ({'SFT' if sft else 'LfU, ' + str(subject.settings.get('aux'))}): "
              "word problems "
              f"{100 * learned[0]:+.1f} ± {100 * learned[1]:.1f} points, other categories "
              f"{100 * forgot[0]:+.1f} ± {100 * forgot[1]:.1f}")
    if len(scores) == 2:
        (a, b), (c, d) = ([sum(x) / len(x) for x in zip(*scores[kind])] for kind in ("LfU", "SFT"))
        print(f"LfU against SFT, means over {len(scores['LfU'])} and {len(scores['SFT'])} runs: "
              "word problems "
              f"{100 * (a - c):+.1f} points, other categories {100 * (b - d):+.1f}: LfU "
              + ("does NOT forget less here." if b <= d else "forgets less, and learns no less."
                 if a >= c else
                 "forgets less, but learns less too: which is better depends on the exchange."))


def show_answers(s, base, subjects, device, dtype, template, max_new_tokens):
    """--prompt and --chat: every model's answer under the question. Models stay loaded while the
    chat goes on."""
    tokenizer = load_tokenizer(base)

    def answer(model, text):
        generator = torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(s.seed)
        return reply(model, tokenizer, [data.prompt_ids(tokenizer, text, template)],
                     max_new_tokens, ("Question:",),
                     temperature=s.temperature, top_p=s.top_p, generator=generator)[0].strip()
    if s.prompt:
        answers = [(subject.name, [answer(model, text) for text in s.prompt])
                   for subject, model in each_model(base, subjects, device, dtype)]
        for i, text in enumerate(s.prompt):
            print(f"\n{text}")
            for name, texts in answers:
                print_answer(name, texts[i], subjects)
        return [(text, {name: texts[i] for name, texts in answers})
                for i, text in enumerate(s.prompt)]
    loaded = [(subject.name, next(each_model(base, [subject], device, dtype))[1])
              for subject in subjects]
    print("Ask, one line a question (each is answered on its own); an empty line or Ctrl-D ends.",
          flush=True)
    for line in iter(sys.stdin.readline, ""):
        if not line.strip():
            break
        for name, model in loaded:
            print_answer(name, answer(model, line.strip()), subjects)
    return []


def print_answer(name, text, subjects):
    width = max(len(subject.name) for subject in subjects)
    print(f"  {name:{width}}  " + text.replace("\n", "\n" + " " * (width + 4)), flush=True)


def figure1_runs(s):
    """Train what runs/figure1 lacks: plain SFT and LfU, same seed, on the bundled model."""
    import train
    found = []
    for aux in ("none", "lora"):
        out = Path("runs") / "figure1" / f"{aux}-seed{s.seed}"
        if not (out / "adapter_model.safetensors").is_file():
            print(f"training {out}", flush=True)
            train.main(["--aux", aux, "--seed", str(s.seed), "--out", str(out), "--device",
                        s.device,
                        "--dtype", s.dtype])
        found.append(str(out))
    return found


def main(argv=None):
    """Measure, print and write what was asked. Returns the results that --json writes. ValueError
    on bad input."""
    s = get_settings(argv)
    if s.plot:
        pictures.check(s.plot)
    if s.figure1:
        s.runs += figure1_runs(s)
    device = system.pick_device(s.device)
    s.dtype, dtype = system.pick_dtype(s.dtype, device)
    base, subjects = find_subjects(s)
    load_config(base)
    tokenizer = load_tokenizer(base)
    bundled = Path(base).resolve() == BUNDLED
    template = s.template or next((x.settings["template"] for x in subjects
                                   if "template" in x.settings), "plain")
    max_new_tokens = s.max_new_tokens or (80 if bundled else 256)
    if s.curves:
        pictures.curves(s.plot, [subject for subject in subjects if subject.folder])
        print(f"wrote {s.plot}")
        return []
    if s.prompt or s.chat:
        return show_answers(s, base, subjects, device, dtype, template, max_new_tokens)

    todo = plan(s, bundled)
    print(f"base {base}  device {device}  dtype {s.dtype}  template {template}  torch "
          f"{torch.__version__}", flush=True)
    by_run, examples, started = {}, {}, time.time()
    for subject, model in each_model(base, subjects, device, dtype):
        by_run[subject.name], examples[subject.name] = [], {}
        for title, measure in todo:
            options = tasks.Options(few_shot=s.few_shot, seed=s.seed, template=template,
                                    max_new_tokens=max_new_tokens,
                                    batch_size=s.batch_size, window=s.window, stride=s.stride,
                                    on_progress=Progress(f"{subject.name}: {title}"))
            results, rows = measure(model, tokenizer, options)
            by_run[subject.name] += results
            examples[subject.name].update(rows)
    whole = todo[0][0] == "bundled world"
    table, seeds = over_seeds(by_run, subjects) if s.over_seeds else (by_run, {})
    if whole and len(subjects) > 1:
        categories.add_ranks(table)
    if s.over_seeds:
        print_table(table, "standard deviation over seeds (one seed: standard error over the n "
                           "examples)")
        print("seeds: " + "; ".join(f"{name} {', '.join(map(str, found))}"
                                    for name, found in seeds.items() if name != "base"))
    else:
        print_table(table)
    if whole and len(subjects) > 1:
        print_verdict(by_run, examples, subjects)
    print(f"({system.duration(time.time() - started)})")

    flat = [dict(run=run, **r._asdict()) for run, results in table.items() for r in results]
    if s.json:
        # NaN is not JSON: a standard error that does not exist (n = 1, ranks) is null.
        results = [{k: None if isinstance(v, float) and not math.isfinite(v) else v
                    for k, v in r.items()}
                   for r in flat]
        system.write_json(s.json, dict(
            results=results, settings={**vars(s), "base": base, "template": template,
                                       "max_new_tokens": max_new_tokens,
                                       **system.environment()},
            runs={x.name: x.settings for x in subjects},
            examples=[dict(run=run, task=task, outputs=rows) for run, by_task in examples.items()
                      for task, rows in by_task.items()]))
        print(f"wrote {s.json}")
    if s.plot:
        pictures.results(s.plot, table, subjects,
                         "standard deviation over seeds" if s.over_seeds else "one standard error")
        print(f"wrote {s.plot}")
    return flat


if __name__ == "__main__":
    system.command_line(main)
