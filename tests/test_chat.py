"""Chat templates and `messages` data: the ids are those of transformers' apply_chat_template, no
text becomes a control token, and only the answer is learned.

Made-up tokenizers and templates always; the real files where LFU_TOKENIZERS and LFU_SMOLLM2 name
them (slow).
"""
import copy
import json
import os
from pathlib import Path
import re
import time

import pytest
import torch

from conftest import quiet_transformers, tiny_model
from lfu_min.files import chat, data
from lfu_min.files.data import Example, encode_example, load_dataset, prompt_ids, read_examples
from lfu_min.files.tokenizer import load_tokenizer
from lfu_min.scoring import measures
from lfu_min.scoring.tasks import read_gsm8k
from lfu_min.training import log
from test_tokenizer import file_of, random_texts, TEXT

TURN = "'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n'"
SYSTEM = ("{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a made-up "
          "model, trained on one page.<|im_end|>\\n' }}{% endif %}")
CHATML = ("{% for m in messages %}{{ " + TURN + " }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
QWEN3 = ("{% for m in messages %}{% if m['role'] == 'assistant' %}"
         "{% set parts = m['content'].split('</think>') %}{% set text = parts[-1] %}"
         "{% if parts | length > 1 %}{% set text = text.lstrip('\\n') %}{% endif %}"
         "{{ '<|im_start|>assistant\\n' }}{% if loop.last %}{{ '<think>\\n' }}"
         "{% if parts | length > 1 %}{{ parts[0].split('<think>')[-1].strip('\\n') }}{% endif %}"
         "{{ '\\n</think>\\n\\n' + text.lstrip('\\n') }}{% else %}{{ text }}{% endif %}"
         "{{ '<|im_end|>\\n' }}"
         "{% else %}{{ " + TURN + " }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
         "{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is false %}"
         "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}")
LLAMA3 = ("{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
          "'<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}")
MADE_UP = {  # structure of the tokenizer, our template, theirs
    "SmolLM2": ("smollm2", "chatml", SYSTEM + CHATML), "Qwen 2.5": ("qwen", "chatml", CHATML),
    "Qwen 3": ("qwen", "qwen3", QWEN3), "Llama 3": ("llama3", "llama3", LLAMA3)}
NEEDED = ["<think>", "</think>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
          "<|eot_id|>"]


def messages(*contents):
    """user, assistant, user, ...; a first content that is a tuple is the system's."""
    system = [{"role": "system", "content": contents[0][0]}] if type(contents[0]) is tuple else []
    return system + [{"role": ("user", "assistant")[i % 2], "content": text}
                     for i, text in enumerate(contents[len(system):])]


CONVERSATIONS = [
    messages("What is 3 + 4?", "3 + 4 = 7\n#### 7"),
    messages(("You are brief.",), "Où?", "Ici.", "48 clips\n\n", "  72 \n"),
    messages("\n\nCo\u0302te\u0301?", "\n\n 7", " a{b}c{role} ", "\n\nx\n", "\t1",
             "{content}\n\n\n"),
    messages(TEXT, TEXT.strip(), "9", "'s 10"),
    messages("3?", "\n\n 7\n")]


def theirs_of(file, template):
    """transformers' tokenizer of a tokenizer.json (a dictionary)."""
    tokenizers = pytest.importorskip("tokenizers")
    return quiet_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(file)), chat_template=template,
        clean_up_tokenization_spaces=False)


def made_up(tmp_path, name):
    """(our tokenizer, our template's name, theirs)"""
    structure, template, theirs = MADE_UP[name]
    file = file_of(structure)
    vocab = file["model"]["vocab"]
    if "ĊĊ" not in vocab:  # "\n\n", so that it matters where a line break belongs
        vocab["ĊĊ"] = len(vocab)
        file["model"]["merges"].append(["Ċ", "Ċ"])
    for i, content in enumerate(NEEDED, len(vocab)):
        file["added_tokens"].append(file["added_tokens"][0] | {"id": i, "content": content})
    config = {"eos_token": "<|endoftext|>", "chat_template": theirs}
    for part, content in {"tokenizer": file, "tokenizer_config": config}.items():
        (tmp_path / f"{part}.json").write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(tmp_path), template, theirs_of(file, theirs)


