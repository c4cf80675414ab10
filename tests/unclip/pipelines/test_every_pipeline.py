"""What diffusers' own test mixin asks of any pipeline, asked of each of ours, over our networks and over Karlo's layout."""

import pytest
import torch
from drawing import answer, close

from unclip import UnCLIPImageVariationPipeline, UnCLIPInterpolationPipeline

FLOAT8 = torch.float8_e4m3fn


def first(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else next(iter(output.values()))


def test_saved_equals_loaded(every, tmp_path):
    every.to(torch.float64).save_pretrained(tmp_path / "saved")
    again = type(every).from_pretrained(tmp_path / "saved", dtype=torch.float64)
    again.set_progress_bar_config(disable=True)
    close(first(answer(again)), first(answer(every)))
    assert {n for n, c in again.components.items() if c is None} == {n for n, c in every.components.items() if c is None}


def test_components_make_the_pipeline_again(every):
    again = type(every)(**every.components, defaults=every.config.defaults).to(torch.float32)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(first(answer(again)), first(answer(every)))


def test_dict_and_tuple_outputs_are_one(every):
    assert torch.equal(first(answer(every, return_dict=False)), first(answer(every)))


def test_callbacks_name_the_stage_and_end_the_call(every):
    seen = []

    def note(pipe, step, timestep, given):
        seen.append((pipe.stage, step, given["latents"].isfinite().all().item()))
        pipe._interrupt = len(seen) == 2
        return {}

    answer(every, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["latents"])
    assert [s[1:] for s in seen] == [(0, True), (1, True)] and seen[0][0] == seen[1][0] and every.stage is None
    with pytest.raises(ValueError, match="latents or pred_original_sample, not 'prompt_embeds'"):
        answer(every, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["prompt_embeds"])


@pytest.mark.parametrize("output_type", ["pil", "pt"])
def test_interrupted_a_call_answers_with_the_images_that_it_began(every, output_type):
    """None of them before the decoder; in it, as far as it got."""
    if not every.sizes:
        pytest.skip("no images")
    inverting = {UnCLIPImageVariationPipeline: {"eta": 0.5}, UnCLIPInterpolationPipeline: {"noise": "interpolated"}}
    settings = {"output_type": output_type, **inverting.get(type(every), {})}
    seen = []

    def end_in(stage: str):
        def callback(pipe, step, timestep, given):
            seen.append(pipe.stage)
            pipe._interrupt = pipe.stage == stage

        return callback

    answer(every, callback_on_step_end=end_in("none"), **settings)
    for stage in dict.fromkeys(seen[: seen.index("decoder") + 1]):
        seen.clear()
        images = answer(every, callback_on_step_end=end_in(stage), **settings).images
        assert seen.count(stage) == 1 and seen[-1] == stage, "nothing runs after that step"
        sizes = {i.size if output_type == "pil" else tuple(i.shape[1:]) for i in images}
        assert sizes == ({(every.sizes[0],) * 2} if stage == "decoder" else set())


def test_every_network_is_in_the_offload_sequence(every):
    networks = {n for n, c in every.components.items() if isinstance(c, torch.nn.Module)}
    sequence = every.model_cpu_offload_seq.split("->")
    assert networks <= set(sequence) <= set(type(every).component_names())


def test_progress_bars_can_be_silenced(every, capsys):
    answer(every)
    assert capsys.readouterr().err == ""
    every.set_progress_bar_config(disable=False)
    answer(every)
    assert "/" in capsys.readouterr().err


def test_a_dtype_for_each_component(every, tmp_path):
    """And the stages hand over to each other in each one's own."""
    every.save_pretrained(tmp_path / "saved")
    for name in ("text_encoder", "decoder"):
        if name not in every.components:
            continue
        mixed = type(every).from_pretrained(tmp_path / "saved", dtype={name: torch.float64, "default": torch.float32})
        mixed.set_progress_bar_config(disable=True)
        found = {n: c.dtype for n, c in mixed.components.items() if isinstance(c, torch.nn.Module)}
        assert found.pop(name) == torch.float64 and set(found.values()) <= {torch.float32}
        assert first(answer(mixed)).isfinite().all()


def test_weights_kept_in_eight_bits(every):
    """Layerwise casting: a layer's weights are stored in float8 and computed with in float32."""
    network = "decoder" if "decoder" in every.components else "prior"
    exact = first(answer(every))
    getattr(every, network).enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=torch.float32)
    stored = {p.dtype for p in getattr(every, network).parameters()}
    assert FLOAT8 in stored
    rough = first(answer(every))
    assert rough.isfinite().all() and not torch.equal(rough, exact)
    assert {p.dtype for p in getattr(every, network).parameters()} == stored


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["model", "sequential", "group", "resident"])
def test_offloaded_equals_resident(every, way, exact):
    expected = first(answer(every))
    if way == "group":
        every.enable_group_offload(torch.device("cuda"))
    elif way == "resident":
        every.to("cuda")
    else:
        getattr(every, f"enable_{way}_cpu_offload")(device="cuda")
    close(first(answer(every)).cpu(), expected, 2e-2)
    if way == "model":
        assert {c.device.type for c in every.components.values() if isinstance(c, torch.nn.Module)} == {"cpu"}
