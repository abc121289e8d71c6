"""The two peers that banks are compared with, written as their users would write them.

(a) `TrainerPeer`: Hugging Face's Trainer with peft; the whole model at every step, one experiment at a time.
(b) `OriginalPeer`: the published protocol; the ViT at every step, one experiment at a time, ranking one question at a
    time, and with a causal language model the whole prompt again for every candidate.

Shapes: B rows, Q visual tokens, T tokens of text, C candidates.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from blipfit.adapters import placement
from blipfit.data import images
from blipfit.data.batches import EncodedQuestion
from blipfit.data.encoded_split import EncodedSplit
from blipfit.data.question import Question
from blipfit.model.backbone import Backbone
from blipfit.recipe import Recipe


def add_lora(backbone: Backbone, recipe: Recipe) -> Any:
    """Copy the model, add peft's LoRA as the recipe says, and unfreeze the always-trained parameters."""
    model = copy.deepcopy(backbone.hf)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation("sdpa")  # the default of users' models
    model.requires_grad_(False)
    modules = placement.resolve(model, backbone.family, recipe.adapter)
    adapter = recipe.adapter
    config = LoraConfig(r=adapter.rank, lora_alpha=int(adapter.alpha), target_modules=list(modules.lora))
    wrapped = get_peft_model(model, config)
    model.query_tokens.requires_grad_(True)
    for name in modules.full:
        model.get_submodule(name).requires_grad_(True)
    return wrapped


class Inputs:
    """Builds batches for the Hugging Face model: pixels, and image placeholders in front of the text."""

    def __init__(self, backbone: Backbone, encoded_split: EncodedSplit):
        self.backbone, self.encoded_split = backbone, encoded_split

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Build the batch of the questions with these indices, with labels (−100: not in the loss)."""
        hf, text = self.backbone.hf, self.backbone.text
        batch = text.targets([self.encoded_split.encoded[i] for i in rows])
        B, Q = len(rows), hf.config.num_query_tokens
        placeholders = torch.full((B, Q), hf.config.image_token_index)
        ids = torch.cat([placeholders, batch.text_ids_BT], 1)
        inputs = {
            "pixel_values": self.pixels([self.encoded_split.questions[i] for i in rows]),
            "qformer_input_ids": batch.qformer_ids_BT,
            "qformer_attention_mask": batch.qformer_mask_BT,
            "input_ids": ids,
            "attention_mask": torch.cat([torch.ones_like(placeholders), batch.text_mask_BT], 1),
        }
        targets = [self.encoded_split.encoded[i] for i in rows]
        if self.backbone.family == "t5":
            width = max(len(e.target) for e in targets)
            labels = torch.tensor([e.target + [-100] * (width - len(e.target)) for e in targets])
        else:
            labels = torch.full_like(ids, -100)
            for row, e in enumerate(targets):
                start = Q + len(e.training_prompt)
                labels[row, start : start + len(e.target)] = torch.tensor(e.target)
        return {**inputs, "labels": labels}

    def pixels(self, questions: Sequence[Question]) -> Tensor:
        """Read the questions' images: [B, 3, H, W]."""
        return images.to_pixels([images.open_image(q.image) for q in questions], self.backbone.image_size)


class TrainerPeer:
    """Trains one experiment with transformers.Trainer and peft."""

    def __init__(self, backbone: Backbone, recipe: Recipe, encoded_split: EncodedSplit, bf16: bool = False):
        self.backbone, self.recipe, self.encoded_split, self.bf16 = backbone, recipe, encoded_split, bf16
        self.inputs = Inputs(backbone, encoded_split)
        self.model = add_lora(backbone, recipe)

    def train(self, steps: int, on_step_end: Callable[[], object] = lambda: None) -> None:
        """Train for `steps` steps; calls `on_step_end` after each."""
        training = self.recipe.training
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=training.batch_size,
                gradient_accumulation_steps=training.accumulation,
                max_steps=steps,
                learning_rate=training.learning_rate,
                weight_decay=training.weight_decay,
                max_grad_norm=0.0,
                bf16=self.bf16,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_drop_last=True,
                use_cpu=self.backbone.device.type == "cpu",
            )
            trainer = Trainer(
                self.model,
                arguments,
                train_dataset=list(range(len(self.encoded_split))),  # type: ignore[arg-type]
                data_collator=self.inputs,  # type: ignore[arg-type]
                callbacks=[_Callback(on_step_end)],
            )
            trainer.train()


