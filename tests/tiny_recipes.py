"""Shipped recipes with tiny parts: every setting stays, sizes, places and lengths of runs are made small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import (
    TINY_CONNECTORS,
    make_image_processor,
    make_language_model,
    make_picture,
    make_tokenizer,
    make_vision,
    scale_weights,
)
from pairs import bert_tokenizer, clip_tokenizer
from transformers import BertConfig, BertModel, CLIPVisionModelWithProjection

from mllm.config import RECIPES, RunConfig, shipped_recipes
from mllm.data.schema import assistant, user

# Published parts by their families; a recipe names parts, and each name must be one of these.
VISION = {
    "openai/clip-vit-large-patch14": "clip",
    "openai/clip-vit-large-patch14-336": "clip",
    "openai/clip-vit-base-patch32": "clip_projected",
    "Salesforce/blip2-opt-2.7b": "blip2",
    "google/siglip-so400m-patch14-224": "siglip",
    "google/siglip2-base-patch16-256": "siglip",
    "google/siglip-base-patch16-224": "siglip",
    "facebook/dinov2-base": "dinov2",
    "QuanSun/EVA-CLIP": "clip",
}
LANGUAGE = {
    "EleutherAI/gpt-j-6b": "gptj",
    "openai-community/gpt2": "gpt2",
    "facebook/opt-2.7b": "opt",
    "facebook/opt-6.7b": "opt",
    "google/flan-t5-xl": "t5",
    "google/ul2": "t5",
    "lmsys/vicuna-7b-v0": "llama",
    "lmsys/vicuna-7b-v1.1": "llama",
    "lmsys/vicuna-13b-v0": "llama",
    "lmsys/vicuna-7b-v1.5": "llama",
    "meta-llama/Llama-2-7b-chat-hf": "llama",
    "HuggingFaceTB/SmolLM2-360M-Instruct": "llama",
    "togethercomputer/RedPajama-INCITE-Base-3B-v1": "gpt_neox",
    "chavinlo/alpaca-native": "llama",
}
TINY_FUSIONS = {
    "gated_cross_attention": {"every": 1, "heads": 2, "head_dim": 8},
    "visual_expert": {},
    "high_res_cross_attention": {"image_size": 48, "cross_dim": 16, "heads": 2},
}
# As SmolLM2's.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TinyWorld:
    """A folder with tiny parts under the published names, rows, and the outputs of stages."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "rows").mkdir(parents=True)
        for index in range(8):
            make_picture(index).save(folder / "rows" / f"{index}.png")
        self._write("rows.jsonl", ["a fox", "the quick brown fox"])
        self.trained: dict[str, Path] = {}

    def _write(self, name: str, answers: list[str]) -> None:
        lines = []
        for index in range(8):
            answer = f"{answers[index % len(answers)]} {index}"
            messages = [user("what is it?", f"{index}.png"), assistant(answer)]
            lines.append(json.dumps({"id": f"r{index}", "messages": messages}))
        (self.folder / "rows" / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    # -- parts --------------------------------------------------------------------------------------

    def vision(self, name: str) -> str:
        """A vision encoder's directory."""
        place = self.folder / "vision" / VISION[name]
        if not place.is_dir():
            torch.manual_seed(0)
            if VISION[name] == "clip_projected":
                config = make_vision("clip").config
                config.projection_dim = 24
                CLIPVisionModelWithProjection(config).save_pretrained(place)
            else:
                make_vision(VISION[name]).save_pretrained(place)
            make_image_processor().save_pretrained(place)
            clip_tokenizer().save_pretrained(place)
        return str(place)

    def language(self, name: str) -> str:
        """A language model's directory, with its tokenizer."""
        place = self.folder / "language" / LANGUAGE[name]
        if not place.is_dir():
            torch.manual_seed(0)
            tokenizer = make_tokenizer()
            tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
            tokenizer.chat_template = CHATML
            tokenizer.save_pretrained(place)
            make_language_model(LANGUAGE[name], vocab_size=len(tokenizer)).save_pretrained(place)
        return str(place)

    def bert(self) -> str:
        """A BERT of the tiny Q-Former's shape, with its tokenizer."""
        place = self.folder / "bert"
        if not place.is_dir():
            torch.manual_seed(0)
            tokenizer = bert_tokenizer()
            config = BertConfig(
                vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                intermediate_size=64, max_position_embeddings=140,
            )  # fmt: skip
            model = BertModel(config)
            scale_weights(model, 4.0)
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
        return str(place)

    # -- recipes ------------------------------------------------------------------------------------

    def shrink(self, name: str) -> RunConfig:
        """The recipe `name` over tiny parts; its earlier stages are run if they were not."""
        raw = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
        self._shrink_model(raw["model"])
        data, train = raw["data"], raw["train"]
        rows = {"path": str(self.folder / "rows" / "rows.jsonl"), "format": "auto"}
        if isinstance(data["path"], list):
            data["path"] = [{**source, **rows} for source in data["path"]]
        else:
            data |= rows
        data["image_root"] = str(self.folder / "rows")
        for section in ("lora",):
            if section in raw["tune"]:
                raw["tune"][section] |= {"r": 2, "dropout": 0.0}
        for key in (
            "deepspeed",
            "bf16",
            "gradient_checkpointing",
            "num_workers",
            "save_steps",
            "save_total_limit",
            "save_total_limit",
            "num_train_epochs",
        ):
            train.pop(key, None)
        train |= {
            # Two steps: gates that start at zero let nothing else learn in the first.
            "output_dir": self._run(train["output_dir"]), "per_device_batch_size": 4, "max_steps": 2,
            "gradient_accumulation_steps": 1, "warmup_steps": 0, "learning_rate": 1e-3, "weight_decay": 0.0,
            "learning_rates": dict.fromkeys(train.get("learning_rates", {}), 0.001), "logging_steps": 1,
        }  # fmt: skip
        return RunConfig.model_validate(raw)

    def _shrink_model(self, model: dict[str, Any]) -> None:
        model["dtype"] = "float32"
        if "image_size" in model:
            model["image_size"] = 48  # the tiny encoders have 32, in patches of 8
        for key in ("init_from", "connector_from"):
            if key in model:
                model[key] = str(self.after(model[key]))
        for key in (
            "vision_encoder",
            "image_processor",
            "language_model",
            "text_encoder",
            "tokenizer",
            "instruction_tokenizer",
        ):
            if key in model:
                model[key] = self._place(key, model[key])
        connector = model.get("connector")
        if connector:
            connector |= {
                k: v for k, v in TINY_CONNECTORS.get(connector["type"], {}).items() if k != "vocab_size"
            }
            if connector["type"] == "instruct_qformer":
                connector["vocab_size"] = len(bert_tokenizer()) + 1  # and [DEC]
            if connector.get("kind") == "transformer":
                connector |= {"clip_length": 4, "layers": 2, "heads": 4}
            if connector.get("num_positions"):
                connector["num_positions"] = 16
        fusion = model.get("fusion") or {"of": []}
        for settings in fusion.get("of", [fusion]):
            settings |= TINY_FUSIONS[settings["type"]]
            if "vision_encoder" in settings:
                settings["vision_encoder"] = self.vision(settings["vision_encoder"])
        if model.get("tiling"):
            side = 32
            model["tiling"]["pinpoints"] = [
                [w // 336 * side, h // 336 * side] for w, h in model["tiling"]["pinpoints"]
            ]
        if "pretraining" in model:
            model["pretraining"] |= {"embed_dim": 16, "max_text_length": 12}

    def _place(self, key: str, source: Any) -> Any:
        if isinstance(source, dict):
            kind = source["model_type"]
            sizes = {
                "bit": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 4},
            }
            blocks = {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
            }
            images = {"image_size": 32, "patch_size": 8} if "vision" in kind else {}
            return {**source, **sizes.get(kind, {**blocks, **images})}
        if source.startswith("runs/"):
            return str(self.after(source))
        if source.startswith("mllm://"):
            return source
        if source.startswith("google-bert/"):
            return self.bert()
        return self.language(source) if source in LANGUAGE else self.vision(source)

    def _run(self, output_dir: str) -> str:
        return str(self.folder / output_dir)

    def after(self, output_dir: str) -> Path:
        """The checkpoint of an earlier stage; runs the recipe that writes to `output_dir`."""
        from mllm.training.train import train

        if output_dir not in self.trained:
            writers = [
                name
                for name in shipped_recipes()
                if yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["train"]["output_dir"] == output_dir
            ]
            assert writers, f"no recipe writes {output_dir}"
            self.trained[output_dir] = train(self.shrink(writers[0]))
        return self.trained[output_dir]
