"""Mamba-2: a state-space model, whose state is one fixed matrix per head (Dao and Gu, 2024).

24 layers without MLP. A layer reads u (d) and splits in_proj(u) into z, (x, B, C) and dt. A causal
convolution over the last w tokens and SiLU change (x, B, C). Then, per head, with A < 0 a scalar,

    dt_t = softplus(dt_t + dt_bias)
    S_t  = exp(dt_t A) S_{t-1} + (dt_t x_t) B_t^T              S (e, n); the heads share B and C
    y_t  = S_t C_t + D x_t
    out  = out_proj(RMSNorm(y * silu(z)))                      one RMSNorm over all heads

State: S and the last w inputs of the convolution, per layer; it does not grow with the sequence.
All sums are float32 at least, whatever autocast says. Between two calls S is stored in the model's
dtype, as the authors' own `generate` stores it: 13.03 MB per sequence in bfloat16 (the table of
evaluation_spec.md 4.4), at the price of a rounding at every token. `state_dtype=float32` avoids the
rounding, holds 25.61 MB and, since a step is bound by reading and writing S, takes about twice as
long. The inputs of the convolution have the model's dtype; w = 4 of them are kept, as upstream
does, although the next token needs three.

Paths on the authors' kernels (mamba-ssm, Triton), each equal to the eager path but for rounding.
Their scan multiplies float32 in TF32 and their softplus is log(1 + exp): 1e-3 off in float32.
    forward  upstream        what upstream trains with: convolution, scan, gate, norm and out_proj
                             as one autograd function; needs causal-conv1d too
    decode   upstream        prompt: their chunked scan, token: their state update, each between our
                             convolution and their gated norm
             upstream_graph  the same, with the step of a token captured as one CUDA graph
             cuda_graph      prompt: the same, a short one token by token; token: our own state
                             update, which reads and writes S once and holds the gate, captured
`upstream_generate` is mamba-ssm's whole model with its own loop, as a reference for ours.

Shapes: b batch, t tokens, d width, i inner width (expand d), h heads, e head width, n d_state,
w conv width, m conv channels (i + 2n), k chunks, c chunk size of the scan, l layers, v vocabulary.
Try it: cat-bench run efficiency -a mamba2 --quick
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_bench.architecture import Cost, NextLogits, Token, Tokens, full_label
from cat_bench.blocks import sum_dtype
from cat_bench.errors import UserError
from cat_bench.graph import CapturedStep, add_linear_, norm_linear, rms_norm
from cat_bench.language_model import SHORT_PROMPT, LanguageModel
from cat_bench.upstream import import_mamba_ssm, read_settings, to_our_names, to_their_names

PRESETS = {
    "mamba2-16": {"d_state": 16},
    "mamba2-32": {"d_state": 32},
    "mamba2-64": {"d_state": 64},
    "mamba2-wikitext": {"width": 768, "num_layers": 12, "vocab_size": 32_000},  # paper C.1, E.4
}
REQUIRES = {  # every fast step has kernels of ours, so Triton, around the authors'
    "cuda_graph": ("mamba_ssm", "triton"),
    "upstream_graph": ("mamba_ssm", "triton"),
    "upstream": ("mamba_ssm", "triton"),
    "forward upstream": ("mamba_ssm", "causal_conv1d"),
}
UPSTREAM_LACKS = {"norm_eps": "mamba-ssm's model has 1e-5 built in"}  # for suite upstream
TINY = {"headdim": 16}  # for the contract: 8 heads, and strides that causal-conv1d takes

SCAN_CHUNK = 64  # tokens; moves the scan's time and memory, not its result
UPSTREAM_CHUNK = 256  # the same of the authors' scan: their default
UPSTREAM_ELEMENTS = 2**31 - 1  # their kernels address with 32 bits
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
    state_dtype: Literal["model", "float32"] = "model"  # of S between calls; "model": as upstream
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.state_dtype not in ("model", "float32"):
            raise ValueError(f"state_dtype must be model or float32, got '{self.state_dtype}'.")
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
    matrices: Tensor  # (l, b, h, e, n): S, in Model.state_dtype
    run: Callable[[Tensor, int], Tensor] | None  # beyond eager: the step, tied to these buffers


class Model(LanguageModel):
    decode_paths = ("eager", "cuda_graph", "upstream_graph", "upstream")
    forward_paths = ("eager", "upstream")
    float32_forward_paths = ("upstream",)

    def __init__(self, config: Config, decode_path: str = "eager", forward_path: str = "eager"):
        blocks = (Block(config) for _ in range(config.num_layers))
        super().__init__(config, blocks, decode_path, forward_path)

    def hidden(self, tokens: Tokens) -> Tensor:
        x = self.embed(tokens)  # (b, t, d)
        if self.forward_path == "upstream":
            import_mamba_ssm(with_conv1d=True)
            self._check_upstream_size(*tokens.shape)
            for block in self.blocks:
                x = x + self.checkpointed(upstream_mixer)(block.mixer, block.norm(x))
        else:
            columns, matrix = self._zeros(len(tokens))  # every layer starts from them
            for block in self.blocks:
                x, _, _ = self.checkpointed(block)(x, columns, matrix, chunked_scan)
        return self.norm(x)

    def init_state(self, batch_size: int, max_len: int) -> State:
        columns, matrices = self._zeros(self.config.num_layers, batch_size)
        return State(columns, matrices, self._fast_step(columns, matrices))

    def _zeros(self, *batch: int) -> tuple[Tensor, Tensor]:
        c, like = self.config, self.head.weight
        columns = like.new_zeros(*batch, c.conv_width, c.conv_channels)
        shape = (*batch, c.num_heads, c.headdim, c.d_state)
        return columns, like.new_zeros(shape, dtype=self.state_dtype)

    def _fast_step(self, columns: Tensor, matrices: Tensor) -> Callable | None:
        """The step as one function of (token, row), which changes the buffers; None: eager.

        For upstream's kernels A is computed here, from the weights as they now are.
        """
        if self.decode_path == "eager":
            return None
        import_mamba_ssm()
        step, layers = fused_step, [self.blocks, columns, matrices]
        if self.decode_path != "cuda_graph":
            step = upstream_step
            layers.append([decay_rates(block.mixer).detach() for block in self.blocks])

        @torch.no_grad()
        def run(token: Tensor, row: Tensor | int) -> Tensor:
            x = self.embed(token)  # (b, d)
            for block, *parts in zip(*layers, strict=True):
                x = step(block, x, *parts)
            return norm_linear(x, self.norm, self.head.weight)

        if self.decode_path == "upstream":
            return run
        captured = CapturedStep(run, columns.shape[1], columns.device)
        columns.zero_()  # capturing warms up, and so has read some tokens
        matrices.zero_()
        return captured

    @property
    def state_dtype(self) -> torch.dtype:
        """Of S between two calls; inside of one it is float32 at least."""
        dtype = self.head.weight.dtype
        return dtype if self.config.state_dtype == "model" else sum_dtype(dtype)

    def reset(self, state: State) -> State:
        return state._replace(columns=state.columns.zero_(), matrices=state.matrices.zero_())

    def prefill(self, tokens: Tokens, state: State) -> tuple[NextLogits, State]:
        """Read `tokens` into the state; return the logits of the token after the last one."""
        if self.decode_path == "eager":
            return self._read(tokens, state, chunked_scan)
        if self.decode_path == "cuda_graph" and tokens.shape[1] <= SHORT_PROMPT:
            return self.read_by_steps(tokens, state)
        count = math.ceil(len(tokens) / self._upstream_batch(tokens.shape[1]))
        columns, matrices = (  # parts of equal size need the least memory at once
            buffer.tensor_split(count, dim=1) for buffer in (state.columns, state.matrices)
        )
        parts = zip(tokens.tensor_split(count), columns, matrices, strict=True)
        return torch.cat([self._read_upstream(*part) for part in parts]), state

    def step(self, token: Token, state: State) -> tuple[NextLogits, State]:
        if state.run is None:
            return self._read(token[:, None], state, recurrence)
        return state.run(token, 0), state

    def _read(self, tokens: Tensor, state: State, scan: Scan) -> tuple[Tensor, State]:
        x = self.embed(tokens)  # (b, t, d)
        for block, columns, matrix in zip(self.blocks, state.columns, state.matrices, strict=True):
            x, new_columns, new_matrix = block(x, columns, matrix, scan)
            columns.copy_(new_columns)
            matrix.copy_(new_matrix)
        return self.head(self.norm(x[:, -1])), state

    def _read_upstream(self, tokens: Tensor, columns: Tensor, matrices: Tensor) -> Tensor:
        x = self.embed(tokens)  # (b, t, d)
        for block, *memory in zip(self.blocks, columns, matrices, strict=True):
            x = upstream_read(block, x, *memory)
        return self.head(self.norm(x[:, -1]))

    def _upstream_batch(self, num_tokens: int) -> int:
        """How many sequences the authors' kernels can address: past it they would read elsewhere.

        Per sequence the largest tensors are in_proj's output, S after every chunk, and the products
        of B and C inside the chunks.
        """
        c, chunks = self.config, math.ceil(num_tokens / UPSTREAM_CHUNK)
        per_chunk = max(c.inner_width * c.d_state, UPSTREAM_CHUNK**2)
        largest = max(num_tokens * sum(self.blocks[0].mixer.parts), chunks * per_chunk)
        return max(1, UPSTREAM_ELEMENTS // largest)

    def _check_upstream_size(self, batch_size: int, num_tokens: int) -> None:
        most = self._upstream_batch(num_tokens)
        if batch_size > most:
            raise UserError(
                f"forward path upstream takes at most {most} sequences of {num_tokens} tokens at "
                f"once, got {batch_size}.",
                "Use smaller batches, or --forward-path eager.",
            )

    def state_bytes(self, batch_size: int, seq_len: int) -> int:
        """layers x batch x (inner width x d_state + conv width x channels), each in its dtype."""
        c, like = self.config, self.head.weight
        matrices = c.inner_width * c.d_state * self.state_dtype.itemsize
        columns = c.conv_width * c.conv_channels * like.itemsize
        return c.num_layers * batch_size * (matrices + columns)

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

    def init_weights(self, num_layers: int) -> None:
        self.mixer.init_weights(num_layers)


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
            wide = sum_dtype(matrix.dtype)
            y, matrix = self._mix(*(part.to(wide) for part in (xbc, dt, matrix)), scan)
        out = self.out_proj(self.norm(y.to(u.dtype) * F.silu(z)))
        return out, seen[:, -c.conv_width :], matrix

    def _mix(self, xbc: Tensor, dt: Tensor, matrix: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        """Everything between convolution and gate, float32 at least: y (b, t, i) and S."""
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


# --- the authors' kernels: import_mamba_ssm() comes before all of these --------------------------


def upstream_mixer(mixer: Mixer, u: Tensor) -> Tensor:
    """A layer over whole sequences, with gradients. (b, t, d) -> (b, t, d)."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    return mamba_split_conv1d_scan_combined(
        mixer.in_proj(u),
        mixer.conv1d.weight[:, 0],
        mixer.conv1d.bias,
        mixer.dt_bias,
        decay_rates(mixer),
        mixer.D,
        chunk_size=UPSTREAM_CHUNK,
        activation="silu",
        rmsnorm_weight=mixer.norm.weight,
        rmsnorm_eps=mixer.norm.eps,
        outproj_weight=mixer.out_proj.weight,
        headdim=mixer.config.headdim,
        norm_before_gate=False,
    )


