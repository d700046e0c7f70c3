"""Adapter files of all kinds → `Lora` or `Embeddings`: our own forms, and those of diffusers, PEFT and Kohya's tools."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Any

from tasks.adapters.errors import AdapterNotFound, NotAnAdapter, some
from tasks.adapters.names import modules_named, pieces
from tasks.adapters.tensors import DOWN, UP, Embeddings, Lora, Weights, matrix

if TYPE_CHECKING:
    import torch

# what the file in a folder is called: ours, diffusers', PEFT's
FILES = (
    "adapter.safetensors",
    "learned_embeds.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
)
METADATA = "lora_adapter_metadata"  # diffusers' key in the header, for PEFT's configuration as JSON
TOKEN = "darkroom.token"
SHOWN = 60  # characters of what was received, in messages
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
ENCODERS = ("clip_l", "clip_g")  # what files of textual inversions call the vectors of each text encoder
SINGLE = "emb_params"  # and what they call those of the only one
RESERVED = (*ENCODERS, SINGLE, "__metadata__")  # words that mean something else in a file: no placeholder is called so
_MARKED = re.compile(r"<[^<>]+>")  # a placeholder as most people write it; no module is called so

_KEY = re.compile(
    r"(?P<name>.+?)(?:"
    r"\.(?:lora_down|lora_A|lora_A\.default|lora\.down|lora_linear_layer\.down)\.weight(?P<down>)"
    r"|\.(?:lora_up|lora_B|lora_B\.default|lora\.up|lora_linear_layer\.up)\.weight(?P<up>)"
    r"|_lora\.(?:down\.weight(?P<processor_down>)|up\.weight(?P<processor_up>))"
    r"|\.alpha(?P<alpha>))"
)
_OTHER_METHODS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "lora_mid": "LoCon in Tucker's form",
    "oft_": "OFT",
    "ia3_": "IA3",
    ".diff": "a difference of full weights",
    "lora_B.bias": "LoRA with biases",
}


def read_adapter(path: str | Path, allow_pickle: bool = False) -> Weights:
    """The adapter in a file, or in a folder that holds one.

    A module's alpha comes from the file (Kohya's tensor, else diffusers' header or PEFT's adapter_config.json), else it is the
    rank, as all these tools take it. `allow_pickle` also takes pickled weights, and from them nothing but tensors.

    Raises AdapterNotFound, NotAnAdapter.
    """
    file = adapter_file(Path(path))
    return _adapter(*_load(file, allow_pickle), file)


def adapter_in(data: bytes, name: str) -> Weights:
    """The adapter in a safetensors file that is in memory; `name`: what the file is to be called. Raises NotAnAdapter."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except SafetensorError as error:
        raise NotAnAdapter(f"adapter {name} ({len(data)} bytes) is no safetensors file: {error}") from error
    end = int.from_bytes(data[:8], "little") + 8
    return _adapter(tensors, json.loads(data[8:end]).get("__metadata__", {}), Path(name))


def _adapter(tensors: "dict[str, torch.Tensor]", header: dict[str, str], file: Path) -> Weights:
    """`file`: for its name, and for what lies beside it."""
    try:
        # a placeholder may look like a LoRA's key: where the header names one, nothing is guessed
        if header.get(TOKEN) or not any(_KEY.fullmatch(name) for name in tensors):
            return _embeddings(tensors, header, file)
        return _lora(tensors, _configuration(header, file))
    except NotAnAdapter as error:
        raise NotAnAdapter(f"adapter {file}: {error}") from error


def adapter_file(path: Path) -> Path:
    """The file that holds an adapter's weights. Raises AdapterNotFound."""
    if path.is_file():
        return path
    if not path.exists():
        raise AdapterNotFound(
            f"there is no file or folder {path.absolute()} on {gethostname()}; check the adapter's path. Where the workers are other "
            "machines, name a folder that all of them see, or a URL of an object store"
        )
    for name in FILES:
        if (path / name).is_file():
            return path / name
    there = sorted(path.glob("*.safetensors"))
    if len(there) == 1:
        return there[0]
    raise AdapterNotFound(
        f"folder {path.absolute()} holds {len(there) or 'no'} .safetensors files, and none with a known name "
        f"({', '.join(FILES)}); give the file itself"
    )


