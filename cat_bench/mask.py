"""Who sees whom: one predicate for chunk attention, CAT, Sparse and Figure 4. No torch.

Compact layout (cat_spec.md 1.3), N + 1 rows, drawn for C = 4 (S slot, t token row, # seen):

    row  0 S  #
    row  1 t  ##
    row  2 t  ###
    row  3 t  ####
    row  4 S  #...#          a slot sees only slots
    row  5 t  #...##         a token sees all slots so far and its own chunk
    row  6 t  #...###
    row  7 t  #...####
    row  8 S  #...#...#

Row r is a slot where r mod C == 0 and stands for token x_{r-1} elsewhere. The functions use plain
operators only, so they take NumPy arrays and torch tensors alike.
"""

import numpy as np


def sees(query_row, key_row, chunk_size: int, offset: int = 0):
    """allow(q, k) of the compact layout: slots up to q, and the rows of its own chunk up to q.

    `offset` of a chunk's slot in it: 0 in CAT, chunk_size - 1 in strided patterns.
    """
    is_slot = key_row % chunk_size == offset
    same_chunk = query_row // chunk_size == key_row // chunk_size
    return (key_row <= query_row) & (is_slot | same_chunk)


def allowed(num_rows: int, chunk_size: int) -> np.ndarray:
    """The compact mask as booleans (query row, key row); `num_rows` = tokens + 1."""
    rows = np.arange(num_rows)
    return sees(rows[:, None], rows, chunk_size)


def published_allowed(num_tokens: int, chunk_size: int) -> np.ndarray:
    """The mask of the paper's Figure 4 (B.4): [slot, C tokens] per chunk and a trailing slot.

    Rows num_tokens + num_tokens / C + 1; `num_tokens` must be a multiple of `chunk_size`. It is the
    same predicate with period C + 1, because a published block has C + 1 rows.
    """
    return allowed(num_tokens + num_tokens // chunk_size + 1, chunk_size + 1)
