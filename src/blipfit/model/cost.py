"""What a model costs by its shapes alone: FLOPs of the three stages, parameters, bytes of weights.

FLOPs are of matrix products, a multiply-add counted as 2, as torch's FLOP counter does: linear layers, the patch
convolution and both products of attention, over all pairs of tokens also where a mask hides some. They follow from a
configuration, so a model on the meta device has them. LoRA adds nothing here: merged, it costs nothing.

`P` image tokens, `Q` query tokens, `T` prompt tokens, `A` answer tokens (the end token included), `D` width.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long one question is, in tokens."""

    text: int = 40
    """Prompt of the language model, without the visual tokens."""
    qformer: int = 40
    """Prompt of the Q-Former."""
    answer: int = 8
    """Answer, or each candidate, with its end token."""
    candidates: int = 4
    """Candidates to rank."""


def flops(config: Any, lengths: Lengths) -> dict[str, int]:
    """FLOPs of one image through `see`, and of one question through `query` and the ways to `answer`.

    `answer`: one forward with a known answer, as in training. `rank`: the likelihoods of all candidates, the prompt
    read once. `generate`: as many tokens as the answer has, greedily, with cached keys and values.
    """
    return {
        "see": see(config),
        "query": query(config, lengths.qformer),
        "answer": answer(config, lengths.text, lengths.answer),
        "rank": rank(config, lengths.text, lengths.answer, lengths.candidates),
        "generate": generate(config, lengths.text, lengths.answer),
    }


def image_tokens(config: Any) -> int:
    """P: patches and the class token."""
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1


def see(config: Any) -> int:
    """The vision tower on one image."""
    c, P = config.vision_config, image_tokens(config)
    patches = 2 * (P - 1) * 3 * c.patch_size**2 * c.hidden_size
    layer = _linear(P, 4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size) + _products(P, P, c.hidden_size)
    return patches + c.num_hidden_layers * layer


def query(config: Any, T: int) -> int:
    """The Q-Former over Q query and T text tokens, its cross-attention over the image tokens, and the projection."""
    c, P, Q = config.qformer_config, image_tokens(config), config.num_query_tokens
    D, E = c.hidden_size, c.encoder_hidden_size
    attention = _linear(Q + T, 4 * D**2) + _products(Q + T, Q + T, D)
    feed_forward = _linear(Q + T, 2 * D * c.intermediate_size)  # two branches; a token takes one of them
    cross = _linear(Q, 2 * D**2) + _linear(P, 2 * D * E) + _products(Q, P, D)
    crossings = -(-c.num_hidden_layers // c.cross_attention_frequency)
    projection = _linear(Q, D * config.text_config.hidden_size)
    # The text in the last layer gives keys and values and asks for nothing.
    unread = _linear(T, 2 * D**2 + 2 * D * c.intermediate_size) + _products(T, Q + T, D)
    return c.num_hidden_layers * (attention + feed_forward) - unread + crossings * cross + projection


def answer(config: Any, T: int, A: int) -> int:
    """The language model on one prompt with its answer; only the answer's tokens reach the head."""
    c, L = config.text_config, config.num_query_tokens + T
    if c.model_type == "t5":
        return _t5_memory(c, L) + _t5_decoder(c, A, L, pairs=A * A) + _head(c, A)
    return _llama(c, L + A, (L + A) ** 2) + _head(c, A)


def rank(config: Any, T: int, A: int, M: int) -> int:
    """M candidates of A tokens each after one prompt: what can be shared is computed once.

    T5's decoder reads its start token once, then all but the last token of every candidate; a causal model reads the
    prompt once, then all but the last token of every candidate.
    """
    c, L = config.text_config, config.num_query_tokens + T
    rest = M * (A - 1)
    if c.model_type == "t5":
        read = _t5_decoder(c, 1, L, pairs=1) + _t5_decoder(c, rest, L, pairs=rest * A)
        return _t5_memory(c, L) + read + _head(c, M * A)
    return _llama(c, L, L * L) + _llama(c, rest, rest * (L + A - 1)) + _head(c, M * A)


def generate(config: Any, T: int, A: int) -> int:
    """A new tokens, one after the other: step i attends to what came before it."""
    c, L = config.text_config, config.num_query_tokens + T
    if c.model_type == "t5":
        return _t5_memory(c, L) + _t5_decoder(c, A, L, pairs=A * (A + 1) // 2) + _head(c, A)
    later = sum(L + step for step in range(1, A))
    return _llama(c, L, L * L) + _llama(c, A - 1, later) + _head(c, A)


def _linear(tokens: int, weights: int) -> int:
    return 2 * tokens * weights


def _products(readers: int, read: int, width: int) -> int:
    """Scores and weighted values of attention, all heads."""
    return 4 * readers * read * width


def _t5_memory(c: Any, L: int) -> int:
    """The encoder over L tokens, and the decoder's keys and values of its output."""
    inner = c.num_heads * c.d_kv
    layer = _linear(L, 4 * c.d_model * inner + _t5_feed_forward(c)) + _products(L, L, inner)
    return c.num_layers * layer + c.num_decoder_layers * _linear(L, 2 * c.d_model * inner)


def _t5_decoder(c: Any, tokens: int, L: int, pairs: int) -> int:
    """The decoder over some tokens that read `pairs` pairs of each other and, each, a memory of L tokens."""
    inner = c.num_heads * c.d_kv
    layer = _linear(tokens, 6 * c.d_model * inner + _t5_feed_forward(c))
    return c.num_decoder_layers * (layer + _products(1, pairs, inner) + _products(tokens, L, inner))


def _t5_feed_forward(c: Any) -> int:
    return (3 if c.is_gated_act else 2) * c.d_model * c.d_ff


def _llama(c: Any, tokens: int, pairs: int) -> int:
    """The layers over some tokens that read `pairs` pairs of tokens."""
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    queries, keys = c.num_attention_heads * width, c.num_key_value_heads * width
    layer = _linear(tokens, c.hidden_size * (2 * queries + 2 * keys + 3 * c.intermediate_size))
    return c.num_hidden_layers * (layer + _products(1, pairs, queries))


def _head(c: Any, tokens: int) -> int:
    return _linear(tokens, c.hidden_size * c.vocab_size)


# ------------------------------------------------------------------ weights

_TRAINED = ("query_tokens", "qformer", "projection", "vision layer norm")


def parameters(hf: nn.Module) -> dict[str, int]:
    """Parameters by part of the model; a tied weight counts once."""
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
    """What shrinking makes less: query tokens, Q-Former and projection."""
    counts = parameters(hf)
    return counts["query_tokens"] + counts["qformer"] + counts["projection"]


def weight_bytes(hf: nn.Module) -> dict[str, int]:
    """Bytes of the weights as they are loaded, by their types."""
    found: dict[str, int] = {}
    for parameter in hf.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        found[name] = found.get(name, 0) + parameter.numel() * parameter.element_size()
    return found


def loaded_bytes(hf: nn.Module) -> dict[str, int]:
    """Bytes the weights will take when loaded: all in fp32, or 16-bit where they stay frozen."""
    counts = parameters(hf)
    trained = sum(counts[part] for part in _TRAINED)
    total = sum(counts.values())
    return {"fp32": 4 * total, "16-bit": 4 * trained + 2 * (total - trained)}


def _count(module: nn.Module) -> int:
    return sum(_numel(parameter) for parameter in module.parameters())


def _numel(parameter: nn.Parameter) -> int:
    """Elements of a weight, also where bitsandbytes packs two of them into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()
