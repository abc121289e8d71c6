"""The same numbers by another way: Hugging Face's own forward with `<image>` placeholders, one model an experiment."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from blipfit.adapters.bank import LORA_A, LORA_B
from blipfit.data.batches import EncodedQuestion
from blipfit.data.prompts import PromptedQuestion
from blipfit.model.backbone import Backbone
from blipfit.recipe import AdapterConfig

IGNORED = -100


def ask(backbone: Backbone, count: int = 4, options: int = 3) -> list[EncodedQuestion]:
    """Questions of very different lengths, so that every batch has padding."""
    prompted = []
    for n in range(count):
        candidates = tuple(f"({letter}) {'the word ' * i}{n}" for i, letter in enumerate("abcde"[: options + n % 2]))
        text = f"Question: {'which of all the things ' * (n % 3)}is number {n}? Short answer:"
        prompted.append(PromptedQuestion(text, candidates[n % len(candidates)], candidates))
    return backbone.text.encode(prompted)


def pictures(backbone: Backbone, count: int, seed: int = 0) -> Tensor:
    """Random pixels `B × 3 × S × S`."""
    generator = torch.Generator().manual_seed(seed)
    size = backbone.image_size
    return torch.randn(count, 3, size, size, generator=generator).to(backbone.hf.query_tokens.dtype)


def forward(
    hf: Any, backbone: Backbone, pixels: Tensor, rows: Sequence[tuple[list[int], list[int], list[int]]]
) -> tuple[Tensor, list[Tensor]]:
    """HF's forward over rows of (Q-Former ids, prompt ids, answer ids).

    Returns its own mean loss and, for each row, the logits `A × V` that predict its answer.
    """
    queries = [hf.config.image_token_id] * hf.config.num_query_tokens
    causal = backbone.family == "vicuna"
    qformer_ids, qformer_mask = _padded([q for q, _, _ in rows], backbone.text.qformer_tokenizer.pad_token_id)
    texts = [queries + prompt + (answer if causal else []) for _, prompt, answer in rows]
    ids, mask = _padded(texts, backbone.text.llm_tokenizer.pad_token_id)
    labels, _ = _padded(
        [([IGNORED] * (len(queries) + len(p)) if causal else []) + answer for _, p, answer in rows], IGNORED
    )
    out = hf(
        pixel_values=pixels,
        qformer_input_ids=qformer_ids,
        qformer_attention_mask=qformer_mask,
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
    )
    found = []
    for row, (_, prompt, answer) in enumerate(rows):
        first = len(queries) + len(prompt) - 1 if causal else 0
        found.append(out.logits[row, first : first + len(answer)])
    return out.loss, found


def log_likelihood(logits: Tensor, answer: Sequence[int]) -> float:
    """Sum of the log-probabilities of an answer's tokens."""
    return float(logits.double().log_softmax(-1)[range(len(answer)), list(answer)].sum())


def merged(hf: Any, adapter: AdapterConfig, state: Mapping[str, Tensor]) -> Any:
    """Write an experiment's tensors into a plain model: LoRA products onto the weights, the others in their place."""
    with torch.no_grad():
        for name, tensor in state.items():
            layer, _, last = name.rpartition(".")
            if last == LORA_A:
                product = state[f"{layer}.{LORA_B}"] @ tensor
                hf.get_parameter(f"{layer}.weight").add_(product * (adapter.alpha / adapter.rank))
            elif last != LORA_B:
                target = hf.get_parameter(name)
                target.copy_(tensor.view_as(target))
    return hf


def _padded(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def train(hf, backbone, batches, optimizer, steps) -> list[float]:
    """Loss of every step of `hf` with a torch optimizer, over the batches (questions, pixels) in turn."""
    losses = []
    for step in range(steps):
        encoded, pixels = batches[step % len(batches)]
        optimizer.zero_grad()
        loss, _ = forward(hf, backbone, pixels, [(e.qformer, e.training_prompt, e.target) for e in encoded])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def with_trained(backbone, file, encoded, pixels):
    """Logits at the labels of these questions, after the always-trained tensors of `file` took their places."""
    for name, tensor in load_file(file).items():
        parameter = backbone.hf.get_parameter(name)
        parameter.copy_(tensor.view_as(parameter))
    rows = [(e.qformer, e.training_prompt, e.target) for e in encoded]
    return torch.cat(forward(backbone.hf, backbone, pixels, rows)[1])
