"""Training the autoregressive prior (paper, section 2.2): cross-entropy on quantised principal components."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import networks
from .conditioned import ClipConditioned, NoiseLevels, check_counts, check_shares, cosines, to_floats
from .random_columns import DROP_BOTH


class AutoregressivePriorObjective(ClipConditioned):
    """The next component given those before it, the dot product and the text, which is dropped for a share of the examples.

    Principal components, their spread and the dot product's quantiles are found in the first `fit_examples`.
    """

    network, held_out, reads_images = "prior", 512, False

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
        first = self.first_batches(self.fit_examples, device, progress)
        found = [(self.encode_image(batch).cpu(), self.encode_text(batch)[0].cpu()) for batch in first]
        prior: Any = self.trained["prior"]
        prior.fit(*(torch.cat(part) for part in zip(*found, strict=True)))

    def compute_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.component_losses(batch)
        return losses.mean(), _quarters(losses.detach())

    def component_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy [B, K] in nats: of each component, given the true ones before it."""
        prior: Any = self.trained["prior"]
        image_embeds = self.encode_image(batch)
        dot = prior.dot_tokens(image_embeds, self.encode_text(batch)[0])
        text, encodings, mask = self.encode_text(batch, batch["random"][:, DROP_BOTH] < self.drop_text)
        tokens = prior.quantise(image_embeds)
        logits = prior(tokens[:, :-1], dot, text, encodings, mask)
        return F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out loss, and the cosine of sampled to true embeddings beside that of the text embeddings themselves."""
        prior: Any = self.trained["prior"]
        batch = self.held_out_batch(self.held_out)
        parts = [{k: v[n : n + 64] for k, v in batch.items()} for n in range(0, self.held_out, 64)]
        losses = torch.cat([self.component_losses(part) for part in parts])
        few = parts[0]
        text, encodings, mask = self.encode_text(few)
        both = [torch.cat(pair) for pair in zip(self.encode_empty_text(few), (text, encodings, mask), strict=True)]
        generators = [torch.Generator().manual_seed(self.seed + int(i)) for i in few["index"]]
        sampled = prior.draw(*both, guidance=2.0, generator=generators)
        return {"loss": losses.mean().item()} | to_floats(_quarters(losses)) | cosines(sampled, self.encode_image(few), text)

    def components(self) -> dict[str, Any]:
        return dict(self.trained)


def _quarters(losses: Tensor) -> dict[str, Tensor]:
    """Mean loss per quarter of the components: `c0` holds those of the largest variance."""
    return {f"c{n}": part.mean() for n, part in enumerate(losses.tensor_split(4, 1)) if part.numel()}
