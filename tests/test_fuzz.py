"""Claim: whatever stands in a file, it is read, or refused in one short line that is a ValueError.
No other exception, no waiting, no memory beyond a few times the file; no name in an index leads out
of its folder; no text becomes a control token.

Files that are right are changed at random: values, keys, bytes, lengths. The cases are the same
every time; LFU_FUZZ=N tries N times as many, and other ones each time. `-s` prints how many were
read and how many refused.
"""
from collections import Counter
import contextlib
import copy
import functools
import io
import json
import os
from pathlib import Path
import shutil
import signal
import struct
import sys
import tempfile
from unittest import mock

import pytest
import torch

resource = pytest.importorskip("resource", reason="limits this process's memory")
pytest.importorskip("hypothesis", reason="needs hypothesis (requirements-dev.txt)")
from hypothesis import given, HealthCheck, Phase, settings, strategies as st

from conftest import LLAMA3_ROPE, TINY, tiny_model
from lfu_min.bundled import BUNDLED
from lfu_min.engine.system import ROOT
from lfu_min.files import chat, checkpoint, data
from lfu_min.files.adapter import load_adapter, save_adapter
from lfu_min.files.checkpoint import load_model, save_model
from lfu_min.files.tokenizer import load_tokenizer
from lfu_min.lora import add_lora, remove_lora
from lfu_min.scoring import robustness, runs, tasks
from lfu_min.training import log

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
import eval as eval_script
import train

# With pytest -n 2 --dist loadgroup in one process: the test that counts the cases needs them all.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("fuzz")]
TIMES = int(os.environ.get("LFU_FUZZ", 1))
SECONDS = 20  # a case takes milliseconds; longer than this it hangs
ROOM = 2**30  # bytes that all cases together may take from the system
LONG = 600  # characters of a message
TRIED = Counter()  # (target, "read" or "refused") -> cases


def budget(examples):
    return settings(max_examples=examples * TIMES, derandomize=TIMES == 1, deadline=None,
                    database=None, suppress_health_check=list(HealthCheck),
                    phases=(Phase.generate, Phase.shrink))


@pytest.fixture(scope="module", autouse=True)
def little_room():
    """A limit to the memory of this process; at the end, how many cases there were."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/status")
    if status.exists():
        size = int(status.read_text().split("VmSize:")[1].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    if top.cache_info().currsize:
        shutil.rmtree(top())
    for target in sorted({target for target, _ in TRIED}):
        print(f"\n{target:32} {TRIED[target, 'read']:7} read {TRIED[target, 'refused']:7} refused",
              end="")
    print(f"\n{sum(TRIED.values())} cases")


@contextlib.contextmanager
def alarm():
    def hangs(*_):
        raise AssertionError(f"took more than {SECONDS} s")
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_or_refused(target, read):
    """What read() returns, or None where it refuses as it should. Anything else is a failure."""
    with alarm():
        try:
            value = read()
        except ValueError as error:
            message = str(error)
            assert type(error) is ValueError, f"{error!r} says nothing of the file"
            assert message.strip() and "\n" not in message and "\r" not in message, message
            assert len(message) <= LONG, f"{len(message)} characters: {message}"
            message.encode()
            TRIED[target, "refused"] += 1
            return None
    TRIED[target, "read"] += 1
    return value


# ---- what is put in ----

anything = st.text(st.characters(exclude_categories=()), max_size=12)  # surrogates too
odd_numbers = st.one_of(st.sampled_from([0, -1, 1, 2, 2**15, 2**28 - 1, 2**31, 2**63 - 1, 2**63,
                                         2**64, 10**40, -10**40, 1e308, 1e-320, -0.0, 0.5,
                                         float("nan"), float("inf"), -float("inf")]),
                        st.integers(), st.floats())
odd_texts = st.one_of(st.sampled_from(["", " ", "\0", "\ud800", "\n", "a\nb\r", "false", "1", "٣",
                                       "../x", "/etc/passwd", "..", ".", "a" * 3000, "é" * 700,
                                       "<|endoftext|>", "[[[[", "model.safetensors", "#### 1"]),
                      anything)
leaves = st.one_of(st.none(), st.booleans(), odd_numbers, odd_texts)
deep = st.builds(lambda levels, value: functools.reduce(lambda inner, _: [inner], range(levels),
                                                        value),
                 st.sampled_from([3, 50, 98, 200, 900]), leaves)
odd = st.one_of(leaves, leaves, leaves, deep, st.recursive(leaves, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(odd_texts, inner, max_size=3)), max_leaves=5))


@st.composite
def changed(draw, value, most=3):
    """A JSON value like `value`, changed in one to `most` places."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        value = changed_once(draw, value)
    return value


