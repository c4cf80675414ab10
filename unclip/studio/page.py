"""The page: tabs that say what to draw on the left, what was drawn on the right."""

import html
import math
import os
import random
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageChops

from ..clip.search import Index
from ..io.images import cut_out, on_white, open_image, open_upload, png_facts, read_facts, with_margins
from ..pipelines.base import SAMPLERS
from ..server.worker import Busy
from .drawing import OWN, Step, Studio
from .history import Histories

MAX_PROMPT = 1000  # characters
MAX_PICTURES = 8
MOST = 16  # pictures of a blend, the most that the gallery holds
FOUND = 12  # pictures that a search shows
MAX_SEED = 2**31 - 1  # what a number field holds exactly, in every browser
KEPT = 3600  # seconds that Gradio keeps a picture's file
SESSIONS = 16  # of which drawings wait for the model; beyond it, Gradio's queue
# Where the pictures are below what says what to draw, as on a phone, they come into view.
INTO_VIEW = "() => document.getElementById('pictures').scrollIntoView({block: 'nearest', behavior: 'smooth'})"
# A number that nobody can guess and that says nothing of what was drawn; a browser keeps it for one tab, through reloads.
SESSION = """() => {
    try {
        const bytes = crypto.getRandomValues(new Uint8Array(16));
        return [sessionStorage.unclip ??= Array.from(bytes, n => n.toString(16).padStart(2, "0")).join("")];
    } catch { return [""]; }  // where storage is forbidden the history ends with the page
}"""
SYSTEM_FONT = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
EXAMPLES = ["a red apple", "a rocket", "two yellow stars", "a cat with a crown", "a blue fish next to a green leaf"]

ICON = (
    "%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Crect width='16' height='16' rx='4' fill='%234338ca'/%3E"
    "%3Ccircle cx='8' cy='8' r='4' fill='%23fff'/%3E%3C/svg%3E"
)
HEAD = f"""<meta name="description" content="Draw pictures of sentences on this machine.">
<link rel="icon" href="data:image/svg+xml,{ICON}">
<script>document.documentElement.lang = "en";</script>"""
CSS = """
.dark {--color-accent: var(--primary-400)}
#title h1 {margin: 0}
#title p {margin: .25rem 0 0}
#now {position: sticky; top: 0; z-index: 20; align-items: center; background: var(--body-background-fill)}
.status {min-height: 2.6rem}
.status p {margin: .25rem 0}
.status progress {width: 100%; height: .5rem; border: 0; border-radius: .25rem; overflow: hidden; appearance: none;
  background: var(--neutral-300); color: var(--color-accent)}
.status progress::-webkit-progress-bar {background: var(--neutral-300)}
.status progress::-webkit-progress-value {background: var(--color-accent)}
.status progress::-moz-progress-bar {background: var(--color-accent)}
.status progress:indeterminate {animation: waiting 1.5s linear infinite;
  background: linear-gradient(90deg, var(--neutral-300) 30%, var(--color-accent) 50%, var(--neutral-300) 70%) 0/200%}
.status progress:indeterminate::-webkit-progress-bar {background: none}
@keyframes waiting {from {background-position: 200%} to {background-position: 0}}
.gradio-container {overflow: clip !important}
.gradio-container main {width: 100%; max-width: 1600px; margin: 0 auto}
#pictures {scroll-margin-top: 5rem}
#pictures .grid-wrap, .strip .grid-wrap {max-height: none; min-height: 0}
.strip .grid-container, #history .grid-container {grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important;
  grid-template-rows: none !important; grid-auto-rows: auto !important}
.strip .caption-label {max-width: 100% !important; padding: .1rem .35rem !important; font-size: .75rem !important}
#history .thumbnail-lg .caption-label {display: none !important}
#pictures .grid-container {padding-top: 1.5rem}
#pictures img {image-rendering: auto; background: repeating-conic-gradient(#ddd 0 25%, #fff 0 50%) 0 0/24px 24px}
#pictures .media-button img {width: auto; max-width: 100%; margin: 0 auto}
#frame {border-width: 0 !important}
.label-wrap > span:first-child {text-align: left}
.wrap .or, .min_value, .max_value {color: var(--body-text-color-subdued) !important}
:focus-visible {outline: 3px solid var(--color-accent) !important; outline-offset: 2px}
@media (max-width: 640px) {.gradio-container .main {padding: .75rem !important} #title p {display: none}
  .strip .grid-container, #history .grid-container {grid-template-columns: repeat(3, minmax(0, 1fr)) !important}}
@media (prefers-reduced-motion: reduce) {* {animation: none !important; transition: none !important}}
"""


