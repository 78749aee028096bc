"""The language models a worker can train: a Llama-style decoder in fixed sizes, and the user's own by name.

Here: sizes (`PRESETS`), the decoder (`Transformer`), building either reproducibly from a seed, and the one
definition of the training loss (`next_token_loss`). Not here: data, optimizers, precision, devices, fragments, and
the inside of a mixture of experts (moe.py).

Parameter names are part of the contract with fragment plans: everything under `blocks.<i>.` belongs to
transformer block i; everything else (`embed.`, `norm.`, `head.`) is embedding, final norm and head.
"""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diloco.errors import ConfigError, nearest
from diloco.worker.moe import Experts, take_balance_loss

INIT_STD = 0.02


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of one decoder. `d_ff` is the width of the SwiGLU hidden layer; `tied` shares embedding and head.

    With `experts` > 0 every block is a mixture of experts: the hidden layer of width `d_ff` sees all tokens, and each
    token also goes to `experts_per_token` of `experts` further ones of width `d_expert`. `balance` weighs their
    load-balance loss, summed over the blocks, in the training loss.

    Raises ConfigError for sizes that do not fit together.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    sequence_length: int
    tied: bool = True
    rope_theta: float = 10_000.0
    experts: int = 0
    experts_per_token: int = 2
    d_expert: int = 0
    balance: float = 0.01

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "sequence_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} = {getattr(self, name)}: must be at least 1")
        if self.d_model % (2 * self.n_heads):
            raise ConfigError(
                f"model.d_model = {self.d_model}: must be a multiple of 2 * n_heads = {2 * self.n_heads}, "
                "because rotary embedding turns pairs within a head"
            )
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"model.n_kv_heads = {self.n_kv_heads}: must divide n_heads = {self.n_heads}, "
                "because query heads share key-value heads in equal groups"
            )
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ConfigError(
                f"model.experts_per_token = {self.experts_per_token}: must be from 1 to experts = {self.experts}"
            )
        if self.experts and self.d_expert < 1:
            raise ConfigError(
                f"model.d_expert = {self.d_expert}: must be at least 1 for a model with experts"
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


# The small ones read bytes (vocabulary 256). 160m and 1b leave room for GPT-2's 50,257 tokens, rounded up to a
# multiple of 64; 8b has the sizes of Llama 3 8B (arXiv 2407.21783).
PRESETS: dict[str, ModelConfig] = {
    "nano": ModelConfig(256, 64, 4, 2, 2, 176, 128),
    "tiny": ModelConfig(256, 128, 4, 4, 4, 352, 128),
    "moe-tiny": ModelConfig(256, 128, 4, 4, 4, 128, 128, experts=8, d_expert=96),
    "small": ModelConfig(256, 192, 6, 6, 6, 512, 256),
    "10m": ModelConfig(256, 320, 8, 5, 5, 896, 512),
    "160m": ModelConfig(50_304, 768, 12, 12, 12, 2048, 1024, tied=False),
    "1b": ModelConfig(50_304, 2048, 16, 32, 8, 8192, 2048),
    "8b": ModelConfig(128_256, 4096, 32, 32, 8, 14_336, 8192, tied=False, rope_theta=500_000.0),
}


def rope_tables(sequence_length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of t * theta^(-2i / head_dim), each fp32 [sequence_length, 1, head_dim / 2] (2104.09864)."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angles = torch.outer(torch.arange(sequence_length, dtype=torch.float64), theta**-pairs)
    return angles.cos().float().unsqueeze(1), angles.sin().float().unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of x [B, T, heads, D] by the angles of position t; dtype of x."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x)) [+ experts(norm(x))]; x is [B, T, d_model]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        rows = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
        self.attn_norm = nn.RMSNorm(config.d_model, eps=1e-5)
        self.qkv = nn.Linear(config.d_model, rows, bias=False)  # rows: queries, then keys, then values
        self.attn_out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=1e-5)
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)  # rows: gate, then up
        self.ffn_out = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.experts = (
            Experts(config.d_model, config.d_expert, config.experts, config.experts_per_token, config.balance)
            if config.experts
            else None
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        rotated = self.n_heads + self.n_kv_heads
        heads = self.qkv(self.attn_norm(x)).view(batch, length, rotated + self.n_kv_heads, self.head_dim)
        query_key, value = torch.split(heads, [rotated, self.n_kv_heads], dim=2)
        turned = rotate(query_key, cos, sin).transpose(1, 2)
        query, key = torch.split(turned, [self.n_heads, self.n_kv_heads], dim=1)
        mixed = F.scaled_dot_product_attention(
            query, key, value.transpose(1, 2), is_causal=True, enable_gqa=self.n_heads != self.n_kv_heads
        )
        x = x + self.attn_out(mixed.transpose(1, 2).reshape(batch, length, -1))
        normed = self.ffn_norm(x)
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        hidden: Tensor = x + self.ffn_out(F.silu(gate) * up)
        return hidden if self.experts is None else hidden + self.experts(normed)


class Transformer(nn.Module):
    """Decoder-only language model: RMSNorm before each part, RoPE, grouped-query attention, SwiGLU, no biases."""

    cos: Tensor
    sin: Tensor
    embed_scale: float = 1.0  # sqrt(d_model) for optimizers that keep embedding rows at norm 1

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=1e-5)
        self.head = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self.reset_parameters()

    @property
    def fused_blocks(self) -> dict[str, int | tuple[int, ...]]:
        """Rows of fused weights by part of their name, for optimizers that treat each matrix on its own."""
        c = self.config
        return {"qkv": (c.d_model, *[c.n_kv_heads * c.head_dim] * 2), "gate_up": 2}

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Norm gains 1, weights N(0, 0.02); what writes to the residual stream is divided by sqrt(2 * n_layers).

        Draws from `generator` (torch's global one when None) in parameter order and rebuilds the RoPE tables.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            residual = name.endswith(("attn_out.weight", "ffn_out.weight", "experts.out"))
            std = INIT_STD / math.sqrt(2 * self.config.n_layers) if residual else INIT_STD
            parameter.normal_(0.0, std, generator=generator)
        device = self.embed.weight.device
        cos, sin = rope_tables(self.config.sequence_length, self.config.head_dim, self.config.rope_theta)
        self.cos, self.sin = cos.to(device), sin.to(device)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocab_size] for tokens int64 [B, T]; row t sees tokens 0..t only.

        Raises ValueError when T exceeds the sequence length the model was built for.
        """
        length = tokens.shape[1]
        if length > self.config.sequence_length:
            raise ValueError(
                f"{length} tokens given to a model built for {self.config.sequence_length}: "
                "build it with a larger sequence_length"
            )
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embed(tokens) if self.embed_scale == 1.0 else self.embed(tokens) * self.embed_scale
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.norm(x)
        return F.linear(x, self.embed.weight if self.head is None else self.head.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross entropy in nats/token, fp32 scalar, of tokens[:, 1:] given tokens[:, :-1]; int64 [B, T+1].

        In train mode with gradients, plus the load-balance loss of a mixture of experts.
        """
        return _with_balance(cross_entropy(self(tokens[:, :-1]), tokens), self)


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """fp32 mean of -log softmax(logits[b, t])[tokens[b, t+1]]; logits [B, T, V], tokens int64 [B, T+1]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def _with_balance(loss: Tensor, model: nn.Module) -> Tensor:
    balance = take_balance_loss(model)
    return loss if balance is None else loss + balance


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The loss of any accepted model, scalar, nats/token, for tokens int64 [B, T+1].

    A model is accepted when it has `loss(tokens[B, T+1]) -> scalar`, or when calling it with tokens [B, T]
    returns logits [B, T, V], alone or as the attribute `logits` of what it returns. A wrapper that hides `loss`
    (DistributedDataParallel) is called for its logits, so that its hooks run. In train mode with gradients the
    load-balance loss of our mixtures of experts is part of it; in eval mode it is the cross entropy alone.
    Raises ConfigError otherwise.
    """
    own = getattr(model, "loss", None)
    if callable(own):
        value = own(tokens)
        if isinstance(value, Tensor) and value.dim() == 0:
            return value
        raise ConfigError(f"model.factory: {type(model).__name__}.loss(tokens) must return a scalar tensor")
    result = model(tokens[:, :-1])
    logits = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != tokens[:, 1:].shape:
        raise ConfigError(
            f"model.factory: {type(model).__name__} has no loss(tokens) and returns no logits of shape "
            "[batch, length, vocabulary]; give it one of the two"
        )
    return _with_balance(cross_entropy(logits, tokens), model)


