"""What the pretraining stages need in small: a BERT tokenizer, a CLIP-like one, captions."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

CAPTIONS = ["a cat", "two cats and a dog", "is there a cat in the image", "the quick brown fox"]
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()} | {"hello", *"012345"})


def bert_tokenizer() -> BertTokenizerFast:
    """`[CLS] text [SEP]` over a few whole words; the same in every process."""
    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    return BertTokenizerFast(vocab=vocab)


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """`<s> text </s>` over the same words."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)
