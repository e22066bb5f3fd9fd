"""Conversations -> ids: the chat templates that instruct models were taught. A template is pieces,
and no text between its control tokens becomes one, but for the marks of an assistant's thought at
the beginning of a message. data.py calls it.

A conversation is a list of {"role": ..., "content": ...}, or one question as a str. Verified in
tests/test_chat.py: the ids of transformers' apply_chat_template, of real and made-up tokenizers.
"""
from typing import NamedTuple

ROLES = ("system", "user", "assistant")


class Chat(NamedTuple):
    """A template. What begins with "<" is a control token, all else text, encoded in one go."""
    front: tuple  # in front of all
    turn: tuple  # of every message that is over
    between: tuple  # behind each of these
    reply: tuple  # of the answer; a prompt ends within it, where the content begins
    trim: object = str  # what is done to a content; str leaves it alone
    thoughtful: tuple = ()  # of an answer that begins with a thought, where the tokenizer has one


_TURN = ("<|im_start|>", "{role}\n{content}", "<|im_end|>")
_THOUGHT = ("<|im_start|>", "{role}\n", "<think>", "\n{thought}\n", "</think>", "\n\n{content}",
            "<|im_end|>")
_HEADER = ("<|start_header_id|>", "{role}", "<|end_header_id|>", "\n\n{content}", "<|eot_id|>")
CHAT = {
    "chatml": Chat((), _TURN, ("\n",), _TURN, thoughtful=_THOUGHT),  # SmolLM2-Instruct, Qwen
    "qwen3": Chat((), _TURN, ("\n",), _THOUGHT, thoughtful=_THOUGHT),  # the thought may be empty
    "llama3": Chat(("<|begin_of_text|>",), _HEADER, (), _HEADER, str.strip),
}


def chat_ids(tokenizer, messages, template, answer=None):
    """The ids of a conversation up to where the assistant speaks next; with an answer (str), up to
    its end. Raises ValueError where the tokenizer lacks a control token of the template.

    Where the tokenizer has <think> and </think>, as Qwen 3's, an answer that begins with a thought
    (split_thought) gets these tokens, and thoughts in earlier messages are left out, as in its own
    template.
    """
    if isinstance(messages, str):
        messages = [dict(role="user", content=messages)]
    if tokenizer.system and messages[0]["role"] != "system":  # as the model's own template does
        messages = [dict(role="system", content=tokenizer.system), *messages]
    chat = CHAT[template]
    thinks = chat.thoughtful and {"<think>", "</think>"} <= tokenizer.control.keys()
    ids = _ids(tokenizer, template, chat.front)
    for message in messages:
        if thinks and message["role"] == "assistant":
            message = message | {"content": split_thought(message["content"])[1]}
        ids += _ids(tokenizer, template, chat.turn + chat.between, **message)
    if answer is None:
        return ids + _ids(tokenizer, template, chat.reply[:-1])
    thought, content = split_thought(answer) if thinks else (None, answer)
    reply = chat.reply if thought is None else chat.thoughtful
    if reply is chat.thoughtful:
        content = content.lstrip("\n")
    return ids + _ids(tokenizer, template, reply, content=content, thought=thought or "")


def split_thought(content):
    """(thought, what follows) of a text that begins with "<think> ... </think>", without the line
    breaks around both; (None, the text) of any other. <think> itself may be missing: to a model
    that thinks the prompt has said it."""
    thought, end, rest = content.partition("</think>")
    if thought.lstrip().startswith("<think>"):
        thought = thought.lstrip().removeprefix("<think>")
    if not end or "<think>" in thought:
        return None, content
    return thought.strip("\n"), rest.lstrip("\n")


def _ids(tokenizer, template, pieces, role="assistant", content="", thought=""):
    ids, content = [], CHAT[template].trim(content)
    for piece in pieces:
        if not piece.startswith("<"):
            ids += tokenizer.encode(piece.format(role=role, content=content, thought=thought))
        elif piece in tokenizer.control:
            ids.append(tokenizer.control[piece])
        else:
            raise ValueError(f"template {template!r} needs the token {piece!r}, which this "
                             "tokenizer lacks: choose another template")
    return ids


def end_ids(tokenizer, template):
    """The ids that end a turn: none in a template that is no chat."""
    return (tokenizer.control[CHAT[template].reply[-1]],) if template in CHAT else ()


def split_messages(messages, where):
    """What `messages` of a record holds -> (prompt, answer): all but the last message, as a str if
    that is one question, and the last one's content. Raises ValueError beginning with `where`."""
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"{where}: messages should be a list of at least two, question and answer")
    for i, message in enumerate(messages, 1):
        role, content = (message.get(name) if isinstance(message, dict) else None
                         for name in ("role", "content"))
        if role not in ROLES or not isinstance(content, str) or not content.strip():
            raise ValueError(f"{where}: message {i} should have a role ({', '.join(ROLES)}) and a "
                             "content, text that is not empty")
        if role == "system" and i > 1:
            raise ValueError(f"{where}: message {i} is the system's, which should be the first")
    *before, answer = ({name: message[name] for name in ("role", "content")}
                       for message in messages)
    if answer["role"] != "assistant" or before[-1]["role"] != "user":
        raise ValueError(f"{where}: the last two messages should be the user's and the "
                         "assistant's, which is what is learned")
    return before[0]["content"] if len(before) == 1 else before, answer["content"]
