"""The documents do what they say: commands run, flags and links exist, every `file: name` names
something, and the bundled model shows what it is there for: plain SFT learns and forgets.

Pages are README.md, docs/*.md and the bundled world's README.md. Of a command every flag must be
one that the script knows; a command of train.py or eval.py that needs no files of one's own also
runs, cut short (slow). Python blocks run one after the other, a page's in one namespace.
"path/to/..." stands for files of one's own. Slow: these runs, full fine-tunings of the bundled
model, and 20 steps on real weights where LFU_SMOLLM2 and LFU_DATA are set.
"""
import argparse
import ast
import contextlib
import functools
import importlib
import json
import os
from pathlib import Path
import re
import shlex
import statistics
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from lfu_min import load_adapter, load_model
from lfu_min.bundled import BUNDLED
from lfu_min.engine.system import ROOT
from lfu_min.paper import measures, sweep

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
import train

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, BUNDLED / "README.md"]
DATA = BUNDLED / "data" / "word_problems_validation.jsonl"
WORDING = re.compile(r"path/to|\bDIR\b|\bRUN\b|\bFILE\b|\.\.\.|--plot|[*|]|--max-steps")
CUT = {"train.py": ["--max-steps", "2", "--batch-size", "4"], "eval.py": ["--limit", "2"]}


def text(page):
    return page.read_text(encoding="utf-8")


def label(page):
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=label)
each_doc = pytest.mark.parametrize("page", DOCS, ids=label)


# ---- what stands on a page ----

class Block(NamedTuple):
    line: int  # of its first line, from 1
    language: str
    text: str
    above: str  # the last line in front of it that is not blank


@functools.cache
def blocks(page):
    found, opened, above = [], None, ""
    for number, line in enumerate(text(page).splitlines(), 1):
        fence = re.match(r"\s*```(\w*)\s*$", line)
        if fence and opened is None:
            opened = Block(number + 1, fence[1], "", above)
        elif fence:
            found.append(opened)
            opened = None
        elif opened:
            opened = opened._replace(text=opened.text + line + "\n")
        elif line.strip():
            above = line
    assert opened is None, f"{label(page)}:{opened.line}: a block that does not end"
    return found


def prose(page):
    """[(line number, line)] outside of blocks."""
    inside = {number for block in blocks(page) for number in
              range(block.line - 1, block.line + block.text.count("\n") + 1)}
    return [(number, line) for number, line in enumerate(text(page).splitlines(), 1)
            if number not in inside]


class Command(NamedTuple):
    page: Path
    line: int
    words: list  # without comments, NAME=value in front, and what follows a pipe

    @property
    def flags(self):
        """What the script gets."""
        return self.words[self.words.index(self.script) + 1:]

    @property
    def script(self):
        """train.py, eval.py, a module, or the program's name."""
        if self.words[0] in ("python", "torchrun"):
            scripts = [w for w in self.words if w in ("train.py", "eval.py")]
            return scripts[0] if scripts else self.words[self.words.index("-m") + 1]
        return self.words[0]


def split(words):
    """The commands of a line of shell, as lists of words; of a loop its first turn."""
    part, values = [], {}
    for word in (*words, ";"):
        if not re.fullmatch(r"[;&|]+", word):
            part.append(word)
            continue
        while part[:1] in (["do"], ["done"]):
            part = part[1:]
        if part[:1] == ["for"]:
            values[part[1]] = part[3]
            part = []
        while part and re.match(r"\w+=", part[0]):
            part = part[1:]
        if part:
            yield [re.sub(r"\$(\w+)", lambda found: values[found[1]], w) for w in part]
        if word.startswith("|") and word != "||":
            return
        part = []


def commands(page):
    found = []
    for block in blocks(page):
        if block.language != "bash":
            continue
        whole = re.sub(r"\\\n", " \0", block.text)  # a line goes on behind a backslash
        number = block.line
        for line in whole.splitlines():
            lexer = shlex.shlex(line.replace("\0", ""), posix=True, punctuation_chars=";&|")
            lexer.whitespace_split = True
            found += [Command(page, number, words) for words in split(list(lexer))]
            number += 1 + line.count("\0")
    return found


