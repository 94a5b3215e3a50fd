"""Real launchers: one launch runs several runs, one after the other, and each leaves what it found."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mllm.config import RunConfig

REPOSITORY = Path(__file__).resolve().parents[1]
DS_CONFIGS = REPOSITORY / "ds_configs"
WORKER = REPOSITORY / "tests" / "many_runs.py"
BIN = Path(sys.executable).parent


def free_port() -> str:
    """A port of this host that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def command_of(launcher: str, ranks: int = 2) -> list[str]:
    """How a launcher is called here; what follows is the script and its arguments."""
    if launcher == "deepspeed":
        return [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", free_port()]
    if launcher == "torchrun":
        return [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={ranks}"]
    if launcher == "accelerate":
        settings = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        port = ["--main_process_port", "0"]  # one that is free
        # With --cpu it would start one process, whatever the number asked for.
        return [
            str(BIN / "accelerate"),
            "launch",
            "--multi_gpu",
            "--num_processes",
            str(ranks),
            *settings,
            *port,
        ]
    return [str(BIN / "mllm"), "train"]


@dataclass
class Launch:
    """A launcher at work, and the file that it writes to."""

    process: subprocess.Popen[bytes]
    log: Path

    def finish(self, timeout: float = 300) -> tuple[int, str]:
        """(exit code, what it wrote); ended, with its ranks, when it does not end by itself."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.terminate()  # a launcher ends its ranks
            code = self.process.wait(30)
        return code, self.log.read_text(errors="replace")


def start(command: list[str], log: Path) -> Launch:
    """Start a launcher, on CPUs alone."""
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    # ninja, which builds DeepSpeed's operators, lies beside python.
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    more = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths, "PATH": path}
    with log.open("wb") as file:  # a pipe would stay open as long as any rank lives
        process = subprocess.Popen(command, env={**os.environ, **more}, stdout=file, stderr=subprocess.STDOUT)
    return Launch(process, log)


def launch_runs(
    launcher: str, folder: Path, configs: Mapping[str, RunConfig], faults: Mapping[str, str] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """What each rank found in each run: `gradients` of the first step, an `error`, `images` of each batch.

    `faults` names what goes wrong in a run, see `many_runs.Fault`; `look` reads all batches once more.
    """
    jobs = [
        {
            "name": name,
            "config": config.model_dump(mode="json", exclude_unset=True),
            "fault": (faults or {}).get(name),
        }
        for name, config in configs.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    command = [*command_of(launcher), str(WORKER), str(folder / "jobs.json")]
    code, text = start(command, folder / "log.txt").finish()
    assert code == 0, text[-6000:]
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]
        for name in configs
    }
