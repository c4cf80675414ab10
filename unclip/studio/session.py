"""Runs a session's calls: rate limit, progress, content filter, saving and history."""

import html
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..io.images import cut_out, png_facts
from .generation import Step, Studio
from .history import SessionHistories
from .validation import client_of, page_of, user_errors


class Sessions:
    """Runs calls for the sessions of a page: counts them on the rate, checks and saves the images, keeps the history."""

    def __init__(self, studio: Studio):
        self.studio, self.histories = studio, SessionHistories()

    def _take_rate(self, request: gr.Request, images: int) -> None:
        """Count images on the client's rate: the key's, else the address's."""
        if self.studio.rate is not None:
            wait = self.studio.rate.take(client_of(request), images)
            if wait:
                raise gr.Error(self.studio.rate.message(wait, images), print_exception=False)

    def _steps(self, sample: Callable, request: gr.Request) -> Iterator[Any]:
        """The steps, then the result, None if cancelled."""
        with user_errors():
            yield (yield from self.studio.stream(page_of(request), sample, getattr(request, "username", None)))

    def run(
        self, sample: Callable, facts: list[dict], request: gr.Request, clear: bool = False, files: list | None = None
    ) -> Iterator[tuple]:
        """Updates of gallery, status, cancel button and history, step by step; saved files are appended to `files`."""
        self._take_rate(request, len(facts))
        images = None
        try:
            for step in self._steps(sample, request):
                if isinstance(step, Step):
                    early = step.images if self.studio.content_filter is None else None  # unfiltered images are not shown
                    yield early or gr.skip(), status(str(step), step), gr.Button(interactive=True), gr.skip()
                else:
                    images = step
            self.check_content(*images or ())
        except Exception as error:
            if isinstance(error, gr.Error) and images is None and self.studio.rate is not None:
                self.studio.rate.refund(client_of(request), len(facts))
            say = error.message if isinstance(error, gr.Error) else "That failed; the log says more."
            yield gr.skip(), status(say), gr.Button(interactive=False), gr.skip()
            raise
        if images is None:
            if not self.studio.is_busy(page_of(request)):  # else a newer call replaced it, which reports itself
                yield gr.skip(), status("Cancelled."), gr.Button(interactive=False), gr.skip()
            return
        saved = [self._save(cut_out(i) if clear else i, f) for i, f in zip(images, facts, strict=True)]
        if files is not None:
            files += saved
        shown = [(path, caption(f)) for path, f in zip(saved, facts, strict=True)]
        history = self.histories.add(page_of(request), shown)
        what = "The image is" if len(shown) == 1 else f"{len(shown)} images are"
        yield shown, status(f"{what} done."), gr.Button(interactive=False), history

    def _save(self, image: Image.Image, facts: dict[str, str]) -> str:
        """Save a PNG with its metadata in a folder of a random name among Gradio's files."""
        folder = Path(os.environ["GRADIO_TEMP_DIR"]) / secrets.token_hex(16)
        folder.mkdir(parents=True)
        file = folder / "picture.png"
        image.save(file, pnginfo=png_facts(facts | {"model": self.studio.model}))
        return str(file)

    def check_content(self, *contents: str | Image.Image) -> None:
        for content in contents:
            reason = self.studio.content_filter and self.studio.content_filter(content)
            if reason:
                raise gr.Error(str(reason), print_exception=False)


def status(text: str, step: Step | None = None) -> str:
    """The status line as HTML, also for screen readers, with a progress bar."""
    bar = ""
    if step is not None and step.of:
        bar = f'<progress aria-label="Steps of this stage" max="{step.of}" value="{step.done}"></progress>'
    elif step is not None:
        bar = '<progress aria-label="Waiting"></progress>'
    return f'<div class="status" role="status" aria-live="polite"><p>{html.escape(text)}</p>{bar}</div>'


def caption(facts: dict[str, str]) -> str:
    if "share" in facts:
        return f"{float(facts['share']):.0%} of the way"
    parts = [f"seed {facts['seed']}" if "seed" in facts else "", facts.get("prompt") or facts.get("to") or ""]
    return ", ".join(part for part in parts if part)