COMMANDS = [command for page in PAGES for command in commands(page)]
RUNNABLE = [c for c in COMMANDS if c.script in CUT and c.words[0] == "python"
            and not WORDING.search(" ".join(c.words))]


def shown(command):
    return f"{label(command.page)}:{command.line}"


# ---- commands ----

class Parsed(Exception):
    """The script has read its flags: far enough."""


def parse(script, flags, monkeypatch):
    """The namespace that the script's own parser makes of flags. The script goes no further."""
    module = importlib.import_module({"lfu_min.world": "lfu_min.world.__main__"}.get(
        script, script.removesuffix(".py")))
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, argv=None, namespace=None):
        raise Parsed(original(self, argv, namespace))
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        try:
            module.main(flags)
        except Parsed as parsed:
            return parsed.args[0]
        except SystemExit:
            raise ValueError("the script's parser refuses it; see its message above") from None
    raise AssertionError(f"{script} reads no flags")


def check_pytest(words):
    """Files and tests named in a call of pytest exist."""
    options = iter(words)
    files, picked = [], ""
    for word in options:
        if word in ("-k", "-m"):
            picked = next(options) if word == "-k" else (next(options), picked)[1]
        elif not word.startswith("-"):
            files.append(ROOT / word.split("::")[0])
            assert "::" not in word or word.split("::")[1] in names(files[-1])
    assert all(file.exists() for file in files), f"{files} should be there"
    sources = "".join(text(file) for file in files if file.is_file())
    for name in re.findall(r"\w+", picked):
        assert name in ("and", "or", "not") or name in sources, f"-k {picked} picks nothing"


@pytest.mark.parametrize("command", COMMANDS, ids=shown)
def test_every_flag_of_a_command_exists(command, monkeypatch):
    if command.words[0] == "pip":
        assert all((ROOT / word).exists() for word in command.words if word.endswith(".txt"))
        return
    assert command.words[0] in ("python", "torchrun"), "no command that this test understands"
    if command.script == "pytest":
        return check_pytest(command.flags)
    flags = [flag for flag in command.flags if flag != "..."]
    s = parse(command.script, flags, monkeypatch)
    if command.script == "lfu_min.paper.sweep":
        assert sweep.parse_grid(s.grid)  # its settings are train.py's


@pytest.fixture(scope="module")
def desks(tmp_path_factory):
    """{page: a folder in which its commands run one after the other}."""
    made = {}

    def desk(page):
        if page not in made:
            made[page] = tmp_path_factory.mktemp(page.parent.name)
            for name in ("train.py", "eval.py", "lfu_min"):
                (made[page] / name).symlink_to(ROOT / name)
        return made[page]
    return desk


