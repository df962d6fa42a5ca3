"""What is done with one checkpoint: evaluate, serve, describe."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from jevons.terminal.beside import Beside, StopSignal, context_that_fits, use_threads

MAPPED_FROM = 2**30  # bytes


def _trained_task(provenance: dict[str, Any], name: str | None = None, args: dict[str, Any] | None = None) -> Any:
    """The task named, or the one the checkpoint was trained on. Raises ValueError where there is neither."""
    from jevons.tasks.registry import load_task, portable_name

    trained = provenance.get("task") or {}
    name = portable_name(name) if name else trained.get("name")
    if name is None:
        raise ValueError("the checkpoint does not say which task it was trained on; give --task")
    own = trained.get("args", {}) if trained.get("name") == name else {}
    return load_task(name, own | (args or {}))


def known_task(provenance: dict[str, Any]) -> Any:
    """The task the checkpoint was trained on; None for a foreign one, which was taught something we do not know."""
    with contextlib.suppress(ValueError):
        return _trained_task(provenance)


def evaluate_checkpoint(checkpoint: Path, task: str | None, numbers: int | None, n: int, seed: int, samples: int,
                        temperature: float, max_tokens: int, as_json: bool, dump: Path | None, weights: str | None,
                        device: str = "cpu", gpu_experts: float | None = None) -> None:
    if dump is not None and not dump.resolve().parent.is_dir():
        raise ValueError(f"--dump {dump}: there is no directory {dump.parent}")
    use_threads(device)
    loaded = open_checkpoint(checkpoint, weights, device, gpu_experts)
    the_task = _trained_task(loaded.provenance, task, {"numbers": numbers} if numbers is not None else None)
    from jevons.reason.evaluate import evaluate

    console = Console(stderr=True)
    with console.status(f"{n} problems"):
        result, _ = evaluate(loaded.model, loaded.tokenizer, the_task, n, seed, max_tokens, samples, temperature, dump=dump)
    if as_json:
        said = {"checkpoint": str(checkpoint), "task": the_task.name, "seed": seed} | ({"weights": weights} if weights else {})
        print(json.dumps(said | result.record()))
        return
    rows = [("pass@1", result.accuracy, result.low, result.high)]
    if result.pass_at_k is not None:
        rows += [(f"cons@{samples}", result.cons_at_k, result.cons_low, result.cons_high),
                 (f"pass@{samples}", result.pass_at_k, result.pass_low, result.pass_high)]
    for name, share, low, high in rows:
        print(f"{name:<16} {share:.1%}  (95 % interval {low:.1%} to {high:.1%}, {n} problems)")
    print(f"thinking tokens  {result.thinking_length:.1f}\ntruncated        {result.truncated:.1%}")
    if result.mtp_acceptance is not None:
        print(f"MTP accepted     {result.mtp_acceptance:.1%}")


def serve_checkpoint(checkpoint: Path, host: str, port: int, max_batch: int, max_waiting: int, dollars_per_hour: float,
                     allow_hosts: list[str], api_key: str | None, max_thinking_tokens: int | None, closing_words: str | None,
                     weights: str | None, speculate: int | None, disk_cache: Path | None, disk_gib: float,
                     deterministic: bool, pace: float = 0.0, device: str = "cpu", gpu_experts: float | None = None) -> None:
    use_threads(device)
    loaded = open_checkpoint(checkpoint, weights, device, gpu_experts)
    task, disk, root = known_task(loaded.provenance), None, b""
    if disk_cache is not None:
        from jevons.engine.disk import DiskTier
        from jevons.store.checkpoint import fingerprint

        disk = DiskTier(disk_cache, int(disk_gib * 2**30))
        root = fingerprint(checkpoint, str(weights), *([device] if device != "cpu" else []))
    console = Console(stderr=True)
    with StopSignal() as stop:
        taught = loaded.provenance.get("taught") or loaded.config.architecture
        beside = Beside((host, port), dollars_per_hour, task, taught, None, max_waiting, allow_hosts, api_key,
                        max_thinking_tokens, closing_words)
        if (room := context_that_fits(loaded.config, max_batch, loaded.model)) < loaded.config.max_position_embeddings:
            where = "the GPU's" if device == "cuda" else "this machine's"
            console.print(f"context {room} of the model's {loaded.config.max_position_embeddings} tokens: what {where} memory "
                          f"holds for {max_batch} requests at once; fewer (--max-batch) can be longer")
        beside.show(loaded.model, loaded.tokenizer, loaded.provenance.get("recipe") or checkpoint.resolve().name, max_batch,
                    speculate=speculate, deterministic=deterministic, pace=pace, disk=disk, root=root)
        console.print(f"[bold]serving[/] {checkpoint} at {beside.server.url}/  (API: {beside.server.url}/v1, Ctrl-C ends it)")
        beside.run_forever(stop)


def describe(checkpoint: Path | None) -> dict[str, Any]:
    """`jevons info`: the machine, or a checkpoint."""
    from jevons.runtime import Runtime

    if checkpoint is None:
        return Runtime.detect().describe() | _describe_speed()
    from jevons.config import ModelConfig
    from jevons.plan import count_parameters, kv_bytes_per_token
    from jevons.store.checkpoint import check_tensors, read_provenance

    config = ModelConfig.load(checkpoint)
    check_tensors(checkpoint, config)
    counts = asdict(count_parameters(config))
    total = counts["total"] + counts["router_biases"]
    values: dict[str, Any] = {"architecture": config.architecture, "layers": config.num_hidden_layers,
                              "hidden size": config.hidden_size, "vocabulary": config.vocab_size,
                              "context": config.max_position_embeddings, "rope scaling": _rope_in_words(config),
                              "parameters": f"{total:,}", "of these active": f"{counts['active']:,}"}
    if config.is_moe:
        values["experts"] = (f"{config.n_routed_experts} routed, {config.num_experts_per_tok} a token, "
                             f"{config.n_shared_experts} shared")
    values["MTP module"] = f"{counts['mtp']:,}" if counts["mtp"] else "none"
    values["cache bytes a token (bf16)"] = kv_bytes_per_token(config)
    values |= _describe_files(checkpoint)
    provenance = read_provenance(checkpoint)
    values |= {k: v for k, v in provenance.items() if k not in ("recipe_text", "scores", "task")}
    for score in provenance.get("scores", []):
        values[f"score of {score['name']}"] = f"{score['accuracy']:.1%} right of {score['n']} held-out problems"
    return values


def _describe_speed() -> dict[str, Any]:
    from jevons.numerics.kernels import read_rate
    from jevons.numerics.native import state
    from jevons.numerics.peak import peak_flops

    runtime = use_threads()
    rate, threads = read_rate()
    peak = peak_flops(runtime, runtime.dtype)
    return {"native kernels": state(), "memory read": f"{rate / 1e9:.1f} GB/s ({threads} thread{'s' * (threads > 1)}, 1 GiB)",
            "matrix products": f"{peak / 1e9:,.0f} GFLOP/s in {runtime.compute_dtype}, the best measured so far"}


def _rope_in_words(config: Any) -> str:
    scaling = config.rope_scaling
    if scaling is None:
        return "none"
    original = scaling["original_max_position_embeddings"]
    return f"{scaling['rope_type']}, {scaling['factor']:g} times the original {original}"


def _describe_files(checkpoint: Path) -> dict[str, Any]:
    """Precision and shards by the headers, which are checked whole; tokenizer and template."""
    from collections import Counter

    from jevons.chat import CHAT_TEMPLATE
    from jevons.data.tokenizer import Tokenizer, TokenizerError
    from jevons.store.safetensors_io import read_headers

    headers = read_headers(checkpoint)
    elements: Counter[str] = Counter()
    for info in headers.values():
        elements[info.dtype] += math.prod(info.shape)
    files = {info.file for info in headers.values()}
    size = sum(file.stat().st_size for file in files)
    values: dict[str, Any] = {"precision": [f"{dtype} {count:,}" for dtype, count in elements.most_common()],
                              "shards": f"{len(files)}, {size / 1e9:.2f} GB, {len(headers):,} tensors"}
    try:
        tokenizer = Tokenizer.load(checkpoint)
        template = "Jevons' (R1's prompt)" if tokenizer.chat_template == CHAT_TEMPLATE else "its own"
        values |= {"tokenizer": f"{tokenizer.vocab_size:,} ids", "chat template": template}
    except TokenizerError as error:
        values["tokenizer"] = f"none that can be used: {error}"
    return values


def open_checkpoint(checkpoint: Path, weights: str | None = None, device: str = "cpu", gpu_experts: float | None = None) -> Any:
    """For answering, not for training. A large one, or one in FP8, stays in its files' memory map as it is stored; a small
    one is copied: stacked experts and fused projections run faster than views. Either is then moved into huge pages, where that
    takes at most half of the free memory. `weights` packs it. On a GPU it is copied, as bf16 where it is not FP8; `gpu_experts`
    (GiB) leaves the routed experts in RAM. Raises ValueError for an unknown packing, or one that the device has nothing for."""
    from jevons.model.offload import place, watch_mapped
    from jevons.model.pack import check_kind, pack, settle
    from jevons.runtime import Runtime, available_bytes
    from jevons.store.checkpoint import load_checkpoint
    from jevons.store.safetensors_io import read_headers

    runtime = Runtime.detect(device)
    if gpu_experts is not None and device == "cpu":
        raise ValueError(f"--gpu-experts {gpu_experts:g} without a GPU; --device cuda would be right")
    if weights in ("int8", "int4") and device != "cpu" and gpu_experts is None:
        raise ValueError(f"--weights {weights} --device {device}: only experts that stay in RAM (--gpu-experts) are multiplied "
                         "as integers; bf16 or fp8 would be right")
    if weights is not None:
        check_kind(weights)
    headers = read_headers(checkpoint) if (checkpoint / "config.json").is_file() else {}
    large = sum(info.end - info.start for info in headers.values()) > MAPPED_FROM
    fp8 = any(info.dtype == "F8_E4M3" for info in headers.values())
    if device != "cpu" and gpu_experts is None and weights in (None, "bf16") and not (fp8 and weights is None):
        return load_checkpoint(checkpoint, device=device, dtype=runtime.dtype)  # stacked: a step of it can be captured
    if weights is not None:
        loaded = load_checkpoint(checkpoint, frozen=True)
        pack(loaded.model, weights, runtime.dtype)
    else:
        loaded = load_checkpoint(checkpoint, dtype=None if device == "cpu" else runtime.dtype, frozen=large or fp8)
        settled = device == "cpu" and settle(loaded.model, available_bytes() // 2)
        if large and not settled:
            watch_mapped(loaded.model)
    if device != "cpu":
        place(loaded.model, device, None if gpu_experts is None else int(gpu_experts * 2**30))
    return loaded
