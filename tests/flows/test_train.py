"""`train` where it is not one process on this machine: a worker of a Ray cluster, and several processes beside each other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flows.parameters import Generation, Learning, Workers
from flows.train import train
from tasks.adapters import Lora, load_card, read_adapter
from tasks.store import Store, layout
from tests.drawn_pictures import png
from tests.flows.conftest import MODEL, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FEW_STEPS = "steps=6, rank=4, checkpoint_every=3"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A Kohya dataset file of six pictures, four a batch: the second of two batches is a smaller one."""
    for number in range(6):
        (tmp_path / "pictures" / f"{number}.png").parent.mkdir(exist_ok=True)
        (tmp_path / "pictures" / f"{number}.png").write_bytes(png(64, 64))
        (tmp_path / "pictures" / f"{number}.txt").write_text(f"picture {number}")
    file = tmp_path / "pictures.toml"
    file.write_text(
        '[[datasets]]\nresolution = 64\nbatch_size = 4\n[[datasets.subsets]]\nimage_dir = "pictures"\ncaption_extension = ".txt"\n'
    )
    return file


def weights(store: Store, digest: str) -> Lora:
    found = read_adapter(store.path(layout.adapter(digest)))
    assert isinstance(found, Lora)
    return found


def test_two_processes_learn_what_one_does(dataset: Path, tmp_path: Path) -> None:
    """`accelerate launch` gives each its part of every batch; what is summed is rounded otherwise, and nothing else differs."""

    def learnt(processes: int) -> Lora:
        launch = ["--cpu", "--num_processes", str(processes), "--num_cpu_threads_per_process", "1"]
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *launch,
            "-m",
            "flows.cli",
            "train",
            str(dataset),
        ]
        command += ["--model", MODEL, "--store", str(tmp_path / str(processes))]
        for option in FEW_STEPS.split(", "):
            command += ["-o", option]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        store = Store(tmp_path / str(processes))
        (digest,) = {key.split("/")[1] for key in store.list(layout.ADAPTERS)}
        assert done.stdout.count("Darkroom training") == 1  # one process tells
        return weights(store, digest)

    one, two = learnt(1), learnt(2)
    assert one.modules == two.modules
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(two.tensors[name], tensor, rtol=1e-2, atol=2e-4)
    assert any(tensor.any() for name, tensor in one.tensors.items() if "lora_B" in name)


def test_a_cluster_learns_from_files_named_as_here(
    prefect_api: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("prefect_ray")
    from tests.ray_cluster import ray_cluster

    monkeypatch.chdir(tmp_path)
    with ray_cluster(nodes=1) as cluster:
        done = train(
            sources=["pictures.toml"],
            store="results",
            generation=Generation(model=MODEL),
            learning=Learning(options=FEW_STEPS),
            workers=Workers(runner="ray", address=cluster.address, gpus=0),
        )
    card = load_card(Store(tmp_path / "results"), done.adapter)
    assert (card["images"], card["steps"]) == (6, 6)
