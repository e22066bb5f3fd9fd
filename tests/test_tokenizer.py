"""Claim: `load_tokenizer` gives the same ids as the library `tokenizers`, exactly, on any text;
what it cannot translate exactly it refuses by name; no text crashes it.

The reference has the file's added tokens removed, since control strings are plain text here. Small
tokenizers of each structure are trained on the spot; real files are compared by the tests marked
`slow`.
"""

import base64
import copy
import functools
import itertools
import json
import os
import random
import unicodedata
from pathlib import Path

import pytest

import lfu_min
from lfu_min.files import tokenizer as module
from lfu_min.files.tokenizer import Tokenizer, load_tokenizer

tokenizers = pytest.importorskip("tokenizers",
                                 reason="the reference, the library `tokenizers`, is not installed")

TEXT = """Natalia sold clips to 48 of her friends in April, and then she sold half as many clips \
in May.\n\n12 * 3 = 36
How many clips did Natalia sell altogether? She'll say it's 72; they've done "well", don't they? \
 \t 7\n    return x_1
Où est la bibliothèque? Đây là tiếng Việt. Straße, naïve café; \
東京は日本の首都です。 Привет, мир! \
مرحبا بالعالم 👩‍👩‍👧 ½ Ⅷ ٣
the there then these other mother 2024-11-21 10:45 #### 72 <<48/2=24>>24 $1,000.50 100% a@b.org \
{"k": [1, 2]}\r\n"""
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(use_regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
            "use_regex": use_regex}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


# The regular expressions are written out once more, so that a slip in the package's cannot agree
# with itself.
SPLIT_LLAMA3 = split(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                     r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLIT_QWEN = split(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                   r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLIT_TEKKEN = split(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
STRUCTURES = {  # pre_tokenizer, normalizer, ignore_merges, all bytes known
    "llama3": (sequence(SPLIT_LLAMA3, byte_level(False)), None, True, True),
    "qwen": (sequence(SPLIT_QWEN, byte_level(False)), {"type": "NFC"}, False, True),
    "smollm2": (sequence({"type": "Digits", "individual_digits": True}, byte_level(True)), None,
                False, False),
    "gpt2": (byte_level(True), None, False, False),
    "mistral nemo": (sequence(SPLIT_TEKKEN, byte_level(False)), None, True, True),
    "qwen, bytes missing": (sequence(SPLIT_QWEN, byte_level(False)), None, False, False),
}


@functools.cache
def trained(structure):
    """A tokenizer.json as text, trained on TEXT."""
    pre_tokenizer, normalizer, ignore_merges, all_bytes = STRUCTURES[structure]
    model = tokenizers.models.BPE(ignore_merges=ignore_merges)
    empty = json.loads(tokenizers.Tokenizer(model).to_str())
    empty |= {"pre_tokenizer": pre_tokenizer, "normalizer": normalizer}
    blank = tokenizers.Tokenizer.from_str(json.dumps(empty))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet() if all_bytes else []
    blank.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False))
    return blank.to_str()


def file_of(structure):
    return json.loads(trained(structure))


def reference(file):
    bare = file | {"added_tokens": [], "post_processor": None}
    return tokenizers.Tokenizer.from_str(json.dumps(bare))


def load(tmp_path, file, **others):
    """Write tokenizer.json and other JSON files to a folder and load it."""
    for name, content in {"tokenizer": file, **others}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(tmp_path)


def random_texts(n, seed=0):
    """Short strings in which everything meets everything: all of Unicode, blanks, digits, controls,
    contractions."""
    rng = random.Random(seed)
    sources = [lambda: chr(rng.randrange(0x20, 0x7F)),
               lambda: rng.choice(" \t\n\r  \u00a0\u3000\u2028\u0085"),
               lambda: rng.choice("0123456789²½Ⅷ٣"), lambda: chr(rng.randrange(0x3000)),
               lambda: chr((rng.randrange(0x110000 - 0x800) + 0xE000) % 0x110000),  # no surrogates
               lambda: rng.choice("\x00\x04\x06\x1c\x1d!'tStreéçe\u0301\u0323\u017f"),
               lambda: rng.choice(["'s", "'LL", "the ", "  12", " 7", "\n\n7", "\n\n", *CONTROL])]
    return ["".join(rng.choice(sources)() for _ in range(rng.randrange(1, 25))) for _ in range(n)]


def differences(tokenizer, file, texts):
    expected = reference(file).encode_batch_fast(texts, add_special_tokens=False)
    return [text for text, other in zip(texts, expected) if tokenizer.encode(text) != other.ids]


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_ids_equal_the_librarys_on_real_and_random_text(tmp_path, structure):
    file = file_of(structure)
    tokenizer = load(tmp_path, file)
    texts = [TEXT, *TEXT.splitlines(keepends=True), *TEXT.split(" "), *random_texts(3000)]
    assert differences(tokenizer, file, texts) == []
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode()) / 1.5  # merges do happen


