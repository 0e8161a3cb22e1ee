"""How a batch is cut: nothing lost, little padding, even lanes, against all ways there are to cut a small one."""

import itertools

import numpy as np
import pytest

from hominem_mlx.training.cutting import Lengths, _in_all_lanes, _partitions, cut, padded


def lengths_of(groups):
    """`[(prompt, [reply, ..]), ..]`, in order."""
    prompts = np.array([prompt for prompt, replies in groups for _ in replies])
    replies = np.array([reply for _, replies in groups for reply in replies])
    opens = np.array([place == 0 for _, replies in groups for place, _ in enumerate(replies)])
    return Lengths(prompts, replies, opens)


def tokens(lengths, start, stop, pad_to=1, *, share=True):
    """What one block computes, as `rows.collate` makes it."""
    rows, replies = stop - start, lengths.replies[start:stop]
    prompts = 1 + lengths.opens[start + 1 : stop].sum()
    flat = rows * padded((lengths.prompts + lengths.replies)[start:stop].max(), pad_to)
    shared = prompts * padded(lengths.prompts[start:stop].max(), pad_to) + rows * padded(replies.max(), pad_to)
    return min(flat, shared) if share else flat


def computed(lengths, parts, lanes, pad_to=1):
    """Tokens of each lane."""
    load = np.zeros(lanes)
    for part in parts:
        if part.spread:
            load[part.lane] += (part.stop - part.start) * padded(lengths.replies[part.start : part.stop].max(), pad_to)
            load += lengths.opens[part.start] * padded(lengths.prompts[part.start], pad_to) / lanes
        else:
            load[part.lane] += tokens(lengths, part.start, part.stop, pad_to)
    return load


def drawn(seed, groups=4, replies=2, sigma=0.5):
    draw = np.random.default_rng(seed)
    rows = [(200, groups, 1), (60, groups, replies)]
    prompt, reply = (np.round(median * np.exp(sigma * draw.standard_normal((n, k)))) for median, n, k in rows)
    found = [(int(p[0]), sorted(int(one) for one in r)) for p, r in zip(prompt, reply)]
    return lengths_of(sorted(found, key=lambda group: group[0] + group[1][-1]))


def test_a_hand_worked_batch():
    # two prompts of 10 with replies of 2 and 2, one of 100 with 4: in one block 3 * 100 + 5 * 4, apart 2 * 10 + 4 * 2
    # and 100 + 4
    lengths = lengths_of([(10, [2, 2]), (10, [2, 2]), (100, [4])])
    together = cut(lengths, lanes=1, share=True, a_pass=1000)
    assert [(part.start, part.stop) for part in together] == [(0, 5)]
    apart = cut(lengths, lanes=1, share=True, a_pass=5)
    assert [(part.start, part.stop) for part in apart] == [(0, 4), (4, 5)]
    assert computed(lengths, apart, 1) == 28 + 104


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_every_row_comes_once_and_in_order(lanes, spread):
    for seed in range(20):
        lengths = drawn(seed, groups=3, replies=3)
        parts = cut(lengths, lanes=lanes, share=True, spread=spread, a_pass=10)
        assert [row for part in parts for row in range(part.start, part.stop)] == list(range(9))
        assert {part.lane for part in parts} <= set(range(lanes))
    for part in _in_all_lanes(lengths, 2, 10.0, 1)[0]:
        assert not lengths.opens[part.start + 1 : part.stop].any()  # one prompt a part


def test_partitions_are_the_cheapest_of_all():
    draw = np.random.default_rng(3)
    cost = np.triu(draw.integers(1, 100, (8, 8)).astype(float), 1)
    cost[cost == 0] = np.inf
    for number, edges in enumerate(_partitions(cost, most=7)):
        assert len(edges) == number + 1
        ways = (
            sum(cost[edge] for edge in itertools.pairwise((0, *inner, 7)))
            for inner in itertools.combinations(range(1, 7), number)
        )
        assert sum(cost[edge] for edge in edges) == min(ways)


def test_the_fullest_lane_is_near_the_least_that_any_cut_into_blocks_leaves_it():
    for seed in range(10):
        lengths = drawn(seed, groups=3)
        best = np.inf
        for number in range(6):
            for inner in itertools.combinations(range(1, 6), number):
                costs = [20 + tokens(lengths, *edge) for edge in itertools.pairwise((0, *inner, 6))]
                for lanes in itertools.product(range(2), repeat=len(costs)):
                    best = min(best, max(sum(c for c, lane in zip(costs, lanes) if lane == one) for one in range(2)))
        parts = cut(lengths, lanes=2, share=True, a_pass=20)
        passes = np.bincount([part.lane for part in parts], minlength=2)
        assert (computed(lengths, parts, 2) + 20 * passes).max() <= 1.12 * best


@pytest.mark.parametrize(("groups", "replies"), [(1, 8), (2, 2), (3, 2)])
def test_few_long_prompts_keep_every_lane_busy(groups, replies):
    for seed in range(10):
        lengths = drawn(seed, groups, replies)
        real = lengths.replies.sum() + lengths.prompts[lengths.opens].sum()
        load = computed(lengths, cut(lengths, lanes=2, share=True, spread=True, a_pass=10), 2)
        assert load.max() <= 1.15 * real / 2


@pytest.mark.parametrize(("lanes", "a_pass", "pad_to"), [(1, 64, 16), (2, 12, 1), (8, 12, 1)])
@pytest.mark.parametrize("sigma", [0.3, 0.6])
def test_three_quarters_of_the_real_tokens_are_computed_at_most(lanes, a_pass, pad_to, sigma):
    """Of batches of four pairs; real tokens are those of both texts of each pair, 0.62 without any padding."""
    done = real = 0
    for seed in range(60):
        lengths = drawn(seed, sigma=sigma)
        parts = cut(lengths, lanes=lanes, share=True, spread=True, a_pass=a_pass, pad_to=pad_to)
        done += computed(lengths, parts, lanes, pad_to).sum()
        real += (lengths.prompts + lengths.replies).sum()
    assert done / real <= 0.75
