"""Stage 1 of pre-training: trains the vision tower and the miniature CLIP, contrastively against captions.

The tower is InstructBLIP's own vision model; the text encoder is CLIP's. From captions alone, such a small tower learns
which icons are in a picture long before how many and where. Auxiliary losses therefore help: every patch predicts the
icon that covers it and its own row and column (otherwise the features lose the position), and the class token predicts
the counts and the reading of a clock or a number line.

CLIP's vision model differs from InstructBLIP's by a layer norm before the first layer. Two channels of the tower have
embeddings of zero, and the mean over the other channels is zero. In the CLIP a huge constant in these two channels
makes that layer norm the identity, so both formats hold the same tower.

Shapes: B pictures, D channels, 64 patches and a class token in front of them: features [B, 65, D].
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
from blipfit.pretraining.texts import corrupt_text, sample_caption, select_detailed_caption
from blipfit.runtime import attention

PATCHES_PER_SIDE = tiny.IMAGE_SIZE // tiny.PATCH_SIZE
MAX_COUNT = 6  # larger counts are in the same class
CLOCK_READINGS = 24  # half hours
READING_CLASSES = CLOCK_READINGS + 11  # then the marks of a number line
# The classes of a patch: its shape (or the question mark), its color and its size; 0 is an empty patch.
PATCH_CLASSES = (len(SHAPES) + 2, len(COLORS) + 1, 3)
QUESTION_MARK = len(SHAPES) + 1
FREE_CHANNELS = 2  # channels without embeddings, see above
CONSTANT = 1000.0


class Tower(nn.Module):
    """Vision tower, CLIP's text encoder, and the linear heads of the auxiliary losses (not part of the result).

    The names of the attributes are the names of the weights in the state file.
    """

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.vision = InstructBlipVisionModel(tiny.vision_config())
        attention.enable(self.vision)
        self.text = clip.text_model
        self.text_projection, self.visual_projection = clip.text_projection, clip.visual_projection
        self.logit_scale = clip.logit_scale
        width = tiny.WIDTH
        self.icon = nn.Linear(width, sum(PATCH_CLASSES))
        self.where = nn.Linear(width, 2 * PATCHES_PER_SIDE)
        self.board = nn.Linear(width, (len(SHAPES) + len(COLORS) + 1) * (MAX_COUNT + 1))
        self.reading = nn.Linear(width, READING_CLASSES)
        # The standard deviation of the patch embeddings; at 0.02 the position is lost among them.
        nn.init.normal_(self.vision.embeddings.position_embedding, std=0.3)
        clear_free_channels(self.vision)

    def compute_features(self, pixels: Tensor) -> Tensor:
        """Compute the features [B, 65, D] before the last layer norm, from pixels [B, 3, 64, 64]."""
        hidden = self.vision.embeddings(pixels)
        return self.vision.encoder(inputs_embeds=hidden).last_hidden_state

    def compute_losses(
        self, pixels: Tensor, captions: dict[str, Tensor], targets: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Compute the contrastive loss and the auxiliary losses of B pictures.

        `captions` are tokenized: first the B true captions, then any number of false ones as additional negatives.
        """
        features = self.vision.post_layernorm(self.compute_features(pixels))
        class_token, patches = features[:, 0], features[:, 1:]
        images = F.normalize(self.visual_projection(class_token), dim=-1)
        texts = F.normalize(self.text_projection(self.text(**captions).pooler_output), dim=-1)
        logits = self.logit_scale.exp().clamp(max=100) * images @ texts.T  # [B, captions]
        pairs = torch.arange(len(images))
        contrast = F.cross_entropy(logits, pairs) + F.cross_entropy(logits[:, : len(images)].T, pairs)
        icon = sum(
            F.cross_entropy(part.flatten(0, 1), targets["icon"][..., index].flatten())
            for index, part in enumerate(self.icon(patches).split(PATCH_CLASSES, dim=-1))
        )
        board = self.board(class_token).view(len(class_token), -1, MAX_COUNT + 1).flatten(0, 1)
        return {
            "contrast": contrast / 2,
            "icon": icon,
            "where": _position_loss(self.where(patches)),
            "board": F.cross_entropy(board, targets["board"].flatten(), ignore_index=-100),
            "reading": _reading_loss(self.reading(class_token), targets["reading"]),
        }


