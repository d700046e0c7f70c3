"""The benchmark of the engine on a GPU, as far as a machine without one can tell that it will run."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.engines.models import ModelFolder

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
ROWS = ("plain", "batch", "channels_last", "embeddings")


@pytest.mark.slow
def test_it_runs_with_tiny_models_and_without_what_the_engine_does_not_need() -> None:
    code = f"""
import runpy, sys
for name in ("polars", "polars_hash", "prefect", "open_clip"):
    sys.modules[name] = None
sys.argv = ["gpu.py", "--tiny", "--eager", "--steps", "5", "--batch", "2", "--calls", "1"]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    figures = json.loads(printed.splitlines()[-1])
    for shape in ("sdxl", "sd15", "flux"):
        rows = ROWS if shape == "flux" else (*ROWS, "guidance_until")
        for row in rows:
            assert figures[f"{shape}_{row}_images_per_second"] > 0
            assert figures[f"{shape}_{row}_teraflops"] > 0
            assert figures[f"{shape}_{row}_ratio"] > 0
        assert figures[f"{shape}_plain_ratio"] == 1
        assert figures[f"{shape}_batch"] == 2
        assert figures[f"{shape}_teraflop_per_image"] > 0
    assert (figures["tiny"], figures["steps"]) == (True, 5)


SIZES = {  # millions of weights
    "sdxl": {"unet": 2567.5, "vae": 83.7},
    "sd15": {"unet": 859.5, "vae": 83.7},
    "flux": {"transformer": 11901.4, "text_encoder_2": 4762.3 - 131.3},  # without T5's words, of which ours has few
}


@pytest.mark.parametrize(("shape", "side"), [("sdxl", 1024), ("sd15", 512), ("flux", 1024)])
def test_the_models_have_their_published_shapes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shape: str, side: int
) -> None:
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # whose first entry the script takes away
    pipeline = runpy.run_path(str(SCRIPT))["build"](shape, tmp_path / shape, "meta")
    for network, millions in SIZES[shape].items():
        weights = sum(parameter.numel() for parameter in getattr(pipeline, network).parameters())
        assert weights / 1e6 == pytest.approx(millions, rel=0.001)
    folder = ModelFolder(tmp_path / shape)
    assert folder.size == (side, side)
    assert folder.defaults.guidance > 1
    assert not [*folder.path.rglob("*.safetensors")]
