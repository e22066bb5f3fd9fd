"""Claim: tasks.py gives the numbers of lm-evaluation-harness's definitions. Extraction on hand-made
answers, and every task on small files against a second computation, with transformers' model and
tokenizer, one example at a time. Tolerance: 1e-4 nats for log-likelihoods of random fp32 models,
equality for everything counted.
"""
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from conftest import quiet_transformers, tiny_model, transformers_twin
from lfu_min.bundled import BUNDLED
from lfu_min.engine.passes import make_batch
from lfu_min.engine.system import ROOT
from lfu_min.files import data
from lfu_min.files.tokenizer import load_tokenizer
from lfu_min.lfu import sft_step
from lfu_min.scoring import measures, tasks

BAD = tasks.INVALID
# reply, strict, flexible: what the harness's two filters take from it, before normalisation; worked
# out by hand.
ANSWERS = [
    ("#### 18", "18", "18"),
    ("She makes 9 * 2 = 18.\n#### 18", "18", "18"),
    ("#### 18\n#### 19", "18", "19"),  # strict takes the first, flexible the last
    ("#### -5", "-5", "-5"),
    ("#### -5.25", "-5.25", "-5.25"),
    ("#### 3.5", "3.5", "3.5"),
    ("#### 1,000", "1,000", "1,000"),
    ("#### 1,234,567.", "1,234,567.", "1,234,567."),
    ("#### 72.0", "72.0", "72.0"),
    ("#### $18", BAD, "$18"),  # strict allows no dollar sign
    ("#### $18.00", BAD, "$18.00"),
    ("####18", BAD, "18"),  # strict wants the blank
    ("#### 18 dollars", "18", "18"),
    ("#### 18%", "18", "18"),
    ("### 18", BAD, "18"),
    ("##### 18", "18", "18"),
    ("#### eighteen", BAD, BAD),
    ("#### ", BAD, BAD),
    ("", BAD, BAD),
    ("I do not know", BAD, BAD),
    ("I do not know.", BAD, BAD),  # one dot is too short for the first pattern
    ("I do not know...", BAD, "..."),  # a tail of dots is "a number"
    ("The answer is 7", BAD, "7"),
    ("The answer is 7.", BAD, "7."),
    ("The answer is 42...", BAD, "42..."),
    ("The answer is 42 ...", BAD, "..."),
    ("3 + 4 = 7", BAD, "7"),
    ("3+4=7", BAD, "7"),
    ("10-4", BAD, "-4"),  # a minus sign sticks to what follows
    ("It costs $5", BAD, "$5"),
    ("It costs $5.", BAD, "$5."),
    ("It costs $1,250.50 in all", BAD, "$1,250.50"),
    ("Between 3 and 12 of them", BAD, "12"),
    ("12 apples, 3 pears", BAD, "3"),
    ("12, 13, 14", BAD, "14"),
    ("12,13,14", BAD, "12,13,14"),
    ("at 7:30", BAD, "30"),
    ("half, 1/2", BAD, "2"),
    ("x = -0.5", BAD, "-0.5"),
    ("-8 degrees", BAD, "-8"),
    ("- 8 degrees", BAD, "8"),
    ("5 and then nothing, .", BAD, "5"),
    ("5 and then nothing,.", BAD, ",."),  # punctuation again
    ("price: $", BAD, BAD),
    ("price: $$", BAD, "$$"),
    ("2^10 = 1024", BAD, "1024"),
    ("#### 1 000", "1", "000"),
    ("Answer: 3\n\n#### 0", "0", "0"),
]
# given, gold, equal after normalisation
NORMALISED = [
    ("18", "so\n#### 18", True), ("18.", "#### 18", True), ("$18", "#### 18", True),
    ("1,000", "#### 1000", True), ("1000", "#### 1,000", True), ("$1,000.", "#### 1000", True),
    ("#### 18", "#### 18", True),
    ("18.00", "#### 18", False), ("72.0", "#### 72", False), ("-18", "#### 18", False),
    (BAD, "#### 18", False), ("18..", "#### 18", False), ("...", "#### 18", False),
    ("018", "#### 18", False),
]


