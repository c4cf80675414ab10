"""The page's layout: tabs with the inputs on the left, images on the right."""

import random
from pathlib import Path
from typing import Any

import gradio as gr
from gradio_client.utils import traverse

from ..clip.search import Index
from ..pipelines.samplers import SAMPLERS
from .generation import OWN, Studio
from .handlers import Handlers
from .session import status
from .validation import MAX_BLEND_IMAGES, MAX_IMAGES, MAX_PROMPT, MAX_SEED, RESTORED, check_uploaded

FILE_SECONDS = 3600  # that Gradio keeps an image's file
SESSIONS = 16  # whose calls are in the worker's queue; others wait in Gradio's
# On a phone, where the images are below the inputs, scroll to them.
SCROLL_TO_IMAGES = "() => document.getElementById('pictures').scrollIntoView({block: 'nearest', behavior: 'smooth'})"
# A random session id, which the browser keeps for one tab, through reloads.
SESSION = """() => {
    try {
        const bytes = crypto.getRandomValues(new Uint8Array(16));
        return [sessionStorage.unclip ??= Array.from(bytes, n => n.toString(16).padStart(2, "0")).join("")];
    } catch { return [""]; }  // without storage the history ends with the page
}"""
SYSTEM_FONT = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
EXAMPLES = ["a red apple", "a rocket", "two yellow stars", "a cat with a crown", "a blue fish next to a green leaf"]

ICON = (
    "%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Crect width='16' height='16' rx='4' fill='%234338ca'/%3E"
    "%3Ccircle cx='8' cy='8' r='4' fill='%23fff'/%3E%3C/svg%3E"
)
HEAD = f"""<meta name="description" content="Draw images of sentences on this machine.">
<link rel="icon" href="data:image/svg+xml,{ICON}">
<script>document.documentElement.lang = "en";</script>"""
CSS = Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def theme() -> gr.themes.Base:
    """Gradio's default theme with system fonts and a button dark enough for white text."""
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


