"""The model as three stages, see → query → answer, computed by Hugging Face's own modules.

`K` experiments of a bank, `B` questions, `S` pixels per side, `P` image tokens, `Q` query tokens, `T` prompt tokens,
`A` answer tokens, `M` candidates, `N` label positions, `V` vocabulary, `R` rows, `D` width. Rows of a bank's tensors
are K-major: row k·B + b belongs to question b of experiment k.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfit.data.batches import CandidateBatch, PromptBatch, TargetBatch, TextEncoder
from blipfit.model import checkpoint_files
from blipfit.recipe import Family
from blipfit.runtime import attention, onednn


@dataclass(frozen=True, slots=True)
class CandidateScores:
    """Log-likelihoods of all candidates."""

    sums_KM: Tensor
    """Sum of the log-probabilities of a candidate's tokens."""
    lengths_M: Tensor
    """Number of a candidate's tokens."""


class Backbone:
    """An InstructBLIP model with its tokenizers; every use of the model goes through its three stages.

    `hf` is an `InstructBlipForConditionalGeneration` whose Q-Former and language model compute their attention in
    `runtime.attention`. K is 1 unless a bank is installed in the model; a bank makes the query tokens `K × Q × D`.
    `autocast`: the 16-bit dtype of the stages `query` and `answer`, None for fp32. `weight_files`: the files that the
    weights come from, if any. `is_sharded`: the language model's layers are distributed over the processes
    (`runtime.sharding`), so all processes must run the stage `answer` equally often.
    """

    def __init__(
        self,
        hf: Any,
        text: TextEncoder,
        family: Family,
        name: str,
        autocast: torch.dtype | None = None,
        weight_files: tuple[Path, ...] = (),
        is_sharded: bool = False,
    ):
        self.hf, self.text, self.family, self.name = hf, text, family, name
        self.autocast_dtype, self.weight_files, self.is_sharded = autocast, weight_files, is_sharded
        self.language = hf.language_model
        attention.enable(hf.qformer)
        attention.enable(hf.language_model)
        last_attention = hf.qformer.encoder.layer[-1].attention
        if not hasattr(last_attention, ROW_LIMIT):
            last_attention.register_forward_pre_hook(_drop_text_rows, with_kwargs=True)
        setattr(last_attention, ROW_LIMIT, None)  # set inside `query` only: Hugging Face's own forward does not change

    @property
    def device(self) -> torch.device:
        return self.hf.query_tokens.device

    @property
    def image_size(self) -> int:
        return self.hf.config.vision_config.image_size

    @property
    def experiments(self) -> int:
        """K: the number of experiments of the installed bank, 1 without a bank."""
        return self.hf.query_tokens.shape[0]

    @cached_property
    def base_sha256(self) -> str | None:
        """The digest of the base weights' files (`checkpoint_files.digest`), None for a model that has no files."""
        return checkpoint_files.digest(self.weight_files) if self.weight_files else None

    def layers(self, stage: Literal["query", "answer"]) -> list[nn.Module]:
        """Return the transformer layers of the Q-Former or of the language model (T5: encoder, then decoder).

        The Q-Former's last layer is not among them, because what it computes depends on the caller (see `query`).
        """
        if stage == "query":
            return list(self.hf.qformer.encoder.layer[:-1])
        return language_layers(self.language, self.family)

    def repeated_layers(self) -> list[nn.Module]:
        """Return the layers that are alike, so that compiling the first of a kind serves all others.

        T5's first layers, which also compute the position bias, are not among them: compiling each of them would take
        as long as compiling all the others.
        """
        answer = self.layers("answer")
        if self.family == "t5":
            answer = [*self.language.encoder.block[1:], *self.language.decoder.block[1:]]
        return [*self.layers("query"), *answer]

    @contextmanager
    def arithmetic(self, stage: Literal["query", "answer"] = "answer") -> Iterator[None]:
        """Context of the stages `query` and `answer`: autocast if a 16-bit dtype is set, and oneDNN on a CPU.

        Without gradients, that is in evaluation, the Q-Former runs in fp32, as the original evaluates it.
        """
        enabled = self.autocast_dtype is not None and (stage == "answer" or torch.is_grad_enabled())
        with (
            torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=enabled),
            onednn.onednn_products(self.device.type),
        ):
            yield

    @torch.no_grad()
    def see(self, pixels_B3SS: Tensor) -> Tensor:
        """Pixels → image features `B × P × D`, taken BEFORE the trained layer norm.

        The vision tower is frozen and in eval mode. Its embeddings, layer norms and residual stream are in fp32; linear
        layers in 16 bit run under autocast in their own dtype. A caller's autocast and oneDNN have no effect, so that
        features do not depend on the caller.
        """
        vision = self.hf.vision_model
        dtype = self.tower_dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            embedded = vision.embeddings(pixels_B3SS.to(vision.embeddings.position_embedding.dtype))
            return vision.encoder(inputs_embeds=embedded).last_hidden_state

    @property
    def tower_dtype(self) -> torch.dtype | None:
        """The dtype of the vision tower's linear layers if it has 16 bits, None for fp32 and fp64."""
        dtype: torch.dtype = self.hf.vision_model.encoder.layers[0].mlp.fc1.weight.dtype
        return dtype if dtype in (torch.float16, torch.bfloat16) else None

    def query(
        self, features_BPD: Tensor, batch: PromptBatch | TargetBatch | CandidateBatch, all_rows: bool = False
    ) -> Tensor:
        """Image features and instruction → visual tokens `K·B × Q × D_language`.

        `all_rows`: also compute the last layer's rows of text tokens, which only hooks on that layer can read.
        """
        hf, K = self.hf, self.experiments
        B = features_BPD.shape[0]
        with self.arithmetic("query"):
            # A bank's layer norm returns K results for one input, because all experiments share the features.
            normed = hf.vision_model.post_layernorm(features_BPD.to(hf.query_tokens.dtype).unsqueeze(0))
            features = normed.expand(K, -1, -1, -1).flatten(0, 1)
            queries_KQD = hf.query_tokens
            queries = queries_KQD.unsqueeze(1).expand(-1, B, -1, -1).reshape(K * B, *queries_KQD.shape[1:])
            Q = queries.shape[1]
            ids = repeat_for_bank(batch.qformer_ids_BT, K)
            mask = torch.cat([batch.qformer_mask_BT.new_ones(B, Q), batch.qformer_mask_BT], dim=1)
            with _query_rows(hf.qformer.encoder.layer[-1].attention, None if all_rows else Q):
                hidden = hf.qformer(
                    input_ids=ids,
                    attention_mask=_attention_mask(repeat_for_bank(mask, K)),
                    # K·B rows instead of 1: a bank's position embedding derives the experiment from the row.
                    position_ids=torch.arange(ids.shape[1], device=ids.device).expand_as(ids),
                    query_embeds=queries,
                    encoder_hidden_states=features,
                ).last_hidden_state
            return hf.language_projection(hidden[:, :Q])

    def losses(self, visual: Tensor, batch: TargetBatch) -> Tensor:
        """Visual tokens and targets → sum of the negative log-likelihoods of the N labels, per experiment (shape K)."""
        logits_KNV = self.target_logits(visual, batch)
        K, N, _ = logits_KNV.shape
        labels = batch.labels_N.expand(K, N).reshape(-1)
        # A label of −100 adds a loss of zero.
        return F.cross_entropy(_to_fp32(logits_KNV.flatten(0, 1)), labels, reduction="none").view(K, N).sum(1)

    def target_logits(self, visual: Tensor, batch: TargetBatch) -> Tensor:
        """Visual tokens and targets → logits `K × N × V` at the label positions only."""
        K = visual.shape[0] // batch.text_ids_BT.shape[0]
        with self.arithmetic():
            inputs, mask = self._language_inputs(visual, batch)
            if self.family == "t5":
                mask = _attention_mask(mask)
                memory = self.language.encoder(inputs_embeds=inputs, attention_mask=mask).last_hidden_state
                assert batch.decoder_ids_BA is not None
                decoded = self._decode(repeat_for_bank(batch.decoder_ids_BA, K), memory, mask, use_cache=False)
                hidden = self._scale_for_head(decoded.last_hidden_state)
            else:
                hidden = self.language.model(
                    inputs_embeds=inputs, attention_mask=self._causal_mask(mask), use_cache=False
                )
                hidden = hidden.last_hidden_state[:, visual.shape[1] :]
            hidden_KND = hidden.reshape(K, -1, hidden.shape[-1])[:, batch.positions_N]
            return self.language.lm_head(hidden_KND)

    def score_candidates(self, visual: Tensor, batch: CandidateBatch) -> CandidateScores:
        """Visual tokens and candidates → log-likelihoods of the candidates; a question's prompt is computed once.

        T5 runs its encoder once and the decoder over the candidates. A causal model caches the prompt's keys and values
        and continues from them with each candidate.
        """
        if self.is_sharded and batch.candidate_ids_MA.shape[1] == 1:
            batch = _widen_candidates(batch)
        B = batch.text_ids_BT.shape[0]
        K = visual.shape[0] // B
        rows = (torch.arange(K, device=visual.device)[:, None] * B + batch.question_M).flatten()
        with self.arithmetic():
            score = self._score_t5 if self.family == "t5" else self._score_causal
            sums = score(visual, batch, rows, K)
        return CandidateScores(sums.view(K, -1), batch.candidate_mask_MA.sum(1))

    @torch.no_grad()
    def generate(self, visual: Tensor, batch: PromptBatch, **options: Any) -> Tensor:
        """Visual tokens and prompt → ids `K·B × A` of the new tokens; `options` are those of transformers' `generate`.

        The ids do not include the prompt. T5's rows start with its start token. Shorter rows are padded on the right.
        """
        # The configurations of published copies disagree about these ids, so the tokenizer's are used.
        ids = {
            "eos_token_id": self.text.llm_tokenizer.eos_token_id,
            "pad_token_id": self.text.llm_tokenizer.pad_token_id,
        }
        if self.is_sharded:
            options["synced_gpus"] = True
        with self.arithmetic():
            inputs, mask = self._language_inputs(visual, batch)
            if self.family == "vicuna":
                inputs, mask = _pad_left(inputs, mask)
            else:
                ids["decoder_start_token_id"] = self.text.decoder_start
            return self.language.generate(inputs_embeds=inputs, attention_mask=mask, **{**ids, **options})

    def _language_inputs(self, visual: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the language model's input `K·B × (Q + T) × D` and its mask: visual tokens, then text."""
        K = visual.shape[0] // batch.text_ids_BT.shape[0]
        text = self.language.get_input_embeddings()(batch.text_ids_BT)
        text, text_mask = repeat_for_bank(text, K), repeat_for_bank(batch.text_mask_BT, K)
        mask = torch.cat([text_mask.new_ones(visual.shape[:2]), text_mask], dim=1)
        return torch.cat([visual.to(text.dtype), text], dim=1), mask

    def _causal_mask(self, mask: Tensor) -> Tensor:
        """Return the attention mask of a causal model for rows that are padded on the right."""
        uses_own_attention = self.language.config._attn_implementation == attention.NAME
        return attention.CAUSAL if uses_own_attention else mask

    def _decode(self, ids: Tensor, memory: Tensor, memory_mask: Tensor, **options: Any) -> Any:
        """Run T5's decoder on ids `R × A` with the encoder's output `R × L × D` and its padding mask → `R × A × D`."""
        return self.language.decoder(
            input_ids=ids, encoder_hidden_states=memory, encoder_attention_mask=memory_mask, **options
        )

    def _scale_for_head(self, hidden: Tensor) -> Tensor:
        """Scale T5's hidden states for its head: T5 1.0 with its tied head does so; T5 1.1 and Flan-T5 do not."""
        scaled = getattr(self.language.config, "scale_decoder_outputs", False)
        return hidden * self.language.config.d_model**-0.5 if scaled else hidden

    def _score_t5(self, visual: Tensor, batch: CandidateBatch, rows: Tensor, K: int) -> Tensor:
        """Score with T5: the decoder's first step runs once per question and caches the prompt's keys and values."""
        inputs, mask = self._language_inputs(visual, batch)
        start = mask.new_full((mask.shape[0], 1), self.text.decoder_start)
        mask = _attention_mask(mask)
        memory = self.language.encoder(inputs_embeds=inputs, attention_mask=mask).last_hidden_state
        first = self._decode(start, memory, mask, use_cache=True)
        cache = first.past_key_values
        cache.batch_select_indices(rows)
        ids, candidate_mask = repeat_for_bank(batch.candidate_ids_MA, K), repeat_for_bank(batch.candidate_mask_MA, K)
        hidden = first.last_hidden_state[rows]
        if ids.shape[1] > 1:
            # The cache holds the keys and values of the encoder's output; the decoder only reads its shape.
            placeholder = memory[:1].expand(len(rows), -1, -1)
            rest = self._decode(ids[:, :-1], placeholder, mask[rows], past_key_values=cache, use_cache=True)
            hidden = torch.cat([hidden, rest.last_hidden_state], dim=1)
        return self._log_likelihood(self._scale_for_head(hidden), ids, candidate_mask)

    def _score_causal(self, visual: Tensor, batch: CandidateBatch, rows: Tensor, K: int) -> Tensor:
        """Score with a causal model, which computes the prompt once per question and caches its keys and values."""
        inputs, mask = self._language_inputs(visual, batch)
        prefix = self.language.model(inputs_embeds=inputs, attention_mask=self._causal_mask(mask), use_cache=True)
        length = mask.sum(1)  # tokens before the candidate, without padding
        last = prefix.last_hidden_state[torch.arange(len(length), device=length.device), length - 1]
        cache = prefix.past_key_values
        cache.batch_select_indices(rows)
        ids, candidate_mask = repeat_for_bank(batch.candidate_ids_MA, K), repeat_for_bank(batch.candidate_mask_MA, K)
        hidden = last[rows].unsqueeze(1)
        if ids.shape[1] > 1:
            steps = torch.arange(ids.shape[1] - 1, device=ids.device)
            prompt_mask = _padding_mask(mask)[rows].expand(-1, -1, len(steps), -1)
            causal_mask = _padding_mask(candidate_mask[:, :-1]) & (steps[:, None] >= steps)
            rest = self.language.model(
                input_ids=ids[:, :-1],
                attention_mask=torch.cat([prompt_mask, causal_mask], dim=-1),
                position_ids=length[rows].unsqueeze(1) + steps,  # padding of the prompt has no position
                past_key_values=cache,
                use_cache=True,
            )
            hidden = torch.cat([hidden, rest.last_hidden_state], dim=1)
        return self._log_likelihood(hidden, ids, candidate_mask)

    def _log_likelihood(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the sum of the log-probabilities of `ids` `R × A`, shape R: a log-likelihood, higher is better."""
        logits = _to_fp32(self.language.lm_head(hidden))
        log_probabilities = -F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        return (log_probabilities * mask).sum(1)


ROW_LIMIT = "query_rows"
"""Attribute of the Q-Former's last attention: the number of rows that it computes, None for all."""


def _drop_text_rows(
    module: Any, positional: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook of the Q-Former's last attention: drop the rows of text tokens, because nothing reads their outputs.

    The query tokens still attend to each other and to the text, as in any other layer.
    """
    Q = getattr(module, ROW_LIMIT)
    if Q is None:
        return positional, named
    named = {**dict(zip(("hidden_states", "attention_mask"), positional, strict=False)), **named}
    hidden, mask = named["hidden_states"], named["attention_mask"]
    return (), {
        **named,
        "hidden_states": hidden[:, :Q],
        "encoder_hidden_states": hidden,
        "encoder_attention_mask": None if mask is None else mask[:, :, :Q],
    }


@contextmanager
def _query_rows(module: Any, count: int | None) -> Iterator[None]:
    """Context in which the Q-Former's last attention computes its first `count` rows only, all if None."""
    setattr(module, ROW_LIMIT, count)
    try:
        yield
    finally:
        setattr(module, ROW_LIMIT, None)


def language_layers(language: Any, family: Family) -> list[nn.Module]:
    """Return the transformer layers of a language model (T5: encoder, then decoder)."""
    if family == "t5":
        return [*language.encoder.block, *language.decoder.block]
    return list(language.model.layers)


def _widen_candidates(batch: CandidateBatch) -> CandidateBatch:
    """Pad candidates of one token to two.

    Longer candidates take a second forward pass, and with a sharded model all processes must take part in every pass.
    """
    ids, mask = F.pad(batch.candidate_ids_MA, (0, 1)), F.pad(batch.candidate_mask_MA, (0, 1))
    return dataclasses.replace(batch, candidate_ids_MA=ids, candidate_mask_MA=mask)


def _attention_mask(mask_NS: Tensor) -> Tensor:
    """Return a padding mask in the shape that is cheapest for transformers: `N × S` on a CPU, else 4-dimensional.

    transformers uses a 4-dimensional mask as it is. For a 2-dimensional mask it checks on the device whether anything
    is masked, and drops the mask if not. On a CPU that saves time; with a GPU the host would wait for the answer in
    every forward pass.
    """
    return mask_NS if mask_NS.device.type == "cpu" else _padding_mask(mask_NS)


def _padding_mask(mask_NS: Tensor) -> Tensor:
    """`N × S` of ones and zeros → `N × 1 × 1 × S`, True where tokens are attended to."""
    return mask_NS.bool()[:, None, None, :]


def repeat_for_bank(rows: Tensor, K: int) -> Tensor:
    """Repeat rows for each experiment of a bank: `B × …` → `K·B × …`, K-major."""
    return rows if K == 1 else rows.unsqueeze(0).expand(K, *rows.shape).reshape(-1, *rows.shape[1:])


def fingerprint(*tensors: Tensor) -> str:
    """Return the SHA-256 of the bytes of tensors as hexadecimal text; equal weights have equal fingerprints."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def head(hf: nn.Module) -> Tensor:
    """Return the weight of the language model's head, which no training may change."""
    return hf.language_model.get_output_embeddings().weight  # type: ignore[union-attr]


def _to_fp32(logits: Tensor) -> Tensor:
    """Convert 16-bit logits, because log-probabilities need fp32 or better."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _pad_left(inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move padding from the right to the left, because generation continues from the last position of every row."""
    order = mask.argsort(dim=1, stable=True)  # padding (0) first, tokens in their order
    return inputs.gather(1, order.unsqueeze(-1).expand_as(inputs)), mask.gather(1, order)