def upstream_read(block: Block, x: Tensor, columns: Tensor, matrix: Tensor) -> Tensor:
    """A block for a segment of a prompt: x (b, t, d), columns (b, w, m) and matrix (b, h, e, n) are
    changed in place, x is returned.
    """
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    from cat_bench import recurrent_kernels

    mixer, c, rows = block.mixer, block.mixer.config, x.flatten(0, 1)
    parts = mixer.in_proj(rms_norm(rows, block.norm)).unflatten(0, x.shape[:2])
    z, xbc, dt = parts.split(mixer.parts, dim=-1)
    filters = mixer.conv1d.weight[:, 0]  # (m, w)
    xbc = recurrent_kernels.conv_rows(xbc, columns, filters, mixer.conv1d.bias, silu=True)
    inner, key, query = xbc.split([c.inner_width, c.d_state, c.d_state], dim=-1)
    y, last = mamba_chunk_scan_combined(
        inner.unflatten(-1, (c.num_heads, c.headdim)),
        dt,
        decay_rates(mixer),
        key[:, :, None],  # (b, t, one group, n)
        query[:, :, None],
        chunk_size=UPSTREAM_CHUNK,
        D=mixer.D,
        dt_bias=mixer.dt_bias,
        dt_softplus=True,
        initial_states=matrix.float(),
        return_final_states=True,
    )
    matrix.copy_(last)
    y = upstream_gate(mixer, y.flatten(2), z).flatten(0, 1)
    return rows.addmm_(y, mixer.out_proj.weight.T).view_as(x)  # the residual rides in the matmul


