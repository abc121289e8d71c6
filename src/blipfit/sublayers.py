"""The table of sublayers that can be adapted: their names in recipes, and patterns of transformers' module names.

It also gives the components by which parameters are counted.

To add a sublayer, add a line. A pattern matches the whole module name of a linear layer; if two patterns match, its
parameters are counted for the first. (The names are those of the published experiments.)
"""

import re
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

QUERY_TOKENS = "query_tokens"
VISION_NORM = "vision_model.post_layernorm"
PROJECTION = "language_projection"
"""The last of the three parts that every experiment trains."""


def component_of(name: str) -> str:
    """The component of the model that a module or parameter belongs to: a row of the cost table."""
    if name.startswith("qformer."):
        return next(
            (f"qformer {sublayer}" for sublayer, pattern in QFORMER.items() if re.match(pattern, name)),
            "qformer other",
        )
    if name.startswith("language_model."):
        return next(
            (
                f"llm {sublayer}"
                for sublayer, patterns in LANGUAGE.items()
                if any(re.match(pattern, name) for pattern in patterns.values())
            ),
            "llm other",
        )
    if name.startswith(QUERY_TOKENS):
        return "query tokens"
    if name.startswith(VISION_NORM):
        return "vision layer norm"
    return "projection" if name.startswith(PROJECTION) else "vision"
