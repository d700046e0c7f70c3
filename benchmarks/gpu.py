"""What the engine makes of a GPU: images per second and TFLOP/s in the shapes of SDXL, SD 1.5 and Flux, side by side:

(a) the plain call of the library's documentation, `pipe(prompt)` in bfloat16, one image at a time;
(b) Darkroom's engine, one measure added at a time: a whole batch, weights laid out channels-last, embeddings encoded once,
    compiled blocks, guidance for part of the steps (which changes images; a recipe says so).

Weights are random and made on the device, nothing is downloaded and nothing but configurations written: times do not depend on
what images show. (a) and (b) use the same pipeline, sampler (euler) and number of steps; each is called once before the clock
starts. TFLOP/s counts the UNet or transformer alone, over the time of the whole call.

It needs the wheels torch (with Triton, and gcc on the machine, to compile), diffusers, transformers, safetensors, tokenizers
and numpy; neither Prefect nor polars nor OpenCLIP.

    python benchmarks/gpu.py [--models sdxl,sd15,flux] [--steps 30] [--batch 8] [--calls 2] [--eager] [--tiny]

`--tiny` runs all of it with models of a few thousand weights, also without a GPU, to see that it works. The last line is JSON.
"""

import sys

sys.path.pop(0)  # this folder, where the standard library would find our select.py for its own module
sys.path.insert(0, __file__.rsplit("/", 2)[0])  # the machine may have Darkroom's files, not installed

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import tasks.engines.diffusers as engine_module
from tasks.engines import Order, Recipe
from tasks.engines import models as models_module
from tasks.engines.decoding import synchronise
from tasks.engines.models import ModelFolder, default_recipe, guided_steps
from tasks.engines.samplers import build_sampler
from tasks.engines.speed import channels_last, denoiser
from tasks.model_thread import on_model_thread
from tests.tiny_pipelines import TINY, clip_tokenizer, t5_tokenizer

GUIDANCE_UNTIL = 0.6
SIDES = {"sdxl": 1024, "sd15": 512, "flux": 1024}  # pixels
# images/s that others have published, for people to compare: other machines, versions and sometimes steps
PUBLISHED = {
    "sdxl": "30 steps: H100 0.40, with TensorRT 0.68; A100 0.27, with TensorRT 0.36",
    "sd15": "50 steps: A100 0.63, compiled and channels-last 0.94",
    "flux": "none that is comparable",
}


# --- models in their published shapes, with random weights -----------------------------------------------------------


def _clip(hidden: int, layers: int, heads: int, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=514,  # the tokens of our own tokenizer, which reads byte by byte
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        projection_dim=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _vae(**more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        **more,
    )


def _sdxl() -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return {
        "unet": unet,
        "vae": _vae(scaling_factor=0.13025, sample_size=1024),
        "text_encoder": _clip(768, 12, 12),
        "text_encoder_2": _clip(1280, 32, 20, projection=True),
    }


def _sd15() -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)  # its defaults are SD's
    return {"unet": unet, "vae": _vae(sample_size=512), "text_encoder": _clip(768, 12, 12)}


