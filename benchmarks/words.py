"""Captions below images."""

from PIL import ImageDraw


def broken(text: str, width: float, draw: ImageDraw.ImageDraw, font=None) -> list[str]:
    """A text in lines of at most `width` pixels, but for single words that are longer."""
    lines = [""]
    for word in text.split():
        if lines[-1] and draw.textlength(f"{lines[-1]} {word}", font) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