@pytest.mark.slow
@pytest.mark.parametrize("structure, pattern", [
    ("smollm2", module.GPT2),  # digits not isolated
    # blanks before a digit split
    ("smollm2", module.SMOLLM.replace(r"\s+(?![^\s\p{N}])", r"\s+(?!\S)")),
    ("llama3", module.QWEN), ("qwen", module.GPT2), ("gpt2", module.SMOLLM),
    ("mistral nemo", module.QWEN)])
def test_the_comparison_catches_a_wrong_expression(tmp_path, monkeypatch, structure, pattern):
    file = file_of(structure)
    monkeypatch.setattr(module, "_pattern", lambda pre_tokenizer: pattern)
    assert differences(load(tmp_path, file), file, random_texts(3000))


def test_the_comparison_catches_a_forgotten_normalizer(tmp_path):
    file = file_of("qwen")
    assert differences(load(tmp_path, file | {"normalizer": None}), file, random_texts(1000))


def test_every_combining_mark_is_normalised_as_in_the_library(tmp_path):
    file = file_of("qwen")
    marks = [c for c in map(chr, range(0x110000)) if unicodedata.combining(c)]
    texts = [text for mark in marks for text in (f"a{mark}\u0301\u0323", f"a\u0323\u0301{mark}")]
    texts += [unicodedata.normalize("NFD", c) for c in map(chr, range(0x110000))
              if unicodedata.decomposition(c)]
    assert differences(load(tmp_path, file), file, texts + ["\U00011935\U00011930"]) == []


def test_merges_may_be_strings_or_pairs(tmp_path):
    file = file_of("llama3")
    assert isinstance(file["model"]["merges"][0], list)
    tokenizer = load(tmp_path, file)
    file["model"]["merges"] = [" ".join(pair) for pair in file["model"]["merges"]]
    as_strings = load(tmp_path, file)
    assert all(tokenizer.encode(text) == as_strings.encode(text)
               for text in [TEXT, *random_texts(200)])


