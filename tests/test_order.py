"""The order beyond what a cell holds: worlds 1 to 10000, runs that change shape at every step."""
import numpy as np
import pytest

from minigpt_wb.data.batches import IGNORE_INDEX, Batches, EvalWindows
from minigpt_wb.data.order import Feistel, Order, micro_batches, rank_share, samples

WORLDS = 10_000


@pytest.mark.parametrize("count, batch_size", [(480, 1), (480, 12), (97, 5), (7, 16), (0, 4), (20_011, 2)])
def test_every_world_reads_the_same_step(count, batch_size):
    pieces = micro_batches(1000, count, batch_size)
    M = len(pieces)
    assert [c for first, n in pieces for c in range(first, first + n)] == list(range(1000, 1000 + count))
    assert all(n == batch_size for _, n in pieces[:-1])
    rng = np.random.default_rng(count)
    for world in range(1, WORLDS + 1):
        edges = M * np.arange(world + 1) // world   # closed form: share r is edges[r] to edges[r + 1]
        shares = np.diff(edges)
        assert edges[0] == 0 and edges[-1] == M and shares.min() >= 0 and np.ptp(shares) <= 1, world
        ranks = [0, world - 1, *rng.integers(0, world, 6).tolist()]
        if world <= 64 or world % 997 == 0: ranks = range(world)
        for r in ranks: assert rank_share(M, r, world) == range(edges[r], edges[r + 1]), (world, r)


def test_every_rank_of_large_worlds():
    "No closed form: the function itself, for every rank"
    for world in (1, 2, 3, 64, 997, 4096, 9999, WORLDS):
        for M in (0, 1, 7, world - 1, world, world + 1, 3 * world + 2):
            read = [m for rank in range(world) for m in rank_share(M, rank, world)]
            assert read == list(range(M)), (world, M)


def elastic_run(seed, N, epochs, largest_world):
    "Sample indices as read by a run whose world, global batch and micro-batch change at every step"
    rng, order, position, seen = np.random.default_rng(seed), Order(N, seed), 0, []
    while position < epochs * N:
        world, batch_size = int(rng.integers(1, largest_world + 1)), int(rng.integers(1, 17))
        count = min(int(rng.integers(1, 2 * N)), epochs * N - position)
        if rng.random() < 0.3: order = Order(N, seed)         # a restart: nothing but the position survives
        pieces = micro_batches(position, count, batch_size)
        for rank in range(world):
            for first, n in (pieces[m] for m in rank_share(len(pieces), rank, world)):
                seen.append(order[first:first + n])
        position += count
    return np.concatenate(seen)


@pytest.mark.parametrize("N, largest_world, seed",
                         [(1, 4, 0), (2, 5, 1), (97, 33, 2), (503, 64, 3), (4096, 7, 4), (5003, 1000, 5)])
def test_elastic_run_repeats_and_drops_nothing(N, largest_world, seed):
    epochs = 5
    seen = elastic_run(seed, N, epochs, largest_world)
    assert np.array_equal(seen, samples(np.arange(epochs * N), seed, N)), "not the order of one process"
    for epoch in np.split(seen, epochs): assert np.array_equal(np.sort(epoch), np.arange(N))


@pytest.mark.parametrize("n_tokens, T", [(1000, 8), (5000, 64)])
def test_elastic_run_reads_the_same_tokens(n_tokens, T):
    "Through Batches: the very rows, keyed by counter, and each stretch of an epoch exactly once"
    ids, rng = np.arange(n_tokens, dtype=np.uint16), np.random.default_rng(n_tokens)
    position, rows = 0, {}
    N = Batches(ids, T, 1, seed=9).n_windows
    while position < 3 * N:
        world, batch_size, count = int(rng.integers(1, 20)), int(rng.integers(1, 9)), int(rng.integers(1, 50))
        count = min(count, 3 * N - position)
        for rank in range(world):
            for batch in Batches(ids, T, batch_size, seed=9).step(position, count, rank, world):
                for b, (x, y) in enumerate(zip(batch.tokens, batch.targets)):
                    assert batch.first + b not in rows
                    assert np.array_equal(x + 1, y)
                    rows[batch.first + b] = x.copy()
        position += count
    assert list(rows) == list(range(3 * N))                   # counters in order, none missing
    alone = Batches(ids, T, 1, seed=9)
    for c, row in rows.items(): assert np.array_equal(row, alone.micro(c, 1).tokens[0])
    for e in range(3):
        read = np.sort(np.concatenate([rows[c] for c in range(e * N, (e + 1) * N)]))
        assert np.array_equal(read, np.arange(read[0], read[0] + N * T)) and read[0] < T


def test_evaluation_is_exact_in_large_worlds():
    ids = np.arange(1003, dtype=np.uint16)
    for world in (1, 2, 3, 17, 126, 1000, WORLDS):
        windows, found = EvalWindows(ids, 8, 3), []
        for rank in range(world):
            for b in windows.share(rank, world): found.append(b.targets[b.targets != IGNORE_INDEX])
        assert np.array_equal(np.concatenate(found), ids[1:]), world


def test_ten_million_samples_are_a_permutation():
    p = Feistel(10_000_000, seed=3, epoch=1)
    seen = np.zeros(p.N, dtype=bool)
    for lo in range(0, p.N, 1_000_000): seen[p(np.arange(lo, lo + 1_000_000))] = True
    assert seen.all()                                         # N values, each once


def test_positions_beyond_32_bits():
    N, far = 10**13, 10**15
    order = Order(N, seed=1)
    got = order[far:far + 100]
    assert np.array_equal(got, samples(range(far, far + 100), 1, N))
    assert len(set(got.tolist())) == 100 and got.max() < N