def rendered(theirs, conversation, prompt=False):
    return theirs.apply_chat_template(conversation, add_generation_prompt=prompt, tokenize=True,
                                      return_dict=False, enable_thinking=False)


def check(ours, template, theirs, conversation):
    prompt, answer = conversation[:-1], conversation[-1]["content"]
    ids, labels = encode_example(ours, Example(prompt, answer), template)
    expected = rendered(theirs, conversation)
    assert prompt_ids(ours, prompt, template) == rendered(theirs, prompt, prompt=True)
    assert ids == expected[:len(ids)]
    # what follows is chatml's last line break
    assert expected[len(ids):] == ([] if template == "llama3" else ours.encode("\n"))
    learned = [i for i, label in zip(ids, labels) if label != -100]
    assert labels[len(labels) - len(learned):] == learned  # the last ones, unshifted
    assert ours.decode(learned[:-1]).strip() == ours.decode(ours.encode(answer)).strip()
    assert learned[-1] in data.stop_ids(ours, template)


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("name", MADE_UP)
def test_ids_equal_apply_chat_template(tmp_path, name, conversation):
    check(*made_up(tmp_path, name), conversation)


THOUGHTS = [  # the answer, and what was said before it
    messages("4?", "<think>\n2 + 2\n\nis 4\n</think>\n\nFour."),
    messages("4?", "<think>no</think>3", "Sure?", "<think>\n\n\n hm \n\n</think>\n\n\n 4\n"),
    messages("4?", "\n<think>\n</think>\n\n 4", "a", " <think></think>5"),
    messages("4?", "<think>\nno\n</think>\n\n3", "Sure?", "<think>b{role}</think> 4"),
    messages("4?", " no\n</think>\n3", "Sure?", " 2 + 2\n</think>\n\nFour.")]  # the prompt began it


@pytest.mark.parametrize("conversation", THOUGHTS, ids=range(len(THOUGHTS)))
def test_a_thought_is_learned_as_the_models_own_template_writes_it(tmp_path, conversation):
    """The answer's, as control tokens; earlier ones are left out. chatml, for a model that thinks,
    learns all of the reply, qwen3 what differs from its prompt with the empty thought."""
    ours, _, theirs = made_up(tmp_path, "Qwen 3")
    prompt, answer = conversation[:-1], conversation[-1]["content"]
    whole = rendered(theirs, conversation)[:-len(ours.encode("\n"))]
    start = len(prompt_ids(ours, prompt, "chatml"))
    assert whole[start] == ours.control["<think>"] not in whole[:start]
    for template, first in (("chatml", start), ("qwen3", start + 1)):
        ids, labels = encode_example(ours, Example(prompt, answer), template)
        assert ids == whole
        if ids[:len(prompt_ids(ours, prompt, "qwen3"))] != prompt_ids(ours, prompt, "qwen3"):
            assert labels == [-100] * first + ids[first:]
    without, _, _ = made_up(tmp_path, "SmolLM2")  # a model that has no such tokens reads text
    del without.control["<think>"]
    ids, _ = encode_example(without, Example(prompt, answer), "chatml")
    assert without.decode(ids).count("</think>") == str(conversation).count("</think>")
    assert without.control["</think>"] not in ids


def test_what_only_looks_like_a_thought_stays_text():
    for text in ("a <think>b</think>c", "<think>b", "<think>b<think>", "<think>" * 2 + "</think>"):
        assert chat.split_thought(text) == (None, text)
    assert chat.split_thought("<think>a</think>b</think>") == ("a", "b</think>")


def test_long_thoughts_take_no_longer_than_they_are():
    started = time.time()
    for text in ("<think>" + "\n" * 10**6, "<think>" * 10**5, "\n" * 10**6 + "</think>"):
        chat.split_thought(text)
    assert time.time() - started < 5


