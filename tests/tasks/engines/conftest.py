from collections.abc import Callable, Iterator

import pytest

from tests.tiny_pipelines import TINY

Models = Callable[[str], str]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower with more, by far on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The folder of a tiny model by its shape's name."""
    root = tmp_path_factory.mktemp("models")

    def folder(shape: str) -> str:
        return str(root / shape if (root / shape).exists() else TINY[shape](root / shape))

    return folder