def _position_loss(logits: Tensor) -> Tensor:
    """Return the cross entropy of the row and the column of every patch; logits [B, 64, 16]."""
    steps = torch.arange(PATCHES_PER_SIDE)
    rows, columns = steps.repeat_interleave(PATCHES_PER_SIDE), steps.repeat(PATCHES_PER_SIDE)
    positions = torch.stack([rows, columns], dim=1)  # [64, 2]
    flat_logits = logits.unflatten(-1, (2, PATCHES_PER_SIDE)).flatten(0, 2)
    return F.cross_entropy(flat_logits, positions.expand(len(logits), -1, -1).flatten())


def _reading_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy over the pictures that have a reading (about one in six); zero if none has."""
    has_reading = target >= 0
    if not has_reading.any():
        return logits.sum() * 0
    return F.cross_entropy(logits[has_reading], target[has_reading])


def render_pixels(scenes: list[Scene]) -> Tensor:
    """Draw scenes and normalize them as the image processor does, without resizing: [B, 3, 64, 64]."""
    images = np.stack([np.asarray(icons.draw(scene)) for scene in scenes])
    processor = tiny.image_processor()
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    values = (torch.from_numpy(images).float() / 255 - mean) / std
    return values.permute(0, 3, 1, 2).contiguous()


def build_targets(scenes: list[Scene]) -> dict[str, Tensor]:
    """Build the targets of the auxiliary heads.

    `icon` [B, 64, 3]: shape, color and size of every patch. `board` [B, 8 + 7 + 1]: number of icons of each of 8 shapes
    and of each of 7 colors, then of all icons. `reading` [B]: the class of the clock's or number line's reading.
    −100: no target.
    """
    icon_targets = torch.zeros(len(scenes), PATCHES_PER_SIDE, PATCHES_PER_SIDE, 3, dtype=torch.long)
    counts = torch.zeros(len(scenes), len(SHAPES) + len(COLORS) + 1, dtype=torch.long)
    readings = torch.full((len(scenes),), -100)
    cell = PATCHES_PER_SIDE // BOARD
    for index, scene in enumerate(scenes):
        for icon in scene.icons:
            top, left, side = icon.row * cell, icon.col * cell, icon.span * cell
            shape, color = SHAPES.index(icon.shape), COLORS.index(icon.color)
            patch = torch.tensor([shape + 1, color + 1, icon.span])
            icon_targets[index, top : top + side, left : left + side] = patch
            counts[index, shape] += 1
            counts[index, len(SHAPES) + color] += 1
            counts[index, -1] += 1
        if scene.question_mark_cell is not None:
            top, left = (cell * position for position in scene.question_mark_cell)
            icon_targets[index, top : top + cell, left : left + cell, 0] = QUESTION_MARK
        if scene.value is not None:
            readings[index] = scene.value + (CLOCK_READINGS if scene.kind == "scale" else 0)
            counts[index] = -100
    return {"icon": icon_targets.flatten(1, 2), "board": counts.clamp(max=MAX_COUNT), "reading": readings}


def build_batch(
    scenes: list[Scene], tokenizer: PreTrainedTokenizerBase, false_captions_per_picture: int, seed: int
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Build the pixels, tokenized captions and targets of `Tower.compute_losses`.

    There is one true caption per picture, followed by `false_captions_per_picture` corrupted captions per picture.
    """
    rng = random.Random(f"captions/{seed}")
    texts = [sample_caption(scene, rng) for scene in scenes]
    detailed = [select_detailed_caption(scene) for scene in scenes]
    texts += [corrupt_text(text, rng) for _ in range(false_captions_per_picture) for text in detailed]
    captions = _tokenize(tokenizer, texts)
    return render_pixels(scenes), captions, build_targets(scenes)


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Tensor]:
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=tiny.CLIP_TEXT_LENGTH, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def evaluate_tower(
    tower: Tower, tokenizer: PreTrainedTokenizerBase, seed: int, pictures: int = 256
) -> dict[str, float]:
    """Return the accuracies (0 to 1) of patches, counts, readings and captions on the first pictures of a seed.

    `match_acc`: the true caption is the nearest among those of all pictures. `pair_acc`: the true caption is nearer
    than the same caption with a false word (chance 0.5).
    """
    scenes = [icons.make_scene(seed, index) for index in range(pictures)]
    pixels, captions, targets = build_batch(scenes, tokenizer, 1, seed)
    tower.eval()
    features = tower.vision.post_layernorm(tower.compute_features(pixels))
    class_token = features[:, 0]
    icon = tower.icon(features[:, 1:]).split(PATCH_CLASSES, dim=-1)
    covered = targets["icon"][..., 0] > 0
    correct_patches = torch.stack([part.argmax(-1) for part in icon], dim=-1) == targets["icon"]
    board = tower.board(class_token).view(pictures, -1, MAX_COUNT + 1).argmax(-1)
    has_reading = targets["reading"] >= 0
    correct_readings = tower.reading(class_token).argmax(-1)[has_reading] == targets["reading"][has_reading]
    images = F.normalize(tower.visual_projection(class_token), dim=-1)
    false_texts = _embed_texts(tower, captions)[pictures:]
    true_texts = _embed_texts(tower, _tokenize(tokenizer, [select_detailed_caption(scene) for scene in scenes]))
    tower.train()
    return {
        "patch_acc": round(correct_patches.all(-1)[covered].float().mean().item(), 4),
        "board_acc": round((board == targets["board"])[targets["board"] != -100].float().mean().item(), 4),
        "reading_acc": round(correct_readings.float().mean().item(), 4),
        "match_acc": round((images @ true_texts.T).argmax(-1).eq(torch.arange(pictures)).float().mean().item(), 4),
        "pair_acc": round(((images * true_texts).sum(-1) > (images * false_texts).sum(-1)).float().mean().item(), 4),
    }


