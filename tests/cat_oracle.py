"""CAT in its published layout (cat_spec.md 1.1 to 1.4): an oracle for tests, plain and slow.

Written from the specification alone. It shares no code with cat_bench/cat.py, which computes the
same logits with fewer rows (one per token instead of one per token and one per chunk); it only
reads the same parameter names. Rows of the decoder, for chunks of C tokens:

    [dummy, x_0 .. x_{C-1}] [f(c_0), x_C .. x_{2C-1}] ... [f(c_{K-2}), last chunk] f(c_{K-1})

A row sees the earlier slots (dummy and summaries), and the earlier rows of its own chunk. Chunks
are compressed one at a time, in a Python loop.

Shapes: b batch, t tokens, r rows, d width, h heads, e head width, v vocabulary, k chunks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

HEAD_WIDTH = 64


class Settings(NamedTuple):
    """What the shapes of the weights do not tell."""

    chunk_size: int
    rope: str  # "restart" or "growing"
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    num_kv_heads: int | None = None  # of the decoder; None: as many as query heads


class Row(NamedTuple):
    """One row of the decoder: offset 0 is the slot in front of a chunk, 1 .. C are its tokens."""

    chunk: int
    offset: int


def logits(weights: dict[str, Tensor], settings: Settings, tokens: Tensor) -> Tensor:
    """(b, t) -> (b, t, v): entry t predicts token t + 1."""
    c, num_tokens = settings.chunk_size, tokens.shape[1]
    rows = layout(num_tokens, c)
    x = torch.stack(decoder_inputs(weights, settings, tokens, rows), dim=1)  # (b, r, d)
    grows = settings.rope == "growing"
    ids = torch.tensor([row.offset + (row.chunk if grows else 0) for row in rows])
    allowed = torch.tensor([[sees(rows, q, k) for k in range(len(rows))] for q in range(len(rows))])
    for layer in range(num_layers(weights, "decoder")):
        x = block(weights, f"decoder.blocks.{layer}.", settings, x, ids, allowed)
    x = rms_norm(x, weights["decoder.norm.weight"], settings.norm_eps)
    read = [rows.index(read_row(t, c)) for t in range(num_tokens)]
    return x[:, read] @ weights["decoder.head.weight"].T


def layout(num_tokens: int, chunk_size: int) -> list[Row]:
    """The rows that `num_tokens` tokens need; the closing slot comes with the last full chunk."""
    rows = [Row(0, 0)]
    for position in range(num_tokens):
        chunk, inside = divmod(position, chunk_size)
        rows.append(Row(chunk, 1 + inside))
        if inside == chunk_size - 1:
            rows.append(Row(chunk + 1, 0))
    return rows


def sees(rows: list[Row], query: int, key: int) -> bool:
    """May row number `query` attend to row number `key`?"""
    is_slot, same_chunk = rows[key].offset == 0, rows[key].chunk == rows[query].chunk
    return key <= query and (is_slot or same_chunk)


def read_row(position: int, chunk_size: int) -> Row:
    """The row that predicts token position + 1; the last token of a chunk is never read."""
    chunk, inside = divmod(position, chunk_size)
    return Row(chunk + 1, 0) if inside == chunk_size - 1 else Row(chunk, 1 + inside)


def decoder_inputs(
    weights: dict[str, Tensor], settings: Settings, tokens: Tensor, rows: list[Row]
) -> list[Tensor]:
    """One (b, d) vector per row: dummy, summary or token embedding."""
    compressed = summaries(weights, settings, tokens)
    inputs = []
    for chunk, offset in rows:
        if offset:
            position = chunk * settings.chunk_size + offset - 1
            inputs.append(weights["decoder.embed.weight"][tokens[:, position]])
        elif chunk:
            inputs.append(compressed[chunk - 1])
        else:
            inputs.append(weights["decoder.dummy"].expand(len(tokens), -1))
    return inputs


def summaries(weights: dict[str, Tensor], settings: Settings, tokens: Tensor) -> list[Tensor]:
    """f(c_0), f(c_1), ... of the full chunks, each (b, decoder width)."""
    c = settings.chunk_size
    chunks = [tokens[:, i * c : (i + 1) * c] for i in range(tokens.shape[1] // c)]
    return [summary(weights, settings, chunk, i) for i, chunk in enumerate(chunks)]


def summary(weights: dict[str, Tensor], settings: Settings, chunk: Tensor, index: int) -> Tensor:
    """f of one chunk: (b, c) ids and the chunk's number -> (b, decoder width)."""
    position = weights["compressor.positions.weight"][index].expand(len(chunk), 1, -1)
    x = torch.cat([position, weights["compressor.embed.weight"][chunk]], dim=1)  # (b, 1 + c, d)
    ids = torch.arange(x.shape[1])
    everyone = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    multi_head = settings._replace(num_kv_heads=None)  # grouped heads are for the decoder only
    for layer in range(num_layers(weights, "compressor")):
        x = block(weights, f"compressor.blocks.{layer}.", multi_head, x, ids, everyone)
    x = rms_norm(x, weights["compressor.norm.weight"], settings.norm_eps)
    return x[:, 1:].flatten(1) @ weights["compressor.proj.weight"].T


