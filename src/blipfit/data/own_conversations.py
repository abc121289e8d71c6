"""Conversations of own data, as LLaVA (`from`, `value`) and chat templates (`role`, `content`) write them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from blipfit.data import annotations
from blipfit.errors import UserError

_USER, _MODEL, _SYSTEM = ("human", "user"), ("gpt", "assistant", "model"), ("system",)
IMAGE_TOKEN = "<image>"
"""Where the image is in a text; removed, because the prompts of InstructBLIP have no such place."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A question of a conversation with its answer; `context` has the system message and all earlier turns."""

    question: str
    answer: str
    context: str


def read_turns(messages: Any, location: str) -> tuple[list[Turn], list[Any]]:
    """Return the turns of a conversation, and the images that are inside the messages.

    Raises UserError unless user and model take turns, the user begins, and the model answers last.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{location}: a conversation must be a list of messages, but is {annotations.quote(messages)}")
    images: list[Any] = []
    context: list[str] = []
    texts: list[str] = []  # of users and the model, in turn
    for number, message in enumerate(messages, start=1):
        role, text = _read_message(message, f"{location}: message {number}", images)
        if role in _SYSTEM and not texts:
            context += [text] if text else []
            continue
        expected = _MODEL if len(texts) % 2 else _USER
        if role not in expected:
            raise UserError(
                f"{location}: message {number} is from {annotations.quote(role)}, but one from "
                f"{' or '.join(map(repr, expected))} is expected"
            )
        texts.append(text)
    if len(texts) % 2 or not texts:
        raise UserError(f"{location}: the conversation does not end with an answer")
    return _pair(texts, context), images


def _pair(texts: Sequence[str], context: list[str]) -> list[Turn]:
    turns = []
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        turns.append(Turn(question, answer, " ".join(context)))
        context = [*context, f"Question: {question} Answer: {answer}"]
    return turns


def _read_message(message: Any, location: str, images: list[Any]) -> tuple[Any, str]:
    """Return role and text of a message; its images are appended to `images`."""
    record = annotations.require_object(message, location)
    role = record.get("from") or record.get("role")
    content = record.get("value") if record.get("value") is not None else record.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else annotations.require_object(part, location)
        if (image := _image(part)) is not None:
            images.append(image)
        elif str(part.get("type")) == "text":
            texts.append(annotations.require_text(part, "text", location))
        elif part.get("type") != "image":  # without an image of its own: the place of the entry's image
            raise UserError(f"{location}: content of the type {annotations.quote(part.get('type'))} is not supported")
    return role, " ".join(text for text in (t.replace(IMAGE_TOKEN, "").strip() for t in texts) if text)


def _image(part: dict[str, Any]) -> Any:
    """Return the image of a part of a message, or None if it is text or only the place of the image."""
    if part.get("type") not in ("image", "image_url"):
        return None
    image = next((part[key] for key in ("image", "image_url", "path", "url", "bytes") if part.get(key)), None)
    return image.get("url") if isinstance(image, dict) and "url" in image else image
