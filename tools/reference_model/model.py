"""DeepSeek-V2 in plain torch, written for fast training on a CPU.

Parameters carry the names and shapes of transformers' `DeepseekV2ForCausalLM`, so a state dict moves over unchanged.
Shape letters: T tokens, B sequences, S sequence length, H heads, D hidden, E experts, K active experts, F expert width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone knows)
from torch import Tensor, nn

CONFIG = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    # Softmax over 16 experts leaves two small weights; without the factor the routed part starts out negligible.
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": False,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


class GroupedSwiGLU(torch.autograd.Function):
    """down[e] (silu(gate[e] x) * up[e] x) for rows sorted by expert, without padding.

    x f32[N,D], gate_up f32[E,2F,D], down f32[E,D,F], bounds E+1 row offsets -> f32[N,D].
    """

    @staticmethod
    def forward(ctx, x: Tensor, gate_up: Tensor, down: Tensor, bounds: list[int]) -> Tensor:
        hidden = x.new_empty(len(x), gate_up.shape[1])
        out = torch.empty_like(x)
        spans = [(e, slice(a, b)) for e, (a, b) in enumerate(pairwise(bounds)) if b > a]
        for e, rows in spans:
            torch.mm(x[rows], gate_up[e].t(), out=hidden[rows])
        gate, up = hidden.chunk(2, dim=-1)
        act = F.silu(gate).mul_(up)
        for e, rows in spans:
            torch.mm(act[rows], down[e].t(), out=out[rows])
        ctx.save_for_backward(x, gate_up, down, hidden, act)
        ctx.spans = spans
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        x, gate_up, down, hidden, act = ctx.saved_tensors
        grad_act, grad_x = torch.empty_like(act), torch.empty_like(x)
        grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        grad_out = grad_out.contiguous()
        for e, rows in ctx.spans:
            torch.mm(grad_out[rows], down[e], out=grad_act[rows])
            torch.mm(grad_out[rows].t(), act[rows], out=grad_down[e])
        gate, up = hidden.chunk(2, dim=-1)
        grad_hidden = torch.empty_like(hidden)
        width = gate.shape[-1]
        torch.mul(grad_act, F.silu(gate), out=grad_hidden[:, width:])
        grad_hidden[:, :width] = torch.ops.aten.silu_backward(grad_act.mul_(up), gate)
        for e, rows in ctx.spans:
            torch.mm(grad_hidden[rows], gate_up[e], out=grad_x[rows])
            torch.mm(grad_hidden[rows].t(), x[rows], out=grad_gate_up[e])
        return grad_x, grad_gate_up, grad_down, None


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of x @ weight.T, in chunks, so that the logits never exist as a whole.

    x f32[T,D], weight f32[V,D], target i64[T] -> f32[]; the gradients are made on the way, while the chunk is in cache.
    """

    CHUNK = 512

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        loss = x.new_zeros(())
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        for rows in torch.arange(len(x)).split(LinearCrossEntropy.CHUNK):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            log_probs = F.log_softmax(x[part] @ weight.t(), dim=-1)
            index = target[part, None]
            loss -= log_probs.gather(1, index).sum()
            grad = log_probs.exp_()
            grad.scatter_add_(1, index, grad.new_full(index.shape, -1.0))
            grad /= len(x)
            torch.mm(grad, weight, out=grad_x[part])
            grad_weight.addmm_(grad.t(), x[part])
        ctx.save_for_backward(grad_x, grad_weight)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_loss, grad_weight * grad_loss, None


