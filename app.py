"""A page to draw with: `python app.py`, then open the address that it prints."""

import sys

from unclip import UnCLIPPipeline


def build(pipe: UnCLIPPipeline):
    """The Gradio page over a loaded pipeline."""
    import gradio as gr
    import torch

    def draw(prompt: str, seed: float, size: int, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        try:
            generator = [torch.Generator().manual_seed(int(seed))]
            return pipe(prompt, generator=generator, size=size).images[0]
        except ValueError as error:
            raise gr.Error(str(error)) from None

    with gr.Blocks(title="unCLIP") as page:
        gr.Markdown("# unCLIP\nA sentence in, a picture out.")
        prompt = gr.Textbox(label="Prompt", placeholder="a red apple", max_length=300, autofocus=True)
        with gr.Row():
            seed = gr.Number(label="Seed", value=0, precision=0, minimum=0)
            size = gr.Radio(pipe.sizes, value=pipe.sizes[-1], label="Size")
        button = gr.Button("Draw", variant="primary")
        picture = gr.Image(label="Picture", format="png")
        gr.on([button.click, prompt.submit], draw, [prompt, seed, size], picture, concurrency_limit=1, concurrency_id="model")
    return page.queue(max_size=16)


def main() -> None:
    try:
        import gradio as gr
    except ImportError:
        sys.exit("error: the page needs Gradio; install it with: pip install '.[app]'")
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    build(UnCLIPPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "emoji")).launch(
        server_name="127.0.0.1",
        share=False,
        theme=theme,
        show_error=False,
        max_file_size="10mb",
        allowed_paths=[],
        enable_monitoring=False,
        ssr_mode=False,
        strict_cors=True,
    )


if __name__ == "__main__":
    main()
