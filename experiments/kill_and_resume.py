"""kill -9 at random moments of a tiny run: what is lost, and whether the numbers are the same afterwards.

    python experiments/kill_and_resume.py                 # 20 kills, one process
    python experiments/kill_and_resume.py --processes 4   # the same under torchrun: one rank or all of them die

One run is left alone; another is killed again and again at a random moment, and started again by the same command. Then every
line of metrics.jsonl, but for `time.*`, and the bytes of the final weights must be the same. Exit status 1 where they are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = """
name = "nano"
seed = {seed}
[model]
preset = "v3-nano"
[task]
name = "countdown"
args = {{ numbers = 3 }}
[tokenizer]
vocab_size = 288
samples = 60
[[stages]]
kind = "pretrain"
tokens = {tokens}
batch_tokens = 1000
save_every = 5
[[stages]]
kind = "grpo"
steps = {steps}
problems = 3
group_size = 4
max_tokens = 16
save_every = 2
[[stages]]
kind = "eval"
n = 20
max_tokens = 16
"""
MESH = "\n[mesh]\ndata = {processes}\n"  # the line that spreads a recipe over ranks


def command(recipe: Path, out: Path, processes: int) -> list[str]:
    program = ["-m", "jevons.cli", "run", str(recipe), "--out", str(out)]
    if processes == 1:
        return [sys.executable, *program]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *program]


def lines(out: Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path = out / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def timeless(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if not k.startswith("time.")} for record in records]


def standing(out: Path) -> tuple[str, int, int]:
    """(stage, last step logged, last step saved) of a killed run."""
    steps = [record for record in lines(out) if record["kind"] == "step"]
    if not steps:
        return "before the first step", 0, 0
    stage, step = steps[-1]["stage"], steps[-1]["step"]
    if any(r["kind"] == "stage" and r["stage"] == stage and r["event"] == "end" for r in lines(out)):
        return f"after {stage}", step, step
    directories = [d for d in out.glob(f"stages/*-{stage}") if d.is_dir()]
    if directories and (directories[0] / "provenance.json").exists():
        return stage, step, step
    saved = [int(p.name[5:]) for d in directories for p in d.glob("train_state/step-*") if p.name[5:].isdigit()]
    saved += [int(p.name[4:]) for d in directories for p in d.glob("train_state/dcp-*") if p.name[4:].isdigit()]
    return stage, step, max(saved, default=0)


def kill(process: subprocess.Popen, processes: int, rng: random.Random) -> str:
    """End it without a word: the whole group, or under torchrun one rank in every second case. What was killed."""
    if processes > 1 and rng.random() < 0.5:
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.split()
        if found:
            rank = rng.randrange(len(found))
            os.kill(int(found[rank]), signal.SIGKILL)
            try:
                process.wait(60)
                return f"rank {rank}"
            except subprocess.TimeoutExpired:
                print(f"  rank {rank} is dead, and 60 s later the job still is not")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return "all"


def start(argv: list[str], log: Path) -> subprocess.Popen:
    with open(log, "ab") as file:
        return subprocess.Popen(argv, stdout=file, stderr=file, start_new_session=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=60_000, help="of pretraining, 1,000 a step")
    parser.add_argument("--steps", type=int, default=10, help="of reinforcement learning")
    parser.add_argument("--seed", type=int, default=0, help="of the run")
    parser.add_argument("--moments", type=int, default=None, help="seed of the moments (default: another every time)")
    parser.add_argument("--dir", type=Path, default=None, help="keep both runs here")
    args = parser.parse_args()
    moments = args.moments if args.moments is not None else random.SystemRandom().randrange(2**31)
    rng = random.Random(moments)
    home = args.dir or Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    home.mkdir(parents=True, exist_ok=True)
    recipe = home / "nano.toml"
    recipe.write_text(RECIPE.format(seed=args.seed, tokens=args.tokens, steps=args.steps)
                      + (MESH.format(processes=args.processes) if args.processes > 1 else ""))
    alone, killed = home / "alone", home / "killed"

    process = start(command(recipe, alone, args.processes), home / "alone.log")
    while process.poll() is None and not (alone / "recipe.toml").exists():
        time.sleep(0.01)
    began = time.monotonic()
    if process.wait():
        print((home / "alone.log").read_text(errors="replace")[-2000:])
        return 1
    length = time.monotonic() - began
    print(f"left alone: {length:.1f} s after its start, {sum(r['kind'] == 'step' for r in lines(alone))} steps; "
          f"moments of seed {moments}")
    print(f"{'kill':>4} {'after':>8}  {'what':<7} {'stage':<22} {'logged':>6} {'saved':>6} {'lost':>5}")
    worst = done = 0
    for number in range(1, args.kills + 1):
        born = time.time()
        process = start(command(recipe, killed, args.processes), home / "killed.log")
        pause = rng.uniform(0, 2 * length / args.kills)  # from when it holds the directory: its imports are no progress
        while process.poll() is None and not (killed / "lock").exists():
            time.sleep(0.005)
        while process.poll() is None and str(process.pid) not in (killed / "lock").read_text() and args.processes == 1:
            time.sleep(0.005)
        while number % 3 and process.poll() is None and not any(r.get("time.unix", 0) > born for r in lines(killed)[-3:]):
            time.sleep(0.005)  # two of three have made a step of their own; the third may be killed while it still begins
        time.sleep(pause)
        if process.poll() is not None:
            if process.returncode:
                print((home / "killed.log").read_text(errors="replace")[-2000:])
                return 1
            done += 1
            print(f"{number:>4} {pause:>7.2f}s  {'-':<7} it had ended before")
            continue
        what = kill(process, args.processes, rng)
        stage, logged, saved = standing(killed)
        worst = max(worst, logged - saved)
        print(f"{number:>4} {pause:>7.2f}s  {what:<7} {stage:<22} {logged:>6} {saved:>6} {logged - saved:>5}", flush=True)
    process = start(command(recipe, killed, args.processes), home / "killed.log")
    if process.wait():
        print((home / "killed.log").read_text(errors="replace")[-2000:])
        return 1
    same_lines = timeless(lines(alone)) == timeless(lines(killed))
    digests = [hashlib.sha256((out / "final" / "model.safetensors").read_bytes()).hexdigest() for out in (alone, killed)]
    left = [str(p.relative_to(killed)) for p in killed.rglob("*")
            if ".tmp-" in p.name or p.name in (".unfinished", "train_state")]
    print(f"\nkilled {args.kills - done} times; at most {worst} steps were made again")
    print(f"metrics but time.*   {'the same' if same_lines else 'NOT the same'}, {len(lines(alone))} lines")
    print(f"final weights        {'the same' if digests[0] == digests[1] else 'NOT the same'}, sha256 {digests[1][:16]}")
    print(f"left behind          {', '.join(left) or 'nothing'}")
    return 0 if same_lines and digests[0] == digests[1] and not left else 1


if __name__ == "__main__":
    sys.exit(main())