def theme() -> gr.themes.Base:
    """Gradio's default in the machine's own fonts, with a button dark enough for white letters."""
    made = gr.themes.Default(primary_hue="indigo", font=SYSTEM_FONT, font_mono=["ui-monospace", "monospace"])
    return made.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        color_accent="*primary_600",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


def bound(editor: gr.ImageEditor) -> None:
    """Gradio's editor decodes what it is sent whatever it costs; this one a picture and a layer, in an upload's bounds."""
    decode, preprocess = editor.convert_and_format_image, editor.preprocess

    def within(file, *args, **kwargs):
        if file is not None:
            data = upload_bytes("the picture", getattr(file, "path", None))
            with mistakes():
                open_upload(data, "the picture")
        return decode(file, *args, **kwargs)

    def few(payload):
        if payload is not None and (payload.id is not None or len(payload.layers or ()) > 1):
            raise gr.Error("The editor takes a picture and one layer of paint.", print_exception=False)
        return preprocess(payload)

    editor.convert_and_format_image, editor.preprocess = within, few
    editor.accept_blobs = None  # another way in, for listeners that this page has not: without bounds, and never emptied


def build(studio: Studio, index: Index | None = None) -> gr.Blocks:
    """The page over a studio; `index` is of the folder that its Search tab looks through."""
    return Page(studio, index).blocks