@pytest.mark.parametrize("name", MADE_UP)
def test_control_strings_in_a_content_stay_text(tmp_path, name):
    """The control ids are the template's, however many a content spells; and spelled out again, it
    is the same text."""
    ours, template, theirs = made_up(tmp_path, name)
    control, evil = set(ours.control.values()), "".join(ours.control)
    plain, spelled = (encode_example(ours, Example(messages(text, "b", text), text), template)[0]
                      for text in ("a", "a" + evil + "a"))
    assert [i for i in spelled if i in control] == [i for i in plain if i in control]
    assert ours.decode(spelled).count(ours.decode(ours.encode(evil))) == 3
    rendering = rendered(theirs, messages(evil), prompt=True)  # teeth: transformers' are read
    assert sum(i in control for i in rendering) > sum(
        i in control for i in prompt_ids(ours, evil, template))


@pytest.mark.parametrize("mistake", ["no front", "piecewise", "no line break", "not trimmed"])
def test_a_planted_mistake_is_seen(tmp_path, monkeypatch, mistake):
    name = "Qwen 2.5" if mistake in ("piecewise", "no line break") else "Llama 3"
    parts = made_up(tmp_path, name)
    right = chat.CHAT[parts[1]]
    header = ("<|im_start|>", "{role}\n", "{content}", "<|im_end|>")
    monkeypatch.setitem(chat.CHAT, parts[1], right._replace(**{
        "no front": dict(front=()), "piecewise": dict(turn=header), "no line break":
            dict(between=()), "not trimmed": dict(trim=str)}[mistake]))
    with pytest.raises(AssertionError):
        for conversation in CONVERSATIONS:
            check(*parts, conversation)


def test_a_question_alone_gets_the_files_own_system_message(tmp_path):
    ours, template, theirs = made_up(tmp_path, "SmolLM2")
    assert ours.system == "You are a made-up model, trained on one page."
    assert prompt_ids(ours, "Hi", template) == rendered(theirs, messages("Hi"), prompt=True)
    (tmp_path / "chat_template.jinja").write_text(CHATML)  # transformers 5's place for it
    assert load_tokenizer(tmp_path).system == ""
    (tmp_path / "chat_template.jinja").write_text(SYSTEM.replace("made-up", "new") + CHATML)
    assert load_tokenizer(tmp_path).system.startswith("You are a new model")


def test_a_template_whose_tokens_are_missing_is_refused_by_name(tmp_path):
    for structure, template, token in (("llama3", "llama3", "<|begin_of_text|>"),
                                       ("qwen", "qwen3", "<think>")):
        (tmp_path / "tokenizer.json").write_text(json.dumps(file_of(structure)))
        with pytest.raises(ValueError, match=re.escape(
                f"template '{template}' needs the token '{token}'")) as error:
            prompt_ids(load_tokenizer(tmp_path), "Hi", template)
        assert "\n" not in str(error.value)


# ---- files ----

def write(tmp_path, *records, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_messages_are_read_and_one_question_is_a_prompt(tmp_path):
    long = CONVERSATIONS[1]
    extra = copy.deepcopy(long)
    extra[0]["name"] = "x"  # other fields are ignored
    path = write(tmp_path, {"messages": CONVERSATIONS[0]}, {"messages": extra, "id": 3})
    assert read_examples(path) == [("What is 3 + 4?", "3 + 4 = 7\n#### 7"),
                                   (long[:-1], long[-1]["content"])]
    ours, template, _ = made_up(tmp_path, "Qwen 2.5")
    kept, dropped = load_dataset(path, ours, template)
    assert len(kept) == 2 and dropped == 0 and kept[0][1][0] == -100
    with pytest.raises(ValueError, match="template 'plain' takes a question, not 5 messages") as e:
        load_dataset(path, ours, "plain")
    assert "chatml" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="line 2: a question and an answer are needed here"):
        read_gsm8k(path)


U, A = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
BAD = [([], "a list of at least two"), ([U], "a list of at least two"), ("hi", "a list of at"),
       ([U, A, U], "the last two messages should be the user's and the assistant's"),
       ([U, A, A], "the last two"), ([A, U], "the last two"),
       ([U, {"role": "bot", "content": "b"}], "message 2 should have a role (system, user, assi"),
       ([U, {"role": ["user"], "content": "b"}], "message 2 should have a role"),
       ([{"role": "user"}, A], "message 1 should have"), ([U, "b"], "message 2 should have"),
       ([U, {"role": "assistant", "content": " \n"}], "message 2 should have"),
       ([U, {"role": "assistant", "content": [{"type": "text"}]}], "message 2 should have"),
       ([U, {"role": "system", "content": "s"}, U, A], "message 2 is the system's")]


