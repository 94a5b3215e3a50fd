"""Chat templates, and the split of a rendered conversation into supervised and masked pieces.

A template is a Jinja string, as in every Hugging Face checkpoint: it is saved as `chat_template.jinja`
and is the only thing that says how a prompt looks. To know *exactly* which characters are an answer,
contents are not rendered at all: each is replaced by a slot (two private-use characters around its
number), the template is rendered around the slots, and the text is split at them. So no answer is ever
searched for in a string, and none is tokenised twice.

The named templates follow LLaVA's `conversation.py` (strings) and `train.py` (what is supervised).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mllm.data.schema import Message, assistant, message_text
from mllm.errors import ConfigError, DataError

IMAGE = "<image>"
SLOT = re.compile("\ue000(\\d+)\ue001")
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

# One user message: an image is its marker, a text is its text, in the order given.
_CONTENT = (
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
)
_ANSWER = "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'][0]['text'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = default_system %}{% set turns = messages %}{% endif %}"
)


def _with_default_system(text: str) -> str:
    return "{% set default_system = " + repr(text) + " %}" + _SYSTEM


# LLaVA-1.5 stage 1: the image, the caption, a newline. The instruction is not rendered.
PLAIN = (
    "BOS{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}" + _ANSWER + "{{ '\\n' }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% endif %}{% endfor %}"
)

VICUNA_V1 = (
    _with_default_system(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    + "BOS{{ system }}{{ ' ' }}{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ 'USER: ' }}" + _CONTENT + "{{ ' ' }}{% else %}"
    "{{ 'ASSISTANT: ' }}{% generation %}" + _ANSWER + "END{% endgeneration %}"
    "{% endif %}{% endfor %}"
)

# A round is `[INST] question [/INST] answer END`; LLaVA puts the system text inside the first one and
# supervises the space in front of the end token.
_INST = (
    "{% for message in turns %}{% if message['role'] == 'user' %}ROUND_BOS{{ '[INST] ' }}"
    "{% if loop.first and system %}{{ '<<SYS>>\\n' }}{{ system }}{{ '\\n<</SYS>>\\n\\n' }}{% endif %}"
    + _CONTENT
    + "{{ ' [/INST] ' }}{% else %}"
    "{% generation %}" + _ANSWER + "{{ ' ' }}END{% endgeneration %}{% endif %}{% endfor %}"
)
LLAVA_LLAMA_2 = _with_default_system(
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
) + _INST.replace("ROUND_BOS", "BOS")
MISTRAL_INSTRUCT = _with_default_system("") + "BOS" + _INST.replace("ROUND_BOS", "")

# LLaVA's chatml_direct: no newline after <|im_end|>.
CHATML = (
    _with_default_system("Answer the questions.")
    + "{{ '<|im_start|>system\\n' }}{{ system }}END{% for message in turns %}"
    "{% if message['role'] == 'user' %}{{ '<|im_start|>user\\n' }}" + _CONTENT + "END{% else %}"
    "{{ '<|im_start|>assistant\\n' }}{% generation %}" + _ANSWER + "END{% endgeneration %}"
    "{% endif %}{% endfor %}"
)

# The image in front of everything, then the text: no roles (BLIP-2, InstructBLIP, PaLI-3; also the prefix of
# Frozen and ClipCap). `caption` leaves the instruction out, as `plain` does, but ends where the caption ends.
_IMAGES = "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
_TEXTS = "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"


def _bare(question: str) -> str:
    return (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        + _IMAGES
        + "{% if loop.first %}BOS{% endif %}"
        + question
        + "{% elif message['role'] == 'assistant' %}"
        "{% generation %}" + _ANSWER + "END{% endgeneration %}{% endif %}{% endfor %}"
    )


CAPTION = _bare("")
BARE = _bare(_TEXTS + "{{ ' ' }}")
QUESTION_ANSWER = _bare("{{ 'Question: ' }}" + _TEXTS + "{{ ' Answer: ' }}")

# LLaVA v1 and MiniGPT-4 end a message with `###`, which tokenizers cut in different ways: here an answer ends
# with the end-of-sequence token.
VICUNA_V0 = (
    _with_default_system(
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    )
    + "BOS{{ system }}{{ '\\n\\n' }}{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ '### Human: ' }}" + _CONTENT + "{{ '\\n' }}{% else %}"
    "{{ '### Assistant: ' }}{% generation %}" + _ANSWER + "END{% endgeneration %}{% endif %}{% endfor %}"
)
_MINIGPT_CONTENT = _CONTENT.replace("<image>", "{{ '<Img>' }}<image>{{ '</Img> ' }}")
MINIGPT4 = (
    _with_default_system("") + "BOS{{ system }}{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ '###Human: ' }}" + _MINIGPT_CONTENT + "{{ ' ' }}{% else %}"
    "{{ '###Assistant: ' }}{% generation %}" + _ANSWER + "END{% endgeneration %}{% endif %}{% endfor %}"
)


def _instruction(content: str, before: str = "") -> str:
    return (
        "BOS{% for message in messages %}{% if message['role'] == 'user' %}"
        + before
        + "{{ '[INST] ' }}"
        + content
        + "{{ ' [/INST] ' }}{% elif message['role'] == 'assistant' %}{% generation %}"
        + _ANSWER
        + "END{% endgeneration %}{% endif %}{% endfor %}"
    )


MINIGPT_V2 = _instruction(_MINIGPT_CONTENT)
COGVLM = _instruction(_TEXTS, _IMAGES + "{{ ' ' }}")

TEMPLATES = {
    "plain": PLAIN,
    "caption": CAPTION,
    "bare": BARE,
    "question_answer": QUESTION_ANSWER,
    "vicuna_v0": VICUNA_V0,
    "minigpt4": MINIGPT4,
    "minigpt_v2": MINIGPT_V2,
    "cogvlm": COGVLM,
    "vicuna_v1": VICUNA_V1,
    "llava_llama_2": LLAVA_LLAMA_2,
    "mistral_instruct": MISTRAL_INSTRUCT,
    "chatml": CHATML,
}


class Piece(NamedTuple):
    """A run of rendered text.

    Attributes:
        text: the characters.
        source: `template` (markers are parsed as special tokens), `user` (never parsed: a user who
            types `</s>` or `<image>` must not end the turn or add an image) or `answer`.
        supervised: whether its tokens are labels.
    """

    text: str
    source: Literal["template", "user", "answer"]
    supervised: bool


def chat_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja template called `name`, fitted to the special tokens that `tokenizer` has.

    `tokenizer` as a name takes the tokenizer's own template. The end of a turn is always one token:
    `<|im_end|>` for chatml where the vocabulary has it, the tokenizer's end-of-sequence token otherwise.
    The beginning-of-sequence token is written where the tokenizer itself would write it.

    Raises:
        ConfigError: unknown name, or a tokenizer that has no template or no end token.
    """
    if name not in (*TEMPLATES, "tokenizer"):
        raise ConfigError(f"unknown template {name!r}; use {', '.join(TEMPLATES)} or 'tokenizer'")
    end = tokenizer.eos_token
    if end is None:
        raise ConfigError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
    if name == "tokenizer":
        if not tokenizer.chat_template:
            raise ConfigError(f"template 'tokenizer': this tokenizer has none; use {', '.join(TEMPLATES)}")
        return str(tokenizer.chat_template)
    # Only an added token is one token wherever it stands.
    if name == "chatml" and "<|im_end|>" in tokenizer.get_added_vocab():
        end = "<|im_end|>"
    tokens = {"BOS": tokenizer.bos_token if adds_bos(tokenizer) else "", "END": end}
    # In one pass: a token may be spelt with the other's placeholder (`<|ENDOFTEXT|>`).
    return re.sub("BOS|END", lambda found: _literal(tokens[found.group()]), TEMPLATES[name])


