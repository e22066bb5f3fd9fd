"""Claim: files in three formats become exactly the ids and labels that the templates say; every
kind of bad file gets one clear line; a file is written whole or not at all. The tokenizer here is
the alphabet (one id a character, "\\n\\n" is one), so ids can be spelled by hand.
"""

import json
import math
import os
from pathlib import Path
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from lfu_min.bundled import BUNDLED
from lfu_min.engine.system import ROOT
from lfu_min.files.data import (Example, batch_order, collate, encode_example, load_dataset,
                                prompt_ids, read_examples)
from lfu_min.files.jsons import (finite, parse_json, read_json, read_records, read_text, write_json,
                                 written_aside)
from lfu_min.files.tokenizer import load_tokenizer


class Letters:
    """One id a character, its code point, but "\\n\\n" at the end of a piece is id 1, as SmolLM2
    has it."""
    eos_id, eos_ids = 2, (2,)

    def __init__(self, bos_id=None):
        self.bos_id = bos_id

    def encode(self, text):
        return [*map(ord, text[:-2]), 1] if text.endswith("\n\n") else [*map(ord, text)]


def ords(text):
    return [*map(ord, text)]


def write(tmp_path, content, name="data.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


QA = {"question": "2+2?", "answer": "4"}


def test_the_three_formats_in_both_file_types(tmp_path):
    records = [QA, {"instruction": "Add", "input": "2 and 2", "output": "4"},
               {"instruction": "Hi", "input": "", "output": "Ho"},
               {"instruction": "Hi", "input": None, "output": "Ho"},
               {"instruction": "Hi", "output": "Ho", "id": 7},
               {"prompt": "a\u2028b", "response": " c "}]
    expected = [("2+2?", "4"), ("Add\n2 and 2", "4"), ("Hi", "Ho"), ("Hi", "Ho"), ("Hi", "Ho"),
                ("a\u2028b", " c ")]
    assert read_examples(write(tmp_path, lines(*records))) == expected
    assert read_examples(write(tmp_path, json.dumps(records, indent=1), "data.json")) == expected
    raw = json.dumps(records[-1], ensure_ascii=False)  # U+2028 as it is: does not end a line
    assert read_examples(write(tmp_path, raw)) == expected[-1:]


def test_windows_files_just_work(tmp_path):
    content = "\ufeff" + lines(QA, QA).replace("\n", "\r\n\r\n  \r\n")
    assert read_examples(write(tmp_path, content)) == [("2+2?", "4")] * 2
    assert read_examples(write(tmp_path, "\ufeff[\r\n" + json.dumps(QA) + "\r\n]",
                               "data.json")) == [("2+2?", "4")]


def test_plain_template():
    ids, labels = encode_example(Letters(), Example("2+2?", "4"))
    prompt = ords("Question: 2+2?\nAnswer:")
    assert ids == prompt + ords(" 4") + [2]  # the blank belongs to the answer, EOS is learned
    assert labels == [-100] * len(prompt) + ords(" 4") + [2]
    assert prompt_ids(Letters(), "2+2?") == prompt  # generation starts exactly where training does
    ids, labels = encode_example(Letters(bos_id=0), Example("2+2?", "4"))
    assert ids == [0] + prompt + ords(" 4") + [2]
    assert labels == [-100] * (len(prompt) + 1) + ords(" 4") + [2]


def test_alpaca_template_is_tokenised_piece_by_piece():
    ids, labels = encode_example(Letters(bos_id=0), Example("Add", "4"), "alpaca")  # never a BOS
    system = ords("Below is an instruction that describes a task. "
                  "Write a response that appropriately completes the request.") + [1]
    user = ords("### Instruction:\nAdd\n\n### Response:\n")
    assert ids == system + user + ords("4") + [2, 1]
    assert labels == [-100] * len(system + user) + ords("4") + [2, 1]
    assert prompt_ids(Letters(), "Add", "alpaca") == system + user


def test_long_examples_are_dropped_and_counted_never_cut(tmp_path):
    path = write(tmp_path, lines(QA, QA | {"answer": "4" * 50}, QA | {"answer": "5"}))
    length = len("Question: 2+2?\nAnswer: 4") + 1  # + EOS
    kept, dropped = load_dataset(path, Letters(), max_len=length)
    assert dropped == 1 and len(kept) == 2
    for (ids, labels), answer in zip(kept, "45"):
        assert (list(ids), list(labels)) == encode_example(Letters(), Example("2+2?", answer))
    assert kept.numbers == [1, 3]
    message = (f"none of the 3 examples fits into max_len {length - 1}; "
               f"the shortest has {length} tokens")
    with pytest.raises(ValueError, match=message):
        load_dataset(path, Letters(), max_len=length - 1)


def test_collate_pads_on_the_right():
    ids, labels = collate([([5, 6, 7], [-100, 6, 7]), ([8], [8])], pad_id=2)
    assert ids.tolist() == [[5, 6, 7], [8, 2, 2]]
    assert labels.tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert ids.dtype == labels.dtype == torch.int64


def test_batch_order_covers_every_epoch_and_depends_on_seed_and_step_alone():
    epoch = [batch_order(10, 4, seed=3, step=step) for step in range(3)]
    assert [len(batch) for batch in epoch] == [4, 4, 2]
    assert sorted(sum(epoch, [])) == list(range(10))
    second = [batch_order(10, 4, seed=3, step=step) for step in range(3, 6)]
    assert sorted(sum(second, [])) == list(range(10)) and second != epoch
    assert batch_order(10, 4, seed=3, step=4) == second[1]  # resumed in the middle of an epoch
    assert batch_order(10, 4, seed=4, step=0) != epoch[0]
    assert sum(epoch, []) != list(range(10))  # shuffled
    assert batch_order(3, 8, seed=0, step=1) != [] and len(batch_order(3, 8, seed=0, step=1)) == 3


READ = """
import sys
import torch
from lfu_min.bundled import BUNDLED
from lfu_min.engine.system import peak_memory_mib
from lfu_min.files import data
from lfu_min.files.tokenizer import load_tokenizer
if sys.argv[2] == "lists":  # the planted mistake
    data.array = lambda kind, numbers: list(numbers)
tokenizer, cpu = load_tokenizer(BUNDLED), torch.device("cpu")
tokenizer.encode("warm")
before = peak_memory_mib(cpu)
kept, _ = data.load_dataset(sys.argv[1], tokenizer)
print(peak_memory_mib(cpu) - before, sum(len(ids) for ids, _ in kept), len(kept))
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_a_large_file_takes_few_bytes_a_token(tmp_path, form):
    """LFU_DATA_MB megabytes (10) of invented word problems: eight bytes a token, ids and labels,
    and the texts; Python's lists would take five times as much. A .json list is parsed at once, so
    its objects are in memory as well."""
    source = (BUNDLED / "data" / "word_problems_train.jsonl").read_text().splitlines()
    megabytes = float(os.environ.get("LFU_DATA_MB", "10"))
    rows = source * round(megabytes * 1e6 / sum(len(line) + 1 for line in source))
    text = "\n".join(rows) if form == "jsonl" else "[" + ",\n".join(rows) + "]"
    path = write(tmp_path, text, f"data.{form}")
    used = {}
    for kind in ("arrays", "lists"):
        done = subprocess.run([sys.executable, "-c", READ, str(path), kind], capture_output=True,
                              text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        mib, tokens, examples = map(float, done.stdout.split())
        used[kind] = mib / (path.stat().st_size / 2**20)
        print(f"{form}, {kind}: {mib:.0f} MiB for {megabytes:g} MB, {tokens:.0f} tokens in "
              f"{examples:.0f} examples: {used[kind]:.1f} times the file's size")
    assert examples == len(rows) and used["arrays"] < (5 if form == "jsonl" else 9) < used["lists"]


GOOD = json.dumps(QA)
BAD = [  # file name, content, what the message says
    ("data.jsonl", "", "data.jsonl is empty"),
    ("data.jsonl", "\ufeff \r\n", "data.jsonl is empty"),
    ("data.json", "[]", "the list is empty"),
    ("data.csv", GOOD, "a .json or .jsonl file is needed"),
    ("data.jsonl", (GOOD + "\n").encode() + b'{"question": "\xe9"',
     "line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
    ("data.jsonl", GOOD.encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
    ("data.jsonl", GOOD + "\n\n" + GOOD[:-1],
     "line 3: not valid JSON (Expecting ',' delimiter at column 35); a .jsonl file has one object "
     "a line"),
    ("data.jsonl", "[\n" + GOOD + "\n]", "line 1: not valid JSON"),
    ("data.json", "[\n" + GOOD + ",\n{]", "line 3: not valid JSON"),
    ("data.json", GOOD + "\n" + GOOD,
     "line 2: not valid JSON (Extra data at column 1); if it has one object a line, name it"),
    ("data.json", "[" * 100_000, "line 1: not usable JSON"),
    ("data.jsonl", GOOD + "\n" + '{"a": ' * 100_000, "line 2: not usable JSON"),
    ("data.jsonl", GOOD + "\n" + "9" * 100_000, "line 2: not usable JSON"),
    ("data.json", GOOD, "a list of objects is needed, not an object"),
    ("data.json", f"[{GOOD}, 3]", "item 2: an object is needed, not a number"),
    ("data.jsonl", GOOD + "\n" + '"text"', "line 2: an object is needed, not a string"),
    ("data.jsonl", '{"question": "a", "text": "b"}',
     "line 1: has the fields 'question', 'text'; needed are question / answer, instruction"),
    ("data.jsonl", "{}", "line 1: has the fields (none)"),
    ("data.jsonl", GOOD + '\n{"question": "a", "answer": 4}',
     "line 2: answer must be a string, not a number"),
    ("data.jsonl", '{"question": "a", "answer": true}',
     "line 1: answer must be a string, not true or false"),
    ("data.jsonl", '{"question": ["a"], "answer": "b"}',
     "line 1: question must be a string, not a list"),
    ("data.jsonl", '{"prompt": "a", "response": null}',
     "line 1: response must be a string, not null"),
    ("data.jsonl", '{"instruction": "a", "input": 3, "output": "b"}',
     "line 1: input must be a string, not a number"),
    ("data.jsonl", '{"question": "a", "answer": ""}', "line 1: answer is empty"),
    ("data.jsonl", '{"question": "a", "answer": " \\n"}', "line 1: answer is empty"),
    ("data.jsonl", '{"question": "", "answer": "b"}', "line 1: question is empty"),
]


@pytest.mark.parametrize("name, content, message", BAD, ids=range(len(BAD)))
def test_bad_files_get_one_clear_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_examples(write(tmp_path, content, name))
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_folders_and_wrong_choices(tmp_path):
    with pytest.raises(ValueError, match="nothing.jsonl cannot be read: No such file"):
        read_examples(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="is a folder, not a file"):
        read_examples(tmp_path)
    with pytest.raises(ValueError, match="template 'gpt' is unknown: choose from plain, al"):
        prompt_ids(Letters(), "a", "gpt")
    no_eos = Letters()
    no_eos.eos_id = None
    with pytest.raises(ValueError, match="names no EOS token"):
        encode_example(no_eos, Example("a", "b"))


# ---- jsons.py, which every file goes through

def test_read_records_says_where_each_record_is(tmp_path):
    path = write(tmp_path, '\ufeff{"a": 1}\r\n\n \n{"a": "\u2028"}')
    assert read_records(path) == [(f"{path}, line 1", {"a": 1}),
                                  (f"{path}, line 4", {"a": "\u2028"})]
    path = write(tmp_path, '[{"a": 1},\n\n{"a": 2}]', "data.json")
    assert read_records(path) == [(f"{path}, item 1", {"a": 1}), (f"{path}, item 2", {"a": 2})]


def test_a_bom_is_left_out_unless_every_byte_counts(tmp_path):
    path = write(tmp_path, "\ufeffa\r\nb")
    assert read_text(path) == "a\r\nb" and read_text(path, "utf-8") == "\ufeffa\r\nb"
    assert read_json(write(tmp_path, '\ufeff{"a": 1}')) == {"a": 1}


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "9" * 100_000, "nul", '"\n"'])
def test_parse_json_starts_with_where(text):
    with pytest.raises(ValueError, match="^some place, line 1: not (valid|usable) JSON") as caught:
        parse_json(text, "some place")
    assert "\n" not in str(caught.value)


def test_what_is_written_is_read_back(tmp_path):
    value = {"text": "naïve \u2028 \ud800", "numbers": [1, 0.1, 10**30], "none": None, "no": False}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value  # a lone surrogate too
    assert "naïve" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_numbers_that_json_lacks_become_null_anywhere(tmp_path):
    value = {"a": math.nan, "b": [1.5, math.inf, {"c": (-math.inf, np.float64("nan"))}]}
    assert finite(value) == {"a": None, "b": [1.5, None, {"c": [None, None]}]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == finite(value)
    assert math.isnan(value["a"])  # the caller's is left alone


def test_an_interrupted_write_leaves_the_older_file_whole(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": {1, 2}})
    with pytest.raises(KeyboardInterrupt):
        with written_aside(tmp_path / "a.json") as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none" / "a.json", tmp_path / "file" / "a.json"):
        with pytest.raises(ValueError, match="a.json cannot be written: N") as caught:
            write_json(path, {})
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is a folder, not a file"):
        write_json(tmp_path, {})


@pytest.mark.skipif(os.name == "nt", reason="links and modes as on Unix")
def test_a_link_keeps_pointing_and_the_mode_is_what_umask_gives(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "file.json")
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "link.json", {"a": 1})
    finally:
        os.umask(before)
    assert (tmp_path / "link.json").is_symlink() and read_json(tmp_path / "file.json") == {"a": 1}
    assert (tmp_path / "file.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_a_fifo_is_neither_waited_for_nor_replaced(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waited for a FIFO"))
    signal.alarm(10)
    try:
        for use in (read_text, read_json, read_records, lambda path: write_json(path, {})):
            with pytest.raises(ValueError, match="is a FIFO or a device, not a file"):
                use(tmp_path / "a.json")
    finally:
        signal.alarm(0)
    assert (tmp_path / "a.json").is_fifo()


@pytest.mark.slow
def test_smollm2_on_gsm8k_and_dolly():
    """Counts as published for LLaMA-Factory's template: the system text is 19 tokens, "\\n\\n" is
    1116; maximum 569."""
    if not {"LFU_SMOLLM2", "LFU_DATA"} <= os.environ.keys():
        pytest.skip("set LFU_SMOLLM2 and LFU_DATA to check the templates with real files")
    tokenizer, data = load_tokenizer(os.environ["LFU_SMOLLM2"]), Path(os.environ["LFU_DATA"])
    for name, n in (("gsm8k_train.jsonl", 7473), ("dolly_3k.json", 2996)):
        for template in ("plain", "alpaca"):
            kept, dropped = load_dataset(data / name, tokenizer, template, max_len=512)
            assert len(kept) + dropped == n
            ids, labels = kept[0]
            start = labels.count(-100)
            assert ids[start:] == labels[start:] and set(labels[:start]) == {-100}
            assert ids[-3:][-1 if template == "plain" else -2] == tokenizer.eos_id
            assert template == "plain" or ids[18] == ids[-1] == 1116
