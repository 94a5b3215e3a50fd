"""POPE: "Is there a X in the image?", half yes, half no. Build, load, prompt and the scoring rules.

Paper: Li et al. 2023, arXiv 2305.10355. The rules are those of RUCAIBox/POPE (`main.py`, `evaluate.py`;
LLaVA's `eval_pope.py` reads answers the same way) and of DAMO-NLP-SG/VCD (`eval_pope.py`). They differ,
so each is named, and a score says which one it is. Pure functions on text; no torch here. `build` and
`write` come from `pope_build.py`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.records import Question, question_id, read_rows
from eval.tasks.pope_build import SPLITS, build, write
from mllm.data.files import sha256_of
from mllm.errors import ConfigError, DataError

__all__ = [
    "KNOWN_FILES",
    "PROMPT_SUFFIXES",
    "RULES",
    "SPLITS",
    "asked_object",
    "build",
    "identify",
    "load",
    "prompt",
    "score",
    "wilson",
    "write",
]

# Published question files by the SHA-256 of their bytes. 'LLaVA pin' is the state that LLaVA-1.5 is
# scored on: 2910 random rows, and "imange" in some questions. "RUCAIBox" is the head of its repository;
# its A-OKVQA and GQA files (SEEM) are JSON lists.
KNOWN_FILES = {
    "ac25245170b975a5bdf9080b23fd431dfe6be458bc038259c1f4f09a6bef7994": "COCO random 3000 (RUCAIBox, VCD)",
    "fa3a986eb3d586ceb527371112ad7170f398835cbe0a3f08a7e888771dbd8bd6": "COCO popular (VCD)",
    "185d7eb49958c882f15d46c51d5c0456fbd5efbf24c57ff8b7adc6648870c6ac": "COCO adversarial (VCD)",
    "72c1a8ad45d0c13514f5f22598261df41d3b533854d29682e924db50ed8aa753": "COCO popular (RUCAIBox)",
    "420b3407db1fa9f1187a805dca41cb7b97fd91504e6c2179706188c107fb8ef8": "COCO adversarial (RUCAIBox)",
    "c16b65d2df6d70bb0814c8a4375833d39cdb09928fd936d3fc546491efa37f35": "COCO random 2910 (LLaVA pin)",
    "5b16653023bf4f64d57eb0d168259de6627f5cde7538b85ebed3cc33034aa6cc": "COCO popular (LLaVA pin)",
    "1d8f0906a9b50c05640f6f23abfac97523be2a1bed28f7eadc63b811699b2d26": "COCO adversarial (LLaVA pin)",
    "900c244605e8d43626b9579a110e3631e534cddc2aff27fe91e3f080e15d4446": "A-OKVQA random 3000 (VCD)",
    "792d586a875c197362256b25e9252cc97df6fa1dca5aca72a53eba560414d6b7": "A-OKVQA popular (VCD)",
    "87f9acb460fcb690f9120c6d69eb05cfedadab5af5eb385b5201fd48bfc6670c": "A-OKVQA adversarial (VCD)",
    "1c1117ce33df2eae0d7b04827896caff1f79dac7b99b9e1b0c87a415066cff98": "GQA random 3000 (VCD)",
    "e48e138bd61dd3bc4ec35cc8d4357b4dbfc68f0e704283a92217325585a17653": "GQA popular (VCD)",
    "64a3bdeb8d24c02d175eafa5e1b24bc7fd611efa95bb87a031c880e548aef094": "GQA adversarial (VCD)",
    "f06eecde6d6ef4a00b95a7bbb510490708a09a6a67d952b59b8bdd33ac2c7200": "A-OKVQA random 3000 (RUCAIBox)",
    "2ae5bedee3450cda52f9b033942c7b04a3917a86a110e859a66c1e41934c6ffd": "A-OKVQA popular (RUCAIBox)",
    "2ddd3bdfa0df7a77a2cb1765ed06ac5ed190b5a093aa405b96986e862e8cdac1": "A-OKVQA adversarial (RUCAIBox)",
    "6ce488eade3770185034939fabfe742fa32ed369011c8d9c3ac77bc0c85abd94": "GQA random 3000 (RUCAIBox)",
    "dd03f06a458dd216e83233160fbf6628af9c63c84b11e99599f4fc0304b3361d": "GQA popular (RUCAIBox)",
    "74e01b41d8308e2392e3b8d961167496ff3901c01100265d931a7a392f138a7a": "GQA adversarial (RUCAIBox)",
}

# What follows the question, by who asks.
PROMPT_SUFFIXES = {
    "llava": "\nAnswer the question using a single word or phrase.",
    "vcd": " Please answer this question with one word.",
    "plain": "",
}


# ------------------------------------------------------------------------------------- load and prompt


def load(path: Path) -> list[Question]:
    """Read a question file: POPE's own (JSON lines or a list), ours, or LLaVA's `llava_pope_test.jsonl`.

    Texts are kept as they are ("imange" too). A row has a `label`, or a `category` (LLaVA's file, whose
    labels stand in three files of their own), or both.

    Raises:
        DataError: file, line and field of the first bad row.
    """
    questions = []
    seen: dict[str, str] = {}
    for where, row in read_rows(Path(path)):
        key = question_id(row, where)
        if str(key) in seen:
            raise DataError(f"{where}: question_id {key!r} stands at {seen[str(key)]} too; make it unique")
        seen[str(key)] = where
        for name in ("image", "text"):
            if not isinstance(row.get(name), str) or not row[name]:
                raise DataError(
                    f"{where}: field {name!r} must be a non-empty string, found {row.get(name)!r}"
                )
        label, category = row.get("label"), row.get("category")
        if label not in ("yes", "no") and not (label is None and isinstance(category, str)):
            raise DataError(f"{where}: field 'label' must be 'yes' or 'no', found {label!r}")
        if category is not None and not isinstance(category, str):
            raise DataError(f"{where}: field 'category' must be a string, found {category!r}")
        questions.append(Question(key, row["image"], row["text"], label, category, where))
    return questions


def identify(path: Path) -> tuple[str, str | None]:
    """SHA-256 of a question file, and its name where it is a published one."""
    digest = sha256_of(path)
    name = KNOWN_FILES.get(digest)
    return digest, name and f"POPE {name}"


def prompt(question: str, style: str = "llava") -> str:
    """The question as it is put to the model; a suffix in the text already is replaced, not doubled.

    Raises:
        ConfigError: an unknown style.
    """
    if style not in PROMPT_SUFFIXES:
        raise ConfigError(f"prompt style {style!r} is unknown; use one of {', '.join(PROMPT_SUFFIXES)}")
    if style == "plain":
        return question
    # LLaVA's question file has its suffix in the text already.
    for suffix in filter(None, PROMPT_SUFFIXES.values()):
        question = question.removesuffix(suffix)
    return question + PROMPT_SUFFIXES[style]


def asked_object(text: str) -> str | None:
    """The X of "Is there a X in the image?" in a question or prompt, or None where it asks otherwise."""
    found = re.search(r"is there an? (.+?) in the im(?:an|a)ge", text, re.IGNORECASE)
    return found.group(1).strip().lower() if found else None


# ---------------------------------------------------------------------------------------------- score


def official_says_yes(answer: str, label: str) -> bool:
    """RUCAIBox's and LLaVA's reading: no only where the first sentence has the word No, no or not.

    Words are what single spaces part, after commas are deleted: "NO", "no\\n", "nope" and "" are all yes.
    """
    del label  # this rule reads every answer the same way
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def vcd_says_yes(answer: str, label: str) -> bool:
    """VCD's reading, which looks for the gold answer only, as a substring of the lower-cased answer.

    So "I know" is a no where no is right, and not a yes where yes is right.
    """
    text = answer.lower().strip()
    return "yes" in text if label == "yes" else "no" not in text


RULES: dict[str, Callable[[str, str], bool]] = {"official": official_says_yes, "vcd": vcd_says_yes}


def score(labels: Sequence[str], answers: Sequence[str], rule: str = "official") -> dict[str, Any]:
    """Metrics of answers against labels ("yes" or "no"), paired by position.

    `unparsed` counts answers with neither a yes nor a no or not in them, `ambiguous` those with both
    (whole words, any case); the rule still decides them. A ratio over nothing is 0.0 and is noted.

    Raises:
        ConfigError: an unknown rule.
        DataError: nothing to score, unequal lengths, or a label that is neither yes nor no.
    """
    if rule not in RULES:
        raise ConfigError(f"rule {rule!r} is unknown; use one of {', '.join(RULES)}")
    if len(labels) != len(answers):
        raise DataError(f"{len(answers)} answers for {len(labels)} labels; give one answer a question")
    if not labels:
        raise DataError("there are no answers to score")
    if strange := set(labels) - {"yes", "no"}:
        raise DataError(f"label {sorted(map(str, strange))[0]!r} is neither 'yes' nor 'no'")
    table = Counter((label, RULES[rule](a, label)) for label, a in zip(labels, answers, strict=True))
    tp, fn = table["yes", True], table["yes", False]
    fp, tn = table["no", True], table["no", False]
    notes: list[str] = []
    precision = _ratio(tp, tp + fp, "precision: nothing was answered yes", notes)
    recall = _ratio(tp, tp + fn, "recall: nothing is labelled yes", notes)
    f1 = _ratio(2 * precision * recall, precision + recall, "f1: precision and recall are 0", notes)
    words = [set(re.findall(r"[^\W\d_]+", a.lower())) for a in answers]
    return {
        "n": len(labels),
        "accuracy": (tp + tn) / len(labels),
        "accuracy_ci95": wilson(tp + tn, len(labels)),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_ratio": (tp + fp) / len(labels),
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
        "unparsed": sum(not w & {"yes", "no", "not"} for w in words),
        "ambiguous": sum("yes" in w and bool(w & {"no", "not"}) for w in words),
        "notes": notes,
    }


def wilson(right: int, n: int, z: float = 1.959963984540054) -> list[float]:
    """Wilson's interval of a proportion, 95 % by default: `[low, high]`, within 0 and 1."""
    p, spread = right / n, z * z / n
    middle = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / n + spread / (4 * n)) / (1 + spread)
    # The ends are exact there; rounding would put them beside.
    return [middle - half if right else 0.0, middle + half if right < n else 1.0]


def _ratio(over: float, under: float, why_none: str, notes: list[str]) -> float:
    if under:
        return over / under
    notes.append(f"{why_none}; undefined, reported as 0")
    return 0.0
