"""Memory at scale: what rows by the hundred thousand cost all processes of a loader together."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model
from torch.utils.data import DataLoader, RandomSampler

from mllm.data.collator import Collator
from mllm.data.mixture import Mixture
from mllm.data.rows import open_rows

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

from data_scale import proportional_set_size, write_rows

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="memory is told by Linux"
)


def megabytes(path: Path, workers: int, batches: tuple[int, ...]) -> list[float]:
    """Of this process and its workers, after so many batches, in random order."""
    rows: Any = Mixture([open_rows(path, image_root=path.parent / "pictures")], ["rows"])  # type: ignore[list-item]
    collator = Collator(make_model()[1], 1024)
    loader = DataLoader(rows, 4, sampler=RandomSampler(rows), collate_fn=collator, num_workers=workers)
    found, stream = [], iter(loader)
    for before, after in zip((0, *batches), batches, strict=False):
        for _ in islice(stream, after - before):
            pass
        found.append(proportional_set_size() / 1e6)
    return found


def test_rows_cost_bytes_not_kilobytes(tmp_path: Path) -> None:
    """A list of parsed rows would be 2 KB a row in every worker; an index of 24 bytes a row is shared."""
    few = megabytes(write_rows(tmp_path, 1000), 2, (20, 100))
    many = megabytes(write_rows(tmp_path, 100_000), 2, (20, 100))
    assert many[0] - few[0] < 30, (few, many)
    assert many[1] - many[0] < 25, "memory grows with the batches"


def test_what_goes_to_a_worker_is_small(tmp_path: Path) -> None:
    rows = Mixture([open_rows(write_rows(tmp_path, 20_000))], ["rows"])  # type: ignore[list-item]
    assert len(pickle.dumps(rows)) < 40 * 20_000


@pytest.mark.slow
def test_a_million_rows_in_training(tmp_path: Path) -> None:
    """The bench's first case, with fewer steps."""
    bench = Path(__file__).parents[2] / "scripts" / "bench" / "data_scale.py"
    told = ["--cases", "jsonl", "--steps", "60", "--json", str(tmp_path / "found.json")]
    subprocess.run(
        [sys.executable, str(bench), *told, "--folder", str(tmp_path)], check=True, capture_output=True
    )
    found = json.loads((tmp_path / "found.json").read_text())["jsonl"]
    assert found["first_batch_seconds"] > 0
    assert max(found["extra_megabytes"].values()) < 300