def preset_config(
    preset: str, sequence_length: int | None = None, vocab_size: int | None = None
) -> ModelConfig:
    """The sizes of `preset` with the given length and vocabulary; ConfigError for an unknown name."""
    if preset not in PRESETS:
        raise ConfigError(
            f"model.preset = {preset!r}: unknown{nearest(preset, PRESETS)}; one of {', '.join(PRESETS)}"
        )
    base = PRESETS[preset]
    return replace(
        base,
        sequence_length=base.sequence_length if sequence_length is None else sequence_length,
        vocab_size=base.vocab_size if vocab_size is None else vocab_size,
    )


def build_model(
    preset: str,
    sequence_length: int,
    seed: int,
    vocab_size: int | None = None,
    *,
    device: str | torch.device = "cpu",
) -> Transformer:
    """A Transformer in fp32 whose weights depend on (sizes, seed) alone; global random state is not touched.

    Weights are drawn on the CPU and then moved, so that every device starts from the same bits. device="meta"
    gives shapes without memory, for counting. Raises ConfigError for an unknown preset or impossible sizes.
    """
    with torch.device("meta"):
        model = Transformer(preset_config(preset, sequence_length, vocab_size))
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device="cpu")
    model.reset_parameters(torch.Generator("cpu").manual_seed(seed))
    return model.to(device)


_seeding = threading.Lock()  # torch's random state is the whole process's


def build_from_factory(path: str, seed: int) -> nn.Module:
    """The model returned by `package.module:function`, called without arguments under a seeded random state.

    The function returns an nn.Module that `next_token_loss` accepts; it must be importable by name where the
    worker runs. torch's global random state is seeded for the call and restored after it.
    Raises ConfigError naming model.factory when the name, module, function or result is not right.
    """
    factory = _resolve(path)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with _seeding, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model = factory()
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.factory = {path!r}: returned {type(model).__name__}; it must return a torch.nn.Module"
        )
    return model


def _resolve(path: str) -> Callable[[], object]:
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError(f"model.factory = {path!r}: write it as 'package.module:function'")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"model.factory = {path!r}: cannot import {module_name!r} ({error}); "
            "install it or put its folder on PYTHONPATH"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ConfigError(
            f"model.factory = {path!r}: {module_name!r} has no function {attribute!r}"
            f"{nearest(attribute, vars(module))}"
        )
    found: Callable[[], object] = factory
    return found
