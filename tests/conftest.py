"""Tiny networks and real code paths: one thread, no network, nothing that outlives its temporary folder."""

import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: a second thread only waits
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ and "gpu" not in sys.argv:  # pytest -m gpu
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from forked import ROOT
from hypothesis import settings

from decoder import Decoder, UnCLIPTextProjModel
from prior import DiffusionPrior
from unclip.clip.towers import ImageTower, TextTower
from unclip.pipelines import UnCLIPPipeline
from unclip.training.objectives.clip import image_processor, sentence_tokenizer
from upsamplers import Upsampler

torch.set_num_threads(1)
settings.register_profile("patient", deadline=None)  # a busy machine is no failure
settings.load_profile("patient")


def randomise(network: torch.nn.Module, seed: int = 0, scale: float = 0.05) -> torch.nn.Module:
    """Random weights everywhere: a fresh network's zeros would make it answer with a constant."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def cosine(kind: str, **kwargs) -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=kind, clip_sample=False, timestep_spacing="trailing", **kwargs
    )


def tiny_networks() -> dict:
    text = TextTower(width=32, layers=1, heads=2, feed_forward=64, context_length=16, embedding_dim=32)
    tokenizer = sentence_tokenizer(text, weights=False)
    return {
        "prior": randomise(DiffusionPrior(embedding_dim=32, num_embeddings=16, width=32, layers=2, head_dim=16)),
        "decoder": randomise(
            Decoder(
                channels=[16, 32],
                blocks=[1, 1],
                attention=[False, True],
                head_dim=16,
                cross_attention_dim=32,
                time_embed_dim=32,
            )
        ),
        "text_encoder": randomise(text),
        "tokenizer": tokenizer,
        "text_proj": randomise(UnCLIPTextProjModel(clip_embeddings_dim=32, time_embed_dim=32, cross_attention_dim=32)),
        "super_res_first": randomise(Upsampler(256, channels=[8], blocks=[1], time_embed_dim=16)),
        "super_res_last": None,
        "prior_scheduler": cosine("sample"),
        "decoder_scheduler": DPMSolverMultistepScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
        ),
        "super_res_scheduler": cosine("sample"),
        "image_encoder": randomise(ImageTower(channels=[8, 16], blocks=[1, 1], head_dim=16, embedding_dim=32)),
        "feature_extractor": image_processor(64),
        "upsampler_1024": randomise(Upsampler(1024, channels=[8], blocks=[1], time_embed_dim=16)),
        "upsampler_1024_scheduler": cosine("sample"),
    }


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")  # what Python is told before a command

TINY_DEFAULTS = {
    "prior_num_inference_steps": 3,
    "decoder_num_inference_steps": 3,
    "super_res_num_inference_steps": 2,
    "upsampler_1024_num_inference_steps": 1,
    "prior_guidance_scale": 2.0,
    "decoder_guidance_scale": 3.0,
    "prior_candidates": 2,
}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A random pipeline of toy width on disk, in the layout of the shipped model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    UnCLIPPipeline(**tiny_networks(), defaults=TINY_DEFAULTS).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder) -> UnCLIPPipeline:
    pipe = UnCLIPPipeline.from_pretrained(tiny_folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def run():
    """Run a command in a process of its own at the root of the clone."""

    def call(*command: str | Path, timeout: float = 300, **kwargs) -> subprocess.CompletedProcess:
        arguments = [sys.executable, *map(str, command)]
        return subprocess.run(arguments, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False, **kwargs)

    return call


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


@pytest.fixture
def command(monkeypatch, capsys):
    """The command line in this process: call(*words) -> exit code, stdout, stderr."""
    from unclip import cli

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unclip", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return call


@pytest.fixture
def exact(monkeypatch):
    """Convolutions in float32 proper, where cuDNN would take them in TF32, with ten bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