@pytest.mark.parametrize("text, strict, flexible", ANSWERS)
def test_extraction(text, strict, flexible):
    assert (tasks.strict_answer(text), tasks.flexible_answer(text)) == (strict, flexible)


@pytest.mark.parametrize("given, gold, equal", NORMALISED)
def test_normalisation(given, gold, equal):
    assert (tasks.normalise(given) == tasks.normalise(gold)) == equal


def test_there_are_enough_hand_made_answers_and_they_would_catch_a_swapped_choice():
    assert len(ANSWERS) >= 40
    assert any(s != f for _, s, f in ANSWERS) and sum(s != BAD for _, s, _ in ANSWERS) > 10
    # last, not first
    last = [re.findall(r"#### (\-?[0-9\.\,]+)", text)[-1:] or [BAD] for text, _, _ in ANSWERS]
    assert any(wrong[0] != strict for wrong, (_, strict, _) in zip(last, ANSWERS))


# ---- readers

PIQA = [dict(goal="add 2 and 3", sol1="5", sol2="it is a dog "),
        dict(goal="name an animal", sol1="red apples", sol2="fox")]
COLOURS = [dict(text="the key", label="A"), dict(text="the sky", label="B"),
           dict(text="bread", label="C")]
ARC = [dict(question=dict(stem="Which is blue?", choices=COLOURS), answerKey="B"),
       dict(question="What is 1 + 1?", answerKey="1",
            choices=dict(text=["2", "3", "4", "10"], label=list("1234")))]
ENDINGS = ["eats [step] it.", "flies  away.", "sells the   house.", " sings"]
HELLASWAG = [dict(activity_label="Baking", ctx_a="A man [header] bakes [title] bread.",
                  ctx_b="then HE", endings=ENDINGS, label="2")]
LAMBADA = [dict(text="Ann has the key and gives the key"),
           dict(text="The dog and the cat see the dog .")]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def docs(tmp_path):
    labels = tmp_path / "labels.lst"
    labels.write_text("0\n1\n")
    return {"piqa": tasks.read_piqa(written(tmp_path / "piqa.jsonl", PIQA), labels),
            "arc": tasks.read_arc(written(tmp_path / "arc.jsonl", ARC)),
            "hellaswag": tasks.read_hellaswag(written(tmp_path / "hs.jsonl", HELLASWAG)),
            "lambada": tasks.read_lambada(written(tmp_path / "lambada.jsonl", LAMBADA))}


def test_prompts_and_choices_are_the_harnesss(docs):
    assert docs["piqa"][1] == tasks.Doc("Question: name an animal\nAnswer:", "fox",
                                        ("red apples", "fox"), 1)
    choices = ("the key", "the sky", "bread")
    assert docs["arc"][0] == tasks.Doc("Question: Which is blue?\nAnswer:", "the sky", choices, 1)
    assert docs["arc"][1].gold == 0 and docs["arc"][1].choices[3] == "10"
    # "[header]" goes, " [title]" is ". ", "  " is " "
    prompt = "Baking: A man bakes. bread. Then he"
    endings = ("eats it.", "flies away.", "sells the  house.", "sings")
    assert docs["hellaswag"][0] == tasks.Doc(prompt, "sells the  house.", endings, 2)
    assert docs["lambada"][1] == tasks.Doc("The dog and the cat see the dog", ".")


@pytest.mark.parametrize("name, rows, labels, words", [
    ("piqa", PIQA, "0\n", "1 labels"), ("piqa", PIQA, "0\n2\n", "label '2'"),
    ("piqa", PIQA, None, "no label"),
    ("piqa", [dict(goal="a", sol1="b")], None, "sol2"),
    ("arc", [dict(ARC[0], answerKey="E")], None, "answerKey 'E'"),
    ("lambada", [dict(text="ends in a blank ")], None, "no last word"),
    ("gsm8k", [dict(question="a", answer="5")], None, "####"),
    ("arc", [dict(question="a", answerKey="A", choices=[])], None, "text and label"),
    ("lambada", [], None, "is empty"), ("perplexity", [], None, "no text")])
