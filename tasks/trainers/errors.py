"""What may go wrong in a training."""

from tasks.errors import DarkroomError


class TrainingError(DarkroomError):
    """The model, the datasets and the settings do not go together."""


class Diverged(TrainingError):
    """The loss is no number any more, or far above where it began."""


class PictureError(DarkroomError):
    """There is nothing to learn from, or a picture cannot be read."""
