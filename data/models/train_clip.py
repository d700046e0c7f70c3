"""Train one of the two OpenCLIP models on rendered scenes.

    python data/models/train_clip.py filter    # 20 minutes on one core, writes tiny-clip-filter
    python data/models/train_clip.py judge

Contrastive training in which every picture also meets a hard negative caption (one attribute changed, or the colours
swapped). Captions that happen to fit another picture of the batch are masked out. A linear head that is thrown away
reads the attributes off the image embedding, which speeds up the start.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import FILTER, JUDGE, Average, WallClock, fast_math, record, set_rate, to_float
from tiny_clip import ATTRIBUTE_CHANGES, Scorer, create, filter_config, hard_negative_auc, judge_config, save
from tokenizer import CONTEXT, build
from tokenizer import save as save_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from world import (
    ATTRIBUTES,
    COLORS,
    FILTER_TEMPLATES,
    JUDGE_TEMPLATES,
    SHAPES,
    SIZES,
    Scene,
    all_scenes,
    change,
    parse,
    random_caption,
    render,
)

BATCH = 64
POOL = 8000
HEAD_WEIGHT = 0.3
VOCABULARY = {"size": [*SIZES], "color": [*COLORS], "shape": [*SHAPES], "background": [*COLORS]}


@dataclass(frozen=True)
class Kind:
    """What tells the filter and the judge apart."""

    config: dict[str, Any]
    folder: Path
    templates: tuple[str, ...]
    seed: int
    rate: float
    jitter: float


KINDS = {
    "filter": lambda: Kind(filter_config(), FILTER, FILTER_TEMPLATES, seed=1, rate=1.5e-3, jitter=1.5),
    "judge": lambda: Kind(judge_config(), JUDGE, JUDGE_TEMPLATES, seed=2, rate=1.0e-3, jitter=1.0),
}


def codes(attributes: dict[str, str]) -> list[int]:
    """Attributes as indices into `VOCABULARY`; -1 for one that is not named."""
    return [VOCABULARY[name].index(attributes[name]) if name in attributes else -1 for name in ATTRIBUTES]


def augment(images: Tensor) -> Tensor:
    """Blur, noise and a slight change of colours; float [N, 3, 64, 64] in -1..1."""
    n = len(images)
    if random.random() < 0.5:
        sigma = random.uniform(0.3, 1.1)
        kernel = torch.exp(-torch.arange(-2.0, 3.0).square() / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, 5)
        images = F.conv2d(F.pad(images, (2, 2, 2, 2), "replicate"), kernel, groups=3)
        images = F.conv2d(images, kernel.transpose(2, 3), groups=3)
    gain, offset = 1 + 0.1 * torch.randn(n, 3, 1, 1), 0.05 * torch.randn(n, 3, 1, 1)
    noise = 0.08 * torch.rand(n, 1, 1, 1) * torch.randn_like(images)
    return (images * gain + offset + noise).clamp(-1, 1)


class Captions:
    """Draws a right and a wrong caption for scenes, as tokens and as attribute codes."""

    def __init__(self, templates: tuple[str, ...], seed: int) -> None:
        self.templates, self.rng, self.tokenizer = templates, random.Random(seed), build()
        self.changes = (*ATTRIBUTE_CHANGES, "shape", "shape")  # shapes are the hardest

    def draw(self, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
        """Token ids [2N, 24] and codes [2N, 4]: first the captions of `scenes`, then the hard negatives."""
        wrong = [change(s, self.rng.choice(self.changes), self.rng) for s in scenes]
        texts = [random_caption(s, self.templates, self.rng) for s in scenes + wrong]
        tokens = self.tokenizer(texts, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
        return tokens.input_ids, torch.tensor([codes(parse(text)) for text in texts])


def contrastive_loss(logits: Tensor, seen: Tensor, said: Tensor) -> Tensor:
    """Both directions of CLIP's loss; logits [N, 2N], `seen` [N, 4] and `said` [2N, 4] are attribute codes."""
    n = len(logits)
    fits = ((said[None] == -1) | (said[None] == seen[:, None])).all(-1)
    own = torch.eye(n, 2 * n, dtype=torch.bool)
    logits = logits.masked_fill(fits & ~own, -1e4)
    target = torch.arange(n)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :n].T, target)) / 2


def train(kind: Kind, minutes: float, model: nn.Module) -> tuple[nn.Module, int]:
    """Train `model` for `minutes` on one thread; returns the averaged model and the number of steps."""
    rng = random.Random(kind.seed)
    scenes = rng.choices(all_scenes(), k=POOL)
    images = render(scenes, torch.Generator().manual_seed(kind.seed), kind.jitter)
    seen = torch.tensor([codes(vars(scene)) for scene in scenes])
    captions = Captions(kind.templates, kind.seed)

    heads = nn.ModuleList(nn.Linear(kind.config["embed_dim"], len(VOCABULARY[name])) for name in ATTRIBUTES)
    weights = [*model.parameters(), *heads.parameters()]
    matrices = [p for p in weights if p.ndim > 1]
    vectors = [p for p in weights if p.ndim <= 1]
    groups = [
        {"params": matrices, "peak": kind.rate, "weight_decay": 0.02},
        {"params": vectors, "peak": kind.rate, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=kind.rate, betas=(0.9, 0.98))
    average, clock = Average(model), WallClock(minutes)
    for step in clock:
        set_rate(optimizer, clock.scale())
        rows = torch.tensor(rng.sample(range(POOL), BATCH))
        tokens, said = captions.draw([scenes[i] for i in rows])
        with fast_math():
            found = model.encode_image(augment(to_float(images[rows]))).float()
            texts = model.encode_text(tokens, normalize=True).float()
        logits = model.logit_scale.exp() * F.normalize(found, dim=-1) @ texts.T
        loss = contrastive_loss(logits, seen[rows], said)
        guesses = [head(found) for head in heads]
        reading = sum(F.cross_entropy(guess, seen[rows, i]) for i, guess in enumerate(guesses))
        optimizer.zero_grad()
        (loss + HEAD_WEIGHT * reading).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        model.logit_scale.data.clamp_(max=4.6)
        average.update(model)
        if step % 100 == 0:
            print(f"{step:5} {clock.fraction:.2f} contrastive {loss:.3f} attributes {reading:.3f}", flush=True)
    return average.module, step + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--minutes", type=float, default=20.0, help="training time, on one thread")
    parser.add_argument("--resume", action="store_true", help="start from the saved weights")
    args = parser.parse_args()

    kind = KINDS[args.kind]()
    torch.set_num_threads(1)
    torch.manual_seed(kind.seed)
    random.seed(kind.seed)
    save_tokenizer(build(), kind.folder)
    model = Scorer(kind.folder).model.train() if args.resume else create(kind.config)
    model, steps = train(kind, args.minutes, model)
    save(model, kind.config, kind.folder)
    facts = {"minutes": args.minutes, "threads": 1, "steps": steps, "batch": BATCH}
    record(args.kind, facts, more=args.resume)

    scenes = random.Random(99).sample(all_scenes(), 500)
    images = render(scenes, torch.Generator().manual_seed(99))
    print(hard_negative_auc(Scorer(kind.folder), images, scenes))


if __name__ == "__main__":
    main()