def a_run(folder):
    """A run of one step at runs/<aux>-NNN, where there is none yet."""
    if not folder.exists():
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            train.main(["--aux", folder.name.split("-")[0], "--max-steps", "1", "--batch-size", "2",
                        "--device", "cpu", "--out", str(folder)])


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNNABLE, ids=shown)
def test_the_commands_run_in_order_and_print_what_is_said(command, desks):
    """Training is cut to two steps and scoring to two questions, the rest is as written."""
    desk = desks(command.page)
    for name in re.findall(r"runs/\w+-\d{3}", " ".join(command.flags)):
        a_run(desk / name)
    aux = dict(zip(command.flags, command.flags[1:])).get("--aux", "lora")
    new = f"runs/{aux}-{len(list(desk.glob(f'runs/{aux}-*'))):03d}"
    done = subprocess.run([sys.executable, command.script, *command.flags, *CUT[command.script]],
                          cwd=desk, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{' '.join(command.words)}\n{done.stderr}"
    if command.script == "train.py":
        assert all(word in done.stdout for word in ("before", "after", f"saved {new}"))
    elif not any(flag.startswith("--") for flag in command.flags):
        assert all(word in done.stdout for word in ("word problems", "category mean"))


def test_the_quick_start_is_there_and_runs():
    lines = [" ".join(c.words) for c in RUNNABLE if c.page == PAGES[0]]
    assert "python train.py --aux lora" in lines
    assert "python eval.py runs/none-000 runs/lora-000" in lines


@each_doc
def test_every_output_names_the_command_that_printed_it(page):
    """A block without a language is something printed: above it stands <!-- output of: COMMAND -->,
    and the command is one of the page's."""
    known = {" ".join(c.words) for c in COMMANDS if c.page == page}
    for block in blocks(page):
        if block.language:
            continue
        named = re.fullmatch(r"<!-- output of: (.*) -->", block.above)
        assert named, f"{label(page)}:{block.line}: output of what?"
        said = [" ".join(words) for words in split(shlex.split(named[1]))]
        assert said and said[-1] in known, (
            f"{label(page)}:{block.line}: {said} is no command of this page")


# ---- Python blocks ----

WITH_PYTHON = [page for page in PAGES if any(b.language == "python" for b in blocks(page))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=label)
def test_python_blocks_run_one_after_the_other(page, tmp_path, monkeypatch):
    """A page's in one namespace. path/to/X.jsonl is 128 word problems, any other path/to/X the
    bundled model, runs/X a run made for it. A traceback names the page and its line. A block that
    begins with the name of a file belongs into that file: tests/test_recipes.py."""
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks(page):
        if block.language != "python" or re.match(r"# (lfu_min|tests)/", block.text):
            continue
        code = re.sub(r"path/to/[\w.-]+\.jsonl?", str(DATA), block.text)
        code = re.sub(r"path/to/[\w.-]+", str(BUNDLED), code)
        for name in re.findall(r"runs/\w+-\d{3}", code):
            a_run(tmp_path / name)
        exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), namespace)


# ---- references, links, form ----

