"""Draws the diagrams of the documentation as SVG: python docs/figures.py writes docs/figures/*.svg."""

from dataclasses import dataclass
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent / "figures"
LINE = 18  # pixels from a line of text to the next
KINDS = {"data": ("#ffffff", "#607d8b"), "network": ("#e3f2fd", "#1565c0"), "step": ("#fff3e0", "#ef6c00")}  # fill, border


@dataclass
class Box:
    """A box with text: its centre and size in pixels, and a kind of `KINDS`."""

    text: str
    x: int
    y: int
    kind: str = "data"
    width: int = 150
    height: int = 50

    def svg(self) -> str:
        fill, border = KINDS[self.kind]
        left, top = self.x - self.width // 2, self.y - self.height // 2
        corners = 8 if self.kind != "data" else 2
        place = f'x="{left}" y="{top}" width="{self.width}" height="{self.height}" rx="{corners}"'
        shape = f'<rect {place} fill="{fill}" stroke="{border}"/>'
        lines = self.text.split("\n")
        first = self.y + 5 - LINE * (len(lines) - 1) // 2
        return shape + "".join(
            f'<text x="{self.x}" y="{first + n * LINE}" text-anchor="middle">{escape(line)}</text>'
            for n, line in enumerate(lines)
        )


def arrow(start: Box, end: Box) -> str:
    """An arrow between two boxes: from top to bottom if one is wholly above the other, else from side to side."""
    if abs(end.y - start.y) <= (start.height + end.height) // 2:
        sign = 1 if end.x > start.x else -1
        points = start.x + sign * start.width // 2, start.y, end.x - sign * (end.width // 2 + 4), end.y
    else:
        sign = 1 if end.y > start.y else -1
        points = start.x, start.y + sign * start.height // 2, end.x, end.y - sign * (end.height // 2 + 4)
    return '<line x1="{}" y1="{}" x2="{}" y2="{}" stroke="#455a64" stroke-width="1.5" marker-end="url(#head)"/>'.format(*points)


def figure(width: int, height: int, title: str, boxes: dict[str, Box], arrows: str) -> str:
    """An SVG of `boxes` with `arrows` "a>b b>c" between their names."""
    lines = [arrow(*(boxes[name] for name in pair.split(">"))) for pair in arrows.split()]
    head = '<marker id="head" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    head += '<path d="M0 0L8 4L0 8z" fill="#455a64"/></marker>'
    body = "\n".join([*lines, *(box.svg() for box in boxes.values())])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="13" role="img" aria-label="{escape(title)}">\n'
        f'<rect width="{width}" height="{height}" fill="#fafafa"/>\n<defs>{head}</defs>\n{body}\n</svg>\n'
    )


def cascade() -> str:
    names = ["prompt", "text encoder\nof CLIP", "text embedding,\ntoken encodings", "prior", "image embedding"]
    below = ["decoder", "64 x 64", "upsampler", "256 x 256", "upsampler", "1024 x 1024"]
    kinds = ["data", "network", "data", "network", "data"]
    boxes = {f"a{n}": Box(t, 85 + 175 * n, 50, k, 140) for n, (t, k) in enumerate(zip(names, kinds, strict=True))}
    boxes |= {f"b{n}": Box(t, 785 - 142 * n, 160, "data" if n % 2 else "network", 112) for n, t in enumerate(below)}
    return figure(
        870, 210, "From a prompt to an image", boxes, "a0>a1 a1>a2 a2>a3 a3>a4 a4>b0 a2>b0 b0>b1 b1>b2 b2>b3 b3>b4 b4>b5"
    )


def clip() -> str:
    boxes = {
        "text": Box("caption", 90, 50),
        "image": Box("image", 90, 150),
        "reads": Box("text encoder", 290, 50, "network"),
        "sees": Box("image encoder", 290, 150, "network"),
        "t": Box("text embedding", 490, 50),
        "i": Box("image embedding", 490, 150),
        "cosine": Box("cosine: high if\nthey belong together", 700, 100, "step", 170),
    }
    return figure(800, 200, "CLIP", boxes, "text>reads image>sees reads>t sees>i t>cosine i>cosine")


def diffusion() -> str:
    boxes = {
        "noise": Box("noise", 70, 60, width=110),
        "network": Box("network predicts the\nsample without noise", 270, 60, "network", 190),
        "guide": Box("guidance: away from\nthe prediction without\na condition", 500, 60, "step", 180, 70),
        "step": Box("scheduler: a little\nless noise", 715, 60, "step", 150),
        "sample": Box("sample, after\nthe last step", 900, 60, width=120),
        "condition": Box("condition,\ntimestep", 270, 170, width=150),
        "again": Box("the next step", 500, 170, width=150),
    }
    return figure(
        980,
        220,
        "Sampling",
        boxes,
        "noise>network condition>network network>guide guide>step step>sample step>again again>network",
    )


def prior() -> str:
    tokens = ["token\nencodings", "text\nembedding", "timestep", "noised image\nembedding", "learned\nquery"]
    boxes = {f"t{n}": Box(text, 90 + 150 * n, 50, width=120) for n, text in enumerate(tokens)}
    boxes["body"] = Box("Transformer with a causal mask", 390, 140, "network", 720)
    boxes["out"] = Box("predicted image embedding", 690, 225, width=190)
    boxes["clip"] = Box("two candidates; the one nearer\nto the text embedding is kept", 390, 225, "step", 240)
    return figure(800, 270, "The prior", boxes, "t0>body t1>body t2>body t3>body t4>body body>out out>clip")


def conditioning() -> str:
    boxes = {
        "embedding": Box("image embedding", 110, 50),
        "text": Box("token encodings", 110, 150),
        "time": Box("added to the time embedding", 370, 35, "step", 220, 40),
        "tokens": Box("extra tokens", 370, 95, "step", 220, 40),
        "layers": Box("layers for the text", 370, 155, "step", 220, 40),
        "net": Box("decoder: U-Net with\nattention to the tokens", 650, 95, "network", 190, 160),
        "noised": Box("noised image, 64 x 64", 650, 225, width=190),
        "out": Box("prediction", 860, 95, width=110),
    }
    return figure(
        940,
        260,
        "The decoder's conditioning",
        boxes,
        "embedding>time embedding>tokens text>layers time>net tokens>net layers>net noised>net net>out",
    )


def layers() -> str:
    rows = [
        "train.py, app.py, benchmarks, scripts",
        "unclip.cli",
        "unclip.studio",
        "unclip.server",
        "unclip.evaluation   |   unclip.training",
        "unclip.pipelines",
        "unclip.networks",
        "unclip.data",
        "unclip.clip   |   unclip.diffusion",
        "unclip.io",
        "unclip.runtime",
        "upsamplers",
        "decoder",
        "prior",
    ]
    boxes = {f"r{n}": Box(text, 220, 30 + 46 * n, "network" if n > 10 else "data", 380, 30) for n, text in enumerate(rows)}
    return figure(440, 46 * len(rows) + 14, "Layers", boxes, " ".join(f"r{n}>r{n + 1}" for n in range(len(rows) - 1)))


FIGURES = {f.__name__: f for f in (cascade, clip, diffusion, prior, conditioning, layers)}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw())
