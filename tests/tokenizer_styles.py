"""Tokenizers of every style that language models come with, trained here on a few sentences.

All are real classes of transformers, built as their checkpoints build them; none is a stand-in.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from conftest import make_image_processor
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from mllm.model import MllmProcessor

SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: hello world ASSISTANT: the quick brown fox jumps over the lazy dog.",
    "Is there a cat in the image? Yes, there are two cats and a dog, 10 in all.",
    "[INST] what is this [/INST] system user assistant < > / | im_start im_end image",
]
NUM_IMAGE_TOKENS = 3


@cache
def _sentencepiece_model(byte_fallback: bool = True) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 10),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        hard_vocab_limit=False,
        byte_fallback=byte_fallback,
        character_coverage=1.0,
        # As Llama's: nothing in a text is changed.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _llama(**settings: Any) -> Any:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.model").write_bytes(_sentencepiece_model())
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **settings}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return AutoTokenizer.from_pretrained(folder)


def sp_legacy() -> Any:
    """Llama, Vicuna: SentencePiece, a space in front of every run of text, BOS, byte fallback."""
    return _llama(legacy=True, unk_token="<unk>", pad_token="<unk>")


def sp_new() -> Any:
    """Llama, `legacy=False`: a space only in front of the whole text."""
    return _llama(legacy=False, unk_token="<unk>", pad_token="<unk>")


def sp_bare() -> Any:
    """Yi: SentencePiece without a space in front; no BOS; pad is the end token."""
    return _llama(legacy=False, add_prefix_space=False, add_bos_token=False)


def sp_python() -> Any:
    """SentencePiece's own library behind the Python backend; its decoding strips spaces."""
    with tempfile.NamedTemporaryFile(suffix=".model", delete=False) as file:
        file.write(_sentencepiece_model())
    return SentencePieceBackend(
        vocab_file=file.name, bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=True
    )


def _byte_bpe(specials: list[str], add_prefix_space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer


def bpe() -> Any:
    """GPT-2: byte-level BPE, one special token for beginning, end and padding; decoding tidies spaces."""
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_bpe([end]),
        bos_token=end,
        eos_token=end,
        unk_token=end,
        clean_up_tokenization_spaces=True,
    )


def bpe_bos() -> Any:
    """Llama 3: byte-level BPE, BOS by a post-processor, ChatML tokens that are not the end token."""
    bos, end = "<|begin_of_text|>", "<|end_of_text|>"
    tokenizer = _byte_bpe([bos, end, "<|im_start|>", "<|im_end|>"])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=end,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def bpe_strip() -> Any:
    """Phi: special tokens that eat the space around them, and added tokens that are not special."""
    strip = {"special": True, "normalized": False, "lstrip": True, "rstrip": True}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_bpe(["<pad>"]), pad_token="<pad>")
    tokenizer.add_special_tokens({"eos_token": AddedToken("<|end|>", **strip)})
    tokenizer.add_tokens([AddedToken("<|im_start|>", **strip), AddedToken("<|im_end|>", **strip)], True)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return tokenizer


def bpe_prefix() -> Any:
    """OPT and RoBERTa as some ship them: byte-level BPE with a space in front; decoding keeps it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_bpe(["<s>", "</s>", "<pad>"], add_prefix_space=True),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def wordpiece() -> Any:
    """BERT, cased: words and pieces, unknown words, spaces lost."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return BertTokenizerFast(vocab=tokenizer.get_vocab(), do_lower_case=False, eos_token="[SEP]")


@dataclass(frozen=True)
class Style:
    """A tokenizer and what its decoding does to a text.

    Attributes:
        build: makes a fresh tokenizer.
        lossless: decoding what was encoded gives the text back.
        prefix: what decoding puts in front of a text.
    """

    build: Callable[[], Any]
    lossless: bool = True
    prefix: str = ""


STYLES = {
    "sp_legacy": Style(sp_legacy),
    "sp_new": Style(sp_new),
    "sp_bare": Style(sp_bare),
    "sp_python": Style(sp_python, lossless=False),
    "bpe": Style(bpe),
    "bpe_bos": Style(bpe_bos),
    "bpe_strip": Style(bpe_strip),
    "bpe_prefix": Style(bpe_prefix, prefix=" "),
    "wordpiece": Style(wordpiece, lossless=False),
}

# Templates that a tokenizer may bring along; END stands for its end-of-turn token.
OWN_TEMPLATES = {
    # Qwen 2: one string a message, a newline behind the end.
    "own_chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
        "END{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Llama 3: the content is trimmed.
    "own_trim": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|header|>' + message['role'] + '<|/header|>\n\n' + message['content'] | trim }}END{% endfor %}"
    ),
    # Zephyr-like, with the assistant's turn marked, from behind its role to its end token.
    "own_generation": (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|assistant|>\n' }}"
        "{% generation %}{{ message['content'] }}END{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}END{{ '\n' }}{% endif %}"
        "{% endfor %}"
    ),
    # The same with a mark that includes the role, which a prompt contains and no answer does.
    "own_wide_generation": (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ '<|assistant|> ' + message['content'] }}END{% endgeneration %}"
        "{% else %}{{ '<|' + message['role'] + '|> ' + message['content'] + ' ' }}{% endif %}{% endfor %}"
    ),
    # A processor's: lists of parts, the images of a message first.
    "own_parts": (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] | upper }}: "
        "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
        "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ part['text'] }}{% endfor %}"
        "{% if message['role'] == 'assistant' %}END{% else %}{{ ' ' }}{% endif %}{% endfor %}"
    ),
}
NAMED_TEMPLATES = (
    "plain",
    "caption",
    "bare",
    "question_answer",
    "vicuna_v0",
    "minigpt4",
    "minigpt_v2",
    "cogvlm",
    "vicuna_v1",
    "llava_llama_2",
    "mistral_instruct",
    "chatml",
)
ALL_TEMPLATES = (*NAMED_TEMPLATES, *OWN_TEMPLATES)


def end_of_turn(tokenizer: Any, template: str) -> str:
    """The token that ends an answer, as a reader of the template would say."""
    if template in ("chatml", *OWN_TEMPLATES) and "<|im_end|>" in tokenizer.get_added_vocab():
        return "<|im_end|>"
    return str(tokenizer.eos_token)


def build_processor(style: str, template: str, **settings: Any) -> MllmProcessor:
    """A processor around a fresh tokenizer of `style`."""
    tokenizer = STYLES[style].build()
    processor = MllmProcessor(
        make_image_processor(), tokenizer, num_image_tokens=NUM_IMAGE_TOKENS, **settings
    )
    if template in OWN_TEMPLATES:
        end = "{{ '" + end_of_turn(tokenizer, template) + "' }}"
        tokenizer.chat_template = OWN_TEMPLATES[template].replace("END", end)
        template = "tokenizer"
    processor.set_template(template)
    return processor
