"""The part of a checkpoint that one rank of a mesh stores.

n = tp x ep ranks; D head size, K columns

Attention is split by heads and the language model head by vocabulary over all n ranks, experts over "ep" and the
intermediate size of each over "tp"; embedding, norms and gate are replicated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..kernels.weights.quantized import QuantSpec
from .config import MixtralConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """The part of the weights that one rank stores, by default all of them: of `tp` and `ep` ranks along the dimensions
    of the mesh, the one with these indices along each, and `rank` among all."""

    tp: int = 1
    ep: int = 1
    tp_rank: int = 0
    ep_rank: int = 0
    rank: int = 0

    @property
    def ranks(self) -> int:
        return self.tp * self.ep

    def check(self, config: MixtralConfig) -> None:
        """Raise ValueError where the ranks do not divide a size of the model."""
        n, keys = self.ranks, config.num_key_value_heads
        for name, unmet, need in (
            ("num_attention_heads", config.num_attention_heads % n, f"a multiple of {n}"),
            ("num_key_value_heads", keys % n and n % keys, f"a multiple or a divisor of {n}"),
            ("num_local_experts", config.num_local_experts % self.ep, f"a multiple of {self.ep}"),
            ("intermediate_size", config.intermediate_size % self.tp, f"a multiple of {self.tp}"),
            ("vocab_size", config.vocab_size < n, f"at least {n}"),
            ("model_type", n > 1 and config.family.norms == "row", "no norm of queries and keys over all heads"),
        ):
            if unmet:
                mesh, got = f"mesh has tp {self.tp} x ep {self.ep} = {n} ranks", getattr(config, name)
                name = config.family.name_of(name)
                raise ValueError(f"Mixtral.from_pretrained: {mesh}: {name} is {got}, needs {need}")

    def config(self, config: MixtralConfig) -> MixtralConfig:
        """Return the model's config with this rank's heads."""
        queries, keys = self.queries(config), self.keys(config)
        heads = {"num_attention_heads": queries.stop - queries.start, "num_key_value_heads": keys.stop - keys.start}
        return replace(config, **heads) if self.ranks > 1 else config

    # This rank's query heads, experts, part of each expert's intermediate size, and rows of the language model head.
    def queries(self, config: MixtralConfig) -> slice:
        return even(config.num_attention_heads, self.rank, self.ranks)

    def experts(self, config: MixtralConfig) -> slice:
        return even(config.num_local_experts, self.ep_rank, self.ep)

    def inner(self, config: MixtralConfig) -> slice:
        return even(config.intermediate_size, self.tp_rank, self.tp)

    def vocabulary(self, config: MixtralConfig) -> slice:
        return even(config.vocab_size, self.rank, self.ranks)

    def keys(self, config: MixtralConfig) -> slice:
        """Return the key/value heads that its query heads read; ranks share one where there are fewer than ranks."""
        heads = config.num_key_value_heads
        start = heads * self.rank // self.ranks
        return slice(start, start + max(1, heads // self.ranks))

    def qkv_rows(self, config: MixtralConfig) -> dict[str, slice]:
        """Return the rows of its heads in each of the stored projections."""
        D, queries, keys = config.head_dim, self.queries(config), self.keys(config)
        key_rows = slice(keys.start * D, keys.stop * D)
        return {"q": slice(queries.start * D, queries.stop * D), "k": key_rows, "v": key_rows}

    def specs(
        self, specs: Mapping[str, QuantSpec], full: Mapping[str, Shape], local: Mapping[str, Shape]
    ) -> dict[str, QuantSpec]:
        """Return the specs of this rank's parts, given the specs and the `full` and `local` shapes by parameter. Parts
        of a row with one scale keep it. Raises ValueError where a group of columns would be cut."""
        parts = {}
        for name, spec in specs.items():
            K, columns = full[name][-1], local[name][-1]
            if spec.group != K and columns % spec.group:
                cut = f"mesh cuts the {K} columns of {name} into {columns} a rank"
                raise ValueError(f"Mixtral.from_pretrained: {cut}, needs a multiple of the group, {spec.group}")
            parts[name] = replace(spec, group=columns) if spec.group == K else spec
        return parts


UNSHARDED = Shard()


def even(size: int, part: int, parts: int) -> slice:
    """Return the range of `part` where 0..size is split into `parts` ranges whose lengths differ by at most one."""
    return slice(size * part // parts, size * (part + 1) // parts)
