"""LoRA (Hu et al. 2021) on a student's denoiser, and on its CLIP text encoders where those learn, through PEFT."""

import re
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model

from tasks.adapters import Lora
from tasks.trainers.errors import NoTarget
from tasks.trainers.settings import ATTENTION, TEXT_ATTENTION, Settings
from tasks.trainers.student import Student

NAME = "learnt"  # what PEFT calls it


class LoraLearner:
    """A LoRA on the student, its matrices in float32. Raises NoTarget."""

    trigger = ""

    def __init__(self, student: Student, settings: Settings):
        self._settings = settings
        self._components = {student.denoiser_name: student.denoiser}
        self._components |= student.clip_encoders if settings.text_encoder else {}
        if settings.method == "dreambooth":
            self.trigger = settings.token
        self.layers: dict[str, Any] = {}  # by module, unet.….to_q
        with torch.random.fork_rng(devices=[]):  # the matrices begin on the CPU
            torch.manual_seed(settings.seed)
            for component, module in self._components.items():
                self._inject(component, module)
        if not any(module.startswith(student.denoiser_name) for module in self.layers):
            raise NoTarget(settings.targets, student.denoiser_name, student.folder.path)
        for module in self._components.values():
            module.train()

    @property
    def learns_texts(self) -> bool:
        return self._settings.text_encoder

    def groups(self) -> list[tuple[dict[str, torch.nn.Parameter], float]]:
        """The parameters by name, and their learning rates: the denoiser's, the text encoders'."""
        denoiser: dict[str, torch.nn.Parameter] = {}
        texts: dict[str, torch.nn.Parameter] = {}
        for module, layer in self.layers.items():
            place = texts if module.startswith("text_encoder") else denoiser
            place[f"{module}.lora_A.weight"] = layer.lora_A[NAME].weight
            place[f"{module}.lora_B.weight"] = layer.lora_B[NAME].weight
        rate = self._settings.learning_rate
        return [(denoiser, rate), *([(texts, self._settings.text_learning_rate or rate)] if texts else [])]

    def adapter(self) -> Lora:
        tensors = {name: parameter for group, _ in self.groups() for name, parameter in group.items()}
        return Lora(dict(tensors), dict.fromkeys(self.layers, self._settings.scale))

    def caption(self, text: str, is_reg: bool) -> str:
        """DreamBooth's word stands in each caption of what is learnt, and in none of its class."""
        return text if is_reg else with_word(text, self.trigger)

    def _inject(self, component: str, module: Any) -> None:
        attention = TEXT_ATTENTION if component.startswith("text_encoder") else ATTENTION
        kinds = (torch.nn.Linear, torch.nn.Conv2d)
        able = [path for path, inner in module.named_modules() if isinstance(inner, kinds)]
        targets = [path for path in able if self._settings.aims_at(path, attention)]
        if not targets:
            return
        config = LoraConfig(
            r=self._settings.rank,
            lora_alpha=self._settings.scale,  # type: ignore[arg-type]
            lora_dropout=self._settings.dropout,
            target_modules="|".join(map(re.escape, targets)),
        )
        inject_adapter_in_model(config, module, NAME)
        for path in targets:
            layer = module.get_submodule(path)
            layer.lora_A.to(torch.float32)
            layer.lora_B.to(torch.float32)
            self.layers[f"{component}.{path}"] = layer


def with_word(text: str, word: str) -> str:
    """A caption with the word in front, where it has it nowhere as a word of its own."""
    there = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)
    return text if not word or there else f"{word} {text}".strip()
