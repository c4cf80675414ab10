"""What `unclip plan` counts, against what is known and what a run takes."""

import json

import pytest
import torch
import yaml
from conftest import ROOT

from unclip import networks
from unclip.cli.plan import parse_bytes
from unclip.runtime.config import ConfigError
from unclip.training.objectives.decoder_distill import TARGETS
from unclip.training.objectives.judge import JudgeObjective
from unclip.training.planning import plan
from unclip.training.trainer import train

TINY = ROOT / "configs" / "tiny"


def config(tmp_path, **model) -> str:
    """An upsampler large enough that its tensors outweigh everything else in the process."""
    run = {"stage": "upsampler_256", "output_dir": str(tmp_path / "run"), "max_steps": 2, "batch_size": 8}
    run |= {"learning_rate": 1e-3, "workers": 0, "precision": "no", "validate_every": 0, "sample_every": 0, "log_every": 1}
    sizes = {"channels": [64, 96], "blocks": [2, 2], "unshuffle": 2, "time_embed_dim": 64} | model
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run | {"data": {"path": "shapes", "crop": 0.25}, "model": {"sample_size": 256, **sizes}}))
    return path


def peak_of(action) -> int:
    """The most bytes of tensors that were alive at once in `action`, as torch's allocator reports them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_memory_is_what_a_run_allocates(tmp_path):
    path = config(tmp_path)
    planned = plan(path, [], gpus=0)
    assert planned.strategies[0].name == "CPU"
    taken = peak_of(lambda: train(path, []))
    assert planned.strategies[0].total == pytest.approx(taken, rel=0.2)


def test_work_is_the_hand_count(tmp_path):
    """A prior's products: two operations for each weight of its linear layers and token, and attention's two products."""
    planned = plan(TINY / "prior.yaml", [], gpus=0)
    width, layers, tokens, dim, text = 32, 2, 20, 32, 16
    a_layer = tokens * 12 * width**2 + 2 * tokens**2 * width
    ends = text * dim * width + 2 * dim * width + 2 * width**2 + dim * width
    assert planned.forward_flops == 2 * (layers * a_layer + ends)
    of_clip = planned.training_flops - 3 * planned.forward_flops
    assert planned.training_flops > 2.5 * planned.forward_flops and of_clip != 0


def test_a_judge_is_planned_over_the_words_of_its_data():
    planned = plan(TINY / "judge.yaml", [], gpus=0)
    config = yaml.safe_load((TINY / "judge.yaml").read_text())
    judge = JudgeObjective(config["model"], config["data"], seed=0, **config.get("objective", {}))
    counted = {name: sum(p.numel() for p in network.parameters()) for name, network in judge.trained.named_children()}
    assert planned.parameters == counted
    with pytest.raises(ConfigError, match="data.path is missing"):
        plan(TINY / "judge.yaml", ["data.path="], gpus=0)


def test_a_clip_that_is_not_here_is_noted_and_the_rest_is_planned():
    overrides = ["objective.clip=nobody/clip", "data.path=nowhere", "data.size=128"]
    here, planned = plan(TINY / "prior.yaml", [], gpus=0), plan(TINY / "prior.yaml", overrides, gpus=0)
    assert here.frozen_parameters and planned.frozen_parameters is None
    assert planned.notes == ["the CLIP 'nobody/clip' is not here: neither its weights nor its work count"]
    assert planned.forward_flops == here.forward_flops and planned.training_flops < here.training_flops
    assert planned.trained == here.trained and planned.read_basis.startswith("JPEG of 128 px a side")


def test_strategies_share_what_they_should(tmp_path):
    path = config(tmp_path)
    alone, two, many = (plan(path, [], gpus=n) for n in (1, 2, 64))
    by_name = {s.name: s for s in many.strategies}
    again = ", activation checkpointing"
    assert [s.name for s in alone.strategies] == ["one GPU", "one GPU" + again]
    assert list(by_name) == ["DDP", "DDP" + again, "FSDP", "FSDP" + again]
    assert two.global_batch == 16 and many.examples == 32 * alone.examples * 2
    assert by_name["DDP"].weights == alone.strategies[0].weights == 4 * alone.trained
    assert by_name["FSDP"].optimiser == pytest.approx(by_name["DDP"].optimiser / 64, rel=0.01)
    assert by_name["DDP" + again].activations < by_name["DDP"].activations
    assert many.checkpointed_flops > many.training_flops > 2.5 * many.forward_flops
    assert by_name["FSDP"].total < by_name["DDP"].total and by_name["FSDP"].activations == by_name["DDP"].activations
    days = [p.device_days() / p.examples for p in (alone, many)]
    assert days[0] == pytest.approx(days[1]) and many.device_days() > 0


def test_an_adapter_is_what_is_trained():
    """Its factors alone take gradients, moments and averages; distilling draws with the decoder before it asks the adapter."""
    whole, rank = plan(TINY / "decoder.yaml", [], gpus=0), 4
    model = yaml.safe_load((TINY / "decoder.yaml").read_text())["model"]
    factors = sum(
        rank * (weight.shape[0] + weight[0].numel())
        for layer, weight in networks.decoder(model, 32).named_parameters()
        if weight.ndim > 1 and any(f".{layer}".endswith(f".{target}.weight") for target in TARGETS) and "decoder" in layer
    )
    lora = [f"objective.lora.rank={rank}", f"objective.lora.targets={TARGETS}"]
    for name, more, parts, steps in (
        ("decoder", lora, 1, 0),
        ("decoder_distill", ["objective.evaluations=2", "objective.teacher_steps=4"], 2, 4),
    ):
        adapted = plan(TINY / f"{name}.yaml", more, gpus=0)
        assert adapted.trained == factors
        memory, before = adapted.strategies[0], whole.strategies[0]
        assert memory.optimiser == 8 * adapted.trained < before.optimiser / 2 and memory.weights > before.weights
        times = parts + 2 * steps
        assert times < adapted.forward_flops / whole.forward_flops < 1.5 * times
        backward = adapted.training_flops - adapted.forward_flops
        assert backward < parts * (whole.training_flops - whole.forward_flops)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prior", "prior_autoregressive", "decoder", "upsampler_256", "upsampler_1024"])
def test_the_papers_models_plan(stage):
    planned = plan(f"dalle2/{stage}", [], gpus=256)
    assert planned.precision == "bf16" and planned.trained > 2.5e8 and planned.training_flops > 2.9 * planned.forward_flops
    assert planned.frozen_parameters is not None and (planned.frozen_parameters > 9e8) == ("upsampler" not in stage)
    assert all(0 < s.activations < s.total for s in planned.strategies)
    saved = {s.name: s.activations for s in planned.strategies}
    if planned.checkpointed_flops:
        assert planned.checkpointed_flops > planned.training_flops
        assert saved["DDP, activation checkpointing"] < saved["DDP"]


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted((ROOT / "configs" / "emoji").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_emoji_models_plan(config):
    """With the shipped CLIP, without their data and without a prior's samples."""
    planned = plan(config, ["data.path=shapes"], gpus=1)
    assert 0 < planned.trained <= sum(planned.parameters.values()) + 1 and planned.forward_flops > 0


def test_the_command_prints_it_and_names_mistakes(command, tmp_path):
    code, out, _ = command("plan", TINY / "decoder.yaml", "--gpus", "8", "--gpu-memory", "24GB", "batch_size=2")
    assert code == 0 and "240 = 30 steps x 8" not in out and "480 = 30 steps x 16" in out
    assert "FSDP" in out and "fits" in out and "frozen CLIP" in out and "(of 24 GB" in out
    code, out, _ = command("plan", TINY / "upsampler_256.yaml", "--gpus", "0", "--json")
    assert code == 0 and json.loads(out)["strategies"][0]["total"] > 0
    for words, message in (
        (["--gpu-memory", "lots"], "'lots' is no amount of memory; write it as 80GB"),
        (["--gpus", "-1"], "at least 0, got -1"),
        (["model.chanels=[8]"], "unknown key model.chanels (did you mean 'channels'?)"),
        (["--utilisation", "2"], "at most 1, got 2"),
    ):
        code, _, said = command("plan", TINY / "upsampler_256.yaml", *words)
        assert code == 2 and message in said and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("24GiB", 24 * 2**30), ("512m", 512 * 10**6), ("1.5 TB", 1.5e12)]
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size
