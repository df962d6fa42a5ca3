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
CheckpointArgument = Annotated[Path, typer.Argument(help="checkpoint directory")]


@app.command()
def up(recipe: Annotated[str, typer.Argument(help="recipe by name or path")] = "countdown-laptop", out: OutOption = None,
       port: PortOption = 8000, host: HostOption = "127.0.0.1",
       serve: Annotated[bool, typer.Option("--serve/--no-serve", help="serve the result afterwards")] = True) -> None:
    """Train a reasoning model here, watch it learn, then talk to it. Run again, it continues or serves at once."""
    from jevons.terminal.run import run_recipe

    run_recipe(recipe, out, address=(host, port), serve_after=serve)


@app.command()
def run(recipe: Annotated[str, typer.Argument(help="recipe by name or path")], out: OutOption = None,
        stage: Annotated[str | None, typer.Option("--stage", help="run only this stage")] = None) -> None:
    """Run a recipe's stages, without a server. Continues where it stopped."""
    from jevons.terminal.run import run_recipe

    run_recipe(recipe, out, only_stage=stage)


@app.command("eval")
def evaluate(checkpoint: CheckpointArgument,
             task: Annotated[str | None, typer.Option(
                 "--task", help="task by name, or file.py:Class (default: the one it was trained on)")] = None,
             numbers: Annotated[int | None, typer.Option("--numbers", help="how many numbers a Countdown problem has")] = None,
             n: Annotated[int, typer.Option("--n", min=1, help="problems")] = 1000,
             seed: Annotated[int, typer.Option("--seed", min=0, help="which problems")] = 0,
             samples: Annotated[int, typer.Option(
                 "--samples", min=1, help="answers per problem; above 1 sampled, with pass@k")] = 1,
             temperature: Annotated[float | None, typer.Option(
                 "--temperature", min=0, max=2, help="default: 0, or 1 with --samples")] = None,
             max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 512,
             as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
             dump: Annotated[Path | None, typer.Option(
                 "--dump", help="write prompts and full answers, one JSON object a line")] = None) -> None:
    """pass@1, pass@k and thinking length on problems never trained on, with 95 % intervals."""
    from jevons.terminal.checkpoint import evaluate_checkpoint

    if temperature is None:
        temperature = 0.0 if samples == 1 else 1.0
    evaluate_checkpoint(checkpoint, task, numbers, n, seed, samples, temperature, max_tokens, as_json, dump)


@app.command()
def serve(checkpoint: CheckpointArgument, port: PortOption = 8000, host: HostOption = "127.0.0.1",
          max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="requests that run at once")] = 32,
          max_waiting: Annotated[int, typer.Option("--max-waiting", min=1, help="requests that may wait; more get 429")] = 128,
          dollars_per_hour: Annotated[float, typer.Option("--dollars-per-hour", min=0, help="what this machine costs")] = 0.10,
          allow_host: Annotated[list[str] | None, typer.Option("--allow-host", help="further Host names to accept")] = None,
          api_key: Annotated[str | None, typer.Option("--api-key", envvar="JEVONS_API_KEY", help="require this key")] = None,
          ) -> None:
    """An OpenAI/DeepSeek-compatible HTTP API and a chat page."""
    from jevons.terminal.checkpoint import serve_checkpoint

    serve_checkpoint(checkpoint, host, port, max_batch, max_waiting, dollars_per_hour, allow_host or [], api_key)


@app.command()
def chat(checkpoint: CheckpointArgument,
         temperature: Annotated[float, typer.Option("--temperature", min=0, max=2)] = 0.6,
         max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 1024) -> None:
    """Talk to a checkpoint in the terminal; its thoughts stream dimmed."""
    from jevons.terminal.checkpoint import chat_with

    chat_with(checkpoint, temperature, max_tokens)


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


@app.command()
def convert(checkpoint: CheckpointArgument,
            to: Annotated[str, typer.Option("--to", help="hf (float32, as training keeps it), bf16, fp8 or gguf")],
            out: Annotated[Path | None, typer.Option("--out", help="directory or GGUF file (default: beside it)")] = None,
            gguf_type: Annotated[str | None, typer.Option("--type", help="GGUF: f16 (default), bf16, q8_0 or q4_0")] = None,
            force: Annotated[bool, typer.Option("--force", help="replace what is there")] = False) -> None:
    """A checkpoint in another precision or format: for training, transformers, FP8 inference, llama.cpp."""
    from jevons.terminal.convert import convert_checkpoint

    convert_checkpoint(checkpoint, to, out, gguf_type, force)


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
        own_words = isinstance(error, OSError) and error.filename is None and error.strerror  # ours need no "[Errno 98]"
        typer.echo(f"error: {own_words or error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
