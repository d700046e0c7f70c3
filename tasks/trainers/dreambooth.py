"""DreamBooth (Ruiz et al. 2023): a word for one thing, and images of its class, made by the base model, that keep the class what it was.

The rest is a LoRA: the word stands in each caption, and the class's images count as Kohya's regularisation images do.
"""

from collections.abc import Sequence
from dataclasses import replace

from accelerate import PartialState

from tasks.engines import EngineError, Order, Recipe, close_engine, open_engine
from tasks.identity import digest
from tasks.store import Store, layout
from tasks.store.images import plain_png
from tasks.trainers.pictures import Dataset, Picture, Subset
from tasks.trainers.settings import Settings

BATCH = 8


def with_class_images(store: Store, recipe: Recipe, datasets: Sequence[Dataset], settings: Settings) -> list[Dataset]:
    """The datasets, each with the class's images beside its own; those that have regularisation images already stay as they are.

    The images are made by the engine at the recipe's size, once, and kept in the store; of several processes each makes a share.
    Raises EngineError.
    """
    if not settings.class_images:
        return list(datasets)
    pictures = None
    found = []
    for dataset in datasets:
        if not any(subset.is_reg for subset in dataset.subsets):
            pictures = pictures or _class_pictures(store, recipe, settings)
            dataset = replace(dataset, subsets=(*dataset.subsets, Subset(pictures, is_reg=True)))
        found.append(dataset)
    return found


def _class_pictures(store: Store, recipe: Recipe, settings: Settings) -> tuple[Picture, ...]:
    prompt = settings.class_prompt
    place = digest(["class images", recipe.identity(), prompt, settings.seed])
    keys = [layout.class_image(place, number) for number in range(settings.class_images)]
    processes = PartialState()
    mine = range(processes.process_index, len(keys), processes.num_processes)
    if missing := [number for number in mine if not store.exists(keys[number])]:
        engine = open_engine(recipe.model, recipe.dtype, BATCH)
        engine.prepare([(prompt, "")])
        for start in range(0, len(missing), BATCH):
            some = missing[start : start + BATCH]
            orders = [Order(prompt, "", int(digest([place, number])[:12], 16)) for number in some]
            images = engine.generate(orders, recipe)
            if not images.finite.all():
                raise EngineError(
                    f"model '{recipe.model}' made images of class '{prompt}' that are not finite in {recipe.dtype}: take another "
                    "dtype, such as bfloat16 or float32"
                )
            for number, pixels in zip(some, images.pixels, strict=True):
                store.create(keys[number], plain_png(pixels))
        del engine
        close_engine()  # the model that learns needs its memory
    processes.wait_for_everyone()

    def picture(number: int, key: str) -> Picture:
        return Picture(digest([place, number]), prompt, recipe.width, recipe.height, lambda: store.read(key))

    return tuple(picture(number, key) for number, key in enumerate(keys))