def _literal(text: str) -> str:
    return "{{ " + repr(text) + " }}" if text else ""


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its beginning-of-sequence token in front of a text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def adds_prefix_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text tokenised alone gets a space in front of it (SentencePiece, some byte-level BPE)."""
    return tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0][:1] in (
        "\u2581",
        "\u0120",
    )


def render(
    messages: Sequence[Message],
    template: str,
    special_tokens: Mapping[str, str],
    ends: Sequence[str] = (),
    *,
    parts: bool = True,
    open_answer: bool = False,
) -> list[Piece]:
    """Render a conversation and split it into pieces, each masked or supervised.

    Args:
        messages: canonical messages (see `schema.py`).
        template: a Jinja template; `{% generation %}` marks what is supervised. Without that mark, the
            answer and the text up to the end of the first special token after it are supervised.
        special_tokens: names to strings for the template (`tokenizer.special_tokens_map`).
        ends: tokens that may end an answer where the template does not mark it.
        parts: give the template lists of content parts (templates of processors) or one string a
            message (templates of text-only tokenizers).
        open_answer: the last message is the user's; end the text where the answer begins.

    Raises:
        DataError: the template drops or repeats a content, or refuses the conversation.
    """
    turns = [*messages, assistant("")] if open_answer else messages
    shape = tuple((m["role"], _kinds(m)) for m in turns)
    outline = _outline(shape, template, tuple(special_tokens.items()), tuple(ends), parts)
    contents = [text for message in turns for text in _texts(message)]
    if outline.lost is not None:
        raise DataError(
            f"the chat template has no place for this {outline.roles[outline.lost]} text: "
            f"{contents[outline.lost][:60]!r}; use another template"
        )
    pieces = [
        piece if slot is None else Piece(contents[slot], piece.source, piece.supervised)
        for slot, piece in outline.pieces
    ]
    if open_answer:
        last = max(i for i, piece in enumerate(pieces) if piece.source == "answer")
        pieces = pieces[:last]
    return pieces


def _kinds(message: Message) -> tuple[str, ...]:
    """What the parts of a message are for a template: only a user's are more than one text."""
    return tuple(part["type"] for part in message["content"]) if message["role"] == "user" else ("text",)