def test_a_file_that_does_not_fit_is_named(name, rows, labels, words, tmp_path):
    path = written(tmp_path / "file.jsonl", rows)
    if labels is not None:
        (tmp_path / "labels").write_text(labels)
    with pytest.raises(ValueError, match=words):
        tasks.read(name, path, labels and tmp_path / "labels")


# ---- parity with transformers

class Theirs:
    """The harness's definitions, spelled out with transformers' model and tokenizer, without
    batches or padding."""

    def __init__(self, model, tokenizer, limit):
        self.model, self.tokenizer, self.limit = model, tokenizer, limit

    def logits(self, ids):
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].double()

    def loglikelihood(self, context, continuation):
        blanks = len(context) - len(context.rstrip())
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        ctx = self.tokenizer(context)["input_ids"]
        cont = self.tokenizer(context + continuation)["input_ids"][len(ctx):]
        ids = (ctx + cont)[-(self.limit + 1):]
        p = self.logits(ids[:-1]).log_softmax(-1)[-len(cont):]
        return p.gather(1, torch.tensor(cont)[:, None]).sum().item(), p.argmax(-1).tolist() == cont

    def generate(self, prompt, new):
        ids = self.tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            out = self.model.generate(torch.tensor([ids]),
                                      attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                                      max_new_tokens=new, do_sample=False, pad_token_id=0,
                                      eos_token_id=self.tokenizer.eos_token_id)[0, len(ids):]
        text = self.tokenizer.decode(out, skip_special_tokens=True,
                                     clean_up_tokenization_spaces=False)
        for stop in ("Question:", "</s>", "<|im_end|>"):
            text = text.split(stop)[0]
        return text


def check_choice(theirs, model, tokenizer, docs, tolerance=1e-4, **options):
    (acc, acc_norm), rows = tasks.choice(model, tokenizer, docs, tasks.Options(**options), "t")
    hits = []
    for doc, row in zip(docs, rows):
        lls = [theirs.loglikelihood(doc.prompt, " " + choice)[0] for choice in doc.choices]
        assert max(abs(a - b) for a, b in zip(lls, row["loglikelihoods"])) < tolerance
        norm = [ll / len(choice) for ll, choice in zip(lls, doc.choices)]
        hits.append((lls.index(max(lls)) == doc.gold, norm.index(max(norm)) == doc.gold))
    n = len(docs)
    for r, values in zip((acc, acc_norm), zip(*hits)):
        mean = sum(values) / n
        assert r.value == pytest.approx(mean) and r.n == n
        assert r.stderr == pytest.approx(math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1
                                         else math.nan, nan_ok=True)
    return acc, acc_norm


@pytest.fixture(scope="module")
def tiny():
    transformers = quiet_transformers()
    tokenizer = load_tokenizer(BUNDLED)
    model = tiny_model(vocab_size=896, std=0.15)
    twin = transformers_twin(model, vocab_size=896)
    return model, tokenizer, Theirs(twin, transformers.AutoTokenizer.from_pretrained(BUNDLED), 256)