class StudioBlocks(gr.Blocks):
    """Blocks that accept uploaded files only.

    Gradio would fetch any URL that a client sends in a field, and would accept any path on this machine as an image if the
    file's metadata is missing.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        traverse(inputs, check_uploaded, lambda value: isinstance(value, dict) and "path" in value)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def build(studio: Studio, index: Index | None = None) -> gr.Blocks:
    """The page for a studio; `index` is of the folder of the Search tab."""
    return Page(studio, index).blocks


class Page:
    """The components, and the events that connect them with the handlers."""

    def __init__(self, studio: Studio, index: Index | None = None):
        self.studio, self.index, self.handlers = studio, index, Handlers(studio, index)
        with StudioBlocks(
            title="unCLIP studio", delete_cache=(300, FILE_SECONDS), analytics_enabled=False, fill_width=True
        ) as self.blocks:
            gr.Markdown("# unCLIP studio\nA sentence in, an image out. Nothing leaves this machine.", elem_id="title")
            with gr.Row(elem_id="now"):
                self.status = gr.HTML(status("Ready."), elem_id="status", min_height=0, padding=False)
                self.cancel = gr.Button("Cancel", size="sm", elem_id="cancel", interactive=False, scale=0, min_width=100)
            with gr.Row():
                with gr.Column(min_width=300), gr.Tabs(elem_id="tabs") as self.tabs:
                    self._tabs()
                with gr.Column(min_width=300):
                    self._results()
            self._connect_events()
        self.blocks.queue(max_size=32, api_open=False)

    def _tabs(self) -> None:
        self._create_tab()
        self._variations_tab()
        self._blend_tab()
        self._edit_tab()
        self._inpaint_tab()
        if self.index is not None:
            self._search_tab()
        self._explore_tab()

    def _sizes(self, value: int | None = None) -> gr.Radio:
        """A choice of the model's sizes, the largest unless `value` says otherwise."""
        sizes = self.studio.pipe.sizes
        return gr.Radio(sizes, value=value or sizes[-1], label="Size in pixels")

    def _create_tab(self) -> None:
        with gr.Tab("Create", id="create"):
            self.prompt = gr.Textbox(
                label="Prompt", placeholder="a red apple", lines=2, max_length=MAX_PROMPT, elem_id="prompt"
            )
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw")
            gr.Examples([[e] for e in EXAMPLES], [self.prompt], label="Examples", cache_examples=False)
            self.number = gr.Slider(1, MAX_IMAGES, 1, step=1, label="Number of images")
            self.size = self._sizes()
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
                    label="Restore the settings of an image: drop its PNG here",
                    file_types=[".png"],
                    height=150,
                    elem_id="restore",
                )

    def _variations_tab(self) -> None:
        with gr.Tab("Variations", id="variations"):
            self.varied = self._upload("Image to vary", "varied")
            self.vary_number = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Number of variations")
            self.keep_layout = gr.Slider(0, 1, 1, step=0.05, label="How far to go: 0 keeps the image's layout, 1 draws it anew")
            self.vary_size = self._sizes()
            self.vary = gr.Button("Vary", variant="primary", elem_id="vary")

    def _blend_tab(self) -> None:
        with gr.Tab("Blend", id="blend"):
            instead: dict[str, Any] = {"placeholder": "or a sentence", "max_length": MAX_PROMPT}
            with gr.Row():
                with gr.Column(min_width=140):
                    self.first = self._upload("First image", "first")
                    self.first_text = gr.Textbox(label="First prompt", **instead, elem_id="first-text")
                with gr.Column(min_width=140):
                    self.second = self._upload("Second image", "second")
                    self.second_text = gr.Textbox(label="Second prompt", **instead, elem_id="second-text")
            self.blend_steps = gr.Slider(2, MAX_BLEND_IMAGES, 6, step=1, label="Images on the way")
            self.blend_size = self._sizes(self.studio.pipe.sizes[:2][-1])
            self.blend = gr.Button("Blend", variant="primary", elem_id="blend")
            self.path = gr.State([])
            with gr.Group(visible=False) as self.player:
                self.frame = gr.Image(label="On the way", interactive=False, buttons=[], elem_id="frame")
                self.place = gr.Slider(1, 2, 1, step=1, label="Place on the way", elem_id="place")
                self.play = gr.Button("Play", elem_id="play")
            self.playing = gr.State(False)
            self.timer = gr.Timer(0.4, active=False)

    def _edit_tab(self) -> None:
        with gr.Tab("Edit", id="edit"):
            self.edited = self._upload("Image to change", "edited")
            self.source = gr.Textbox(label="From: what it is", placeholder="a cat", max_length=MAX_PROMPT)
            self.target = gr.Textbox(label="To: what it should become", placeholder="a black cat", max_length=MAX_PROMPT)
            self.strength = gr.Slider(0, 1, 0.35, step=0.05, label="How far to go")
            self.edit_size = self._sizes()
            self.edit = gr.Button("Change", variant="primary", elem_id="change")

    def _inpaint_tab(self) -> None:
        with gr.Tab("Inpaint", id="inpaint"):
            gr.Markdown("Paint over what is to be drawn anew.")
            self.editor = gr.ImageEditor(
                label="Image",
                sources=["upload", "clipboard"],
                layers=False,
                transforms=(),
                brush=gr.Brush(colors=["#ffffff"], color_mode="fixed", default_size=24),
                buttons=[],
                elem_id="editor",
                height=420,
            )
            self.paint_prompt = gr.Textbox(
                label="What the whole image should show", max_length=MAX_PROMPT, elem_id="paint-prompt"
            )
            with gr.Accordion("The place as numbers, and beyond the edges", open=False):
                gr.Markdown("A rectangle to draw anew, in percent of the image; width or height 0 is none.")
                names = ("Left", "Top", "Width", "Height")
                with gr.Row():
                    self.rectangle = [gr.Number(0, label=name, minimum=0, maximum=100, min_width=70) for name in names]
                gr.Markdown("New space around the image, in percent of its sides.")
                names = ("Left side", "Right side", "Top side", "Bottom side")
                with gr.Row():
                    self.margins = [gr.Number(0, label=name, minimum=0, maximum=100, min_width=70) for name in names]
            self.paint_size = self._sizes()
            self.paint = gr.Button("Draw anew", variant="primary", elem_id="paint")

    def _search_tab(self) -> None:
        with gr.Tab("Search", id="search"):
            self.query = gr.Textbox(label="What to find", max_length=MAX_PROMPT, elem_id="query")
            self.query_image = self._upload("or an image like it", "query-image")
            self.find = gr.Button("Find", variant="primary", elem_id="find")

    def _explore_tab(self) -> None:
        with gr.Tab("Explore", id="explore"):
            *smaller, largest = sizes = self.studio.pipe.sizes
            way = f"the nearest one's way to {largest} px"
            gr.Markdown(f"How an image forms: the embeddings that the prior samples, and {way}.")
            self.explored = gr.Textbox(label="Prompt", max_length=MAX_PROMPT, elem_id="explored")
            self.explore = gr.Button("Explore", variant="primary", elem_id="explore-button")
            kwargs: dict[str, Any] = {
                "interactive": False,
                "object_fit": "contain",
                "buttons": [],
                "show_label": False,
                "height": "auto",
            }
            kwargs["elem_classes"] = "strip"
            with gr.Column(visible=False) as self.exploration:
                say = "Candidates, each drawn at 64 px: the nearest to the prompt first, with its cosine to it"
                gr.Markdown(say)
                self.candidates = gr.Gallery(label=say, columns=4, **kwargs)
                say = "The 64 px image as it forms: what each step expects of it"
                gr.Markdown(say)
                self.trajectory = gr.Gallery(label=say, columns=6, **kwargs)
                say = " and ".join(filter(None, [", ".join(map(str, smaller)), f"{largest} px"]))
                gr.Markdown(say)
                self.stages = gr.Gallery(label=say, columns=len(sizes), **kwargs)

    def _upload(self, label: str, name: str) -> gr.Image:
        return gr.Image(label=label, sources=["upload", "clipboard"], height=220, buttons=[], elem_id=name)

    def _results(self) -> None:
        self.images = gr.Gallery(
            label="Images",
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
        self.session = gr.Textbox(visible=False)  # the result of `SESSION`
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

    def _connect_events(self) -> None:
        model: dict[str, Any] = {"concurrency_limit": SESSIONS, "concurrency_id": "model"}  # the worker runs them one by one
        model |= {"api_visibility": "private", "show_progress": "hidden"}
        uploads = model | {"preprocess": False}  # handlers open files themselves, with limits and error messages
        quick: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        shown = [self.images, self.status, self.cancel, self.history]
        inputs: list[Any]
        inputs = [self.prompt, self.negative, self.number, self.seed, self.lock, self.size, self.guidance, self.steps]
        inputs += [self.sampler, self.transparent]
        gr.on([self.draw.click, self.prompt.submit], self.handlers.on_draw, inputs, [*shown, self.seed], **model)
        inputs = [self.varied, self.vary_number, self.keep_layout, self.vary_size]
        self.vary.click(self.handlers.on_vary, inputs, shown, **uploads)
        inputs = [self.first, self.first_text, self.second, self.second_text, self.blend_steps, self.blend_size]
        self.blend.click(self.handlers.on_blend, inputs, [*shown, self.path, self.player, self.place, self.frame], **uploads)
        inputs = [self.edited, self.source, self.target, self.strength, self.edit_size]
        self.edit.click(self.handlers.on_edit, inputs, shown, **uploads)
        inputs = [self.editor, self.paint_prompt, *self.rectangle, *self.margins, self.paint_size]
        self.paint.click(self.handlers.on_paint, inputs, shown, **uploads)
        outputs = [*shown, self.exploration, self.candidates, self.trajectory, self.stages]
        gr.on([self.explore.click, self.explored.submit], self.handlers.on_explore, [self.explored], outputs, **model)
        if self.index is not None:
            inputs = [self.query, self.query_image]
            gr.on([self.find.click, self.query.submit], self.handlers.on_find, inputs, [self.images, self.status], **uploads)

        self.cancel.click(self.handlers.on_cancel, None, [self.status, self.cancel], **quick)
        self.blocks.load(self.handlers.on_open, [self.session], self.history, js=SESSION, **quick)
        self.blocks.unload(self.handlers.on_leave)
        self.shuffle.click(lambda: random.randrange(MAX_SEED), None, self.seed, **quick)
        self.restore.upload(self.handlers.on_restore, [self.restore], [*self._restorable(), self.status, self.lock], **quick)
        self.images.select(self.handlers.on_select, None, self.chosen, **quick)
        self.images.preview_close(lambda: 0, None, self.chosen, **quick)
        self.history.select(self.handlers.on_recall, [self.history], [self.images, self.chosen], **quick)
        for button in (self.draw, self.vary, self.blend, self.edit, self.paint, self.explore):
            button.click(None, js=SCROLL_TO_IMAGES)
        self.place.change(self.handlers.on_place, [self.path, self.place], self.frame, **quick)
        self.play.click(self.handlers.on_play, [self.playing], [self.playing, self.timer, self.play], **quick)
        self.timer.tick(self.handlers.on_tick, [self.path, self.place], self.place, **quick)
        for tab, button in self.send.items():
            target = {"variations": self.varied, "blend": self.first, "edit": self.edited, "inpaint": self.editor}[tab]
            button.click(self.handlers.sender(tab), [self.images, self.chosen], [target, self.tabs], **quick)

    def _restorable(self) -> list:
        fields = {"prompt": self.prompt, "negative_prompt": self.negative, "seed": self.seed, "size": self.size}
        fields |= {"guidance": self.guidance, "steps": self.steps, "sampler": self.sampler, "transparent": self.transparent}
        return [fields[name] for name in RESTORED]
