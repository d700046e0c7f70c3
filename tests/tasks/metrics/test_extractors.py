"""Inception v3 and LPIPS with weights that are drawn here: no hub is at hand, and the arithmetic does not know what they were trained on."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
import torchvision
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from torchmetrics.functional.image import lpips as published

from tasks.metrics import MetricError
from tasks.metrics.distances import fid, inception_score
from tasks.metrics.extractors import Inception, Lpips

COLOURS = np.random.default_rng(0).integers(0, 256, (12, 48, 40, 3), dtype=np.uint8)
OTHERS = np.random.default_rng(1).integers(0, 200, (12, 48, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    class Drawn(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, state: dict, *_: object) -> None:  # type: ignore[override]
            assert not state

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        model = Drawn("inception", ["2048"])
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(model.state_dict(), path)
    return str(path)


def test_fid_and_inception_score_are_those_of_torchmetrics(inception_file: str) -> None:
    inception = Inception(inception_file)
    (features, probabilities), (theirs, _) = inception.see(COLOURS), inception.see(OTHERS)
    assert features.shape == (12, 2048) and probabilities.shape == (12, 1008)
    ours, reference = (torch.from_numpy(images).permute(0, 3, 1, 2) for images in (COLOURS, OTHERS))
    options = {"feature_extractor_weights_path": inception_file, "antialias": False}
    metric = torchmetrics.image.fid.FrechetInceptionDistance(feature=2048, **options)
    metric.set_dtype(torch.float64)
    metric.update(reference, real=True)
    metric.update(ours, real=False)
    assert fid(features, theirs) == pytest.approx(float(metric.compute()), rel=1e-3, abs=1e-6)
    logits = fidelity.FeatureExtractorInceptionV3("x", ["logits_unbiased"], inception_file)(ours)[0]
    chances = logits.double().softmax(1)
    kl = (chances * (chances.log() - chances.mean(0).log())).sum(1)
    assert inception_score(probabilities) == pytest.approx(float(kl.mean().exp()), rel=1e-6)


@pytest.mark.parametrize(("name", "called"), [("alexnet", "alex"), ("vgg16", "vgg"), ("squeezenet1_1", "squeeze")])
def test_lpips_is_the_published_one(name: str, called: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    backbone = getattr(torchvision.models, name)(weights=None).eval()
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    ours = Lpips(str(tmp_path / "weights.pth"))
    monkeypatch.setattr(published, "_get_tv_model_features", lambda *_: backbone.features)
    theirs = published._NoTrainLpips(net=called)  # type: ignore[arg-type]
    levels = [torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1 for images in (COLOURS, OTHERS)]
    found = ours.distances(COLOURS, OTHERS)
    np.testing.assert_allclose(found, theirs(*levels).flatten().numpy(), rtol=1e-4)
    assert (found > 0).all() and not ours.distances(COLOURS, COLOURS).any()
    assert called in ours.model


def test_other_files_are_refused_and_never_run(tmp_path: Path, inception_file: str) -> None:
    with pytest.raises(MetricError, match="none is downloaded"):
        Inception(str(tmp_path / "nowhere.pth"))
    with pytest.raises(MetricError, match="neither AlexNet, VGG16 nor"):
        Lpips(inception_file)
    torch.save({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / "other.pth")
    with pytest.raises(MetricError, match="should be torch-fidelity's"):
        Inception(str(tmp_path / "other.pth"))
    (tmp_path / "wild.pth").write_bytes(pickle.dumps(Ran(str(tmp_path / "ran"))))
    for open_it in (Inception, Lpips):
        with pytest.raises(MetricError, match="no weights that can be read"):
            open_it(str(tmp_path / "wild.pth"))
    assert not (tmp_path / "ran").exists()


class Ran:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(self.path),)
