"""Claim: lm-evaluation-harness's hf model reads what export_merged writes, and its own tasks on it
give eval.py's scores, example by example: GSM8K, PIQA, ARC, HellaSwag, LAMBADA.

Slow, and skipped without lm_eval. The harness takes its own task files, told only where the
questions lie, and runs with every socket closed (test_no_network.py). The model is the bundled one
after 100 steps of SFT, merged; the questions are made up, in the forms of the real files. With
LFU_SMOLLM2 and LFU_DATA it is SmolLM2, and GSM8K and PIQA are the real ones. LFU_EXAMPLES: how many
examples a task; if not set, 8, and 3 of SmolLM2. Tolerance: equal replies, numbers and hits; 1e-2
nats a choice.

The 5 shots of GSM8K are drawn by each side with its own random numbers, so eval.py's prompts, shots
included, are what the harness asks; how it joins shots itself is compared where there is one shot
to draw from.
"""
import importlib.util
import json
import os
from pathlib import Path
import random
import sys

import pytest
import torch

from lfu_min import add_lora, load_adapter, load_model
from lfu_min.bundled import BUNDLED, CATEGORIES
from lfu_min.engine.system import ROOT
from lfu_min.files import data
from lfu_min.files.adapter import export_merged
from lfu_min.files.tokenizer import load_tokenizer
from lfu_min.lora import lora_modules
from lfu_min.scoring import tasks
from test_no_network import run

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
import train

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not importlib.util.find_spec("lm_eval"),
                                                   reason="needs lm_eval: pip install lm-eval")]
N = int(os.environ.get("LFU_EXAMPLES", 3 if "LFU_SMOLLM2" in os.environ else 8))
TASKS = {  # name: (the harness's file, the one split that is asked)
    "gsm8k": ("gsm8k/gsm8k.yaml", "test"), "piqa": ("piqa/piqa.yaml", "validation"),
    "arc": ("arc/arc_easy.yaml", "test"), "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "lambada": ("lambada/lambada_openai.yaml", "test")}
HARNESS = '''
import json, sys
from pathlib import Path
import lm_eval
from lm_eval.tasks import TaskManager
folder, model, name, shots, new = sys.argv[1:]
found = lm_eval.simple_evaluate(
    model="hf", model_args=dict(pretrained=model, dtype="float32", add_bos_token=False),
    tasks=["ours_" + name], num_fewshot=int(shots), device="cpu", batch_size=4, log_samples=True,
    bootstrap_iters=0, task_manager=TaskManager(include_path=folder, include_defaults=False),
    gen_kwargs=dict(max_gen_toks=int(new)) if name == "gsm8k" else None)
rows = [dict(doc=s["doc"], filter=s["filter"], resps=s["resps"], filtered=s["filtered_resps"],
             prompt=s["arguments"][0][0] if isinstance(s["arguments"], (list, tuple)) else
             s["arguments"]["gen_args_0"]["arg_0"],
             **{k: s[k] for k in ("acc", "acc_norm", "exact_match") if k in s})
        for s in found["samples"]["ours_" + name]]
Path(folder, "harness.json").write_text(json.dumps(
    dict(results=found["results"]["ours_" + name], rows=rows), default=str))
'''


def questions(name):
    """N made-up examples in the form of the real file."""
    pool = [example for category in CATEGORIES for example in data.read_examples(
        BUNDLED / "data" / f"{category}_test.jsonl")]
    rng = random.Random(0)
    rng.shuffle(pool)
    answers = sorted({example.answer for example in pool})
    rows = []
    for example in pool[:N]:
        choices = [example.answer] + rng.sample([a for a in answers if a != example.answer], 3)
        rng.shuffle(choices)
        gold = choices.index(example.answer)
        words = example.prompt.split(" ")
        rows.append({
            "piqa": dict(goal=example.prompt, sol1=choices[0], sol2=choices[1], label=gold % 2),
            "arc": dict(question=example.prompt, answerKey="ABCD"[gold],
                        choices=dict(text=choices, label=list("ABCD"))),
            "hellaswag": dict(activity_label="Talk", ctx_a=" ".join(words[:4]) + " [header]",
                              ctx_b=" ".join(words[4:]) or "so", label=str(gold),
                              endings=[f"{choice} [step] it." for choice in choices]),
            "lambada": dict(text=f"{example.prompt} {example.answer}")}[name])
    return rows


def first_lines(file, n):
    with open(file, encoding="utf-8") as lines:
        return [json.loads(next(lines)) for _ in range(n)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a merged model: the bundled one after some training, or SmolLM2 with a random
    LoRA."""
    out, base = tmp_path_factory.mktemp("exported"), os.environ.get("LFU_SMOLLM2", str(BUNDLED))
    model = load_model(base, dtype=torch.float32)
    if base == str(BUNDLED):
        run, _ = train.main(["--aux", "none", "--max-steps", "100", "--out", str(out / "run")])
        load_adapter(model, run)
    else:
        add_lora(model, r=4)
        with torch.no_grad():
            for _, module in lora_modules(model):
                module.lora_B.normal_(0, 0.003, generator=torch.Generator().manual_seed(1))
    export_merged(model, base, out / "merged")
    return out / "merged"


def harness(tmp_path, model, name, rows, shots=(), new=64):
    """The harness's results and samples on these rows; shots: what it may draw from."""
    yaml, split = TASKS[name]
    package = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0])
    files = {split: rows, "train": shots or rows}
    for key, content in files.items():
        (tmp_path / f"{key}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (tmp_path / f"ours_{name}.yaml").write_text(json.dumps({  # JSON is YAML
        "include": str(package / "tasks" / yaml), "task": f"ours_{name}", "tag": None,
        "dataset_path": "json", "dataset_name": None,
        "dataset_kwargs": {"data_files": {key: str(tmp_path / f"{key}.jsonl") for key in files}},
        "fewshot_split": "train"}))
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    code, said = run(tmp_path, "-c", HARNESS, str(tmp_path), str(model), name,
                     str(1 if shots else 0), str(new), timeout=60 + 300 * len(rows))
    assert code == 0, said[-3000:]
    found = json.loads((tmp_path / "harness.json").read_text())
    return found["results"], found["rows"]


