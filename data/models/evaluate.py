"""Measure the embedded models against the ground truth; every number of the model card comes from here.

    python data/models/evaluate.py             # about five minutes on two cores

Prints the tables, writes them into README.md between its markers, card.json and contact_sheet.png. The last line of
the output is card.json on one line.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import time
from collections.abc import Sequence
from typing import Any

import contact_sheet
import torch
from common import DEFAULT_GUIDANCE, DEFAULT_STEPS, FILTER, HERE, JUDGE, to_bytes, to_float
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors import safe_open
from sampling import load_pipeline, sample
from shapes import DECOYS, coverage
from tiny_clip import ATTRIBUTE_CHANGES, Scorer, auc, hard_negative_auc
from torch import Tensor
from world import ATTRIBUTES, COLORS, IMAGE_SIZE, all_scenes, caption, change, check, parse, render

REJECTED = (0.5, 0.6, 0.7)
GUIDANCES = (1.5, 2.0, 2.5, 3.0, 5.0)
STEP_COUNTS = (4, 5, 6, 8, 10, 20)
SHOWN = 48
"""Samples on the contact sheet."""
MEBIBYTE = 2**20


def share(flags: Sequence[bool]) -> float:
    """The share of true values, to four digits."""
    return round(statistics.fmean(flags), 4)


def decoys(radius: float, each: int, rng: random.Random) -> dict[str, Tensor]:
    """Near-miss shapes that are none of the six, uint8 [each, 64, 64, 3] by name."""
    axis = torch.arange(IMAGE_SIZE) + 0.5 - IMAGE_SIZE / 2
    ink, ground = torch.tensor(COLORS["red"]), torch.tensor(COLORS["blue"])
    made = {}
    for name, distance in DECOYS.items():
        alphas = []
        for _ in range(each):
            dx, dy = rng.uniform(-2, 2), rng.uniform(-2, 2)
            alphas.append(coverage(distance, axis[None] - dx, axis[:, None] - dy, radius * rng.uniform(0.93, 1.07)))
        pictures = ground + torch.stack(alphas)[..., None] * (ink - ground)
        made[name] = (pictures * 255).round().to(torch.uint8)
    return made


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Pictures through the VAE and back, uint8 [N, 64, 64, 3]."""
    chunks = (to_float(chunk) for chunk in images.split(100))
    return torch.cat([to_bytes(vae.decode(vae.encode(chunk).latent_dist.mean).sample) for chunk in chunks])


def measure_checker(vae: AutoencoderKL, n: int) -> dict[str, float]:
    """The checker's own errors, on rendered pictures whose truth is known."""
    rng = random.Random(11)
    scenes = rng.choices(all_scenes(), k=n)
    images = render(scenes, torch.Generator().manual_seed(11))
    prompts = [caption(s) for s in scenes]
    facts = {
        "pictures": n,
        "clean_refused": share([not f.match for f in check(images, prompts)]),
        "clean_through_the_vae_refused": share([not f.match for f in check(reconstruct(vae, images), prompts)]),
    }
    for kind in ATTRIBUTE_CHANGES:
        wrong = check(images, [caption(change(s, kind, rng)) for s in scenes])
        facts[f"wrong_{kind}_accepted"] = share([f.match for f in wrong])
    for name, radius in (("small", 11.25), ("large", 21.0)):
        passed = [
            not f.malformed
            for pictures in decoys(radius, 10, rng).values()
            for f in check(pictures, ["a shape"] * len(pictures))
        ]
        facts[f"{name}_decoys_accepted"] = share(passed)
    return facts


def measure_samples(images: Tensor, prompts: Sequence[str], scorers: dict[str, Scorer]) -> dict[str, Any]:
    """Hit rates of the model's own samples and how well each scorer tells right from wrong."""
    found = check(images, prompts)
    match = torch.tensor([f.match for f in found])
    facts: dict[str, Any] = {
        "samples": len(found),
        "match": share(match.tolist()),
        "malformed": share([f.malformed for f in found]),
        "wrong_but_well_formed": share([not f.match and not f.malformed for f in found]),
    }
    for name in ATTRIBUTES:
        pairs = zip(found, prompts, strict=True)
        facts[f"{name}_right"] = share([getattr(f, name) == parse(prompt)[name] for f, prompt in pairs])
    for name, scorer in scorers.items():
        scores = scorer.cosine(images, prompts)
        facts[f"{name}_auc"] = round(auc(scores[match], scores[~match]), 4)
        order = scores.argsort(descending=True)
        for rejected in REJECTED:
            kept = order[: round(len(order) * (1 - rejected))]
            facts[f"{name}_match_after_rejecting_{rejected:.0%}"] = share(match[kept].tolist())
    return facts


def measure_speed(pipeline: StableDiffusionPipeline) -> dict[str, float]:
    """Pictures per second at the defaults, by threads and batch size."""
    facts, before = {}, torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for batch in (1, 8, 16):
            prompts = [caption(s) for s in all_scenes()[:batch]]
            sample(pipeline, prompts, range(batch), batch=batch)
            start = time.perf_counter()
            sample(pipeline, prompts, range(batch), batch=batch)
            facts[f"threads_{threads}_batch_{batch}"] = round(batch / (time.perf_counter() - start), 2)
    torch.set_num_threads(before)
    return facts


