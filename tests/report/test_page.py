"""The page's colors and lists of experiments."""

import re
from pathlib import Path

import pytest

from blipfit.report import page

STYLE = (Path(page.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")


def palettes() -> dict[str, dict[str, str]]:
    """Colors by name, of every block of the style that sets all of them."""
    blocks = re.findall(r"([^{}]*)\{([^{}]*--page:[^{}]*)\}", STYLE)
    return {name.strip(): dict(re.findall(r"--([\w-]+):\s*(#\w+)", block)) for name, block in blocks}


def luminance(color: str) -> float:
    """Relative luminance of WCAG 2."""
    digits = color.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    values = [int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("name", palettes())
def test_texts_have_a_contrast_of_at_least_4_5(name):
    colors = palettes()[name]
    for background in ("page", "panel", "accent-soft"):
        for text in ("text", "muted", "accent"):
            light, dark = sorted((luminance(colors[text]), luminance(colors[background])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, background)


def test_dark_colors_are_the_same_by_the_system_and_by_the_button_and_never_printed():
    light, by_system, by_button = palettes().values()
    assert by_system == by_button != light
    assert all("@media screen" in STYLE[: STYLE.index(name)][-80:] for name in list(palettes())[1:])


@pytest.mark.parametrize(
    ("names", "spans"),
    [
        (["1", "2", "3", "7", "baseline", "baseline-vicuna"], "1–3, 7, baseline, baseline-vicuna"),
        (["4", "3"], "4, 3"),
        ([], ""),
    ],
)
def test_consecutive_numbers_are_a_span(names, spans):
    assert page.format_spans(names) == spans
