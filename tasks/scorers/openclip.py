"""Any OpenCLIP model as judge: a local folder, a model of the hub, or an architecture with the tag of its weights.

`locate`, `fingerprint` and `token_limit` read files alone, so that a run with nothing to do never imports torch. (A tag is
the exception: open_clip's table of tags is code, and importing it imports torch. A hub name has no such price.)
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.engines import TokenLimit
from tasks.identity import digest, sha256_file_once
from tasks.model_thread import on_model_thread
from tasks.scorers import ScorerError, Scores, tokens

if TYPE_CHECKING:
    import numpy as np
    import torch

HUB = "hf-hub:"
CONFIG = "open_clip_config.json"
WEIGHTS = (  # open_clip's own order of preference
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
DEFAULT_BPE = "bpe_simple_vocab_16e6.txt.gz"
DEFAULT_VOCABULARY = 49408
DEFAULT_CONTEXT = 77
TEXT_BATCH = 32
TEXTS_KEPT = 10_000  # text embeddings in memory: 46 MB at 1,152 numbers each


# --- what files tell ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Located:
    """A model's files, and how open_clip is asked to load them."""

    model: str  # as the run named it
    name: str  # open_clip's name for it
    tag: str | None  # open_clip's `pretrained`
    architecture: dict[str, Any]  # open_clip's `model_cfg`
    preprocessing: dict[str, Any]  # open_clip's `preprocess_cfg`
    weights: Path
    tokenizer: Path | None  # folder; None: open_clip's default byte-pair encoding

    @property
    def text(self) -> dict[str, Any]:
        return self.architecture["text_cfg"]

    @property
    def context_length(self) -> int:
        return self.text.get("context_length", DEFAULT_CONTEXT)


def locate(model: str) -> Located:
    """Find the files of a local folder (open_clip_config.json and weights), of the same under an object store's URL, of
    `hf-hub:org/name`, or of `Architecture/tag` such as `ViT-B-32/laion2b_s34b_b79k`. Files of the hub and of an object store
    come from their local cache, or are fetched.

    Raises ScorerError: nothing of that name, no weights, or a tokenizer that does not belong to the model.
    """
    architecture, _, tag = model.partition("/")
    if model.startswith(HUB):
        located = _located(model, _fetched(model.removeprefix(HUB)))
    elif "://" in model:
        located = _located(model, _from_store(model))
    elif Path(model).is_dir():
        located = _located(model, Path(model))
    elif (_package() / "model_configs" / f"{architecture}.json").is_file():
        located = _tagged(model, architecture, tag)
    else:
        raise ScorerError(
            f"scorer '{model}' is neither a folder here nor an open_clip architecture with a tag: give a folder with "
            f"{CONFIG} and {WEIGHTS[0]} or its URL, hf-hub:org/name, or Architecture/tag"
        )
    if located.tokenizer is None and located.text.get("vocab_size", DEFAULT_VOCABULARY) != DEFAULT_VOCABULARY:
        raise ScorerError(
            f"scorer '{model}' reads {located.text['vocab_size']} different tokens, but its configuration names no "
            f"tokenizer, and open_clip would use its default one of {DEFAULT_VOCABULARY}: put tokenizer files into the "
            'folder and "hf_tokenizer_name": "./" into text_cfg'
        )
    return located


def _from_store(url: str) -> Path:
    from tasks.weights import WeightsError, fetch

    def needed(names: Sequence[str]) -> list[str]:
        weights = next((name for name in WEIGHTS if name in names), CONFIG)
        return [name for name in names if name in (CONFIG, weights, *TOKENIZER)]

    try:
        return fetch(url, needed)
    except WeightsError as error:
        raise ScorerError(f"scorer {error}") from error


def _located(model: str, folder: Path) -> Located:
    if not (folder / CONFIG).is_file():
        raise ScorerError(f"scorer '{model}' has no {CONFIG}: is it an OpenCLIP model?")
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        architecture, text = config["model_cfg"], config["model_cfg"]["text_cfg"]
    except (ValueError, KeyError, TypeError) as error:
        raise ScorerError(
            f"the {CONFIG} of scorer '{model}' is not open_clip's: {error!r}; save the model again"
        ) from error
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise ScorerError(
            f"scorer '{model}' has no weights ({', '.join(WEIGHTS)}); open_clip would score with random ones. "
            "Copy the weights beside the configuration"
        )
    tokenizer = _tokenizer_folder(model, text, folder) if text.get("hf_tokenizer_name") else None
    return Located(
        model, f"local-dir:{folder}", None, architecture, config.get("preprocess_cfg", {}), weights, tokenizer
    )