def _texts(message: Message) -> list[str]:
    """What stands in the slots of a message."""
    if message["role"] != "user":
        return [message_text(message)]
    return [part["text"] for part in message["content"] if part["type"] == "text"]


class _Outline(NamedTuple):
    """A rendered conversation without its contents.

    Attributes:
        pieces: (slot, piece) in order; the slot is None where the piece is the template's own text.
        roles: of each slot.
        lost: the first slot that the template leaves out and must not.
    """

    pieces: tuple[tuple[int | None, Piece], ...]
    roles: tuple[str, ...]
    lost: int | None


# Contents are not rendered: a template runs once for all conversations of one shape. (One that writes the
# date keeps to that of the first.)
@lru_cache(maxsize=1024)
def _outline(
    shape: tuple[tuple[str, tuple[str, ...]], ...],
    template: str,
    special_tokens: tuple[tuple[str, str], ...],
    ends: tuple[str, ...],
    parts: bool,
) -> _Outline:
    """Render (role, kinds of parts) of each message; other arguments and errors as of `render`."""
    roles = tuple(role for role, kinds in shape for kind in kinds if kind == "text")
    slots = (f"\ue000{slot}\ue001" for slot in range(len(roles)))
    chat = [{"role": role, "content": _slotted(kinds, slots, parts)} for role, kinds in shape]
    marked = MARK.search(template) is not None
    options: dict[str, Any] = dict(special_tokens)
    try:
        rendered: Any = render_jinja_template(  # annotated as a string; it is a pair
            conversations=[chat],
            chat_template=template,
            return_assistant_tokens_mask=marked,
            **options,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from error
    texts, spans = rendered
    found = [int(match.group(1)) for match in SLOT.finditer(texts[0])]
    lost = _lost(found, roles)
    pieces = () if lost is not None else _split(texts[0], spans[0] if marked else None, roles, ends)
    return _Outline(tuple(pieces), roles, lost)


def _slotted(kinds: Sequence[str], slots: Iterator[str], parts: bool) -> Any:
    content = [{"type": "image"} if k == "image" else {"type": "text", "text": next(slots)} for k in kinds]
    return content if parts else "".join(part.get("text", IMAGE) for part in content)


def _split(
    text: str,
    spans: list[tuple[int, int]] | None,
    roles: Sequence[str],
    ends: Sequence[str],
) -> Iterator[tuple[int | None, Piece]]:
    """Cut rendered text at its slots and at the borders of what is supervised."""
    found = list(SLOT.finditer(text))
    answers = [match for match in found if roles[int(match.group(1))] == "assistant"]
    if spans is None:
        spans = [(match.start(), _end_of_turn(text, match.end(), ends)) for match in answers]
    # A prompt ends where the answer begins, so nothing in front of it (a role name) is for the model to say.
    starts = [[match.start() for match in answers if a <= match.start() < b] for a, b in spans]
    spans = [(inside[0], b) for inside, (_, b) in zip(starts, spans, strict=True) if inside]
    cuts = {0, len(text), *(c for match in found for c in match.span()), *(c for s in spans for c in s)}
    for start, stop in pairwise(sorted(cuts)):
        match = SLOT.fullmatch(text, start, stop)
        slot = int(match.group(1)) if match else None
        source: Literal["template", "user", "answer"] = "template"
        if slot is not None:
            source = "answer" if roles[slot] == "assistant" else "user"
        piece = Piece(text[start:stop], source, any(a <= start and stop <= b for a, b in spans))
        if piece.supervised and (source == "user" or (source == "template" and IMAGE in piece.text)):
            raise DataError("the chat template marks a user's message as supervised; use another template")
        yield slot, piece


def _lost(order: list[int], roles: Sequence[str]) -> int | None:
    """The first slot that must be among those that were rendered, and is not."""
    if order != sorted(set(order)):
        raise DataError("the chat template repeats or reorders messages; use another template")
    missing = set(range(len(roles))) - set(order)
    users = {slot for slot, role in enumerate(roles) if role == "user"}
    # `plain` renders no instruction at all; dropping only some of them would be a silent loss.
    lost = missing - users or (missing if missing != users else set())
    return min(lost, default=None)


def _end_of_turn(text: str, start: int, ends: Sequence[str]) -> int:
    following = SLOT.search(text, start)
    limit = following.start() if following else len(text)
    found = [(text.find(token, start, limit), -len(token)) for token in ends if token]
    found = [place for place in found if place[0] >= 0]
    if not found:
        raise DataError(
            "the tokenizer's own chat template ends an answer with no special token; "
            "mark what is supervised in it with {% generation %}, or use a named template "
            "(model.template, --template)"
        )
    first, length = min(found)
    return first - length
