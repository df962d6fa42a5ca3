"""The HTTP server beside a run, or after it, and what a signal does to both."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

CHAT_BATCH = 16


def context_that_fits(config: Any, sequences: int, model: Any = None) -> int:
    """Tokens a sequence may have, the model's own limit where half of this machine's memory holds the cache of so many
    (float32, as the engine keeps it): published models have contexts that no small machine can hold for a full batch. For a
    `model` on a GPU, of what is free there, in the model's type."""
    from jevons.plan import kv_bytes_per_token
    from jevons.runtime import Runtime

    if model is not None and model.embed_tokens.weight.device.type == "cuda":
        import torch

        room, size = torch.cuda.mem_get_info()[0] * 3 // 4, model.embed_tokens.weight.itemsize
    else:
        room, size = int(Runtime.detect().memory_gib * 2**29), 4
    tokens = room // (kv_bytes_per_token(config, size) * sequences)
    return config.max_position_embeddings if not tokens else min(config.max_position_embeddings, tokens)


def words_of(task: Any, closing_words: str | None) -> str:
    """What a thought that is closed early ends with: as the user says, else as the task's own worked solutions give up."""
    return getattr(task, "closing_words", "") if closing_words is None else closing_words


class StopSignal:
    """Ctrl-C, or SIGTERM (a machine that is taken away) once: the state is saved at the next moment that changes no number.
    Twice: stop at once; the last save stays. `code` is the exit status of either: 130 or 143."""

    def __init__(self) -> None:
        self.asked = False
        self.code = 128 + signal.SIGINT
        self.notice = "stopping after this step; once more to stop at once"
        self.on_stop = lambda: None

    def __enter__(self) -> StopSignal:
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        self.code = 128 + number
        if self.asked:
            if os.isatty(2):
                os.write(2, b"\x1b[?25h")  # the progress bar hides the cursor
            os._exit(self.code)  # saves are atomic: whatever was being written is as if it had never begun
        self.asked = True
        self.on_stop()
        os.write(2, f"\n{self.notice}\n".encode())


class Beside:
    """The HTTP server beside a run, or after it. The thread that made it owns the engine."""

    def __init__(self, address: tuple[str, int], dollars_per_hour: float, task: Any, taught: str, metrics: Path | None,
                 max_waiting: int = 128, allow_hosts: list[str] | None = None, api_key: str | None = None,
                 max_thinking_tokens: int | None = None, closing_words: str | None = None):
        from jevons.serve.app import Server, ServeSettings, create_app
        from jevons.serve.host import EngineHost
        from jevons.serve.pages import PageInfo

        self.tokenizer: Any = None
        self.training: str | None = None
        self.host = EngineHost(max_waiting=max_waiting)
        examples = getattr(task, "examples", None)
        questions = examples() if examples else []
        hashes = (hashlib.sha256(api_key.encode()).hexdigest(),) if api_key else ()
        settings = ServeSettings(host=address[0], port=address[1], dollars_per_hour=dollars_per_hour,
                                 allow_hosts=tuple(allow_hosts or ()), api_key_hashes=hashes,
                                 max_thinking_tokens=max_thinking_tokens, closing_words=words_of(task, closing_words))
        page = PageInfo(model=lambda: self.host.model_name, taught=lambda: taught, examples=lambda: questions,
                        dollars_per_hour=dollars_per_hour, training=lambda: self.training)
        self.server = Server(create_app(self.host, lambda: self.tokenizer, settings, page, metrics), settings)
        self.server.start()

    def show(self, model: Any, tokenizer: Any, name: str, max_batch: int = CHAT_BATCH, final: bool = True,
             **options: Any) -> None:
        """Answer with this model from now on. `final`: its weights stay as they are, so that prefixes may be kept. `options`
        are the engine's."""
        from jevons.engine.engine import Engine

        self.host.set_engine(None)
        self.tokenizer = tokenizer
        options = dict(prefix_cache=final, speculate=None if final else 0, pace=0.0 if final else None) | options
        self.host.set_engine(Engine(model, tokenizer.eos_id, max_batch=max_batch, max_waiting=4 * max_batch,
                                    max_len=context_that_fits(model.config, max_batch, model), tokenizer=tokenizer,
                                    **options), name)

    def run_forever(self, stop: StopSignal) -> None:
        """Serve until Ctrl-C."""
        stop.notice, stop.on_stop = "stopping; once more to stop at once", self.host.ask_to_stop
        try:
            if not stop.asked:
                self.host.run_forever()
        finally:
            self.server.stop()


def use_threads(device: str = "cpu") -> Any:
    """The runtime, with torch set to its threads (OMP_NUM_THREADS wins). The network runs on a GPU where that was asked for."""
    import torch

    from jevons.runtime import Runtime

    runtime = Runtime.detect(device)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(runtime.threads)
    return runtime