@pytest.mark.parametrize("name", ["piqa", "arc", "hellaswag"])
def test_multiple_choice_equals_transformers(tiny, docs, name):
    model, tokenizer, theirs = tiny
    check_choice(theirs, model, tokenizer, docs[name], batch_size=3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_log_likelihood_that_is_no_number_is_no_wrong_answer(tiny, docs, bad, monkeypatch):
    """NaN and inf are refused by name, wherever they stand among the choices."""
    model, tokenizer, _ = tiny
    for place in range(5):
        def scored(model, tokenizer, pairs, *rest):
            return [(bad if k == place else -1.0, True) for k in range(len(pairs))]
        monkeypatch.setattr(tasks, "score", scored)
        where = 1 if place < 3 else 2  # the first question has three choices
        with pytest.raises(ValueError, match=f"^arc, example {where}: acc is nan"):
            tasks.choice(model, tokenizer, docs["arc"], tasks.Options(), "arc")
    with pytest.raises(ValueError, match="^lambada, example 1: perplexity is "):
        monkeypatch.setattr(tasks, "score", lambda *arguments: [(bad, True), (-1.0, True)])
        tasks.last_word(model, tokenizer, docs["lambada"], tasks.Options())


def test_last_word_equals_transformers(tiny, docs):
    model, tokenizer, theirs = tiny
    (acc, perplexity), rows = tasks.last_word(model, tokenizer, docs["lambada"],
                                              tasks.Options(batch_size=1))
    expected = [theirs.loglikelihood(doc.prompt, " " + doc.target) for doc in docs["lambada"]]
    assert [row["acc"] for row in rows] == [greedy for _, greedy in expected]
    assert perplexity.value == pytest.approx(math.exp(-sum(ll for ll, _ in expected) / 2), rel=1e-4)


def test_a_greedy_match_is_seen(tiny):
    """LAMBADA's acc on a word that IS what the model would say: every wrong word must fail, this
    one must not."""
    model, tokenizer, theirs = tiny
    context = tokenizer.encode("Ann has the key")
    word = theirs.logits(context)[-1].argmax().item()
    pair = [(context, [word]), (context, [(word + 1) % 896]), (context, [word, 5])]
    greedy = [bool(hit.all()) for _, hit in measures.token_nats(model, pair)]
    assert greedy[:2] == [True, False]


def test_the_split_at_the_context_and_the_empty_context(tiny):
    tokenizer = tiny[1]
    context, continuation = measures.split_continuation(tokenizer, "What is 3 + 4?  ", "x")
    assert context == tokenizer.encode("What is 3 + 4?") and tokenizer.decode(continuation) == "  x"
    empty = measures.split_continuation(tokenizer, "", " key")
    assert empty == ([tokenizer.eos_id], tokenizer.encode(" key"))
    # one token may span the border
    pieces = measures.split_continuation(tokenizer, "the mar", "ket")
    assert pieces[1] == tokenizer.encode("the market")[len(tokenizer.encode("the mar")):]


@pytest.mark.slow
def test_gsm8k_equals_transformers_with_shots_and_stops_at_question(tiny):
    model, tokenizer, theirs = tiny
    docs = tasks.read_gsm8k(BUNDLED / "data" / "word_problems_test.jsonl")[:5]
    options = tasks.Options(few_shot=1, max_new_tokens=24, batch_size=2)
    _, rows = tasks.gsm8k(model, tokenizer, docs, options)
    for row, doc in zip(rows, docs):
        assert row["prompt"].endswith(f"\n\nQuestion: {doc.prompt}\nAnswer:")
        assert row["prompt"].count("Question:") == 2 and doc.target not in row["prompt"]
        assert row["reply"] == theirs.generate(row["prompt"], 24)
        assert row["strict"] == tasks.strict_answer(row["reply"])
    again = tasks.gsm8k(model, tokenizer, docs, options)[1]
    assert again == rows, "the shots are a function of the seed"


def test_shots_are_never_the_question_itself():
    docs = [tasks.Doc(f"q{i}", f"a{i}") for i in range(5)]
    prompts = lambda seed: tasks.with_shots(docs, tasks.Options(few_shot=4, seed=seed))
    for i, prompt in enumerate(prompts(0)):
        *shots, asked = prompt.split("\n\n")
        assert asked == f"q{i}" and sorted(shots) == [f"q{j} a{j}" for j in range(5) if j != i]
    assert prompts(0) == prompts(0) and len({prompts(seed)[0] for seed in range(9)}) > 1
    assert tasks.with_shots(docs, tasks.Options(), 2, "Ask {question}") == ["Ask q0", "Ask q1"]
    for shots in (docs, docs[:3] + [tasks.Doc("q4", "other")] * 2, None):  # named, or its own twice
        twice = docs if shots else docs + docs
        few = 2 if shots else 8
        for i, prompt in enumerate(tasks.with_shots(twice, tasks.Options(few, shots))):
            assert f"q{i % 5} " not in prompt and prompt.endswith(f"\n\nq{i % 5}")
    with pytest.raises(ValueError, match="few-shot 5: at most 4, as there are"):
        tasks.with_shots(docs, tasks.Options(5, docs))


def test_standard_errors_by_hand():
    r = measures.mean_result("t", "acc", [1, 0, 0, 1, 1])  # deviation sqrt(1.2 / 4), n = 5
    assert r == ("t", "acc", pytest.approx(0.6), pytest.approx(math.sqrt(0.3 / 5)), 5)
    assert math.isnan(measures.mean_result("t", "acc", [1]).stderr)
    r = measures.ratio_result("t", "nll", [2.0, 3.0, 7.0], [1, 2, 3])  # 12 / 6; residuals 0, -1, 1
    assert r == ("t", "nll", pytest.approx(2.0), pytest.approx(math.sqrt(2 * 3 / 2) / 6), 3)
    assert measures.mean_sd([0.2, 0.4]) == (pytest.approx(0.3), pytest.approx(0.02 ** 0.5), 2)
    alone = measures.mean_sd([0.2])
    assert alone[0] == 0.2 and math.isnan(alone[1]) and alone[2] == 1
    for measure in (measures.mean_result, lambda *a: measures.ratio_result(*a, [1, 1])):
        with pytest.raises(ValueError, match="t, example 2: nll is inf"):
            measure("t", "nll", [1.0, math.inf])


def test_a_reply_ends_before_a_stop_string_that_spans_tokens(tiny, monkeypatch):
    tokenizer = tiny[1]
    ids = tokenizer.encode(" 7\nQuestion: What is 1 + 1?")
    monkeypatch.setattr(measures, "generate", lambda model, prompts, new, stop, finished, **_: [
        ids[:next(k for k in range(1, len(ids) + 1) if finished(ids[:k]))]])
    assert measures.reply(None, tokenizer, [[1]], 99, ("Question:",)) == [" 7\n"]


def test_nll_is_the_training_loss_of_the_file(tiny):
    """Against sft_step's loss: the same tokens, EOS included, the same mean."""
    model, tokenizer, _ = tiny
    examples = data.read_examples(BUNDLED / "data" / "word_problems_test.jsonl")[:6]
    for template in ("plain", "alpaca"):
        (found,), rows = tasks.nll(model, tokenizer, examples,
                                   tasks.Options(template=template, batch_size=4))
        encoded = [data.encode_example(tokenizer, e, template) for e in examples]
        batch = make_batch(*data.collate(encoded, tokenizer.eos_id))
        sft = sft_step(model.requires_grad_(True), batch)["sft"].item()
        model.zero_grad()
        assert found.value == pytest.approx(sft, rel=1e-5)
        nats, tokens = (sum(row[key] for row in rows) for key in ("nats", "tokens"))
        assert found.value == pytest.approx(nats / tokens)


# ---- perplexity

@pytest.mark.parametrize("n, window, stride",
                         [(2, 10, 5), (10, 10, 5), (11, 10, 5), (57, 10, 3), (100, 16, 15),
                          (7, 99, 5)])
def test_every_token_but_the_first_is_scored_once_with_enough_context(n, window, stride):
    scored = []
    for begin, first, end in measures.windows(n, window, stride):
        assert begin < first and end - begin <= window
        assert begin == 0 or first - begin >= window - stride
        scored += range(first, end)
    assert scored == list(range(1, n))


def test_perplexity_equals_a_full_context_computation_where_the_text_fits(tiny, tmp_path):
    model, tokenizer, theirs = tiny
    text = "Ann has the key. The key is red.\nWhat colour has Ann? Größe €\n" * 3
    (tmp_path / "text.txt").write_bytes(text.encode())
    found, rows = tasks.perplexity(model, tokenizer, tasks.read_lines(tmp_path / "text.txt"),
                                   tasks.Options())
    ids = theirs.tokenizer(text)["input_ids"]
    assert len(ids) < 256
    p = theirs.logits(ids[:-1]).log_softmax(-1)
    nats = -p.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
    assert found[0].n == len(ids) - 1
    assert found[0].value == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
    assert found[1].value == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert rows[0]["bytes"] == (tmp_path / "text.txt").stat().st_size > len(text)


def test_windowed_perplexity_equals_windows_cut_by_hand(tiny):
    model, tokenizer, theirs = tiny
    text = "Ann has the key. The key is red. What colour has Ann? " * 8
    ids = theirs.tokenizer(text)["input_ids"]
    nats = measures.text_nats(model, tokenizer, text, window=32, stride=20)
    expected, end = [], 1
    while end < len(ids):
        # window - stride tokens of context for the first new one
        begin = 0 if end == 1 else end - 12
        stop = min(begin + 32, len(ids))
        p = theirs.logits(ids[begin:stop]).log_softmax(-1)
        expected += [-p[t - 1 - begin, ids[t]].item() for t in range(end, stop)]
        end = stop
    assert len(nats) == len(ids) - 1 and (nats - torch.tensor(expected)).abs().max() < 1e-4
    with pytest.raises(ValueError, match="stride 32"):
        measures.text_nats(model, tokenizer, text, window=32, stride=32)


# ---- real weights, real files

def harness_gsm8k(theirs, line):
    """One line of the file: a greedy reply of up to 256 tokens, the two regex filters of the
    harness's yaml (first match, last match), then exact_match's regexes_to_ignore and ignore_case
    on both sides."""
    record = json.loads(line)
    row = dict(reply=theirs.generate(f"Question: {record['question']}\nAnswer:", 256))
    for name, regex, which in (("strict", r"#### (\-?[0-9\.\,]+)", 0),
                               ("flexible", r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)):
        found = re.findall(regex, row["reply"])
        match = found[which] if found else "[invalid]"
        row[name] = ([m for m in match if m][0] if isinstance(match, tuple) else match).strip()
        sides = [row[name], record["answer"]]
        for ignored in (",", r"\$", "(?s).*#### ", r"\.$"):
            sides = [re.sub(ignored, "", side) for side in sides]
        row[name + "_match"] = sides[0].lower() == sides[1].lower()
    return row


def harness_piqa(theirs, line, label):
    """One line of the file and its line of the labels file."""
    record = json.loads(line)
    choices = [record["sol1"], record["sol2"]]
    lls = [theirs.loglikelihood(f"Question: {record['goal']}\nAnswer:", " " + choice)[0]
           for choice in choices]
    norm = [ll / len(choice) for ll, choice in zip(lls, choices)]
    gold = label == "1"
    return dict(loglikelihoods=lls, acc=(lls[1] > lls[0]) == gold,
                acc_norm=(norm[1] > norm[0]) == gold)


def windowed_nats(theirs, ids, window=1024, stride=512):
    """-log p of each token but the first: token t is read in the first of the windows 0, stride, 2
    stride, ... that holds it, so behind at least window - stride tokens once the text is that
    long."""
    begins = [0 if t < window else ((t - window) // stride + 1) * stride
              for t in range(1, len(ids))]
    nats = []
    for begin in sorted(set(begins)):
        scored = [t for t, b in enumerate(begins, 1) if b == begin]
        p = theirs.logits(ids[begin:scored[-1]])[scored[0] - 1 - begin:].log_softmax(-1)
        nats += [-row[ids[t]].item() for row, t in zip(p, scored)]
    return nats


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm8k", "piqa", "perplexity"])
def test_smollm2_on_real_files_equals_transformers(name, tmp_path):
    """What `python eval.py --model DIR --task NAME=FILE` prints and writes, example by example.
    LFU_EXAMPLES=N takes the first N examples of GSM8K (test) or PIQA (validation; it has 1838), or
    the first N kB of Wikipedia text. Tolerance: equality for replies, extracted numbers and hits;
    1e-4 nats a token, 1e-2 a choice (float32 rounding: logits agree far better, torch's float32
    cross_entropy of 49,152 classes is 1e-5 too small)."""
    path, folder = os.environ.get("LFU_SMOLLM2"), os.environ.get("LFU_DATA")
    if not path or not folder:
        pytest.skip("LFU_SMOLLM2 and LFU_DATA name no folders with the weights and the data files")
    folder, transformers = Path(folder), quiet_transformers()
    sys.path.insert(0, str(ROOT))
    from eval import main
    n = int(os.environ.get("LFU_EXAMPLES", {"gsm8k": 4, "piqa": 16, "perplexity": 6}[name]))
    twin = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    theirs = Theirs(twin, transformers.AutoTokenizer.from_pretrained(path), 8192)

    def ours(file, *flags):
        results = main(["--model", path, "--task", f"{name}={file}", "--device", "cpu", "--json",
                        str(tmp_path / "out.json"), *flags])
        [example] = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["examples"]
        values = {r["metric"]: r["value"] for r in results}
        return values, {r["n"] for r in results}, example["outputs"]

    def lines(file):
        return (folder / file).read_text(encoding="utf-8").split("\n")[:n]

    if name == "perplexity":
        text = (folder / "wikipedia_30.txt").read_bytes()[:1000 * n].decode(errors="ignore")
        (tmp_path / "text.txt").write_bytes(text.encode())
        values, counts, [row] = ours(tmp_path / "text.txt")
        nats = torch.tensor(windowed_nats(theirs, theirs.tokenizer(text)["input_ids"]),
                            dtype=torch.float64)
        expected = {"perplexity": math.exp(nats.mean()),
                    "bits_per_byte": nats.sum().item() / math.log(2) / len(text.encode())}
        n, tolerance = len(nats), 1e-4
        assert len(row["nats_per_token"]) == n
        worst = (torch.tensor(row["nats_per_token"], dtype=torch.float64) - nats).abs().max().item()
    else:
        if name == "piqa":
            labels = "piqa_valid_labels.lst"
            values, counts, found = ours(f"{folder / 'piqa_valid.jsonl'},{folder / labels}",
                                         "--limit", str(n))
            rows = [harness_piqa(theirs, *pair)
                    for pair in zip(lines("piqa_valid.jsonl"), lines(labels), strict=True)]
            keys = {"acc": "acc", "acc_norm": "acc_norm"}
        else:
            values, counts, found = ours(folder / "gsm8k_test.jsonl", "--limit", str(n))
            rows = [harness_gsm8k(theirs, line) for line in lines("gsm8k_test.jsonl")]
            keys = {"strict-match": "strict_match", "flexible-extract": "flexible_match"}
        expected = {metric: sum(row[key] for row in rows) / n for metric, key in keys.items()}
        worst, tolerance = 0.0, 1e-2
        for i, (a, b) in enumerate(zip(found, rows, strict=True)):
            lls = b.pop("loglikelihoods", [])
            worst = max([worst, *(abs(x - y) for x, y in zip(lls, a.get("loglikelihoods", [])))])
            assert {key: a[key] for key in b} == b, f"example {i}: {a} is not {b}, {lls}"
    print(f"{name}: n {n}, eval.py {values}, transformers {expected}, largest difference "
          f"{worst:.1e} nats")
    assert counts == {n} and worst < tolerance and values == pytest.approx(expected, rel=5e-5)
