"""Inpainting of a rectangle of real renders from the name."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...pipelines import UnCLIPInpaintPipeline
from .. import prompts as prompt_sets
from ..context import EvaluationContext
from ..metrics import mean, ratio
from ..report import Part, Sheet, Table

REPAINTED = 100


def measure(context: EvaluationContext) -> Part:
    """Real renders whose lower right is inpainted from the name (DALL·E 1, arXiv 2102.12092): are they recognised?

    The rectangle goes from a quarter of each side to the lower right corner: 9/16 of the image. The floor is the render
    with the rectangle left white.
    """
    prompts = context.limited(prompt_sets.recognition(context.icons, context.split), REPAINTED)
    real, size = context.real_renders(prompts), context.pipe.sizes[0]
    hole = torch.zeros(real.shape[-2:], dtype=torch.bool)
    hole[real.shape[-2] // 4 :, real.shape[-1] // 4 :] = True
    mask = Image.fromarray(hole.byte().mul(255).numpy())
    tool: Any = UnCLIPInpaintPipeline.from_pipe(context.pipe)
    tool.set_progress_bar_config(disable=True)
    settings = {k: v for k, v in context.settings.items() if k != "sampler"}  # inpainting has its own

    def batch(chunk: Sequence[int], generators: list[torch.Generator]) -> Tensor:
        (n,) = chunk  # one at a time
        image = Image.fromarray(real[n].permute(1, 2, 0).numpy())
        return tool(prompts[n].text, image, mask, generator=generators, size=size, output_type="pt", **settings).images

    drawn = context.sample_or_load("rectangle", [p.text for p in prompts], batch, batch=1)
    white = real.masked_fill(hole, 255)
    ours, floor, theirs = (context.name_recall(images, prompts) for images in (drawn, white, real))
    results: dict[str, Any] = {
        among: {
            "right": mean(ours[n]),
            "floor": mean(floor[n]),
            "real": mean(theirs[n]),
            "share_of_real": ratio(ours[n], theirs[n]),
        }
        for n, among in enumerate(("first", "first five"))
    }
    results["first"]["chance"] = context.correct_names([prompt.right for prompt in prompts]).float().mean().item()
    sides = {"right": "drawn anew", "floor": "left white (floor)", "real": "real renders"}
    rows = [[name, results["first"][side], results["first five"][side]] for side, name in sides.items()]
    if drawn.shape == real.shape:
        results["kept_exactly"] = mean((drawn == real).masked_fill(hole, True).flatten(1).all(1).float())
        rows.append(["kept to the pixel outside it", results["kept_exactly"], ""])
    results |= {"prompts": [p.text for p in prompts], "pictures": [f"rectangle/{n:05d}.png" for n in range(len(prompts))]}
    pairs = torch.stack([F.interpolate(white[:12].float(), drawn.shape[-2:]).byte(), drawn[:12]], 1).flatten(0, 1)
    captions = [text for p in prompts[:12] for text in ("given", p.text)]
    marks = [mark for hit in ours[0][:12].bool().tolist() for mark in (None, hit)]
    note = f"The lower right 9/16 of real renders drawn anew from the name. Among {len(context.icons.recognisable)} names."
    table = Table("A rectangle drawn anew", ["", "R@1", "R@5"], rows, note, True)
    return Part("rectangle", results, [table, Sheet("The first 12", pairs, captions, marks)])
