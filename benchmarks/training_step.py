"""A training step of the decoder beside DALLE2-pytorch 1.15.6: as many parameters, 64 px, the same batch.

    python benchmarks/training_step.py [--batch 32] [--rounds 5] [--compile] [--peer FOLDER] [--device cuda]
    python benchmarks/training_step.py --host [--batch 512] [--rounds 5] [--config emoji/decoder_32] [KEY=VALUE ...]

The peer is installed into a virtual environment of its own, once, at --peer (default: ~/.cache/unclip/dalle2-pytorch). Both run
in processes of their own, in turn, on random images, embeddings and token encodings: loss, backward pass, clipped gradient
and AdamW, each as its library comes (the peer's Decoder in float32, ours through the precision of its training loop).
`--compile` is our loop's setting `compile=true`. `--host` tells what a step of our own costs the host (`training_host.py`).
"""

import argparse
import statistics
import subprocess
import sys
import venv
from pathlib import Path

from turns import in_turn, machine, now, serve, spread

PEER = ("DALLE2-pytorch==1.15.6", "torch==2.14.1", "torchvision==0.29.1")
DIM, TOKENS = 384, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, help="32, with --host 512")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peer", type=Path, default=Path.home() / ".cache" / "unclip" / "dalle2-pytorch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--host", action="store_true", help="what a step costs the host, by cause")
    parser.add_argument("--config", default="emoji/decoder_32", help="of --host: the stage's configuration")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of --host: changes to it")
    parser.add_argument("--worker", choices=["ours", "peer"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.batch = options.batch or (512 if options.host else 32)
    if options.host:
        from training_host import report

        report(options.config, options.settings, options.batch, options.rounds)
        return
    if options.worker:
        asked = options.batch, options.device
        serve(*(ours(*asked, options.compile) if options.worker == "ours" else peer(*asked)))
        return
    python = {"ours": sys.executable, "peer": str(installed(options.peer))}
    shared = ["--batch", str(options.batch), "--device", options.device]
    command = [__file__, *shared, *["--compile"] * options.compile, "--worker"]
    answers = in_turn({name: [python[name], *command, name] for name in ("ours", "peer")}, options.rounds)
    seconds = {name: [answer["seconds"] for answer in said[:-1]] for name, said in answers.items()}
    print(f"{machine(options.device)}; batch {options.batch}, {options.rounds} rounds\n")
    print("| | parameters | dtype | images/s | its time / ours, least to largest |\n|---|---|---|---|---|")
    for name, taken in seconds.items():
        facts, rate = answers[name][-1], options.batch / statistics.median(taken)
        title = {"ours": "ours", "peer": "DALLE2-pytorch 1.15.6"}[name]
        print(f"| {title} | {facts['millions']}M | {facts['dtype']} | {rate:.2f} | {spread(taken, seconds['ours'])} |")


def installed(folder: Path) -> Path:
    """The Python of the peer's virtual environment, which is made if it isn't there."""
    python = folder / "bin" / "python"
    if not (folder / "whole").is_file():
        print(f"installing {PEER[0]} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEER], check=True)
        (folder / "whole").touch()
    return python


def ours(batch: int, device: str, compiled: bool) -> tuple:
    import torch

    from decoder import expand_to_context
    from unclip import networks
    from unclip.diffusion.predictions import target
    from unclip.diffusion.schedules import schedule
    from unclip.runtime.config import load_config
    from unclip.runtime.precision import fast_dtype

    torch.manual_seed(0)
    config = load_config(Path(__file__).parent.parent / "configs" / "emoji" / "decoder.yaml")
    trained = networks.decoder(config["model"], DIM)
    for network in trained.values():
        network.to(device, memory_format=torch.channels_last)
    if compiled:
        trained["decoder"].compile()
    dtype, levels = fast_dtype(device), schedule("v_prediction")
    clean, noise = torch.randn(2, batch, 3, 64, 64, device=device)
    embeds, encodings = torch.randn(batch, DIM, device=device), torch.randn(batch, TOKENS, DIM, device=device)
    text_mask = torch.ones(batch, TOKENS, dtype=torch.bool, device=device)
    mask = expand_to_context(trained["text_proj"], text_mask, True)

    def loss() -> torch.Tensor:
        t = torch.randint(0, 1000, (batch,), device=device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            context, added = trained["text_proj"](
                image_embeddings=embeds, prompt_embeds=embeds, text_encoder_hidden_states=encodings, text_mask=text_mask
            )
            noised = levels.add_noise(clean, noise, t)
            answer = trained["decoder"](noised, t, context, class_labels=added, attention_mask=mask).sample.float()
        return (answer - target(levels, clean, noise, t)).square().mean()

    return stepping(trained, loss, device, str(dtype).removeprefix("torch."), fused=True)


def peer(batch: int, device: str) -> tuple:
    import torch
    from dalle2_pytorch import Decoder, Unet

    torch.manual_seed(0)
    unet = Unet(
        dim=88,
        image_embed_dim=DIM,
        text_embed_dim=DIM,
        cond_dim=416,  # of the embeddings' own width it makes no image tokens, and fails
        channels=3,
        dim_mults=(1, 2, 4),
        max_text_len=TOKENS,
        cond_on_text_encodings=True,
    )
    decoder = Decoder(unet, image_size=64, timesteps=1000, learned_variance=False).to(device)
    images = torch.rand(batch, 3, 64, 64, device=device)
    embeds, encodings = torch.randn(batch, DIM, device=device), torch.randn(batch, TOKENS, DIM, device=device)
    unet = decoder.unets[0]  # another one than was given: it takes the image embeddings too
    conditioning = {"image_embed": embeds, "text_encodings": encodings, "unet_number": 1}
    return stepping(unet, lambda: decoder(images, **conditioning), device, "float32")


def stepping(trained, loss, device: str, dtype: str, **options) -> tuple:
    """A worker that takes a step of AdamW at each turn."""
    import torch

    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4, **options)

    def work() -> dict:
        start = now(device)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"seconds": now(device) - start}

    millions = round(sum(p.numel() for p in trained.parameters()) / 1e6, 1)
    return work, lambda: {"millions": millions, "dtype": dtype}


if __name__ == "__main__":
    main()