def made_up_model(rng):
    """A BPE table over a, b, c as no training would make it: merges in odd orders, tokens that
    nothing makes."""
    alphabet = {byte: character for character, byte in module._byte_alphabet().items()}
    vocab = {alphabet[byte]: byte for byte in range(256)}
    known, merges = list("abc"), []
    for _ in range(rng.randrange(1, 14)):
        pair = [rng.choice(known), rng.choice(known)]
        merges += [pair] if pair not in merges else []
        known += ["".join(pair)] if "".join(pair) not in known else []
    made = known[3:]
    if rng.random() < 0.15:
        rng.shuffle(made)
    nothing_makes = ["".join(rng.choices("abc", k=rng.randrange(2, 6)))
                     for _ in range(rng.randrange(3))]
    for token in made + nothing_makes:
        vocab.setdefault(token, len(vocab))
    if rng.random() < 0.4:  # Llama 3's way: every split of every token
        merges = [[token[:i], token[i:]] for token in vocab for i in range(1, len(token))
                  if token[:i] in vocab and token[i:] in vocab]
    return {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": rng.random() < 0.5}


@pytest.mark.slow
def test_made_up_merge_tables_are_exact_or_refused(tmp_path):
    """The check that tiktoken's rule equals the listed merges: all words of up to 5 letters and
    some longer ones."""
    rng = random.Random(0)
    words = ["".join(word) for n in range(1, 6) for word in itertools.product("abc", repeat=n)]
    words += ["".join(rng.choices("abc", k=rng.randrange(6, 30))) for _ in range(300)]
    accepted, planted = 0, 0
    for _ in range(60):
        file = file_of("gpt2") | {"model": made_up_model(rng), "added_tokens": []}
        try:
            tokenizer = load(tmp_path, file)
        except ValueError as error:
            assert "in the order of their ids" in str(error) or "tiktoken would merge" in str(error)
            vocab = file["model"]["vocab"]  # what would have come of not refusing?
            ranks = {module._as_bytes(token): i for token, i in vocab.items()}
            tokenizer = Tokenizer(module.GPT2, ranks, {i: token for token, i in ranks.items()})
            planted += bool(differences(tokenizer, file, words))
        else:
            accepted += 1
            assert differences(tokenizer, file, words) == [], file["model"]["merges"]
    assert accepted > 30 and planted > 5


def test_a_token_with_a_lower_id_than_its_parts_is_refused(tmp_path):
    file = file_of("gpt2") | {"added_tokens": []}
    vocab = module._byte_alphabet() | {"bbbb": 256, "bb": 257}
    file["model"] = {"type": "BPE", "vocab": vocab, "merges": [["bb", "bb"], ["b", "b"]]}
    with pytest.raises(ValueError, match=r"b'bbbb' \(id 256\) is made from b'bb' \(id 257\)"):
        load(tmp_path, file)


def test_a_control_token_that_is_a_plain_word_is_not_met_in_text(tmp_path):
    file = file_of("llama3")  # ignore_merges: takes pieces that are tokens
    file["model"]["vocab"]["PAD"] = i = len(file["model"]["vocab"])
    assert load(tmp_path, file).encode("PAD") == [i]
    file["added_tokens"].append(file["added_tokens"][0] | {"id": i, "content": "PAD"})
    assert i not in load(tmp_path, file).encode("PAD")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_control_strings_are_plain_text(tmp_path, structure):
    file = file_of(structure)
    think = {"id": len(file["model"]["vocab"]), "content": "<think>", "special": False}
    file["added_tokens"].append(file["added_tokens"][0] | think)
    tokenizer = load(tmp_path, file)
    control = {token["id"] for token in file["added_tokens"]}
    for token in file["added_tokens"]:
        ids = tokenizer.encode("x" + token["content"] + "y")
        assert not control & set(ids)
        assert tokenizer.decode([token["id"]]) == token["content"]
    # the library's own
    assert control & set(tokenizers.Tokenizer.from_str(json.dumps(file)).encode("x<think>y").ids)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["llama3", "smollm2"])
@pytest.mark.parametrize("unit", ["a", " ", "\n", " \n", "!", "\u0301", "\x04", "_^", "\x1c!"],
                         ids=ascii)
