"""Images of a training's sample prompts, as its model is now: to look at, beside the loss."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tasks.engines.decoding import quantised
from tasks.engines.samplers import build_sampler
from tasks.store import Store
from tasks.store.images import plain_png
from tasks.trainers.seeds import mixed
from tasks.trainers.settings import Settings
from tasks.trainers.student import Student


def make(
    student: Student, settings: Settings, size: tuple[int, int], store: Store, key: Callable[[int], str]
) -> tuple[tuple[str, str], ...]:
    """Prompts and keys of images of about `size` (width, height), made as the model makes them unless told otherwise, and put at `key`
    of their number. Each begins from the same noise at all checkpoints."""
    pipeline, defaults, multiple = student.pipeline, student.folder.defaults, student.folder.multiple
    width, height = (max(1, side // multiple) * multiple for side in size)
    made = []
    with _at_rest(student), torch.inference_mode():
        for number, prompt in enumerate(settings.samples):
            pipeline.scheduler = build_sampler(defaults.sampler, student.folder.scheduler)
            images = pipeline(
                prompt,
                generator=torch.Generator().manual_seed(mixed(settings.seed, number, 2)),
                num_inference_steps=defaults.steps,
                guidance_scale=defaults.guidance,
                width=width,
                height=height,
                output_type="pt",
            ).images
            store.write(key(number), plain_png(quantised(images)[0]))
            made.append((prompt, key(number)))
    return tuple(made)


@contextmanager
def _at_rest(student: Student) -> Iterator[None]:
    """Without dropout, and not compiled, which would take a minute for the samples' own shape."""
    compiled, student.denoiser._compiled_call_impl = student.denoiser._compiled_call_impl, None
    learning = [module for module in (student.denoiser, *student.clip_encoders.values()) if module.training]
    for module in learning:
        module.eval()
    try:
        yield
    finally:
        student.denoiser._compiled_call_impl = compiled
        for module in learning:
            module.train()