def _tokenizer_folder(model: str, text: dict[str, Any], folder: Path | None) -> Path:
    """Where the tokenizer's files are: beside the model, or in the repository of the hub that the configuration names."""
    if folder is None or (model.startswith(HUB) and not _tokenizer_files(folder)):
        folder = _snapshot(text["hf_tokenizer_name"], TOKENIZER)
    if not _tokenizer_files(folder):
        raise ScorerError(
            f"the configuration of scorer '{model}' names the tokenizer '{text['hf_tokenizer_name']}', but {folder} has no "
            "tokenizer files: copy tokenizer.json and tokenizer_config.json there"
        )
    return folder


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in TOKENIZER if (folder / name).is_file()]


def _tagged(model: str, name: str, tag: str) -> Located:
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    pretrained = get_pretrained_cfg(name, tag)
    if not pretrained:
        raise ScorerError(
            f"open_clip knows no weights '{tag}' of {name}, and would score with random ones; it knows "
            f"{', '.join(list_pretrained_tags_by_model(name)) or 'none'}"
        )
    architecture = json.loads((_package() / "model_configs" / f"{name}.json").read_bytes())
    # open_clip only warns where architecture and weights disagree on this, and all scores are then wrong
    if pretrained.get("quick_gelu"):
        architecture["quick_gelu"] = True
    try:
        weights = Path(download_pretrained(pretrained))
    except OSError as error:
        raise ScorerError(f"the weights of scorer '{model}' cannot be fetched: {error}") from error
    text = architecture["text_cfg"]
    tokenizer = _tokenizer_folder(model, text, None) if text.get("hf_tokenizer_name") else None
    preprocessing = {
        key: pretrained[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in pretrained
    }
    return Located(model, name, tag, architecture, preprocessing, weights, tokenizer)


def _fetched(repository: str) -> Path:
    """The folder of a hub model in the local cache, with configuration, weights and tokenizer."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    folder = _snapshot(repository, (CONFIG, *TOKENIZER))
    for name in WEIGHTS:
        try:
            hf_hub_download(repository, name)
            break
        except EntryNotFoundError:
            continue
    return folder


def _snapshot(repository: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # ValueError: no repository can have that name
        raise ScorerError(
            f"'{repository}' cannot be read from the hub, nor from its local cache: {error}; check the name, or give a folder"
        ) from error


def _package() -> Path:
    """The folder of the open_clip package, found without importing it."""
    spec = find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def facts(located: Located) -> dict[str, Any]:
    """All that decides a score: architecture, preprocessing, sha256 of weights and tokenizer files."""
    files = _tokenizer_files(located.tokenizer) if located.tokenizer else [_package() / DEFAULT_BPE]
    return {
        "kind": "openclip",
        "architecture": located.architecture,
        "preprocessing": located.preprocessing,
        "weights": sha256_file_once(located.weights),
        "tokenizer": {file.name: sha256_file_once(file) for file in files},
    }


def fingerprint(model: str) -> str:
    """The id of a scorer, 32 hexadecimal digits: equal for equal files, wherever they are. Raises ScorerError."""
    return digest(facts(locate(model)))


def token_limit(model: str) -> TokenLimit:
    """How many tokens of a prompt the scorer reads, and how many a prompt has. Raises ScorerError."""
    located = locate(model)
    return TokenLimit(f"scorer {Path(model).name}", located.context_length, _counter(located), negatives=False)


def _counter(located: Located) -> Callable[[Sequence[str]], list[int]]:
    cleaning = located.text.get("tokenizer_kwargs", {}).get("clean")
    if located.tokenizer is None:
        return tokens.default_counter(_package() / DEFAULT_BPE, cleaning or "lower")
    return tokens.counter(located.tokenizer, cleaning or "whitespace")


# --- the loaded model --------------------------------------------------------------------------------------------------


class OpenClipScorer:
    """A `Scorer` over an OpenCLIP model, in float32 on the GPU, or on the CPU where there is none.

    Every batch has the same size (the last one is padded), so that an image's score does not depend on its neighbours.

    Raises ScorerError where the model cannot be loaded with its own weights and its own tokenizer.
    """

    def __init__(self, model: str, batch_size: int = 64) -> None:
        import torch

        from tasks.scorers.preprocessing import Preprocessing

        located = locate(model)
        self.model = model
        self.facts = facts(located)
        self.fingerprint = digest(self.facts)
        self.context_length = located.context_length
        self.batch_size = batch_size
        self.count_tokens = _counter(located)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._clip = _loaded(located, self._device)
        self.logit_scale = float(self._clip.logit_scale.detach().exp().flatten()[0])
        self._tokenize = _tokenizer(located)
        self._prepare = Preprocessing(**self._clip.visual.preprocess_cfg)
        self._texts: OrderedDict[str, torch.Tensor] = OrderedDict()

    @cached_property
    def known_answers(self) -> "np.ndarray":
        from tasks.scorers.known_answers import answers

        return answers(self)

    @on_model_thread
    def score(self, pixels: "np.ndarray", prompts: Sequence[str]) -> Scores:
        import torch

        with torch.inference_mode():
            images = self._encode_images(pixels)
            texts = self._encode_texts(prompts)
        cosine = (images * texts).sum(dim=1).clamp(-1, 1)
        return Scores(cosine.numpy(), images.numpy())

    @on_model_thread
    def encode_texts(self, prompts: Sequence[str]) -> "np.ndarray":
        import torch

        with torch.inference_mode():
            return self._encode_texts(prompts).numpy()

    def _encode_images(self, pixels: "np.ndarray") -> "torch.Tensor":
        """Unit vectors [n, d] of images uint8 [n, height, width, 3]."""
        import torch

        batches = torch.from_numpy(pixels).split(self.batch_size)
        return torch.cat([self._in_full_batch(self._encode_image_batch, batch, self.batch_size) for batch in batches])

    def _encode_image_batch(self, batch: "torch.Tensor") -> "torch.Tensor":
        return self._clip.encode_image(self._prepare(batch.to(self._device)))

    def _encode_texts(self, prompts: Sequence[str]) -> "torch.Tensor":
        """Unit vectors [n, d]; a text met before is not encoded again."""
        import torch

        new = [text for text in dict.fromkeys(prompts) if text not in self._texts]
        for start in range(0, len(new), TEXT_BATCH):
            texts = new[start : start + TEXT_BATCH]
            ids = self._tokenize(texts).to(self._device)
            self._texts.update(zip(texts, self._in_full_batch(self._clip.encode_text, ids, TEXT_BATCH), strict=True))
        found = []
        for text in prompts:
            self._texts.move_to_end(text)
            found.append(self._texts[text])
        while len(self._texts) > TEXTS_KEPT:
            self._texts.popitem(last=False)
        return torch.stack(found)

    def _in_full_batch(
        self, encode: Callable[["torch.Tensor"], "torch.Tensor"], batch: "torch.Tensor", size: int
    ) -> "torch.Tensor":
        """Unit vectors of a batch of at most `size` rows, encoded together with as many copies of the first as are missing."""
        import torch

        n = len(batch)
        full = torch.cat([batch, batch[:1].expand(size - n, *batch.shape[1:])])
        return torch.nn.functional.normalize(encode(full)[:n].float(), dim=-1).cpu()


def _loaded(located: Located, device: "torch.device") -> Any:
    import open_clip

    try:
        clip = open_clip.create_model_from_pretrained(
            located.name,
            located.tag,
            device=device,
            force_quick_gelu=located.architecture.get("quick_gelu", False),
            return_transform=False,
        )
    except (RuntimeError, ValueError, OSError, KeyError, TypeError) as error:
        raise ScorerError(
            f"open_clip cannot load scorer '{located.model}': {error}; do the weights {located.weights.name} belong to the "
            f"configuration?"
        ) from error
    return clip.eval()


def _tokenizer(located: Located) -> Any:
    """open_clip's tokenizer over the model's own files; `open_clip.get_tokenizer` may quietly take another one."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    options = {"context_length": located.context_length, **located.text.get("tokenizer_kwargs", {})}
    if located.tokenizer is None:
        return SimpleTokenizer(**options)
    return HFTokenizer(str(located.tokenizer), tokenizer_mode=located.text.get("tokenizer_mode"), **options)
