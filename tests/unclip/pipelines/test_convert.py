"""Checkpoints with the original key names, through the command line, to pipelines that draw."""

import os
import pickle
import shutil

import karlo
import pytest
import torch
from conftest import seeds

from unclip import UnCLIPImageVariationPipeline, UnCLIPPipeline, UnCLIPPriorPipeline
from unclip.pipelines.convert import HEAD_DIM

WIDTH, DIM, CROSS = 128, 64, 96


class Original:
    """The tensors of an original checkpoint, named as its authors named them."""

    def __init__(self, prefix: str, seed: int):
        self.prefix, self.state, self.random = prefix, {}, torch.Generator().manual_seed(seed)

    def put(self, name: str, *shape: int) -> None:
        scale = 0.05 if len(shape) < 2 else shape[1] ** -0.5 / 3
        self.state[f"{self.prefix}.{name}"] = scale * torch.randn(shape, generator=self.random)

    def layer(self, name: str, out: int, *rest: int) -> None:
        self.put(f"{name}.weight", out, *rest)
        self.put(f"{name}.bias", out)
        if not rest:  # a norm
            self.state[f"{self.prefix}.{name}.weight"] += 1

    def resnet(self, name: str, width_in: int, width_out: int, time: int) -> None:
        self.layer(f"{name}.in_layers.0", width_in)
        self.layer(f"{name}.in_layers.2", width_out, width_in, 3, 3)
        self.layer(f"{name}.emb_layers.1", 2 * width_out, time)
        self.layer(f"{name}.out_layers.0", width_out)
        self.layer(f"{name}.out_layers.3", width_out, width_out, 3, 3)
        if width_in != width_out:
            self.layer(f"{name}.skip_connection", width_out, width_in, 1, 1)

    def attention(self, name: str, width: int) -> None:
        self.layer(f"{name}.norm", width)
        self.layer(f"{name}.qkv", 3 * width, width, 1)
        self.layer(f"{name}.encoder_kv", 2 * width, CROSS, 1)
        self.layer(f"{name}.proj_out", width, width, 1)

    def unet(self, widths: tuple[int, ...], layers: int, attending: bool, channels_in: int, channels_out: int) -> None:
        """As guided-diffusion builds it: blocks numbered through, resnets that halve and double the size."""
        width, time = widths[0], 4 * widths[0]
        self.layer("time_embed.0", time, width)
        self.layer("time_embed.2", time, time)
        self.layer("input_blocks.0.0", width, channels_in, 3, 3)
        skips, n = [width], 1
        for level, wide in enumerate(widths):
            for _ in range(layers):
                self.resnet(f"input_blocks.{n}.0", width, wide, time)
                if attending and level:
                    self.attention(f"input_blocks.{n}.1", wide)
                width, n = wide, n + 1
                skips.append(width)
            if level + 1 < len(widths):
                self.resnet(f"input_blocks.{n}.0", width, width, time)
                skips.append(width)
                n += 1
        self.resnet("middle_block.0", width, width, time)
        if attending:
            self.attention("middle_block.1", width)
        self.resnet(f"middle_block.{2 if attending else 1}", width, width, time)
        n = 0
        for level in reversed(range(len(widths))):
            for i in range(layers + 1):
                self.resnet(f"output_blocks.{n}.0", width + skips.pop(), widths[level], time)
                width = widths[level]
                if attending and level:
                    self.attention(f"output_blocks.{n}.1", width)
                if level and i == layers:
                    self.resnet(f"output_blocks.{n}.{2 if attending else 1}", width, width, time)
                n += 1
        self.layer("out.0", width)
        self.layer("out.2", channels_out, width, 3, 3)

    def prior(self, layers: int, tokens: int) -> None:
        for name in ("time_embed.0", "time_embed.2"):
            self.layer(name, WIDTH, WIDTH)
        for name in ("clip_img_proj", "text_emb_proj", "text_enc_proj"):
            self.layer(name, WIDTH, DIM)
        self.put("positional_embedding", 1, tokens + 4, WIDTH)
        self.put("prd_emb", 1, 1, WIDTH)
        for n in range(layers):
            block = f"transformer.resblocks.{n}"
            self.layer(f"{block}.attn.c_qkv", 3 * WIDTH, WIDTH)
            self.layer(f"{block}.attn.c_proj", WIDTH, WIDTH)
            self.layer(f"{block}.mlp.c_fc", 4 * WIDTH, WIDTH)
            self.layer(f"{block}.mlp.c_proj", WIDTH, 4 * WIDTH)
            self.layer(f"{block}.ln_1", WIDTH)
            self.layer(f"{block}.ln_2", WIDTH)
        self.layer("final_ln", WIDTH)
        self.layer("out_proj", DIM, WIDTH)

    def conditioning(self) -> None:
        self.layer("text_seq_proj.0", CROSS, DIM)
        self.layer("text_seq_proj.1", CROSS)
        self.layer("clip_tok_proj", 4 * CROSS, DIM)
        self.layer("text_feat_proj", 4 * 64, DIM)
        self.layer("clip_emb", 4 * 64, DIM)
        self.put("cf_param", DIM)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Four files as Karlo published them, and a CLIP of transformers."""
    folder = tmp_path_factory.mktemp("original")
    prior, decoder = Original("model", 1), Original("model", 2)
    prior.prior(layers=2, tokens=karlo.TOKENS)
    decoder.unet((64, 128), layers=2, attending=True, channels_in=3, channels_out=6)
    decoder.conditioning()
    first, last = Original("model_first_steps", 3), Original("model_last_step", 4)
    for one in (first, last):
        one.unet((32, 64), layers=1, attending=False, channels_in=6, channels_out=3)
    torch.save({"state_dict": prior.state, "epoch": 3}, folder / "prior.ckpt")
    torch.save({"state_dict": decoder.state}, folder / "decoder.ckpt")
    torch.save({"state_dict": first.state | last.state}, folder / "sr.ckpt")
    torch.save((torch.full((DIM,), 0.2), torch.full((DIM,), 0.7)), folder / "stats.th")
    torch.save(torch.nn.Linear(2, 2), folder / "evil.ckpt")
    (folder / "plain.ckpt").write_bytes(pickle.dumps({"state_dict": {}}, protocol=4))
    (folder / "cut.ckpt").write_bytes(b"\x80\x02.")
    parts = karlo.parts(folder, dim=DIM)
    for name in ("text_encoder", "image_encoder"):
        parts[name].save_pretrained(folder / "clip")
    from transformers import CLIPConfig, CLIPModel

    whole = CLIPModel(
        CLIPConfig(
            text_config=parts["text_encoder"].config.to_dict(),
            vision_config=parts["image_encoder"].config.to_dict(),
            projection_dim=DIM,
        )
    )
    shutil.rmtree(folder / "clip")
    for name in ("tokenizer", "feature_extractor"):
        parts[name].save_pretrained(folder / "clip")
    whole.save_pretrained(folder / "clip")
    return folder


def arguments(folder, out, **other):
    files = {
        "prior": "prior.ckpt",
        "decoder": "decoder.ckpt",
        "sr": "sr.ckpt",
        "clip-stats": "stats.th",
        "clip": "clip",
    } | other
    return [w for k, v in files.items() for w in (f"--{k}", str(folder / v))] + [str(out)]


def test_karlo_becomes_a_pipeline_that_draws(originals, tmp_path, command):
    out = tmp_path / "karlo"
    assert command("convert", "karlo", *arguments(originals, out))[:2] == (0, f"{out}\n")
    assert not [p for p in out.rglob("*") if p.suffix in (".bin", ".ckpt", ".pt")]
    pipe = UnCLIPPipeline.from_pretrained(out, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.sizes == [64, 256] and pipe.decoder.config.layers_per_block == 2
    steps = {"prior_num_inference_steps": 2, "decoder_num_inference_steps": 2}
    image = pipe("a star", generator=seeds(0), size=64, output_type="pt", **steps).images
    assert image.shape == (1, 3, 64, 64) and image.isfinite().all() and image.std() > 0.01
    vary = UnCLIPImageVariationPipeline.from_pipe(pipe)
    again = vary(pipe.numpy_to_pil(image.permute(0, 2, 3, 1).numpy()), size=64, decoder_num_inference_steps=2).images[0]
    assert again.size == (64, 64)
    code, _, said = command("convert", "karlo", *arguments(originals, out))
    assert code == 2 and said == f"error: {out} exists; pass --force to replace it\n"


def test_every_tensor_arrives_once(originals, tmp_path):
    """Nothing of the originals is lost or used twice: the values, sorted, are the same."""
    from diffusers import UNet2DConditionModel, UNet2DModel

    from unclip.pipelines.convert import convert_prior, convert_text_proj, convert_unet, read_states

    def values(*sources) -> torch.Tensor:
        return torch.cat([v.flatten().float() for s in sources for v in s.values()]).sort().values

    old = torch.load(originals / "decoder.ckpt", weights_only=True)["state_dict"]
    (drawing,) = read_states(originals / "decoder.ckpt", "model")
    unet, projections = (
        convert_unet(drawing, UNet2DConditionModel, 64, "decoder.ckpt"),
        convert_text_proj(drawing, "decoder.ckpt"),
    )
    assert torch.equal(values(unet.state_dict(), projections.state_dict()), values(old))
    old = torch.load(originals / "sr.ckpt", weights_only=True)["state_dict"]
    states = read_states(originals / "sr.ckpt", "model_first_steps", "model_last_step")
    steps = [convert_unet(state, UNet2DModel, 256, "sr.ckpt") for state in states]
    assert torch.equal(values(*(s.state_dict() for s in steps)), values(old))
    old = torch.load(originals / "prior.ckpt", weights_only=True)["state_dict"]
    prior = convert_prior(originals / "prior.ckpt", originals / "stats.th").state_dict()
    assert prior["clip_mean"].shape == (1, DIM) and prior["clip_std"].mean() == pytest.approx(0.7)
    assert torch.equal(values({k: v for k, v in prior.items() if not k.startswith("clip_")}), values(old))


def test_a_converted_attention_answers_as_the_original(originals):
    """Queries, keys and values are stored head by head there (GLIDE's attention block) and side by side here."""
    from diffusers import UNet2DConditionModel

    from unclip.pipelines.convert import convert_unet, read_states

    state = torch.load(originals / "decoder.ckpt", weights_only=True)["state_dict"]
    old = {k.removeprefix("model.middle_block.1."): v for k, v in state.items() if k.startswith("model.middle_block.1.")}
    (state,) = read_states(originals / "decoder.ckpt", "model")
    new = convert_unet(state, UNet2DConditionModel, 64, "decoder.ckpt").mid_block.attentions[0]
    x, context = torch.randn(2, 128, 4, 4), torch.randn(2, 5, CROSS)
    flat = torch.nn.functional.group_norm(x.flatten(2), 32, old["norm.weight"], old["norm.bias"], 1e-5)
    qkv = torch.nn.functional.conv1d(flat, old["qkv.weight"], old["qkv.bias"])
    added = torch.nn.functional.conv1d(context.transpose(1, 2), old["encoder_kv.weight"], old["encoder_kv.bias"])
    q, k, v = qkv.reshape(2 * 2, 3 * HEAD_DIM, -1).split(HEAD_DIM, 1)
    added_k, added_v = added.reshape(2 * 2, 2 * HEAD_DIM, -1).split(HEAD_DIM, 1)
    k, v = torch.cat([added_k, k], 2), torch.cat([added_v, v], 2)
    out = v @ (q.transpose(1, 2) @ k / HEAD_DIM**0.5).softmax(-1).transpose(1, 2)
    expected = torch.nn.functional.conv1d(out.reshape(2, 128, -1), old["proj_out.weight"], old["proj_out.bias"]).view_as(x) + x
    with torch.no_grad():
        torch.testing.assert_close(new(x, context), expected, rtol=1e-4, atol=1e-4)


def test_a_kandinsky_prior_predicts_embeddings(originals, tmp_path, command):
    out = tmp_path / "kandinsky"
    words = [
        w for w in arguments(originals, out) if w not in ("--decoder", "--sr") and not w.endswith(("decoder.ckpt", "sr.ckpt"))
    ]
    assert command("convert", "kandinsky-prior", *words)[:2] == (0, f"{out}\n")
    pipe = UnCLIPPriorPipeline.from_pretrained(out, dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    settings = {"prior_num_inference_steps": 3, "prior_guidance_scale": 2.0}
    embeds = pipe(["a star", "a ring"], generator=seeds(0, 1), **settings).image_embeds
    assert embeds.shape == (2, DIM) and embeds.isfinite().all()
    torch.testing.assert_close(
        pipe("a ring", generator=seeds(1), **settings, return_dict=False)[0], embeds[1:], rtol=0, atol=1e-9
    )
    whole = UnCLIPPipeline.from_pretrained  # the same prior within a whole pipeline draws the same embedding
    karlo_out = tmp_path / "karlo"
    assert command("convert", "karlo", *arguments(originals, karlo_out))[0] == 0
    same = UnCLIPPriorPipeline.from_pipe(whole(karlo_out, dtype=torch.float64))
    torch.testing.assert_close(same(["a star", "a ring"], generator=seeds(0, 1), **settings).image_embeds, embeds)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"prior": "plain.ckpt"}, "plain.ckpt is no PyTorch checkpoint: Unsupported operand"),
        ({"prior": "evil.ckpt"}, "evil.ckpt is refused: it holds more than tensors (torch.nn.modules.linear.Linear)"),
        ({"prior": "cut.ckpt"}, "cut.ckpt is no PyTorch checkpoint: "),
        ({"prior": "none.ckpt"}, "none.ckpt is not a file"),
        ({"prior": "decoder.ckpt"}, "decoder.ckpt lacks clip_img_proj.weight; is it the checkpoint of another stage?"),
        ({"decoder": "prior.ckpt"}, "is it the checkpoint of another stage?"),
        ({"sr": "decoder.ckpt"}, "holds no tensors named model_first_steps.*"),
        ({"clip-stats": "prior.ckpt"}, "must hold a mean and a standard deviation, got dict"),
        ({"clip-stats": "clip/config.json"}, "config.json is no PyTorch checkpoint"),
        ({"clip": "nowhere"}, "nowhere"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_wrong_file_is_one_line_and_nothing_is_written(originals, tmp_path, command, other, message):
    out = tmp_path / "out"
    code, printed, said = command("convert", "karlo", *arguments(originals, out, **other))
    assert code == 2 and printed == "" and message in said and said.count("\n") == 1 and said.startswith("error: ")
    assert os.listdir(tmp_path) == []
