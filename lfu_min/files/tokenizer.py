"""Byte-level BPE tokenizers (Llama 3, SmolLM2, Qwen 2.5 / 3, Mistral Nemo) on tiktoken. train.py
and eval.py call `load_tokenizer`.

A Hugging Face tokenizer.json says how text is cut into pieces (normalizer, pre_tokenizer) and how
the bytes of a piece are merged into tokens (model.vocab, model.merges). tiktoken knows one regular
expression and one table {bytes: rank}, where any two neighbours merge if their bytes together are
in the table, lowest rank first. `load_tokenizer` translates the first into the second, checks that
the two agree on every text, and refuses by name whatever it cannot translate. Verified in
tests/test_tokenizer.py: the same ids as the library `tokenizers` on real and random Unicode text.
"""

import base64
import binascii
import functools
import json
import re
import unicodedata
from pathlib import Path

import tiktoken

from .jsons import read_bytes, read_json, read_text, short, shown

# How each family cuts text into pieces. SmolLM2 first isolates every digit, then applies GPT-2's
# expression to what is left; as one expression: a digit is its own piece, and blanks before a digit
# are not split (hence the lookahead).
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
          r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # Mistral Nemo

LONGEST = 1024  # bytes of a token: to check longer ones would take too long
CONTROL = re.compile(r"<.+>|\[.+\]")  # such added tokens belong in no text

# tiktoken's regex engine gives up (and panics) on very long runs of one kind of character, so text
# is fed to it in chunks of at most 100,000 characters. They end behind a letter or digit and before
# a blank or a punctuation mark, where every expression above ends a piece too: only a run longer
# than that is cut where `tokenizers` would not.
_BORDER = r"(?<=[^\W_])(?=[\s!-/:-@\[-`{-~\u3001\u3002\uff01\uff0c\uff1f])"
_CHUNK = re.compile(rf"(?s).{{1,100000}}\Z|.{{1,100000}}{_BORDER}|.{{1,100000}}")

# Characters that combine with others since Unicode 10 to 15. The tables of `tokenizers` end at
# Unicode 9, where these stand alone, Python's do not: text is normalised between them.
_NEW_MARKS = re.compile(
    "([\u07fd\u0898-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u0ece\u1715\u1abf-\u1ace"
    "\u1df6-\u1dfa\ua82c\U00010d24-\U00010d27\U00010eab\U00010eac\U00010efd-\U00010eff"
    "\U00010f46-\U00010f50\U00010f82-\U00010f85\U00011070\U0001133b\U0001145e\U00011839\U0001183a"
    "\U00011930\U0001193d\U0001193e\U00011943\U000119e0\U00011a34\U00011a47\U00011a99\U00011d42"
    "\U00011d44\U00011d45\U00011d97\U00011f41\U00011f42\U00016ff0\U00016ff1\U0001e08f"
    "\U0001e130-\U0001e136\U0001e2ae\U0001e2ec-\U0001e2ef])")


