r"""Which rows are kept here though others own them, and which are worth keeping."""

import numpy as np
from numba import njit

from partpar.kernels.counter import mix


@njit(nogil=True, cache=True)
def expected_draws(indptr: np.ndarray, indices: np.ndarray, draws: np.ndarray) -> None:
    """Adds to each source how often one neighbour drawn for every destination is it."""
    for i in range(indptr.shape[0] - 1):
        low, high = indptr[i], indptr[i + 1]
        for e in range(low, high):
            draws[indices[e]] += 1.0 / (high - low)


@njit(nogil=True, cache=True)
def split_kept(
    table: np.ndarray,
    limit: int,
    ids: np.ndarray,
    order: np.ndarray,
    local: np.ndarray,
    counts: np.ndarray,
    own: int,
    slots: np.ndarray,
    places: np.ndarray,
) -> int:
    """Takes what is kept out of a request that was sorted by owner.

    Args:
        table: Numbers of the ids that are kept, see :mod:`partpar.kernels.relabel`.
        limit: Only numbers below it count.
        ids: ``[n]``, the request.
        order: Places in it, sorted by owner, those of :obj:`own` last; what is kept is moved out.
        local: The owners' rows, likewise.
        counts: How many each owner has; made smaller.
        own: This part.
        slots: ``[n]``, to hold the numbers of what is kept.
        places: ``[n]``, to hold their places in the request.

    Returns:
        How many are kept.
    """
    mask = table.shape[0] - 1
    num_kept, start, to = 0, 0, 0
    for part in range(counts.shape[0]):
        if part == own:
            continue
        left = 0
        for i in range(start, start + counts[part]):
            key = ids[order[i]]
            slot = np.int64(mix(np.uint64(key))) & mask
            while table[slot, 0] != -1 and table[slot, 0] != key:
                slot = (slot + 1) & mask
            if table[slot, 0] != -1 and table[slot, 1] < limit:
                slots[num_kept], places[num_kept] = table[slot, 1], order[i]
                num_kept += 1
            else:
                order[to], local[to] = order[i], local[i]
                to += 1
                left += 1
        start += counts[part]
        counts[part] = left
    return num_kept
