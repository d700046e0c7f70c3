"""How many images a second a CPU makes alone and beside other busy processes: as torch has its threads wait, asleep, or with one thread.

Threads of OpenMP spin while they wait for each other. Where one of them has to share its core, the others spin until it is scheduled again.

    python benchmarks/busy.py [--rounds 2]
"""

import sys

sys.path.pop(0)  # this folder, where the standard library would find our select.py for its own module

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
WAITING = {
    "torch": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one_thread": {"OMP_NUM_THREADS": "1"},
}
BATCH, BATCHES = 8, 3
OTHERS = (0, 1, 2)  # busy processes beside it


def make() -> float:
    """Images a second of the embedded model, once it is warm."""
    from tasks.engines import Order, open_engine
    from tasks.engines.models import default_recipe

    recipe = default_recipe(str(ROOT / "data/models/tiny-sd"))
    engine = open_engine(recipe.model, recipe.dtype, BATCH)
    orders = [Order("a red circle on a blue background", "", seed) for seed in range(BATCH)]
    engine.prepare([(orders[0].prompt, "")])
    engine.generate(orders, recipe)
    started = time.perf_counter()
    for _ in range(BATCHES):
        engine.generate(orders, recipe)
    return BATCH * BATCHES / (time.perf_counter() - started)


def measured(waiting: dict[str, str]) -> float:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MKL_"))}
    command = [sys.executable, __file__, "--make"]
    return float(subprocess.run(command, env=clean | waiting, check=True, capture_output=True, cwd=ROOT).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        print(make())
        return
    speeds: dict[str, dict[int, list[float]]] = {name: {others: [] for others in OTHERS} for name in WAITING}
    for _ in range(options.rounds):
        for others in OTHERS:
            for name, waiting in WAITING.items():
                busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
                try:
                    speeds[name][others].append(measured(waiting))
                finally:
                    for other in busy:
                        other.kill()
                        other.wait()
    means = {name: {others: statistics.mean(found) for others, found in of.items()} for name, of in speeds.items()}
    print(f"images/s, mean of {options.rounds}, beside so many busy processes on {os.cpu_count()} cores")
    print(f"{'':12}" + "".join(f"{others:8}" for others in OTHERS))
    for name, of in means.items():
        print(f"{name:12}" + "".join(f"{speed:8.2f}" for speed in of.values()))
    ratios = {
        f"passive_beside_{others}": round(means["passive"][others] / means["torch"][others], 2) for others in OTHERS
    }
    print(json.dumps({**ratios, **{name: [round(speed, 2) for speed in of.values()] for name, of in means.items()}}))


if __name__ == "__main__":
    main()
