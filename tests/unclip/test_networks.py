"""Stock networks from a configuration, through the trainer's own objectives, and the paper's sizes."""

import karlo
import pytest
import torch
import yaml
from conftest import ROOT, tiny_networks
from torch.utils.data import default_collate

from unclip import networks
from unclip.runtime.config import ConfigError, load_config
from unclip.training.objectives import create
from unclip.training.planning import plan
from unclip.training.trainer import train

UNET = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "resnet_time_scale_shift": "scale_shift",
}
STOCK = {
    "prior": {
        "class": "PriorTransformer",
        "embedding_dim": 32,
        "num_embeddings": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
    },
    "decoder": {
        "class": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 6,
        "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "class_embed_type": "identity",
        "text_proj": {"clip_embeddings_dim": 32, "text_layers": 1, "text_head_dim": 16},
        **UNET,
    },
    "upsampler_256": {
        "class": "UNet2DModel",
        "sample_size": 256,
        "in_channels": 6,
        "out_channels": 3,
        "down_block_types": ["ResnetDownsampleBlock2D"] * 2,
        "up_block_types": ["ResnetUpsampleBlock2D"] * 2,
        "add_attention": False,
        **UNET,
    },
}
OBJECTIVES = {
    "prior": {"whitening_examples": 128, "timesteps": "uniform"},
    "decoder": {"prediction_type": "epsilon", "embedding_noise": 0.0, "timesteps": "uniform"},
    "upsampler_256": {"prediction_type": "epsilon", "loss": "mse", "edges": 0.0, "degrade": "bsr"},
}


def config(stage: str, clip) -> dict:
    objective = OBJECTIVES[stage] | ({} if stage == "upsampler_256" else {"clip": str(clip)})
    return {"model": STOCK[stage], "objective": objective, "data": {"path": "shapes"}}


@pytest.mark.parametrize("stage", STOCK)
def test_a_stock_network_trains_and_comes_back_as_what_it_was(stage, tiny_folder, tmp_path):
    run = {"stage": stage, "max_steps": 1, "batch_size": 2, "learning_rate": 1e-3, "workers": 0, "precision": "no"}
    run |= {"validate_every": 0, "sample_every": 0, "output_dir": str(tmp_path / "run"), "ema_decay": 0.99}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run | config(stage, tiny_folder)))
    objective = create(stage, config(stage, tiny_folder), 0)
    objective.prepare()  # a stock prior's statistics start as zeros
    loss, metrics = objective(default_collate([objective.examples[i] for i in range(2)]))
    assert loss.isfinite()
    quarters = {f"t{n}" for n in range(4)}  # NaN where no example has such a timestep
    assert all(v.isfinite() or (name in quarters and v.isnan()) for name, v in metrics.items())
    loss.backward()
    learned = [p for p in objective.trained.parameters() if p.requires_grad]
    assert sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in learned) > len(learned) / 2
    planned = plan(tmp_path / "config.yaml", [], gpus=2)
    assert planned.trained == sum(p.numel() for p in learned) and planned.frozen_parameters is not None
    assert [s.name.split(",")[0] for s in planned.strategies] == sorted(s.name.split(",")[0] for s in planned.strategies)
    assert all(0 < s.activations < s.total for s in planned.strategies)
    if stage == "upsampler_256":  # the whole loop, for one of them
        train(tmp_path / "config.yaml", [])
        kept = type(objective.trained["super_res_first"]).from_pretrained(tmp_path / "run" / "final" / "super_res_first")
        assert kept.config.block_out_channels == [8, 16]


