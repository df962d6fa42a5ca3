"""Which tokens every sequence holds: proportions, order, epochs, ranks, masks, the middle filled in; and training on them."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import lively, nano, plain_logits

from jevons.data.packing import pack, weight_totals
from jevons.data.prepare import open_data, tokenizer_for
from jevons.data.sources import DataError
from jevons.data.stream import Part, Stream, deal, mix, permute
from jevons.data.tokenizer import train_tokenizer
from jevons.recipe import DataTable, PretrainStage
from jevons.train.pretrain import Pretrain

EOS, FIM = 1, (500, 501, 502)


class Memory:
    """What a stream needs of shards: documents of distinct ids over 1000, each followed by eos."""

    def __init__(self, lengths):
        self.documents, following = [], 1000
        for n in lengths:
            self.documents.append([*range(following, following + n - 1), EOS])
            following += n
        self.flat = np.array([i for d in self.documents for i in d])
        self.ends_D = np.cumsum(lengths)
        self.total = len(self.flat)

    def tokens(self, low, high):
        assert 0 <= low < high <= self.total
        return self.flat[low:high]


def some_memory(documents=30, longest=60):
    return Memory([random.randint(2, longest) for _ in range(documents)])


# -- order ---------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_the_permutation_is_one(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_look_random_and_differ():
    size = 5000
    a, b = ([permute(i, size, key) for i in range(size)] for key in random.sample(range(2**60), 2))
    assert sum(x == y for x, y in zip(a, b, strict=True)) < 10 and sum(i == x for i, x in enumerate(a)) < 10
    assert abs(np.corrcoef(np.arange(size), a)[0, 1]) < 0.06 and abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.06


def test_mix_is_the_same_for_numbers_and_arrays():
    values = [random.randrange(2**64) for _ in range(50)]
    assert mix(np.array(values, np.uint64)).tolist() == [mix(v) for v in values]
    assert mix(0) == 0xE220A8397B1DCDAF  # splitmix64's first output from the seed 0


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 200))
def test_sources_get_exactly_their_share(weights, start):
    total, dealt = sum(weights), Counter()
    for index in range(total * 3):
        source, before = deal(index, weights)
        assert before == dealt[source], "the n-th of a source comes before its n+1-th"
        dealt[source] += 1
        assert all(abs(dealt[k] - (index + 1) * w / total) < k + 1 for k, w in enumerate(weights))
    assert [dealt[k] for k in range(len(weights))] == [3 * w for w in weights]
    assert deal(start + 10**15 * total, weights)[0] == deal(start, weights)[0]  # nothing is counted up


def test_weights_are_exact_decimals():
    parts = [Part(some_memory(), 0, 100, 16) for _ in range(3)]
    stream = Stream(parts, [0.7, 0.2, 0.1], 0, False)
    counts = Counter(stream.place(i)[0] for i in range(10_000))
    assert [counts[k] for k in range(3)] == [7000, 2000, 1000]
    assert [Counter(Stream(parts, None, 0, False).place(i)[0] for i in range(sum(p.windows for p in parts)))[k]
            for k in range(3)] == [p.windows for p in parts]


@given(st.data())
@settings(max_examples=40)
def test_all_ranks_together_read_the_same_batch(data):
    """On any number of ranks, from any step on: the union of their slices is the one batch, no sequence twice."""
    mask, rows, seed = data.draw(st.booleans()), data.draw(st.integers(1, 24)), data.draw(st.integers(0, 99))
    texts = [Memory(data.draw(st.lists(st.integers(2, 50), min_size=1, max_size=30))) for _ in range(2)]
    parts = [Part(m, 0, m.total, 16, k, data.draw(st.sampled_from([0.0, 0.5])), FIM, EOS) for k, m in enumerate(texts)]
    streams = [Stream(parts, [0.3, 0.7], seed, mask) for _ in range(2)]
    step = data.draw(st.integers(0, 50))
    whole = streams[0].sequences(step * rows, rows)
    for ranks in data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=3)):
        slices = [streams[1].sequences(step * rows, rows, rank, ranks) for rank in range(ranks)]
        assert [slices[i % ranks][i // ranks] for i in range(rows)] == whole
        assert sum(map(len, slices)) == rows
    assert streams[1].sizes(step * rows, rows) == [len(ids) for sequence in whole for ids, _ in sequence]


def test_an_epoch_has_every_token_as_a_target_once_and_the_next_another_order():
    memory = some_memory()
    part = Part(memory, 0, memory.total, 16)
    stream = Stream([part], None, random.randrange(99), False)
    orders = []
    for epoch in range(3):
        order = [stream.place(epoch * part.windows + i) for i in range(part.windows)]
        assert {e for _, _, e in order} == {epoch}
        orders.append([w for _, w, _ in order])
        seen = [i for n in range(part.windows) for ids, _ in stream.sequences(epoch * part.windows + n, 1)[0] for i in ids[1:]]
        assert Counter(seen) == Counter(memory.flat[1:].tolist())
    assert orders[0] != orders[1] != orders[2] and all(sorted(o) == list(range(part.windows)) for o in orders)
    other = Stream([part], None, stream.seed + 1, False)
    assert [other.place(i)[1] for i in range(part.windows)] != orders[0]


# -- documents and masks -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 50), min_size=1, max_size=40), st.integers(4, 30))
def test_with_a_mask_a_window_is_cut_where_documents_end(lengths, length):
    memory = Memory(lengths)
    part = Part(memory, 0, memory.total, length)
    text = memory.flat.tolist()
    for window in range(part.windows):
        (whole,) = part.read(window, 0, mask=False) or [([], [])]
        pieces = part.read(window, 0, mask=True)
        assert whole[0] == text[window * (length - 1) :][:length] and len(whole[0]) <= length
        cut, rest = [[]], list(whole[0])
        for i in rest:
            cut[-1].append(i)
            if i == EOS:
                cut.append([])
        assert [ids for ids, _ in pieces] == [c for c in cut if len(c) > 1]
        assert part.sizes(window, True) == [len(ids) for ids, _ in pieces]
        assert all(w == [1.0] * len(ids) for ids, w in pieces)


def test_a_part_of_the_tokens_cuts_its_first_and_last_document():
    memory = some_memory()
    low, high = sorted(random.sample(range(1, memory.total), 2))
    for a, b in ((0, low), (low, high), (high, memory.total)):
        for rate in (0.0, 1e-9):
            part = Part(memory, a, b, 16, 7, rate, FIM, EOS)
            read = [i for w in range(part.windows) for ids, _ in part.read(w, 0, False) for i in ids[w > 0 :]]
            assert b - a == 1 or read == memory.flat[a:b].tolist()


def undo(ids):
    """The document (or piece of one) that `begin prefix hole suffix end middle eos` was, and its parts' lengths."""
    hole, end = ids.index(FIM[1]), ids.index(FIM[2])
    assert ids[0] == FIM[0] and ids[-1] == EOS
    prefix, suffix, middle = ids[1:hole], ids[hole + 1 : end], ids[end + 1 : -1]
    return prefix + middle + suffix, (len(prefix), len(suffix), len(middle))


