"""The command line, in processes of its own."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from unclip import __version__
from unclip.io.images import stated
from unclip.runtime.precision import fast_dtype


def test_generate_writes_images_and_prints_only_their_names(run, command, tiny_folder, tmp_path):
    out = tmp_path / "new" / "ring.png"
    words = ["generate", "a ring", "--model", tiny_folder, "--out", out, "--seed", 5]
    first = run("-m", "unclip", *words)
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{out}\n"
    bars = [line for line in first.stderr.replace("\r", "\n").splitlines() if line]
    names = ("prior", "decoder", "upsampler 256", "upsampler 1024")
    assert {line.split(":")[0] for line in bars} == set(names), "only progress bars, one for each stage"
    with Image.open(out) as image:
        assert image.size == (1024, 1024) and image.mode == "RGB"
        facts = {"prompt": "a ring", "seed": "5", "model": str(tiny_folder), "version": __version__}
        assert stated(image) == facts | {"digital_source_type": "trainedAlgorithmicMedia"}
        before = image.tobytes()
    code, said, error = command(*words)
    assert code == 2 and said == "" and "--force" in error and len(error.splitlines()) == 1
    assert command(*words, "--force")[0] == 0
    with Image.open(out) as image:
        assert image.tobytes() == before


def test_no_metadata_leaves_out_all_but_that_it_is_synthetic(command, tiny_folder, tmp_path):
    words = ["generate", "a ring", "--model", tiny_folder, "--out", tmp_path / "ring.png", "--size", 64, "--steps", 2]
    assert command(*words, "--no-metadata")[0] == 0
    with Image.open(tmp_path / "ring.png") as image:
        assert stated(image) == {"digital_source_type": "trainedAlgorithmicMedia"}
    (tmp_path / "prompts.txt").write_text("a ring\n")
    code, _, error = command("generate", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "many", "--no-metadata")
    assert code == 2 and "--no-metadata goes with PROMPT" in error


def test_several_prompts_and_seeds_go_to_a_folder(command, tiny_folder, tmp_path):
    code, said, error = command(
        *("generate", "a ring", "Zwei  Sterne!", "--num-images", 2, "--size", 64, "--out", tmp_path),
        *("--model", tiny_folder, "--dtype", "fp32", "--device", "cpu", "--steps", 2, "--guidance", 1.5),
        *("--prior-steps", 2, "--prior-guidance", 1.0, "--transparent"),
    )
    assert code == 0, error
    names = ["a-ring-0.png", "a-ring-1.png", "zwei-sterne-0.png", "zwei-sterne-1.png"]
    assert said.splitlines() == [str(tmp_path / n) for n in names]
    pixels = {Image.open(tmp_path / n).tobytes() for n in names}
    assert len(pixels) == 4
    assert {Image.open(tmp_path / n).mode for n in names} == {"RGBA"}


def test_a_profile_is_a_table_and_the_images_are_the_same(command, tiny_folder, tmp_path):
    words = ("generate", "a ring", "--size", 256, "--model", tiny_folder, "--guidance-interval", 0.1, 0.9)
    assert command(*words, "--out", tmp_path / "plain.png")[0] == 0
    code, said, error = command(*words, "--low-memory", "--profile", "--out", tmp_path / "watched.png")
    assert code == 0 and said == f"{tmp_path / 'watched.png'}\n"
    watched, plain = (np.array(Image.open(tmp_path / name)).astype(int) for name in ("watched.png", "plain.png"))
    assert abs(watched - plain).max() <= 1
    lines = error.splitlines()
    rows = lines[next(n for n, line in enumerate(lines) if line.startswith("stage ")) + 1 :]
    assert [row.split()[0] for row in rows] == ["text_encoder", "prior", "decoder", "upsampler_256", "all", "peak:"]
    assert all(float(row.split()[1]) > 0 and row.endswith("%") for row in rows[:-1])
    assert f"GFLOP/s in {str(fast_dtype('cpu')).removeprefix('torch.')}" in rows[-1]


def test_version(run):
    result = run("-m", "unclip", "--version")
    assert result.returncode == 0 and result.stdout.strip() == __version__


BAD = [
    (["generate", ""], "prompt is empty"),
    (["generate", "a \udcff ring"], "no text in UTF-8: 'a \\udcff ring'"),
    (["generate"], "PROMPT"),
    (["generate", "a ring", "--size", "100"], "64, 256, 1024, got 100"),
    (["generate", "a ring", "--size", "big"], "big"),
    (["generate", "a ring", "--steps", "0"], "got 0"),
    (["generate", "a ring", "--guidance", "-2"], "got -2.0"),
    (["generate", "a ring", "--guidance", "nan"], "got nan"),
    (["generate", "a ring", "--guidance-interval", "0.9", "0.1"], "got (0.9, 0.1)"),
    (["generate", "--prompts", "{file}", "--profile"], "--profile goes with PROMPT"),
    (["generate", "a ring", "--num-images", "0"], "got 1 x 0"),
    (["generate", "a ring", "--num-images", "10001"], "got 1 x 10001"),
    (["generate", "a ring", "--seed", "-1"], "got -1"),
    (["generate", "a ring", "--dtype", "int8"], "got 'int8'"),
    (["generate", "a ring", "--device", "tpu9"], "'tpu9' cannot be used"),
    (["generate", "a ring", "--device", "cuda:99"], "'cuda:99' cannot be used"),
    (["generate", "a ring", "--out", "ring.jpg"], "ring.jpg must end in .png"),
    (["generate", "a ring", "a star", "--out", "ring.png"], "2 images"),
    (["generate", "a ring", "--out", "{file}/ring.png"], "cannot write to"),
    (["generate", "a ring", "--out", "/proc/ring.png"], "cannot write to /proc: No such file or directory"),
    (["generate", "a ring", "--model", "nonsense"], "unknown model 'nonsense'"),
    (["generate", "a ring", "--modle", "x"], "--modle"),
    (["generat"], "generat"),
    (["train", "nowhere.yaml"], "no configuration at nowhere.yaml"),
    (["train", "."], "no configuration at ."),
    (["train", "{file}"], "file must hold a mapping, not str"),
    (["export", "a"], "at least one run"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tiny_folder, tmp_path, monkeypatch, capsys):
    """In this process, through the same `main` that the command calls: twenty processes would only import torch again."""
    from unclip.cli import main

    file = tmp_path / "file"
    file.write_text("not a folder")
    arguments = [a.format(file=file) for a in arguments]
    if arguments[0] == "generate" and "--model" not in arguments:
        arguments += ["--model", str(tiny_folder)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["unclip", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    printed = capsys.readouterr()
    assert caught.value.code == 2, printed
    assert printed.out == ""
    assert message in printed.err and len(printed.err.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("words", [("data", "emoji"), ("evaluate", "emoji")])
def test_a_missing_extra_is_named(words, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    said = "error: this needs resvg_py; install it with: pip install 'unclip[train]'\n"
    assert command(*words) == (2, "", said)


def test_a_missing_extra_is_named_where_it_is_imported_first(run, tmp_path):
    words = ["train", "tiny/clip", f"output_dir={tmp_path / 'run'}"]  # its first caption imports inflect
    script = f"import sys; sys.modules['inflect'] = None; sys.argv[1:] = {words}; import unclip.__main__"
    result = run("-c", script + "; unclip.__main__.main()")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.splitlines()[-1] == "error: this needs inflect; install it with: pip install 'unclip[train]'"


def test_a_full_gpu_is_one_line(command, monkeypatch):
    def full(**_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nOf these…")

    monkeypatch.setattr("unclip.cli.app", full)
    code, out, said = command("train", "tiny/clip")
    assert code == 1 and out == "" and said.count("\n") == 1
    assert said.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB. (a smaller batch_size")


def test_a_mistake_in_a_process_shows_no_traceback(run, tmp_path):
    result = run("-m", "unclip", "generate", "a ring", "--model", tmp_path / "nowhere")
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "Traceback" not in result.stderr


def test_export_takes_the_mean_of_a_component(command, tiny_folder, tmp_path):
    from unclip import UnCLIPPipeline

    other = UnCLIPPipeline.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        for n, weight in enumerate(other.prior.parameters()):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(n)))
    other.save_pretrained(tmp_path / "other")
    code, _, error = command("export", tiny_folder, tmp_path / "other", tmp_path / "pipe", "--mean", "prior")
    assert code == 0, error
    mean, one = (UnCLIPPipeline.from_pretrained(f, dtype=torch.float32) for f in (tmp_path / "pipe", tiny_folder))
    for key, value in mean.prior.state_dict().items():
        between = (one.prior.state_dict()[key] + other.prior.state_dict()[key]) / 2
        torch.testing.assert_close(value, between, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(mean.decoder.state_dict(), one.decoder.state_dict(), atol=2e-3, rtol=1e-3)
    for wrong, message in (("decoderr", "of decoderr needs two runs"), ("prior_scheduler", "networks of the same shape")):
        code, _, error = command("export", tiny_folder, tmp_path / "other", tmp_path / "none", "--mean", wrong)
        assert code == 2 and message in error and len(error.splitlines()) == 1 and not (tmp_path / "none").exists()


def test_export_makes_a_pipeline_of_components(command, tiny_folder, tmp_path):
    from unclip import UnCLIPPipeline

    out = tmp_path / "pipe"
    code, said, error = command("export", tiny_folder, out)
    assert code == 0 and said == f"{out}\n", error
    weights = out / "decoder" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 0.6 * (tiny_folder / "decoder" / weights.name).stat().st_size  # fp16
    ours, theirs = (UnCLIPPipeline.from_pretrained(f, dtype=torch.float32) for f in (out, tiny_folder))
    assert ours.config.defaults == theirs.config.defaults
    assert json.loads((out / "model_index.json").read_text())["_unclip_version"] == __version__
    for name, value in ours.decoder.state_dict().items():
        assert torch.equal(value, theirs.decoder.state_dict()[name].half().float())
    assert command("export", tiny_folder, out)[0] == 2
    for default in ("decoder_guidance_scale=high", "decoder_guidance_scale=-1", "prior_candidates=0"):
        code, _, error = command("export", out, out, "--force", "--default", default)
        assert code == 2 and "must be a" in error and repr(default.split("=")[1]).strip("'") in error
    assert command("export", out, out, "--force", "--default", "decoder_guidance_scale=1.5")[0] == 0
    changed = UnCLIPPipeline.from_pretrained(out).config.defaults
    assert changed == theirs.config.defaults | {"decoder_guidance_scale": 1.5}
