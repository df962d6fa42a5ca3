"""What the attention kernel compiles to, for cards that are not here: needs Triton, which brings its assembler, and no GPU.

    python benchmarks/gpu_compile.py [--only 16 --target 89] [--json FILE]

For each shape of heads and each card: the tile that `triton_mla.tiles` chooses, shared memory against the card's limit,
registers, bytes spilled, and the instructions that tell whether a compile went well: Hopper's `wgmma` or `mma` for products,
`cp.async` for loads that overlap them. The arguments are specialised as a launch does it: from a call whose launch is recorded,
not made.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_common import arguments, table

from jevons.numerics import triton_mla
from jevons.numerics.paged import Heads, grouped_heads, latent_heads

HEADS = {"V3, 128 heads": latent_heads(128, 512, 64, 0.135, 1e-6), "16 heads (V2-Lite)": latent_heads(16, 512, 64, 0.135, 1e-6),
         "GQA 12/2 x 128": grouped_heads(12, 2, 128, 128**-0.5)}
CARDS = {90: ("H100", 132, 232_448), 80: ("A100", 108, 166_912), 89: ("RTX 4090", 128, 101_376)}
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64"}


class Recorder:
    """Stands in for a kernel: keeps the arguments of its launch."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: setattr(self, "call", (args, options))


def launch_of(heads: Heads, batch: int, context: int, queries: int) -> tuple[tuple, dict[str, Any]]:
    """Arguments of one decode step's launch."""
    n, pages = batch * queries, -(-context // 32)
    width = heads.plain + heads.rotary if heads.plain else 2 * heads.groups * heads.rotary
    q = torch.zeros(n, heads.heads, heads.plain + heads.rotary, dtype=torch.bfloat16)
    table_SP = torch.zeros(batch, pages, dtype=torch.long)
    starts, contexts = torch.arange(batch + 1) * queries, torch.full((batch,), context)
    kernel, joining, recorder = triton_mla._attend, triton_mla._join, Recorder()
    triton_mla._attend, triton_mla._join = recorder, Recorder()
    try:
        cells = torch.zeros(2, 32, width, dtype=torch.bfloat16)
        triton_mla.attend(heads, q, cells, table_SP, starts, contexts, contexts, queries, context)
    finally:
        triton_mla._attend, triton_mla._join = kernel, joining
    return recorder.call


def compiled(args: tuple, options: dict[str, Any], capability: int) -> dict[str, Any]:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler
    from triton.compiler import ASTSource, compile

    names = triton_mla._attend.arg_names
    signature, fixed, aligned = {}, {}, {}
    for at, name in enumerate(names):
        value = args[at] if at < len(args) else options[name]
        if at >= len(args) or (isinstance(value, int) and value == 1):
            signature[name], fixed[at,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if signature[name] not in ("constexpr", "fp32") and (isinstance(value, torch.Tensor) or value % 16 == 0):
            aligned[at,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=triton_mla._attend, signature=signature, constexprs=fixed, attrs=aligned)
    built = compile(source, target=GPUTarget("cuda", capability, 32),
                    options={k: options[k] for k in ("num_warps", "num_stages")})
    ptx, assembler = built.asm["ptx"], compiler.get_ptxas(capability)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        arch = f"sm_{capability}{'a' * (capability >= 90)}"
        command = [assembler.path, "-v", f"--gpu-name={arch}", path, "-o", path.with_suffix(".o")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def found(pattern: str) -> int:
        return int(re.search(pattern, said).group(1))

    return {"shared": built.metadata.shared, "registers": found(r"Used (\d+) registers"),
            "spilled": found(r"(\d+) bytes spill stores"), "wgmma": ptx.count("wgmma.mma"), "mma": ptx.count("mma.sync"),
            "cp.async": ptx.count("cp.async.cg")}


def main() -> None:
    args = arguments(__doc__, only="", target=0)
    if triton_mla.triton is None:
        raise SystemExit("triton is not installed; pip install triton")
    rows = []
    for capability, (card, sms, memory) in CARDS.items():
        for name, heads in HEADS.items():
            if args.only not in name or args.target not in (0, capability):
                continue
            chip, triton_mla.chip = triton_mla.chip, lambda device, sms=sms, memory=memory: (sms, memory)
            try:
                launch = launch_of(heads, 1, 4096, 1)
            finally:
                triton_mla.chip = chip
            options = launch[1]
            tile = "x".join(str(options[k]) for k in ("ROWS", "CELLS")) + f", {options['num_warps']} warps"
            rows.append({"heads": name, "card": card, "tile": tile, "limit": memory} | compiled(*launch, capability))
            if args.rehearse or args.quick:
                break
    table(rows, args)


if __name__ == "__main__":
    main()
