"""What SDXL is told of where pixels were."""

from tasks.trainers.batches import Item, View
from tasks.trainers.student import Place
from tests.drawn_pictures import picture


def test_a_mirrored_crop_is_told_as_it_lies_in_the_mirrored_picture() -> None:
    """As Kohya and diffusers' SDXL script: the picture is mirrored first, so to speak, and cropped then."""
    shown = picture("x", 100, 60)
    straight, mirrored = (Item(shown, "", View((50, 30), (4, 2, 34, 30), flip=flip), False) for flip in (False, True))
    assert Place.of(straight) == Place((60, 100), (2, 4), (28, 30))
    assert Place.of(mirrored) == Place((60, 100), (2, 50 - 34), (28, 30))
