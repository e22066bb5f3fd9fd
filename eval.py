"""Does it learn, does it forget, does it hold?  Scores the bundled model, runs of train.py, or any
model.

    python eval.py                                the bundled model: four categories, word problems
    python eval.py runs/none-000 runs/lora-000    the same for these runs, beside their base
    python eval.py --model DIR --task gsm8k=FILE --task piqa=FILE,LABELS --task perplexity=FILE
    python eval.py RUN ... --wording | --noise | --attack      Figures 5, 6 and 3 of the paper
    python eval.py RUN ... --over-seeds --plot scores.png      runs of one setting as one column
    python eval.py RUN ... --prompt "..." | --chat             answers side by side

The measures live in lfu_min/scoring; this file reads flags, loads one model after the other, prints
and writes. Defaults stand in brackets.
"""
import argparse
from functools import partial
import math
from pathlib import Path
import signal
import sys
import time
from typing import NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import torch

from lfu_min.bundled import BUNDLED
from lfu_min.engine import system
from lfu_min.files import data, jsons
from lfu_min.files.checkpoint import load_config
from lfu_min.files.tokenizer import check_fit, load_tokenizer
from lfu_min.scoring import categories, pictures, robustness, runs as models, tables, tasks
from lfu_min.scoring.measures import reply


# ---- flags

def get_settings(argv):
    p = system.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", metavar="RUN",
                   help="run folders of train.py (or peft adapters with --model)")
    p.add_argument("--model", help="Hugging Face folder [the runs' base; or bundled]")
    what_to_measure(p.add_argument_group("what to measure [four categories and word problems of "
                                         "the bundled world]").add_argument)
    how_to_measure(p.add_argument_group("how to measure").add_argument)
    add = p.add_argument_group("output").add_argument
    add("--json", metavar="FILE", help="results, settings and every example's output")
    add("--plot", metavar="FILE.png", help="a picture of it, and FILE.pdf (needs matplotlib)")
    add("--over-seeds", action="store_true",
        help="runs that differ in the seed alone as one column, mean ± standard deviation")
    add = p.add_argument_group("for people").add_argument
    add("--prompt", action="append", metavar="TEXT", help="answer this; repeatable")
    add("--chat", action="store_true", help="answer every line of the standard input, on its own")
    add("--temperature", type=float, default=0.7, help="0 = greedy [0.7]")
    add("--top-p", type=float, default=0.9, help="[0.9]")
    return checked(p.parse_args(argv))


def what_to_measure(add):
    add("--task", action="append", default=[], metavar="NAME=FILE[,LABELS]",
        help="repeatable; NAME is one of " + ", ".join(tasks.KINDS))
    add("--wording", action="store_true", help="Figure 5: the same questions in several wordings "
        "(bundled, or every gsm8k task under the templates of --wordings)")
    add("--wordings", metavar="FILE",
        help="JSON {name: template with {question}} [five shipped]")
    add("--noise", action="store_true", help="Figure 6: clean and noised embeddings, by layer")
    add("--noise-data", metavar="FILE",
        help="questions and answers [the bundled word problems]")
    add("--noise-strength", type=float, default=5.0, help="NEFTune's alpha [5]")
    add("--attack", action="store_true", help="Figure 3: plain SFT on examples that comply; how "
        "many requests are complied with after 0, 1, 2, ... steps. Runs' files are not touched")
    add("--attack-data", metavar="TRAIN,TEST", help="examples that comply, requests [bundled]")
    add("--attack-steps", type=steps, default="0,1,2,5,10", help="[0,1,2,5,10]")
    add("--attack-lr", type=float, help="[0.0001; 0.005 on the bundled model]")
    add("--attack-batch-size", type=int, default=16, help="[16]")


def how_to_measure(add):
    add("--limit", type=int, help="the file's first N examples (perplexity: lines) [all, but "
        f"{tasks.GENERATES} for tasks that generate]")
    add("--few-shot", type=int, default=0, metavar="K", help="K solved examples in front [0]")
    add("--few-shot-data", metavar="FILE[,LABELS]",
        help="file to draw them from [the task's own, never the question itself]")
    add("--template", choices=data.TEMPLATES, help="training prompt [each run's own, or plain]")
    add("--split", choices=("test", "validation"), default="test", help="of bundled tasks [test]")
    add("--max-new-tokens", type=int, help="[256; 80 on the bundled model]")
    add("--window", type=int, default=1024, help="tokens a window of perplexity [1024]")
    add("--stride", type=int, help="tokens a window moves on [half of it]")
    add("--batch-size", type=int, default=16, help="[16]")
    add("--seed", type=int, default=1234, help="of few-shot, noise, attack and sampling [1234]")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    add("--dtype", choices=("auto", *system.DTYPES), default="auto", help="[auto]")


