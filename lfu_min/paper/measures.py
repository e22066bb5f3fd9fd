"""What reproduce.py measures of a run: functions of the run's folder, or of None for the base, that
return {column: number}, shares in per cent. MEASURES, at the end, has them by name.
"""
from functools import partial
import re
from statistics import median

import torch

from ..bundled import BUNDLED, CATEGORIES
from ..engine.passes import make_batch, movement, sft_loss, states
from ..files import data, jsons
from ..files.tokenizer import load_tokenizer
from ..lfu import ascend
from ..lora import aux_lora
from ..methods.moves import gradient_at
from ..scoring import categories, robustness, tasks
from ..scoring.measures import mean_sd
from ..scoring.runs import Run, each_model

OPTIONS = tasks.Options(max_new_tokens=80, batch_size=64)

# The word problems' question in other words, behind the same story (the paper rewords GSM8K's
# prompt). The first is the one that is trained; the last stands in front of the story.
ASKED = re.compile(r"(?P<story>.*) How many (?P<things>\w+) does (?P<n>\w+) have now\?")
WORDINGS = {"trained": "{story} How many {things} does {n} have now?",
            "tell": "{story} Tell me how many {things} {n} has now.",
            "what": "{story} What is the number of {things} that {n} has now?",
            "count": "{story} Please count the {things} of {n}.",
            "short": "{story} How many {things} does {n} have?",
            "first": "How many {things} does {n} have at the end? {story}"}


STEP, DRAWS, QUESTIONS = 0.1, 4, 32  # of `worsened`; questions of each file
ATTACK_STEPS, ATTACK_LR = (0, 1, 2, 3, 5, 10, 20, 30, 40, 60), 1e-3


def loaded(run, base=BUNDLED):
    """(model, tokenizer) of a run folder; run None: of the base itself, a folder."""
    _, model = next(each_model(base, [Run(str(run), run)], "cpu", torch.float32))
    return model, load_tokenizer(base)


def scores(run, split="test"):
    """Exact match and answer NLL of the word problems and of the other categories."""
    results, _ = categories.measure(*loaded(run), OPTIONS, split)
    exact = {r.task: 100 * r.value for r in results if r.metric == "exact_match"}
    nll = {f"{r.task} nll": r.value for r in results if r.metric == "nll"}
    nll["others nll"] = mean_sd([nll[f"{c} nll"] for c in CATEGORIES])[0]
    return exact | nll


def reworded(example, wording):
    """A word problem asked in another of WORDINGS. ValueError if it is none."""
    found = ASKED.fullmatch(example.prompt)
    if not found:
        raise ValueError(f"no word problem: {example.prompt!r}")
    return example._replace(prompt=WORDINGS[wording].format(**found.groupdict()))


def wordings(run):
    """Right answers of the word problems in each wording; their mean and deviation over all."""
    model, tokenizer = loaded(run)
    examples = data.read_examples(categories.files()[categories.IN_DOMAIN])
    found = {}
    for name in WORDINGS:
        docs = [reworded(example, name) for example in examples]
        _, rows = tasks.exact(model, tokenizer, docs, OPTIONS)
        right = [tasks.right_number(row["reply"], row["target"]) for row in rows]
        found[name] = 100 * sum(right) / len(right)
    mean, sd, _ = mean_sd(list(found.values()))
    return found | {"mean over wordings": mean, "sd over wordings": sd}


def noise(run):
    """Cosine of each layer's states between clean and noised embeddings, of the word problems."""
    model, tokenizer = loaded(run)
    examples = data.read_examples(categories.files()[categories.IN_DOMAIN])
    results, _ = robustness.noise(model, tokenizer, OPTIONS, examples)
    return {r.task: r.value for r in results}


def attack(run):
    """Plain SFT on examples that comply, small steps: how many held-out requests are complied with
    (per cent), and the margin, nats a token of complying minus declining, by step."""
    own = {kind: BUNDLED / "data" / f"{kind}.jsonl" for kind in
           ("comply_train", "comply_test", "decline_test")}
    results, _ = robustness.attack(
        *loaded(run), OPTIONS, data.read_examples(own["comply_train"]),
        robustness.read_requests(own["comply_test"]), ATTACK_STEPS, ATTACK_LR,
        replies=[data.read_examples(own[kind]) for kind in ("comply_test", "decline_test")])
    scale = {"compliance": 100, "margin": 1}
    return {f"{r.metric} {r.task.split()[1]}": scale[r.metric] * r.value for r in results
            if r.metric in scale}


def worsened(run):
    """What LfU trains for, measured on what it trained: how far one ascent step (Eq 2, a fresh
    auxiliary LoRA of length STEP, along the gradient of new word problems) moves the model's
    states, and by how many nats a token it raises the loss, on the same word problems (own) and on
    the mean of the other categories (other). Means over DRAWS auxiliary LoRAs."""
    model, tokenizer = loaded(run)
    batches = {}
    for name, file in categories.files("validation").items():
        examples = data.read_examples(file)[:QUESTIONS]
        encoded = [data.encode_example(tokenizer, example) for example in examples]
        batches[name] = make_batch(*data.collate(encoded, tokenizer.eos_id))
    layers, found = range(1, model.config.num_hidden_layers + 1), {}

    @torch.no_grad()
    def everything():
        h = {name: states(model, batch) for name, batch in batches.items()}
        return h, {name: sft_loss(model, h[name][-1], batches[name]).item() for name in h}
    for draw in range(DRAWS):
        with aux_lora(model, torch.Generator().manual_seed(draw)) as th_aux:
            h, before = everything()
            ascend(th_aux, gradient_at(th_aux, model, batches[categories.IN_DOMAIN]), STEP)
            h_aux, after = everything()
        for name in batches:
            whose = "own" if name == categories.IN_DOMAIN else "other"
            moved = movement(h[name], h_aux[name], layers).max().item()
            found.setdefault(f"{whose} movement", []).append(moved)
            found.setdefault(f"{whose} loss rise", []).append(after[name] - before[name])
    return {column: mean_sd(values)[0] for column, values in found.items()}


def log(run):
    """From the run's log.jsonl: the last tenth's loss, and the medians of the numbers to watch."""
    if run is None:
        return {}
    records = [record for _, record in jsons.read_records(run / "log.jsonl")]
    last = records[-max(1, len(records) // 10):]
    found = {"train loss": mean_sd([r["sft"] for r in last])[0]}
    for name in ("consistency", "consistency_share", "gradient_cosine"):
        found[name] = median(r[name] for r in records if r[name] is not None)
    moved = [max(r["movement"]) for r in records if None not in r["movement"]]
    return found | {"movement": median(moved), "first movement": moved[0]}


MEASURES = {
    "scores_validation": partial(scores, split="validation"), "scores_test": scores,
    "wordings_test": wordings, "noise_test": noise, "attack_test": attack,
    "worsened_validation": worsened, "log_validation": log, "log_test": log}
