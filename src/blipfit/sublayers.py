"""Sublayers that can be adapted: their names in recipes, and where transformers keeps them. The one table of them.

A line here is all that a new placement takes. A pattern matches whole module names of linear layers; where two of a
tower match, parameters are counted with the first. (Source of the names: the original experiments.)
"""

from collections.abc import Mapping

_LAYER = r"qformer\.encoder\.layer\.\d+\."

QFORMER: Mapping[str, str] = {
    "self_attn": _LAYER + r"attention\.attention\.(query|value)",
    "cross_attn": _LAYER + r"crossattention\.(attention\.(query|key|value)|output\.dense)",
    # Both branches, query and text.
    "ffn": _LAYER + r"(intermediate|intermediate_query|output|output_query)\.dense",
}
"""The Q-Former's; the self-attention's output dense was never adapted."""

LANGUAGE: Mapping[str, Mapping[str, str]] = {
    "attn": {
        "t5": r"language_model\..*\.(SelfAttention|EncDecAttention)\.(q|v)",
        "vicuna": r"language_model\..*\.self_attn\.(q_proj|v_proj)",
    },
    "ffn": {
        "t5": r"language_model\..*\.DenseReluDense\.(wi_0|wi_1|wo)",
        "vicuna": r"language_model\..*\.mlp\.(gate_proj|up_proj|down_proj)",
    },
}
"""The language model's; every name has a pattern for each family."""