def steps(text):
    """"0,1,5" -> [0, 1, 5]; a ValueError becomes argparse's message."""
    found = sorted({int(step) for step in text.split(",")})
    if found[0] < 0:
        raise ValueError
    return found


def checked(s):
    system.check_not_empty(s)
    system.check_positive(s, ("limit", "batch_size", "max_new_tokens", "window", "stride",
                              "attack_batch_size", "attack_lr", "noise_strength"))
    if not 0 <= s.seed < 2**60:
        raise ValueError(f"--seed {s.seed!s:.40} should be a number from 0 to {2**60:.0e}")
    if s.few_shot < 0 or not 0 <= s.temperature < math.inf:
        raise ValueError(f"--few-shot {s.few_shot}, --temperature {s.temperature}: both from 0 on")
    for name, needed in (("few_shot_data", "few_shot"), ("few_shot", "task"), ("wordings", "task"),
                         ("wordings", "wording"), ("noise_data", "noise"),
                         ("attack_data", "attack"), ("attack_lr", "attack")):
        if getattr(s, name) and not getattr(s, needed):
            raise ValueError(f"{system.flag(name)} has no part without {system.flag(needed)}; "
                             "leave it out")
    if not 0 < s.top_p <= 1:
        raise ValueError(f"--top-p {s.top_p} should be above 0 and at most 1")
    if s.prompt or s.chat:
        asked = [system.flag(name) for name in ("task", "wording", "noise", "attack", "over_seeds",
                                                "json", "plot") if getattr(s, name)]
        if asked or s.prompt and s.chat:
            raise ValueError(f"{asked[0] if asked else '--chat'} has no part in "
                             f"{'--prompt' if s.prompt else '--chat'}; leave one out")
    if s.json:
        jsons.check_output("--json", s.json)
        if not is_result(Path(s.json)):
            raise ValueError(f"--json {s.json} is there and no result of eval.py; name another "
                             "file")
    if s.plot:
        if s.json and Path(s.json).resolve() == Path(s.plot).with_suffix(".pdf").resolve():
            raise ValueError(f"--json {s.json} is where --plot writes its PDF; name another file")
        pictures.check(s.plot)
    return s


def is_result(path):
    """Whether --json may replace the file: it is not there, empty, or written by --json."""
    try:
        return not path.exists() or not path.stat().st_size or "results" in jsons.read_json(path)
    except ValueError:
        return False


# ---- what to measure

class Step(NamedTuple):
    """One thing to measure with every model."""
    panel: str  # of the picture; its last word says how it is drawn
    label: str
    measure: object  # (model, tokenizer, options) -> (results, {task: rows})


def plan(s, bundled):
    """[Step, ...]; every file is read here."""
    chosen, found = read_tasks(s), []
    if s.wording:
        found += wording_steps(s, bundled, chosen)
    if s.noise:
        file = s.noise_data or categories.files()[categories.IN_DOMAIN]
        examples = data.read_examples(file)[:s.limit]
        found.append(Step("noise", "noise", partial(
            robustness.noise, examples=examples, strength=s.noise_strength, seed=s.seed)))
    if s.attack:
        found.append(attack_step(s, bundled))
    found += [Step("scores", t.label, partial(tasks.measure, t)) for t in chosen
              if not (s.wording and t.kind == "gsm8k")]  # those are measured in every wording
    if found:
        return found
    if not bundled:
        raise ValueError("not the bundled model: say what to measure, like --task gsm8k=FILE")
    return [Step("scores", "bundled world",
                 partial(categories.measure, split=s.split, limit=s.limit))]