@functools.cache
def names(file):
    """Everything a Python file defines: name, Class.name, module-level names."""
    def of(body, prefix=""):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from of(node.body, f"{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    yield from (prefix + n.id for n in ast.walk(target) if isinstance(n, ast.Name))
    return set(of(ast.parse(text(file)).body))


def find_file(name):
    """A file as pages write it: from the root, or from lfu_min/."""
    return next((folder / name for folder in (ROOT, ROOT / "lfu_min")
                 if (folder / name).is_file()), None)


def references(page):
    """[(line number, file, name)] of every `file.py: name, name` outside of blocks."""
    for number, line in prose(page):
        for file, listed in re.findall(r"`([\w/]+\.py): ([\w., ]+)`", line):
            for name in listed.split(","):
                yield number, file, name.strip()


@each_page
def test_every_file_and_name_exists(page):
    wrong = []
    for number, file, name in references(page):
        found = find_file(file)
        if found is None or name not in names(found):
            wrong.append(f"{label(page)}:{number}: {file}: {name}")
    known = {name for file in (ROOT / "tests").glob("*.py") for name in names(file)}
    for number, line in prose(page):
        wrong += [f"{label(page)}:{number}: {name}"
                  for name in re.findall(r"(?<![\w/])(test_\w+)(?!\.py|\w)", line)
                  if name not in known]
        wrong += [f"{label(page)}:{number}: {file}" for file in
                  re.findall(r"`((?:lfu_min|tests|docs|engine|files|methods|scoring|training|cost|"
                             r"paper|world|teach)/[\w/.]+\.\w+)", line)
                  if find_file(file) is None]
    assert not wrong


def anchors(page):
    """GitHub's anchors of a page's headings."""
    heads = [re.sub(r"^#+ ", "", line) for _, line in prose(page) if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@each_page
def test_every_link_and_picture_exists(page):
    wrong = []
    for number, line in prose(page):
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            if re.match(r"https?:|mailto:", target):
                continue
            path, _, anchor = target.partition("#")
            there = page.parent / path if path else page
            if not there.exists() or (anchor and anchor not in anchors(there)):
                wrong.append(f"{label(page)}:{number}: {target}")
    assert not wrong


@each_page
def test_no_page_names_a_path_of_a_machine(page):
    machine = re.compile(r"(?<![\w.)/])/(tmp|work|home|root|Users|mnt|opt|usr|var|data)\b"
                         r"|\b[A-Z]:\\")
    wrong = [f"{label(page)}:{number}: {line}" for number, line
             in enumerate(text(page).splitlines(), 1)
             if machine.search(line)]
    assert not wrong


@each_page
def test_prose_has_at_most_100_columns(page):
    """Tables and blocks may be wider, and a line that is nothing but a reference or a picture."""
    alone = re.compile(r"\W*(`[^`]*`|!\[.*\]\(.*\)|<!--.*-->)\W*")
    assert not [f"{label(page)}:{number}" for number, line in prose(page) if len(line) > 100
                and not line.startswith("|") and not alone.fullmatch(line)]


def test_the_readme_has_at_most_180_lines():
    assert len(text(PAGES[0]).splitlines()) <= 180


def test_the_glossary_has_every_symbol_of_lfu_py():
    """A name of the table in lfu.py's docstring, and a sentence for it in docs/method.md."""
    docstring = ast.get_docstring(ast.parse(text(ROOT / "lfu_min" / "lfu.py")))
    table = re.search(r"^---.*?\n(.*?)\n\n", docstring, re.M | re.S)[1]
    rows = re.findall(r"^\S+ +(\S+)", table, re.M)
    symbols = [re.sub(r"\[.*", "", name) for name in rows if re.match(r"\w", name)]
    glossary = text(ROOT / "docs" / "method.md").split("## Glossary")[1]
    assert len(set(symbols)) >= 10
    assert not [name for name in symbols if not re.search(rf"^\| `{name}`", glossary, re.M)]


def where_equations_stand(page):
    """{"Eq 1": its cell of the column "where", ...} of a page's table."""
    rows = [line.split(" | ") for line in text(page).splitlines() if line.startswith("| Eq ")]
    return {row[0].strip("| "): row[2].strip("| ") for row in rows}


def test_both_tables_of_the_equations_say_the_same_place():
    readme, method = (where_equations_stand(page) for page in (PAGES[0], ROOT / "docs/method.md"))
    assert len(readme) == 5 and method == {**readme, "Eq 7": method["Eq 7"]}


def test_every_data_set_that_is_named_has_its_licence():
    rows = text(ROOT / "docs" / "how_long.md").split("## Licences")[1].lower()
    pages = "".join(text(page) for page in [*PAGES, *ROOT.glob("exercises/*.py")]).lower()
    for name in ("gsm8k", "piqa", "arc", "hellaswag", "lambada", "boolq", "dolly", "alpaca",
                 "alpagasus", "wikipedia"):
        assert re.search(rf"\b{name}", pages), f"{name} is named nowhere any more"
        assert re.search(rf"^\|[^|]*\b{name}", rows, re.M), f"{name} has no licence"


def test_the_table_of_the_log_has_every_field(tmp_path):
    """docs/training.md, "The log", has the fields of log.jsonl, no more and no fewer."""
    a_run(tmp_path / "lora-000")
    record = json.loads(text(tmp_path / "lora-000" / "log.jsonl").splitlines()[0])
    table = text(ROOT / "docs" / "training.md").split("## The log")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", "".join(cells))) == sorted(record)


# ---- planted mistakes ----

@pytest.mark.parametrize("line, words", [
    ("OMP_NUM_THREADS=2 python eval.py a --limit 2  # b", [["python", "eval.py", "a", "--limit",
                                                           "2"]]),
    ("pip install -r x.txt && python train.py", [["pip", "install", "-r", "x.txt"],
                                                 ["python", "train.py"]]),
    ("for s in 0 1; do for a in x y; do python train.py --aux $a --out r/$a-$s; done; done",
     [["python", "train.py", "--aux", "x", "--out", "r/x-0"]]),
    ("python eval.py RUN --wording | --noise", [["python", "eval.py", "RUN", "--wording"]])])
def test_a_line_of_shell_is_read_as_the_shell_would(line, words):
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    assert list(split(list(lexer))) == words


@pytest.mark.parametrize("script, flags", [
    ("train.py", ["--compile"]), ("eval.py", ["--curves"]), ("train.py", ["--aux", "sam"]),
    ("lfu_min.cost.bench", ["--sweep"]), ("lfu_min.paper.sweep", ["--split", "all", "lr=1"])])
def test_a_flag_that_went_away_is_seen(script, flags, monkeypatch):
    with pytest.raises(ValueError):
        parse(script, flags, monkeypatch)


@pytest.fixture
def written(monkeypatch):
    """written(page, more): from here on `more` stands at the end of the page."""
    original = text

    def write(page, more):
        monkeypatch.setattr(sys.modules[__name__], "text",
                            lambda p: original(p) + f"\n{more}\n" * (p == page))
        blocks.cache_clear()
    yield write
    blocks.cache_clear()


@pytest.mark.parametrize("check, more", [
    (test_every_file_and_name_exists, "as in `lfu.py: sft_backward`"),
    (test_every_file_and_name_exists, "as in `tests/test_lfu.py: test_of_nothing`"),
    (test_every_file_and_name_exists, "see test_of_nothing"),
    (test_every_link_and_picture_exists, "[there](nowhere.md)"),
    (test_every_link_and_picture_exists, "[there](method.md#nowhere)"),
    (test_every_link_and_picture_exists, "![a picture](figures/nothing.png)"),
    (test_no_page_names_a_path_of_a_machine, "in " + "/home" + "/someone/lfu_min"),
    (test_prose_has_at_most_100_columns, "word " * 21),
    (test_every_output_names_the_command_that_printed_it, "```\nloss 1.0\n```"),
    (test_every_output_names_the_command_that_printed_it,
     "<!-- output of: python train.py --lam 3 -->\n```\nloss 1.0\n```")],
    ids=lambda value: getattr(value, "__name__", "")[5:])
def test_a_planted_mistake_on_a_page_is_seen(check, more, written):
    page = ROOT / "docs" / "method.md"
    check(page)
    written(page, more)
    with pytest.raises(AssertionError):
        check(page)


# ---- what the documents promise of the bundled model and of real weights ----

@pytest.mark.slow
@pytest.mark.parametrize("aux", ["none", "lora"])
def test_fine_tuning_on_the_word_problems_learns_them_and_forgets(tmp_path, aux):
    """Defaults, seed 42: word problems at least +30 points; plain SFT loses at least 10 in the mean
    of the others."""
    base = measures.scores(None, "test")
    out, _ = train.main(["--aux", aux, "--out", str(tmp_path / aux)])
    after = measures.scores(out, "test")
    print({name: round(after[name], 1) for name in sweep.COLUMNS})
    assert after["word problems"] - base["word problems"] >= 30
    if aux == "none":
        assert base["category mean"] - after["category mean"] >= 10


@pytest.mark.slow
@pytest.mark.parametrize("aux", ["lora", "reps", "inplace"])
def test_smollm2_learns_gsm8k_and_its_adapter_is_peft_s(tmp_path, aux):
    path, folder = os.environ.get("LFU_SMOLLM2"), os.environ.get("LFU_DATA")
    if not path or not folder:
        pytest.skip("set LFU_SMOLLM2 (folder of SmolLM2-135M-Instruct) and LFU_DATA (folder with "
                    "gsm8k_train.jsonl)")
    peft = pytest.importorskip("peft")
    import transformers
    rows = sorted((Path(folder) / "gsm8k_train.jsonl").read_text().splitlines(True), key=len)[:20]
    (tmp_path / "short.jsonl").write_text("".join(rows))
    out, log = train.main(["--model", path, "--data", str(tmp_path / "short.jsonl"), "--aux", aux,
                           "--device", "cpu", "--batch-size", "2", "--accumulate", "1", "--lr",
                           "5e-4", "--epochs", "1", "--out", str(tmp_path / aux)])
    first, last = (statistics.mean(r["sft"] for r in part) for part in (log[:3], log[-3:]))
    print(f"{aux}: sft of the first and last three steps, each on new examples "
          f"{first:.3f} {last:.3f}")
    assert len(log) == 10 and last < first
    ids = torch.arange(100, 140)[None]
    ours = load_adapter(load_model(path, dtype=torch.float32), out)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), str(out))
    with torch.no_grad():
        a, b = ours(ids), theirs(ids).logits
        plain = load_model(path, dtype=torch.float32)(ids)
    assert ((a - b).abs().max() / b.abs().max()).item() <= 1e-5
    assert (a - plain).abs().max() > 1e-3  # the adapter does something