class Tokenizer:
    """What `load_tokenizer` returns: text to ids and back.

    bos_id      the id the file's post-processor puts in front of a text, or None; `encode` never
                adds it
    eos_id      the id that ends an answer in training (tokenizer_config.json's eos_token), or None
                if no file names one
    eos_ids     the ids that end a generation: tuple, from generation_config.json, else config.json,
                else (eos_id,)
    vocab_size  highest id + 1; the model's embedding must have at least so many rows
    control     {text: id} of the control tokens; data.py's chat templates are made of them
    system      what the files' own chat template says first where a conversation has no system
                message, or ""
    """

    def __init__(self, pattern, ranks, tokens, nfc=False, bos_id=None, eos_id=None, eos_ids=(),
                 control=(), system=""):
        self.bos_id, self.eos_id, self.eos_ids = bos_id, eos_id, tuple(eos_ids)
        self.control, self.system = dict(control), system
        self.vocab_size = max(tokens) + 1
        self._tokens = tokens  # {id: bytes}, with the control tokens
        self._nfc = nfc
        self._bpe = tiktoken.Encoding("lfu_min", pat_str=pattern, mergeable_ranks=ranks,
                                      special_tokens={})
        self._missing = bytes(b for b in range(256) if bytes([b]) not in ranks)
        self._cut = re.compile(_on_kinds(pattern), re.ASCII) if self._missing else None

    def encode(self, text):
        """str -> list of ids, without BOS or EOS; any str is accepted.

        Text never becomes a control token: "<|im_end|>", and also Qwen's "<think>", is encoded as
        the characters it consists of. A lone surrogate is read as U+FFFD; bytes the vocabulary
        lacks are left out, as `tokenizers` does.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if self._nfc:
            text = "".join(unicodedata.normalize("NFC", part) for part in _NEW_MARKS.split(text))
        return [token for chunk in _CHUNK.findall(text) for token in self._encode_chunk(chunk)]

    def _encode_chunk(self, chunk):
        data = chunk.encode()
        if len(data.translate(None, self._missing)) == len(data):
            return self._bpe.encode_ordinary(chunk)
        # tiktoken panics on a byte without a token. Cut into pieces here, then leave such bytes out
        # of each piece.
        spans = [m.span() for m in self._cut.finditer("".join(map(_kind, chunk)))]
        pieces = [chunk[start:end].encode().translate(None, self._missing) for start, end in spans]
        return [token for piece in pieces if piece
                for token in self._bpe._encode_single_piece(piece)]

    def decode(self, ids):
        """ids (ints, or a 1-d tensor) -> str. Control tokens are spelled out, bytes that are not
        UTF-8 become U+FFFD.

        An id without a token (embeddings are often padded beyond the vocabulary) gives nothing.
        Raises ValueError on a negative id: that is a label mask (-100), not a token.
        """
        ids = [int(i) for i in ids]
        if min(ids, default=0) < 0:
            raise ValueError(f"id {min(ids)} is negative: remove masked positions (-100) before "
                             "decoding")
        return b"".join(self._tokens.get(i, b"") for i in ids).decode("utf-8", "replace")


def load_tokenizer(path):
    """Read a tokenizer: a folder with tokenizer.json (or Llama 3's tokenizer.model), or one of
    these files itself.

    tokenizer_config.json, generation_config.json and config.json beside it are read for the EOS ids
    if they exist. Raises ValueError, naming the file and the feature, on anything that tiktoken
    would not encode identically, but for control tokens in a text (see encode).
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model")
                 if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path}: has neither tokenizer.json nor tokenizer.model")
        path = found[0]
    content = read_json(path) if path.suffix == ".json" else read_bytes(path)
    beside = [read_json(file) if (file := path.parent / f"{name}.json").is_file() else {}
              for name in ("tokenizer_config", "generation_config", "config")]
    try:
        parts = _from_json(content) if path.suffix == ".json" else _from_model(content)
        return Tokenizer(**parts, **_eos(*beside, parts["tokens"]),
                         system=_system(path.parent, beside[0]))
    except UnicodeError:  # a ValueError too, but it names nothing
        raise ValueError(f"{path}: a token holds half a character (a lone surrogate)") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a tokenizer.json as `tokenizers` writes it "
                         f"({short(error, 200)})") from None


