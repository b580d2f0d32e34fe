"""Mamba-2: a state-space model, whose state is one fixed matrix per head (Dao and Gu, 2024).

24 layers without MLP. A layer reads u (d) and splits in_proj(u) into z, (x, B, C) and dt. A causal
convolution over the last w tokens and SiLU change (x, B, C). Then, per head, with A < 0 a scalar,

    dt_t = softplus(dt_t + dt_bias)
    S_t  = exp(dt_t A) S_{t-1} + (dt_t x_t) B_t^T              S (e, n); the heads share B and C
    y_t  = S_t C_t + D x_t
    out  = out_proj(RMSNorm(y * silu(z)))                      one RMSNorm over all heads

State: S and the last w inputs of the convolution, per layer; it does not grow with the sequence. S
and all sums of the scan are float32 in float32 and bfloat16 models, as upstream keeps them, and
float64 in float64 models, whatever autocast says. So a bfloat16 model holds 25.61 MB per sequence
where the table of evaluation_spec.md 4.4, at two bytes per element, says 13.03: its matrix part is
doubled. The inputs of the convolution have the model's dtype; w = 4 of them are kept, as upstream
does, although the next token needs three.

Weights from mamba-ssm are a rename: names and layouts inside `mixer` are those of its Mamba2 (one
group; rows of in_proj: z, x, B, C, dt; channels of conv1d: x, B, C). Around it backbone.embedding
is `embed`, backbone.layers.I `blocks.I`, backbone.norm_f `norm`, lm_head `head`.

Shapes: b batch, t tokens, d width, i inner width (expand d), h heads, e head width, n d_state,
w conv width, m conv channels (i + 2n), k chunks, c chunk size of the scan, l layers, v vocabulary.
Try it: cat-bench run efficiency -a mamba2 --quick
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_bench.architecture import Cost, Logits, NextLogits, Token, Tokens, full_label

PRESETS = {
    "mamba2-16": {"d_state": 16},
    "mamba2-32": {"d_state": 32},
    "mamba2-64": {"d_state": 64},
}
SCAN_CHUNK = 64  # tokens; moves the scan's time and memory, not its result
DT_RANGE = (1e-3, 1e-1)  # of softplus(dt_bias) at initialisation
A_RANGE = (1.0, 16.0)  # of -A at initialisation
LEAST = {"vocab_size": 2} | dict.fromkeys(
    ("width", "num_layers", "d_state", "expand", "headdim", "conv_width"), 1
)

Layer = tuple[Tensor, Tensor, Tensor]  # its output and the new state: columns, matrix
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Config:
    width: int = 1024  # D in the paper
    num_layers: int = 24
    vocab_size: int = 50_432  # GPT-2's 50,257, padded to a multiple of 256
    d_state: int = 128  # columns of S, N in the Mamba-2 paper
    expand: int = 2  # inner width / width
    headdim: int = 64  # rows of S, P in the Mamba-2 paper
    conv_width: int = 4
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for key, least in LEAST.items():
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, got {getattr(self, key)}.")
        if self.inner_width % self.headdim:
            raise ValueError(
                f"headdim must divide expand * width = {self.inner_width}, got {self.headdim}."
            )

    @property
    def label(self) -> str:
        name = "Mamba2" if self.d_state == 128 else f"Mamba2-{self.d_state}"
        return full_label(name, self, told=("d_state",))

    @property
    def inner_width(self) -> int:
        return self.expand * self.width

    @property
    def num_heads(self) -> int:
        return self.inner_width // self.headdim

    @property
    def conv_channels(self) -> int:
        return self.inner_width + 2 * self.d_state


class State(NamedTuple):
    columns: Tensor  # (l, b, w, m): the last inputs of the convolution, oldest first
    matrices: Tensor  # (l, b, h, e, n): S, float32 at least


class Model(nn.Module):
    decode_paths = ("eager",)
    max_len = None  # the state has one size

    def __init__(self, config: Config, decode_path: str = "eager"):
        super().__init__()
        self.config, self.decode_path = config, decode_path
        c = config
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)  # not tied to the embedding
        self.init_weights()

    def init_weights(self) -> None:
        for table in (self.embed, self.head):
            nn.init.normal_(table.weight, std=(2 / (5 * self.config.width)) ** 0.5)
        for block in self.blocks:
            block.mixer.init_weights(self.config.num_layers)

    def forward(self, tokens: Tokens) -> Logits:
        columns, matrix = self._zeros(len(tokens))  # every layer starts from them
        x = self.embed(tokens)  # (b, t, d)
        for block in self.blocks:
            x, _, _ = block(x, columns, matrix, chunked_scan)
        return self.head(self.norm(x))  # (b, t, v)

    def init_state(self, batch_size: int, max_len: int) -> State:
        return self._zeros(self.config.num_layers, batch_size)

    def _zeros(self, *batch: int) -> State:
        c, like = self.config, self.head.weight
        columns = like.new_zeros(*batch, c.conv_width, c.conv_channels)
        shape = (*batch, c.num_heads, c.headdim, c.d_state)
        return State(columns, like.new_zeros(shape, dtype=self.scan_dtype))

    @property
    def scan_dtype(self) -> torch.dtype:
        return torch.promote_types(self.head.weight.dtype, torch.float32)

    def reset(self, state: State) -> State:
        return State(state.columns.zero_(), state.matrices.zero_())

    def prefill(self, tokens: Tokens, state: State) -> tuple[NextLogits, State]:
        """Read `tokens` into the state; return the logits of the token after the last one."""
        return self._read(tokens, state, chunked_scan)

    def step(self, token: Token, state: State) -> tuple[NextLogits, State]:
        return self._read(token[:, None], state, recurrence)

    def _read(self, tokens: Tensor, state: State, scan: Scan) -> tuple[Tensor, State]:
        x = self.embed(tokens)  # (b, t, d)
        for block, columns, matrix in zip(self.blocks, state.columns, state.matrices, strict=True):
            x, new_columns, new_matrix = block(x, columns, matrix, scan)
            columns.copy_(new_columns)
            matrix.copy_(new_matrix)
        return self.head(self.norm(x[:, -1])), state

    def step_kind(self, num_tokens: int) -> str:
        return "step"

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def num_params_non_embedding(self) -> int:
        return self.num_params - self.embed.weight.numel() - self.head.weight.numel()

    def state_bytes(self, batch_size: int, seq_len: int) -> int:
        """layers x batch x (inner width x d_state in float32 + conv width x channels)."""
        c, like = self.config, self.head.weight
        matrices = c.inner_width * c.d_state * self.scan_dtype.itemsize
        columns = c.conv_width * c.conv_channels * like.itemsize
        return c.num_layers * batch_size * (matrices + columns)

    def state_bytes_float(self, batch_size: int, seq_len: int) -> int:
        return self.state_bytes(batch_size, seq_len)

    def step_costs(self, batch_size: int, num_tokens: int) -> tuple[Cost, ...]:
        """Weights: every matrix and filter once, 2 FLOP per weight. State: read and written, 4 FLOP
        per element of S (add the input, multiply with C; the decay is left out).
        """
        c, mixer = self.config, self.blocks[0].mixer
        used = (mixer.in_proj, mixer.conv1d, mixer.out_proj)
        weights = c.num_layers * sum(layer.weight.numel() for layer in used)
        weights += self.head.weight.numel()
        elements = c.num_layers * c.inner_width * c.d_state
        return (
            Cost("weights", weights * self.head.weight.itemsize, 2 * batch_size * weights),
            Cost("state", 2 * self.state_bytes(batch_size, num_tokens), 4 * batch_size * elements),
        )


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mixer = Mixer(config)

    def forward(self, x: Tensor, columns: Tensor, matrix: Tensor, scan: Scan) -> Layer:
        out, columns, matrix = self.mixer(self.norm(x), columns, matrix, scan)
        return x + out, columns, matrix


class Mixer(nn.Module):
    """One Mamba-2 layer. Names and layouts of its parameters are upstream's."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.parts = [c.inner_width, c.conv_channels, c.num_heads]  # z; x, B, C; dt
        self.in_proj = nn.Linear(c.width, sum(self.parts), bias=False)
        m = c.conv_channels
        self.conv1d = nn.Conv1d(m, m, c.conv_width, groups=m)  # one filter per channel
        self.dt_bias = nn.Parameter(torch.empty(c.num_heads))
        self.A_log = nn.Parameter(torch.empty(c.num_heads))
        self.D = nn.Parameter(torch.ones(c.num_heads))
        self.norm = nn.RMSNorm(c.inner_width, eps=c.norm_eps)
        self.out_proj = nn.Linear(c.inner_width, c.width, bias=False)

    def forward(self, u: Tensor, columns: Tensor, matrix: Tensor, scan: Scan) -> Layer:
        """u (b, t, d), columns (b, w, m), matrix (b, h, e, n) -> out (b, t, d), the new two."""
        c = self.config
        z, xbc, dt = self.in_proj(u).split(self.parts, dim=-1)
        seen = torch.cat([columns, xbc], dim=1)  # (b, w + t, m)
        xbc = F.silu(self.conv1d(seen[:, 1:].transpose(1, 2)).transpose(1, 2))  # (b, t, m)
        with torch.autocast(u.device.type, enabled=False):
            y, matrix = self._mix(xbc.to(matrix.dtype), dt.to(matrix.dtype), matrix, scan)
        out = self.out_proj(self.norm(y.to(u.dtype) * F.silu(z)))
        return out, seen[:, -c.conv_width :], matrix

    def _mix(self, xbc: Tensor, dt: Tensor, matrix: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        """Everything between convolution and gate, in the dtype of S: y (b, t, i) and S."""
        c = self.config
        x, key, query = xbc.split([c.inner_width, c.d_state, c.d_state], dim=-1)
        x = x.unflatten(-1, (c.num_heads, c.headdim))  # (b, t, h, e)
        dt = F.softplus(dt + self.dt_bias)  # (b, t, h)
        log_decay = -dt * self.A_log.to(dt.dtype).exp()
        y, matrix = scan(dt[..., None] * x, log_decay, key, query, matrix)
        return (y + self.D[:, None] * x).flatten(2), matrix

    def init_weights(self, num_layers: int) -> None:
        """As upstream: PyTorch's default for matrices and filters, out_proj over sqrt(layers);
        softplus(dt_bias) log-uniform, -A uniform, both drawn in float32 and rounded once.
        """
        low, high = (math.log(bound) for bound in DT_RANGE)
        draw = torch.rand(2, len(self.A_log), dtype=torch.float32, device=self.A_log.device)
        dt = torch.exp(low + (high - low) * draw[0])
        with torch.no_grad():
            self.out_proj.weight /= num_layers**0.5
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            self.A_log.copy_(torch.log(A_RANGE[0] + (A_RANGE[1] - A_RANGE[0]) * draw[1]))


def recurrence(
    x: Tensor, log_decay: Tensor, key: Tensor, query: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """S = exp(log_decay) S + x key^T, y = S query, token by token: the definition.

    x (b, t, h, e), log_decay (b, t, h), key (B) and query (C) (b, t, n), matrix (S) (b, h, e, n)
    -> y (b, t, h, e) and the last S.
    """
    outputs = []
    for token in range(x.shape[1]):
        added = x[:, token, ..., None] * key[:, token, None, None]  # (b, h, e, n)
        matrix = log_decay[:, token].exp()[..., None, None] * matrix + added
        outputs.append(torch.einsum("bhen,bn->bhe", matrix, query[:, token]))
    return torch.stack(outputs, dim=1), matrix


def chunked_scan(
    x: Tensor,
    log_decay: Tensor,
    key: Tensor,
    query: Tensor,
    matrix: Tensor,
    chunk_size: int = SCAN_CHUNK,
) -> tuple[Tensor, Tensor]:
    """The same as `recurrence`, chunk by chunk: inside a chunk as masked linear attention, from
    chunk to chunk through S. Padding neither decays S nor adds to it.
    """
    num_tokens = x.shape[1]
    size = min(chunk_size, num_tokens)
    x, log_decay, key, query = (chunks(part, size) for part in (x, log_decay, key, query))
    log_decay = log_decay.transpose(2, 3)  # (b, k, h, c)
    decay = pair_decay(log_decay)  # (b, k, h, c, c): from token j to token i
    scores = torch.einsum("bkin,bkjn->bkij", query, key)[:, :, None] * decay
    within = torch.einsum("bkhij,bkjhe->bkihe", scores, x)

    added = torch.einsum("bkhj,bkjhe,bkjn->bkhen", decay[..., -1, :], x, key)  # to S, per chunk
    since_start = log_decay.cumsum(-1).exp()  # (b, k, h, c)
    starts = []  # S before each chunk
    for chunk in range(x.shape[1]):
        starts.append(matrix)
        matrix = since_start[:, chunk, :, -1, None, None] * matrix + added[:, chunk]
    start = torch.stack(starts, dim=1)  # (b, k, h, e, n)
    before = torch.einsum("bkin,bkhen,bkhi->bkihe", query, start, since_start)
    return (within + before).flatten(1, 2)[:, :num_tokens], matrix


def chunks(part: Tensor, size: int) -> Tensor:
    """(b, t, ...) -> (b, k, c, ...), zeros at the end."""
    padding = -part.shape[1] % size
    padded = F.pad(part, (0, 0) * (part.dim() - 2) + (0, padding))
    return padded.unflatten(1, (-1, size))


def pair_decay(log_decay: Tensor) -> Tensor:
    """(..., c) -> (..., c, c): exp(sum of the tokens j + 1 .. i) where j <= i, else 0.

    Each sum is taken by itself: differences of two long sums would lose digits.
    """
    size = log_decay.shape[-1]
    sums = log_decay[..., None].expand(*log_decay.shape, size).tril(-1).cumsum(-2)
    later = torch.ones(size, size, dtype=torch.bool, device=sums.device).triu(1)
    return sums.masked_fill(later, float("-inf")).exp()
