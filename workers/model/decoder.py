"""The whole forward: rows of tokens in, logits of chosen rows out.

T rows of a step, S of them sampled, H hidden, V vocabulary. The residual stream stays in one tensor that is changed
in place where halves of layers are joined with it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.kernels.ops import Batch, KvCache, Linear, Ops, Sieve
from workers.model.attention import AttentionLayer, RopeTables, load_attention
from workers.model.ffn import DenseLayer, MoeLayer, load_ffn
from workers.model.latent import LatentAttention, load_latent
from workers.model.load import Loader
from workers.model.names import Names, find_names
from workers.model.norm import Joint, RowNorm, load_norm
from workers.model.rope import rope_tables, sinusoids
from workers.model.spec import ModelSpec, Rope
from workers.parallel.group import ALONE, Group
from workers.parallel.layers import DividedTable
from workers.parallel.share import ALONE as WHOLE
from workers.parallel.share import Share


@dataclass(frozen=True, slots=True)
class Layer:
    attention_in: Joint
    attention: AttentionLayer | LatentAttention
    attention_after: RowNorm | None  # of what attention gives
    ffn_in: Joint
    ffn: DenseLayer | MoeLayer
    ffn_after: RowNorm | None
    rope: RopeTables


@dataclass(frozen=True, slots=True)
class Embedding:
    """What stands at the beginning of the stream: ids [T] -> [T, H]"""

    table: Tensor  # [V, embed_dim], or this rank's rows of it
    divided: DividedTable | None  # looks rows up that other ranks have
    scale: float
    project: Linear | None  # embed_dim -> H
    positions: Tensor | None  # added, [context + offset, H]
    offset: int

    def __call__(self, ops: Ops, ids: Tensor, at: Tensor) -> Tensor:
        x = ops.embed(self.table, ids) if self.divided is None else self.divided(ops, ids)
        if self.scale != 1.0:
            x *= self.scale
        if self.project is not None:
            x = self.project(x)
        if self.positions is not None:
            x += self.positions[at + self.offset]
        return x


@dataclass(frozen=True, slots=True)
class Decoder:
    """What its ModelSpec says."""

    spec: ModelSpec
    ops: Ops
    embed: Embedding
    layers: tuple[Layer, ...]
    final: Joint
    project_out: Linear | None  # H -> embed_dim
    head: Linear  # [V, embed_dim], or this rank's rows of it
    sieve: Sieve | None = None  # of the head, where one row's likeliest token can be had for less than all logits
    share: Share = WHOLE
    group: Group = ALONE

    @property
    def device(self) -> torch.device:
        return self.embed.table.device

    @property
    def kv_heads(self) -> range:
        """Heads of the cache that this rank keeps."""
        return self.share.kv_heads(self.spec.attention)

    @torch.inference_mode()
    def forward(self, ids: Tensor, batch: Batch, caches: list[KvCache], sampled: Tensor) -> Tensor:
        """ids: int64 [T]; caches: one per cache group; sampled: int64 [S], ascending -> logits [S, V], of a
        divided model this rank's columns of them."""
        return self.logits(_in_turns([self._layers(ids, batch, caches, sampled)])[0])

    @torch.inference_mode()
    def forward_likeliest(
        self, ids: Tensor, batch: Batch, caches: list[KvCache], sampled: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`forward` for a step whose one sampled row is wanted for its likeliest token alone: that and its logit,
        int64 [1] and float32 [1]; where it took all logits to find it, those."""
        x = _in_turns([self._layers(ids, batch, caches, sampled)])[0]
        found = None if self.sieve is None else self.sieve(self._before_head(x))
        return self.logits(x) if found is None else found

    @torch.inference_mode()
    def forward_halves(self, halves: Sequence[tuple[Tensor, Batch, Tensor]], caches: list[KvCache]) -> list[Tensor]:
        """`forward` of (ids, batch, sampled) each, layer by layer in turns, so that this device has something to do
        while experts elsewhere compute. Rows of a later half may read what an earlier one writes."""
        passes = [self._layers(ids, batch, caches, sampled) for ids, batch, sampled in halves]
        return [self.logits(x) for x in _in_turns(passes)]

    def _layers(
        self, ids: Tensor, batch: Batch, caches: list[KvCache], sampled: Tensor
    ) -> Generator[None, None, Tensor]:
        """The normed stream of the sampled rows, [S, H]. Yields where rows are on their way to experts."""
        ops, parallel = self.ops, self.spec.block.parallel
        stream, delta = self.embed(ops, ids, batch.positions), None
        for layer in self.layers:
            x = layer.attention_in(ops, delta, stream)
            x = layer.attention.mix(ops, x, layer.rope, batch, caches)
            if layer is self.layers[-1] and len(sampled) < len(ids):  # from here on only the rows that somebody wants
                if not len(sampled):
                    return stream[:0]
                x, stream = x[sampled], stream[sampled]
            delta = _after(ops, layer.attention.out(x), layer.attention_after)
            x = layer.ffn_in(ops, None if parallel else delta, stream)
            if isinstance(layer.ffn, MoeLayer):
                finish = layer.ffn.begin(ops, x)
                yield
                x = finish()
            else:
                x = layer.ffn(ops, x)
            if parallel:
                delta += x
            else:
                delta = _after(ops, x, layer.ffn_after)
        return self.final(ops, delta, stream)

    def logits(self, x: Tensor) -> Tensor:
        """[S, H] -> [S, V]"""
        logits = self.head(self._before_head(x))
        cap = self.spec.final_softcap
        return logits if cap is None else self.ops.softcap(logits, cap)

    def _before_head(self, x: Tensor) -> Tensor:
        return x if self.project_out is None else self.project_out(x)


def _in_turns(passes: Sequence[Generator[None, None, Tensor]]) -> list[Tensor]:
    """Runs each up to where it yields, again and again; what they return."""
    results: dict[int, Tensor] = {}
    while len(results) < len(passes):
        for i, each in enumerate(passes):
            if i not in results:
                try:
                    next(each)
                except StopIteration as end:
                    results[i] = end.value
    return [results[i] for i in range(len(passes))]


def _after(ops: Ops, x: Tensor, norm: RowNorm | None) -> Tensor:
    return x if norm is None else norm(ops, x)


def load_decoder(spec: ModelSpec, load: Loader, ops: Ops, max_context: int, device: torch.device) -> Decoder:
    """Packs every weight. Raises CheckpointError that names the file and the tensor."""
    names = find_names(spec.names, load.has)
    tables: dict[Rope | None, RopeTables] = {None: (None, None)}
    for rope in spec.rope:
        if rope not in tables:
            tables[rope] = _tables(spec, rope, max_context, device)
    embed = _load_embedding(spec, load, names, max_context)
    layers, final = _load_layers(spec, load, names, tables)
    width = spec.embed_dim or spec.hidden
    head, sieve = _load_head(spec, load, names, embed.table, width)
    return Decoder(
        spec=spec,
        ops=ops,
        embed=embed,
        layers=layers,
        final=final,
        project_out=load.linear([names.within(names.project_out)], [width], spec.hidden, bias=False)
        if spec.embed_dim
        else None,
        head=head,
        sieve=sieve,
        share=load.share,
        group=load.group,
    )


def _load_head(spec: ModelSpec, load: Loader, names: Names, table: Tensor, width: int) -> tuple[Linear, Sieve | None]:
    """The head, of `table` where it is tied. A cap on logits could make equals of them that a sieve tells apart."""
    weight = table
    if not spec.tie_embeddings:
        weight = load.rows(f"{names.head}.weight", spec.vocab_size, width, rows=[load.share.some(spec.vocab_size)])
    head = load.ops.linear(weight)
    return head, load.ops.sieve(head, weight) if load.share.size == 1 and spec.final_softcap is None else None


def _tables(spec: ModelSpec, rope: Rope, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of a model that tells long prompts from others, the rows for long ones come after all others."""
    parts = [rope_tables(rope, spec.attention.head_dim, positions)]
    if spec.long_prompt is not None:
        parts.append(rope_tables(rope, spec.attention.head_dim, positions, long=True))
    cos, sin = (torch.cat(each).to(device) for each in zip(*parts, strict=True))
    return cos, sin


def _load_embedding(spec: ModelSpec, load: Loader, names: Names, max_context: int) -> Embedding:
    dtype, positions, offset = load.ops.dtype, None, 0
    width = spec.embed_dim or spec.hidden
    vocabulary = load.share.some(spec.vocab_size)
    table = load.table(f"{names.within(names.embedding)}.weight", spec.vocab_size, width, vocabulary)
    if spec.positions is not None:
        offset = spec.positions.offset
        if spec.positions.kind == "learned":
            positions = load.table(f"{names.within(names.positions)}.weight", spec.max_context + offset, spec.hidden)
        else:
            positions = sinusoids(max_context + offset, spec.hidden).to(table)
    return Embedding(
        table=table,
        divided=DividedTable(table, vocabulary.start, load.group) if load.share.size > 1 else None,
        scale=torch.tensor(spec.embed_scale, dtype=dtype).item(),  # rounded as Gemma's reference does
        project=load.linear([names.within(names.project_in)], [spec.hidden], width, bias=False)
        if spec.embed_dim
        else None,
        positions=positions,
        offset=offset,
    )


def _load_layers(
    spec: ModelSpec, load: Loader, names: Names, tables: dict[Rope | None, RopeTables]
) -> tuple[tuple[Layer, ...], Joint]:
    """The layers, and the joint behind the last one."""
    norms = spec.block.norms
    before, after, post = norms in ("pre", "sandwich"), norms in ("after", "sandwich"), norms == "post"

    def norm(name: str) -> RowNorm:
        return load_norm(spec.norm, name, spec.hidden, load)

    layers, following = [], Joint()  # what joins the next half: of post-norm layers it has the norm of the one before
    for i in range(spec.layers):
        prefix = names.layer(i)
        attention_in = Joint(norm(f"{prefix}.{names.attention_norm}")) if before else following
        if post:
            ffn_in = Joint(norm(f"{prefix}.{names.attention_norm}"), keep=True)
            following = Joint(norm(f"{prefix}.{names.ffn_norm}"), keep=True)
        else:
            ffn_in = Joint(norm(f"{prefix}.{names.ffn_norm}")) if before else following
        layers.append(
            Layer(
                attention_in=attention_in,
                attention=load_latent(spec, i, load) if spec.attention.latent else load_attention(spec, i, load, names),
                attention_after=norm(f"{prefix}.{names.attention_after}") if after else None,
                ffn_in=ffn_in,
                ffn=load_ffn(spec, i, load, names),
                ffn_after=norm(f"{prefix}.{names.ffn_after}") if after else None,
                rope=tables[spec.rope[i]],
            )
        )
    final = Joint(norm(names.within(names.final_norm))) if spec.final_norm else following
    return tuple(layers), final