def check_fit(tokenizer, config, where):
    """Raise ValueError where the model's embedding lacks rows for the tokenizer's ids."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{where}: the tokenizer has {tokenizer.vocab_size} ids, the embedding "
                         f"{config.vocab_size} rows")


def _from_json(file):
    """tokenizer.json as a dict -> arguments of Tokenizer."""
    model = file["model"]
    if model.get("type", "BPE") != "BPE":  # very old files do not name the type
        raise ValueError(f"model type {short(model['type'])} is not supported, only byte-level "
                         "'BPE'")
    for key in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"model.{key} = {short(model[key])} is not supported: only "
                             "byte-level BPE is, not SentencePiece as in Llama 2 and Mistral 7B")
    if file.get("normalizer") not in (None, {"type": "NFC"}):
        raise ValueError(f"normalizer {short(file['normalizer'])} is not supported, only none or "
                         "NFC")
    pattern = _pattern(file.get("pre_tokenizer"))
    added = {token["content"]: token["id"] for token in file.get("added_tokens") or []}
    plain = {text: i for text, i in model["vocab"].items() if text not in added}
    if not all(isinstance(text, str) for text in added):
        raise TypeError("the content of an added token is no string")
    words = [token["content"] for token in file.get("added_tokens") or []
             if token.get("special") is False and not CONTROL.fullmatch(token["content"])]
    if words:  # `tokenizers` finds them in any text
        raise ValueError(f"the added token {short(words[0])} is ordinary text: only control "
                         "tokens, like <|im_end|> and <think>, are supported there")
    _check_ids(plain | added)
    vocab = {_as_bytes(text): i for text, i in plain.items()}
    as_bytes = functools.cache(_as_bytes)  # the same few tokens make up all merges
    merges = [tuple(map(as_bytes, pair.split(" ") if isinstance(pair, str) else pair))
              for pair in model["merges"]]
    ranks = _exact_ranks(vocab, merges, model.get("ignore_merges", False))
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing and (model.get("unk_token") is not None or model.get("ignore_merges")
                    or pattern == TEKKEN):
        raise ValueError(f"byte {missing[0]:#04x} has no token: not supported with unk_token, "
                         "ignore_merges or Mistral's pre_tokenizer")
    tokens = {i: token for token, i in vocab.items()}
    tokens |= {i: text.encode() for text, i in added.items()}
    return dict(pattern=pattern, ranks=ranks, tokens=tokens, nfc=bool(file.get("normalizer")),
                bos_id=_bos(file.get("post_processor"), tokens), control=added)


def _check_ids(ids):
    """Raise ValueError unless {text: id} holds whole numbers from 0, each once."""
    owner = {}
    for text, i in ids.items():
        if type(i) is not int or not 0 <= i < 2**31:
            raise ValueError(f"token {short(text)} has the id {short(i)}, which should be a whole "
                             "number from 0")
        if owner.setdefault(i, text) != text:
            raise ValueError(f"the tokens {short(owner[i])} and {short(text)} have the same id {i}")


def _from_model(data):
    """Llama 3's tokenizer.model, lines of "base64-bytes rank" -> arguments of Tokenizer.

    The 256 control tokens are not in the file; they are those of Meta's llama3 repository
    (llama/tokenizer.py), where later releases only gave reserved ones a name. Meta's encoder puts
    <|begin_of_text|> in front.
    """
    try:
        lines = map(bytes.split, data.splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error):
        ranks = {}
    if not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError("not Llama 3's tokenizer.model (lines of base64 and a rank); "
                         "SentencePiece is not supported")
    _check_ids(ranks)
    reserved = [f"reserved_special_token_{i}" for i in range(251)]
    control = ["begin_of_text", "end_of_text", *reserved[:4], "start_header_id", "end_header_id",
               reserved[4], "eot_id", *reserved[5:]]
    first = max(ranks.values()) + 1  # 128000
    control = {f"<|{name}|>": first + i for i, name in enumerate(control)}
    tokens = {rank: token for token, rank in ranks.items()}
    tokens |= {i: text.encode() for text, i in control.items()}
    return dict(pattern=LLAMA3, ranks=ranks, tokens=tokens, bos_id=first, control=control)


def _pattern(pre_tokenizer):
    """The pre_tokenizer of tokenizer.json -> the one regular expression that cuts text at the same
    places."""
    pre_tokenizer = pre_tokenizer or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    match [{"use_regex": True, **step} for step in steps]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return SMOLLM
        case [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated",
               "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False,
               "use_regex": False}] if regex in (GPT2, LLAMA3, QWEN, TEKKEN):
            return regex
    raise ValueError(f"pre_tokenizer {shown(json.dumps(pre_tokenizer), 300)} is not supported: "
                     "known are those of Llama 3, SmolLM2, Qwen 2.5 / 3, Mistral Nemo and GPT-2, "
                     "without add_prefix_space")


def _exact_ranks(vocab, merges, ignore_merges):
    """vocab {bytes: id} and the file's merges, pairs of bytes in order -> tiktoken's table
    {bytes: id}.

    `tokenizers` merges the listed pairs, first listed first; tiktoken merges whatever gives a token
    of its table, lowest id first, and takes a piece that is in the table as it is (`tokenizers`:
    only with ignore_merges). They agree if merges are listed in the order of ids and each token of
    the table arises, by tiktoken's rule, from a listed pair.
    """
    long = next((token for token in vocab if len(token) > LONGEST), None)
    if long:
        raise ValueError(f"token {short(long)} has {len(long)} bytes; at most {LONGEST} are "
                         "supported")
    listed = {}  # token -> the pairs listed for it
    last = b""
    for left, right in merges:
        token = left + right
        if not (left in vocab and right in vocab and token in vocab):
            raise ValueError(f"merge {short(left)} + {short(right)} or what it makes is not "
                             "in the vocabulary")
        if last and vocab[token] < vocab[last]:
            raise ValueError(_disorder(vocab, token, "follows", last))
        listed.setdefault(token, []).append((left, right))
        last = token
    ranks = dict(vocab)
    made_of = {}  # token -> the pair it arises from, if any does
    for token in sorted((token for token in vocab if len(token) > 1), key=vocab.get):
        pairs = listed.get(token, [])
        for left, right in pairs:
            arise = (len(left) == 1 or left in made_of) and (len(right) == 1 or right in made_of)
            if arise and _adjacent(left, right, ranks, made_of, ranks[token]):
                made_of[token] = left, right
                break
        else:  # no merge ever makes this token:
            if not ignore_merges:
                late = [side for pair in pairs for side in pair if len(side) > 1
                        and vocab[side] > vocab[token]]
                if late:
                    raise ValueError(_disorder(vocab, token, "is made from", late[0]))
                del ranks[token]  # it is never used
                continue
            # it is used as a whole piece
            for left, right in ((token[:i], token[i:]) for i in range(1, len(token))):
                if left in ranks and right in ranks and (left, right) not in pairs:
                    raise ValueError(f"tiktoken would merge {short(left)} + {short(right)}, "
                                     "which is not among the merges")
    return ranks


def _disorder(vocab, token, verb, other):
    return (f"merges are not in the order of their ids: {short(token)} (id {vocab[token]}) {verb} "
            f"{short(other)} (id {vocab[other]}); tiktoken cannot express that")


def _adjacent(left, right, ranks, made_of, limit):
    """Whether BPE on left + right comes to these two tokens, i.e. no earlier merge reaches across
    their border.

    Undoes, step by step, the later of the merges that made the two sides, looking each time at what
    touches the border.
    """
    while ranks.get(left + right, limit) >= limit:
        if left in made_of and (right not in made_of or ranks[left] > ranks[right]):
            limit, left = ranks[left], made_of[left][1]
        elif right in made_of:
            # + 1: of two equal merges the left one comes first
            limit, right = ranks[right] + 1, made_of[right][0]
        else:
            return True
    return False


def _bos(post_processor, tokens):
    """The id that the post_processor puts in front of a text, or None."""
    post_processor = post_processor or {}
    for step in post_processor.get("processors", [post_processor]):
        match step.get("type"):
            case None | "ByteLevel":  # ByteLevel concerns offsets, not ids
                pass
            case "TemplateProcessing":
                names = [item["SpecialToken"]["id"] if "SpecialToken" in item else None
                         for item in step["single"]]
                front = names[:names.index(None)]
                if len(front) > 1:
                    raise ValueError(f"post_processor puts {short(front)} in front of a "
                                     "text; at most one token is supported")
                if front:
                    ids = step["special_tokens"][front[0]]["ids"]
                    return _known(ids[0], front[0], tokens)
            case other:
                raise ValueError(f"post_processor {short(other)} is not supported")
    return None


def _eos(tokenizer_config, generation_config, config, tokens):
    """eos_id and eos_ids as the JSON files beside tokenizer.json name them."""
    stop = generation_config.get("eos_token_id", config.get("eos_token_id"))
    stop = [] if stop is None else stop if isinstance(stop, list) else [stop]
    stop = [_known(i, "eos_token_id", tokens) for i in stop]
    name = tokenizer_config.get("eos_token")
    name = name.get("content") if isinstance(name, dict) else name
    if name is None:
        return dict(eos_id=stop[0] if stop else None, eos_ids=stop)
    ids = [i for i, token in tokens.items() if isinstance(name, str) and token == name.encode()]
    if not ids:
        raise ValueError(f"eos_token {short(name)} of tokenizer_config.json is not in the "
                         "vocabulary")
    # [-1]: an added token before a plain one
    return dict(eos_id=ids[-1], eos_ids=stop or [ids[-1]])


def _system(folder, tokenizer_config):
    """The system message that the chat template in a model's files has where a conversation brings
    none (SmolLM2, Qwen 2.5), or "": the template is searched for one, not run."""
    template, file = tokenizer_config.get("chat_template"), folder / "chat_template.jinja"
    template = read_text(file) if file.is_file() else template
    found = isinstance(template, str) and re.search(
        r"<\|im_start\|>system(?:\\n|\n)([^'\"{}\\]{0,2000})<\|im_end\|>", template)
    return found[1] if found else ""


def _known(i, name, tokens):
    if type(i) is not int or i not in tokens:
        raise ValueError(f"{name} {short(i)} is not the id of a token")
    return i


@functools.cache
def _byte_alphabet():
    """{character: byte}: how ByteLevel writes bytes, GPT-2's bytes_to_unicode the other way
    round."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _as_bytes(text):
    try:
        return bytes(map(_byte_alphabet().__getitem__, text))
    except KeyError as error:
        raise ValueError(f"token {short(text)} is not written in the byte-level alphabet "
                         f"({error} is not in it)") from None


def _on_kinds(pattern):
    """A pattern above for Python's re (which lacks \\p), to be applied to the text with `_kind` of
    each character."""
    for old, new in ((r"\p{L}\p{N}]", "A-Za-z0-9]"), (r"\p{N}]", "0-9]"), (r"\p{L}", "[A-Za-z]"),
                     (r"\p{N}", "[0-9]")):
        pattern = pattern.replace(old, new)
    return pattern


@functools.cache
def _kind(character):
    """An ASCII character of the same kind (letter, number, blank, other); ASCII itself stays."""
    if character.isascii():
        return character
    return next((stand_in for stand_in, of_kind in _kinds().items()
                 if of_kind.encode_ordinary(character)), "!")


@functools.cache
def _kinds():
    """Encodings that find only letters, only numbers, only blanks: tiktoken is asked because
    Python's Unicode tables are of another version."""
    every_byte = {bytes([b]): b for b in range(256)}
    return {stand_in: tiktoken.Encoding(name, pat_str=name, mergeable_ranks=every_byte,
                                        special_tokens={})
            for stand_in, name in (("a", r"\p{L}"), ("0", r"\p{N}"), ("\t", r"\s"))}