@pytest.mark.parametrize(
    "kind", ["PriorTransformer", "CLIPTextModelWithProjection", "CLIPVisionModelWithProjection", "TextTower"]
)
def test_networks_that_are_not_ours_recompute_their_activations_too(kind, tmp_path):
    """And their gradients stay the same to the last bit; each layer runs once more on the way back."""
    parts = karlo.parts(tmp_path)
    ids = torch.randint(0, 50, (2, karlo.TOKENS), generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    network, arguments, layer = {
        "PriorTransformer": (
            parts["prior"],
            (
                torch.randn(2, 32, generator=g),
                3,
                torch.randn(2, 32, generator=g),
                torch.randn(2, karlo.TOKENS, 32, generator=g),
            ),
            lambda n: n.transformer_blocks[0].norm1,
        ),
        "CLIPTextModelWithProjection": (parts["text_encoder"], (ids,), lambda n: n.text_model.encoder.layers[0].layer_norm1),
        "CLIPVisionModelWithProjection": (
            parts["image_encoder"],
            (torch.randn(2, 3, 16, 16, generator=g),),
            lambda n: n.vision_model.encoder.layers[0].layer_norm1,
        ),
        "TextTower": (tiny_networks()["text_encoder"], (ids,), lambda n: n.bert.encoder.layer[0].attention),
    }[kind]
    network.train()
    calls, gradients = [], []
    layer(network).register_forward_pre_hook(lambda *_: calls.append(1))
    for recomputed in (False, True):
        network.zero_grad()
        if recomputed:
            assert networks.recompute_activations(network)
        network(*arguments)[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert gradients[0] and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert len(calls) == 3, "once kept, then once forward and once more on the way back"
    assert not networks.recompute_activations(torch.nn.Linear(2, 2))


def test_statistics_of_a_stock_prior_are_found_and_not_trained(tiny_folder):
    objective = create("prior", config("prior", tiny_folder), 0)
    objective.prepare()
    prior = objective.trained["prior"]
    assert not prior.clip_std.requires_grad and not prior.clip_mean.requires_grad
    assert prior.clip_mean.abs().sum() > 0


def test_mistakes_in_a_model_section_are_named():
    with pytest.raises(ConfigError, match=r"model.class is 'UNet2DConditonModel' .did you mean 'UNet2DConditionModel'"):
        networks.decoder({"class": "UNet2DConditonModel", "text_proj": {"clip_embeddings_dim": 8}})
    with pytest.raises(ConfigError, match=r"clip_embeddings_dim is 32, but the CLIP's embeddings have 48 dimensions"):
        networks.decoder(STOCK["decoder"], 48)
    with pytest.raises(ConfigError, match=r"takes 6 channels and answers with 3, got 3 and 3"):
        networks.upsampler(STOCK["upsampler_256"] | {"in_channels": 3})
    with pytest.raises(ConfigError, match=r"unknown key model.layers_per_blok .did you mean 'layers_per_block'"):
        networks.upsampler(STOCK["upsampler_256"] | {"layers_per_blok": 3})


# Table 3 of the paper, in millions; of the priors, which the table rounds to 1B, what a Transformer's shape comes to.
def blocks(layers: int, width: int) -> float:
    return layers * 12 * width**2 / 1e6


SIZES = {
    "dalle2/decoder": 3500,
    "dalle2/upsampler_256": 700,
    "dalle2/upsampler_1024": 300,
    "dalle2/prior": blocks(24, 2048),
    "dalle2/prior_autoregressive": blocks(24, 2048) + blocks(24, 1664),
    "dalle2/clip": blocks(32, 1280) + blocks(24, 1024),
    "karlo/prior": blocks(20, 2048),
    "karlo/decoder": 900,
    "karlo/upsampler_256": 700,
}


@pytest.mark.parametrize("name", SIZES)
def test_the_papers_networks_have_their_sizes(name):
    found = load_config(name)
    model, stage = found["model"], found["stage"].removesuffix("_256").removesuffix("_1024")
    with torch.device("meta"):
        if stage == "clip":
            made = torch.nn.ModuleList([networks.text_tower(model["text"]), networks.image_tower(model["image"])])
        else:
            made = getattr(networks, stage)(model)
    count = sum(p.numel() for p in made.parameters()) / 1e6
    assert count == pytest.approx(SIZES[name], rel=0.1)


def test_a_configuration_is_found_by_name_and_by_path():
    by_name = load_config("emoji/prior")
    assert by_name == load_config(ROOT / "configs/emoji/prior.yaml") == load_config("configs/emoji/prior.yaml")
    with pytest.raises(ConfigError, match=r"samples.png is not valid YAML: 'utf-8' codec can't decode byte 0x89"):
        load_config(ROOT / "docs/samples.png")
    with pytest.raises(ConfigError, match=r"no configuration at emoji/piror .did you mean 'emoji/prior'"):
        load_config("emoji/piror")
