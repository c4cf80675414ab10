"""Training the autoregressive prior (paper, section 2.2): cross-entropy on quantised principal components."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import networks
from .conditioned import ClipConditioned, NoiseLevels, check_counts, check_shares, numbers
from .prior import cosines


class AutoregressivePriorObjective(ClipConditioned):
    """The next component given those before it, the dot product and the text, which is dropped for a share of the examples.

    Principal components, their spread and the dot product's quantiles are found in the first `fit_examples`.
    """

    network, held_out, reads_pictures = "prior", 512, False

    def __init__(
        self,
        model: dict,
        data: dict,
        seed: int,
        clip: str,
        drop_text: float = 0.1,
        fit_examples: int = 4096,
        lora: dict | None = None,
    ):
        check_shares(drop_text=drop_text)
        check_counts(fit_examples=fit_examples)
        super().__init__(data, seed, clip, "sample", NoiseLevels(), None, lora)
        self.trained = nn.ModuleDict({"prior": networks.prior_autoregressive(model, self.frozen.dim, self.frozen.fingerprint)})
        self.drop_text, self.fit_examples = drop_text, fit_examples

    @torch.no_grad()
    def prepare(self, device: torch.device | str = "cpu", progress: Callable[[Iterable], Iterable] = iter) -> None:
        """Principal components and quantiles, from the first training examples."""
        first = self._first(self.fit_examples, device, progress)
        found = [(self._image(batch).cpu(), self._text(batch)[0].cpu()) for batch in first]
        self.trained["prior"].fit(*(torch.cat(part) for part in zip(*found, strict=True)))

    def compute_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self._by_component(batch)
        return losses.mean(), _quarters(losses.detach())

    def _by_component(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy [B, K] in nats: of each component, given the true ones before it."""
        prior, image_embeds = self.trained["prior"], self._image(batch)
        dot = prior.dot_tokens(image_embeds, self._text(batch)[0])
        text, encodings, mask = self._text(batch, batch["random"][:, 0] < self.drop_text)
        tokens = prior.quantise(image_embeds)
        logits = prior(tokens[:, :-1], dot, text, encodings, mask)
        return F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out loss, and the cosine of drawn to true embeddings beside that of the text embeddings themselves."""
        batch = self._held_out(self.held_out)
        parts = [{k: v[n : n + 64] for k, v in batch.items()} for n in range(0, self.held_out, 64)]
        losses = torch.cat([self._by_component(part) for part in parts])
        few = parts[0]
        text, encodings, mask = self._text(few)
        both = [torch.cat(pair) for pair in zip(self._empty_text(few), (text, encodings, mask), strict=True)]
        generators = [torch.Generator().manual_seed(self.seed + int(i)) for i in few["index"]]
        drawn = self.trained["prior"].draw(*both, guidance=2.0, generator=generators)
        return {"loss": losses.mean().item()} | numbers(_quarters(losses)) | cosines(drawn, self._image(few), text)

    def components(self) -> dict[str, Any]:
        return dict(self.trained)


def _quarters(losses: Tensor) -> dict[str, Tensor]:
    """Mean loss per quarter of the components: `c0` holds those of the largest variance."""
    return {f"c{n}": part.mean() for n, part in enumerate(losses.tensor_split(4, 1)) if part.numel()}
