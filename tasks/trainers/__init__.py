"""Trainers: a model learns from pictures, as a LoRA, by DreamBooth or by textual inversion.

`pictures`, `batches`, `captions`, `buckets`: what is seen at which step; `student`: what a model family needs to be trained;
`losses`: what is predicted; `lora`, `dreambooth`, `textual_inversion`: what learns; `training`, `checkpoints`, `caches`: the loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.trainers.buckets import BucketError
from tasks.trainers.errors import Diverged, NoTarget, PictureError, TrainingError
from tasks.trainers.pictures import Dataset
from tasks.trainers.settings import SPEED_AND_SAFETY, Settings

if TYPE_CHECKING:
    from tasks.adapters import Embeddings, Lora
    from tasks.engines.models import ModelFolder
    from tasks.store import Store
    from tasks.trainers.training import Progress

__all__ = [
    "BucketError",
    "Diverged",
    "PictureError",
    "Settings",
    "Trained",
    "TrainingError",
    "check_fits",
    "train",
    "training_id",
]

READ_BY_CLIP = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")  # and by nothing else


@dataclass(frozen=True)
class Trained:
    """What came of a training."""

    adapter: "Lora | Embeddings"
    training: str  # its id
    prediction_type: str
    dtype: str  # of the frozen weights
    trigger: str  # the word that means what was learnt; empty: none does
    steps: int
    seconds: float  # over all starts
    loss: float  # mean of the latest steps


def train(
    model: str,
    datasets: Sequence[Dataset],
    settings: Settings,
    store: "Store",
    told: "Callable[[Progress], None]" = lambda progress: None,
) -> Trained:
    """Train a diffusers folder or hub name on datasets; `told` hears of each step.

    Checkpoints are in the store, under the training's id: started again with the same model, pictures and settings, it goes on
    where it was. Raises EngineError, TrainingError, Diverged, PictureError.
    """
    from tasks.model_thread import on_model_thread

    return on_model_thread(_train)(model, datasets, settings, store, told)


def _train(
    model: str, datasets: Sequence[Dataset], settings: Settings, store: "Store", told: "Callable[[Progress], None]"
) -> Trained:
    from accelerate import PartialState

    from tasks.engines.diffusers import engine_errors
    from tasks.engines.models import ModelFolder, default_recipe, locate, model_digest, resolve_dtype
    from tasks.engines.speed import compiler_errors
    from tasks.trainers.batches import Batches
    from tasks.trainers.dreambooth import with_class_images
    from tasks.trainers.lora import LoraLearner
    from tasks.trainers.textual_inversion import TextualInversionLearner
    from tasks.trainers.training import Training

    PartialState()  # of several processes each takes its device before it loads a model
    folder, dtype = ModelFolder(locate(model)), resolve_dtype(settings.dtype)
    check_fits(settings, folder)
    if settings.method == "dreambooth":
        width, height = datasets[0].resolution
        recipe = default_recipe(model, width=width, height=height, dtype=dtype)
        datasets = with_class_images(store, recipe, datasets, settings)
    learner = TextualInversionLearner if settings.method == "textual_inversion" else LoraLearner
    named = training_id(model_digest(folder.path), datasets, settings, dtype)
    batches = Batches(datasets, settings.seed, folder.multiple)
    with engine_errors(model), compiler_errors(model, settings.compiled):
        training = Training(named, folder, batches, learner, settings, dtype, store)
        try:
            training.run(told)
            record, loss, trigger = training.record, training.loss, training.trigger
            adapter, prediction = training.adapter(), training.prediction_type
            return Trained(adapter, named, prediction, dtype, trigger, record.step, record.seconds, loss)
        finally:
            training.close()


def check_fits(settings: Settings, folder: "ModelFolder") -> None:
    """Raises TrainingError: a model of this kind cannot learn like that. Reads configurations and headers of files only."""
    from tasks.adapters.fitting import shapes_of_folder

    if settings.method == "textual_inversion" and folder.pipeline not in READ_BY_CLIP:
        raise TrainingError(
            f"{folder.path} is a {folder.pipeline}, whose prompts are read by more than CLIP: a textual inversion can be learnt by "
            f"{' and '.join(READ_BY_CLIP)}; train a LoRA (method=lora)"
        )
    if settings.min_snr_gamma and folder.scheduler["_class_name"].startswith("FlowMatch"):
        raise TrainingError(
            "min_snr_gamma is for models with a noise schedule, and this one is trained by flow matching: leave it 0"
        )
    modules = shapes_of_folder(folder, [folder.denoiser])
    # where files tell of no modules, whoever loads them does
    if settings.method != "textual_inversion" and modules and not any(map(settings.aims_at, modules[folder.denoiser])):
        raise NoTarget(settings.targets, folder.denoiser, folder.path)


def training_id(base_digest: str, datasets: Sequence[Dataset], settings: Settings, dtype: str) -> str:
    """The digest, 32 hexadecimal digits, of all that decides the weights: base, pictures, captions, options, settings, precision."""
    from tasks.identity import digest

    def told(value: Any) -> Any:
        return value if isinstance(value, str | int | float | bool | None) else list(value)

    def of_dataset(dataset: Dataset) -> dict[str, Any]:
        options = {name: told(value) for name, value in vars(dataset).items() if name != "subsets"}
        return options | {"subsets": [of_subset(subset) for subset in dataset.subsets]}

    def of_subset(subset: Any) -> dict[str, Any]:
        options = {name: value for name, value in vars(subset).items() if name != "pictures"}
        pictures = [[picture.id, picture.caption, picture.width, picture.height] for picture in subset.pictures]
        return options | {"pictures": pictures}

    asked = settings.model_dump(mode="json", exclude=set(SPEED_AND_SAFETY))
    return digest(
        {
            "base": base_digest,
            "dtype": dtype,
            "settings": asked | {"alpha": settings.scale},
            "datasets": [of_dataset(dataset) for dataset in datasets],
        }
    )
