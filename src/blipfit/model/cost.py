"""Cost of a model, computed from its shapes: FLOPs of the three stages, parameters, bytes of weights.

FLOPs are those of matrix products, a multiply-add counted as 2, as in torch's FLOP counter: linear layers, the patch
convolution and both products of attention, over all pairs of tokens even if a mask hides some. A configuration is
enough, so a model on the meta device works too. LoRA is not counted, because a merged adapter adds no cost.

`P` image tokens, `Q` query tokens, `T` prompt tokens, `A` answer tokens with the end token, `M` candidates, `L` tokens
of the language model's input (visual tokens and prompt), `D` width.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens of one question."""

    text: int = 40
    """Prompt of the language model without the visual tokens."""
    qformer: int = 40
    """Prompt of the Q-Former."""
    answer: int = 8
    """Answer, or each candidate, with the end token."""
    candidates: int = 4
    """Number of candidates to rank."""


def flops(config: Any, lengths: Lengths) -> dict[str, int]:
    """Return the FLOPs of `see` for one image, and of `query` and the three kinds of answering for one question.

    `answer`: one forward pass with a known answer, as in training. `rank`: the likelihoods of all candidates; the
    prompt is computed once. `generate`: as many tokens as the answer has, greedily, with cached keys and values.
    """
    return {
        "see": see(config),
        "query": query(config, lengths.qformer),
        "answer": answer(config, lengths.text, lengths.answer),
        "rank": rank(config, lengths.text, lengths.answer, lengths.candidates),
        "generate": generate(config, lengths.text, lengths.answer),
    }


def image_tokens(config: Any) -> int:
    """Return P: the number of patches plus the class token."""
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1


def see(config: Any) -> int:
    """Return the FLOPs of the vision tower for one image."""
    c, P = config.vision_config, image_tokens(config)
    patches = 2 * (P - 1) * 3 * c.patch_size**2 * c.hidden_size
    layer = _linear(P, 4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size) + _attention(P, P, c.hidden_size)
    return patches + c.num_hidden_layers * layer


