"""Which examples make an optimizer step, and how a step is laid out in micro-batches. Numbers only:
no tensors, no tokens.

The order decides what is learned and depends on the seed alone; the layout decides only how fast,
and every layout of the same step gives the same loss and gradients (tested). So neither the device,
nor the number of ranks, nor the layout changes the experiment.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np

Rows = list[int]  # indices of examples


def steps_of_epoch(
    lengths: Sequence[int], global_batch_size: int, sort_window: int, seed: int, epoch: int
) -> list[Rows]:
    """The optimizer steps of one epoch, each a list of example indices; every example occurs
    exactly once.

    Examples are shuffled, sorted by length inside windows of `sort_window` steps and cut; then the
    steps are shuffled. Neighbours in length share a step, so that padding is rare, while the
    composition still changes from epoch to epoch. The last step may be shorter.
    """
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(lengths))
    size = np.asarray(lengths)
    window = global_batch_size * sort_window
    steps: list[Rows] = []
    for start in range(0, len(order), window):
        block = order[start : start + window]
        if sort_window > 1:
            block = block[np.argsort(size[block], kind="stable")]
        steps += [
            block[i : i + global_batch_size].tolist()
            for i in range(0, len(block), global_batch_size)
        ]
    return [steps[i] for i in generator.permutation(len(steps))] if sort_window > 1 else steps


def num_steps(num_examples: int, global_batch_size: int, sort_window: int) -> int:
    """Optimizer steps in an epoch, without building them."""
    window = global_batch_size * sort_window
    full, rest = divmod(num_examples, window)
    return full * sort_window + -(-rest // global_batch_size)


def rank_rows(rows: Rows, lengths: Sequence[int], rank: int, world_size: int) -> Rows:
    """This rank's part of a step: dealt out in order of length, so that ranks get equal work."""
    dealt = sorted(rows, key=lambda row: (-lengths[row], row))
    return dealt[rank::world_size]


def padded(rows: Rows, lengths: Sequence[int], max_tokens: int) -> list[Rows]:
    """Cut rows into micro-batches, sorted by length, whose size with padding stays within
    `max_tokens`.

    A single row longer than `max_tokens` makes a micro-batch of its own: no example is dropped.
    """
    batches: list[Rows] = []
    current: Rows = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        if current and lengths[current[0]] * (len(current) + 1) > max_tokens:
            batches.append(current)
            current = []
        current.append(row)
    return [*batches, current] if current else batches


def bins(rows: Rows, lengths: Sequence[int], capacity: int) -> list[Rows]:
    """Best-fit decreasing; where its bins are more than the tokens need by over one in a thousand,
    `closed_by_pairs` if that takes fewer.

    O(n log n); the second way n times the number of different lengths. A row longer than `capacity`
    gets a bin of its own: no example is dropped or cut.
    """
    found = best_fit(rows, lengths, capacity)
    needed = -(-sum(min(lengths[row], capacity) for row in rows) // capacity)
    if (
        len(found) - needed <= len(found) // 1000
    ):  # of a million rows, a bin or two are not worth the time
        return found
    return min(found, closed_by_pairs(rows, lengths, capacity), key=len)


def closed_by_pairs(rows: Rows, lengths: Sequence[int], capacity: int) -> list[Rows]:
    """One bin after the other: the longest row, then rows of the commonest length, and as soon as
    two rows fill it to the brim, those two.

    To fill a bin as well as may be before the next is begun is the idea of "minimum bin slack"
    (Gupta and Ho, 1999), which tries every set of rows. Here a pair is found in one operation on
    sets of lengths, the bits of a number; taking from the commonest leaves every length for the
    last bins, which are then as easily filled.
    """
    left: dict[int, Rows] = {}  # length -> the rows that have it
    for row in sorted(rows, reverse=True):
        left.setdefault(int(min(lengths[row], capacity)), []).append(row)
    sizes = sorted(left)
    counts = np.array([len(left[length]) for length in sizes])
    here, mirrored = (
        sum(1 << length for length in sizes),
        sum(1 << (capacity - length) for length in sizes),
    )
    content: list[Rows] = []
    while here:
        room = capacity
        content.append([])
        while fitting := here & ((2 << room) - 1):
            longest = fitting.bit_length() - 1
            pairs = fitting & (
                mirrored >> (capacity - room)
            )  # lengths for which the rest of the room is a length, too
            first = pairs.bit_length() - 1
            if longest == room or not content[-1]:
                chosen = [longest]
            elif pairs and (2 * first != room or len(left[first]) > 1):
                chosen = [first, room - first]
            else:
                chosen = [sizes[counts[: bisect_right(sizes, room)].argmax()]]
            for length in chosen:
                content[-1].append(left[length].pop())
                counts[bisect_left(sizes, length)] -= 1
                room -= length
                if not left[length]:
                    here, mirrored = here ^ 1 << length, mirrored ^ 1 << (capacity - length)
    return content


def best_fit(rows: Rows, lengths: Sequence[int], capacity: int) -> list[Rows]:
    """Best-fit decreasing: each row, longest first, goes into the fullest bin that still has
    room for it.
    """
    with_room: dict[
        int, list[int]
    ] = {}  # room left -> the bins that have it, a heap: the first one made comes first
    rooms: list[
        int
    ] = []  # the keys of those that are not empty, sorted: no more than there are different lengths
    content: list[Rows] = []
    sizes = [lengths[row] for row in rows]
    for place in np.lexsort(
        (np.array(rows), np.negative(sizes))
    ).tolist():  # longest first, then in the order of the rows
        row, length = rows[place], sizes[place]
        position = bisect_left(rooms, length)
        if position < len(rooms):
            room = rooms[position]
            index = heappop(with_room[room])
            if not with_room[room]:
                del rooms[position]
            content[index].append(row)
        else:
            room, index = max(capacity, length), len(content)
            content.append([row])
        if room > length:
            bins_there = with_room.setdefault(room - length, [])
            if not bins_there:
                insort(rooms, room - length)
            heappush(bins_there, index)
    return content


LAYOUTS = {"padded": padded, "bins": bins}


def computed_tokens(batches: Sequence[Rows], lengths: Sequence[int], layout: str) -> int:
    """Tokens that go through the model for these micro-batches: with padding, or in bins only
    the real ones.
    """
    if layout == "bins":
        return sum(lengths[row] for batch in batches for row in batch)
    return sum(max(lengths[row] for row in batch) * len(batch) for batch in batches)