def test_very_long_runs_do_not_crash(tmp_path, structure, unit):
    text = unit * (1_000_000 // len(unit)) + "x"
    tokenizer = load(tmp_path, file_of(structure))
    ids = tokenizer.encode(text)
    if not tokenizer._missing:
        assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_long_texts_are_cut_where_it_changes_nothing(tmp_path):
    for structure in STRUCTURES:
        file = file_of(structure)
        text = TEXT * (250_000 // len(TEXT))
        assert differences(load(tmp_path, file), file, [text]) == []


def test_odd_strings(tmp_path):
    tokenizer = load(tmp_path, file_of("llama3"))
    assert tokenizer.encode("") == []
    for text in ("\0", "\ufeffa", "\U0010ffff", "a\r\nb", "\x7f\x80"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a\udc80b") == tokenizer.encode("a\ufffdb")
    # a surrogate pair is a character
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


def test_decode(tmp_path):
    tokenizer = load(tmp_path, file_of("llama3"))
    half = next(ids[0] for ids in map(tokenizer.encode, "éЖ") if len(ids) > 1)
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([half]) == "\ufffd"
    assert tokenizer.decode([2] + tokenizer.encode("Où?") + [10**6]) == "<|im_end|>Où?"
    with pytest.raises(ValueError, match="id -100 is negative"):
        tokenizer.decode([5, -100])


def begins_with(token, i):
    """A post_processor that puts a token in front."""
    return {"type": "TemplateProcessing", "pair": [],
            "single": [{"SpecialToken": {"id": token, "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}}}


def test_bos_eos_and_size_come_from_the_files(tmp_path):
    file = file_of("llama3")
    bare = load(tmp_path, file)
    assert (bare.bos_id, bare.eos_id, bare.eos_ids) == (None, None, ())
    assert bare.vocab_size == len(file["model"]["vocab"])
    template = begins_with("<|im_start|>", 1)
    file["post_processor"] = {"type": "Sequence", "processors": [byte_level(True), template]}
    file["added_tokens"].append(file["added_tokens"][0] | {"id": 700, "content": "<|last|>"})
    full = load(tmp_path, file, tokenizer_config={"eos_token": {"content": "<|im_end|>"}},
                config={"eos_token_id": 0})
    assert (full.bos_id, full.eos_id, full.eos_ids, full.vocab_size) == (1, 2, (0,), 701)
    assert 1 not in full.encode("a")  # encode itself adds no BOS
    full = load(tmp_path, file, tokenizer_config={"eos_token": "<|im_end|>"},
                generation_config={"eos_token_id": [2, 0]})
    assert (full.eos_id, full.eos_ids) == (2, (2, 0))  # generation_config before config
    for name in ("config", "generation_config"):
        (tmp_path / f"{name}.json").unlink()
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_ids == (2,)
    with pytest.raises(ValueError, match="eos_token '</s>' of tokenizer_config.json is not in the "
                                         "vocabulary"):
        load(tmp_path, file, tokenizer_config={"eos_token": "</s>"})
    for name in (5, ["</s>"], {"content": 5}):
        with pytest.raises(ValueError, match="eos_token .* of tokenizer_config.json is not in the"):
            load(tmp_path, file, tokenizer_config={"eos_token": name})


@pytest.mark.parametrize("ids", [600, -1, [2, 600], "2", [None], True, 2.0])
@pytest.mark.parametrize("name", ["config", "generation_config"])
def test_an_eos_id_that_no_token_has_is_refused(tmp_path, name, ids):
    with pytest.raises(ValueError, match="tokenizer.json: eos_token_id .* is not the id") as error:
        load(tmp_path, file_of("llama3"), **{name: {"eos_token_id": ids}})
    assert "\n" not in str(error.value)


def changed(path, value):
    def change(file):
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in parents:
            file = file[key]
        file[last] = value
    return change


def swap_two_merges(file):
    merges = file["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


REFUSED = {
    "model type 'Unigram'": changed("model.type", "Unigram"),
    "model type 'WordPiece'": changed("model.type", "WordPiece"),
    "model.dropout = 0.1": changed("model.dropout", 0.1),
    "model.byte_fallback = True is not supported: only byte-level BPE is, not Sent": changed(
        "model.byte_fallback", True),
    "model.continuing_subword_prefix = '##'": changed("model.continuing_subword_prefix", "##"),
    "model.end_of_word_suffix = '</w>'": changed("model.end_of_word_suffix", "</w>"),
    "not supported with unk_token": changed("model.unk_token", "<|endoftext|>"),
    "normalizer {'type': 'NFKC'}": changed("normalizer", {"type": "NFKC"}),
    '"type": "Metaspace"': changed("pre_tokenizer", {"type": "Metaspace", "replacement": "▁"}),
    "pre_tokenizer {} is not supported": changed("pre_tokenizer", None),
    "without add_prefix_space": changed("pre_tokenizer.pretokenizers.1",
                                        byte_level(True) | {"add_prefix_space": True}),
    '"individual_digits": false': changed("pre_tokenizer.pretokenizers.0.individual_digits", False),
    '"Regex": "[a-z]+"': changed("pre_tokenizer.pretokenizers.0", split("[a-z]+")),
    "post_processor 'RobertaProcessing'": changed("post_processor", {"type": "RobertaProcessing"}),
    "merges are not in the order of their ids": swap_two_merges,
    "is not in the vocabulary": lambda file: file["model"]["merges"].append(["q", "q"]),
    "token '▁a' is not written in the byte-level alphabet": changed("model.vocab.▁a", 600),
    "the added token 'clips' is ordinary text": lambda file: file["added_tokens"].append(
        file["added_tokens"][0] | {"id": 600, "content": "clips", "special": False}),
    "not a tokenizer.json as `tokenizers` writes it": lambda file: file.pop("model"),
    "have the same id 100": changed("model.vocab.the", 100),
    "'<|im_start|>' and '<|im_end|>' have the same id 2": changed("added_tokens.1.id", 2),
    "has the id -1, which should be": changed("model.vocab.the", -1),
    "has the id None, which should be": changed("model.vocab.the", None),
    "has the id 1.0, which should be": changed("added_tokens.1.id", 1.0),
    "has the id True, which should be": changed("added_tokens.1.id", True),
    f"has the id {2**40}, which should be": changed("model.vocab.the", 2**40),
    "tokenizers` writes it (KeyError('id'))": lambda file: file["added_tokens"][1].pop("id"),
    "writes it (IndexError": changed("post_processor", begins_with("a", 1)
                                     | {"special_tokens": {"a": {"ids": []}}}),
    "<|im_start|> 600 is not the id of a token": changed("post_processor",
                                                         begins_with("<|im_start|>", 600)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_tiktoken_cannot_express_is_refused_by_name(tmp_path, message):
    file = copy.deepcopy(file_of("smollm2"))
    load(tmp_path, file)  # fine before the change
    REFUSED[message](file)
    with pytest.raises(ValueError) as caught:
        load(tmp_path, file)
    assert message in str(caught.value) and "tokenizer.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="has neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="nowhere cannot be read: No such file"):
        load_tokenizer(tmp_path / "nowhere")
    for content in (b"", b"{", b"\xff\xfe", b"[]", b"3"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer.json"):
            load_tokenizer(tmp_path)


def write_model(path, file):
    """The same merges in the form of Llama 3's tokenizer.model: lines of base64 and rank, control
    tokens left out."""
    control = {token["content"] for token in file["added_tokens"]}
    vocab = {token: i for token, i in file["model"]["vocab"].items() if token not in control}
    first = min(vocab.values())
    lines = [base64.b64encode(module._as_bytes(token)) + b" %d\n" % (i - first)
             for token, i in vocab.items()]
    path.write_bytes(b"".join(lines))
    return first


@pytest.mark.slow
def test_llama3_tokenizer_model(tmp_path):
    file = file_of("llama3")
    first = write_model(tmp_path / "tokenizer.model", file)
    tokenizer = load_tokenizer(tmp_path)
    n = len(file["model"]["vocab"]) - len(CONTROL)
    for text in [TEXT, *random_texts(500)]:
        assert [i + first for i in tokenizer.encode(text)] == reference(file).encode(text).ids
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (n, None, n + 256)
    assert tokenizer.decode([n, n + 1, n + 6, n + 7, n + 9, n + 255]) == (
        "<|begin_of_text|><|end_of_text|><|start_header_id|><|end_header_id|><|eot_id|>"
        "<|reserved_special_token_250|>")
    # a protobuf
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(ValueError, match="SentencePiece is not supported"):
        load_tokenizer(tmp_path)


def test_the_bundled_tokenizer(tmp_path):
    paths = sorted(Path(lfu_min.__file__).parent.glob("bundled/**/tokenizer.json"))
    assert paths
    for path in paths:
        file = json.loads(path.read_text(encoding="utf-8"))
        assert differences(load_tokenizer(path), file, [TEXT, *random_texts(2000)]) == []


def real(variable, *parts):
    if variable not in os.environ:
        pytest.skip(f"set {variable} to compare with real files")
    path = Path(os.environ[variable], *parts)
    if not path.exists():
        pytest.skip(f"{path.name} is not in the folder that {variable} names")
    return path


REAL = {"Llama 3.1": ("LFU_TOKENIZERS", "llama3_1"), "Qwen 3": ("LFU_TOKENIZERS", "qwen3"),
        "Qwen 2.5": ("LFU_TOKENIZERS", "qwen2_5"), "SmolLM2": ("LFU_SMOLLM2",),
        "Mistral Nemo": ("LFU_TOKENIZERS", "mistral_nemo")}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_on_real_and_random_text(name):
    folder, data = real(*REAL[name]), real("LFU_DATA")
    texts = random_texts(5000, seed=1)
    for file in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        for line in (data / file).read_text(encoding="utf-8").splitlines():
            texts += json.loads(line).values()
    for record in json.loads((data / "dolly_3k.json").read_text(encoding="utf-8")):
        texts += record.values()
    texts += (data / "wikipedia_30.txt").read_text(encoding="utf-8").split("\n")
    file = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert differences(load_tokenizer(folder), file, texts) == []


@pytest.mark.slow
def test_llama3_tokenizer_model_equals_the_real_json(tmp_path):
    folder = real("LFU_TOKENIZERS", "llama3_1")
    file = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert write_model(tmp_path / "tokenizer.model", file) == 0
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    assert differences(tokenizer, file, [TEXT, *random_texts(3000)]) == []
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (128000, 128256)
    for token in file["added_tokens"]:
        assert tokenizer.decode([token["id"]]) == token["content"]
