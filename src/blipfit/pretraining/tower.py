"""Stage 1 of the miniatures: the vision tower, trained contrastively against captions.

The tower is InstructBLIP's own vision model; the text side is CLIP's. Captions alone teach such a small tower
which things there are long before how many and where, so four auxiliary losses help: every patch names the
icon that covers it and its own row and column (or the features forget where they are), and the class token names
the counts and the reading of a clock or a number line.

CLIP's vision model differs from InstructBLIP's by a layer norm before the first layer. Two of the tower's
channels are kept free of embeddings and the others at mean zero; in the CLIP a huge constant in these two channels
makes that layer norm the identity, so both formats hold one and the same tower.
"""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, InstructBlipVisionModel, PreTrainedTokenizerBase

from blipfit.data import icons
from blipfit.data.icons.scene import BOARD, COLORS, SHAPES, Scene
from blipfit.model import tiny
from blipfit.pretraining import texts as pretrain_texts
from blipfit.runtime import attention

SIDE = tiny.IMAGE_SIZE // tiny.PATCH_SIZE
MOST = 6  # counts above this are one class
READINGS = 24 + 11  # half hours of a clock, then marks of a number line
# What a patch shows: a shape or the question mark, a color and a size; 0 is nothing.
PARTS = (len(SHAPES) + 2, len(COLORS) + 1, 3)
QUESTION_MARK = len(SHAPES) + 1
FREE = 2  # channels without embeddings, see above
CONSTANT = 1000.0


class Tower(nn.Module):
    """Vision tower, CLIP's text side, and the linear heads of the auxiliary losses (thrown away afterwards)."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.vision = InstructBlipVisionModel(tiny.vision_config())
        attention.use(self.vision)
        self.text = clip.text_model
        self.text_projection, self.visual_projection = clip.text_projection, clip.visual_projection
        self.logit_scale = clip.logit_scale
        width = tiny.WIDTH
        self.icon = nn.Linear(width, sum(PARTS))
        self.where = nn.Linear(width, 2 * SIDE)
        self.board = nn.Linear(width, (len(SHAPES) + len(COLORS) + 1) * (MOST + 1))
        self.reading = nn.Linear(width, READINGS)
        # Drawn as wide as the pictures' own embeddings; at 0.02 position is lost among what is seen.
        nn.init.normal_(self.vision.embeddings.position_embedding, std=0.3)
        keep_free_channels(self.vision)

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, 64, 64] → features [B, 65, 128] before the last layer norm."""
        hidden = self.vision.embeddings(pixels)
        return self.vision.encoder(inputs_embeds=hidden).last_hidden_state

    def losses(self, pixels: Tensor, captions: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Tensor]:
        """Captions: the B true ones first, then any number of wrong ones that serve as further negatives."""
        seen = self.vision.post_layernorm(self.features(pixels))
        whole, patches = seen[:, 0], seen[:, 1:]
        images = F.normalize(self.visual_projection(whole), dim=-1)
        texts = F.normalize(self.text_projection(self.text(**captions).pooler_output), dim=-1)
        logits = self.logit_scale.exp().clamp(max=100) * images @ texts.T  # [B, texts]
        target = torch.arange(len(images))
        contrast = F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(images)].T, target)
        named = sum(
            F.cross_entropy(part.flatten(0, 1), truth["icon"][..., index].flatten())
            for index, part in enumerate(self.icon(patches).split(PARTS, dim=-1))
        )
        board = self.board(whole).view(len(whole), -1, MOST + 1).flatten(0, 1)
        return {
            "contrast": contrast / 2,
            "icon": named,
            "where": _where_loss(self.where(patches)),
            "board": F.cross_entropy(board, truth["board"].flatten(), ignore_index=-100),
            "reading": _reading_loss(self.reading(whole), truth["reading"]),
        }


def _where_loss(logits: Tensor) -> Tensor:
    """Cross entropy of row and column of every patch, logits [B, 64, 16]."""
    steps = torch.arange(SIDE)
    place = torch.stack([steps.repeat_interleave(SIDE), steps.repeat(SIDE)], dim=1)  # [64, 2]
    both = logits.unflatten(-1, (2, SIDE)).flatten(0, 2)
    return F.cross_entropy(both, place.expand(len(logits), -1, -1).flatten())


def _reading_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy over the pictures that have a reading (about one in six); zero where none has."""
    has = target >= 0
    return F.cross_entropy(logits[has], target[has]) if has.any() else logits.sum() * 0


def pixels(scenes: list[Scene]) -> Tensor:
    """The pictures as the processor gives them, [B, 3, 64, 64]; at 64 pixels it resizes nothing."""
    drawn = np.stack([np.asarray(icons.draw(scene)) for scene in scenes])
    processor = tiny.image_processor()
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    values = (torch.from_numpy(drawn).float() / 255 - mean) / std
    return values.permute(0, 3, 1, 2).contiguous()


def truth(scenes: list[Scene]) -> dict[str, Tensor]:
    """What the auxiliary heads must say: `icon` [B, 64, 3], `board` [B, 16], `reading` [B] (−100: none)."""
    icon = torch.zeros(len(scenes), SIDE, SIDE, 3, dtype=torch.long)
    board = torch.zeros(len(scenes), len(SHAPES) + len(COLORS) + 1, dtype=torch.long)
    reading = torch.full((len(scenes),), -100)
    cell = SIDE // BOARD
    for row, scene in enumerate(scenes):
        for one in scene.icons:
            top, left, side = one.row * cell, one.col * cell, one.span * cell
            shape, color = SHAPES.index(one.shape), COLORS.index(one.color)
            icon[row, top : top + side, left : left + side] = torch.tensor([shape + 1, color + 1, one.span])
            board[row, shape] += 1
            board[row, len(SHAPES) + color] += 1
            board[row, -1] += 1
        if scene.open_cell is not None:
            top, left = (cell * at for at in scene.open_cell)
            icon[row, top : top + cell, left : left + cell, 0] = QUESTION_MARK
        if scene.value is not None:
            reading[row] = scene.value + (24 if scene.kind == "scale" else 0)
            board[row] = -100
    return {"icon": icon.flatten(1, 2), "board": board.clamp(max=MOST), "reading": reading}


def batch(
    scenes: list[Scene], tokenizer: PreTrainedTokenizerBase, wrong: int, seed: int
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Pixels, captions (a true one a picture, then `wrong` rounds of them with a planted error) and truth."""
    rng = random.Random(f"captions/{seed}")
    told = [pretrain_texts.caption(scene, rng) for scene in scenes]
    full = [pretrain_texts.fullest(scene) for scene in scenes]
    told += [pretrain_texts.planted(text, rng) for _ in range(wrong) for text in full]
    encoded = tokenizer(told, padding=True, truncation=True, max_length=tiny.CLIP_TEXT_LENGTH, return_tensors="pt")
    captions = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    return pixels(scenes), captions, truth(scenes)


