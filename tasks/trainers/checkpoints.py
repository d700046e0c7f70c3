"""The state of a training in the store, so that one that was stopped goes on and ends in the same weights.

What is drawn at a step depends on the seed and the step alone, so the state is the step, the weights, the optimizer's moments
and the kept mean: tensors in a safetensors file, and its header for the rest.
"""

import json
import logging
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from tasks.identity import sha256
from tasks.store import Missing, Store, layout

if TYPE_CHECKING:
    import torch

KEPT = 2  # the latest, and the one before, should that be damaged
DIGITS = 16
_NAME = re.compile(rf"([0-9]{{8}})-([0-9a-f]{{{DIGITS}}})\.safetensors")  # as layout.checkpoint has it

log = logging.getLogger(__name__)


@dataclass
class Record:
    """What a training knows of its past besides tensors."""

    step: int = 0  # steps that are done
    seconds: float = 0.0  # over all starts
    early: list[float] = field(default_factory=list)  # losses of the first steps
    late: list[float] = field(default_factory=list)  # and of the latest ones
    scaler: dict[str, float] = field(default_factory=dict)  # float16's scale of gradients


def save(store: Store, training: str, record: Record, tensors: "dict[str, torch.Tensor]") -> None:
    """Put a checkpoint, and delete those before the last KEPT."""
    from safetensors.torch import save as as_bytes

    data = as_bytes(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        {"record": json.dumps(asdict(record))},
    )
    store.write(layout.checkpoint(training, record.step, sha256(data)[:DIGITS]), data)
    for key, step, _ in _there(store, training)[:-KEPT]:
        if step < record.step:
            store.delete(key)


def load(store: Store, training: str) -> "tuple[Record, dict[str, torch.Tensor]] | None":
    """The latest checkpoint that is whole; None: there is none. Damaged ones are deleted, as they would count among those kept."""
    from safetensors.torch import load as from_bytes

    for key, _, digest in reversed(_there(store, training)):
        try:
            data = store.read(key)
        except Missing:  # another start of the same training has just put a later one
            continue
        if sha256(data)[:DIGITS] != digest:
            log.warning("%s is damaged and deleted; the training goes on from an earlier checkpoint", store.uri(key))
            store.delete(key)
            continue
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return Record(**json.loads(header["__metadata__"]["record"])), from_bytes(data)
    return None


def _there(store: Store, training: str) -> list[tuple[str, int, str]]:
    """(key, step, digest) of the checkpoints, the earliest first; other files in their folder are nobody's business."""
    found = ((key, _NAME.fullmatch(key.rpartition("/")[2])) for key in store.list(layout.checkpoints(training)))
    return [(key, int(name[1]), name[2]) for key, name in found if name]
