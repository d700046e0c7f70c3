"""Networks the field measures images by, from weights that lie on this machine: Inception v3 as FID's authors used it, and LPIPS.

Both come without their weights, which their packages would download unasked. A file of them is read without running what else it
may hold.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tasks.identity import sha256_file_once
from tasks.metrics import MetricError
from tasks.model_thread import on_model_thread

if TYPE_CHECKING:
    import torch

BATCH = 32  # images, or pairs, in one call
LEAST_SIDE = 32  # pixels: LPIPS halves images four times


class Inception:
    """Inception v3 (torch-fidelity's conversion of the one FID was defined with), `weights-inception-2015-12-05-6726825d.pth`.

    Images are resized as TensorFlow did. Raises MetricError: torch-fidelity is not installed, or the file is something else.
    """

    def __init__(self, file: str):
        import torch

        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise MetricError("Inception v3 needs torch-fidelity: pip install 'darkroom[inception]'") from error
        weights = _weights(file)
        with tempfile.NamedTemporaryFile(suffix=".pth") as copy:  # torch-fidelity would run what a pickle says
            torch.save(weights, copy.name)
            try:
                model = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], copy.name)
            except (RuntimeError, TypeError, AttributeError) as error:
                raise MetricError(
                    f"'{file}' does not hold the weights of FID's Inception v3: it should be torch-fidelity's "
                    "weights-inception-2015-12-05-6726825d.pth"
                ) from error
        self.model, self.fingerprint = "Inception v3", sha256_file_once(Path(file))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = model.to(self._device)

    @on_model_thread
    def see(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features [n, 2048] and probabilities of classes [n, 1008] of pixels uint8 [n, h, w, 3]."""
        import torch

        features, probabilities = [], []
        with torch.inference_mode():
            for start in range(0, len(pixels), BATCH):
                some = torch.from_numpy(pixels[start : start + BATCH]).permute(0, 3, 1, 2).to(self._device)
                pooled, logits = self._model(some)
                features.append(pooled.cpu().numpy())
                probabilities.append(logits.double().softmax(1).cpu().numpy())
        return np.concatenate(features), np.concatenate(probabilities)


class Lpips:
    """LPIPS (Zhang et al. 2018), version 0.1, over AlexNet, VGG16 or SqueezeNet 1.1: the file is torchvision's weights of one of
    these, such as `alexnet-owt-7be5be79.pth`; what LPIPS itself has learnt comes with torchmetrics. Raises MetricError."""

    def __init__(self, file: str):
        import torch
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        weights = _weights(file)
        backbone = _backbone(weights)
        if backbone is None:
            raise MetricError(
                f"'{file}' holds neither AlexNet, VGG16 nor SqueezeNet 1.1 as torchvision writes them: LPIPS knows no others"
            )
        self.model, self.fingerprint = f"LPIPS ({backbone})", sha256_file_once(Path(file))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = _NoTrainLpips(net=backbone, pnet_rand=True)
        net = self._model.net
        net.load_state_dict({name: weights[f"features.{_number(name)}"] for name in net.state_dict()})
        self._model.to(self._device)

    @on_model_thread
    def distances(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Of pairs of images, uint8 [n, h, w, 3] each: [n], from 0 (the same). Raises MetricError: they are too small."""
        import torch

        if min(a.shape[1:3]) < LEAST_SIDE:
            raise MetricError(
                f"LPIPS needs images of {LEAST_SIDE} pixels at least; these have {a.shape[2]}×{a.shape[1]}"
            )

        def levels(images: np.ndarray) -> "torch.Tensor":
            return torch.from_numpy(images).permute(0, 3, 1, 2).to(self._device, torch.float32) / 127.5 - 1

        found = []
        with torch.inference_mode():
            for start in range(0, len(a), BATCH):
                one, other = a[start : start + BATCH], b[start : start + BATCH]
                found.append(self._model(levels(one), levels(other)).flatten().cpu().numpy())
        return np.concatenate(found).astype(np.float64)


def _weights(file: str) -> "dict[str, torch.Tensor]":
    """The tensors of a safetensors or PyTorch file. Raises MetricError."""
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(file).is_file():
        raise MetricError(
            f"there is no file of weights '{file}', and none is downloaded unasked: fetch it, and name it"
        )
    try:
        found = (
            load_file(file)
            if file.endswith(".safetensors")
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise MetricError(f"'{file}' holds no weights that can be read: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise MetricError(f"'{file}' holds something else than weights by name")
    return found


def _backbone(weights: "dict[str, torch.Tensor]") -> Literal["alex", "squeeze", "vgg"] | None:
    """What torchmetrics calls it."""
    first = weights.get("features.0.weight")
    shape = tuple(first.shape) if first is not None else None
    if shape == (64, 3, 11, 11) and "features.10.weight" in weights:
        return "alex"
    if shape == (64, 3, 3, 3) and "features.12.squeeze.weight" in weights:
        return "squeeze"
    if shape == (64, 3, 3, 3) and "features.28.weight" in weights and "features.30.weight" not in weights:
        return "vgg"
    return None


def _number(name: str) -> str:
    """slice2.3.weight, or slices.1.3.squeeze.weight → 3.weight, 3.squeeze.weight: torchvision's name."""
    parts = name.split(".")
    return ".".join(parts[2:] if parts[0] == "slices" else parts[1:])
