"""What the processes of tests/test_parallel.py run: a tiny V3 model, a fixed set of micro-batches, any layout."""

import copy
import dataclasses
import faulthandler
import multiprocessing
import os
import pickle
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from jevons.config import preset
from jevons.data.packing import pack
from jevons.model import build_model
from jevons.recipe import MeshTable, OptimizerTable
from jevons.store.run_dir import MetricsLog
from jevons.train.ema import Averaged
from jevons.train.loop import Loop, LoopSettings
from jevons.train.objective import (
    LossParts,
    Objective,
    load_metrics,
    mtp_loss,
    token_losses,
    update_router_bias,
)

VOCAB = 64


def tiny(**changes):
    return preset("v3-nano", **dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
                                    num_hidden_layers=4, n_routed_experts=8, num_experts_per_tok=3, n_group=2, topk_group=1,
                                    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
                                    max_position_embeddings=64, aux_loss_alpha=0.01) | changes)


class Random(Objective):
    """The pretraining loss on random documents that are a function of (seed, step): the same micro-batches in every layout."""

    score = ("loss", 1)  # so that the best state is none of the last

    def __init__(self, model, steps=20, micros=4, seed=0, rank=0, ranks=1):
        self.model, self.steps, self.micros, self.seed, self.rank, self.ranks = model, steps, micros, seed, rank, ranks
        self._load = None

    def next_batch(self, step):
        rng = torch.Generator().manual_seed(1000 * self.seed + step)

        def document():
            size = int(torch.randint(4, 15, (), generator=rng))
            return torch.randint(0, VOCAB, (size,), generator=rng).tolist(), [0.5] + [1.0] * (size - 1)

        batches = [short(pack([document() for _ in range(2)], 0), 3) for _ in range(self.micros)]
        for batch in batches:
            batch.share = 1 / self.micros
        self._load = None
        return [batches[self.rank :: self.ranks]]

    def loss(self, batch):
        out = self.model.forward_train(batch.tokens_N, batch.positions_N, batch.segments)
        main = token_losses(self.model, out.hidden_ND, batch.targets_N, batch.weights_N) / batch.weights_N.sum()
        second = mtp_loss(self.model, out, batch)
        loss = (main + 0.3 * second + self.model.config.aux_loss_alpha * out.balance_loss) * batch.share
        sums = {"loss": main.item() * batch.share, "mtp_loss": second.item() * batch.share,
                "balance_loss": out.balance_loss.item() * batch.share, "tokens": batch.tokens}
        return LossParts(loss, sums, out.load_RE)

    def after_update(self, load):
        self._load = load
        update_router_bias(self.model, load, 0.01)

    def metrics(self, sums):
        return dict(sums) | load_metrics(self._load)


def short(batch, padding):
    """Without most of the padding behind, which is for speed only."""
    size = sum(rows * length for rows, length in batch.segments) + padding
    return dataclasses.replace(batch, **{f.name: getattr(batch, f.name)[:size] for f in dataclasses.fields(batch)
                                         if f.name.endswith("_N")})


@dataclass
class Result:
    losses: list
    norms: list
    loads: list
    model: torch.nn.Module | None  # these are whole, on the leader
    averaged: torch.nn.Module | None  # these two only where states are saved on the way
    best: torch.nn.Module | None