class _Callback(TrainerCallback):
    """Calls a function after every step, and stops the Trainer from printing its summary."""

    def __init__(self, on_step_end: Callable[[], object]):
        self._on_step_end = on_step_end

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self._on_step_end()

    def on_log(self, *arguments: Any, **options: Any) -> None:
        pass


class OriginalPeer:
    """Trains one experiment with the whole model at every step and AdamW, and ranks one question at a time."""

    def __init__(self, backbone: Backbone, recipe: Recipe, encoded_split: EncodedSplit):
        self.backbone, self.encoded_split, self.recipe = backbone, encoded_split, recipe
        self.inputs = Inputs(backbone, encoded_split)
        self.model = add_lora(backbone, recipe)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=recipe.training.learning_rate, weight_decay=0.05)

    def train(self, steps: int) -> None:
        """Train for `steps` steps; questions repeat if there are too few."""
        training, device = self.recipe.training, self.backbone.device
        self.model.train()
        size = training.batch_size * training.accumulation
        for step in range(steps):
            rows = [(step * size + i) % len(self.encoded_split) for i in range(size)]
            self.optimizer.zero_grad()
            for start in range(0, size, training.batch_size):
                batch = {k: v.to(device) for k, v in self.inputs(rows[start : start + training.batch_size]).items()}
                (self.model(**batch).loss / training.accumulation).backward()
            self.optimizer.step()

    @torch.no_grad()
    def rank(self, rows: Sequence[int]) -> list[int]:
        """Rank the candidates of the questions with these indices; returns the index of the best candidate of each."""
        self.model.eval()
        rank_question = self._rank_t5 if self.backbone.family == "t5" else self._rank_causal
        return [rank_question(self.encoded_split.questions[i], self.encoded_split.encoded[i]) for i in rows]

    def _embed_prompt(self, question: Question, e: EncodedQuestion) -> tuple[Tensor, Tensor]:
        device = self.backbone.device
        prompt = torch.tensor([e.evaluation_prompt], device=device)
        output = self.model.base_model.model.get_image_features(
            self.inputs.pixels([question]).to(device), torch.tensor([e.qformer], device=device), return_dict=True
        )
        embedded = self.backbone.language.get_input_embeddings()(prompt)
        return torch.cat([output.pooler_output.to(embedded.dtype), embedded], 1), prompt

    def _rank_t5(self, question: Question, e: EncodedQuestion) -> int:
        language = self.model.base_model.model.language_model
        embedded, _ = self._embed_prompt(question, e)
        memory = language.encoder(inputs_embeds=embedded).last_hidden_state
        C, width = len(e.candidates), max(map(len, e.candidates))
        labels = torch.tensor([c + [-100] * (width - len(c)) for c in e.candidates], device=embedded.device)
        out = language(encoder_outputs=(memory.expand(C, -1, -1),), labels=labels)
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), reduction="none")
        return int(loss.view(C, -1).sum(1).argmin())

    def _rank_causal(self, question: Question, e: EncodedQuestion) -> int:
        language = self.model.base_model.model.language_model
        losses = []
        for candidate in e.candidates:
            embedded, _ = self._embed_prompt(question, e)
            answer = torch.tensor([candidate], device=embedded.device)
            whole = torch.cat([embedded, language.get_input_embeddings()(answer)], 1)
            logits = language(inputs_embeds=whole).logits[:, embedded.shape[1] - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits[0], answer[0], reduction="sum"))
        return int(torch.stack(losses).argmin())
