"""The families that `Mixtral` runs: what differs between their checkpoints, one entry each. It needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "num_local_experts", "num_experts_per_tok", "max_position_embeddings"),
)
# The only values that a config.json may have for what there is no code for, and the reason.
Fixed = dict[str, tuple[tuple[Any, ...], str]]
FIXED: Fixed = {
    "hidden_act": (("silu",), "the experts are SwiGLU"),
    "attention_bias": ((False, None), "projections have no bias"),
    "mlp_bias": ((False, None), "experts have no bias"),
    "partial_rotary_factor": ((1, None), "full heads are rotated"),
    "is_causal": ((True, None), "no query sees later keys"),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """module       of a layer's gate and experts, in files that hold a tensor for each expert
    projections  the names of an expert's gate, up and down projection in those files
    fields       the names in config.json of fields of MixtralConfig that have others there; of several the one it has
    switches     fields that count only where another field of config.json is true
    required     fields of MixtralConfig without a safe default
    defaults     values of fields that are not in config.json, where they are not MixtralConfig's
    fixed        more of FIXED
    norms        of queries and keys: "head", over each head; "row", over all heads; or None
    """

    module: str
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    switches: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = SIZES
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Fixed = field(default_factory=dict)
    norms: str | None = None

    def name_of(self, field: str, values: Mapping[str, Any] | None = None) -> str:
        """Return the name of a field in config.json, of several the one that its `values` have."""
        names = self.fields.get(field, (field,))
        return next((name for name in names if name in (values or ())), names[0])


EXPERTS = {"num_local_experts": ("num_experts", "num_local_experts"), "renormalize": ("norm_topk_prob",)}
# By model_type, after transformers' configurations and models of these names.
FAMILIES = {
    "mixtral": Family(
        module="block_sparse_moe",
        projections=("w1", "w3", "w2"),
        fields={"renormalize": ("norm_topk_prob",)},
        fixed={"norm_topk_prob": ((True, None), "the weights of a token's experts sum to 1")},
    ),
    "qwen3_moe": Family(
        module="mlp",
        fields={**EXPERTS, "intermediate_size": ("moe_intermediate_size",)},
        switches={"sliding_window": "use_sliding_window"},
        required=(*SIZES, "renormalize"),
        defaults={"rms_norm_eps": 1e-6, "bos_token_id": None, "eos_token_id": None},
        fixed={
            "mlp_only_layers": (([], None), "every layer has experts"),
            "decoder_sparse_step": ((1, None), "every layer has experts"),
        },
        norms="head",
    ),
    "olmoe": Family(
        module="mlp",
        fields=EXPERTS,
        required=(*SIZES, "renormalize"),
        defaults={"bos_token_id": None, "eos_token_id": 50279, "pad_token_id": 1},
        fixed={
            "clip_qkv": ((None,), "queries, keys and values are not clipped"),
            "sliding_window": ((None, 0, -1), "the family has no window"),
        },
        norms="row",
    ),
}
