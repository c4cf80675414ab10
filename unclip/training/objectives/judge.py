"""Training the evaluation's judge: contrastive, against captions that are wrong in one fact and against all names."""

# B images, T texts, D embedding dimension

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from ... import networks
from ...clip.judge import Judge, JudgeImageTower, JudgeTextTower, word_tokenizer
from ...clip.towers import Tower
from ...data.distort import DISTORTIONS
from ...data.icon_packages import STYLES
from ...data.judged import FACTS, JudgedScenes, compare, distorted_icons, icon_rows
from ...data.render import BACKGROUNDS, COLOURS
from ...data.scenes import NUMBERS, RELATIONS, IconSet, Plan, style_phrase, wordings
from ...io.pixels import normalize
from ...runtime.config import ConfigError, construct
from .base import Objective, to_device
from .contrastive import MAX_LOGIT_SCALE, image_processor, jitter
from .random_columns import COLUMNS

VALIDATION_IMAGES = 640


def vocabulary(icons: IconSet) -> Iterator[str]:
    """Texts that hold every word a judge of these icons is asked about."""
    for concept in icons.recognisable:
        yield from wordings(Plan("single", (concept,), ""))
        yield from wordings(Plan("count", (concept,), "", count=2))
    first = icons.recognisable[0]
    yield from (style_phrase(s) for s in STYLES)
    yield from (t for c in COLOURS for t in wordings(Plan("colour", (first,), "", colour=c)))
    yield from (t for n in NUMBERS for t in wordings(Plan("count", (first,), "", count=n)))
    yield from (t for r in RELATIONS for t in wordings(Plan("relation", (first, first), "", relation=r)))
    yield from (t for b in BACKGROUNDS for t in wordings(Plan("background", (first,), "", background=b)))
    yield from wordings(Plan("pair", (first, first), ""))
    yield "in an"


def icons_path(data: dict | None) -> str:
    """Where a judge's icons are. Raises ConfigError where its section does not say."""
    if not data or not data.get("path"):
        raise ConfigError("data.path is missing: a dataset built by `unclip data emoji`, or shapes")
    return str(data["path"])