class Page:
    """The components, and the handlers between them. Every handler checks what it is given: browsers can be bypassed."""

    def __init__(self, studio: Studio, index: Index | None = None):
        self.studio, self.index, self.histories = studio, index, Histories()
        sizes = studio.pipe.sizes
        with gr.Blocks(
            title="unCLIP studio", delete_cache=(300, KEPT), analytics_enabled=False, fill_width=True
        ) as self.blocks:
            gr.Markdown("# unCLIP studio\nA sentence in, a picture out. Nothing leaves this machine.", elem_id="title")
            with gr.Row(elem_id="now"):
                self.status = gr.HTML(status("Ready."), elem_id="status", min_height=0, padding=False)
                self.cancel = gr.Button("Cancel", size="sm", elem_id="cancel", interactive=False, scale=0, min_width=100)
            with gr.Row():
                with gr.Column(min_width=300), gr.Tabs(elem_id="tabs") as self.tabs:
                    self._tabs(sizes)
                with gr.Column(min_width=300):
                    self._results()
            self._wire()
        self.blocks.queue(max_size=32, api_open=False)

    # ------------------------------------------------------------------------------------------ what is on it

    def _tabs(self, sizes: list[int]) -> None:
        size = {"choices": sizes, "value": sizes[-1], "label": "Size in pixels"}
        with gr.Tab("Create", id="create"):
            self.prompt = gr.Textbox(
                label="Prompt", placeholder="a red apple", lines=2, max_length=MAX_PROMPT, elem_id="prompt"
            )
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw")
            gr.Examples([[e] for e in EXAMPLES], [self.prompt], label="Examples", cache_examples=False)
            self.number = gr.Slider(1, MAX_PICTURES, 1, step=1, label="Number of pictures")
            self.size = gr.Radio(**size)
            with gr.Row():
                self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120)
                with gr.Column(min_width=120):
                    self.lock = gr.Checkbox(False, label="Keep the seed")
                    self.shuffle = gr.Button("Shuffle the seed", size="sm")
            with gr.Accordion("More", open=False):
                self.negative = gr.Textbox(label="Negative prompt: what it should not show", max_length=MAX_PROMPT)
                default = self.studio.default
                self.guidance = gr.Slider(
                    1, 20, default("decoder_guidance_scale"), step=0.1, label="Guidance: how closely to follow the prompt"
                )
                self.steps = gr.Slider(1, 100, default("decoder_num_inference_steps"), step=1, label="Steps")
                self.sampler = gr.Dropdown([OWN, *SAMPLERS], value=OWN, label="Sampler")
                self.transparent = gr.Checkbox(False, label="Transparent background, for stickers")
                self.restore = gr.File(
                    label="Restore the settings of a picture: drop its PNG here",
                    file_types=[".png"],
                    height=150,
                    elem_id="restore",
                )
        with gr.Tab("Variations", id="variations"):
            self.varied = self._upload("Picture to vary", "varied")
            self.vary_number = gr.Slider(1, MAX_PICTURES, 4, step=1, label="Number of variations")
            self.keep_layout = gr.Slider(
                0, 1, 1, step=0.05, label="How far to go: 0 keeps the picture's layout, 1 draws it anew"
            )
            self.vary_size = gr.Radio(**size)
            self.vary = gr.Button("Vary", variant="primary", elem_id="vary")
        with gr.Tab("Blend", id="blend"):
            instead = {"placeholder": "or a sentence", "max_length": MAX_PROMPT}
            with gr.Row():
                with gr.Column(min_width=140):
                    self.first = self._upload("First picture", "first")
                    self.first_text = gr.Textbox(label="First prompt", **instead, elem_id="first-text")
                with gr.Column(min_width=140):
                    self.second = self._upload("Second picture", "second")
                    self.second_text = gr.Textbox(label="Second prompt", **instead, elem_id="second-text")
            self.blend_steps = gr.Slider(2, MOST, 6, step=1, label="Pictures on the way")
            self.blend_size = gr.Radio(sizes, value=sizes[min(1, len(sizes) - 1)], label="Size in pixels")
            self.blend = gr.Button("Blend", variant="primary", elem_id="blend")
            self.path = gr.State([])
            with gr.Group(visible=False) as self.player:
                self.frame = gr.Image(label="On the way", interactive=False, buttons=[], elem_id="frame")
                self.place = gr.Slider(1, 2, 1, step=1, label="Place on the way", elem_id="place")
                self.play = gr.Button("Play", elem_id="play")
            self.playing = gr.State(False)
            self.timer = gr.Timer(0.4, active=False)
        with gr.Tab("Edit", id="edit"):
            self.edited = self._upload("Picture to change", "edited")
            self.source = gr.Textbox(label="From: what it is", placeholder="a cat", max_length=MAX_PROMPT)
            self.target = gr.Textbox(label="To: what it should become", placeholder="a black cat", max_length=MAX_PROMPT)
            self.strength = gr.Slider(0, 1, 0.35, step=0.05, label="How far to go")
            self.edit_size = gr.Radio(**size)
            self.edit = gr.Button("Change", variant="primary", elem_id="change")
        with gr.Tab("Inpaint", id="inpaint"):
            gr.Markdown("Paint over what is to be drawn anew.")
            self.editor = gr.ImageEditor(
                label="Picture",
                type="pil",
                sources=["upload", "clipboard"],
                layers=False,
                transforms=(),
                brush=gr.Brush(colors=["#ffffff"], color_mode="fixed", default_size=24),
                buttons=[],
                elem_id="editor",
                height=420,
            )
            bound(self.editor)
            self.paint_prompt = gr.Textbox(
                label="What the whole picture should show", max_length=MAX_PROMPT, elem_id="paint-prompt"
            )
            with gr.Accordion("The place as numbers, and beyond the edges", open=False):
                gr.Markdown("A rectangle to draw anew, in percent of the picture; width or height 0 is none.")
                names = ("Left", "Top", "Width", "Height")
                with gr.Row():
                    self.rectangle = [gr.Number(0, label=name, minimum=0, maximum=100, min_width=70) for name in names]
                gr.Markdown("New space around the picture, in percent of its sides.")
                names = ("Left side", "Right side", "Top side", "Bottom side")
                with gr.Row():
                    self.margins = [gr.Number(0, label=name, minimum=0, maximum=100, min_width=70) for name in names]
            self.paint_size = gr.Radio(**size)
            self.paint = gr.Button("Draw anew", variant="primary", elem_id="paint")
        if self.index is not None:
            with gr.Tab("Search", id="search"):
                self.query = gr.Textbox(label="What to find", max_length=MAX_PROMPT, elem_id="query")
                self.query_picture = self._upload("or a picture like it", "query-picture")
                self.find = gr.Button("Find", variant="primary", elem_id="find")
        with gr.Tab("Explore", id="explore"):
            *smaller, largest = sizes
            way = f"the nearest one's way to {largest} px"
            gr.Markdown(f"How a picture forms: the embeddings that the prior imagines, and {way}.")
            self.explored = gr.Textbox(label="Prompt", max_length=MAX_PROMPT, elem_id="explored")
            self.explore = gr.Button("Explore", variant="primary", elem_id="explore-button")
            kwargs = {"interactive": False, "object_fit": "contain", "buttons": [], "show_label": False, "height": "auto"}
            kwargs["elem_classes"] = "strip"
            with gr.Column(visible=False) as self.formed:
                say = "Candidates, each drawn at 64 px: the nearest to the prompt first, with its cosine to it"
                gr.Markdown(say)
                self.candidates = gr.Gallery(label=say, columns=4, **kwargs)
                say = "The 64 px picture as it forms: what each step expects of it"
                gr.Markdown(say)
                self.film = gr.Gallery(label=say, columns=6, **kwargs)
                say = " and ".join(filter(None, [", ".join(map(str, smaller)), f"{largest} px"]))
                gr.Markdown(say)
                self.stages = gr.Gallery(label=say, columns=len(sizes), **kwargs)

    def _upload(self, label: str, name: str) -> gr.Image:
        image = gr.Image(
            label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=220, buttons=[], elem_id=name
        )
        image.preprocess = lambda file: None if file is None else file.path  # handlers open it, and say what is wrong with it
        return image

    def _results(self) -> None:
        self.pictures = gr.Gallery(
            label="Pictures",
            columns=2,
            height="auto",
            object_fit="contain",
            interactive=False,
            format="png",
            buttons=["download", "fullscreen"],
            elem_id="pictures",
        )
        self.chosen = gr.State(0)
        with gr.Row():
            targets = [("variations", "Vary it"), ("blend", "Blend it"), ("edit", "Change it"), ("inpaint", "Paint in it")]
            self.send = {tab: gr.Button(name, size="sm", min_width=90, elem_id=f"send-{tab}") for tab, name in targets}
        self.session = gr.Textbox(visible=False)  # what `SESSION` answers
        with gr.Accordion("History of this session", open=False):
            self.history = gr.Gallery(
                label="History",
                show_label=False,
                columns=6,
                fit_columns=False,
                height=260,
                interactive=False,
                format="png",
                buttons=["download", "fullscreen"],
                elem_id="history",
            )

    # ------------------------------------------------------------------------------------------ what happens

    def _wire(self) -> None:
        model = {"concurrency_limit": SESSIONS, "concurrency_id": "model"}  # the worker lets them in one by one
        model |= {"api_visibility": "private", "show_progress": "hidden"}
        quick = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        shown = [self.pictures, self.status, self.cancel, self.history]
        given = [self.prompt, self.negative, self.number, self.seed, self.lock, self.size, self.guidance, self.steps]
        given += [self.sampler, self.transparent]
        gr.on([self.draw.click, self.prompt.submit], self.on_draw, given, [*shown, self.seed], **model)
        given = [self.varied, self.vary_number, self.keep_layout, self.vary_size]
        self.vary.click(self.on_vary, given, shown, **model)
        given = [self.first, self.first_text, self.second, self.second_text, self.blend_steps, self.blend_size]
        self.blend.click(self.on_blend, given, [*shown, self.path, self.player, self.place, self.frame], **model)
        given = [self.edited, self.source, self.target, self.strength, self.edit_size]
        self.edit.click(self.on_edit, given, shown, **model)
        given = [self.editor, self.paint_prompt, *self.rectangle, *self.margins, self.paint_size]
        self.paint.click(self.on_paint, given, shown, **model)
        outputs = [*shown, self.formed, self.candidates, self.film, self.stages]
        gr.on([self.explore.click, self.explored.submit], self.on_explore, [self.explored], outputs, **model)
        if self.index is not None:
            given = [self.query, self.query_picture]
            gr.on([self.find.click, self.query.submit], self.on_find, given, [self.pictures, self.status], **model)

        self.cancel.click(self.on_cancel, None, [self.status, self.cancel], **quick)
        self.blocks.load(self.on_open, [self.session], self.history, js=SESSION, **quick)
        self.blocks.unload(self.on_leave)
        self.shuffle.click(lambda: random.randrange(MAX_SEED), None, self.seed, **quick)
        self.restore.upload(self.on_restore, [self.restore], [*self._restorable(), self.status, self.lock], **quick)
        self.pictures.select(self.on_select, None, self.chosen, **quick)
        self.pictures.preview_close(lambda: 0, None, self.chosen, **quick)
        self.history.select(self.on_recall, [self.history], [self.pictures, self.chosen], **quick)
        for button in (self.draw, self.vary, self.blend, self.edit, self.paint, self.explore):
            button.click(None, js=INTO_VIEW)
        self.place.change(self.on_place, [self.path, self.place], self.frame, **quick)
        self.play.click(self.on_play, [self.playing], [self.playing, self.timer, self.play], **quick)
        self.timer.tick(self.on_tick, [self.path, self.place], self.place, **quick)
        for tab, button in self.send.items():
            target = {"variations": self.varied, "blend": self.first, "edit": self.edited, "inpaint": self.editor}[tab]
            button.click(self._sender(tab), [self.pictures, self.chosen], [target, self.tabs], **quick)

    def on_draw(
        self, prompt, negative, number, seed, lock, size, guidance, steps, sampler, transparent, request: gr.Request
    ) -> Iterator:
        """Pictures of a sentence; then, unless the seed is kept, the next one's seed."""
        seed = whole("seed", seed, 0, MAX_SEED)
        seeds = [seed + n for n in range(whole("number of pictures", number, 1, MAX_PICTURES))]
        facts = {"prompt": self._text("prompt", prompt), "negative_prompt": self._text("negative prompt", negative, empty=True)}
        guidance, steps, size = between("guidance", guidance, 1, 20), whole("steps", steps, 1, 100), self._size(size)
        facts |= {"size": str(size), "guidance": f"{guidance:g}", "steps": str(steps), "sampler": str(sampler)}
        facts |= {"transparent": "yes" if transparent else "no"}
        settings = {"size": size, "decoder_guidance_scale": guidance, "decoder_num_inference_steps": steps}
        with mistakes():
            draw = self.studio.create(facts["prompt"], facts["negative_prompt"], seeds, sampler, **settings)
        each = [facts | {"seed": str(s)} for s in seeds]
        for shown in self._draw(draw, each, request, bool(transparent)):
            yield *shown, gr.skip()
        yield *[gr.skip()] * 4, gr.skip() if lock else random.randrange(MAX_SEED)

    def on_vary(self, file, number, far, size, request: gr.Request) -> Iterator:
        picture, far = self._picture("the picture to vary", file), between("how far to go", far, 0, 1)
        count = whole("number of variations", number, 1, MAX_PICTURES)
        first = random.randrange(MAX_SEED)
        seeds, size = [first + n for n in range(count)], self._size(size)
        settings = {"size": size} | ({"eta": far} if far < 1 else {})
        each = [{"variation_of": "an upload", "seed": str(s), "size": str(size)} for s in seeds]
        yield from self._draw(self.studio.vary(picture, seeds, **settings), each, request)

    def on_blend(self, first, first_text, second, second_text, steps, size, request: gr.Request) -> Iterator:
        ends = []
        for name, file, text in (("first", first, first_text), ("second", second, second_text)):
            ends.append(self._picture(name, file) if file else self._text(f"{name} prompt", text))
        steps, seed, size = whole("pictures on the way", steps, 2, MOST), random.randrange(MAX_SEED), self._size(size)
        names = [e if isinstance(e, str) else "an upload" for e in ends]
        facts = {"from": names[0], "to": names[1], "seed": str(seed), "size": str(size)}
        each = [facts | {"share": f"{n / (steps - 1):.4f}"} for n in range(steps)]
        files: list[str] = []
        for shown in self._draw(self.studio.blend(ends, steps, seed, size=size), each, request, files=files):
            yield *shown, *[gr.skip()] * 4
        if files:
            place = gr.Slider(1, len(files), value=1)
            yield *[gr.skip()] * 4, files, gr.Group(visible=True), place, files[0]

    def on_edit(self, file, source, target, strength, size, request: gr.Request) -> Iterator:
        picture, strength = self._picture("the picture to change", file), between("how far to go", strength, 0, 1)
        source, target = self._text("from", source, empty=True), self._text("to", target)
        seed, size = random.randrange(MAX_SEED), self._size(size)
        facts = {"edit_of": "an upload", "from": source, "to": target, "strength": f"{strength:g}", "size": str(size)}
        draw = self.studio.edit(picture, target, source, [strength], seed, size=size)
        yield from self._draw(draw, [facts], request)

    def on_paint(
        self, editor, prompt, left, top, width, height, west, east, north, south, size, request: gr.Request
    ) -> Iterator:
        if not isinstance(editor, dict) or not isinstance(editor.get("background"), Image.Image):
            raise gr.Error("Give a picture first.", print_exception=False)
        picture = on_white(editor["background"])
        self._check_content(picture)
        prompt, seed, size = self._text("prompt", prompt), random.randrange(MAX_SEED), self._size(size)
        numbers = zip(("left", "top", "width", "height"), (left, top, width, height), strict=True)
        rectangle = [between(name, value, 0, 100) for name, value in numbers]
        margins = [between("margin", value, 0, 100) for value in (west, east, north, south)]
        with mistakes():
            picture, mask = to_repaint(picture, editor.get("layers") or [], rectangle, margins)
        facts = {"inpaint_of": "an upload", "prompt": prompt, "seed": str(seed), "size": str(size)}
        draw = self.studio.inpaint(prompt, picture, mask, [seed], size=size)
        yield from self._draw(draw, [facts], request)

    def on_explore(self, prompt, request: gr.Request) -> Iterator:
        size, seed = self.studio.pipe.sizes[-1], random.randrange(MAX_SEED)
        facts = {"prompt": self._text("prompt", prompt), "seed": str(seed), "size": str(size)}
        explore, found = self.studio.explore(facts["prompt"], seed, size), []

        def draw(watch) -> list[Image.Image]:
            found[:] = [explore(watch)]
            return found[0].pictures

        for shown in self._draw(draw, [facts], request):
            yield *shown, *[gr.skip()] * 4
        if found and found[0].pictures:
            self._check_content(*(picture for _, picture in found[0].candidates), *found[0].stages)
            candidates = [(picture, f"cosine {score:.3f}") for score, picture in found[0].candidates]
            stages = [(picture, f"{picture.width} px") for picture in found[0].stages]
            yield *[gr.skip()] * 4, gr.Column(visible=True), candidates, found[0].film, stages

    def on_find(self, text, file) -> tuple:
        query = self._picture("the picture", file) if file else self._text("query", text)
        with mistakes():
            found = self.index.search(query, len(self.index.stamps))
        pictures = []
        for score, name in found:
            try:
                picture = open_image(self.index.folder / name)
            except ValueError:  # since it was indexed it was deleted, or is being written
                continue
            picture.thumbnail((512, 512))
            pictures.append((picture, f"{name} ({score:.3f})"))
            if len(pictures) == FOUND:
                break
        return pictures, status(f"{len(pictures)} pictures, the nearest first.")

    def on_cancel(self, request: gr.Request) -> tuple:
        dropped = self.studio.cancel(request.session_hash)
        return status("Cancelled." if dropped else "There was nothing to cancel."), gr.Button(interactive=False)

    def on_open(self, session, request: gr.Request) -> list:
        """The history of the browser session of this number, which is a key's own where there are keys."""
        if not isinstance(session, str) or not re.fullmatch("[0-9a-f]{32}", session):
            return self.histories.of(request.session_hash)
        return self.histories.open(request.session_hash, (getattr(request, "username", None), session))

    def on_leave(self, request: gr.Request) -> None:
        self.studio.cancel(request.session_hash)
        self.histories.close(request.session_hash)

    def on_restore(self, file) -> list:
        data = upload_bytes("the picture to restore", file)
        with mistakes():
            facts = read_facts(data, "the file")
        choices = {"size": self.studio.pipe.sizes, "sampler": (OWN, *SAMPLERS)}
        values = {name: restored(facts, name, kind) for name, kind in RESTORED.items()}
        back = {n: v for n, v in values.items() if v is not None and v in choices.get(n, [v])}
        fields = [back.get(name, gr.skip()) for name in RESTORED]
        return [*fields, status(came_back(facts, list(back), self.studio.model)), True if "seed" in back else gr.skip()]

    def on_select(self, event: gr.SelectData) -> int:
        return whole("place in the gallery", event.index, 0, MOST)

    def on_recall(self, history, event: gr.SelectData) -> tuple:
        """A picture of the history, back where it can be sent on from."""
        return [history[whole("place in the history", event.index, 0, len(history) - 1)]] if history else gr.skip(), 0

    def on_place(self, path: list[str], place) -> Any:
        return path[min(whole("place on the way", place, 1, MOST), len(path)) - 1] if path else gr.skip()

    def on_play(self, playing: bool) -> tuple:
        return not playing, gr.Timer(active=not playing), "Play" if playing else "Stop"

    def on_tick(self, path: list[str], place) -> int:
        return whole("place on the way", place, 1, MOST) % max(len(path), 1) + 1

    def _sender(self, tab: str) -> Callable:
        def send(pictures, chosen) -> tuple:
            if not pictures:
                raise gr.Error("Draw a picture first.", print_exception=False)
            file = pictures[min(chosen, len(pictures) - 1)][0]
            value = {"background": file, "layers": [], "composite": file} if tab == "inpaint" else file
            return value, gr.Tabs(selected=tab)

        return send

    def _restorable(self) -> list:
        fields = {"prompt": self.prompt, "negative_prompt": self.negative, "seed": self.seed, "size": self.size}
        fields |= {"guidance": self.guidance, "steps": self.steps, "sampler": self.sampler, "transparent": self.transparent}
        return [fields[name] for name in RESTORED]

    # ------------------------------------------------------------------------------------------ drawing

    def _admit(self, request: gr.Request, pictures: int) -> None:
        """Count pictures on the rate of who asks: the key's, else the address's."""
        if self.studio.rate is not None:
            wait = self.studio.rate.take(asker(request), pictures)
            if wait:
                raise gr.Error(self.studio.rate.message(wait, pictures), print_exception=False)

    def _steps(self, draw: Callable, request: gr.Request) -> Iterator[Any]:
        """The steps, then the answer, None once cancelled."""
        with mistakes():
            yield (yield from self.studio.stream(request.session_hash, draw, getattr(request, "username", None)))

    def _draw(
        self, draw: Callable, facts: list[dict], request: gr.Request, clear: bool = False, files: list | None = None
    ) -> Iterator[tuple]:
        """What the gallery, the status, the cancel button and the history show, step by step; `files` gets the files."""
        self._admit(request, len(facts))
        images = None
        try:
            for step in self._steps(draw, request):
                if isinstance(step, Step):
                    early = step.pictures if self.studio.content_filter is None else None  # only what it has seen is shown
                    yield early or gr.skip(), status(str(step), step), gr.Button(interactive=True), gr.skip()
                else:
                    images = step
            self._check_content(*images or ())
        except Exception as error:
            refused = isinstance(error, gr.Error)
            if refused and images is None and self.studio.rate is not None:
                self.studio.rate.give_back(asker(request), len(facts))
            say = error.message if refused else "That failed; the log says more."
            yield gr.skip(), status(say), gr.Button(interactive=False), gr.skip()
            raise
        if images is None:
            if not self.studio.draws(request.session_hash):  # else something newer took its place, and tells of itself
                yield gr.skip(), status("Cancelled."), gr.Button(interactive=False), gr.skip()
            return
        saved = [self._save(cut_out(i) if clear else i, f) for i, f in zip(images, facts, strict=True)]
        if files is not None:
            files += saved
        shown = [(path, caption(f)) for path, f in zip(saved, facts, strict=True)]
        history = self.histories.add(request.session_hash, shown)
        what = "The picture is" if len(shown) == 1 else f"{len(shown)} pictures are"
        yield shown, status(f"{what} done."), gr.Button(interactive=False), history

    def _save(self, image: Image.Image, facts: dict[str, str]) -> str:
        """A PNG with its facts, in a folder of its own among Gradio's files, whose name cannot be guessed."""
        folder = Path(os.environ["GRADIO_TEMP_DIR"]) / secrets.token_hex(16)
        folder.mkdir(parents=True)
        file = folder / "picture.png"
        image.save(file, pnginfo=png_facts(facts | {"model": self.studio.model}))
        return str(file)

    def _text(self, name: str, text: Any, empty: bool = False) -> str:
        if not isinstance(text, str | None) or len(text or "") > MAX_PROMPT:
            raise gr.Error(f"The {name} has more than {MAX_PROMPT} characters.", print_exception=False)
        text = (text or "").strip()
        if not text and not empty:
            raise gr.Error(f"The {name} is empty.", print_exception=False)
        self._check_content(text)
        return text

    def _size(self, size: Any) -> int:
        if isinstance(size, bool) or size not in self.studio.pipe.sizes:
            sizes = ", ".join(map(str, self.studio.pipe.sizes))
            raise gr.Error(f"The size must be one of {sizes} pixels, got {size!r}.", print_exception=False)
        return int(size)

    def _picture(self, name: str, file: str | None) -> Image.Image:
        data = upload_bytes(name, file)
        with mistakes():
            picture = on_white(open_upload(data, name))
        self._check_content(picture)
        return picture

    def _check_content(self, *contents: str | Image.Image) -> None:
        for content in contents:
            reason = self.studio.content_filter and self.studio.content_filter(content)
            if reason:
                raise gr.Error(str(reason), print_exception=False)


