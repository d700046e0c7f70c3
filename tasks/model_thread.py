"""One thread for all model calls of a process.

Each thread that calls torch gets a team of OpenMP workers of its own. As soon as there are more of them than cores, they stop
waiting actively for their next piece of work, and small kernels run at half the speed: 16 instead of 33 images/s with
the embedded model on two cores, though only one team is ever at work. So engines and scorers all call their models here.
"""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="models")
_inside = threading.local()


def on_model_thread(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function`, run on the model thread while the caller waits; calls from other threads take turns."""

    @functools.wraps(function)
    def called(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if getattr(_inside, "it", False):
            return function(*args, **kwargs)
        return _executor.submit(_marked, functools.partial(function, *args, **kwargs)).result()

    return called


def _marked(call: Callable[[], Result]) -> Result:
    _inside.it = True
    return call()