def query(config: Any, T: int) -> int:
    """Return the FLOPs of the Q-Former and the projection for Q query tokens, T text tokens and P image tokens."""
    c, P, Q = config.qformer_config, image_tokens(config), config.num_query_tokens
    D, E = c.hidden_size, c.encoder_hidden_size
    attention = _linear(Q + T, 4 * D**2) + _attention(Q + T, Q + T, D)
    # There are two feed-forward branches; each token goes through one of them.
    feed_forward = _linear(Q + T, 2 * D * c.intermediate_size)
    cross = _linear(Q, 2 * D**2) + _linear(P, 2 * D * E) + _attention(Q, P, D)
    cross_layers = -(-c.num_hidden_layers // c.cross_attention_frequency)
    projection = _linear(Q, D * config.text_config.hidden_size)
    # In the last layer, text tokens give keys and values only: nothing reads their outputs.
    omitted = _linear(T, 2 * D**2 + 2 * D * c.intermediate_size) + _attention(T, Q + T, D)
    return c.num_hidden_layers * (attention + feed_forward) - omitted + cross_layers * cross + projection


def answer(config: Any, T: int, A: int) -> int:
    """Return the FLOPs of the language model for a prompt with its answer; only the answer's tokens reach the head."""
    c, L = config.text_config, config.num_query_tokens + T
    if c.model_type == "t5":
        return _t5_encoder(c, L) + _t5_decoder(c, A, L, pairs=A * A) + _head(c, A)
    return _llama(c, L + A, (L + A) ** 2) + _head(c, A)


def rank(config: Any, T: int, A: int, M: int) -> int:
    """Return the FLOPs of ranking M candidates of A tokens each after one prompt, with the shared part computed once.

    T5's decoder reads its start token once, then all but the last token of every candidate. A causal model reads the
    prompt once, then all but the last token of every candidate.
    """
    c, L = config.text_config, config.num_query_tokens + T
    rest = M * (A - 1)
    if c.model_type == "t5":
        decoder = _t5_decoder(c, 1, L, pairs=1) + _t5_decoder(c, rest, L, pairs=rest * A)
        return _t5_encoder(c, L) + decoder + _head(c, M * A)
    return _llama(c, L, L * L) + _llama(c, rest, rest * (L + A - 1)) + _head(c, M * A)


def generate(config: Any, T: int, A: int) -> int:
    """Return the FLOPs of generating A tokens, each of which attends to all tokens before it."""
    c, L = config.text_config, config.num_query_tokens + T
    if c.model_type == "t5":
        return _t5_encoder(c, L) + _t5_decoder(c, A, L, pairs=A * (A + 1) // 2) + _head(c, A)
    pairs = sum(L + step for step in range(1, A))
    return _llama(c, L, L * L) + _llama(c, A - 1, pairs) + _head(c, A)


def _linear(tokens: int, weights: int) -> int:
    return 2 * tokens * weights


def _attention(queries: int, keys: int, width: int) -> int:
    """Return the FLOPs of attention scores and weighted values, for all heads together."""
    return 4 * queries * keys * width


def _t5_encoder(c: Any, L: int) -> int:
    """Return the FLOPs of the encoder on L tokens, and of the decoder's keys and values of its output."""
    inner = c.num_heads * c.d_kv
    layer = _linear(L, 4 * c.d_model * inner + _t5_feed_forward(c)) + _attention(L, L, inner)
    return c.num_layers * layer + c.num_decoder_layers * _linear(L, 2 * c.d_model * inner)


def _t5_decoder(c: Any, tokens: int, L: int, pairs: int) -> int:
    """Return the FLOPs of the decoder on `tokens` tokens.

    `pairs`: number of pairs (query, key) of its self-attention. Each token also attends to L encoder outputs.
    """
    inner = c.num_heads * c.d_kv
    layer = _linear(tokens, 6 * c.d_model * inner + _t5_feed_forward(c))
    return c.num_decoder_layers * (layer + _attention(1, pairs, inner) + _attention(tokens, L, inner))


def _t5_feed_forward(c: Any) -> int:
    return (3 if c.is_gated_act else 2) * c.d_model * c.d_ff


def _llama(c: Any, tokens: int, pairs: int) -> int:
    """Return the FLOPs of the layers on `tokens` tokens; `pairs`: number of pairs (query, key) of their attention."""
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    queries, keys = c.num_attention_heads * width, c.num_key_value_heads * width
    layer = _linear(tokens, c.hidden_size * (2 * queries + 2 * keys + 3 * c.intermediate_size))
    return c.num_hidden_layers * (layer + _attention(1, pairs, queries))


def _head(c: Any, tokens: int) -> int:
    return _linear(tokens, c.hidden_size * c.vocab_size)


_FP32_PARTS = ("query_tokens", "qformer", "projection", "vision layer norm")
"""Parts that may be trained and therefore stay in fp32."""


def parameters(hf: nn.Module) -> dict[str, int]:
    """Return the number of parameters of each part of the model; a tied weight counts once."""
    model: Any = hf
    norm = _count(model.vision_model.post_layernorm)
    return {
        "vision": _count(model.vision_model) - norm,
        "vision layer norm": norm,
        "query_tokens": model.query_tokens.numel(),
        "qformer": _count(model.qformer),
        "projection": _count(model.language_projection),
        "language_model": _count(model.language_model),
    }


def qformer_parameters(hf: nn.Module) -> int:
    """Return the number of parameters that shrinking reduces: query tokens, Q-Former and projection."""
    counts = parameters(hf)
    return counts["query_tokens"] + counts["qformer"] + counts["projection"]


def weight_bytes(hf: nn.Module) -> dict[str, int]:
    """Return the bytes of the loaded weights by dtype."""
    sizes: dict[str, int] = {}
    for parameter in hf.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + parameter.numel() * parameter.element_size()
    return sizes


def loaded_bytes(hf: nn.Module) -> dict[str, int]:
    """Return the bytes of the weights once loaded: all in fp32, or the frozen parts in 16 bit."""
    counts = parameters(hf)
    fp32 = sum(counts[part] for part in _FP32_PARTS)
    total = sum(counts.values())
    return {"fp32": 4 * total, "16-bit": 4 * fp32 + 2 * (total - fp32)}


def _count(module: nn.Module) -> int:
    return sum(_numel(parameter) for parameter in module.parameters())


def _numel(parameter: nn.Parameter) -> int:
    """Return the number of elements of a weight, also if bitsandbytes packs two of them into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()