def block(
    weights: dict[str, Tensor],
    prefix: str,
    settings: Settings,
    x: Tensor,
    ids: Tensor,
    allowed: Tensor,
) -> Tensor:
    """One pre-norm layer: attention over the allowed rows, then SwiGLU."""
    normed = rms_norm(x, weights[prefix + "attn_norm.weight"], settings.norm_eps)
    x = x + attention(weights, prefix, settings, normed, ids, allowed)
    normed = rms_norm(x, weights[prefix + "mlp_norm.weight"], settings.norm_eps)
    gate = normed @ weights[prefix + "w1.weight"].T
    up = normed @ weights[prefix + "w3.weight"].T
    return x + (gate * torch.sigmoid(gate) * up) @ weights[prefix + "w2.weight"].T


def attention(
    weights: dict[str, Tensor],
    prefix: str,
    settings: Settings,
    x: Tensor,
    ids: Tensor,
    allowed: Tensor,
) -> Tensor:
    num_heads = x.shape[-1] // HEAD_WIDTH
    num_kv_heads = settings.num_kv_heads or num_heads
    mixed = (x @ weights[prefix + "qkv.weight"].T).unflatten(-1, (-1, HEAD_WIDTH))  # (b, r, h, e)
    query, key, value = mixed.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
    if prefix + "q_norm.weight" in weights:
        query = rms_norm(query, weights[prefix + "q_norm.weight"], settings.norm_eps)
        key = rms_norm(key, weights[prefix + "k_norm.weight"], settings.norm_eps)
    query, key = (rotate(part, ids, settings.rope_base) for part in (query, key))
    outputs = []
    for head in range(num_heads):
        shared = head // (num_heads // num_kv_heads)  # the key-value head of this query head
        scores = query[:, :, head] @ key[:, :, shared].mT / HEAD_WIDTH**0.5  # (b, r, r)
        seen = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        outputs.append(seen @ value[:, :, shared])
    return torch.cat(outputs, dim=-1) @ weights[prefix + "attn_out.weight"].T


def rotate(x: Tensor, ids: Tensor, base: float) -> Tensor:
    """RoPE on (b, r, h, e), halves paired: dimension k turns with dimension k + e / 2."""
    half = HEAD_WIDTH // 2
    # float32 by specification, also for float64 rows: the tables are part of the model.
    frequencies = base ** (-2 * torch.arange(half, dtype=torch.float32) / HEAD_WIDTH)
    angles = ids.float()[:, None, None] * frequencies  # (r, 1, e / 2)
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def num_layers(weights: dict[str, Tensor], part: str) -> int:
    return len([name for name in weights if name.startswith(part) and "attn_norm" in name])
