"""The commands. Everything heavy is imported inside them, so that `jevons --help` is instant."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="jevons", no_args_is_help=True, add_completion=False, rich_markup_mode=None,
                  pretty_exceptions_enable=False,
                  help="Bring a verifier, get a reasoner: train, serve and price DeepSeek-V3/R1-style models.")

OutOption = Annotated[Path | None, typer.Option("--out", help="run directory (default: runs/RECIPE)")]
PortOption = Annotated[int, typer.Option("--port", min=0, max=65535, help="port on this machine; 0 takes a free one")]
HostOption = Annotated[str, typer.Option("--host", help="address to bind; other machines reach it only if you say so")]
ThinkingOption = Annotated[int | None, typer.Option(
    "--max-thinking-tokens", min=0, help="a longer thought is closed, and the answer comes; a request may say otherwise")]
ClosingOption = Annotated[str | None, typer.Option(
    "--closing-words", help="what a thought that is closed early ends with (default: what its task says, else nothing)")]
WeightsOption = Annotated[str | None, typer.Option(
    "--weights", help="hold weights as bf16, int8, fp8 or int4 (default: as they are stored)")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda")]
GpuExpertsOption = Annotated[float | None, typer.Option(
    "--gpu-experts", min=0, help="keep routed experts in RAM, and so many GiB of the hot ones on the GPU (with --device cuda)")]
SetOption = Annotated[list[str] | None, typer.Option(
    "--set", help="KEY=VALUE in place of the recipe's own, such as data.sources.0.path=my.txt; may be repeated")]
CheckpointArgument = Annotated[Path, typer.Argument(help="checkpoint directory")]


@app.command()
def up(recipe: Annotated[str, typer.Argument(help="recipe by name or path")] = "countdown-laptop", out: OutOption = None,
       port: PortOption = 8000, host: HostOption = "127.0.0.1",
       serve: Annotated[bool, typer.Option("--serve/--no-serve", help="serve the result afterwards")] = True,
       device: DeviceOption = "cpu", sets: SetOption = None) -> None:
    """Train a reasoning model here, watch it learn, then talk to it. Run again, it continues or serves at once."""
    from jevons.terminal.run import run_recipe

    run_recipe(recipe, out, address=(host, port), serve_after=serve, device=device, sets=sets)


@app.command()
def run(recipe: Annotated[str, typer.Argument(help="recipe by name or path")], out: OutOption = None,
        stage: Annotated[str | None, typer.Option("--stage", help="run only this stage")] = None,
        device: DeviceOption = "cpu", sets: SetOption = None,
        mesh: Annotated[str | None, typer.Option(
            "--mesh", help="in place of the recipe's [mesh], such as data=2,expert=2; under torchrun")] = None) -> None:
    """Run a recipe's stages, without a server. Continues where it stopped."""
    from jevons.terminal.run import run_recipe

    run_recipe(recipe, out, only_stage=stage, device=device, sets=sets, mesh=mesh)


@app.command()
def tokenize(sources: Annotated[list[str], typer.Argument(help="files, folders, globs, or hub:OWNER/NAME[@REVISION][/GLOB]")],
             out: Annotated[Path, typer.Option("--out", help="directory of the shards")],
             tokenizer: Annotated[Path | None, typer.Option(
                 "--tokenizer", help="checkpoint directory whose tokenizer reads it")] = None,
             train_vocab: Annotated[int | None, typer.Option(
                 "--train-vocab", help="train a tokenizer of so many ids on the text instead")] = None,
             fim: Annotated[bool, typer.Option("--fim", help="with --train-vocab: give it the tokens of data.fim_rate")] = False,
             format: Annotated[str | None, typer.Option(
                 "--format", help="text, jsonl or parquet (default: by the ending)")] = None,
             key: Annotated[list[str] | None, typer.Option(
                 "--key", help="of JSONL or parquet (default: text); several are joined by newlines")] = None,
             separator: Annotated[str, typer.Option(
                 "--separator", help="between documents of a text file; \\n is a newline")] = "",
             workers: Annotated[int | None, typer.Option("--workers", min=1, help="threads (default: the cores)")] = None,
             shard_tokens: Annotated[int, typer.Option("--shard-tokens", min=1)] = 50_000_000) -> None:
    """Text to memory-mapped shards that recipes read. Run again, it goes on where it stopped; when whole, it checks them."""
    from jevons.terminal.tokenize import tokenize_sources

    tokenize_sources(sources, out, tokenizer, train_vocab, fim, dict(format=format, key=key or "text",
                     separator=separator.replace("\\n", "\n")), workers, shard_tokens)