def _embed_texts(tower: Tower, captions: dict[str, Tensor]) -> Tensor:
    return F.normalize(tower.text_projection(tower.text(**captions).pooler_output), dim=-1)


@torch.no_grad()
def clear_free_channels(vision: InstructBlipVisionModel) -> None:
    """Set the embeddings to zero in the free channels, and to mean zero over the other channels.

    Subtracting the mean changes no output, because every layer begins with a layer norm, which subtracts it anyway.
    """
    embeddings = vision.embeddings
    for weight, dim in (
        (embeddings.patch_embedding.weight, 0),
        (embeddings.patch_embedding.bias, 0),
        (embeddings.position_embedding, 2),
        (embeddings.class_embedding, 2),
    ):
        other_channels = weight.narrow(dim, FREE_CHANNELS, weight.shape[dim] - FREE_CHANNELS)
        other_channels -= other_channels.mean(dim, keepdim=True)
        weight.narrow(dim, 0, FREE_CHANNELS).zero_()


@torch.no_grad()
def copy_to_clip(tower: Tower, clip: CLIPModel) -> CLIPModel:
    """Copy the vision tower into `clip`, whose text encoder the tower shares already; returns `clip`."""
    clip_vision, vision = clip.vision_model, tower.vision
    width = vision.config.hidden_size
    positions = vision.embeddings.position_embedding[0].clone()
    positions[1:] += vision.embeddings.patch_embedding.bias
    positions[:, 0], positions[:, 1] = CONSTANT, -CONSTANT
    clip_vision.embeddings.patch_embedding.weight.copy_(vision.embeddings.patch_embedding.weight)
    clip_vision.embeddings.class_embedding.copy_(vision.embeddings.class_embedding[0, 0])
    clip_vision.embeddings.position_embedding.weight.copy_(positions)
    # The variance is that of the constant alone, 2 × CONSTANT² / width. Undo it, and remove the constant.
    clip_vision.pre_layrnorm.weight.fill_(CONSTANT * (2 / width) ** 0.5)
    clip_vision.pre_layrnorm.weight[:FREE_CHANNELS] = 0
    clip_vision.pre_layrnorm.bias.zero_()
    for layer, source in zip(clip_vision.encoder.layers, vision.encoder.layers, strict=True):
        clip_attention = layer.self_attn
        projections = (clip_attention.q_proj, clip_attention.k_proj, clip_attention.v_proj)
        for projection, weight, bias in zip(
            projections, source.self_attn.qkv.weight.chunk(3), source.self_attn.qkv.bias.chunk(3), strict=True
        ):
            projection.weight.copy_(weight)
            projection.bias.copy_(bias)
        clip_attention.out_proj.load_state_dict(source.self_attn.projection.state_dict())
        for name in ("layer_norm1", "layer_norm2", "mlp"):
            getattr(layer, name).load_state_dict(getattr(source, name).state_dict())
    clip_vision.post_layernorm.load_state_dict(vision.post_layernorm.state_dict())
    return clip
