"""The two ways in which people train these experiments today, written as their users would.

(a) `TrainerPeer`: Hugging Face's Trainer with peft, the whole model at every step, one experiment.
(b) `OriginalPeer`: the published protocol: the ViT at every step, one experiment at a time, ranking with batch 1,
    for a causal model the whole prompt again for every candidate.
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
from blipfit.data.batches import Encoded
from blipfit.data.encoded_split import EncodedSplit
from blipfit.data.question import Question
from blipfit.model.backbone import Backbone
from blipfit.recipe import Recipe


def tuned(backbone: Backbone, recipe: Recipe) -> Any:
    """A copy of the model with peft's LoRA and the always-trained parts unfrozen."""
    model = copy.deepcopy(backbone.hf)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation("sdpa")  # as users have it
    model.requires_grad_(False)
    placed = placement.resolve(model, backbone.family, recipe.adapter)
    adapter = recipe.adapter
    config = LoraConfig(r=adapter.rank, lora_alpha=int(adapter.alpha), target_modules=list(placed.lora))
    wrapped = get_peft_model(model, config)
    model.query_tokens.requires_grad_(True)
    for name in placed.full:
        model.get_submodule(name).requires_grad_(True)
    return wrapped


class Inputs:
    """Batches as the Hugging Face model takes them: pixels, and image placeholders before the text."""

    def __init__(self, backbone: Backbone, encoded_split: EncodedSplit):
        self.backbone, self.encoded_split = backbone, encoded_split

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        hf, text = self.backbone.hf, self.backbone.text
        batch = text.targets([self.encoded_split.encoded[i] for i in rows])
        B, Q = len(rows), hf.config.num_query_tokens
        front = torch.full((B, Q), hf.config.image_token_index)
        ids = torch.cat([front, batch.text_ids_BT], 1)
        inputs = {
            "pixel_values": self.pixels([self.encoded_split.questions[i] for i in rows]),
            "qformer_input_ids": batch.qformer_ids_BT,
            "qformer_attention_mask": batch.qformer_mask_BT,
            "input_ids": ids,
            "attention_mask": torch.cat([torch.ones_like(front), batch.text_mask_BT], 1),
        }
        targets = [self.encoded_split.encoded[i] for i in rows]
        if self.backbone.family == "t5":
            width = max(len(e.target) for e in targets)
            labels = torch.tensor([e.target + [-100] * (width - len(e.target)) for e in targets])
        else:
            labels = torch.full_like(ids, -100)
            for row, e in enumerate(targets):
                start = Q + len(e.prompt_cut)
                labels[row, start : start + len(e.target)] = torch.tensor(e.target)
        return {**inputs, "labels": labels}

    def pixels(self, questions: Sequence[Question]) -> Tensor:
        return images.pixels([images.open_image(q.image) for q in questions], self.backbone.image_size)


class TrainerPeer:
    """`steps` steps of one experiment through transformers.Trainer."""

    def __init__(self, backbone: Backbone, recipe: Recipe, encoded_split: EncodedSplit, bf16: bool = False):
        self.backbone, self.recipe, self.encoded_split, self.bf16 = backbone, recipe, encoded_split, bf16
        self.inputs = Inputs(backbone, encoded_split)
        self.model = tuned(backbone, recipe)

    def train(self, steps: int, on_step_end: Callable[[], object] = lambda: None) -> None:
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
    """Calls a function after every step, and keeps the Trainer from printing its summary."""

    def __init__(self, on_step_end: Callable[[], object]):
        self._on_step_end = on_step_end

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self._on_step_end()

    def on_log(self, *arguments: Any, **options: Any) -> None:
        pass


class OriginalPeer:
    """The published loop: forward and backward of the whole model, AdamW, one experiment; ranking one by one."""

    def __init__(self, backbone: Backbone, recipe: Recipe, encoded_split: EncodedSplit):
        self.backbone, self.encoded_split, self.recipe = backbone, encoded_split, recipe
        self.inputs = Inputs(backbone, encoded_split)
        self.model = tuned(backbone, recipe)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=recipe.training.learning_rate, weight_decay=0.05)

    def train(self, steps: int) -> None:
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
        """Each question by itself: the ViT, the Q-Former, and the language model over its candidates."""
        self.model.eval()
        answer = self._t5 if self.backbone.family == "t5" else self._causal
        return [answer(self.encoded_split.questions[i], self.encoded_split.encoded[i]) for i in rows]

    def _visual(self, question: Question, e: Encoded) -> tuple[Tensor, Tensor]:
        device = self.backbone.device
        prompt = torch.tensor([e.prompt], device=device)
        seen = self.model.base_model.model.get_image_features(
            self.inputs.pixels([question]).to(device), torch.tensor([e.qformer], device=device), return_dict=True
        )
        embedded = self.backbone.language.get_input_embeddings()(prompt)
        return torch.cat([seen.pooler_output.to(embedded.dtype), embedded], 1), prompt

    def _t5(self, question: Question, e: Encoded) -> int:
        language = self.model.base_model.model.language_model
        front, _ = self._visual(question, e)
        memory = language.encoder(inputs_embeds=front).last_hidden_state
        C, width = len(e.candidates), max(map(len, e.candidates))
        labels = torch.tensor([c + [-100] * (width - len(c)) for c in e.candidates], device=front.device)
        out = language(encoder_outputs=(memory.expand(C, -1, -1),), labels=labels)
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), reduction="none")
        return int(loss.view(C, -1).sum(1).argmin())

    def _causal(self, question: Question, e: Encoded) -> int:
        language = self.model.base_model.model.language_model
        losses = []
        for candidate in e.candidates:
            front, _ = self._visual(question, e)
            answer = torch.tensor([candidate], device=front.device)
            whole = torch.cat([front, language.get_input_embeddings()(answer)], 1)
            logits = language(inputs_embeds=whole).logits[:, front.shape[1] - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits[0], answer[0], reduction="sum"))
        return int(torch.stack(losses).argmin())