@app.command("eval")
def evaluate(checkpoint: CheckpointArgument,
             task: Annotated[str | None, typer.Option(
                 "--task", help="task by name, or file.py:Class (default: the one it was trained on)")] = None,
             numbers: Annotated[int | None, typer.Option("--numbers", help="how many numbers a Countdown problem has")] = None,
             n: Annotated[int, typer.Option("--n", min=1, help="problems")] = 1000,
             seed: Annotated[int, typer.Option("--seed", min=0, help="which problems")] = 0,
             samples: Annotated[int, typer.Option(
                 "--samples", min=1, help="answers per problem; above 1 sampled, with pass@k and cons@k")] = 1,
             votes: Annotated[int | None, typer.Option(
                 "--votes", min=1, help="the same, said as what is wanted: the answer that most of k samples give")] = None,
             temperature: Annotated[float | None, typer.Option(
                 "--temperature", min=0, max=2, help="default: 0, or 1 with several samples")] = None,
             max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 512,
             as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
             dump: Annotated[Path | None, typer.Option(
                 "--dump", help="write prompts and full answers, one JSON object a line")] = None,
             weights: WeightsOption = None, device: DeviceOption = "cpu", gpu_experts: GpuExpertsOption = None) -> None:
    """pass@1, pass@k, cons@k and thinking length on problems never trained on, with 95 % intervals."""
    from jevons.terminal.checkpoint import evaluate_checkpoint

    if votes is not None and samples not in (1, votes):
        raise typer.BadParameter(f"--votes {votes} and --samples {samples} both say how many answers; give one of them")
    samples = votes or samples
    if temperature is None:
        temperature = 0.0 if samples == 1 else 1.0
    evaluate_checkpoint(checkpoint, task, numbers, n, seed, samples, temperature, max_tokens, as_json, dump, weights,
                        device, gpu_experts)


@app.command()
def serve(checkpoint: CheckpointArgument, port: PortOption = 8000, host: HostOption = "127.0.0.1",
          max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="requests that run at once")] = 32,
          max_waiting: Annotated[int, typer.Option("--max-waiting", min=1, help="requests that may wait; more get 429")] = 128,
          dollars_per_hour: Annotated[float, typer.Option("--dollars-per-hour", min=0, help="what this machine costs")] = 0.10,
          allow_host: Annotated[list[str] | None, typer.Option("--allow-host", help="further Host names to accept")] = None,
          api_key: Annotated[str | None, typer.Option("--api-key", envvar="JEVONS_API_KEY", help="require this key")] = None,
          max_thinking_tokens: ThinkingOption = None, closing_words: ClosingOption = None, weights: WeightsOption = None,
          speculate: Annotated[int | None, typer.Option(
              "--speculate", min=0, max=8, help="tokens that the MTP module drafts a pass (default: what pays here)")] = None,
          disk_cache: Annotated[Path | None, typer.Option(
              "--disk-cache", help="keep the cached prefixes of prompts in this directory, over restarts")] = None,
          disk_gib: Annotated[float, typer.Option("--disk-gib", min=0.001, help="at most so much of it")] = 4.0,
          deterministic: Annotated[bool, typer.Option(
              "--deterministic", help="the same text to the bit in any company; slower, no prefix cache, no drafts")] = False,
          pace: Annotated[float, typer.Option(
              "--pace", min=0, help="no token waits longer than so many lone steps; further requests wait (0: all run)")] = 0.0,
          device: DeviceOption = "cpu", gpu_experts: GpuExpertsOption = None) -> None:
    """An OpenAI/DeepSeek-compatible HTTP API and a chat page."""
    from jevons.terminal.checkpoint import serve_checkpoint

    serve_checkpoint(checkpoint, host, port, max_batch, max_waiting, dollars_per_hour, allow_host or [], api_key,
                     max_thinking_tokens, closing_words, weights, speculate, disk_cache, disk_gib, deterministic,
                     pace, device, gpu_experts)


