"""Messages and images -> `input_ids`, `labels`, `pixel_values`: the only place where a prompt is built.

The same object prepares training, evaluation, chat and export, and is saved with the model.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import AddedToken, BatchFeature
from transformers.processing_utils import ProcessorMixin

from mllm.data.images import image_size, load_image
from mllm.data.schema import Message, check_last, check_roles, images_of, message_text
from mllm.data.templates import IMAGE, Piece, chat_template, render
from mllm.data.tokens import IGNORE, PieceTokenizer, expand_images, pad_rows
from mllm.errors import ConfigError, DataError
from mllm.model.anyres import AnyRes, build_tiling
from mllm.model.instructions import InstructionTokenizer

AspectRatio = Literal["square", "pad"]


@dataclass(frozen=True)
class Encoded:
    """One conversation as token ids, before any image is preprocessed.

    Attributes:
        input_ids: S ids, the placeholders of images included.
        labels: S labels, -100 where nothing is supervised; for an encoder-decoder language model, the T
            tokens of the last answer, which are then not among the ids.
        images: paths or PIL images, in the order of their placeholders.
        image_tokens: placeholders of each image.
        instructions: for each image, the text of the message that it stands in.
        dropped_turns: messages removed from the end so that the row fits.
    """

    input_ids: list[int]
    labels: list[int]
    images: list[Any]
    image_tokens: list[int]
    instructions: list[str]
    dropped_turns: int = 0


class MllmProcessor(ProcessorMixin):
    """Tokenizer, image processor, chat template and the number of tokens an image takes.

    Args:
        image_processor: any Hugging Face image processor.
        tokenizer: any Hugging Face tokenizer; an image marker is added to it, no model is resized.
        chat_template: Jinja template (see `mllm.data.templates`).
        num_image_tokens: M, soft tokens an image, or a view of it with tiling, as the connector says.
        vocab_size: rows of the language model's embedding; ids beyond it are refused.
        image_aspect_ratio: `square` leaves the picture to the image processor (LLaVA-1.5 stage 1: resize
            and centre crop); `pad` first pads to a square with the mean colour (LLaVA-1.5 stage 2).
        content_parts: whether the template takes lists of content parts (else one string a message).
        end_token: end of an answer; None means the tokenizer's end-of-sequence token.
        tiling: `{"type": "anyres", ...}`, see `mllm.model.anyres`; None is one view an image.
        high_res_size: side at which images are given once more, to a fusion with an encoder of its own.
        encoder_decoder: whether the prompt goes to an encoder and the answer to a decoder.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 1,
        vocab_size: int | None = None,
        image_aspect_ratio: AspectRatio = "square",
        content_parts: bool = True,
        end_token: str | None = None,
        tiling: dict[str, Any] | None = None,
        high_res_size: int | None = None,
        encoder_decoder: bool = False,
        **kwargs: Any,
    ):
        if image_aspect_ratio not in ("square", "pad"):
            raise ConfigError(f"image_aspect_ratio is {image_aspect_ratio!r}; use 'square' or 'pad'")
        self.num_image_tokens = num_image_tokens
        self.vocab_size = vocab_size
        self.image_aspect_ratio = image_aspect_ratio
        self.content_parts = content_parts
        self.end_token = end_token
        self.tiling = tiling
        self.high_res_size = high_res_size
        self.encoder_decoder = encoder_decoder
        self.instruction_tokenizer: InstructionTokenizer | None = None
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        # Where it is there but not special, an image that a user types would be parsed as one.
        known = tokenizer.added_tokens_decoder.values()
        if not any(token.content == IMAGE and token.special for token in known):
            tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # Llama's `legacy` decides where spaces go, and transformers 5 does not save it by itself.
        if hasattr(tokenizer, "legacy"):
            tokenizer.init_kwargs.setdefault("legacy", tokenizer.legacy)
        self.image_token = IMAGE
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Write everything, the instruction tokenizer included."""
        if self.instruction_tokenizer is not None:
            self.instruction_tokenizer.save(Path(save_directory))
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read everything, the instruction tokenizer included."""
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        processor.instruction_tokenizer = InstructionTokenizer.load(Path(pretrained_model_name_or_path))
        return processor

    # -- the template -------------------------------------------------------------------------------

    def set_template(self, name: str) -> None:
        """Use the named template from now on (`mllm.data.templates`, or `tokenizer` for its own)."""
        self.chat_template = chat_template(name, self.tokenizer)
        self.__dict__.pop("piece_tokenizer", None)
        # A text-only template takes strings: found by trying, because templates do not declare it.
        self.content_parts = True
        probe: list[Message] = [
            {
                "role": "user",
                "content": [{"type": "image", "image": None}, {"type": "text", "text": "a"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        ]
        try:
            self.content_parts = IMAGE in "".join(piece.text for piece in self.pieces(probe))
            refusal = f"it writes no {IMAGE} for an image"
        except DataError as error:
            self.content_parts = False
            refusal = str(error)
        try:
            supervised = [piece.text for piece in self.pieces(probe) if piece.supervised]
        except DataError as error:
            raise ConfigError(
                f"template {name!r} takes neither lists of parts ({refusal}) nor strings ({error})"
            ) from error
        if not supervised:
            raise ConfigError(
                f"template {name!r} marks nothing as supervised; put the answer in {{% generation %}}"
            )
        last = supervised[-1].strip()
        # `plain` ends with a newline, which is no stop token; its answers also end at end-of-sequence.
        self.end_token = last if last in self.tokenizer.get_added_vocab() else None

    @property
    def end_token_ids(self) -> list[int]:
        """Ids that end an answer: the template's end token and the tokenizer's end-of-sequence token."""
        tokens = [self.end_token, self.tokenizer.eos_token]
        ids = [self.tokenizer.convert_tokens_to_ids(token) for token in tokens if token]
        return list(dict.fromkeys(ids))

    @property
    def closing(self) -> list[int]:
        """What the tokenizer puts behind each text of an encoder (T5's `</s>`), prompts being texts here."""
        eos = self.tokenizer.eos_token_id
        closes = self.encoder_decoder and self.tokenizer("a")["input_ids"][-1] == eos
        return [eos] if closes else []

    @cached_property
    def piece_tokenizer(self) -> PieceTokenizer:
        """The tokenizer of pieces, with what it found out about spaces."""
        return PieceTokenizer(self.tokenizer, self.image_token_id)

    def pieces(self, messages: Sequence[Message], open_answer: bool = False) -> list[Piece]:
        """The conversation as text, cut where supervision begins and ends."""
        if self.chat_template is None:
            raise ConfigError("this processor has no chat template; call set_template(name)")
        return render(
            messages,
            str(self.chat_template),
            self.piece_tokenizer.names,
            self.piece_tokenizer.ends,
            parts=self.content_parts,
            open_answer=open_answer,
        )

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The exact prompt, one image marker an image, ending where the answer begins."""
        return "".join(piece.text for piece in self.pieces(messages, open_answer=True))

    # -- token ids ----------------------------------------------------------------------------------

    def encode(self, messages: Sequence[Message], open_answer: bool = False) -> Encoded:
        """Token ids and labels of one conversation; of images only the sizes are read, and only with tiling.

        Args:
            messages: canonical messages; with `open_answer` the last one is the user's.
            open_answer: end where the assistant's answer begins (for generation).

        Raises:
            DataError: roles out of order, a template that loses an image, an id the model cannot embed.
        """
        check_roles(messages, "conversation")
        check_last(messages, "user" if open_answer else "assistant")
        pieces = self.pieces(messages, open_answer)
        ids, labels = self.piece_tokenizer(pieces)
        images = images_of(messages)
        markers = ids.count(self.image_token_id)
        if markers != len(images):
            raise DataError(f"the chat template renders {markers} image markers for {len(images)} images")
        self._check_vocabulary(ids)
        counts = self.image_tokens(images)
        ids, labels = expand_images(ids, labels, self.image_token_id, counts)
        if self.encoder_decoder:
            ids, labels = self._for_encoder(ids, labels, [] if open_answer else pieces)
        instructions = [message_text(m) for m in messages for _ in images_of([m])]
        return Encoded(ids, labels, images, counts, instructions)

    def _for_encoder(
        self, ids: list[int], labels: list[int], pieces: Sequence[Piece]
    ) -> tuple[list[int], list[int]]:
        """(ids for the encoder, last answer for the decoder), each ended as the model knows it."""
        last = max((i for i, piece in enumerate(pieces) if piece.source == "answer"), default=len(pieces))
        tail = self.piece_tokenizer(pieces)[0][len(self.piece_tokenizer(pieces[:last])[0]) :]
        prompt = len(ids) - len(tail)  # no image stands behind the last answer
        answer = [label for label in labels[prompt:] if label != IGNORE]
        if pieces and answer[-1:] not in [[end] for end in self.end_token_ids]:
            answer.append(self.tokenizer.eos_token_id)
        return ids[:prompt] + self.closing, answer

    def encode_to_fit(self, messages: Sequence[Message], max_length: int | None) -> Encoded:
        """`encode`, removing whole trailing rounds (user and assistant) until the row fits.

        Raises:
            DataError: even the first round alone is too long; says how long it is.
        """

        def length(row: Encoded) -> int:
            return len(row.input_ids) + (len(row.labels) if self.encoder_decoder else 0)

        row = self.encode(messages)
        if max_length is None or length(row) <= max_length:
            return row
        first = 3 if messages[0]["role"] == "system" else 2
        rounds = [messages[:end] for end in range(first, len(messages), 2)] or [messages]
        # By halves, because a conversation may have hundreds of rounds.
        fit = bisect_right(rounds, max_length, key=lambda kept: length(self.encode(kept)))
        row = self.encode(rounds[max(0, fit - 1)])
        if not fit:
            raise DataError(
                f"the first round needs {length(row)} tokens and max_length is {max_length}; "
                "raise data.max_length or remove the row"
            )
        return replace(row, dropped_turns=len(messages) - len(rounds[fit - 1]))

    def _check_vocabulary(self, ids: Sequence[int]) -> None:
        worst = max(set(ids) - {self.image_token_id}, default=0)
        if self.vocab_size is not None and worst >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(worst)
            raise DataError(
                f"token {token!r} has id {worst}, but the language model has {self.vocab_size} embeddings; "
                "use the tokenizer that belongs to the language model"
            )

    # -- tiles --------------------------------------------------------------------------------------

    def set_tiling(self, settings: dict[str, Any]) -> None:
        """Tile images from now on."""
        self.tiling, self.image_aspect_ratio = dict(settings), "square"
        self.__dict__.pop("tiles", None)

    @cached_property
    def tiles(self) -> AnyRes | None:
        """How images are cut into tiles, if they are."""
        if self.tiling is None:
            return None
        if self.image_aspect_ratio == "pad":
            raise ConfigError("tiling pads images itself; leave image_aspect_ratio out")
        view = self.image_processor(images=[Image.new("RGB", (64, 48))], return_tensors="pt")["pixel_values"]
        return build_tiling(self.tiling, view.shape[1:], self.num_image_tokens)

    def image_tokens(self, images: Sequence[Any]) -> list[int]:
        """Placeholders that each image takes; with tiling they depend on its size."""
        if self.tiles is None:
            return [self.num_image_tokens] * len(images)
        return [self.tiles.num_tokens(image_size(image)) for image in images]

    # -- pixels -------------------------------------------------------------------------------------

    def pixels(self, images: Sequence[str | Path | Image.Image]) -> torch.Tensor:
        """Read and preprocess images.

        Returns:
            Tensor [I, C, H, W], float32, normalised as the vision encoder expects; with tiling [T, C, H, W],
            the views of all images.
        """
        return self._pixels([load_image(image) for image in images])

    def _pixels(self, pictures: list[Image.Image], **options: Any) -> torch.Tensor:
        if self.tiles is not None:
            views = [view for picture in pictures for view in self.tiles.views(picture)]
            # They have the encoder's size: resized and cropped once more (as for DINOv2) they lose edges.
            options = {"do_resize": False, "do_center_crop": False}
            return self.image_processor(images=views, return_tensors="pt", **options)["pixel_values"]
        if self.image_aspect_ratio == "pad":
            pictures = [pad_to_square(picture, self.mean_colour) for picture in pictures]
        return self.image_processor(images=pictures, return_tensors="pt", **options)["pixel_values"]

    def image_inputs(self, images: Sequence[Any]) -> dict[str, torch.Tensor]:
        """All that the model's `forward` takes of images, in tensors to be joined along their first axis."""
        pictures = [load_image(image) for image in images]
        inputs = {"pixel_values": self._pixels(pictures)}
        if self.tiles is not None:
            inputs["image_sizes"] = torch.tensor([[picture.height, picture.width] for picture in pictures])
        if self.high_res_size is not None:
            side = self.high_res_size
            larger = {"size": dict.fromkeys(dict(self.image_processor.size), side)}  # shortest edge, or both
            crop = {"crop_size": {"height": side, "width": side}}
            inputs["pixel_values_high"] = self._pixels(pictures, **larger, **crop)
        return inputs

    def instruction_inputs(self, instructions: Sequence[str]) -> dict[str, torch.Tensor]:
        """All that it takes of the instructions; nothing unless the connector reads them."""
        return self.instruction_tokenizer(instructions) if self.instruction_tokenizer and instructions else {}

    @property
    def mean_colour(self) -> tuple[int, ...]:
        """The image processor's mean as a 0-255 colour, rounded down as LLaVA does."""
        return tuple(int(255 * value) for value in self.image_processor.image_mean)

    # -- batches ------------------------------------------------------------------------------------

    def __call__(
        self,
        conversations: Sequence[Sequence[Message]] | None = None,
        *,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """A left-padded batch for generation.

        Args:
            conversations: B conversations that end with a user message.
            images, text: the Hugging Face way instead: B prompts with one image marker an image, and
                the images of all prompts in order.

        Returns:
            `input_ids` and `attention_mask` [B, S]; `pixel_values` [I, C, H, W] if there is any image.
        """
        if conversations is not None:
            rows = [self.encode(messages, open_answer=True) for messages in conversations]
            return self.pad(
                [row.input_ids for row in rows],
                [image for row in rows for image in row.images],
                [text for row in rows for text in row.instructions],
            )
        prompts = [text] if isinstance(text, str) else list(text or [])
        ids = [self.piece_tokenizer([Piece(p, "template", False)])[0] + self.closing for p in prompts]
        flat = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
        flat = [image for group in flat for image in (group if isinstance(group, (list, tuple)) else [group])]
        markers = sum(row.count(self.image_token_id) for row in ids)
        if markers != len(flat):
            raise DataError(f"the text has {markers} image markers for {len(flat)} images")
        counts = iter(self.image_tokens(flat))
        ids = [expand_images(i, i, self.image_token_id, counts)[0] for i in ids]
        marked = [p for prompt in prompts for p in [prompt.replace(IMAGE, "").strip()] * prompt.count(IMAGE)]
        return self.pad(ids, flat, marked)

    def pad(
        self, ids: Sequence[Sequence[int]], images: Sequence[Any], instructions: Sequence[str] = ()
    ) -> BatchFeature:
        """Pad rows of ids on the left, those of an encoder on the right, and read their images."""
        if not ids or not all(ids):
            raise DataError(
                "a prompt has no tokens" if ids else "a batch needs at least one conversation, found none"
            )
        left = not self.encoder_decoder
        batch = {
            "input_ids": pad_rows(ids, self.tokenizer.pad_token_id, left),
            "attention_mask": pad_rows([[1] * len(row) for row in ids], 0, left),
        }
        if images:
            batch |= self.image_inputs(images) | self.instruction_inputs(instructions)
        return BatchFeature(batch)


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture centred on a square of `colour` (LLaVA-1.5 stage 2)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


__all__ = ["IGNORE", "Encoded", "MllmProcessor", "pad_to_square"]