def fim_units(part, epoch=0):
    """All of a part's stream, cut where something new begins."""
    stream = [i for w in range(part.windows) for ids, _ in part.read(w, epoch, False) for i in ids[w > 0 :]]
    assert len(stream) == part.total
    cuts = [*part.at_U[:-1][part.opens_U].tolist(), part.total]
    return [stream[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


def test_documents_are_rearranged_whole_and_the_rest_stay():
    memory, key = Memory([random.randint(2, 90) for _ in range(2000)]), random.randrange(2**64)
    part = Part(memory, 0, memory.total, 100, key, 0.1, FIM, EOS)  # no document longer than a piece
    units = fim_units(part)
    assert len(units) == 2000
    changed = [u for u in units if u[0] == FIM[0]]
    assert 140 < len(changed) < 260  # 200 +- 4.5 sigma
    assert [[*undo(u)[0], EOS] if u[0] == FIM[0] else u for u in units] == memory.documents
    shapes = np.array([undo(u)[1] for u in changed]) / np.array([[len(u) - 4] for u in changed])
    assert np.allclose(shapes[[len(u) > 30 for u in changed]].mean(0), 1 / 3, atol=0.12)  # uniform split points
    again = fim_units(Part(memory, 0, memory.total, 100, key, 0.1, FIM, EOS))
    assert again == units
    later = fim_units(part, epoch=1)
    assert [u[0] == FIM[0] for u in later] == [u[0] == FIM[0] for u in units] and later != units
    assert [len(u) for u in later] == [len(u) for u in units]
    assert fim_units(Part(memory, 0, memory.total, 100, key + 1, 0.1, FIM, EOS)) != units


def test_long_documents_are_rearranged_in_pieces_that_fit_a_row():
    memory, length = Memory([random.randint(2, 300) for _ in range(60)]), random.randint(16, 40)
    part = Part(memory, 0, memory.total, length, 3, 0.4, FIM, EOS)
    units = fim_units(part)
    changed = [u for u in units if u[0] == FIM[0]]
    assert len(changed) > 20 and max(map(len, changed)) <= length
    text = []
    for u in units:
        text += undo(u)[0] if u[0] == FIM[0] else [i for i in u if i != EOS]
    assert text == [i for i in memory.flat.tolist() if i != EOS]
    for window in range(part.windows):
        assert [len(ids) for ids, _ in part.read(window, 0, True)] == part.sizes(window, True)


# -- a recipe's data -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(data table's sources, tokenizer with fim tokens)."""
    home, rng = tmp_path_factory.mktemp("corpus"), random.Random(5)
    words = ["sun", "moon", "rain", "wind", "sea", "hill", "ähre"]
    for name in "ab":
        (home / f"{name}.txt").write_text("\n\n".join(" ".join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(80)))
    sources = [dict(path=str(home / f"{name}.txt"), separator="\n\n") for name in "ab"]
    table = DataTable(sources=sources, fim_rate=0.3)
    return sources, tokenizer_for(table, 288, 100, home / "data"), home


def opened(corpus, tmp_path, **options):
    sources, tokenizer, _ = corpus
    table = DataTable(**dict(sources=sources, seq_len=32, shard_tokens=1000) | options)
    return open_data(table, tokenizer, tmp_path / "data", 3)


def test_what_is_held_out_is_never_trained_on(corpus, tmp_path):
    stream, documents = opened(corpus, tmp_path, validation=0.2, validation_tokens=10**6)
    train = [part.shards.tokens(int(part.starts_U[0]), int(part.ends_U[-1])) for part in stream.parts]
    assert [len(t) for t in train] == [p.shards.total - int(p.shards.total * 0.2) for p in stream.parts]
    assert sum(len(ids) - 1 for ids, _ in documents) == sum(int(p.shards.total * 0.2) - 1 for p in stream.parts)
    held = [p.shards.tokens(len(t), p.shards.total).tolist() for p, t in zip(stream.parts, train, strict=True)]
    assert documents[0][0] == held[0][:32]
    few = opened(corpus, tmp_path, validation=0.2, validation_tokens=64)[1]
    assert [d[0] for d in few] == [held[0][:32], held[1][:32]]
    assert opened(corpus, tmp_path, validation=0.0)[1] == []
    own = opened(corpus, tmp_path, validation=[corpus[0][1]], mask="document")
    assert own[0].parts[0].total == own[0].parts[0].shards.total and len(own[1]) > 80


def test_shards_made_before_are_a_source(corpus, tmp_path):
    stream, _ = opened(corpus, tmp_path)
    sources = [dict(path=str(tmp_path / "data" / f"source-0{k}")) for k in range(2)]
    again, _ = open_data(DataTable(sources=sources, seq_len=32), corpus[1], tmp_path / "unused", 3)
    assert again.sequences(40, 8) == stream.sequences(40, 8) and not (tmp_path / "unused").exists()
    tokenizer = tokenizer_for(DataTable(sources=sources), 288, 100, tmp_path / "unused")
    assert tokenizer.fingerprint == corpus[1].fingerprint
    with pytest.raises(DataError, match=r"source-00: its tokenizer has 288 ids, and the recipe's .* vocab_size is 512"):
        tokenizer_for(DataTable(sources=sources), 512, 100, tmp_path / "unused")
    with pytest.raises(DataError, match=r"source-00: \d+ tokens to train on are less than one row of data.seq_len 100000"):
        open_data(DataTable(sources=sources, seq_len=100_000), corpus[1], tmp_path / "unused", 3)
    plain = train_tokenizer(["sun"] * 3, 288)
    with pytest.raises(DataError, match="fim_rate is 0.1, but the tokenizer has no fim tokens"):
        open_data(DataTable(sources=sources, fim_rate=0.1), plain, tmp_path / "unused", 3)


# -- training ------------------------------------------------------------------------------------------------------------


def pretrain(corpus, stream, validation=(), rank=0, ranks=1, model=None, **stage):
    model = model or lively(nano(vocab_size=288))
    values = PretrainStage(**dict(kind="pretrain", tokens=2560, batch_tokens=256) | stage)
    return Pretrain(model, corpus[1], None, values, 0, stream, validation, 3, rank, ranks)


def flat(batch):
    return (batch.tokens_N.tolist(), batch.positions_N.tolist(), batch.weights_N.tolist(), batch.segments)


@pytest.mark.parametrize("mask,mtp_weight", [("none", 0.3), ("document", 0.3), ("document", 0.0)])
def test_ranks_micro_batches_add_up_to_one_process(corpus, tmp_path, mask, mtp_weight):
    stream, _ = opened(corpus, tmp_path, mask=mask, fim_rate=0.3)
    # no balance loss: the MTP router's counts a row's last token, which is fed the next row's first
    model = lively(nano(vocab_size=288, aux_loss_alpha=0.0)).double()

    def gradients(objectives, step):
        model.zero_grad()
        sums = Counter()
        for objective in objectives:
            for batch in objective.next_batch(step)[0]:
                parts = objective.loss(batch)
                parts.loss.backward()
                sums.update(parts.sums)
        return sums, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    step = random.randrange(100)
    one = pretrain(corpus, stream, model=model, mtp_weight=mtp_weight)
    whole, grads = gradients([one], step)
    for micro, ranks in ((64, 1), (64, 4), (128, 3)):
        values = dict(micro_batch_tokens=micro, mtp_weight=mtp_weight)
        objectives = [pretrain(corpus, stream, (), r, ranks, model, **values) for r in range(ranks)]
        micros = objectives[0]._micros(0)
        assert micros == -(-256 // micro // ranks) * ranks
        single = pretrain(corpus, stream, model=model, micro_batch_tokens=micro)
        if single._micros(0) == micros:
            wanted = [flat(b) for b in single.next_batch(step)[0]]
            assert [[flat(b) for b in o.next_batch(step)[0]] for o in objectives] == [wanted[r::ranks] for r in range(ranks)]
        for key in ("share", "mtp_share", "row_share"):
            assert sum(getattr(b, key) for o in objectives for b in o.next_batch(step)[0]) == pytest.approx(1, rel=1e-12)
        sums, other = gradients(objectives, step)
        for key, value in whole.items():
            assert sums[key] == pytest.approx(value, rel=5e-3 if mtp_weight and key == "balance_loss" else 1e-9), key
        for a, b in zip(grads, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(a.abs().max() + 1e-3))


def test_ranks_share_traces_too(corpus):
    class Task:
        def sample(self, rng):
            return type("Problem", (), {"prompt": str(rng.randrange(10**6))})()

        def trace(self, problem, rng):
            return problem.prompt * rng.randint(1, 3)

    model = lively(nano(vocab_size=288))
    make = lambda r, n: Pretrain(model, corpus[1], Task(), PretrainStage(  # noqa: E731
        kind="pretrain", tokens=5000, batch_tokens=1000, micro_batch_tokens=250), 0, rank=r, ranks=n)
    step = random.randrange(99)
    whole = make(0, 1).next_batch(step)[0]
    assert len(whole) == 4
    for ranks in (2, 4):
        parts = [make(r, ranks).next_batch(step)[0] for r in range(ranks)]
        assert [[flat(b) for b in p] for p in parts] == [[flat(b) for b in whole[r::ranks]] for r in range(ranks)]
        assert [[b.share for b in p] for p in parts] == [[b.share for b in whole[r::ranks]] for r in range(ranks)]
    with pytest.raises(ValueError, match="does not give 500 processes one each"):
        make(0, 500).next_batch(step)


def test_too_few_rows_are_refused(corpus, tmp_path):
    stream, _ = opened(corpus, tmp_path)
    with pytest.raises(ValueError, match="a batch of 8 rows does not give 9 micro-batches on 9 processes a row each"):
        pretrain(corpus, stream, ranks=9)


def test_without_a_mask_documents_see_each_other_and_with_one_not(corpus, tmp_path):
    """In logits: of a document behind another in its row, and of the same alone."""
    model, eos = lively(nano(vocab_size=288)), corpus[1].eos_id
    for mask in ("none", "document"):
        stream, _ = opened(corpus, tmp_path, mask=mask)
        part = stream.parts[0]
        window = next(i for i in range(part.windows - 1) if len(r := part.read(i, 0, True)) > 1 and len(r[-1][0]) > 5)
        row = part.read(window, 0, True)
        batch = pack(part.read(window, 0, mask == "document"), corpus[1].pad_id, len(row))
        with torch.no_grad():
            hidden = model.forward_train(batch.tokens_N, batch.positions_N, batch.segments, mtp=False).hidden_ND
            logits = model.logits(hidden)
        last = row[-1][0]
        alone = plain_logits(model, last)
        start = 32 - len(last) if mask == "none" else batch.order.index(len(row) - 1) * batch.segments[0][1]
        there = slice(start, start + len(last))
        assert batch.tokens_N[there].tolist() == last
        assert torch.allclose(logits[there], alone, atol=1e-4) == (mask == "document")
        assert batch.positions_N[there].tolist() == [i + start * (mask == "none") for i in range(len(last))]
        if mask == "none":
            assert batch.tokens_N[start - 1] == eos and batch.weights_N[start - 1] == 1


def test_validation_is_the_mean_over_its_tokens(corpus, tmp_path):
    stream, documents = opened(corpus, tmp_path, validation=0.1, mask="document")
    model = lively(nano(vocab_size=288))
    objective = pretrain(corpus, stream, documents, model=model)
    losses, seconds, size = [], [], 0
    with torch.no_grad():
        for ids, _ in documents:
            out = model.forward_train(torch.tensor(ids), torch.arange(len(ids)), [(1, len(ids))])
            for hidden, ahead, into in ((out.hidden_ND, 1, losses), (out.mtp_hidden_ND, 2, seconds)):
                rows = model.logits(hidden).log_softmax(-1)
                into += [-rows[i, ids[i + ahead]].item() for i in range(len(ids) - ahead)]
            size += len(corpus[1].decode(ids[1:], skip_special=True).encode())
    values = objective.validate()
    assert values["val_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert values["val_mtp_loss"] == pytest.approx(sum(seconds) / len(seconds), rel=1e-4)
    assert values["val_bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / size, rel=1e-4)
    sums = {"tokens": 1, "loss": 0.0, "mtp_loss": 0.0, "balance_loss": 0.0}
    said = []
    for step in range(objective.steps):
        objective.next_batch(step)
        said.append("val_loss" in objective.metrics(sums))
    assert said == [step % 3 == 2 or step == 9 for step in range(10)]
    assert objective.scores() == values and weight_totals(documents)[0] == len(losses)
    other = pretrain(corpus, stream, documents, model=model)
    other.load_state_dict(objective.state_dict())
    assert other.scores() == values