class CausalAttention(torch.autograd.Function):
    """Scaled causal attention by blocks of queries, each against just the keys it may see.

    q, k f32[B,H,S,C], v f32[B,H,S,V] -> f32[B,H,S,V]. On a CPU without wide vectors this takes less than half the time
    of torch's fused kernel, whose backward pass is slow.
    """

    BLOCK = 128

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, size = q.shape
        q, k, v = (t.reshape(batch * heads, length, -1) for t in (q * size**-0.5, k, v))
        out, probs = torch.empty_like(v), []
        for start in range(0, length, CausalAttention.BLOCK):
            stop = min(start + CausalAttention.BLOCK, length)
            scores = torch.bmm(q[:, start:stop], k[:, :stop].mT)
            future = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
            scores[:, :, start:].masked_fill_(future, -torch.inf)
            probs.append(torch.softmax(scores, dim=-1))
            out[:, start:stop] = torch.bmm(probs[-1], v[:, :stop])
        ctx.save_for_backward(q, k, v, out, *probs)
        return out.view(batch, heads, length, -1)

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        q, k, v, out, *probs = ctx.saved_tensors
        shape, grad_out = grad_out.shape[:3], grad_out.reshape(out.shape)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dot = (grad_out * out).sum(-1, keepdim=True)
        for start, prob in zip(range(0, q.shape[1], CausalAttention.BLOCK), probs, strict=True):
            stop = start + prob.shape[1]
            grad_v[:, :stop].baddbmm_(prob.mT, grad_out[:, start:stop])
            grad_scores = torch.bmm(grad_out[:, start:stop], v[:, :stop].mT)
            grad_scores.sub_(dot[:, start:stop]).mul_(prob)
            grad_q[:, start:stop] = torch.bmm(grad_scores, k[:, :stop])
            grad_k[:, :stop].baddbmm_(grad_scores.mT, q[:, start:stop])
        return (grad_q * q.shape[-1] ** -0.5).view(*shape, -1), grad_k.view(*shape, -1), grad_v.view(*shape, -1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on adjacent pairs. x f32[...,S,P], cos and sin f32[S,P/2] -> f32[...,S,P]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    """Multi-head latent attention with keys and values expanded: for training that is the cheaper form."""

    def __init__(self, config: dict):
        super().__init__()
        c = self.config = config
        heads, qk_head_dim = c["num_attention_heads"], c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
        self.q_a_proj = nn.Linear(c["hidden_size"], c["q_lora_rank"], bias=False)
        self.q_a_layernorm = RMSNorm(c["q_lora_rank"], 1e-6)
        self.q_b_proj = nn.Linear(c["q_lora_rank"], heads * qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c["hidden_size"], c["kv_lora_rank"] + c["qk_rope_head_dim"], bias=False)
        self.kv_a_layernorm = RMSNorm(c["kv_lora_rank"], 1e-6)
        self.kv_b_proj = nn.Linear(c["kv_lora_rank"], heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), bias=False)
        self.o_proj = nn.Linear(heads * c["v_head_dim"], c["hidden_size"], bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c = self.config
        heads, nope, rope, value = (
            c[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (heads, nope + rope)).transpose(1, 2)
        q_nope, q_pe = q.split([nope, rope], dim=-1)
        c_kv, k_pe = self.kv_a_proj_with_mqa(x).split([c["kv_lora_rank"], rope], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(c_kv)).unflatten(-1, (heads, nope + value)).transpose(1, 2)
        k_nope, v = kv.split([nope, value], dim=-1)
        q_pe = rotate_pairs(q_pe, cos, sin)
        k_pe = rotate_pairs(k_pe, cos, sin).unsqueeze(1).expand(-1, heads, -1, -1)
        q, k = torch.cat((q_nope, q_pe), dim=-1), torch.cat((k_nope, k_pe), dim=-1)
        out = CausalAttention.apply(q, k, v)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    def __init__(self, experts: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))


class Experts(nn.Module):
    def __init__(self, experts: int, hidden_size: int, width: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, width))