# Fields that a PNG restores: fact, and what it is.
RESTORED: dict[str, Callable[[str], Any]] = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "size": int,
    "guidance": float,
    "steps": int,
    "sampler": str,
    "transparent": "yes".__eq__,
}
BOUNDS = {"seed": (0, MAX_SEED), "guidance": (1, 20), "steps": (1, 100)}


def restored(facts: dict[str, str], name: str, kind: Callable[[str], Any]) -> Any:
    """A field's value from a picture's facts; None where there is none that the field could hold."""
    try:
        value = kind(facts[name])
    except (KeyError, ValueError):
        return None
    low, high = BOUNDS.get(name, (None, None))
    fits = len(value) <= MAX_PROMPT if isinstance(value, str) else low is None or low <= value <= high
    return value if fits else None


def came_back(facts: dict[str, str], back: list[str], model: str) -> str:
    """Which settings of a picture were restored, of which its file says nothing, and which this page cannot set."""
    silent = [name for name in RESTORED if name not in facts]
    given = {n: v for n, v in facts.items() if n not in back and n != "version" and (n, v) != ("model", model)}
    beyond = [f"{spoken(name)} {v if len(v) <= 40 else v[:40] + '…'!r}" for name, v in given.items()]
    if back and not silent and not beyond:
        return "The settings of that picture are restored."
    say = f"Restored: {', '.join(map(spoken, back))}." if back else "No setting is restored."
    say += f" Left as they were, for the file does not say them: {', '.join(map(spoken, silent))}." if silent else ""
    return say + (f" Not to be set on this page: {', '.join(beyond)}." if beyond else "")