def _load(file: Path, allow_pickle: bool) -> "tuple[dict[str, torch.Tensor], dict[str, str]]":
    """A file's tensors, and its header's text. Raises NotAnAdapter."""
    with file.open("rb") as opened:
        begins = opened.read(9)
    # a safetensors file begins with the length of its header, which may look like a pickle's first bytes, and that header
    looks_pickled = begins[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04") and begins[8:] != b"{"
    if looks_pickled or file.suffix in PICKLED:
        if not allow_pickle:
            raise NotAnAdapter(
                f"adapter {file} is pickled: loading such a file can run any program that its maker put into it. Get it as "
                ".safetensors, or, if you trust its source, allow it with allow_pickle=True and save it again"
            )
        return _unpickled(file), {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise NotAnAdapter(
            f"adapter {file} ({file.stat().st_size} bytes) is no whole safetensors file: {error}. Its copy was cut off, or it is "
            "another kind of file: copy it again"
        ) from error


def _unpickled(file: Path) -> Any:
    """The tensors of a pickled file: a flat dictionary, or one of A1111's textual inversions."""
    import torch

    try:
        with file.open("rb") as opened:  # given a path, torch goes by its suffix
            held = torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own
        raise NotAnAdapter(
            f"adapter {file} does not unpickle to tensors: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    if isinstance(held, dict) and "string_to_param" in held:
        held = {"emb_params": next(iter(held["string_to_param"].values()))}
    held = held.get("state_dict", held) if isinstance(held, dict) else {}
    return {name: tensor for name, tensor in held.items() if isinstance(tensor, torch.Tensor)}


# --- LoRA ------------------------------------------------------------------------------------------------------------


def _lora(tensors: "dict[str, torch.Tensor]", configuration: dict[str, Any]) -> Lora:
    downs: dict[str, torch.Tensor] = {}
    ups: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    strange: list[str] = []
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        parts = modules_named(_name(found)) if found else None
        if not found or not parts:
            strange.append(key)
        elif found["alpha"] is not None:
            _put(alphas, dict.fromkeys((module for module, _ in parts), _number(key, tensor)), key)
        elif found["down"] is not None or found["processor_down"] is not None:
            _put(downs, {module: matrix(key, tensor) for module, _ in parts}, key)
        else:
            _put(ups, {module: tensor[rows] for module, rows in pieces(parts, len(matrix(key, tensor)))}, key)
    if strange:
        raise NotAnAdapter(_strange(strange, len(tensors)))
    if bare := sorted(alphas.keys() - downs.keys() - ups.keys()):
        raise NotAnAdapter(
            f"of its modules, {len(bare)} have an alpha and no weights ({some(bare)}): they were lost on the way; copy or save the "
            "adapter again, whole"
        )
    whole = downs.keys() & ups.keys()
    return Lora(
        {
            **{module + DOWN: tensor for module, tensor in downs.items()},
            **{module + UP: tensor for module, tensor in ups.items()},
        },
        {module: alphas.get(module, _alpha(configuration, module, downs[module].shape[0])) for module in whole},
    )


def _put(there: dict[str, Any], more: dict[str, Any], key: str) -> None:
    """Raises NotAnAdapter: the file has the same of a module under another key already, and which one is meant nobody knows."""
    if twice := sorted(there.keys() & more.keys()):
        raise NotAnAdapter(
            f"{key} is of {some(twice)}, as another of its tensors is: two LoRAs were put into one file; take them apart, and wear both"
        )
    there.update(more)


def _name(found: re.Match[str]) -> str:
    """What stands for the module in a key; early diffusers kept LoRAs in attention processors."""
    name = found["name"]
    if found["processor_down"] is None and found["processor_up"] is None:
        return name
    name = name.replace(".processor.", ".")
    return f"{name}.0" if name.endswith("to_out") else name


def _strange(keys: list[str], all: int) -> str:
    what = f"{len(keys)} of its {all} tensors are not a LoRA's ({some(sorted(keys))})"
    for mark, method in _OTHER_METHODS.items():
        if any(mark in key for key in keys):
            return f"{what}: this is {method}, which Darkroom cannot wear; train or convert it as a plain LoRA"
    return f"{what}; expected names as diffusers, PEFT or Kohya's tools write them"


def _configuration(header: dict[str, str], file: Path) -> dict[str, Any]:
    """PEFT's configuration of the adapter, where there is one: in the header, or in a file beside."""
    where, text = METADATA, header.get(METADATA)
    beside = file.with_name("adapter_config.json")
    try:
        if text is None and file.name == "adapter_model.safetensors" and beside.is_file():
            where, text = beside.name, beside.read_text(encoding="utf-8")
        configuration = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotAnAdapter(f"its configuration ({where}) is not readable JSON: {error}; save it again") from error
    if not isinstance(configuration, dict):
        raise NotAnAdapter(
            f"its configuration ({where}) is {_shown(configuration)}; expected a JSON object: save it again"
        )
    return configuration


def _alpha(configuration: dict[str, Any], module: str, rank: int) -> float:
    """A module's alpha by PEFT's rules: the first fitting pattern, else the general one, else the rank. Raises NotAnAdapter."""
    component, _, path = module.partition(".")
    own = {
        key.removeprefix(f"{component}."): value
        for key, value in configuration.items()
        if key.startswith(component + ".")
    }
    own = own or configuration
    if own.get("use_dora"):
        raise NotAnAdapter("this is DoRA, which Darkroom cannot wear; train it as a plain LoRA")
    alpha = _number("lora_alpha in its configuration", own.get("lora_alpha") or rank)
    patterns = own.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise NotAnAdapter(
            f"alpha_pattern in its configuration is {_shown(patterns)}; expected names with their alphas"
        )
    for pattern, value in patterns.items():
        try:
            fits = re.match(rf"(.*\.)?({pattern.replace('text_model.', '')})$", path)
        except (re.error, OverflowError, RecursionError) as error:
            raise NotAnAdapter(
                f"alpha_pattern in its configuration has {_shown(pattern)}, which is no regular expression: {error}"
            ) from error
        if fits:
            alpha = _number(f"alpha_pattern of '{pattern}' in its configuration", value)
            break
    return alpha * math.sqrt(rank) if own.get("use_rslora") else alpha


def _number(name: str, value: Any) -> float:
    """`value`: a tensor, or what JSON held. Raises NotAnAdapter: it is not one finite number. `name`: what the message calls it."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch raises the last
        number = math.nan
    if not math.isfinite(number):
        raise NotAnAdapter(
            f"{name} is {_shown(value)}; expected one finite number: save the adapter again, or correct it there"
        )
    return number


def _shown(value: Any) -> str:
    """What was received, for a message."""
    text = repr(value.tolist() if hasattr(value, "tolist") else value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


# --- textual inversion -----------------------------------------------------------------------------------------------


def _embeddings(tensors: "dict[str, torch.Tensor]", header: dict[str, str], file: Path) -> Embeddings:
    token = header.get(TOKEN) or file.stem
    if TOKEN in header and tensors.keys() == {token}:
        return Embeddings({token: [tensors[token]]})
    if SINGLE in tensors:
        return Embeddings({token: [tensors[SINGLE]]})
    if tensors and tensors.keys() <= set(ENCODERS):
        return Embeddings({token: [tensors[name] for name in _in_order(tensors)]})
    if not tensors or any(
        ("." in name and not _MARKED.fullmatch(name)) or tensor.dim() > 2 for name, tensor in tensors.items()
    ):
        raise NotAnAdapter(_strange(sorted(tensors), len(tensors)))
    return Embeddings({name: [tensor] for name, tensor in tensors.items()})


def _in_order(names: Iterable[str]) -> list[str]:
    """`names` of text encoders, in the pipeline's order. Raises NotAnAdapter: those after the first are there without it."""
    there = [name for name in ENCODERS if name in names]
    if there != list(ENCODERS[: len(there)]):
        raise NotAnAdapter(f"it has vectors for {', '.join(there)}, but none for {ENCODERS[0]}; save it again, whole")
    return there
