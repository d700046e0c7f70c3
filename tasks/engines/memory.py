"""When the device's memory is too small: how torch says so, how it is freed, and how many images are decoded at once."""

import gc

# A VAE's decoder holds 256 channels of the full-size image, and torch's upsampling of channels-last images takes less than
# 2³¹ elements (diffusers/issues/3643): 8 images of 1024² are too many. Half of that also halves the peak of memory, and costs
# no time: one image of that size keeps a GPU busy.
DECODED_PIXELS = 4 * 1024 * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that a smaller batch may fit."""
    import torch

    # The other ones are how the CPU's allocator and CUDA's own libraries, which allocate beside torch, say it.
    said = (
        "can't allocate memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
    )
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )


def free_memory() -> None:
    """Give back to the device what nothing holds any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def slice_size(images: int, pixels: int, most: int = DECODED_PIXELS) -> int:
    """How many of the images, of so many pixels each, to decode at once: at least one, and as many in every slice.

    Slices are equal because how an image is rounded depends on how many stand beside it, and shall not depend on its place.
    """
    fitting = [size for size in range(1, images + 1) if images % size == 0 and size * pixels <= most]
    return max(fitting, default=1)
