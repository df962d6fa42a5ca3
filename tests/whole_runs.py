"""Whole runs of a nano recipe, in processes forked from one that has everything imported, so that they can be killed."""

from __future__ import annotations

import faulthandler
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
RECIPE = """
name = "nano"
seed = 5
[model]
preset = "v3-nano"
[task]
name = "own_tasks.py:Traced"
[tokenizer]
vocab_size = 288
samples = 60
[cost]
dollars_per_hour = 7.2
[[stages]]
kind = "pretrain"
tokens = 4_500
batch_tokens = 500
save_every = 2
[[stages]]
kind = "grpo"
steps = 5
problems = 3
group_size = 4
max_tokens = 10
save_every = 2
[[stages]]
kind = "eval"
n = 6
max_tokens = 10
"""
SAVE_EVERY = 2
_PRELOAD = ["jevons.terminal.run", "jevons.terminal.checkpoint", "jevons.reason.pipeline", "torch.utils.tensorboard",
            "torch._dynamo"]  # every optimizer imports it


def write_recipe(directory: Path, text: str = RECIPE) -> Path:
    """A recipe that names its task relative to itself, beside that task's file."""
    (directory / "own_tasks.py").write_text((TESTS / "own_tasks.py").read_text())
    path = directory / "nano.toml"
    path.write_text(text)
    return path


def _child(argv: list[str], log: Path, patch: Callable[[], None] | None) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    faulthandler.register(signal.SIGUSR1, file=2)
    if patch is not None:
        patch()
    sys.argv = ["jevons", *argv]
    from jevons.cli import main

    main()


class Command:
    """`jevons ARGV` in a process of its own; `patch` is called in it before."""

    def __init__(self, *argv: object, log: Path, patch: Callable[[], None] | None = None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self.log = log
        self.process = context.Process(target=_child, args=([str(a) for a in argv], log, patch), daemon=True)
        self.process.start()

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, condition: Callable[[], object]) -> bool:
        """Wait until `condition()`; False if the process ended before."""
        while not condition():
            if not self.process.is_alive():
                return bool(condition())
            time.sleep(0.001)
        return True

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> int:
        """The exit code, once there is one."""
        self.process.join(60)
        if self.process.exitcode is None:
            self.send(signal.SIGUSR1)  # where is it?
            self.process.join(1)
            self.process.kill()
            pytest.fail(f"the command did not end; it said:\n{self.text}")
        return self.process.exitcode


def jevons(*argv: object, log: Path, patch: Callable[[], None] | None = None) -> tuple[int, str]:
    """Run a command to its end: (exit code, what it printed)."""
    command = Command(*argv, log=log, patch=patch)
    return command.end(), command.text


def metrics(out: Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path = out / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def timeless(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith("time.")} for line in lines]


def last_step(out: Path, stage: str) -> int:
    return max((line["step"] for line in metrics(out) if line["kind"] == "step" and line["stage"] == stage), default=0)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