def ours(tmp_path, model, name, rows, **options):
    from lfu_min.scoring.tasks import KINDS, Options, Task, measure
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    docs = KINDS[name][0](tmp_path / "asked.jsonl")
    results, by = measure(Task(name, name, docs, None, options.pop("pool", None)),
                          load_model(model), load_tokenizer(model), Options(**options))
    return {r.metric: r.value for r in results}, by[name]


@pytest.mark.parametrize("name", ["piqa", "arc", "hellaswag", "lambada"])
def test_choices_and_last_words_equal_the_harness(tmp_path, exported, name):
    folder = os.environ.get("LFU_DATA")
    if name == "piqa" and folder and "LFU_SMOLLM2" in os.environ:
        labels = (Path(folder) / "piqa_valid_labels.lst").read_text().split()
        rows = [{**row, "label": int(label)} for row, label in zip(
            first_lines(Path(folder) / "piqa_valid.jsonl", N), labels)]
    else:
        rows = questions(name)
    theirs, samples = harness(tmp_path, exported, name, rows)
    mine, examples = ours(tmp_path, exported, name, rows)
    worst = 0.0
    for sample, row in zip(samples, examples, strict=True):
        found = [float(choice[0][0]) for choice in sample["resps"]]
        nats = row.get("loglikelihoods", [row.get("loglikelihood")])
        worst = max([worst, *(abs(a - b) for a, b in zip(found, nats, strict=True))])
        for metric in ("acc", "acc_norm"):
            assert metric not in row or bool(float(sample.get(metric, row[metric]))) == row[metric]
    print(f"{name}: n {len(rows)}, eval.py {mine}, harness {theirs}, largest difference "
          f"{worst:.1e} nats")
    assert worst < 1e-2 and len(examples) == len(rows)
    for metric, value in mine.items():
        assert theirs[f"{metric},none"] == pytest.approx(value, rel=1e-3)


def check_gsm8k(mine, examples, theirs, samples):
    for name, key in (("strict-match", "strict"), ("flexible-extract", "flexible")):
        chosen = [s for s in samples if s["filter"] == name]
        for sample, row in zip(chosen, examples, strict=True):
            assert sample["prompt"] == row["prompt"]
            assert sample["resps"][0][0] == row["reply"]
            assert sample["filtered"][0] == row[key]
            assert bool(float(sample["exact_match"])) == row[f"{key}_match"]
        assert theirs[f"exact_match,{name}"] == mine[name]
    print(f"gsm8k: n {len(examples)}, eval.py {mine}, harness {theirs}")


def gsm8k_rows():
    """(questions, a pool of shots, most new tokens)"""
    if "LFU_DATA" in os.environ and "LFU_SMOLLM2" in os.environ:
        folder = Path(os.environ["LFU_DATA"])
        return (first_lines(folder / "gsm8k_test.jsonl", N),
                first_lines(folder / "gsm8k_train.jsonl", 20), 128)
    folder = BUNDLED / "data"
    rows = sorted(first_lines(folder / "word_problems_train.jsonl", 100),
                  key=lambda row: len(row["question"] + row["answer"]))  # 5 fit into 512 positions
    return first_lines(folder / "word_problems_test.jsonl", N), rows[:20], 64


def test_gsm8k_with_five_shots_equals_the_harness(tmp_path, exported):
    rows, pool, new = gsm8k_rows()
    pool = [tasks.Doc(row["question"], row["answer"]) for row in pool]
    mine, examples = ours(tmp_path, exported, "gsm8k", rows, few_shot=5, max_new_tokens=new,
                          pool=pool)
    head, tail = "Question: ", "\nAnswer:"
    asked = [{"question": example["prompt"][len(head):-len(tail)], "answer": row["answer"]}
             for example, row in zip(examples, rows, strict=True)]
    assert all(row["question"].count(head) == 5 for row in asked)
    check_gsm8k(mine, examples, *harness(tmp_path, exported, "gsm8k", asked, new=new))


def test_gsm8k_with_the_harness_own_shot_equals_it(tmp_path, exported):
    rows, pool, new = gsm8k_rows()
    mine, examples = ours(tmp_path, exported, "gsm8k", rows, few_shot=1, max_new_tokens=new,
                          pool=[tasks.Doc(pool[0]["question"], pool[0]["answer"])])
    check_gsm8k(mine, examples, *harness(tmp_path, exported, "gsm8k", rows, pool[:1], new))


def test_another_model_is_seen(tmp_path, exported):
    """Teeth: the base, without the LoRA that was merged, does not give the export's numbers."""
    rows = questions("lambada")
    base = os.environ.get("LFU_SMOLLM2", str(BUNDLED))
    theirs, _ = harness(tmp_path, base, "lambada", rows)
    mine, _ = ours(tmp_path, exported, "lambada", rows)
    assert theirs["perplexity,none"] != pytest.approx(mine["perplexity"], rel=1e-3)