class JudgeObjective(Objective):
    """Both towers of the judge, from nothing, under the symmetric contrastive loss.

    An image's candidates are the batch's captions, the wrong ones beside each, and the names alone of `names` concepts,
    sampled at every step: an image that is distinguished from its batch is not yet distinguished from 1,600 concepts. Texts
    that are true of an image without saying all of it ("a cat" of two cats) count neither way.
    """

    vocabulary_of_data = True

    def __init__(self, model: dict, data: dict, seed: int, names: int = 320, temperature: float = 0.07, augment: float = 1.0):
        super().__init__()
        icons_path(data)
        self.examples = self.load_examples(data, "train", seed)
        self.names, self.augment, self.seed = names, augment, seed
        icons = self.examples.icons
        section, of_image = networks.towers(model)
        image = construct(JudgeImageTower, of_image, "model.image")
        length = section.get("context_length", 24)
        self.tokenizer = word_tokenizer(vocabulary(icons), length)
        text = construct(JudgeTextTower, section, "model.text", vocab_size=len(self.tokenizer))
        self.feature_extractor = image_processor(image.config.image_size)
        self.trained = nn.ModuleDict({"text_encoder": text, "image_encoder": image})
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.log_scale = nn.Parameter(torch.tensor([1 / temperature]).log())
        self.trained.register_parameter("log_scale", self.log_scale)
        plans = [Plan("single", (c,), "") for c in icons.recognisable]
        self._name_facts = torch.tensor([self.examples.facts(p, None) for p in plans])

    def load_examples(self, data: dict[str, Any], split: str, seed: int = 0) -> JudgedScenes:
        return construct(JudgedScenes, data, "data", seed=seed)

    @property
    def judge(self) -> Judge:
        text, image = (cast(Tower, self.trained[name]) for name in ("text_encoder", "image_encoder"))
        return Judge(text, self.tokenizer, image, self.feature_extractor)

    def to_tensors(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        device, (texts, names) = batch["image"].device, self._texts(batch)
        tokens = self.judge.tokenize(texts, padding="max_length" if self.fixes_lengths else True)
        tensors = {"tokens": tokens.input_ids, "mask": tokens.attention_mask, "name_facts": self._name_facts[names]}
        return {name: v for name, v in batch.items() if isinstance(v, Tensor)} | to_device(tensors, device)

    def compute_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        image_tower, text_tower = self.trained["image_encoder"], self.trained["text_encoder"]
        pixels = jitter(normalize(batch["image"]), batch["random"], self.augment)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        of_texts = torch.cat([batch["facts"].flatten(0, 1), batch["name_facts"]])  # [T, FACTS]
        images = image_tower(pixels).image_embeds.float()  # [B, D]
        words = text_tower(batch["tokens"], batch["mask"]).text_embeds.float()  # [T, D]
        of_images = torch.cat([batch["facts"][:, 0, :1], batch["style"][:, None], batch["facts"][:, 0, 2:]], 1)  # [B, FACTS]
        true, vague = compare(of_images, of_texts)  # each [B, T]
        logits = self.log_scale.exp().clamp(max=MAX_LOGIT_SCALE) * images @ words.T
        logits = logits.masked_fill(vague, -1e4)
        image_loss = F.cross_entropy(logits, true.float() / true.sum(1, keepdim=True))
        own = torch.arange(len(pixels), device=pixels.device) * batch["facts"].shape[1]  # the true captions' columns
        text_loss = F.cross_entropy(logits.T[own], true.T[own].float() / true.T[own].sum(1, keepdim=True))
        best = true.gather(1, logits.argmax(1, keepdim=True)).float().mean()
        return (image_loss + text_loss) / 2, {"accuracy": best, "scale": self.log_scale.exp()[0]}

    def dummy_batch(self, size: int) -> dict[str, Tensor]:
        text: Any = self.trained["text_encoder"]
        image: Any = self.trained["image_encoder"]
        captions, side, names = 1 + self.examples.wrong, image.config.image_size, min(self.names, len(self._name_facts))
        texts, tokens = size * captions + names, text.config.context_length
        return {
            "index": torch.arange(size),
            "image": torch.zeros(size, 3, side, side, dtype=torch.uint8),
            "random": torch.full((size, COLUMNS), 0.5),
            "style": torch.zeros(size, dtype=torch.long),
            "facts": torch.zeros(size, captions, FACTS, dtype=torch.long),
            "name_facts": torch.zeros(names, FACTS, dtype=torch.long),
            "tokens": torch.zeros(texts, tokens, dtype=torch.long),
            "mask": torch.ones(texts, tokens, dtype=torch.long),
        }

    def _texts(self, batch: dict[str, Any]) -> tuple[list[str], Tensor]:
        """All candidate texts [T] of a batch, and the numbers of the names that they end in."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(batch["index"][0]))
        names = torch.randperm(len(self._name_facts), generator=generator)[: self.names]
        texts = [line for lines in batch["captions"] for line in lines.split("\n")]
        texts += [self.examples.icons.recognisable[n] for n in names.tolist()]
        return texts, names

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """R@1 of renders among all names, clean and damaged; and how often a caption beats those wrong in one fact."""
        judge, icons = self.judge, self.examples.icons
        rows, names = icon_rows(icons, VALIDATION_IMAGES, seed=0), judge.read(icons.recognisable)
        found = {}
        for kind in ("clean", *DISTORTIONS):
            images = distorted_icons(icons, rows, None if kind == "clean" else kind, seed=0)
            scores = judge.see(images)[0] @ names.T
            wanted = torch.tensor([icons.recognisable.index(icons.icons[row]["concept"]) for row in rows])
            found[f"{kind.replace(' ', '_')}_r1"] = (scores.argmax(1) == wanted).float().mean().item()
        unseen = default_collate([self.examples[10**9 + n] for n in range(VALIDATION_IMAGES // 4)])
        captions = [line for lines in unseen["captions"] for line in lines.split("\n")]
        words = judge.read(captions).unflatten(0, (len(unseen["captions"]), -1))  # [B, 1 + K, D]
        scores = (words * judge.see(unseen["image"])[0][:, None]).sum(-1)
        return found | {"contrasts": (scores.argmax(1) == 0).float().mean().item()}

    def components(self) -> dict[str, Any]:
        judge = self.judge
        judge.stamp()
        return judge.components
