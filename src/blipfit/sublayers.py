"""The table of sublayers that can be adapted: their names in recipes, and patterns of transformers' module names.

To add a sublayer, add a line. A pattern matches the whole module name of a linear layer; if two patterns match, its
parameters are counted for the first. (The names are those of the published experiments.)
"""

from collections.abc import Mapping

_LAYER = r"qformer\.encoder\.layer\.\d+\."

QFORMER: Mapping[str, str] = {
    "self_attn": _LAYER + r"attention\.attention\.(query|value)",
    "cross_attn": _LAYER + r"crossattention\.(attention\.(query|key|value)|output\.dense)",
    # Both branches, query and text.
    "ffn": _LAYER + r"(intermediate|intermediate_query|output|output_query)\.dense",
}
"""The Q-Former's sublayers. The output dense of the self-attention is not adapted, as in the published experiments."""

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
"""The language model's sublayers, with a pattern per family."""
