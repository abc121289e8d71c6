"""The model as three stages: see → query → answer, over Hugging Face's own modules.

`K` experiments of a bank, `B` questions, `P` image tokens, `Q` query tokens, `T` prompt tokens, `A` answer tokens,
`M` candidates, `N` label positions, `D` width. Rows of banked tensors are K-major: row k·B + b.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfit.data.batches import CandidateBatch, PromptBatch, TargetBatch, TextEncoder
from blipfit.recipe import Family
from blipfit.runtime import attention, cpu


@dataclass(frozen=True, slots=True)
class CandidateScores:
    """Log-likelihoods of every candidate: `sums_KM` over its tokens, `lengths_M` token counts."""

    sums_KM: Tensor
    lengths_M: Tensor


class Backbone:
    """An InstructBLIP with its tokenizers; every use of the model goes through its three stages.

    `hf` is an `InstructBlipForConditionalGeneration` whose Q-Former and language model compute their attention in
    `runtime.attention`; `K` is 1 until a bank is installed in it, which makes the query tokens `K × Q × D`.
    """

    def __init__(self, hf: Any, text: TextEncoder, family: Family, name: str, autocast: torch.dtype | None = None):
        self.hf, self.text, self.family, self.name = hf, text, family, name
        self.autocast_dtype = autocast
        self.language = hf.language_model
        attention.use(hf.qformer)
        attention.use(hf.language_model)
        last = hf.qformer.encoder.layer[-1].attention
        if not hasattr(last, QUERY_ROWS):
            last.register_forward_pre_hook(_queries_only, with_kwargs=True)
        setattr(last, QUERY_ROWS, None)  # within `query` alone: Hugging Face's own forward stays as it is

    @property
    def device(self) -> torch.device:
        return self.hf.query_tokens.device

    @property
    def image_size(self) -> int:
        return self.hf.config.vision_config.image_size

    @property
    def experiments(self) -> int:
        """K: how many experiments the installed bank holds."""
        return self.hf.query_tokens.shape[0]

    def layers(self, stage: Literal["query", "answer"]) -> list[nn.Module]:
        """The transformer layers of a stage: the Q-Former's, or the language model's (T5: encoder, then decoder).

        The Q-Former's last one is left out: what it computes depends on who calls it, see `query`.
        """
        if stage == "query":
            return list(self.hf.qformer.encoder.layer[:-1])
        if self.family == "t5":
            return [*self.language.encoder.block, *self.language.decoder.block]
        return list(self.language.model.layers)

    def repeated_layers(self) -> list[nn.Module]:
        """Layers that many others are like, so that compiling one serves them all.

        T5's first layers, which compute the position bias, are left out: each would take as long to compile as all of
        its neighbors.
        """
        answer = self.layers("answer")
        if self.family == "t5":
            answer = [*self.language.encoder.block[1:], *self.language.decoder.block[1:]]
        return [*self.layers("query"), *answer]

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """The 16-bit type where one was chosen, and on a CPU oneDNN's matrix products."""
        enabled = self.autocast_dtype is not None
        with (
            torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=enabled),
            cpu.products(self.device.type),
        ):
            yield

    # ------------------------------------------------------------------ see

    @torch.no_grad()
    def see(self, pixels_B3SS: Tensor) -> Tensor:
        """Pixels → image features `B × P × D`, BEFORE the trained layer norm; frozen, in eval mode.

        In torch's own arithmetic, as stored features were computed.
        """
        vision = self.hf.vision_model
        return vision.encoder(inputs_embeds=vision.embeddings(pixels_B3SS)).last_hidden_state

    # ---------------------------------------------------------------- query

    def query(
        self, features_BPD: Tensor, batch: PromptBatch | TargetBatch | CandidateBatch, every_row: bool = False
    ) -> Tensor:
        """Image features + instruction → visual tokens `K·B × Q × D_language`.

        `every_row`: also compute the text's rows of the last layer, which only a look into the layers needs.
        """
        hf, K = self.hf, self.experiments
        B = features_BPD.shape[0]
        with self.arithmetic():
            # A bank's layer norm makes K of the one: what is normalized is the same for all.
            normed = hf.vision_model.post_layernorm(features_BPD.to(hf.query_tokens.dtype).unsqueeze(0))
            features = normed.expand(K, -1, -1, -1).flatten(0, 1)
            queries_KQD = hf.query_tokens
            queries = queries_KQD.unsqueeze(1).expand(-1, B, -1, -1).reshape(K * B, *queries_KQD.shape[1:])
            Q = queries.shape[1]
            ids = over_bank(batch.qformer_ids_BT, K)
            mask = torch.cat([batch.qformer_mask_BT.new_ones(B, Q), batch.qformer_mask_BT], dim=1)
            with _query_rows(hf.qformer.encoder.layer[-1].attention, None if every_row else Q):
                hidden = hf.qformer(
                    input_ids=ids,
                    attention_mask=_attention_mask(over_bank(mask, K)),
                    # One row each: a banked position embedding must know whose rows they are.
                    position_ids=torch.arange(ids.shape[1], device=ids.device).expand_as(ids),
                    query_embeds=queries,
                    encoder_hidden_states=features,
                ).last_hidden_state
            return hf.language_projection(hidden[:, :Q])

    # --------------------------------------------------------------- answer

    def losses(self, visual: Tensor, batch: TargetBatch) -> Tensor:
        """Visual tokens + targets → summed negative log-likelihood of the N labels, one value an experiment (K)."""
        logits_KNV = self.target_logits(visual, batch)
        K, N, _ = logits_KNV.shape
        labels = batch.labels_N.expand(K, N).reshape(-1)
        # A label of −100 gives a loss of zero.
        return F.cross_entropy(_full(logits_KNV.flatten(0, 1)), labels, reduction="none").view(K, N).sum(1)

    def target_logits(self, visual: Tensor, batch: TargetBatch) -> Tensor:
        """Logits `K × N × V` at the label positions only."""
        K = visual.shape[0] // batch.text_ids_BT.shape[0]
        with self.arithmetic():
            front, mask = self._front(visual, batch)
            if self.family == "t5":
                mask = _attention_mask(mask)
                memory = self.language.encoder(inputs_embeds=front, attention_mask=mask).last_hidden_state
                assert batch.decoder_ids_BA is not None
                decoded = self._decode(over_bank(batch.decoder_ids_BA, K), memory, mask, use_cache=False)
                hidden = self._for_head(decoded.last_hidden_state)
            else:
                hidden = self.language.model(inputs_embeds=front, attention_mask=self._causal(mask), use_cache=False)
                hidden = hidden.last_hidden_state[:, visual.shape[1] :]
            hidden_KND = hidden.reshape(K, -1, hidden.shape[-1])[:, batch.positions_N]
            return self.language.lm_head(hidden_KND)

    def score(self, visual: Tensor, batch: CandidateBatch) -> CandidateScores:
        """Visual tokens + candidates → their log-likelihoods; the prompt is read once a question.

        T5 runs its encoder once and the decoder over the candidates; a causal model keeps the prompt's keys and
        values and continues them with each candidate.
        """
        B = batch.text_ids_BT.shape[0]
        K = visual.shape[0] // B
        rows = (torch.arange(K, device=visual.device)[:, None] * B + batch.question_M).flatten()
        with self.arithmetic():
            score = self._score_t5 if self.family == "t5" else self._score_causal
            sums = score(visual, batch, rows, K)
        return CandidateScores(sums.view(K, -1), batch.candidate_mask_MA.sum(1))

    @torch.no_grad()
    def generate(self, visual: Tensor, batch: PromptBatch, **options: Any) -> Tensor:
        """Visual tokens + prompt → new token ids `K·B × A` of `transformers`' generation with `options`.

        The prompt is not among them; T5's rows begin with its start token. Rows end with padding.
        """
        # Published copies disagree about these ids in their configurations, so the tokenizer's are given.
        ids = {"eos_token_id": self.text.llm.eos_token_id, "pad_token_id": self.text.llm.pad_token_id}
        with self.arithmetic():
            front, mask = self._front(visual, batch)
            if self.family == "vicuna":
                front, mask = _left_padded(front, mask)
            else:
                ids["decoder_start_token_id"] = self.text.decoder_start
            return self.language.generate(inputs_embeds=front, attention_mask=mask, **{**ids, **options})

    def _front(self, visual: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """Language-model input `K·B × (Q + T) × D` and its mask: visual tokens, then text."""
        K = visual.shape[0] // batch.text_ids_BT.shape[0]
        text = self.language.get_input_embeddings()(batch.text_ids_BT)
        text, text_mask = over_bank(text, K), over_bank(batch.text_mask_BT, K)
        mask = torch.cat([text_mask.new_ones(visual.shape[:2]), text_mask], dim=1)
        return torch.cat([visual.to(text.dtype), text], dim=1), mask

    def _causal(self, mask: Tensor) -> Tensor:
        """The mask of a causal model over rows that are padded on the right."""
        is_own = self.language.config._attn_implementation == attention.NAME
        return attention.CAUSAL if is_own else mask

    def _decode(self, ids: Tensor, memory: Tensor, memory_mask: Tensor, **options: Any) -> Any:
        """T5 decoder: ids `R × A` over memory `R × L × D` with its padding mask; hidden states `R × A × D`."""
        return self.language.decoder(
            input_ids=ids, encoder_hidden_states=memory, encoder_attention_mask=memory_mask, **options
        )

    def _for_head(self, hidden: Tensor) -> Tensor:
        """T5 1.0 scales what its tied head reads; T5 1.1 and Flan do not."""
        scaled = getattr(self.language.config, "scale_decoder_outputs", False)
        return hidden * self.language.config.d_model**-0.5 if scaled else hidden

    def _score_t5(self, visual: Tensor, batch: CandidateBatch, rows: Tensor, K: int) -> Tensor:
        """The decoder's first step runs once a question and leaves the cross-attention's keys and values behind."""
        front, mask = self._front(visual, batch)
        start = mask.new_full((mask.shape[0], 1), self.text.decoder_start)
        mask = _attention_mask(mask)
        memory = self.language.encoder(inputs_embeds=front, attention_mask=mask).last_hidden_state
        first = self._decode(start, memory, mask, use_cache=True)
        cache = first.past_key_values
        cache.batch_select_indices(rows)
        ids, candidate_mask = over_bank(batch.candidate_ids_MA, K), over_bank(batch.candidate_mask_MA, K)
        hidden = first.last_hidden_state[rows]
        if ids.shape[1] > 1:
            # The memory's content is in the cache; the decoder still wants its shape.
            shape = memory[:1].expand(len(rows), -1, -1)
            rest = self._decode(ids[:, :-1], shape, mask[rows], past_key_values=cache, use_cache=True)
            hidden = torch.cat([hidden, rest.last_hidden_state], dim=1)
        return self._log_likelihood(self._for_head(hidden), ids, candidate_mask)

    def _score_causal(self, visual: Tensor, batch: CandidateBatch, rows: Tensor, K: int) -> Tensor:
        front, mask = self._front(visual, batch)
        prefix = self.language.model(inputs_embeds=front, attention_mask=self._causal(mask), use_cache=True)
        length = mask.sum(1)  # tokens before the candidate, pads excluded
        last = prefix.last_hidden_state[torch.arange(len(length), device=length.device), length - 1]
        cache = prefix.past_key_values
        cache.batch_select_indices(rows)
        ids, candidate_mask = over_bank(batch.candidate_ids_MA, K), over_bank(batch.candidate_mask_MA, K)
        hidden = last[rows].unsqueeze(1)
        if ids.shape[1] > 1:
            steps = torch.arange(ids.shape[1] - 1, device=ids.device)
            before = _padding_mask(mask)[rows].expand(-1, -1, len(steps), -1)
            among = _padding_mask(candidate_mask[:, :-1]) & (steps[:, None] >= steps)
            rest = self.language.model(
                input_ids=ids[:, :-1],
                attention_mask=torch.cat([before, among], dim=-1),
                position_ids=length[rows].unsqueeze(1) + steps,  # the prompt's pads take no position
                past_key_values=cache,
                use_cache=True,
            )
            hidden = torch.cat([hidden, rest.last_hidden_state], dim=1)
        return self._log_likelihood(hidden, ids, candidate_mask)

    def _log_likelihood(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Sum of the log-probabilities of `ids` `R × A` (a log-likelihood: higher is better), shape R."""
        logits = _full(self.language.lm_head(hidden))
        token = -F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        return (token * mask).sum(1)


QUERY_ROWS = "query_rows"
"""Attribute of the Q-Former's last attention: how many rows it computes, all where None."""


def _queries_only(
    module: Any, positional: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook of the Q-Former's last attention: only the queries' rows go on, because nobody reads the text's.

    The queries still attend to themselves and to the text, as in any layer.
    """
    Q = getattr(module, QUERY_ROWS)
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
    """Within it the Q-Former's last attention computes so many rows, all where None."""
    setattr(module, QUERY_ROWS, count)
    try:
        yield
    finally:
        setattr(module, QUERY_ROWS, None)


def _attention_mask(mask_NS: Tensor) -> Tensor:
    """A padding mask as transformers is given it: `N × S` on a CPU, four dimensions elsewhere.

    It takes four dimensions as they are. Of two it asks on the device whether they hide anything, and leaves the mask
    out where not: free on a CPU, while with a GPU the host would wait in every forward pass.
    """
    return mask_NS if mask_NS.device.type == "cpu" else _padding_mask(mask_NS)


def _padding_mask(mask_NS: Tensor) -> Tensor:
    """`N × S` of ones and zeros → `N × 1 × 1 × S`, True where attention goes."""
    return mask_NS.bool()[:, None, None, :]


def over_bank(rows: Tensor, K: int) -> Tensor:
    """Repeat B rows for each of K experiments: `B × …` → `K·B × …`, K-major."""
    return rows if K == 1 else rows.unsqueeze(0).expand(K, *rows.shape).reshape(-1, *rows.shape[1:])


def fingerprint(*tensors: Tensor) -> str:
    """SHA-256 over the bytes of tensors: equal weights, equal text."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def head(hf: nn.Module) -> Tensor:
    """The language model's output matrix, which no training of ours may change."""
    return hf.language_model.get_output_embeddings().weight  # type: ignore[union-attr]


def _full(logits: Tensor) -> Tensor:
    """Log-probabilities are taken in fp32 or better."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _left_padded(front: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move right padding to the left, as generation needs: the last position is then a token in every row."""
    order = mask.argsort(dim=1, stable=True)  # pads (0) first, tokens keep their order
    return front.gather(1, order.unsqueeze(-1).expand_as(front)), mask.gather(1, order)
