"""What a caption becomes each time its picture is seen: Kohya's variations, each drawn from a given source of chance.

The order is Kohya's (`BaseDataset.process_caption` of sd-scripts): prefix and suffix are put on, the whole caption may drop out,
then its parts are shuffled and some of them left out. Parts that are kept (`keep_tokens`, or what stands before a separator) neither
move nor drop out. Two things differ: empty parts ("a,,b") are left out, and a `keep_tokens_separator` is never learnt itself.
"""

from random import Random

from tasks.trainers.pictures import Subset

JOINT = ", "  # between the parts of a caption that was taken apart, whatever separated them before: so does Kohya


def vary(caption: str, subset: Subset, epoch: int, chance: Random) -> str:
    """The caption as it is learnt this time. `epoch` counts from 1; equal `chance` gives an equal caption."""
    caption = " ".join(part for part in (subset.caption_prefix, one_line(caption), subset.caption_suffix) if part)
    # drawn first and always, so that whether one caption drops out does not hang on the other options
    dropped = chance.random() < subset.caption_dropout_rate
    every = subset.caption_dropout_every_n_epochs
    if dropped or (every and epoch % every == 0):
        return ""
    kept_by_separator = subset.keep_tokens_separator and subset.keep_tokens_separator in caption
    # where nothing is shuffled Kohya leaves the separator in the caption
    if not (subset.shuffle_caption or subset.caption_tag_dropout_rate or kept_by_separator):
        return caption
    first, free, last = _parts(caption, subset)
    if subset.shuffle_caption:
        chance.shuffle(free)
    free = [part for part in free if chance.random() >= subset.caption_tag_dropout_rate]
    return JOINT.join([*first, *free, *last])


def one_line(caption: str) -> str:
    """The caption without line breaks: every tool reads the first line of a caption file, and only that alike."""
    return " ".join(line.strip() for line in caption.splitlines() if line.strip())


def _parts(caption: str, subset: Subset) -> tuple[list[str], list[str], list[str]]:
    """The parts of a caption that stay first, that move, and that stay last (after a second `keep_tokens_separator`)."""

    def split(text: str) -> list[str]:
        return [part.strip() for part in text.split(subset.caption_separator) if part.strip()]

    if subset.keep_tokens_separator and subset.keep_tokens_separator in caption:
        first, free, *last = caption.split(subset.keep_tokens_separator, 2)
        return split(first), split(free), split(last[0]) if last else []
    parts = split(caption)
    return parts[: subset.keep_tokens], parts[subset.keep_tokens :], []