@app.command()
def chat(checkpoint: CheckpointArgument,
         temperature: Annotated[float, typer.Option("--temperature", min=0, max=2)] = 0.6,
         max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 1024,
         max_thinking_tokens: ThinkingOption = None, closing_words: ClosingOption = None, weights: WeightsOption = None,
         device: DeviceOption = "cpu", gpu_experts: GpuExpertsOption = None) -> None:
    """Talk to a checkpoint in the terminal; its thoughts stream dimmed, and Ctrl-C in one asks for the answer."""
    from jevons.terminal.talk import chat_with

    chat_with(checkpoint, temperature, max_tokens, max_thinking_tokens, closing_words, weights, device, gpu_experts)


@app.command()
def info(checkpoint: Annotated[Path | None, typer.Argument(help="checkpoint directory; none: this machine")] = None,
         as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False) -> None:
    """What a checkpoint, or this machine, is."""
    from jevons.terminal.checkpoint import describe

    values = describe(checkpoint)
    if as_json:
        typer.echo(json.dumps(values, indent=2, ensure_ascii=False))
        return
    width = max(map(len, values))
    for key, value in values.items():
        typer.echo(f"{key:<{width}}  {', '.join(map(str, value)) if isinstance(value, list) else value}")


def _count(text: str) -> float:
    """`14.8T` -> 14.8e12."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper(), 0)
    try:
        return float(text[:-1]) * scale if scale else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number such as 300000, 4.2M or 14.8T") from None


@app.command()
def plan(model: Annotated[str, typer.Argument(
            help="published model, preset, config.json, checkpoint directory, or recipe")] = "deepseek-v3",
         gpu: Annotated[str | None, typer.Option("--gpu", help="h800, h100, h200, a100, rtx4090, m3-ultra, epyc, ...")] = None,
         gpus: Annotated[int | None, typer.Option("--gpus")] = None,
         price: Annotated[float | None, typer.Option("--price", help="dollars an hour and GPU")] = None,
         utilisation: Annotated[float | None, typer.Option("--utilisation", help="share of the bf16 peak reached (0.39)")] = None,
         tokens: Annotated[float | None, typer.Option("--tokens", parser=_count, help="to train on: 4.2M, 14.8T")] = None,
         row: Annotated[int | None, typer.Option("--row", help="tokens of a training row")] = None,
         tp: Annotated[int | None, typer.Option("--tp", help="tensor parallel")] = None,
         pp: Annotated[int | None, typer.Option("--pp", help="pipeline stages")] = None,
         dp: Annotated[int | None, typer.Option("--dp", help="data parallel replicas; in place of --gpus")] = None,
         ep: Annotated[int | None, typer.Option("--ep", help="expert parallel, within dp x tp")] = None,
         schedule: Annotated[str | None, typer.Option("--schedule", help="1f1b, zb1p, dualpipe, dualpipev")] = None,
         micro_batches: Annotated[int | None, typer.Option("--micro-batches", help="rows per pipeline and step")] = None,
         zero: Annotated[int | None, typer.Option("--zero", help="ZeRO: 0, 1, 2, 3")] = None,
         recompute: Annotated[str | None, typer.Option("--recompute", help="none, selective, full")] = None,
         train_in: Annotated[str | None, typer.Option("--train-in", help="bf16, fp8")] = None,
         serve_in: Annotated[str | None, typer.Option("--serve-in", help="weights served in bf16, fp8, q4")] = None,
         context: Annotated[int | None, typer.Option("--context", help="tokens in a user's cache")] = None,
         per_user: Annotated[float, typer.Option("--per-user", help="tokens/s that every user shall have")] = 20.0,
         as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
         html: Annotated[Path | None, typer.Option("--html", help="write a page with plots")] = None,
         published: Annotated[bool, typer.Option("--published", help="published figures beside computed ones")] = False,
         ) -> None:
    """What a model costs before anything runs: parameters, FLOPs, memory, cache, hours, dollars, serving bounds."""
    from jevons.plan.price import Options
    from jevons.terminal.plan import show_plan

    options = Options(gpu, gpus, price, utilisation, tokens, row, tp, pp, dp, ep, schedule, micro_batches, zero, recompute,
                      train_in, serve_in, context, per_user)
    show_plan(model, options, as_json, html, published)


@app.command()
def pull(repo: Annotated[str, typer.Argument(help="repository on the hub, owner/name")],
         out: Annotated[Path | None, typer.Option("--out", help="directory (default: the repository's name)")] = None,
         revision: Annotated[str, typer.Option("--revision", help="branch, tag or commit")] = "main",
         endpoint: Annotated[str | None, typer.Option("--endpoint", envvar="HF_ENDPOINT", help="another hub's address")] = None,
         ) -> None:
    """Fetch a checkpoint from a hub. Run again, it goes on where it stopped."""
    from jevons.store.hub import pull as fetch

    out = out or Path(repo.rstrip("/").rpartition("/")[2] or repo)
    fetch(repo, out, revision, endpoint, lambda line: typer.echo(line, err=True))
    typer.echo(f"{out} is whole; `jevons info {out}` says what it is")


@app.command()
def convert(checkpoint: CheckpointArgument,
            to: Annotated[str, typer.Option("--to", help="hf (float32, as training keeps it), bf16, fp8 or gguf")],
            out: Annotated[Path | None, typer.Option("--out", help="directory or GGUF file (default: beside it)")] = None,
            gguf_type: Annotated[str | None, typer.Option("--type", help="GGUF: f16 (default), bf16, q8_0 or q4_0")] = None,
            force: Annotated[bool, typer.Option("--force", help="replace what is there")] = False) -> None:
    """A checkpoint in another precision or format: for training, transformers, FP8 inference, llama.cpp."""
    from jevons.terminal.convert import convert_checkpoint

    convert_checkpoint(checkpoint, to, out, gguf_type, force)


@app.command()
def bench(model: Annotated[str, typer.Argument(help="checkpoint directory, or a random model: small, M, L")] = "small",
          what: Annotated[str, typer.Option(
              "--what", help="comma-separated: offline, single, prefill, ttft, load, prefix, speculation, deterministic")] = "",
          peers: Annotated[str, typer.Option("--peers", help="auto, none, transformers, llama.cpp")] = "auto",
          weights: Annotated[str, typer.Option("--weights", help="float32, bf16, int8, fp8, int4")] = "bf16",
          threads: Annotated[int | None, typer.Option("--threads", help="at most, for every side (default: the cores)")] = None,
          repeat: Annotated[int, typer.Option("--repeat", help="times that each side is measured, in turns")] = 3,
          requests: Annotated[int, typer.Option("--requests", help="of offline, load and deterministic")] = 64,
          prompt_tokens: Annotated[int | None, typer.Option(
              "--prompt-tokens", help="of prefill and prefix (default: 2000, or what the context holds)")] = None,
          tokens: Annotated[int, typer.Option("--tokens", help="that single decodes")] = 128,
          load_seconds: Annotated[float, typer.Option("--load-seconds", min=0, help="about how long load lasts")] = 20.0,
          prompts: Annotated[int, typer.Option("--prompts", help="of speculation")] = 200,
          drafts: Annotated[int, typer.Option("--drafts", help="of speculation, a pass")] = 1,
          directory: Annotated[Path | None, typer.Option("--dir", help="keep made models and GGUF files here")] = None,
          seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
          as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
          html: Annotated[Path | None, typer.Option("--html", help="write a page with plots")] = None) -> None:
    """How fast this engine is here, beside transformers and llama.cpp: same weights, same requests, one run."""
    from jevons.bench.run import MEASURES, Options
    from jevons.terminal.bench import show_bench

    chosen = tuple(dict.fromkeys(part.strip() for part in what.split(","))) if what else MEASURES
    show_bench(Options(model, chosen, peers, weights, threads, repeat, requests, prompt_tokens, tokens, load_seconds, prompts,
                       drafts, directory, seed), as_json, html)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        from jevons import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Errors that a person can mend are one line on stderr; anything else is a bug and shows its trace."""
    # Read when torch loads its OpenMP: threads that wait for each other give the core away after a short spin. Spinning on,
    # one busy program beside a run made its steps twenty times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except (ValueError, OSError) as error:  # every error class of bad input derives from one of these
        said = str(error)
        if isinstance(error, OSError) and error.strerror:  # without its "[Errno 98]"
            said = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
            said += "; a directory would be right" * isinstance(error, (FileExistsError, NotADirectoryError))
        typer.echo(f"error: {said}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