def read_tasks(s):
    """The --task flags as [tasks.Task, ...], with labels that tell them apart."""
    parts = []  # (kind, file, labels, names: each says more than the one before)
    for text in dict.fromkeys(s.task):
        kind, _, rest = text.partition("=")
        file, _, labels = rest.partition(",")
        if kind not in tasks.KINDS or not file:
            raise ValueError(f"--task {text!r}: write NAME=FILE[,LABELS], NAME one of "
                             + ", ".join(tasks.KINDS))
        if s.few_shot and kind in ("exact", "nll", "perplexity"):
            raise ValueError(f"--few-shot: {kind} asks as in training, without examples")
        parts.append((kind, file, labels, (kind, f"{kind} {Path(file).stem}", f"{kind} {rest}")))
    chosen, levels = [], list(zip(*(names for *_, names in parts)))
    for kind, file, labels, names in parts:
        label = next(name for name, level in zip(names, levels) if level.count(name) == 1)
        docs, shots = tasks.read(kind, file, labels), None
        if s.few_shot_data:
            shots = tasks.read(kind, *s.few_shot_data.split(",", 1))
        default = tasks.KINDS[kind][2]
        count = min(len(docs), s.limit or default or len(docs))
        if s.limit is None and count < len(docs):
            print(f"{label}: the first {count} of {len(docs)} examples (--limit N for more)")
        chosen.append(tasks.Task(label, kind, docs, count, shots))
    return chosen


def wording_steps(s, bundled, chosen):
    templates = robustness.read_wordings(s.wordings or BUNDLED / "gsm8k_wordings.json")
    found = [Step(f"{task.label} wordings", f"{task.label} wordings",
                  partial(robustness.gsm8k_wordings, task, templates))
             for task in chosen if task.kind == "gsm8k"]
    if not found and not bundled:
        raise ValueError("--wording needs --task gsm8k=FILE where the model is not the bundled one")
    return found or [Step("wordings", "wordings",
                          partial(robustness.bundled_wordings, limit=s.limit))]


def attack_step(s, bundled):
    if not (bundled or s.attack_data):
        raise ValueError("--attack needs --attack-data where the model is not the bundled one")
    own = [str(BUNDLED / "data" / f"comply_{split}.jsonl") for split in ("train", "test")]
    files = s.attack_data.split(",") if s.attack_data else own
    if len(files) != 2:
        raise ValueError(f"--attack-data {s.attack_data!r}: write TRAIN,TEST, two files")
    return Step("attack", "attack", partial(
        robustness.attack, train=data.read_examples(files[0]),
        requests=robustness.read_requests(files[1])[:s.limit], at=s.attack_steps,
        lr=s.attack_lr or (5e-3 if bundled else 1e-4), batch_size=s.attack_batch_size, seed=s.seed))


# ---- measure, print, write

def main(argv=None):
    """Measure, print and write what was asked. Returns the results that --json writes. ValueError
    on bad input."""
    s, started = get_settings(argv), time.time()
    device = system.pick_device(s.device)
    s.dtype, dtype = system.pick_dtype(s.dtype, device)
    base, runs = models.find_runs(s.runs, s.model)
    columns = models.by_seed(runs) if s.over_seeds else {run.name: [run] for run in runs}
    templates = models.templates(runs, s.template)
    config = load_config(base)
    for line in models.other_base(base, runs):
        print(line)
    tokenizer, bundled = load_tokenizer(base), Path(base).resolve() == BUNDLED
    check_fit(tokenizer, config, base)
    s.max_new_tokens = s.max_new_tokens or (80 if bundled else 256)
    if s.prompt or s.chat:
        return show_answers(s, base, runs, device, dtype, tokenizer, templates)
    todo = plan(s, bundled)
    print(f"base {base}  device {device}  dtype {s.dtype}  template "
          f"{', '.join(sorted(set(templates.values())))}  torch {torch.__version__}", flush=True)
    loaded = models.each_model(base, runs, device, dtype)
    panels, examples = {step.panel: {} for step in todo}, {}

    def write(results, finished):
        jsons.write_json(s.json, dict(
            finished=finished, results=results, runs={run.name: run.settings for run in runs},
            settings={**vars(s), "base": base, "templates": templates, **system.environment()},
            examples=[dict(run=run, task=task, outputs=rows) for run, by_task in examples.items()
                      for task, rows in by_task.items()]))

    try:
        for _ in measure(s, todo, loaded, tokenizer, templates, panels, examples):
            if s.json:  # what is done outlives whatever ends this
                write(flat(by_run(panels, runs)), finished=False)
    except BaseException:
        if done := by_run(panels, runs):
            print(f"\nnot finished; so far:\n{tables.text(done)}", flush=True)
        raise
    if "noise" in panels:
        robustness.add_differences(panels["noise"], examples, runs)
    table = tables.over_seeds(by_run(panels, runs), columns)
    compared = todo[0].label == "bundled world" and len(runs) > 1
    if compared:
        categories.add_ranks(table)
    print("\n" + tables.text(table, columns if s.over_seeds else None))
    if compared:
        print("\n" + tables.verdict(examples, runs))
    print(f"({system.duration(time.time() - started)})")
    if s.json:
        write(flat(table, columns), finished=True)
        print(f"wrote {s.json}")
    if s.plot:
        pictures.results(s.plot, panels, columns)
        print(f"wrote {s.plot} and {Path(s.plot).with_suffix('.pdf')}")
    return flat(table, columns)