def fused_step(block: Block, x: Tensor, columns: Tensor, matrix: Tensor) -> Tensor:
    """A block for one token on this project's kernels: x (b, d) is changed in place and returned,
    as are columns and matrix.
    """
    from cat_bench import recurrent_kernels

    mixer = block.mixer
    z, xbc, dt = norm_linear(x, block.norm, mixer.in_proj.weight).split(mixer.parts, dim=-1)
    filters = mixer.conv1d.weight[:, 0]  # (m, w)
    xbc = recurrent_kernels.conv_step(xbc, columns, filters, mixer.conv1d.bias, silu=True)
    y = recurrent_kernels.ssm_step(xbc, dt, z, mixer.A_log, mixer.dt_bias, mixer.D, matrix)
    return add_linear_(x, y, mixer.out_proj.weight, mixer.norm)


def upstream_step(
    block: Block, x: Tensor, columns: Tensor, matrix: Tensor, rates: Tensor
) -> Tensor:
    """The same on the authors' kernel, with A = `rates` (h,).

    The views of stride 0 tell the authors' kernel that one decay serves a whole head.
    """
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    from cat_bench import recurrent_kernels

    mixer, c = block.mixer, block.mixer.config
    e, n = c.headdim, c.d_state
    z, xbc, dt = norm_linear(x, block.norm, mixer.in_proj.weight).split(mixer.parts, dim=-1)
    filters = mixer.conv1d.weight[:, 0]  # (m, w)
    xbc = recurrent_kernels.conv_step(xbc, columns, filters, mixer.conv1d.bias, silu=True)
    inner, key, query = xbc.split([c.inner_width, n, n], dim=-1)
    y = selective_state_update(
        matrix,
        inner.unflatten(-1, (c.num_heads, e)),
        dt[..., None].expand(-1, -1, e),
        rates[:, None, None].expand(-1, e, n),
        key[:, None],  # (b, one group, n)
        query[:, None],
        D=mixer.D[:, None].expand(-1, e),
        dt_bias=mixer.dt_bias[:, None].expand(-1, e),
        dt_softplus=True,
    )
    y = upstream_gate(mixer, y.flatten(1), z)
    return add_linear_(x, y, mixer.out_proj.weight)


