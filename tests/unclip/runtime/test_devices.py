"""Every stage on a device that is not the CPU: what is learned from, what is judged by and what is drawn must all be there."""

import math
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT
from pretend_device import DEVICE, Elsewhere, PretendDevice
from running import run_here
from torch.utils.data import default_collate

from unclip.runtime.config import load_config
from unclip.runtime.operations import Operations
from unclip.training.objectives import create
from unclip.training.objectives.base import to_device

STAGES = sorted(path.stem for path in (ROOT / "configs" / "tiny").glob("*.yaml"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return run_here("clip", tmp_path_factory.mktemp("clip"), "max_steps=1", "batch_size=2")


def test_the_pretend_device_refuses_what_a_gpu_would():
    with PretendDevice():
        there = torch.ones(2).to(DEVICE)
        assert isinstance(there + 1, Elsewhere) and (there * 2).tolist() == [2, 2] and (there + 1).sum().item() == 4
        assert torch.equal((there + torch.ones(2).to(DEVICE)).cpu(), torch.full((2,), 2.0))
        with pytest.raises(RuntimeError, match="aten::add: tensors of two devices"):
            there + torch.ones(2)


@pytest.mark.parametrize("stage", ["prior", "prior_autoregressive"])
def test_the_first_examples_are_looked_at_on_the_device(clip, stage, monkeypatch):
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    config = load_config(f"tiny/{stage}", [f"objective.clip={clip}"])
    found, seen = [], []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        objective = create(stage, {k: dict(config[k]) for k in ("model", "data", "objective")}, 0)
        embed = objective.frozen.image
        monkeypatch.setattr(objective.frozen, "image", lambda images, embed=embed: seen.append(type(images)) or embed(images))
        with PretendDevice():
            objective.prepare(device)
        found.append(objective.trained.state_dict())
    assert Elsewhere not in seen[: len(seen) // 2] and set(seen[len(seen) // 2 :]) == {Elsewhere}
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


GROUNDED = ("objective.grounding=1", "model.text_proj={text_layers: 1, text_head_dim: 16, text_images: true}")
DRAFTED = ("model.draft_channels=3", "model.position_maps=true")
DRAFTED += ("model.text_proj={styles: [noto, flat, 3d, twemoji], draft: {size: 16, width: 32, layers: 1}}",)
INPAINTING = ("model.in_channels=7", "model.out_channels=6", "objective.prediction_type=epsilon", "objective.min_snr=5")


@contextmanager
def on_the_device(stage: str, clip, *settings: str):
    """The objective of a tiny stage on the pretend device, and a batch there, while there is one."""
    named = [f"objective.clip={clip}"] if "clip" in load_config(f"tiny/{stage}").get("objective", {}) else []
    config = load_config(f"tiny/{stage}", [*named, *settings])
    torch.manual_seed(0)
    objective = create(config["stage"], {k: config.get(k) or {} for k in ("model", "data", "objective")}, 0)
    objective.adapt()
    batch = default_collate([objective.examples[i] for i in range(4)])
    with PretendDevice(), torch.no_grad():
        yield objective.to(DEVICE).train(), to_device(batch, DEVICE)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [*((s, ()) for s in STAGES), ("decoder", GROUNDED), ("decoder", INPAINTING), ("decoder", DRAFTED)],
)
def test_no_loss_makes_the_host_wait(clip, stage, settings, monkeypatch):
    """Nothing is read from the device and no shape depends on what is there."""
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    with on_the_device(stage, clip, *settings) as (objective, batch):
        objective(batch)  # tables move with the first batch
        with Operations(DEVICE.type) as found:
            objective(batch)
    assert not found.host_reads, found.host_reads
    assert sum(found.operations.values()) > 100


READS = {
    "a number": lambda loss: loss.item(),
    "a truth": lambda loss: bool(loss > 0),
    "a list": lambda loss: loss[None].tolist(),
    "a boolean index": lambda loss: loss[None][loss[None] > 0],
    "places": lambda loss: loss[None].nonzero(),
    "distinct ones": lambda loss: loss[None].unique(),
    "a copy to the host": lambda loss: loss.cpu(),
    "a copy to the device": lambda loss: torch.ones(2).to(DEVICE),
}


@pytest.mark.parametrize("kind", READS)
def test_a_planted_read_is_found(clip, kind, monkeypatch):
    """With the line that it stands in."""
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    with on_the_device("prior", clip) as (objective, batch):
        objective(batch)
        plain = objective.compute_loss

        def planted(tensors):
            loss, metrics = plain(tensors)
            READS[kind](loss)
            return loss, metrics

        objective.compute_loss = planted
        with Operations(DEVICE.type) as found:
            objective(batch)
    (line,) = found.host_reads
    assert ("pretend_device.py" if kind == "a list" else "test_devices.py") in line


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_learns_is_judged_and_draws_where_its_networks_are(clip, stage, monkeypatch):
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)  # a module's parameters change kind
    named = [f"objective.clip={clip}"] if "clip" in load_config(f"tiny/{stage}").get("objective", {}) else []
    config = load_config(f"tiny/{stage}", named)
    sections = {k: config.pop(k) or {} for k in ("model", "data", "objective") if k in config}
    torch.manual_seed(0)
    objective = create(config["stage"], sections, 0)
    objective.adapt()
    monkeypatch.setattr(type(objective), "held_out", 8, raising=False)
    batch = default_collate([objective.examples[i] for i in range(2)])
    with PretendDevice(), torch.no_grad():
        objective.to(DEVICE)
        batch = to_device(batch, DEVICE)
        for _ in range(2):  # a scheduler moves its tables when it is first asked
            loss, metrics = objective.train()(batch)
        assert isinstance(loss, Elsewhere) and loss.isfinite().item() and not any(v.isinf().item() for v in metrics.values())
        objective.eval()
        found, image = objective.validate(), objective.sample()
    assert all(math.isfinite(v) for v in found.values()) and (image is None or image.width > 0)