@torch.no_grad()
def check(tower: Tower, tokenizer: PreTrainedTokenizerBase, seed: int, pictures: int = 256) -> dict[str, float]:
    """Shares of fresh pictures on which patches, counts, readings and captions are told right.

    `pair`: the true caption is nearer than the same one with a planted error (chance 0.5).
    """
    scenes = [icons.scene(seed, index) for index in range(pictures)]
    images, captions, real = batch(scenes, tokenizer, 1, seed)
    tower.eval()
    seen = tower.vision.post_layernorm(tower.features(images))
    icon = tower.icon(seen[:, 1:]).split(PARTS, dim=-1)
    covered = real["icon"][..., 0] > 0
    right = torch.stack([part.argmax(-1) for part in icon], dim=-1) == real["icon"]
    board = tower.board(seen[:, 0]).view(pictures, -1, MOST + 1).argmax(-1)
    has = real["reading"] >= 0
    reading = tower.reading(seen[:, 0]).argmax(-1)[has] == real["reading"][has]
    whole = F.normalize(tower.visual_projection(seen[:, 0]), dim=-1)
    texts = F.normalize(tower.text_projection(tower.text(**captions).pooler_output), dim=-1)
    false = texts[pictures:]
    full = [pretrain_texts.fullest(scene) for scene in scenes]
    told = tokenizer(full, padding=True, truncation=True, max_length=tiny.CLIP_TEXT_LENGTH, return_tensors="pt")
    true = F.normalize(tower.text_projection(tower.text(**told).pooler_output), dim=-1)
    tower.train()
    return {
        "patch_acc": round(right.all(-1)[covered].float().mean().item(), 4),
        "board_acc": round((board == real["board"])[real["board"] != -100].float().mean().item(), 4),
        "reading_acc": round(reading.float().mean().item(), 4),
        "match_acc": round((whole @ true.T).argmax(-1).eq(torch.arange(pictures)).float().mean().item(), 4),
        "pair_acc": round(((whole * true).sum(-1) > (whole * false).sum(-1)).float().mean().item(), 4),
    }


@torch.no_grad()
def keep_free_channels(vision: InstructBlipVisionModel) -> None:
    """Project the embeddings: zero in the free channels, mean zero over the others. No output changes by the mean:
    every layer begins with a layer norm, which does not see it."""
    embeddings = vision.embeddings
    for weight, channel in (
        (embeddings.patch_embedding.weight, 0),
        (embeddings.patch_embedding.bias, 0),
        (embeddings.position_embedding, 2),
        (embeddings.class_embedding, 2),
    ):
        rest = weight.narrow(channel, FREE, weight.shape[channel] - FREE)
        rest -= rest.mean(channel, keepdim=True)
        weight.narrow(channel, 0, FREE).zero_()


@torch.no_grad()
def to_clip(tower: Tower, clip: CLIPModel) -> CLIPModel:
    """Write the tower into `clip` (whose text side it has shared all along); returns `clip`."""
    theirs, ours = clip.vision_model, tower.vision
    width = ours.config.hidden_size
    positions = ours.embeddings.position_embedding[0].clone()
    positions[1:] += ours.embeddings.patch_embedding.bias
    positions[:, 0], positions[:, 1] = CONSTANT, -CONSTANT
    theirs.embeddings.patch_embedding.weight.copy_(ours.embeddings.patch_embedding.weight)
    theirs.embeddings.class_embedding.copy_(ours.embeddings.class_embedding[0, 0])
    theirs.embeddings.position_embedding.weight.copy_(positions)
    # The constant alone makes the variance: 2 × CONSTANT² / width. Undo it, and drop the constant.
    theirs.pre_layrnorm.weight.fill_(CONSTANT * (2 / width) ** 0.5)
    theirs.pre_layrnorm.weight[:FREE] = 0
    theirs.pre_layrnorm.bias.zero_()
    for layer, source in zip(theirs.encoder.layers, ours.encoder.layers, strict=True):
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        for part, weight, bias in zip(
            projections, source.self_attn.qkv.weight.chunk(3), source.self_attn.qkv.bias.chunk(3), strict=True
        ):
            part.weight.copy_(weight)
            part.bias.copy_(bias)
        attention.out_proj.load_state_dict(source.self_attn.projection.state_dict())
        for name in ("layer_norm1", "layer_norm2", "mlp"):
            getattr(layer, name).load_state_dict(getattr(source, name).state_dict())
    theirs.post_layernorm.load_state_dict(ours.post_layernorm.state_dict())
    return clip
