"""The mixture-of-experts decoder that ``train.py`` trains, in plain torch.

It computes what Hugging Face's ``MixtralForCausalLM`` computes. Shapes in comments: B rows, T positions, N = B * T
tokens, H hidden size, A query heads, G key/value heads, D head size, E experts, I expert width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What training multiplies in: float32 where the CPU has no instructions for bfloat16, which would be slower.
FAST = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    experts: int = 8
    top_k: int = 2
    expert_width: int = 128
    context: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.library.custom_op("understudy_demo::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Rows of ``x`` [M, K], sorted by expert, times their expert's ``w`` [E, K, O] -> [M, O]."""
    out = x.new_empty(x.shape[0], w.shape[2])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        torch.mm(x[start:end], w[expert], out=out[start:end])
        start = end
    return out


@grouped_mm.register_fake
def _(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[2])


@torch.library.custom_op("understudy_demo::grouped_mm_weight", mutates_args=())
def grouped_mm_weight(x: Tensor, g: Tensor, ends: Tensor) -> Tensor:
    """The gradient of ``w`` in ``grouped_mm``: x [M, K], g [M, O] -> [E, K, O]."""
    out = x.new_zeros(ends.shape[0], x.shape[1], g.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end].t(), g[start:end], out=out[expert])
        start = end
    return out


@grouped_mm_weight.register_fake
def _(x: Tensor, g: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], g.shape[1])


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, w, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return grouped_mm(grad, w.transpose(1, 2), ends), grouped_mm_weight(x, grad, ends), None


grouped_mm.register_autograd(_backward, setup_context=_save)


class Dispatch(torch.autograd.Function):
    """x [N, H] -> its rows in the experts' order [N * k, H]; the gradient is a gather too, not a scatter."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        return grad[back].view(-1, ctx.k, grad.shape[-1]).sum(1), None, None, None


class Collect(torch.autograd.Function):
    """The experts' rows [N * k, H] back in the tokens' order."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[back]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad[order], None, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def rope_tables(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [T, D], for the rotate-half form of rotary positions; the first half of the sines
    carries the minus sign."""
    rates = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), rates)
    return torch.cat([angles.cos()] * 2, dim=-1), torch.cat([-angles.sin(), angles.sin()], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x [B, heads, T, D]."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)  # the halves change places
    return x * cos + swapped * sin


def causal_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 128) -> Tensor:
    """Causal attention, q k v [B, A, T, D] -> [B, A, T, D].

    Queries go in blocks and each block sees only the keys up to its end, so almost half of the score matrix is
    never computed.
    """
    length = q.shape[2]
    block = min(block, length)
    position = torch.arange(length, device=q.device)
    mask = torch.where(position[:block, None] >= position[None, :block], 0.0, float("-inf")).to(q.dtype)
    mask = F.pad(mask, (length - block, 0))  # [block, T]: everything before the block is seen
    q = q / math.sqrt(q.shape[-1])
    outs = []
    for start in range(0, length, block):
        end = start + block
        scores = q[:, :, start:end] @ k[:, :, :end].transpose(-1, -2) + mask[:, length - end :]  # [B, A, block, end]
        outs.append(scores.float().softmax(-1).to(v.dtype) @ v[:, :, :end])
    return torch.cat(outs, dim=2)


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.hidden, s.heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s, (b, t, _) = self.s, x.shape
        q = self.q_proj(x).view(b, t, s.heads, s.head_dim).transpose(1, 2)  # [B, A, T, D]
        k = self.k_proj(x).view(b, t, s.kv_heads, s.head_dim).transpose(1, 2)  # [B, G, T, D]
        v = self.v_proj(x).view(b, t, s.kv_heads, s.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        k = k.repeat_interleave(s.heads // s.kv_heads, dim=1)  # [B, A, T, D]
        v = v.repeat_interleave(s.heads // s.kv_heads, dim=1)
        if t % 128 == 0 and t <= 512:
            y = causal_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class Experts(nn.Module):
    """Top-k mixture of SwiGLU experts: softmax over all experts, keep the best k, rescale them to one."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.gate = nn.Linear(s.hidden, s.experts, bias=False)
        self.w13 = nn.Parameter(torch.empty(2, s.experts, s.hidden, s.expert_width))  # w1 and w3, transposed
        self.w2 = nn.Parameter(torch.empty(s.experts, s.expert_width, s.hidden))  # transposed

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, H] -> (y [N, H], share of choices per expert [E], mean probability per expert [E])."""
        s, dtype = self.s, x.dtype
        probs = self.gate(x).float().softmax(-1)  # [N, E]
        weight, chosen = probs.topk(s.top_k, dim=-1)  # [N, k]
        weight = weight / weight.sum(-1, keepdim=True)
        flat = chosen.flatten()  # [N * k]
        order = flat.argsort(stable=True)
        counts = F.one_hot(flat, s.experts).sum(0)  # [E]
        ends = counts.cumsum(0)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        rows = Dispatch.apply(x, order, back, s.top_k)  # [N * k, H], sorted by expert
        w13 = torch.cat([self.w13[0].to(dtype), self.w13[1].to(dtype)], dim=-1)  # [E, H, 2 * I]
        up = grouped_mm(rows, w13, ends)  # [N * k, 2 * I]
        left, right = up.chunk(2, dim=-1)
        hidden = (F.silu(left.float()) * right.float()).to(dtype)
        out = grouped_mm(hidden, self.w2.to(dtype), ends)  # [N * k, H]
        out = Collect.apply(out, order, back).view(-1, s.top_k, s.hidden)
        y = (out * weight.unsqueeze(-1).to(dtype)).sum(1)
        return y, counts / flat.shape[0], probs.mean(0)


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.input_norm = RMSNorm(s.hidden, s.norm_eps)
        self.attention = Attention(s)
        self.expert_norm = RMSNorm(s.hidden, s.norm_eps)
        self.experts = Experts(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, H] -> (x [B, T, H], share [E], mean probability [E])."""
        x = x + self.attention(self.input_norm(x).to(FAST if self.training else x.dtype), cos, sin)
        y = self.expert_norm(x).flatten(0, 1)
        y, share, prob = self.experts(y.to(FAST) if self.training else y)
        return x + y.view_as(x), share, prob


class Decoder(nn.Module):
    """The whole model, embeddings tied to the output."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.embed = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = RMSNorm(s.hidden, s.norm_eps)
        cos, sin = rope_tables(s.context, s.head_dim, s.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                deep = name.endswith(("o_proj.weight", "w2"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * s.layers) if deep else 0.02)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, T] -> (final hidden states [B, T, H], shares and probabilities [layers, 2, E])."""
        t = tokens.shape[1]
        x = self.embed(tokens)
        loads = []
        for layer in self.layers:
            x, share, prob = layer(x, self.cos[:t], self.sin[:t])
            loads.append(torch.stack([share, prob]))
        return self.norm(x), torch.stack(loads)

    def loss(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per-token cross entropy [B * T] (float32), load-balancing loss [], expert shares [layers, E]."""
        x, loads = self(tokens)
        logits = self.logits(x).flatten(0, 1)  # [N, V]
        nll = F.cross_entropy(logits.float(), targets.flatten(), reduction="none", ignore_index=-1)
        balance = self.s.experts * (loads[:, 0].detach() * loads[:, 1]).sum(-1).mean()
        return nll, balance, loads[:, 0].detach()

    def logits(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., V]."""
        if self.training:
            x = x.to(FAST)
        return x @ self.embed.weight.t().to(x.dtype)
