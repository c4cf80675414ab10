"""Muon: orthogonal steps for hidden layers, AdamW for the rest, and runs that resume as ever."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import finish, run_here, start, state
from torch import nn

from unclip.runtime.config import ConfigError
from unclip.training.muon import ADAM_RMS, COEFFICIENTS, ITERATIONS, MOMENTUM, Muon, hidden_matrices, orthogonalised


@settings(max_examples=50)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), size=st.floats(1e-3, 1e3), seed=st.integers(0, 2**31))
def test_singular_values_come_near_one_and_directions_stay(rows, columns, size, seed):
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    least = min(rows, columns)
    spread = 0.05 + 0.95 * torch.rand(least, generator=generator, dtype=torch.float64)
    matrix = size * left[:, :least] @ spread.diag() @ right[:, :least].T
    found = left[:, :least].T @ orthogonalised(matrix[None])[0] @ right[:, :least]
    assert ((found.diagonal() > 0.3) & (found.diagonal() < 1.3)).all()
    assert (found - found.diagonal().diag()).abs().max() < 1e-6


def test_without_hidden_layers_it_is_adamw():
    def trained(make):
        torch.manual_seed(0)
        layer = nn.Linear(5, 3)
        optimizer = make([{"params": list(layer.parameters()), "muon": False}], lr=0.1, weight_decay=0.1)
        for _ in range(5):
            layer(torch.randn(4, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return layer.weight

    assert torch.equal(trained(Muon), trained(torch.optim.AdamW))


def test_an_update_has_the_size_of_the_rate():
    layer = nn.Conv2d(8, 16, 3)
    before = layer.weight.detach().clone()
    layer(torch.randn(2, 8, 8, 8)).square().sum().backward()
    Muon([{"params": [layer.weight], "muon": True}], lr=0.01).step()
    assert (layer.weight.detach() - before).square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.3)
    assert layer.weight.grad is not None


class PlainMuon(torch.optim.AdamW):
    """Muon as its paper writes it, one matrix after the other (arXiv 2502.16982, algorithm 1)."""

    @torch.no_grad()
    def step(self):
        hidden = [(g, p, p.grad) for g in self.param_groups if g["muon"] for p in g["params"] if p.grad is not None]
        for group, parameter, gradient in hidden:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(gradient, 1 - MOMENTUM)
            matrix = gradient.lerp(state["momentum"], MOMENTUM).flatten(1)
            wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            x = wide / (wide.norm() + 1e-7)
            for _ in range(ITERATIONS):
                square = x @ x.T
                x = COEFFICIENTS[0] * x + (COEFFICIENTS[1] * square + COEFFICIENTS[2] * square @ square) @ x
            update = (x if wide is matrix else x.T).reshape(parameter.shape)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * ADAM_RMS * max(matrix.shape) ** 0.5)
            parameter.grad = None
        super().step()


def trained(make, layers: list[tuple[int, ...]], layout: torch.memory_format, steps: int = 5) -> list[torch.Tensor]:
    """Weights of these shapes after `steps` with random gradients: all but the last two are hidden, in two groups."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(0.05 * torch.randn(shape, generator=generator)) for shape in layers]
    for weight in weights:
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=layout)
    half = len(weights) // 2
    groups = [{"params": weights[:half], "muon": True}, {"params": weights[-2:], "muon": False}]
    groups.append({"params": weights[half:-2], "muon": True, "lr": 0.003, "weight_decay": 0.2})
    optimizer = make(groups, lr=0.01, weight_decay=0.1)
    for step in range(steps):
        for number, weight in enumerate(weights):
            gradient = torch.randn(weight.shape, generator=generator)
            weight.grad = None if step == 1 and number == 0 else torch.empty_like(weight).copy_(gradient)
        optimizer.step()
    return [w.detach() for w in weights]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_matrices_of_one_shape_together_are_each_alone(layout):
    """Wide, tall and square, linear layers and convolutions, some of one shape; a weight without a gradient stays."""
    layers = [
        (8, 12),
        (12, 8),
        (8, 8, 3, 3),
        (8, 12),
        (16, 4, 1, 1),
        (12, 8),
        (8, 8, 3, 3),
        (16, 4),
        (8, 72),
        (6, 6),
        (5, 3),
        (7,),
    ]
    for one, other in zip(trained(Muon, layers, layout), trained(PlainMuon, layers, layout), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        assert one.stride() == other.stride()


def test_linear_layers_step_as_torchs_muon_has_them():
    """Which computes in bfloat16, with the same coefficients."""
    shapes = [(24, 40), (40, 24), (24, 40), (32, 32)]

    def after(make) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(0.05 * torch.randn(shape, generator=generator)) for shape in shapes]
        optimizer = make(weights)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()
        return torch.cat([w.detach().flatten() for w in weights])

    settings = {"lr": 0.01, "weight_decay": 0.1}
    theirs = after(lambda w: torch.optim.Muon(w, **settings, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"))
    ours = after(lambda w: Muon([{"params": w, "muon": True}], torch.bfloat16, **settings))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01 * 3 * 0.2 * 2**-5)  # of three updates, root mean square 0.2


def test_hidden_layers_are_those_in_lists():
    network = nn.ModuleDict({"first": nn.Linear(2, 2), "all": nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))])})
    assert set(hidden_matrices(network)) == {"all.0.0.weight"}


@pytest.mark.parametrize("stage", ["upsampler_256", "clip"])
def test_a_stopped_run_goes_on_unbroken(tmp_path, stage):
    settings = ("max_steps=6", "save_every=1", "optimizer=muon", "batch_size=2")
    unbroken = state(run_here(stage, tmp_path / "unbroken", *settings))
    run_here(stage, tmp_path / "broken", *settings, stop_at=2)
    broken = state(run_here(stage, tmp_path / "broken", *settings))
    assert any("momentum" in name for name in broken) and any("exp_avg" in name for name in broken)
    assert unbroken.keys() == broken.keys() and all(torch.equal(unbroken[n], broken[n]) for n in broken)


def test_processes_share_the_matrices_out(tmp_path):
    settings = ("max_steps=3", "save_every=3", "optimizer=muon", "eps=1e-4")
    alone = state(run_here("upsampler_256", tmp_path / "alone", *settings, "batch_size=6"))
    finish(start("upsampler_256", tmp_path / "shared", *settings, "batch_size=2", processes=3))
    shared = state(tmp_path / "shared")
    assert alone.keys() == shared.keys()
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_another_optimizers_checkpoint_and_unknown_names_are_one_line(tmp_path):
    run_here("upsampler_256", tmp_path, "max_steps=100000", "save_every=1", stop_at=1)
    with pytest.raises(ConfigError, match="was trained by another optimizer than muon"):
        run_here("upsampler_256", tmp_path, "max_steps=3", "optimizer=muon")
    with pytest.raises(ConfigError, match="optimizer must be adamw or muon, got 'mion'.*did you mean 'muon'"):
        run_here("upsampler_256", tmp_path / "new", "max_steps=3", "optimizer=mion")
    with pytest.raises(ConfigError, match="does not go with precision fp16"):
        run_here("upsampler_256", tmp_path / "new", "max_steps=3", "optimizer=muon", "precision=fp16")
