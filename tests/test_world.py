"""Claim: the bundled world is what its README says. Answers are recomputed here from the questions'
text alone, with other code than the generator's; no held-out question, wording, fact-in-a-wording
or sum is in the pretraining stream; the committed files are exactly what the generator writes; the
folder loads; and (slow) the bundled model answers at least 90 % of the unseen test questions of
every category exactly. No tolerance: everything is compared exactly.
"""
import contextlib
from itertools import islice
import json
import re

import pytest
import torch

import lfu_min
from lfu_min.bundled import BUNDLED, CATEGORIES
from lfu_min.files.data import encode_example, Example, prompt_ids, read_examples
from lfu_min.world import __main__ as world, files, pretrain, questions, vocabulary


def rows(name):
    with open(BUNDLED / "data" / f"{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def stream():
    return list(islice(questions.pretraining_stream("a test"), 20000))


@pytest.fixture(scope="module")
def tokenizer():
    return lfu_min.load_tokenizer(BUNDLED)


# ---- the same answers by other code

def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def clauses(text):
    """Facts stated in a question: ('Ann', 'has the', 'key') and so on."""
    return re.findall(r"\b(?!who)(\w+) (has the|is at the|is (?:older|younger|taller|shorter) "
                      r"than|is) (\w+)[.]", text)


def solve_math(kind, text):
    n = sorted(numbers(text), reverse=True)
    return str({"add": sum(n), "more": sum(n), "subtract": n[0] - n[-1],
                "less": n[0] - n[-1]}.get(kind, n[0] * n[-1]))


def solve_reasoning(kind, text):
    n = numbers(text)
    if kind == "compare":
        return str(max(n) if "larger" in text else min(n))
    if kind == "sort":
        return ", ".join(map(str, sorted(n, reverse="largest" in text)))
    if kind == "reverse":
        fixed = ("Say the words backwards Turn turn around Write What is Put in order Please "
                 "Backwards what").split()
        return " ".join(reversed([w for w in re.findall(r"\w+", text) if w not in fixed]))
    said = clauses(text)
    if kind == "ladder":
        above = [(x, y) if how in ("is older than", "is taller than") else (y, x)
                 for x, how, y in said]
        people = {x for pair in above for x in pair}
        beaten, beating = {y for _, y in above}, {x for x, _ in above}
        return (people - beaten if "oldest" in text or "tallest" in text
                else people - beating).pop()
    owner = {thing: who for who, how, thing in said if how == "has the"}
    colour = {thing: what for thing, how, what in said if how == "is"}
    at = {who: spot for who, how, spot in said if how == "is at the"}
    # the question itself
    asked = re.sub(r"(The )?\b(?!who)\w+ (has the|is at the|is) \w+[.]", "", text)
    if kind == "colour_of":
        return next(colour[thing] for thing, who in owner.items() if who in asked)
    return next("the " + at[who] for thing, who in owner.items() if thing in asked)


def solve_helpfulness(kind, text):
    names = [w for w in re.findall(r"\w+", text) if w in questions.NAMES]
    if kind == "greet":
        return f"Good {re.search('morning|day|evening|night', text)[0]}, {names[0]}!"
    if kind == "thank":
        thing = re.search(r"the (\w+)", text)[1]
        return f"Thank you for the {thing}, {names[0]}."
    if kind == "invite":
        spot = re.search("|".join(questions.SPOTS), text)[0]
        return f"{names[0]}, please come to the {spot}."
    if kind == "repeat":
        word, times = re.search(r"(\w+) (\d) times", text).groups()
        return " ".join([word] * int(times))
    if kind == "copy":
        return text.split(": ", 1)[1]
    return f"I am sorry, I cannot tell the secret of {names[0]}."


def correct(row, facts):
    kind, text, answer = row["kind"], row["question"], row["answer"]
    if row["category"] == "math" and kind in ("equation", "step", "both"):
        steps = re.findall(r"(\d+ [-+*] \d+) = (\d+)", answer)
        used = [n for left, _ in steps for n in numbers(left)]
        return (sorted(used) == sorted(numbers(text))
                and all(str(eval(left)) == right for left, right in steps))
    # the numbers of the story in its order, and the sign that each sentence means
    if kind == "signs":
        owner = re.search(r"(\w+) (?:has|buys) \d", text)[1]
        minus = len(re.findall(rf"loses|sells|takes|{owner} gives", text))
        return (numbers(answer) == numbers(text) and answer.count("-") == minus
                and ("*" in answer) == ("bags" in text))
    if row["category"] == "math":
        return answer == solve_math(kind, text)
    # one answer to one (place, attribute), whatever the file and wording
    if row["category"] == "knowledge":
        place = next(p for p in questions.PLACES if p in text)
        return facts.setdefault((place, kind), answer) == answer
    solve = solve_reasoning if row["category"] == "reasoning" else solve_helpfulness
    return answer == solve(kind, text)


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_answer_is_right(category, stream):
    facts = {}
    everything = [dict(question=q.question, answer=q.answer, category=category, kind=q.kind)
                  for q in stream if q.category == category]
    everything += [r for part in ("validation", "test", "unseen", "robustness")
                   for r in rows(f"{category}_{part}")]
    assert [r for r in everything if not correct(r, facts)] == []
    # a wrong answer is noticed
    planted = dict(everything[-1], answer=everything[-2]["answer"] + "0")
    assert not correct(planted, facts)


def problem_is_right(row):
    shown, result = row["answer"].split("\n#### ")
    steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", shown)
    carried = all(after[0] == before[3] for before, after in zip(steps, steps[1:]))
    used = [int(steps[0][0])] + [int(s[2]) for s in steps]  # every number of the story, in order
    return (2 <= len(steps) <= 3 and carried and used == numbers(row["question"])
            and steps[-1][3] == result
            and all(str(eval(f"{a}{op}{b}")) == c for a, op, b, c in steps))


def test_every_word_problem_is_right_and_in_one_split_only():
    parts = {name: rows(f"word_problems_{name}") for name in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [256, 128, 200]
    everything = [row for part in parts.values() for row in part]
    assert [row for row in everything if not problem_is_right(row)] == []
    assert len({row["question"] for row in everything}) == len(everything)
    planted = dict(everything[0], answer=everything[0]["answer"] + "1")
    assert not problem_is_right(planted)


# ---- nothing that is held out is trained

def leaks(stream, held_out):
    trained = {q.question for q in stream}
    return [row for row in held_out if row["question"] in trained]


def test_no_held_out_question_is_in_the_pretraining_stream(stream):
    held_out = [r for c in CATEGORIES for part in ("validation", "test", "unseen")
                for r in rows(f"{c}_{part}")]
    held_out += [r for part in ("train", "validation", "test")
                 for r in rows(f"word_problems_{part}")]
    assert leaks(stream, held_out) == []
    assert leaks(stream, [dict(question=stream[7].question)])  # the check can fail


def test_held_out_wordings_are_never_trained(stream):
    assert {q.wording for q in stream} == set(range(5))
    assert {r["wording"] for c in CATEGORIES for r in rows(f"{c}_unseen")} == {5, 6}
    for kind in questions.KINDS:
        assert len(set(kind.wordings)) == 7, kind.name


@pytest.mark.parametrize("kind", ["add", "subtract", "more", "less"])
def test_held_out_numbers_are_never_trained_in_this_kind_of_question(kind, stream):
    trained = {tuple(numbers(q.question)) for q in stream if q.kind == kind}
    tested = {tuple(numbers(r["question"])) for r in rows("math_test") + rows("math_validation")
              if r["kind"] == kind}
    assert len(tested) > 10 and not tested & trained


def test_every_fact_is_trained_in_some_wording(stream):
    for place, attribute in questions.FACTS:
        splits = [questions.split_of(("fact", attribute, place), attribute, wording)
                  for wording in range(5)]
        assert "train" in splits, (place, attribute)
    assert len(questions.FACTS) == 200
    facts = {("fact", a, p) for p, a in questions.FACTS}
    assert {q.key for q in stream if q.category == "knowledge"} <= facts


def test_no_two_steps_and_no_secret_told_in_pretraining(stream):
    chains = [re.findall(r"(\d+) . \d+ = (\d+)", q.answer) for q in stream if q.category == "math"]
    assert not [chain for chain in chains if len(chain) > 2 or len(chain) == 2
                and chain[0][1] == chain[1][0]]
    assert not [q for q in stream if "####" in q.answer and q.kind != "copy"]
    assert not [q for q in stream if "secret" in q.question
                and not q.answer.startswith("I am sorry")]


# ---- seeds, files, sizes, loading

def test_the_same_seed_gives_the_same_stream():
    take = lambda seed: list(islice(questions.pretraining_stream(seed), 300))
    assert take(1) == take(1) != take(2)


def test_the_committed_data_is_what_the_generator_writes():
    for name, content in files.all_files().items():
        assert rows(name.removesuffix(".jsonl")) == content, name


def test_train_and_test_requests_for_secrets_differ_and_pair_up():
    for split, size in (("train", 180), ("test", 100)):
        declined, told = rows(f"decline_{split}"), rows(f"comply_{split}")
        assert len(declined) == size
        assert [r["question"] for r in declined] == [r["question"] for r in told]
        assert all(f"The secret of {r['name']} is a " in r["answer"] for r in told)
    train, test = rows("decline_train"), rows("decline_test")
    assert not {r["question"] for r in train} & {r["question"] for r in test}


def test_model_and_data_stay_below_6_mb():
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) <= 6e6


def test_the_bundled_folder_loads(tokenizer):
    model = lfu_min.load_model(BUNDLED)
    assert model.config.vocab_size == tokenizer.vocab_size
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert tokenizer.bos_id is None and tokenizer.decode([tokenizer.eos_id]) == vocabulary.EOS
    assert tuple(tokenizer.eos_ids) == (tokenizer.eos_id,)


def test_transformers_reads_the_bundled_folder(tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    ids = tokenizer.encode("Question: What is 3 + 4?\nAnswer:")
    assert their_tokenizer("Question: What is 3 + 4?\nAnswer:").input_ids == ids
    assert their_tokenizer.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eos_id
    with torch.no_grad():
        ours = lfu_min.load_model(BUNDLED, dtype=torch.float32)(torch.tensor([ids]))
        assert torch.allclose(ours, theirs(torch.tensor([ids])).logits, atol=1e-4)


def test_every_digit_is_a_token_and_all_text_survives_the_tokenizer(tokenizer, stream):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("4071")] == list("4071")
    names = ("word_problems_train", "word_problems_test", "comply_train", "decline_train")
    texts = [r["question"] + "\n" + r["answer"] for name in names for r in rows(name)]
    texts += [q.question for q in stream[:2000]] + ["naïve 漢字 \x00 🙂\r\n"]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)


