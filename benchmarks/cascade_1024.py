"""Compare the shipped model, text to 1024 px, with a cascade of stock diffusers classes.

    python benchmarks/cascade_1024.py [--rounds 5] [--timed 1 | --timed 0] [--device cuda]

Each in a process of its own, in turn. The stock cascade has random weights in as many parameters (PriorTransformer, and Karlo's
layout for UNet2DConditionModel and UNet2DModel), sees pixels as they are, runs in float32 as it comes, guided where ours is,
25/25/27/15 steps of DDPM; its text is given as embeddings, which costs it nothing. A stage's steps are all alike, so that
`--timed` of them are taken and multiplied; 0 takes them all. Ours is called with no settings but the prompt.
"""

import argparse
import statistics
import sys
from typing import Any

from turns import in_turn, machine, now, serve, spread

STEPS = {"prior": 25, "decoder": 25, "upsampler_256": 27, "upsampler_1024": 15}
PROMPT = "a hamburger"
DIM, TOKENS, GUIDANCE = 384, 32, 3.0  # of the stock cascade


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--worker", choices=["ours", "stock"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work = ours(options.device) if options.worker == "ours" else stock(options.timed, options.device)
        serve(*work)
        return
    command = [sys.executable, __file__, "--timed", str(options.timed), "--device", options.device, "--worker"]
    answers = in_turn({name: [*command, name] for name in ("ours", "stock")}, options.rounds)
    seconds = {name: [answer["seconds"] for answer in said[:-1]] for name, said in answers.items()}
    print(f"{machine(options.device)}; {options.rounds} rounds")
    print(f"parameters, in millions: {answers['ours'][-1]} and {answers['stock'][-1]}\n")
    print("| | s | its time / ours, least to largest |\n|---|---|---|")
    for name, taken in seconds.items():
        print(f"| {name} | {statistics.median(taken):.3g} | {spread(taken, seconds['ours'])} |")
    stages = {stage: statistics.median(answer["stages"][stage] for answer in answers["stock"][:-1]) for stage in STEPS}
    print(f"\nof the stock cascade's seconds: {', '.join(f'{stage} {taken:.3g}' for stage, taken in stages.items())}")


def ours(device: str) -> tuple:
    import torch

    from unclip import UnCLIPPipeline

    pipe = UnCLIPPipeline.from_pretrained("emoji").to(device)
    pipe.set_progress_bar_config(disable=True)

    def work() -> dict:
        start = now(device)
        pipe(PROMPT, generator=torch.Generator().manual_seed(0))
        return {"seconds": now(device) - start}

    networks = {"prior": pipe.prior, "decoder": pipe.decoder, "text_proj": pipe.text_proj}
    networks |= {"upsampler_256": pipe.super_res_first, "upsampler_1024": pipe.upsampler_1024}
    return work, lambda: counts(networks)


def stock_networks(device: str) -> dict[str, Any]:
    """diffusers' networks at about the parameters of ours, with random weights."""
    import torch
    from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    torch.manual_seed(0)
    dim, wide = DIM, (64, 160, 304)
    shared = {"layers_per_block": 1, "add_attention": False, "norm_num_groups": 8, "in_channels": 6, "out_channels": 3}
    shared |= {"down_block_types": ("ResnetDownsampleBlock2D",) * 4, "up_block_types": ("ResnetUpsampleBlock2D",) * 4}
    shared |= {"resnet_time_scale_shift": "scale_shift"}
    prior = PriorTransformer(num_attention_heads=6, num_layers=5, embedding_dim=dim, num_embeddings=TOKENS)
    decoder = UNet2DConditionModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        block_out_channels=wide,
        layers_per_block=2,
        down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 2),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 2, "ResnetUpsampleBlock2D"),
        cross_attention_dim=dim,
        attention_head_dim=16,
        norm_num_groups=16,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
    )
    project = UnCLIPTextProjModel(clip_embeddings_dim=dim, time_embed_dim=4 * wide[0], cross_attention_dim=dim)
    first = UNet2DModel(sample_size=256, block_out_channels=(32, 48, 64, 104), **shared)
    last = UNet2DModel(sample_size=1024, block_out_channels=(16, 24, 32, 40), **shared)
    networks = {"prior": prior, "decoder": decoder, "text_proj": project, "upsampler_256": first, "upsampler_1024": last}
    for network in networks.values():
        network.eval().requires_grad_(False).to(device)
    return networks


def stock(timed: int, device: str) -> tuple:
    import torch
    from diffusers import DDPMScheduler

    networks = stock_networks(device)
    prior, decoder, project = networks["prior"], networks["decoder"], networks["text_proj"]

    @torch.no_grad()
    def work() -> dict:
        text, encodings = torch.randn(2, DIM, device=device), torch.randn(2, TOKENS, DIM, device=device)
        mask = torch.ones(2, TOKENS, dtype=torch.bool, device=device)
        stages: dict[str, float] = {}

        def loop(stage: str, x: torch.Tensor, predict) -> torch.Tensor:
            kind = "sample" if stage == "prior" else "epsilon"
            scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind)
            scheduler.set_timesteps(STEPS[stage])
            taken = timed or STEPS[stage]
            start = now(device)
            for t in scheduler.timesteps[:taken]:
                x = scheduler.step(predict(x, t), t, x).prev_sample
            stages[stage] = (now(device) - start) * STEPS[stage] / taken
            return x.clamp(-1, 1)

        def guided(both: torch.Tensor) -> torch.Tensor:
            empty, full = both.chunk(2)
            return empty + GUIDANCE * (full - empty)

        def of_prior(x, t):
            return guided(prior(torch.cat([x, x]), t, text, encodings, mask).predicted_image_embedding)

        embedding = loop("prior", torch.randn(1, DIM, device=device), of_prior)
        context, added = project(
            image_embeddings=embedding,
            prompt_embeds=text,
            text_encoder_hidden_states=encodings,
            do_classifier_free_guidance=True,
        )
        seen = torch.nn.functional.pad(mask, (4, 0), value=True)

        def of_decoder(x, t):
            return guided(decoder(torch.cat([x, x]), t, context, class_labels=added, attention_mask=seen).sample)

        image = loop("decoder", torch.randn(1, 3, 64, 64, device=device), of_decoder)
        for stage, size in (("upsampler_256", 256), ("upsampler_1024", 1024)):
            network = networks[stage]
            low = torch.nn.functional.interpolate(image, (size, size), mode="bicubic", antialias=True)
            image = loop(stage, torch.randn_like(low), lambda x, t: network(torch.cat([x, low], 1), t).sample)  # noqa: B023
        return {"seconds": sum(stages.values()), "stages": stages}

    return work, lambda: counts(networks)


def counts(networks: dict) -> dict[str, float]:
    return {name: round(sum(p.numel() for p in n.parameters()) / 1e6, 1) for name, n in networks.items()}


if __name__ == "__main__":
    main()