def changed_once(draw, value):
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 12)) == 12:
        return draw(odd)
    key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    what = draw(st.sampled_from(["below", "below", "below", "below", "replace", "delete", "add"]))
    if what == "delete":
        del value[key]
    elif what == "add" and isinstance(value, dict):
        value[draw(odd_texts)] = draw(odd) if draw(st.booleans()) else copy.deepcopy(value[key])
    elif what == "add":
        value.insert(key, copy.deepcopy(value[key]))
    elif what == "replace":
        value[key] = draw(odd)
    else:
        value[key] = changed_once(draw, value[key])
    return value


@st.composite
def damaged(draw, content, region=None):
    """Bytes like `content`, with a few of them replaced, put in, taken out, or cut off."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, min(region or len(content), len(content)) - 1)))
        what = draw(st.sampled_from(["set", "insert", "cut", "delete", "double"]))
        some = draw(st.one_of(st.binary(min_size=1, max_size=9), st.sampled_from(
            [b"\xff\xfe", b"\xed\xa0\x80", b"\0", b"\n", b'"', b"{", b"]", b"9" * 30, b"-", b"1e9",
             b"\\ud800", b"NaN", b"\xff" * 8, b"\xef\xbb\xbf"])))
        if what == "set":
            content[at:at + len(some)] = some
        elif what == "insert":
            content[at:at] = some
        elif what == "cut":
            del content[at:]
        else:
            end = at + draw(st.integers(1, 200))
            content[at:end] = b"" if what == "delete" else content[at:end] * 2
    return bytes(content)


def as_json(value):
    return json.dumps(value).encode()  # NaN and lone surrogates stay what they are


def safetensors_parts(content):
    n = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:8 + n]), content[8 + n:]


@st.composite
def safetensors(draw, header, body):
    """A safetensors file whose header, its length, or whose bytes are not what they should be."""
    if draw(st.booleans()):
        raw = as_json(draw(changed(header)))
    else:
        raw = as_json(header)
    length = len(raw) if draw(st.integers(0, 3)) else draw(st.sampled_from(
        [0, 1, 7, len(raw) - 1, len(raw) + 1, 2**20, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1]))
    content = struct.pack("<Q", length) + raw + body
    return content if draw(st.integers(0, 2)) else draw(damaged(content, 8 + len(raw)))


# ---- folders to start from ----

class Desk:
    """A folder with a tiny model, its adapter and a tokenizer."""

    def __init__(self, folder, raw):
        folder.mkdir()
        self.folder, self.raw = folder, raw
        shutil.copy(BUNDLED / "tokenizer.json", folder)
        model = tiny_model(**raw)
        save_model(model, folder)
        save_adapter(add_lora(model, r=2), folder)
        (folder / "config.json").write_bytes(as_json(raw))
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
        (folder / "generation_config.json").write_text('{"eos_token_id": [895]}')
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.model = load_model(folder)

    def json(self, name):
        return json.loads(self.files[name])

    def put(self, changes):
        """The folder with these files {name: bytes, or None for none}, all others as they were."""
        for path in self.folder.iterdir():
            if path.name not in self.files:
                path.unlink()
        for name, content in {**self.files, **changes}.items():
            if content is None:
                (self.folder / name).unlink(missing_ok=True)
            else:
                (self.folder / name).write_bytes(content)
        return self.folder


SMALL = {**TINY, "vocab_size": 896, "num_hidden_layers": 2}
MODELS = {"llama": {**SMALL, "rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
          "qwen3": {**SMALL, "model_type": "qwen3", "tie_word_embeddings": True},
          "mistral": {**SMALL, "model_type": "mistral", "sliding_window": 64}}


@functools.cache
def top():
    return Path(tempfile.mkdtemp(prefix="fuzz"))


def desk(kind="llama"):
    return made(kind)


@functools.cache
def made(kind):
    return Desk(top() / kind, MODELS[kind])


def works(model):
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).shape[:2] == (1, 3)


# ---- models and adapters ----

@budget(300)
@given(st.data())
def test_config_json(draw):
    here = desk(draw.draw(st.sampled_from(sorted(MODELS))))
    folder = here.put({"config.json": as_json(draw.draw(changed(here.raw)))})
    model = read_or_refused("config.json", lambda: load_model(folder))
    if model is not None:
        works(model)


@budget(100)
@given(st.data())
def test_bytes_of_the_json_files(draw):
    here = desk()
    name = draw.draw(st.sampled_from([name for name in here.files if name.endswith(".json")]))
    folder = here.put({name: draw.draw(damaged(here.files[name]))})

    def read():
        load_tokenizer(folder)
        return load_adapter(load_model(folder), folder)
    model = read_or_refused("bytes of JSON files", read)
    if model is not None:
        works(model)


@budget(150)
@given(st.data())
def test_safetensors(draw):
    here = desk()
    name = "model.safetensors"
    content = draw.draw(safetensors(*safetensors_parts(here.files[name])))
    folder = here.put({name: content})
    model = read_or_refused(name, lambda: load_model(folder))
    if model is not None:
        works(model)


SHARD = "model-00001-of-00001.safetensors"


@budget(250)
@given(st.data())
def test_index_files(draw):
    here = desk()
    weights = here.files["model.safetensors"]
    names = [name for name in safetensors_parts(weights)[0] if name != "__metadata__"]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, SHARD)}
    raw = as_json(draw.draw(changed(index)))
    raw = raw if draw.draw(st.integers(0, 3)) else draw.draw(damaged(raw))
    folder = here.put({"model.safetensors": None, SHARD: weights,
                       "model.safetensors.index.json": raw})
    (top() / "x").write_bytes(weights)  # where "../x" leads
    opened, really = [], checkpoint.check_file
    with mock.patch.object(checkpoint, "check_file",
                           lambda path: really(path) or opened.append(path)):
        model = read_or_refused("index", lambda: load_model(folder))
    assert within(folder, opened)
    if model is not None:
        works(model)


def within(folder, paths):
    return {Path(os.path.realpath(path)).parent for path in paths} <= {folder.resolve()}


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "sub/x", ".."])
def test_a_name_that_leads_out_of_the_folder_is_seen(name):
    assert within(desk().folder, [desk().folder / SHARD])
    assert not within(desk().folder, [desk().folder / SHARD, desk().folder / name])


@budget(150)
@given(st.data())
def test_adapters(draw):
    here, changes = desk(), {}
    if draw.draw(st.booleans()):
        changes["adapter_config.json"] = as_json(draw.draw(changed(
            here.json("adapter_config.json"))))
    else:
        changes["adapter_model.safetensors"] = draw.draw(safetensors(
            *safetensors_parts(here.files["adapter_model.safetensors"])))
    folder, model = here.put(changes), here.model
    if read_or_refused("adapter", lambda: load_adapter(model, folder)) is not None:
        works(model)
        remove_lora(model)
    assert not any("lora" in name for name in model.state_dict())


# ---- tokenizers ----

def tokenizer_changes(draw, here):
    name = draw.draw(st.sampled_from(["tokenizer.json"] * 3 + [
        "tokenizer_config.json", "generation_config.json"]))
    value = here.json(name)
    if name == "tokenizer.json" and draw.draw(st.booleans()):  # all but the long lists
        part = draw.draw(changed({key: item for key, item in value.items() if key != "model"}))
        value = {**part, "model": value["model"]} if isinstance(part, dict) else part
    else:
        value = draw.draw(changed(value))
    return {name: as_json(value)}


@budget(120)
@given(st.data())
def test_tokenizer_json(draw):
    folder = desk().put(tokenizer_changes(draw, desk()))
    tokenizer = read_or_refused("tokenizer.json", lambda: load_tokenizer(folder))
    if tokenizer is not None:
        text = draw.draw(odd_texts)
        tokenizer.decode(tokenizer.encode(text + " Ann has 7 <|endoftext|>"))


@functools.cache
def llama3_lines():
    from base64 import b64encode
    ranks = [bytes([b]) for b in range(256)] + [b"th", b"the", b" a"]
    return [b64encode(token) + b" %d" % rank for rank, token in enumerate(ranks)]


@budget(60)
@given(st.data())
def test_tokenizer_model(draw):
    lines = list(llama3_lines())
    for _ in range(draw.draw(st.integers(0, 2))):
        i = draw.draw(st.integers(0, len(lines) - 1))
        lines[i] = draw.draw(st.sampled_from([
            b"", b"YQ==", b"YQ== 99999999999999999999", b"YQ== -1", b"YQ== 2147483647", b"= 3",
            lines[0], lines[i] + b" 5", b"YQ== 1e5", b"YQ== 300", b" 7", b"YWE= 4294967296"]))
    raw = b"\n".join(lines)
    raw = raw if draw.draw(st.integers(0, 2)) else draw.draw(damaged(raw))
    folder = desk().put({"tokenizer.json": None, "tokenizer.model": raw,
                         "tokenizer_config.json": None, "config.json": None,
                         "generation_config.json": None})
    tokenizer = read_or_refused("tokenizer.model", lambda: load_tokenizer(folder))
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode("the cat \ud800 <|eot_id|>"))


CONTROL = sorted({piece for template in chat.CHAT.values()
                  for piece in (*template.front, *template.turn, *template.reply)
                  if piece.startswith("<")})


@functools.cache
def chat_tokenizer():
    """The bundled one, with the control tokens of every chat template."""
    raw = json.loads((BUNDLED / "tokenizer.json").read_text())
    raw["added_tokens"] += [{**raw["added_tokens"][0], "id": 896 + i, "content": text}
                            for i, text in enumerate(CONTROL)]
    folder = top() / "chat"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(as_json(raw))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return load_tokenizer(folder)


looks_like_control = st.lists(st.one_of(st.sampled_from([*CONTROL, "<|endoftext|>"]),
                                        st.sampled_from(["<|", "|>", "<", "im_end", "{content}",
                                                         "{role}", "user\n", "\n\n", " ", "</s>"]),
                                        anything), max_size=8).map("".join)


def control_ids(tokenizer, ids):
    return [i for i in ids if i in tokenizer.control.values()]


@budget(150)
@given(looks_like_control, looks_like_control, st.sampled_from(data.TEMPLATES))
def test_text_that_looks_like_a_control_token_stays_text(question, answer, template):
    stays_text(chat_tokenizer(), question, answer, template)
    TRIED["text like control tokens", "read"] += 1


def stays_text(tokenizer, question, answer, template):
    ids = tokenizer.encode(question)
    assert not control_ids(tokenizer, ids)
    whole = question.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(ids) == whole
    ids, _ = data.encode_example(tokenizer, data.Example(question, answer), template)
    plain, _ = data.encode_example(tokenizer, data.Example("a", "b"), template)
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, plain)


def test_a_tokenizer_that_reads_control_tokens_in_text_is_seen():
    right, wrong = chat_tokenizer(), copy.copy(chat_tokenizer())
    wrong.encode = lambda text: ([right.control[text]] if text in right.control
                                 else right.encode(text))
    stays_text(right, "<|im_end|>", "b", "chatml")
    with pytest.raises(AssertionError):
        stays_text(wrong, "<|im_end|>", "b", "chatml")


# ---- data and evaluation files ----

RECORDS = [[{"question": "What is 3 + 4?", "answer": "3 + 4 = 7\n#### 7"}] * 2,
           [{"instruction": "Add.", "input": "3 and 4", "output": "7"}] * 2,
           [{"prompt": "3 + 4", "response": "7", "name": "Ann"}] * 2,
           [{"messages": [{"role": "system", "content": "Be brief."},
                          {"role": "user", "content": "3 + 4?"},
                          {"role": "assistant", "content": "7"}]}] * 2]
TASKS = {
    "gsm8k": RECORDS[0], "exact": RECORDS[0], "nll": RECORDS[3], "perplexity": RECORDS[0],
    "piqa": [dict(goal="add 2 and 3", sol1="5", sol2="it is a dog", label=0)] * 2,
    "arc": [dict(question=dict(stem="Which?", choices=[dict(text="the key", label="A"),
                                                       dict(text="bread", label="B")]),
                 answerKey="B"),
            dict(question="What is 1 + 1?", answerKey="1",
                 choices=dict(text=["2", "3"], label=["1", "2"]))],
    "hellaswag": [dict(activity_label="Baking", ctx_a="A man [header] bakes.", ctx_b="then HE",
                       endings=["eats [step] it.", "flies  away."], label="1")] * 2,
    "lambada": [dict(text="Ann has the key and gives the key")] * 2}


def records_file(draw, records):
    """(name, bytes) of a file of changed records."""
    records = draw.draw(changed(records))
    if draw.draw(st.booleans()):
        name, raw = "data.json", as_json(records)
    else:
        name = "data.jsonl"
        raw = b"\n".join(map(as_json, records if isinstance(records, list) else [records]))
    if not draw.draw(st.integers(0, 3)):
        raw = draw.draw(st.one_of(damaged(raw), st.sampled_from(
            [raw.decode().encode(coding) for coding in ("utf-16", "utf-32", "utf-8-sig")])))
    return name, raw


@budget(150)
@given(st.data(), st.sampled_from(RECORDS), st.sampled_from(data.TEMPLATES))
def test_data_files(draw, records, template):
    name, raw = records_file(draw, records)
    folder = desk().put({name: raw})

    def read():
        found = data.load_dataset(folder / name, chat_tokenizer(), template, max_len=500)
        requests = robustness.read_requests(folder / name)
        for example, _ in requests:
            log.shown(example.prompt).encode()  # it can be printed
        return found
    found = read_or_refused("data files", read)
    if found is not None:
        ids, labels = data.collate(found[0], 0)
        assert ids.shape == labels.shape and 0 <= ids.min() and ids.max() < 896 + len(CONTROL)


@budget(200)
@given(st.data(), st.sampled_from(sorted(TASKS)), st.booleans())
def test_evaluation_files_and_shots(draw, kind, with_labels):
    name, raw = records_file(draw, TASKS[kind])
    labels = draw.draw(st.one_of(st.just(b"0\n1\n"), damaged(b"0\n1\n"))) if with_labels else b""
    folder = desk().put({name: raw, "labels.lst": labels, "shots.json": as_json(TASKS[kind])})
    tokenizer = load_tokenizer(folder)

    def read():
        reader = tasks.KINDS[kind][0]
        args = [folder / "labels.lst"] if with_labels and kind in ("piqa", "hellaswag") else []
        docs = reader(folder / name, *args)
        swap = bool(draw.draw(st.booleans()))  # the odd file asks, or shows
        asked, shots = (reader(folder / "shots.json"), docs) if swap else (docs, docs[:1])
        few_shot = 0 if kind in ("exact", "nll", "perplexity") else 1
        options = tasks.Options(few_shot=few_shot, max_new_tokens=2, window=32)
        return tasks.measure(tasks.Task(kind, kind, asked, 2, shots), desk().model, tokenizer,
                             options)
    read_or_refused("evaluation files", read)


@budget(60)
@given(changed(dict.fromkeys("abcdef", "Q: {question}\nA:"), most=1))
def test_wordings(value):
    folder = desk().put({"wordings.json": as_json(value)})
    read_or_refused("wordings", lambda: robustness.read_wordings(folder / "wordings.json"))


@budget(100)
@given(st.data())
def test_run_folders(draw):
    settings_ = {"model": str(desk().folder), "method": "lfu", "aux": "lora", "lam": 5.0,
                 "seed": 3, "template": "plain", "data_sha256": "00"}
    changes = {"settings.json": as_json(draw.draw(changed(settings_)))}
    if draw.draw(st.booleans()):
        changes = {"settings.json": None, "adapter_config.json": as_json(draw.draw(changed(
            {**desk().json("adapter_config.json"), "base_model_name_or_path": "x"})))}
    folder = desk().put(changes)

    def read():
        base, found = runs.find_runs([str(folder)], draw.draw(st.sampled_from(
            [None, str(folder)])))
        for run in found:
            runs.method(run)
        templates = runs.templates(found)
        assert set(templates.values()) <= set(data.TEMPLATES)
        runs.by_seed(found)
        return base
    read_or_refused("run folders", read)


# ---- much from little ----

HUGE = {"hidden_size": 2**20, "vocab_size": 2**20, "intermediate_size": 2**22}
CLAIMS = {  # terabytes, by
    "sizes": {"config.json": as_json({**SMALL, **HUGE})},
    "layers": {"config.json": as_json({**SMALL, "num_hidden_layers": 2**27})},
    "heads": {"config.json": as_json({**SMALL, "num_attention_heads": 2**27, "head_dim": 2**27,
                                      "hidden_size": 2**27, "num_key_value_heads": 1})},
    "the header's length": {"model.safetensors": struct.pack("<Q", 2**42) + b"{}"},
    "a header of 100 MB": {"model.safetensors": struct.pack("<Q", 10**8) + b"{" + b" " * 100},
    "a shape": {"model.safetensors": struct.pack("<Q", 96) + as_json(
        {"model.norm.weight": {"dtype": "F32", "shape": [2**40],
                               "data_offsets": [0, 2**42]}}).ljust(96) + bytes(64)},
    "a shape of nothing": {"adapter_model.safetensors": struct.pack("<Q", 96) + as_json(
        {"model.norm.weight": {"dtype": "F32", "shape": [2**62, 0],
                               "data_offsets": [0, 0]}}).ljust(96)},
    "r": {"adapter_config.json": as_json({"peft_type": "LORA", "r": 2**27, "lora_alpha": 16,
                                          "target_modules": ["q_proj"]})}}


@pytest.mark.parametrize("by", CLAIMS)
def test_a_claim_of_terabytes_is_refused(by):
    folder = desk().put(CLAIMS[by])
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10**6
    assert read_or_refused("claims", lambda: load_adapter(load_model(folder), folder)) is None


def test_a_model_that_is_built_before_it_is_compared_is_seen():
    """Teeth of the test above: the limit is there."""
    with pytest.raises((RuntimeError, MemoryError)):
        checkpoint.random_model(checkpoint.parse_config({**SMALL, **HUGE}))


LENGTH = 400_000  # characters: what takes the square of it takes minutes


@pytest.mark.parametrize("kind, record, field", [
    ("gsm8k", TASKS["gsm8k"][0], "question"), ("gsm8k", TASKS["gsm8k"][0], "answer"),
    ("hellaswag", TASKS["hellaswag"][0], "ctx_a"), ("lambada", TASKS["lambada"][0], "text"),
    ("piqa", TASKS["piqa"][0], "sol1")])
@pytest.mark.parametrize("unit", ["[", "9", " ", "#### ", ",", "a"], ids=repr)
def test_long_fields_take_no_longer_than_they_are(kind, record, field, unit):
    text = "#### 7 " + unit * (LENGTH // len(unit)) + " b"
    folder = desk().put({"data.jsonl": as_json({**record, field: text})})
    found = read_or_refused("long fields", lambda: tasks.KINDS[kind][0](folder / "data.jsonl"))
    if found and kind == "gsm8k":
        with alarm():
            tasks.normalise(found[0].target)
            tasks.flexible_answer(found[0].target)


def test_long_templates_and_tokens_take_no_longer_than_they_are():
    template = "<|im_start|>system\n" * (LENGTH // 20)
    folder = desk().put({"tokenizer_config.json": as_json({"chat_template": template})})
    assert read_or_refused("long fields", lambda: load_tokenizer(folder)) is not None
    raw = desk().json("tokenizer.json")
    raw["model"] |= {"ignore_merges": True, "vocab": {**raw["model"]["vocab"], "a" * LENGTH: 2000}}
    folder = desk().put({"tokenizer.json": as_json(raw)})
    assert read_or_refused("long fields", lambda: load_tokenizer(folder)) is None


# ---- the scripts ----

def one_line(main, *flags):
    with pytest.raises(ValueError) as error:
        main(list(flags))
    assert "\n" not in str(error.value) and len(str(error.value)) <= LONG
    return str(error.value)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tmp_path):
    """An embedding has no row for them: an IndexError in the middle of a run."""
    raw = desk().json("tokenizer.json")
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 2**30, "content": "<|far|>"})
    folder = str(desk().put({"tokenizer.json": as_json(raw), "data.jsonl": as_json(RECORDS[0][0])}))
    words = "the tokenizer has 1073741825 ids, the embedding 896 rows"
    file = folder + "/data.jsonl"
    assert words in one_line(train.main, "--model", folder, "--data", file, "--out",
                             str(tmp_path / "run"))
    for flags in (["--task", f"nll={file}"], ["--prompt", "Who?"]):
        assert words in one_line(eval_script.main, "--model", folder, *flags)


@budget(40)
@given(st.data(), st.booleans())
def test_train_and_eval_on_a_damaged_folder(draw, training):
    """From the command line's words to the end of a short run."""
    here = desk()
    which = draw.draw(st.sampled_from(["nothing", "config", "data", "data", "tokenizer"]))
    name, raw = "data.jsonl", b"\n".join(map(as_json, RECORDS[0]))
    changes = {"config.json": as_json(draw.draw(changed(here.raw, 1)))} if which == "config" else (
        tokenizer_changes(draw, here) if which == "tokenizer" else {})
    if which == "data":
        name, raw = records_file(draw, RECORDS[0])
    folder, out = here.put({name: raw, **changes}), top() / "run"
    shutil.rmtree(out, ignore_errors=True)
    flags = ["--model", str(folder), "--device", "cpu"]
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):  # as strict as a pipe
        if training:
            read_or_refused("train.py", lambda: train.main([
                *flags, "--data", str(folder / name), "--max-steps", "1", "--batch-size", "1",
                "--accumulate", "1", "--out", str(out)]))
        else:
            read_or_refused("eval.py", lambda: eval_script.main([
                *flags, "--task", f"nll={folder / name}", "--limit", "2", "--json",
                str(top() / "scores.json")]))


# ---- the test itself ----

def test_cases_were_read_and_cases_were_refused():
    """Else the changes are too wild or too tame to say anything."""
    if len({target for target, _ in TRIED}) < 12:
        pytest.skip("not all of this file has run")
    for target in {target for target, _ in TRIED} - {"text like control tokens", "claims"}:
        assert TRIED[target, "read"] and TRIED[target, "refused"], target


@pytest.mark.parametrize("read", [
    lambda: {}["key"], lambda: len(None), lambda: json.loads("[" * 100_000), lambda: bytes(2**45),
    lambda: "\ud800".encode(),
    lambda: (_ for _ in ()).throw(ValueError("long" * 200)),
    lambda: (_ for _ in ()).throw(ValueError("two\nlines"))])
def test_a_reader_that_fails_otherwise_is_seen(read):
    before = Counter(TRIED)
    with pytest.raises((AssertionError, LookupError, TypeError, RecursionError, MemoryError)):
        read_or_refused("planted", read)
    assert TRIED == before


def test_a_reader_that_hangs_is_seen(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 1)

    def hang():
        while True:
            pass
    with pytest.raises(AssertionError, match="took more than 1 s"):
        read_or_refused("planted", hang)