@pytest.mark.parametrize("value, message", BAD, ids=range(len(BAD)))
def test_bad_messages_get_one_clear_line(tmp_path, value, message):
    path = write(tmp_path, {"messages": [U, A]}, {"messages": value})
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_examples(path)
    assert f"{path}, line 2: " in str(error.value) and "\n" not in str(error.value)


# ---- generation ----

def test_generation_starts_and_stops_where_the_template_says(tmp_path, monkeypatch):
    """A base model's files may name <|endoftext|> alone as EOS; a turn ends all the same."""
    ours, template, _ = made_up(tmp_path, "Qwen 2.5")
    end = ours.control["<|im_end|>"]
    assert end not in ours.eos_ids and data.stop_ids(ours) == ours.eos_ids
    seen = []
    monkeypatch.setattr(log, "generate", lambda model, prompts, max_new_tokens, stop_ids:
                        seen.append((prompts, stop_ids)) or [[] for _ in prompts])
    monkeypatch.setattr(measures, "generate", lambda model, prompts, new, stop_ids, **more:
                        seen.append((prompts, stop_ids)) or [[] for _ in prompts])
    model, prompt = tiny_model(), prompt_ids(ours, "Hi", template)
    log.answers(model, ours, ["Hi"], template)
    measures.reply(model, ours, [prompt], 5, template=template)
    assert seen == [([prompt], (*ours.eos_ids, end))] * 2


# ---- real files ----

REAL = {"SmolLM2": ("LFU_SMOLLM2", "", "chatml"),
        "Qwen 2.5": ("LFU_TOKENIZERS", "qwen2_5", "chatml"),
        "Qwen 3": ("LFU_TOKENIZERS", "qwen3", "qwen3"),
        "Llama 3.1": ("LFU_TOKENIZERS", "llama3_1", "llama3")}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_and_their_own_templates(name):
    variable, part, template = REAL[name]
    folder = Path(os.environ.get(variable, "nowhere"), part)
    if not folder.exists():
        pytest.skip(f"set {variable} to compare with real files: {folder} is not there")
    file, config = (json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))
                    for part in ("tokenizer", "tokenizer_config"))
    theirs = theirs_of(file, config.get("chat_template", CHATML))
    theirs.bos_token = config.get("bos_token")
    ours = load_tokenizer(folder)
    for conversation in CONVERSATIONS:
        check(ours, template, theirs, conversation)
    texts = [text for text in random_texts(400, seed=2) if text.strip()
             and not any(token in text for token in ours.control)]
    for a, b, c in zip(texts, texts[1:], texts[2:]):
        if c.strip():
            check(ours, template, theirs, messages((a,), b, a, b, c))
    if name == "Qwen 3":
        for conversation in THOUGHTS:
            expected = rendered(theirs, conversation)
            for way in ("chatml", "qwen3"):
                ids, _ = encode_example(ours, Example(conversation[:-1],
                                                      conversation[-1]["content"]), way)
                assert ids + ours.encode("\n") == expected
        # a question in the template without the empty thought
        assert prompt_ids(ours, "Hi", "chatml") == theirs.apply_chat_template(
            messages("Hi"), add_generation_prompt=True, tokenize=True, return_dict=False)


@pytest.mark.slow
def test_smollm2_answers_a_question_in_its_chat_template():
    if "LFU_SMOLLM2" not in os.environ:
        pytest.skip("set LFU_SMOLLM2 to the folder of SmolLM2-135M-Instruct")
    from lfu_min.files.checkpoint import load_model
    folder = os.environ["LFU_SMOLLM2"]
    ours, model = load_tokenizer(folder), load_model(folder, dtype=torch.float32)
    prompt = prompt_ids(ours, "What is the capital of France?", "chatml")
    reply = measures.reply(model, ours, [prompt], 40, template="chatml")[0]
    print(reply)
    assert "Paris" in reply
