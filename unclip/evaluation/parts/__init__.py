"""The parts of an evaluation. Each samples the images that it needs, unless they are stored, and measures them."""

from collections.abc import Callable

from ..context import EvaluationContext
from ..report import Part
from . import (
    attachments,
    components,
    composition,
    copies,
    everyday,
    fidelity,
    flatness,
    judge,
    likeness,
    loss,
    pairs,
    prior,
    recognition,
    rectangle,
    style,
    sweeps,
    upsamplers,
)

PARTS: dict[str, Callable[[EvaluationContext], Part]] = {
    "judge": judge.measure,
    "recognition": recognition.measure,
    "everyday": everyday.measure,
    "composition": composition.measure,
    "rectangle": rectangle.measure,
    "fidelity": fidelity.measure,
    "prior": prior.measure,
    "sweeps": sweeps.measure,
    "upsamplers": upsamplers.measure,
    "likeness": likeness.measure,
    "loss": loss.measure,
    "flatness": flatness.measure,
    "style": style.measure,
    "parts": components.measure,
    "copies": copies.measure,
    "pairs": pairs.measure,
    "attachments": attachments.measure,
}
