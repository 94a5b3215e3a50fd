"""What leaves this machine: a model card made from a run's records, and the upload.

secrets.py        what must not be published
records.py        a checkpoint's manifest and files -> facts
evaluation.py     scores of this very checkpoint
card.py           facts -> README.md
card.md.jinja     its text
push.py           the checkpoint -> the Hub
"""

from mllm.publish.card import write_card
from mllm.publish.push import Upload, push

__all__ = ["Upload", "push", "write_card"]
