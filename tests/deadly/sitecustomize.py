"""Put on a worker's PYTHONPATH: making certain prompts kills the process, as a driver's or a library's crash does.

`DARKROOM_TEST_DEADLY`: prompts, one a line. `DARKROOM_TEST_LOADS`: a file that gets a line for each model that is loaded.
Python imports this module at start; nothing heavy is imported until Darkroom imports it itself.
"""

import os
import signal
import sys

LOADERS = {"tasks.engines": "_open", "tasks.scorers": "_opened"}


class _Patch:
    """Wraps what loads the models, once the modules are imported."""

    def find_spec(self, name, path=None, target=None):
        if name not in LOADERS:
            return None
        sys.meta_path.remove(self)
        try:
            import importlib.util

            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _wrap(module, LOADERS[name])

        spec.loader.exec_module = exec_module
        return spec


def _wrap(module, name):
    import functools

    load = getattr(module, name).__wrapped__

    @functools.lru_cache(maxsize=1)
    def loading(*args):
        model = load(*args)
        with open(os.environ["DARKROOM_TEST_LOADS"], "a") as file:
            file.write(f"{module.__name__} {os.getpid()}\n")
        if module.__name__ == "tasks.engines":
            _arm(model)
        return model

    setattr(module, name, loading)


def _arm(engine):
    deadly = set(filter(None, os.environ.get("DARKROOM_TEST_DEADLY", "").splitlines()))
    generate = engine.generate

    def armed(orders, recipe):
        if any(order.prompt in deadly for order in orders):
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(orders, recipe)

    engine.generate = armed


if "DARKROOM_TEST_LOADS" in os.environ:
    sys.meta_path.insert(0, _Patch())