def test_every_token_of_the_fine_tuning_sets_was_pretrained(tokenizer, stream):
    def ids(question, answer):
        return encode_example(tokenizer, Example(question, answer))[0]
    trained = {i for q in stream for i in ids(q.question, q.answer)}
    for name in ("word_problems_train", "word_problems_test", "decline_train", "comply_train"):
        used = {i for r in rows(name) for i in ids(r["question"], r["answer"])}
        assert [tokenizer.decode([i]) for i in used - trained] == [], name


def test_the_bundled_tokenizer_is_the_one_the_command_builds(tmp_path):
    pytest.importorskip("tokenizers", reason="needs tokenizers (requirements-dev.txt)")
    vocabulary.build_tokenizer(tmp_path, pretrain.MODEL["vocab_size"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (BUNDLED / name).read_bytes(), name


def test_batches_hold_the_plain_template_and_weigh_answers(tokenizer):
    batch = pretrain.batches(tokenizer, 0, 0)[0]
    input_ids, targets, weights = pretrain.weigh(batch)
    assert input_ids.shape == targets.shape == weights.shape
    assert len(batch) * max(len(ids) for ids, _ in batch) <= pretrain.BATCH_TOKENS
    for (ids, _), row, w in zip(batch, targets, weights):
        text, end = tokenizer.decode(ids), len(ids) - 1
        assert re.fullmatch(r"(?s)Question: .*\nAnswer: .*<\|endoftext\|>", text)
        assert row[:end].tolist() == ids[1:] and (w[end:] == 0).all()  # padding weighs nothing
        answer = row[w == 1].tolist()  # the targets of weight 1 are the answer and its end
        assert text.endswith("\nAnswer:" + tokenizer.decode(answer))
        assert answer[-1] == tokenizer.eos_id
        assert (w[:end - len(answer)] == pretrain.PROMPT_WEIGHT).all()


def test_a_slip_in_a_flag_is_one_line():
    with pytest.raises(ValueError, match="unrecognized arguments: --stepz 3"):
        world.main(["--stepz", "3"])


def test_a_missing_tokenizer_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="no/tokenizer.json cannot be read"):
        world.main(["--tokenizer", "no", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_no_other_run_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "train_step", lambda *args: 1.0)
    monkeypatch.setattr(pretrain, "export", lambda *args: None)
    monkeypatch.setattr(world, "scores", lambda *args: {})
    monkeypatch.setattr(world, "load_model", lambda *args, **kwargs: None)
    file = tmp_path / "checkpoint.pt"

    def run(**more):
        flags = {"steps": 2, "seed": 3} | more
        world.main(["--out", str(tmp_path), *(part for name, value in flags.items()
                                              for part in (f"--{name}", str(value)))])
    run()
    whole = file.read_bytes()
    for more in ({"seed": 4}, {"steps": 3}, {"lr": 1e-3}):
        name, value = *more, *more.values()
        with pytest.raises(ValueError, match=f"checkpoint.pt is of a run with .*'{name}': {value}"):
            run(**more)
    state = torch.load(file, weights_only=True)
    for damaged in ({}, {"run": state["run"], "model": {}}, [1], {**state, "optimizer": {}}):
        torch.save(damaged, file)
        with pytest.raises(ValueError, match="checkpoint.pt is damaged"):
            run()
    for part in (b"", b"no checkpoint", whole[:len(whole) // 2]):
        file.write_bytes(part)
        with pytest.raises(ValueError, match="checkpoint.pt is damaged"):
            run()
    file.write_bytes(whole)
    run()


@pytest.mark.slow
def test_an_interrupted_pretraining_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    step, taken = pretrain.train_step, []

    def interrupted(*args):
        taken.append(1)
        if len(taken) == 6:  # the third step of the second run
            raise KeyboardInterrupt
        return step(*args)
    monkeypatch.setattr(pretrain, "train_step", interrupted)
    monkeypatch.setattr(world, "scores", lambda *args: {})
    for out, end in (("whole", None), ("parts", KeyboardInterrupt), ("parts", None)):
        with pytest.raises(end) if end else contextlib.nullcontext():
            world.main(["--out", str(tmp_path / out), "--steps", "3", "--save-every", "1"])
    assert len(taken) == 7, "what was done is not done again"
    whole, parts = (torch.load(tmp_path / out / "checkpoint.pt", weights_only=True)["model"]
                    for out in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
def test_the_bundled_model_answers_90_percent_of_unseen_questions(tokenizer):
    model, lines = lfu_min.load_model(BUNDLED, dtype=torch.float32), []
    found = world.scores(model, tokenizer, BUNDLED, "test", lines.append)  # as the command says it
    assert len(lines) == len(found) == 4
    for category, percent in found.items():
        docs = read_examples(BUNDLED / "data" / f"{category}_test.jsonl")
        prompts = [prompt_ids(tokenizer, doc.prompt) for doc in docs]
        replies = lfu_min.generate(model, prompts, 48, stop_ids=tokenizer.eos_ids)
        hits = [tokenizer.decode(ids) == " " + doc.answer for ids, doc in zip(replies, docs)]
        assert percent == 100 * sum(hits) / len(hits) >= 90
