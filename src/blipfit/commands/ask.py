"""`blipfit ask`: a question about an image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blipfit import inference
from blipfit.adapters.open_model import warning_fields
from blipfit.report import terminal


def load_model(model: str | None, adapter: Path | None, device: str | None) -> inference.Model:
    """The model that `--model` and `--adapter` name; long builds of image features are announced on stderr."""
    screen = terminal.console(stderr=True)
    return inference.load(model, adapter, device=device, announce=lambda text: screen.print(text, soft_wrap=True))


def run(
    model: inference.Model, image: Path, question: str, choices: Sequence[str], prompt: str | None, decoding: str
) -> dict[str, Any]:
    """Answer in the model's own words, or with the likeliest of the choices.

    Raises UserError if the image cannot be read or the prompt or decoding is unknown.
    """
    record: dict[str, Any] = {"image": str(image), "question": question, **warning_fields(model.warnings)}
    if choices:
        ranking = model.rank(image, question, choices, prompt=prompt)
        listed = [
            {"choice": entry.choice, "log_likelihood": entry.log_likelihood, "probability": entry.probability}
            for entry in ranking
        ]
        return record | {"answer": ranking[0].choice, "choices": listed}
    return record | {"answer": model.ask(image, question, prompt=prompt, decoding=decoding), "decoding": decoding}


def render(record: Mapping[str, Any]) -> list[str]:
    """The answer; with choices, one line per choice with its probability."""
    if "choices" not in record:
        return [record["answer"]]
    return [f"{100 * entry['probability']:5.1f} %  {entry['choice']}" for entry in record["choices"]]