def spoken(name: str) -> str:
    return name.replace("_", " ")


def to_repaint(
    picture: Image.Image, layers: list[Image.Image], rectangle: list[float], margins: list[float]
) -> tuple[Image.Image, Image.Image]:
    """Picture and mask (white is drawn anew) of what was painted over, of a rectangle and of new space, in percent.

    Raises ValueError where nothing is to be drawn anew.
    """
    mask = Image.new("L", picture.size, 0)
    for layer in layers:
        painted = layer.convert("RGBA").getchannel("A").resize(picture.size)
        mask = ImageChops.lighter(mask, painted.point(lambda a: 255 if a > 16 else 0))
    left, top, width, height = rectangle
    if width and height:
        box = [left * picture.width, top * picture.height, (left + width) * picture.width, (top + height) * picture.height]
        mask.paste(255, tuple(round(min(b / 100, side)) for b, side in zip(box, picture.size * 2, strict=True)))
    if any(margins):
        sides = (picture.width, picture.width, picture.height, picture.height)
        new = [math.ceil(m * side / 100) for m, side in zip(margins, sides, strict=True)]
        picture, beyond = with_margins(picture, *new)
        inside = Image.new("L", picture.size, 0)
        inside.paste(mask, (new[0], new[2]))
        mask = ImageChops.lighter(beyond, inside)
    if not np.array(mask).any():
        raise ValueError("paint over what is to be drawn anew, or give a rectangle or new space as numbers")
    return picture, mask


def upload_bytes(name: str, file: Any) -> bytes:
    """An uploaded file's content; that there is none is told on the page."""
    if not isinstance(file, str) or not file:
        raise gr.Error(f"Give {name} first.", print_exception=False)
    try:
        return Path(file).read_bytes()
    except (OSError, ValueError):
        raise gr.Error(f"{name} is here no more: upload it again.".capitalize(), print_exception=False) from None


def asker(request: gr.Request) -> str:
    return request.username or request.client.host


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number in bounds; a mistake is told on the page."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or not low <= value <= high or value % 1:
        raise gr.Error(f"The {name} must be a whole number from {low} to {high}, got {value!r}.", print_exception=False)
    return int(value)


def between(name: str, value: Any, low: float, high: float) -> float:
    """A number in bounds; a mistake is told on the page."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise gr.Error(f"The {name} must be a number from {low} to {high}, got {value!r}.", print_exception=False)
    return value


@contextmanager
def mistakes() -> Iterator[None]:
    """A user's mistake becomes one line on the page."""
    try:
        yield
    except (ValueError, Busy) as error:
        raise gr.Error(str(error), print_exception=False) from None


def status(text: str, step: Step | None = None) -> str:
    """The line that says what is going on, for screen readers too, and how far it is."""
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
