"""What may go wrong in a training."""

from pathlib import Path

from tasks.errors import DarkroomError


class TrainingError(DarkroomError):
    """The model, the datasets and the settings do not go together."""


class NoTarget(TrainingError):
    """A LoRA is to be put on modules that are not there."""

    def __init__(self, targets: str, denoiser: str, model: Path):
        super().__init__(
            f"targets '{targets}' fit no module of the {denoiser} of {model}: give attention, wide, or ends of names, such as to_q, to_v"
        )


class Diverged(TrainingError):
    """The loss is no number any more, or far above where it began."""


class PictureError(DarkroomError):
    """There is nothing to learn from, or a picture cannot be read."""
