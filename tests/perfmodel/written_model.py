"""A model in plain `torch.nn`, from the description that tapes are taken down of.

It does in fp32 what Hugging Face's transformers do, and nothing more: to be seen by saved-tensor
hooks, not to learn. Tokens of both sides are given; labels are those of each token's successor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfmodel.model import Model

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.045 * torch.pow(x, 3)))),
    "relu": F.relu,
    "silu": F.silu,
}


def saved_nbytes(run: Callable[[], Tensor], given: Iterable[Tensor]) -> int:
    """Return the bytes of all storages that autograd saves of `run`, but those of `given`."""
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    nbytes = sum(storage.nbytes() for storage in saved.values())
    loss.backward()
    return nbytes


class Adapted(nn.Linear):
    """A map that is not trained, and a pair of matrices beside it that are."""

    def __init__(self, inner: int, outer: int, *, bias: bool, rank: int) -> None:
        super().__init__(inner, outer, bias=bias)
        self.requires_grad_(False)
        self.a = nn.Linear(inner, rank, bias=False)
        self.b = nn.Linear(rank, outer, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.b(self.a(x)) * 0.5


class RMSNorm(nn.Module):
    def __init__(self, channels: int, *, offset: bool) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(channels)), offset

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (1.0 + self.weight) if self.offset else self.weight * x


class Written(nn.Module):
    """The whole model, one part a method, one layer's modules an entry of each list."""

    def __init__(self, model: Model, seq_len: int, rank: int = 0) -> None:
        super().__init__()
        self.of, self.rank = model, rank
        dropped = model.attention_dropout
        self.dropped_scores = model.dropout if dropped is None else dropped
        hidden, table = model.hidden_size, model.embedding_size
        self.token = nn.Embedding(model.vocab_size, table)
        self.project_in = nn.Linear(table, hidden, bias=False)
        self.project_out = nn.Linear(hidden, table, bias=False)
        self.position = nn.Embedding(max(model.max_positions, seq_len), hidden)
        self.kind = nn.Embedding(max(1, model.token_types), hidden)
        self.bias = nn.ModuleList(
            nn.Embedding(max(1, model.relative_buckets), model.num_heads) for _ in range(2)
        )
        self.embedding_norm, self.final_norm, self.encoder_norm = (self.norm() for _ in range(3))
        self.transform, self.transform_norm = nn.Linear(hidden, hidden), self.norm()
        self.head = nn.Linear(table, model.vocab_size, bias=model.head_bias)
        if model.tied:
            self.head.weight = self.token.weight
        self.encoder = nn.ModuleList(self.layer() for _ in range(model.encoder_layers))
        self.decoder = nn.ModuleList(
            self.layer(cross=model.encoder_layers > 0) for _ in range(model.num_layers)
        )
        if rank:
            self.requires_grad_(False)
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(".a." in name or ".b." in name)

    # ---- modules -----------------------------------------------------------------------------

    def norm(self, channels: int = 0) -> nn.Module:
        channels = channels or self.of.hidden_size
        if self.of.norm == "layer":
            return nn.LayerNorm(channels)
        return RMSNorm(channels, offset=self.of.norm_offset)

    def linear(self, inner: int, outer: int, *, bias: bool) -> nn.Module:
        if self.rank:
            return Adapted(inner, outer, bias=bias, rank=self.rank)
        return nn.Linear(inner, outer, bias=bias)

    def attention(self, *, fused: bool) -> nn.ModuleDict:
        model, bias = self.of, self.of.attention_bias
        sizes = {"q": model.query_size, "k": model.kv_size, "v": model.kv_size}
        if fused:
            sizes = {"qkv": sum(sizes.values())}
        maps = {
            name: self.linear(model.hidden_size, size, bias=bias) for name, size in sizes.items()
        }
        out_bias = bias if model.output_bias is None else model.output_bias
        maps["out"] = self.linear(model.query_size, model.hidden_size, bias=out_bias)
        norms = {name: self.norm(model.head_size) for name in ("q_norm", "k_norm")}
        return nn.ModuleDict(maps | (norms if model.head_norms else {}))

    def layer(self, *, cross: bool = False) -> nn.ModuleDict:
        model, hidden, inner = self.of, self.of.hidden_size, self.of.ffn_size
        fused = model.positions != "rotary" if model.fused_heads is None else model.fused_heads
        names = ["attention", *(["cross"] if cross else []), "perceptron"]
        parts = nn.ModuleDict({"attention": self.attention(fused=fused)})
        if cross:
            parts["cross"] = self.attention(fused=False)
        maps = {"up": (hidden, inner), "down": (inner, hidden)}
        if model.gated:
            maps["gate"] = (hidden, inner)
        parts["perceptron"] = nn.ModuleDict(
            {name: self.linear(*sizes, bias=model.ffn_bias) for name, sizes in maps.items()}
        )
        for name in names:
            parts[f"{name}_norm"], parts[f"{name}_norm_behind"] = self.norm(), self.norm()
        if model.num_experts:
            width = 2 * inner if model.gated else inner
            parts["router"] = self.linear(hidden, model.num_experts, bias=False)
            parts["experts"] = nn.ParameterDict(
                {
                    "up": nn.Parameter(0.02 * torch.randn(model.num_experts, hidden, width)),
                    "down": nn.Parameter(0.02 * torch.randn(model.num_experts, inner, hidden)),
                }
            )
        return parts

    # ---- what is computed --------------------------------------------------------------------

    def forward(self, tokens: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
        encoded = None
        tables = self.tables(tokens.shape[1])
        if self.of.encoder_layers:
            encoded = self.stack(self.embed(tokens), self.encoder, self.biases(tokens, 0), tables)
            encoded = self.encoder_norm(encoded)
        x = self.embed(targets)
        x = self.stack(x, self.decoder, self.biases(targets, 1), tables, encoded)
        return self.loss(x, labels)

    def embed(self, tokens: Tensor) -> Tensor:
        model, x = self.of, self.token(tokens)
        ids = torch.arange(tokens.shape[1])[None]
        if model.embedding_size != model.hidden_size:
            x = self.project_in(x)
        if model.token_types:
            x = x + self.kind(torch.zeros_like(ids).expand_as(tokens))
        if model.positions == "learned":
            x = x + (
                self.position.weight[: tokens.shape[1]] if model.token_types else self.position(ids)
            )
        return self.drop(self.embedding_norm(x) if model.embedding_norm else x)

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.of.dropout)

    def tables(self, seq_len: int) -> Tensor:
        """Return cosines and sines, one after the other, as one tensor."""
        channels = round(self.of.head_size * self.of.rotary_share)
        angles = torch.rand(seq_len, channels // 2).repeat(1, 2)
        return torch.stack((angles.cos(), angles.sin()))

    def biases(self, tokens: Tensor, stack: int) -> Tensor | None:
        if self.of.positions != "relative":
            return None
        at = torch.arange(tokens.shape[1])
        distance = (at[None] - at[:, None]).abs().clamp(max=self.of.relative_buckets - 1)
        bias: Tensor = self.bias[stack](distance).permute(2, 0, 1)[None]
        return bias

    def stack(
        self,
        x: Tensor,
        layers: nn.ModuleList,
        bias: Tensor | None,
        tables: Tensor,
        encoded: Tensor | None = None,
    ) -> Tensor:
        causal = self.of.causal and layers is self.decoder
        size = x.shape[1]
        no_bias = torch.zeros(1, self.of.num_heads, size, size)
        for layer in layers:
            parts: dict[str, Callable[[Tensor], Tensor]] = {
                "attention": lambda x, layer=layer: self.attend(  # type: ignore[misc]
                    layer["attention"], x, x, causal=causal, bias=bias, tables=tables
                ),
                "cross": lambda x, layer=layer: self.attend(  # type: ignore[misc]
                    layer["cross"], x, encoded, causal=False, no_bias=no_bias
                ),
                "perceptron": lambda x, layer=layer: self.perceive(layer, x),  # type: ignore[misc]
            }
            if encoded is None:
                del parts["cross"]
            x = (
                self.beside(layer, x, parts)
                if self.of.parallel_residual
                else self.behind(layer, x, parts)
            )
        return x

    def behind(
        self, layer: nn.ModuleDict, x: Tensor, parts: dict[str, Callable[[Tensor], Tensor]]
    ) -> Tensor:
        for name, part in parts.items():
            norm = layer[f"{name}_norm"]
            if self.of.norm_last:
                x = norm(x + self.drop(part(x)))
                continue
            out = part(norm(x))
            if self.of.norms_per_layer == 4:
                out = layer[f"{name}_norm_behind"](out)
            x = x + self.drop(out)
        return x

    def beside(
        self, layer: nn.ModuleDict, x: Tensor, parts: dict[str, Callable[[Tensor], Tensor]]
    ) -> Tensor:
        outs = [self.drop(part(layer[f"{name}_norm"](x))) for name, part in parts.items()]
        return outs[1] + outs[0] + x

    def attend(
        self,
        maps: nn.ModuleDict,
        x: Tensor,
        other: Tensor,
        *,
        causal: bool,
        bias: Tensor | None = None,
        tables: Tensor | None = None,
        no_bias: Tensor | None = None,
    ) -> Tensor:
        model, heads = self.of, (-1, self.of.head_size)
        if "qkv" in maps:
            sizes = (model.query_size, model.kv_size, model.kv_size)
            q, k, v = (part.unflatten(-1, heads) for part in maps["qkv"](x).split(sizes, -1))
        else:
            q, k, v = (
                maps[name](given).unflatten(-1, heads)
                for name, given in (("q", x), ("k", other), ("v", other))
            )
        if model.head_norms:
            q, k = maps["q_norm"](q), maps["k_norm"](k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if tables is not None and model.positions == "rotary":
            q, k = self.rotated(q, tables), self.rotated(k, tables)
        if bias is not None or model.score_softcap:
            mixed = self.plainly(q, k, v, bias, causal=causal)
        else:
            added = no_bias if model.positions == "relative" else None
            grouped = model.num_kv_heads < model.num_heads
            mixed = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=added,
                dropout_p=self.dropped_scores,
                is_causal=causal,
                enable_gqa=grouped,
            )
        out: Tensor = maps["out"](mixed.transpose(1, 2).contiguous().flatten(2))
        return out

    def rotated(self, x: Tensor, tables: Tensor) -> Tensor:
        cos, sin = tables
        x, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), -1)
        one, other = x.chunk(2, -1)
        turned = x * cos + torch.cat((-other, one), -1) * sin
        return turned if not rest.shape[-1] else torch.cat((turned, rest), -1)

    def plainly(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, causal: bool
    ) -> Tensor:
        group = self.of.num_heads // self.of.num_kv_heads
        if group > 1:
            k, v = (part.repeat_interleave(group, 1) for part in (k, v))
        scores = torch.matmul(q, k.transpose(2, 3))
        if self.of.score_softcap:
            scores = torch.tanh(scores * 0.1 / 50.0) * 50.0
        size = q.shape[2]
        seen = torch.ones(1, 1, size, size, dtype=torch.bool).tril()
        if bias is not None:
            scores = scores + (torch.where(seen, bias, -1e9) if causal else bias)
        else:
            scores = scores + torch.where(seen, 0.0, -1e9)
        return torch.matmul(F.dropout(scores.softmax(-1), self.dropped_scores), v)

    def perceive(self, layer: nn.ModuleDict, x: Tensor) -> Tensor:
        maps, active = layer["perceptron"], ACTIVATIONS[self.of.activation]
        if self.of.num_experts:
            return self.choose(layer, x)
        up = active(maps["gate"](x)) * maps["up"](x) if self.of.gated else active(maps["up"](x))
        out: Tensor = maps["down"](self.drop(up) if self.of.positions == "relative" else up)
        return out

    def choose(self, layer: nn.ModuleDict, x: Tensor) -> Tensor:
        """Map each token by those experts that its router likes best."""
        model, given = self.of, x
        x = x.flatten(0, 1)
        likely = layer["router"](x).softmax(-1)
        weights, experts = likely.topk(model.experts_per_token, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = experts.flatten().argsort()
        ends = experts.flatten().bincount(minlength=model.num_experts).cumsum(0).int()
        chosen = x[order // model.experts_per_token]
        weights = weights.flatten()[order]
        up = F.grouped_mm(chosen, layer["experts"]["up"], offs=ends)
        active = ACTIVATIONS[model.activation]
        if model.gated:
            gate, other = up.chunk(2, -1)
            up = active(gate) * other
        else:
            up = active(up)
        out = F.grouped_mm(up, layer["experts"]["down"], offs=ends) * weights[:, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        out = out[back].unflatten(0, (-1, model.experts_per_token)).sum(1)
        return out.view_as(given)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        model = self.of
        if model.final_norm:
            x = self.final_norm(x)
        if model.head_transform:
            x = self.transform_norm(ACTIVATIONS[model.activation](self.transform(x)))
        if model.embedding_size != model.hidden_size:
            x = self.project_out(x)
        logits = self.head(x)
        if model.head_softcap:
            logits = torch.tanh(logits / 30.0) * 30.0
        if model.causal and not model.encoder_layers:
            labels = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