def by_run(panels, runs):
    """{run's name: results} of what has been measured."""
    found = {run.name: [r for panel in panels.values() for r in panel.get(run.name, [])]
             for run in runs}
    return {name: results for name, results in found.items() if results}


def flat(table, columns=None):
    """{column: results} as a list of dictionaries. Over several runs of a column, {column: [run,
    ...]}, what is called stderr elsewhere is called sd."""
    found = []
    for name, results in table.items():
        error = "sd" if len((columns or {}).get(name, ())) > 1 else "stderr"
        found += [{"run": name, **{error if field == "stderr" else field: value
                                   for field, value in r._asdict().items()}} for r in results]
    return found


def measure(s, todo, loaded, tokenizer, templates, panels, examples):
    """Fills in panels, {panel: {run: results}}, and examples, {run: {task: rows}}; yields after
    each step with each model. loaded: yields (run, model)."""
    for run, model in loaded:
        check_fit(tokenizer, model.config, run.name)
        examples[run.name] = {}
        for step in todo:
            options = tasks.Options(
                few_shot=s.few_shot, seed=s.seed, template=templates[run.name],
                max_new_tokens=s.max_new_tokens, batch_size=s.batch_size, window=s.window,
                stride=s.stride, on_progress=system.progress(f"{run.name}: {step.label}"))
            try:
                results, rows = step.measure(model, tokenizer, options=options)
            except ValueError as error:
                raise ValueError(f"{run.name}, {step.label}: {error}") from None
            panels[step.panel].setdefault(run.name, []).extend(results)
            examples[run.name].update(rows)
            yield
        del model  # before the next one is loaded


def show_answers(s, base, runs, device, dtype, tokenizer, templates):
    """--prompt and --chat: every model's answer under the question. Models stay loaded while the
    chat goes on. Returns [(question, {run: answer}), ...] of --prompt."""
    def answer(run, model, text):
        generator = torch.Generator(device).manual_seed(s.seed)
        ids = data.prompt_ids(tokenizer, text, templates[run.name])
        return reply(model, tokenizer, [ids], s.max_new_tokens, ("Question:",), generator=generator,
                     template=templates[run.name], temperature=s.temperature,
                     top_p=s.top_p)[0].strip()

    def show(name, text, width=max(len(run.name) for run in runs)):
        text = system.on_screen(text).replace("\n", "\n" + " " * (width + 4))
        print(f"  {name:{width}}  {text}", flush=True)

    if s.prompt:
        answers = {run.name: [answer(run, model, text) for text in s.prompt]
                   for run, model in models.each_model(base, runs, device, dtype)}
        found = [(text, {name: texts[i] for name, texts in answers.items()})
                 for i, text in enumerate(s.prompt)]
        for text, by_run in found:
            print(f"\n{text}")
            for name, said in by_run.items():
                show(name, said)
        return found
    loaded = [next(models.each_model(base, [run], device, dtype)) for run in runs]
    print("Ask, one line a question (each is answered on its own); Ctrl-D ends.", flush=True)
    for line in filter(None, map(str.strip, sys.stdin)):
        for run, model in loaded:
            show(run.name, answer(run, model, line))
    return []


if __name__ == "__main__":
    system.command_line(main)
