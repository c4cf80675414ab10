"""Compare priors by the embeddings that they sample.

    python benchmarks/priors.py MODEL [MODEL ...] [--data data/emoji] [--count 256]

Each model is "emoji" or a folder, with a prior of either kind, over the same CLIP. For held-out scenes it prints the cosine of
the drawn embedding to the true image's; for names of training concepts, how often the right concept's image is the
nearest, or one of the five nearest, of all concepts' images (one each). The text embedding stands beside them.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip import UnCLIPPipeline, UnCLIPPriorPipeline
from unclip.clip.model import CLIP
from unclip.data.examples import EmojiScenes
from unclip.data.scenes import IconSet, split_of_concept, split_of_icon

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--data", default="data/emoji")
    parser.add_argument("--count", type=int, default=256)
    options = parser.parse_args()
    icons, clip = IconSet.load(options.data), CLIP.from_pretrained(options.models[0])
    shown = {c: icon_of(icons, c) for c in icons.recognisable}
    images = image_embeddings(clip, icons.on_white(list(shown.values())))  # [T, D]
    known = [c for c in shown if split_of_concept(c) == "train"]
    names = known[:: max(len(known) // options.count, 1)][: options.count]
    answer = torch.tensor([list(shown).index(name) for name in names])
    held_out = EmojiScenes(options.data, "validation")
    scenes = [held_out[n] for n in range(options.count)]
    captions, true = [s["caption"] for s in scenes], image_embeddings(clip, torch.stack([s["image"] for s in scenes]) / 255)
    print(f"{len(captions)} held-out scenes; {len(names)} names among {len(images)} images")
    text = clip.encode_text(captions).cpu(), clip.encode_text(names).cpu()
    print(report("text embedding", *text, true, images, answer))
    print(f"{'another scene':>40}: cosine {F.cosine_similarity(true.roll(1, 0), true).mean():.3f}")
    for model in options.models:
        pipe = UnCLIPPriorPipeline.from_pipe(UnCLIPPipeline.from_pretrained(model))
        pipe.set_progress_bar_config(disable=True)
        began = time.perf_counter()
        found = drawn(pipe, captions), drawn(pipe, names)
        took = (time.perf_counter() - began) / (len(captions) + len(names))
        line = report(f"{model} ({type(pipe.prior).__name__})", *found, true, images, answer)
        print(f"{line}; {1000 * took:.0f} ms each", flush=True)


def icon_of(icons: IconSet, concept: str) -> int:
    """The row of the icon that stands for a concept: one that was trained on, where there is one."""
    rows = [rows[0] for rows in icons.by_concept[concept].values()]
    return next((r for r in rows if split_of_icon(concept, icons.icons[r]["style"]) == "train"), rows[0])


def image_embeddings(clip: CLIP, images: Tensor) -> Tensor:
    """Unit embeddings [N, D] of images [N, 3, H, W] in [0, 1]."""
    return torch.cat([clip.encode_image(chunk).cpu() for chunk in images.split(BATCH)])


def drawn(pipe: UnCLIPPriorPipeline, texts: list[str]) -> Tensor:
    """Embeddings [N, D] of texts, the n-th from seed n."""
    found = []
    for start in range(0, len(texts), BATCH):
        chunk = texts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(start + n) for n in range(len(chunk))]
        found.append(pipe(chunk, generator=generators).image_embeds.float().cpu())
    return torch.cat(found)


def report(who: str, scenes: Tensor, names: Tensor, true: Tensor, images: Tensor, answer: Tensor) -> str:
    """A line with the mean cosine of scenes, and the recall of names' images."""
    scores = F.normalize(names, dim=-1) @ F.normalize(images, dim=-1).T
    place = (scores > scores.gather(1, answer[:, None])).sum(1)
    first, five = ((place < k).float().mean().item() for k in (1, 5))
    cosine = F.cosine_similarity(scenes, true).mean()
    return f"{who:>40}: cosine {cosine:.3f}; nearest {100 * first:.1f}%, among five {100 * five:.1f}%"


if __name__ == "__main__":
    main()
