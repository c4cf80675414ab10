"""The handlers of the page's events. Each checks its arguments, because browsers can be bypassed."""

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from PIL import Image

from ..clip.search import Index
from ..io.images import on_white, open_image, open_upload, read_facts
from ..pipelines.samplers import SAMPLERS
from .generation import OWN, Exploration, Studio
from .session import Sessions, status
from .validation import (
    MAX_BLEND_IMAGES,
    MAX_IMAGES,
    MAX_PROMPT,
    MAX_SEED,
    RESTORED,
    inpainting_inputs,
    number_between,
    page_of,
    restored,
    restored_message,
    upload_bytes,
    user_errors,
    whole_number,
)

SEARCH_RESULTS = 12  # images that a search shows


class Handlers:
    """The handlers of the page's buttons and fields, for a studio and the index of the folder of the Search tab."""

    def __init__(self, studio: Studio, index: Index | None = None):
        self.studio, self.index, self.sessions = studio, index, Sessions(studio)

    def on_draw(  # noqa: PLR0913 - one parameter for each input component
        self,
        prompt: Any,
        negative: Any,
        number: Any,
        seed: Any,
        lock: Any,
        size: Any,
        guidance: Any,
        steps: Any,
        sampler: Any,
        transparent: Any,
        request: gr.Request,
    ) -> Iterator:
        """Sample images of a prompt; then, unless the seed is kept, set the seed for the next ones."""
        seed = whole_number("seed", seed, 0, MAX_SEED)
        seeds = [seed + n for n in range(whole_number("number of images", number, 1, MAX_IMAGES))]
        facts = {"prompt": self._text("prompt", prompt), "negative_prompt": self._text("negative prompt", negative, empty=True)}
        guidance, steps, size = (
            number_between("guidance", guidance, 1, 20),
            whole_number("steps", steps, 1, 100),
            self._size(size),
        )
        facts |= {"size": str(size), "guidance": f"{guidance:g}", "steps": str(steps), "sampler": str(sampler)}
        facts |= {"transparent": "yes" if transparent else "no"}
        settings = {"size": size, "decoder_guidance_scale": guidance, "decoder_num_inference_steps": steps}
        with user_errors():
            sample = self.studio.create(facts["prompt"], facts["negative_prompt"], seeds, sampler, **settings)
        each = [facts | {"seed": str(s)} for s in seeds]
        for shown in self.sessions.run(sample, each, request, bool(transparent)):
            yield *shown, gr.skip()
        yield *[gr.skip()] * 4, gr.skip() if lock else random.randrange(MAX_SEED)

    def on_vary(self, file: Any, number: Any, far: Any, size: Any, request: gr.Request) -> Iterator:
        image, far = self._image("the image to vary", file), number_between("how far to go", far, 0, 1)
        count = whole_number("number of variations", number, 1, MAX_IMAGES)
        first = random.randrange(MAX_SEED)
        seeds, size = [first + n for n in range(count)], self._size(size)
        settings = {"size": size} | ({"eta": far} if far < 1 else {})
        each = [{"variation_of": "an upload", "seed": str(s), "size": str(size)} for s in seeds]
        yield from self.sessions.run(self.studio.vary(image, seeds, **settings), each, request)

    def on_blend(  # noqa: PLR0913 - one parameter for each input component
        self, first: Any, first_text: Any, second: Any, second_text: Any, steps: Any, size: Any, request: gr.Request
    ) -> Iterator:
        ends = []
        for name, file, text in (("first", first, first_text), ("second", second, second_text)):
            ends.append(self._image(name, file) if file else self._text(f"{name} prompt", text))
        steps, seed, size = (
            whole_number("images on the way", steps, 2, MAX_BLEND_IMAGES),
            random.randrange(MAX_SEED),
            self._size(size),
        )
        names = [e if isinstance(e, str) else "an upload" for e in ends]
        facts = {"from": names[0], "to": names[1], "seed": str(seed), "size": str(size)}
        each = [facts | {"share": f"{n / (steps - 1):.4f}"} for n in range(steps)]
        files: list[str] = []
        for shown in self.sessions.run(self.studio.blend(ends, steps, seed, size=size), each, request, files=files):
            yield *shown, *[gr.skip()] * 4
        if files:
            place = gr.Slider(1, len(files), value=1)
            yield *[gr.skip()] * 4, files, gr.Group(visible=True), place, files[0]

    def on_edit(self, file: Any, source: Any, target: Any, strength: Any, size: Any, request: gr.Request) -> Iterator:
        image, strength = self._image("the image to change", file), number_between("how far to go", strength, 0, 1)
        source, target = self._text("from", source, empty=True), self._text("to", target)
        seed, size = random.randrange(MAX_SEED), self._size(size)
        facts = {"edit_of": "an upload", "from": source, "to": target, "strength": f"{strength:g}", "size": str(size)}
        sample = self.studio.edit(image, target, source, [strength], seed, size=size)
        yield from self.sessions.run(sample, [facts], request)

    def on_paint(  # noqa: PLR0913 - one parameter for each input component
        self,
        editor: Any,
        prompt: Any,
        left: Any,
        top: Any,
        width: Any,
        height: Any,
        west: Any,
        east: Any,
        north: Any,
        south: Any,
        size: Any,
        request: gr.Request,
    ) -> Iterator:
        image, layers = self._editor(editor)
        prompt, seed, size = self._text("prompt", prompt), random.randrange(MAX_SEED), self._size(size)
        numbers = zip(("left", "top", "width", "height"), (left, top, width, height), strict=True)
        rectangle = [number_between(name, value, 0, 100) for name, value in numbers]
        margins = [number_between("margin", value, 0, 100) for value in (west, east, north, south)]
        with user_errors():
            image, mask = inpainting_inputs(image, layers, rectangle, margins)
        facts = {"inpaint_of": "an upload", "prompt": prompt, "seed": str(seed), "size": str(size)}
        sample = self.studio.inpaint(prompt, image, mask, [seed], size=size)
        yield from self.sessions.run(sample, [facts], request)

    def on_explore(self, prompt: Any, request: gr.Request) -> Iterator:
        size, seed = self.studio.pipe.sizes[-1], random.randrange(MAX_SEED)
        facts = {"prompt": self._text("prompt", prompt), "seed": str(seed), "size": str(size)}
        explore = self.studio.explore(facts["prompt"], seed, size)
        found: list[Exploration] = []

        def sample(progress: Any) -> list[Image.Image]:
            found[:] = [explore(progress)]
            return found[0].images

        for shown in self.sessions.run(sample, [facts], request):
            yield *shown, *[gr.skip()] * 4
        if found and found[0].images:
            self.sessions.check_content(*(image for _, image in found[0].candidates), *found[0].stages)
            candidates = [(image, f"cosine {score:.3f}") for score, image in found[0].candidates]
            stages = [(image, f"{image.width} px") for image in found[0].stages]
            yield *[gr.skip()] * 4, gr.Column(visible=True), candidates, found[0].trajectory, stages

    def on_find(self, text: Any, file: Any) -> tuple:
        assert self.index is not None  # else there is no Search tab
        query = self._image("the image", file) if file else self._text("query", text)
        with user_errors():
            found = self.index.search(query, len(self.index.stamps))
        images = []
        for score, name in found:
            try:
                image = open_image(self.index.folder / name)
            except ValueError:  # deleted since it was indexed, or being written
                continue
            image.thumbnail((512, 512))
            images.append((image, f"{name} ({score:.3f})"))
            if len(images) == SEARCH_RESULTS:
                break
        return images, status(f"{len(images)} images, the nearest first.")

    def on_cancel(self, request: gr.Request) -> tuple:
        cancelled = self.studio.cancel(page_of(request))
        return status("Cancelled." if cancelled else "There was nothing to cancel."), gr.Button(interactive=False)

    def on_open(self, session: Any, request: gr.Request) -> list:
        """The history of the browser session with this id; with API keys, of this id and key."""
        if not isinstance(session, str) or not re.fullmatch("[0-9a-f]{32}", session):
            return self.sessions.histories.of(page_of(request))
        return self.sessions.histories.open(page_of(request), (getattr(request, "username", None), session))

    def on_leave(self, request: gr.Request) -> None:
        self.studio.cancel(page_of(request))
        self.sessions.histories.close(page_of(request))

    def on_restore(self, file: Any) -> list:
        data = upload_bytes("the image to restore", file)
        with user_errors():
            facts = read_facts(data, "the file")
        choices = {"size": self.studio.pipe.sizes, "sampler": (OWN, *SAMPLERS)}
        values = {name: restored(facts, name, kind) for name, kind in RESTORED.items()}
        back = {n: v for n, v in values.items() if v is not None and v in choices.get(n, [v])}
        fields = [back.get(name, gr.skip()) for name in RESTORED]
        return [*fields, status(restored_message(facts, list(back), self.studio.model)), True if "seed" in back else gr.skip()]

    def on_select(self, event: gr.SelectData) -> int:
        return whole_number("place in the gallery", event.index, 0, MAX_BLEND_IMAGES)

    def on_recall(self, history: list, event: gr.SelectData) -> tuple:
        """Show an image of the history in the gallery, from where it can be sent to a tab."""
        return [history[whole_number("place in the history", event.index, 0, len(history) - 1)]] if history else gr.skip(), 0

    def on_place(self, path: list[str], place: Any) -> Any:
        return path[min(whole_number("place on the way", place, 1, MAX_BLEND_IMAGES), len(path)) - 1] if path else gr.skip()

    def on_play(self, playing: bool) -> tuple:
        return not playing, gr.Timer(active=not playing), "Play" if playing else "Stop"

    def on_tick(self, path: list[str], place: Any) -> int:
        return whole_number("place on the way", place, 1, MAX_BLEND_IMAGES) % max(len(path), 1) + 1

    def sender(self, tab: str) -> Callable:
        def send(images: list, chosen: int) -> tuple:
            if not images:
                raise gr.Error("Draw an image first.", print_exception=False)
            file = images[min(chosen, len(images) - 1)][0]
            value = {"background": file, "layers": [], "composite": file} if tab == "inpaint" else file
            return value, gr.Tabs(selected=tab)

        return send

    def _text(self, name: str, text: Any, empty: bool = False) -> str:
        if not isinstance(text, str | None) or len(text or "") > MAX_PROMPT:
            raise gr.Error(f"The {name} has more than {MAX_PROMPT} characters.", print_exception=False)
        text = (text or "").strip()
        if not text and not empty:
            raise gr.Error(f"The {name} is empty.", print_exception=False)
        self.sessions.check_content(text)
        return text

    def _size(self, size: Any) -> int:
        if isinstance(size, bool) or size not in self.studio.pipe.sizes:
            sizes = ", ".join(map(str, self.studio.pipe.sizes))
            raise gr.Error(f"The size must be one of {sizes} pixels, got {size!r}.", print_exception=False)
        return int(size)

    def _editor(self, editor: Any) -> tuple[Image.Image, list[Image.Image]]:
        """The editor's image and its layer of paint, from uploaded files."""
        editor = editor if isinstance(editor, dict) else {}
        files = editor.get("layers") or []
        if editor.get("id") is not None or not isinstance(files, list) or len(files) > 1:
            raise gr.Error("The editor takes an image and one layer of paint.", print_exception=False)
        image = self._image("an image", editor.get("background"))
        data = [upload_bytes("the paint", file) for file in files]
        with user_errors():
            return image, [open_upload(content, "the paint") for content in data]

    def _image(self, name: str, file: Any) -> Image.Image:
        data = upload_bytes(name, file)
        with user_errors():
            image = on_white(open_upload(data, name))
        self.sessions.check_content(image)
        return image