def measure_sizes() -> dict[str, dict[str, float]]:
    """Parameters in millions and bytes in MiB of every weight file, and the whole folder."""
    facts = {}
    for path in sorted(HERE.rglob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            count = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
        facts[str(path.parent.relative_to(HERE))] = {
            "parameters_m": round(count / 1e6, 2),
            "mib": round(path.stat().st_size / MEBIBYTE, 2),
        }
    total = sum(p.stat().st_size for p in HERE.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return facts | {"everything": {"mib": round(total / MEBIBYTE, 2)}}


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def report(card: dict[str, Any]) -> str:
    """The card's numbers as Markdown tables."""
    columns = ["samples", "match", "malformed", "wrong_but_well_formed", "filter_auc", "judge_auc"]
    kept = [f"filter_match_after_rejecting_{r:.0%}" for r in REJECTED]
    head = ["samples", "match", "malformed", "well-formed but wrong", "filter AUC", "judge AUC"]
    head += [f"match, {r:.0%} rejected" for r in REJECTED]

    def rows(name: str) -> list[list[Any]]:
        return [[key, *(facts[c] for c in columns + kept)] for key, facts in card[name].items()]

    default = card["guidance"][str(card["default_guidance"])]
    kinds = [*ATTRIBUTE_CHANGES, "all"]
    parts = [
        f"Guidance, with {card['default_steps']} steps:",
        table(["guidance", *head], rows("guidance")),
        f"Steps, with guidance {card['default_guidance']}:",
        table(["steps", *head], rows("steps")),
        "Attributes right at the defaults:",
        table(ATTRIBUTES, [[default[f"{name}_right"] for name in ATTRIBUTES]]),
        "AUC of true prompts against prompts with one thing changed, on clean renders:",
        table(["model", *kinds], [[n, *(card["clean_auc"][n][k] for k in kinds)] for n in ("filter", "judge")]),
        "The checker's own errors, as shares:",
        table(["what", "share"], [[k.replace("_", " "), v] for k, v in card["checker"].items() if k != "pictures"]),
        "Sizes:",
        table(
            ["file", "parameters (M)", "MiB"],
            [[k, v.get("parameters_m", ""), v["mib"]] for k, v in card["sizes"].items()],
        ),
        "Pictures per second at the defaults:",
        table(["setting", "pictures/s"], [[k.replace("_", " "), v] for k, v in card["speed"].items()]),
        "Training (several runs mean that the later one went on from the weights of the earlier):",
        table(["part", "run"], [[part, json.dumps(run)] for part, runs in card["training"].items() for run in runs]),
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--samples",
        type=int,
        default=672,
        help="samples per setting; 672 is one of every scene",
    )
    args = parser.parse_args()

    scenes = random.Random(12).sample(all_scenes(), min(args.samples, len(all_scenes())))
    prompts, seeds = [caption(s) for s in scenes], range(1000, 1000 + len(scenes))
    scorers = {"filter": Scorer(FILTER), "judge": Scorer(JUDGE)}
    clean = render(scenes, torch.Generator().manual_seed(12))
    pipeline = load_pipeline()

    made = {(DEFAULT_STEPS, g): None for g in GUIDANCES} | {(n, DEFAULT_GUIDANCE): None for n in STEP_COUNTS}
    for steps, guidance in made:
        images = sample(pipeline, prompts, seeds, steps, guidance)
        made[steps, guidance] = measure_samples(images, prompts, scorers)
        print(f"steps {steps}, guidance {guidance}: {made[steps, guidance]}", flush=True)
        if (steps, guidance) == (DEFAULT_STEPS, DEFAULT_GUIDANCE):
            found = check(images[:SHOWN], prompts[:SHOWN])
            contact_sheet.draw(HERE / "contact_sheet.png", images[:SHOWN], prompts[:SHOWN], found)
    clean_auc = {name: hard_negative_auc(scorer, clean, scenes) for name, scorer in scorers.items()}
    card = {
        "default_steps": DEFAULT_STEPS,
        "default_guidance": DEFAULT_GUIDANCE,
        "guidance": {str(g): made[DEFAULT_STEPS, g] for g in GUIDANCES},
        "steps": {str(n): made[n, DEFAULT_GUIDANCE] for n in STEP_COUNTS},
        "clean_auc": {n: {k: round(v, 4) for k, v in facts.items()} for n, facts in clean_auc.items()},
        "checker": measure_checker(pipeline.vae, 1500),
        "speed": measure_speed(pipeline),
        "sizes": measure_sizes(),
        "training": json.loads((HERE / "training.json").read_text()),
    }
    (HERE / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    text, page = report(card), HERE / "README.md"
    if page.exists():
        between = re.compile(r"(<!-- numbers begin -->\n).*?(<!-- numbers end -->)", re.DOTALL)
        page.write_text(between.sub(lambda m: f"{m[1]}\n{text}\n\n{m[2]}", page.read_text()))
    print(text)
    print(json.dumps(card))


if __name__ == "__main__":
    main()