def upstream_gate(mixer: Mixer, y: Tensor, z: Tensor) -> Tensor:
    """RMSNorm(y * silu(z)) of (..., i), in one kernel."""
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    norm = mixer.norm
    return rmsnorm_fn(y, norm.weight, None, z=z, eps=norm.eps, norm_before_gate=False)


def decay_rates(mixer: Mixer) -> Tensor:
    """A (h,), negative, in float32."""
    return -mixer.A_log.float().exp()


# --- mamba-ssm's whole model ---------------------------------------------------------------------

NAMES = {  # ours: MambaLMHeadModel's; inside a mixer the names are the same
    "embed.": "backbone.embedding.",
    "blocks.": "backbone.layers.",
    "norm.": "backbone.norm_f.",
    "head.": "lm_head.",
}
SETTINGS = {  # ours: of MambaConfig or its ssm_cfg (mamba-ssm 2.3.2), and the default there
    "width": ("d_model", None),
    "num_layers": ("n_layer", None),
    "d_state": ("d_state", 128),
    "conv_width": ("d_conv", 4),
    "expand": ("expand", 2),
    "headdim": ("headdim", 64),
}
BUILT_IN = {
    "layer": ("Mamba2",),
    "ngroups": (1,),
    "norm_before_gate": (False,),
    "dt_limit": ([0.0, math.inf],),
}
NOT_IN_SHAPES = ("d_state", "ngroups", "norm_before_gate", "dt_limit")
NORM_EPS = 1e-5  # of all their norms, which is no setting


