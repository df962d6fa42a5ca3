"""All GPU benchmarks, one after the other, and one JSON file with their rows.

    python benchmarks/gpu_all.py [--quick] [--out gpu.json]

Each runs in a process of its own, for at most eight minutes; one that fails is reported and the others go on. The exit status
says whether all of them ended well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from gpu_common import NO_GPU

HERE = Path(__file__).resolve().parent
LIMIT = 480  # seconds of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU; its times mean nothing")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    results, failed = {}, []
    for script in sorted(p for p in HERE.glob("gpu_*.py") if p.name not in ("gpu_all.py", "gpu_common.py")):
        writes_rows = "gpu_common" in script.read_text()  # others only print, and need a GPU
        if args.rehearse and not writes_rows:
            continue
        print(f"== {script.name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            rows, status = Path(folder) / "rows.json", -1
            command = [sys.executable, script, *["--quick"] * args.quick, *["--rehearse"] * args.rehearse]
            command += ["--json", rows] if writes_rows else []
            try:
                done = subprocess.run(command, timeout=LIMIT, text=True, stdout=None if writes_rows else subprocess.PIPE)
                status = done.returncode
            except subprocess.TimeoutExpired:
                print(f"{script.name} took more than {LIMIT} s and was stopped")
            if rows.is_file():
                results[script.stem] = json.loads(rows.read_text())
            elif status == 0:
                print(done.stdout)
                results[script.stem] = {"printed": done.stdout.splitlines()}
            if status:
                failed.append(script.name)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{args.out}: {', '.join(results) or 'nothing'}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
