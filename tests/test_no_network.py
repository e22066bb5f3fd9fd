"""Claim: nothing asks for a network, ever. Importing every module, training, scoring, loading,
exporting: all run in a process in which every way out is closed, and which says so if one is tried.
"""
import json
import os
import re
import subprocess
import sys

import pytest

from lfu_min.engine.system import ROOT

pytestmark = pytest.mark.slow

# Python runs it before anything else. The hook sees what C code behind Python's socket does too;
# what a library opens by itself (in Rust, say) it does not see: hence the last test.
CLOSED = '''
import os, socket, sys

def closed(*args, **kwargs):
    raise SystemExit(f"NETWORK: {args}")

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, closed)
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, closed)

def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
                 "urllib.Request"):
        os.write(2, f"NETWORK: {event}\\n".encode())
        os._exit(99)
sys.addaudithook(hook)
'''
EVERY_MODULE = '''
import importlib, pkgutil, sys
sys.argv = ["x"]
import lfu_min, train, eval
names = [m.name for m in pkgutil.walk_packages(lfu_min.__path__, "lfu_min.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
assert len(names) > 40
print("modules", len(names))
'''
LOAD = '''
import sys, torch, lfu_min
from lfu_min.bundled import BUNDLED
from lfu_min.files.adapter import export_merged
from lfu_min.files.tokenizer import load_tokenizer
model, tokenizer = lfu_min.load_model(BUNDLED), load_tokenizer(BUNDLED)
export_merged(lfu_min.add_lora(model, r=2), BUNDLED, sys.argv[1] + "/export")
lfu_min.load_model(sys.argv[1] + "/export")(torch.tensor([tokenizer.encode("Ann has 7")]))
'''


def run(tmp_path, *command, timeout=300):
    """A Python with every socket closed: exit status, and both of its outputs."""
    (tmp_path / "site").mkdir(exist_ok=True)
    (tmp_path / "site" / "sitecustomize.py").write_text(CLOSED)
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True,
                          timeout=timeout, cwd=tmp_path, env=environment)
    return done.returncode, done.stdout + done.stderr


def test_every_module_is_imported_without_a_network(tmp_path):
    code, said = run(tmp_path, "-c", EVERY_MODULE)
    assert code == 0 and "modules" in said, said


def test_training_and_scoring_need_no_network(tmp_path):
    train, score = str(ROOT / "train.py"), str(ROOT / "eval.py")
    code, said = run(tmp_path, train, "--max-steps", "2", "--batch-size", "4", "--out", "run")
    assert code == 0 and "saved run" in said, said
    code, said = run(tmp_path, score, "run", "--limit", "2", "--json", "scores.json")
    assert code == 0 and json.loads((tmp_path / "scores.json").read_text())["results"], said


def test_loading_and_exporting_need_no_network(tmp_path):
    code, said = run(tmp_path, "-c", LOAD, str(tmp_path))
    assert code == 0 and (tmp_path / "export" / "model.safetensors").is_file(), said


@pytest.mark.parametrize("ask", [
    "import urllib.request as u; u.urlopen('http://127.0.0.1:9')",
    "import socket; socket.create_connection(('127.0.0.1', 9))",
    "import socket; socket.socket().connect(('127.0.0.1', 9))",
    "import socket; socket.getaddrinfo('localhost', 80)",
    "import _socket; _socket.socket().connect(('127.0.0.1', 9))",
    "import sys; sys.path.insert(0, ''); import planted"])
def test_a_program_that_asks_is_seen(tmp_path, ask):
    (tmp_path / "planted.py").write_text(
        "import socket\ntry:\n    socket.create_connection(('127.0.0.1', 9))\nexcept OSError:\n"
        "    pass\n")  # at import, and it takes no for an answer
    code, said = run(tmp_path, "-c", ask)
    assert code != 0 and "NETWORK" in said


ASKS = re.compile(r"^\s*(?:from|import) (?:urllib|requests|http|socket|ssl|ftplib|asyncio|aiohttp"
                  r"|huggingface_hub|datasets)\b|load_tiktoken_bpe|\.get_encoding\(", re.MULTILINE)


def test_no_file_here_imports_what_opens_connections():
    for path in [*ROOT.glob("lfu_min/**/*.py"), ROOT / "train.py", ROOT / "eval.py"]:
        assert not ASKS.search(path.read_text(encoding="utf-8")), path
    for planted in ("import socket", "def f():\n    from urllib.request import urlopen",
                    "tiktoken.get_encoding('gpt2')"):
        assert ASKS.search(planted)