class MoE(nn.Module):
    """Top-k routed experts plus the shared expert."""

    def __init__(self, config: dict):
        super().__init__()
        c = self.config = config
        width = c["moe_intermediate_size"]
        self.gate = Router(c["n_routed_experts"], c["hidden_size"])
        self.experts = Experts(c["n_routed_experts"], c["hidden_size"], width)
        self.shared_experts = MLP(c["hidden_size"], width * c["n_shared_experts"])

    def forward(self, x: Tensor, routing: list[dict[str, Tensor]]) -> Tensor:
        """x f32[B,S,D] -> same; appends the choices i64[T,K], their counts i64[E] and the balance loss to `routing`."""
        c = self.config
        experts, active = c["n_routed_experts"], c["num_experts_per_tok"]
        rows = x.flatten(0, -2)
        probs = F.linear(rows, self.gate.weight).softmax(-1)
        weights, chosen = probs.topk(active, dim=-1, sorted=False)
        counts = torch.bincount(chosen.flatten(), minlength=experts)
        # Switch-style balance over all sequences, not each one: a text may keep its favourite experts.
        balance_loss = experts * (counts / counts.sum() * probs.mean(0)).sum()
        routing.append({"chosen": chosen, "counts": counts, "balance_loss": balance_loss})

        order = chosen.flatten().argsort()
        bounds = [0, *counts.cumsum(0).tolist()]
        source = order // active
        out = GroupedSwiGLU.apply(
            rows.index_select(0, source), self.experts.gate_up_proj, self.experts.down_proj, bounds
        )
        scale = weights.flatten().index_select(0, order) * c["routed_scaling_factor"]
        routed = torch.zeros_like(rows).index_add(0, source, out * scale[:, None])
        return (routed + self.shared_experts(rows)).view_as(x)


class Layer(nn.Module):
    def __init__(self, config: dict, index: int):
        super().__init__()
        dense = index < config["first_k_dense_replace"]
        self.input_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.mlp = MLP(config["hidden_size"], config["intermediate_size"]) if dense else MoE(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, routing: list[dict[str, Tensor]]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        normed = self.post_attention_layernorm(x)
        return x + (self.mlp(normed, routing) if isinstance(self.mlp, MoE) else self.mlp(normed))


class Model(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config["num_hidden_layers"]))
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])


class DeepseekV2(nn.Module):
    """The language model; `config` is a dict with the keys of transformers' DeepseekV2Config."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.model = Model(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Projections by fan-in; what writes to the residual stream, and the head, start at zero."""
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight", "lm_head.weight")):
                weight.zero_()
            elif "embed_tokens" in name:
                weight.normal_(std=0.5)
            elif "mlp.gate.weight" in name:
                weight.normal_(std=0.02)
            elif weight.ndim > 1:
                weight.normal_(std=0.7 * weight.shape[-1] ** -0.5)

    def hidden(self, token_ids: Tensor, routing: list[dict[str, Tensor]]) -> Tensor:
        """token_ids i64[B,S] -> f32[B,S,D], normed, ready for the head; `routing` gets an entry for each MoE layer."""
        rope = self.config["qk_rope_head_dim"]
        theta = self.config["rope_parameters"]["rope_theta"] ** -(torch.arange(0, rope, 2) / rope)
        angle = torch.arange(token_ids.shape[1])[:, None] * theta
        cos, sin = angle.cos(), angle.sin()
        x = self.model.embed_tokens(token_ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin, routing)
        return self.model.norm(x)

    def forward(self, token_ids: Tensor, routing: list[dict[str, Tensor]] | None = None) -> Tensor:
        """token_ids i64[B,S] -> logits f32[B,S,V]."""
        return self.lm_head(self.hidden(token_ids, [] if routing is None else routing))

    def loss(self, token_ids: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """token_ids, target i64[B,S] -> cross entropy in nats, balance loss (1 is perfect), expert counts i64[L,E]."""
        routing: list[dict[str, Tensor]] = []
        hidden = self.hidden(token_ids, routing).flatten(0, 1)
        cross_entropy = LinearCrossEntropy.apply(hidden, self.lm_head.weight, target.flatten())
        balance = torch.stack([layer["balance_loss"] for layer in routing]).mean()
        return cross_entropy, balance, torch.stack([layer["counts"] for layer in routing])