def train(directory, mesh=None, world=None, dtype=torch.float64, steps=4, matrices="muon", micros=4, save_every=1000, slow=0.0,
          reads_own=False, fp8=None, recompute=False, **changes):
    """`steps` steps of one process (`mesh` None), or of this process's place in the mesh. `slow`: seconds each step waits;
    `reads_own`: the objective hands out this process's micro-batches only."""
    from jevons.train.parallel.layouts import layout
    from jevons.train.parallel.mesh import Silent

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model = build_model(tiny(**changes), seed=3, dtype=dtype)
    # far from the start: gates that choose, attention that looks
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * p.shape[-1] ** -0.5)
    objective = Random(model, steps, micros, 0, *((world.replica, mesh.replicas) if reads_own else ()))
    parallel = layout(mesh, world, "pretrain") if world is not None else None
    records = []

    def on_step(record, _):
        records.append(record)
        time.sleep(slow)

    settings = LoopSettings("test", directory, OptimizerTable(matrices=matrices, lr=1e-3, warmup_steps=2), save_every,
                            torch.float32, 1.0, fp8=fp8, recompute=recompute, on_step=on_step,
                            parallel=parallel)
    leads = world is None or world.leads
    with (MetricsLog(directory / "metrics.jsonl") if leads else Silent()) as log:
        loop = Loop(model, objective, settings, log)
        averaged = loop.objective = Averaged(objective, model, 0.7)
        loop.resume()
        loop.run()

        def whole():
            return copy.deepcopy(model) if parallel is None else parallel.gather(model)

        models = [whole(), None, None]
        if save_every < 1000:
            with averaged.applied():
                models[1] = whole()
            assert loop.states.restore_best() == loop.progress.best_step is not None
            models[2] = whole()
    return Result(*([r.get(key) for r in records] for key in ("loss", "grad_norm", "expert_load")), *models)


def difference(a, b):
    """Largest relative difference of losses, norms and every parameter (relative to its largest element)."""
    worst = 0.0
    for x, y in [*zip(a.losses, b.losses, strict=True), *zip(a.norms, b.norms, strict=True)]:
        worst = max(worst, abs(x - y) / abs(y))
    for model, other in ((a.model, b.model), (a.averaged, b.averaged), (a.best, b.best)):
        if model is None or other is None:
            continue
        others = dict(other.named_parameters())
        for name, p in model.named_parameters():
            q = others[name].detach()
            worst = max(worst, float((p.detach() - q).abs().max() / q.abs().max()))
    return worst


def layouts(tables, directory, options):
    """Every layout in turn, in one group of processes: results on the leader, by name. A table's `train` is its own options."""
    from jevons.train.parallel.mesh import World

    results = {}
    for name, values in tables.items():
        table = MeshTable(**{key: value for key, value in values.items() if key != "train"})
        world = World.open(table)
        result = train(Path(directory) / name, table, world, **options | values.get("train", {}))
        if world.leads:
            results[name] = result
        world.meet()  # the next one's directory may be this one's
    return results


def until_lost(values, directory):
    """Slow steps without end, until another process is gone."""
    from jevons.train.parallel.mesh import RankLost, World

    table = MeshTable(**values)
    world = World.open(table)
    try:
        with world.lost():
            train(directory, table, world, steps=10_000, save_every=2, slow=0.05)
    except RankLost as error:
        return str(error)


def whole_run(arguments, directory):
    """`jevons run nano.toml ...` in `directory`; the exit code."""
    from jevons.cli import main

    os.chdir(directory)
    sys.argv = ["jevons", "run", "nano.toml", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    return 0


PRELOAD = ["jevons.train.parallel.layouts", "parallel_worker", "torch.distributed.checkpoint", "torch._dynamo",
           "torch.distributed.pipelining", "jevons.terminal.run", "jevons.reason.follow"]


def _enter(rank, ranks, port, work, arguments, out):
    faulthandler.enable()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    result = work(*arguments)
    Path(out).write_bytes(pickle.dumps(result))
    if rank == 0:  # the others' meeting place is in this process (torchrun's is in its agent)
        end = time.monotonic() + 10
        while not all(Path(out).with_name(f"out-{r}").exists() for r in range(ranks)) and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.2)
    os._exit(0)  # without waiting for groups whose other ends are gone


def start(ranks, work, arguments, directory):
    """That many processes, as torchrun would start them, from a server that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    Path(directory).mkdir(parents=True, exist_ok=True)
    outs = [Path(directory) / f"out-{rank}" for rank in range(ranks)]
    processes = [context.Process(target=_enter, args=(rank, ranks, port, work, arguments, str(outs[rank])))
                 for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes, outs


def run(ranks, work, arguments, directory, timeout=280):
    """What `work(*arguments)` gave on the leader."""
    processes, outs = start(ranks, work, arguments, directory)
    end = time.monotonic() + timeout
    try:
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        assert [p.exitcode for p in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
    return pickle.loads(outs[0].read_bytes())