def _flux() -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    t5 = T5Config(
        vocab_size=64,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return {
        "transformer": FluxTransformer2DModel(guidance_embeds=True),  # its defaults are those of FLUX.1
        "vae": _vae(
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "text_encoder": _clip(768, 12, 12),
        "text_encoder_2": T5EncoderModel(t5),
    }


COMPONENTS: dict[str, Callable[[], dict[str, Any]]] = {"sdxl": _sdxl, "sd15": _sd15, "flux": _flux}


@contextmanager
def _made_on(device: str) -> Iterator[None]:
    """New weights come into being on the device in bfloat16: 12 billion of them in a second."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def components(shape: str, device: str) -> dict[str, Any]:
    """The networks of a model by their names in its pipeline, in bfloat16 with random weights, ready to be called."""
    with _made_on(device):
        torch.manual_seed(0)
        return {name: module.eval() for name, module in COMPONENTS[shape]().items()}


def build(shape: str, folder: Path, device: str) -> Any:
    """A pipeline; its configurations and tokenizers are saved in the folder, as the engine reads them."""
    import diffusers

    networks = components(shape, device)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if shape == "flux":
        pipeline = diffusers.FluxPipeline(
            **networks,
            tokenizer=clip_tokenizer(),
            tokenizer_2=t5_tokenizer(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        )
    else:
        scheduler = diffusers.EulerDiscreteScheduler(**schedule, steps_offset=1)
        if shape == "sdxl":
            pipeline = diffusers.StableDiffusionXLPipeline(
                **networks,
                tokenizer=clip_tokenizer(),
                tokenizer_2=clip_tokenizer(),
                scheduler=scheduler,
                add_watermarker=False,
            )
        else:
            pipeline = diffusers.StableDiffusionPipeline(
                **networks,
                tokenizer=clip_tokenizer(),
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
    pipeline.save_config(folder)
    for name, component in pipeline.components.items():
        if name in networks and hasattr(component, "save_config"):
            component.save_config(folder / name)
        elif name.startswith(("tokenizer", "scheduler")):
            component.save_pretrained(folder / name)
    return pipeline


def build_tiny(shape: str, folder: Path, device: str) -> Any:
    import diffusers

    return diffusers.AutoPipelineForText2Image.from_pretrained(TINY[shape](folder)).to(device)


# --- measuring -------------------------------------------------------------------------------------------------------


def rate(call: Callable[[], int], device: str, calls: int) -> float:
    """Images per second of a call that returns how many it made; it has been called before."""
    synchronise(device)
    started, images = time.perf_counter(), 0
    for _ in range(calls):
        images += call()
    synchronise(device)
    return images / (time.perf_counter() - started)


def flops_per_step(pipeline: Any, run_one_step: Callable[[], Any]) -> int:
    """Floating-point operations that the UNet or transformer takes for one step of one image, guidance included."""
    from torch.utils.flop_counter import FlopCounterMode

    model, seen = denoiser(pipeline), []
    hook = model.register_forward_pre_hook(lambda _m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    run_one_step()
    hook.remove()
    args, kwargs = seen[0]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return counter.get_total_flops()


def open_engine(folder: Path, pipeline: Any, dtype: str, batch: int) -> Any:
    """The engine around a pipeline that is there already. Random weights are worth neither storing nor a digest."""
    engine_module._load = lambda _folder, _dtype: pipeline
    engine_module.model_digest = models_module.model_digest = lambda _folder: "0" * 32
    return engine_module.DiffusersEngine(str(folder), dtype, batch)


def measures(recipe: Recipe, pipeline: Any, device: str, eager: bool) -> Iterator[tuple[str, Recipe, bool]]:
    """Name, recipe, and whether embeddings are kept, of each row of (b); each has what those before it have."""
    unet = getattr(pipeline, "unet", None)
    for module in (unet, pipeline.vae):  # as loaded; the engine would have changed it
        if module is not None:
            module.to(memory_format=torch.contiguous_format)
    yield "batch", recipe, False
    channels_last(pipeline)
    yield "channels_last", recipe, False
    yield "embeddings", recipe, True
    if unet is None and device == "cuda":
        recipe = replace(recipe, attention="_native_cudnn")
        yield "attention", recipe, True
    if not eager:
        recipe = replace(recipe, compiled=True)
        yield "compiled", recipe, True
    if unet is not None:
        yield "guidance_until", replace(recipe, guidance_until=GUIDANCE_UNTIL), True


@on_model_thread  # for all: with two threads, OpenMP would slow every one of them down on a CPU
def measure(shape: str, options: argparse.Namespace, device: str) -> dict[str, Any]:
    """All figures of a model, named `<shape>_<row>_…`."""
    side, dtype = (16, "float32") if options.tiny else (SIDES[shape], "bfloat16")
    size, found = {"width": side, "height": side}, {}
    warm = min(options.steps, 4)  # steps of a first call: as many shapes as in a longer one
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / shape
        pipeline = (build_tiny if options.tiny else build)(shape, folder, device)
        pipeline.set_progress_bar_config(disable=True)
        open_engine_at = folder, pipeline, dtype, options.batch
        pipeline.scheduler = build_sampler("euler", ModelFolder(folder).scheduler)

        def plain(steps: int) -> int:
            return len(pipeline("a harbour at dawn", num_inference_steps=steps, **size).images)

        step = flops_per_step(pipeline, lambda: plain(1))
        plain(warm)
        base = rate(lambda: plain(options.steps), device, options.calls)
        report(shape, "plain", found, base, base, step * options.steps)

        engine = open_engine(*open_engine_at)
        recipe = default_recipe(str(folder), sampler="euler", steps=options.steps, dtype=dtype, **size)
        orders = [Order(f"a harbour at dawn, number {i}", "", i) for i in range(options.batch)]
        for name, asked, keeps in measures(recipe, pipeline, device, options.eager):

            def made(steps: int, asked: Recipe = asked, keeps: bool = keeps) -> int:
                if not keeps:
                    engine._texts._known.clear()
                images = engine.generate(orders, replace(asked, steps=steps))
                found[f"{shape}_batch"] = images.batch
                return len(images.pixels)

            made(warm)
            guided = guided_steps(options.steps, asked.guidance_until)
            work = step * (guided + (options.steps - guided) / 2)  # without guidance a step is half the work
            report(shape, name, found, rate(lambda: made(options.steps), device, options.calls), base, work)
    found[f"{shape}_teraflop_per_image"] = round(step * options.steps / 1e12, 6)
    return found


def report(shape: str, name: str, found: dict[str, Any], images: float, base: float, flops: float) -> None:
    """Print a row and note its figures."""
    found |= {
        f"{shape}_{name}_images_per_second": float(f"{images:.4g}"),
        f"{shape}_{name}_teraflops": float(f"{images * flops / 1e12:.4g}"),
        f"{shape}_{name}_ratio": round(images / base, 3),
    }
    row = f"{shape:>5}  {name:<15} {images:8.3f} images/s  {images * flops / 1e12:8.2f} TFLOP/s  × {images / base:.2f}"
    print(row, flush=True)


def main() -> None:
    import diffusers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="sdxl,sd15,flux", help="any of sdxl, sd15, flux, separated by commas")
    parser.add_argument("--steps", type=int, default=30, help="sampling steps, at least 4")
    parser.add_argument("--batch", type=int, default=8, help="images per call of (b)")
    parser.add_argument("--calls", type=int, default=2, help="timed calls of each row")
    parser.add_argument("--eager", action="store_true", help="leave the compiled row out")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand weights")
    options = parser.parse_args()
    shapes = options.models.split(",")
    if set(shapes) - set(COMPONENTS) or options.steps < 4:
        parser.error("--models: any of sdxl, sd15, flux; --steps: at least 4")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("there is no GPU: this would take hours; --tiny shows that the script works")
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, diffusers {diffusers.__version__}, {options.steps} steps", flush=True)

    figures: dict[str, Any] = {}
    for shape in shapes:
        started = time.perf_counter()
        figures |= measure(shape, options, device)
        figures[f"{shape}_seconds"] = round(time.perf_counter() - started, 1)
        print(f"{shape:>5}  published, images/s, {PUBLISHED[shape]}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    about = {"device": name, "torch": torch.__version__, "diffusers": diffusers.__version__, "steps": options.steps}
    print(json.dumps({**about, "tiny": options.tiny, **figures}))


if __name__ == "__main__":
    main()