def from_upstream(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state_dict of a MambaLMHeadModel's with Mamba2 layers; the tensors are shared.

    The tables keep their rows, padding included: vocab_size is their number.
    """
    return to_our_names(weights, NAMES)


def to_upstream(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of an untied MambaLMHeadModel with our weights; the tensors are shared."""
    return to_their_names(weights, NAMES)


def settings_from_upstream(theirs: dict[str, Any]) -> dict[str, Any]:
    """Our settings by a config.json of mamba-ssm. Raises ValueError where ours has no such model.

    What leaves a trace in names and shapes is not looked at: an MLP, attention layers, biases.
    """
    flat: dict[str, Any] = {"layer": "Mamba1"} | theirs | (theirs.get("ssm_cfg") or {})
    multiple = flat.get("pad_vocab_size_multiple", 8)
    words = math.ceil(flat.get("vocab_size", 50_277) / multiple) * multiple
    return read_settings(flat, SETTINGS, BUILT_IN) | {"vocab_size": words, "norm_eps": NORM_EPS}


def upstream_config(config: Config) -> dict[str, Any]:
    """The fields of the MambaConfig of our model. ValueError where mamba-ssm has no such model.

    They are its fastest: kernels that fuse residual and norm, float32 residuals.
    """
    c = config
    if c.norm_eps != NORM_EPS:
        raise ValueError(f"mamba-ssm's model has norm_eps {NORM_EPS} built in, got {c.norm_eps}.")
    layer = {"layer": "Mamba2", "d_state": c.d_state, "d_conv": c.conv_width}
    return {
        "d_model": c.width,
        "n_layer": c.num_layers,
        "vocab_size": c.vocab_size,
        "ssm_cfg": layer | {"expand": c.expand, "headdim": c.headdim},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": False,
    }


def upstream_generate(model: Model) -> Callable[[Tensor, int], Tensor]:
    """mamba-ssm's own model and decoding loop on our weights: (prompt (b, p), seq_len) -> (b,
    seq_len) tokens, greedy, its step a CUDA graph. What our loop is measured against.

    S is stored as our model stores it, so that both loops move the same bytes.
    """
    import_mamba_ssm(with_conv1d=True, with_transformers=True)
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    c, like = model.config, model.head.weight
    config = MambaConfig(**upstream_config(c))
    theirs = MambaLMHeadModel(config, device="meta", dtype=like.dtype).eval()
    theirs.load_state_dict(to_upstream(model.state_dict()), assign=True)  # shared, not copied
    if c.state_dtype == "float32":
        allocate = theirs.allocate_inference_cache

        def allocate_float32(*args: object, **options: object) -> dict[int, tuple[Tensor, Tensor]]:
            buffers = allocate(*args, **options)
            return {i: (columns, matrix.float()) for i, (columns, matrix) in buffers.items()}

        theirs.allocate_inference_cache = allocate_float32

    def run(prompt: Tensor, seq_len: int) -> Tensor:
        return theirs.generate(prompt, max_length=seq_len, top_k=1, cg=True)

    return run
