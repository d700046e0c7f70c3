"""The loop of a training: batches in, gradients, weights out; whatever the method, the model and the number of devices.

What is drawn at a step (noise, times, dropout) depends on the seed and the step alone, and so does the batch: a training that was
stopped goes on from its last checkpoint and ends in the weights it would have had. Started by `accelerate launch`, all processes
share each batch.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch.nn import functional as F

from tasks.adapters import Embeddings, Lora
from tasks.engines.memory import free_memory
from tasks.engines.models import ModelFolder
from tasks.store import Store, layout
from tasks.trainers import checkpoints, samples
from tasks.trainers.batches import Batch, Batches, Item, mask, pixels
from tasks.trainers.caches import MOST_BYTES, Cache, in_calls
from tasks.trainers.checkpoints import Record
from tasks.trainers.errors import Diverged
from tasks.trainers.losses import squared_errors
from tasks.trainers.seeds import mixed
from tasks.trainers.settings import Settings
from tasks.trainers.student import Place, Student

SMOOTHED = 50  # steps whose mean is the loss that is told, and compared
RUNAWAY = 3.0  # times the loss of the first steps: diverged
BETAS = (0.9, 0.999)
MOST_ENCODED, ENCODED_PIXELS = 16, 1024 * 1024  # pictures or captions in one call; pixels in one of the VAE
MOMENTS = (
    "exp_avg",
    "exp_avg_sq",
    "step",
)  # AdamW's; the steps are fewer than the training's where float16 left some out

log = logging.getLogger(__name__)

_Read = tuple[int, Batch, Callable[[Item], torch.Tensor]]  # images in all processes, this one's, and their pixels


@dataclass(frozen=True)
class Progress:
    """How far a training is."""

    step: int
    steps: int
    loss: float  # mean of the latest SMOOTHED steps
    rate: float  # steps/s, of this start
    samples: tuple[tuple[str, str], ...] = ()  # images just made: prompt, key

    @property
    def seconds_left(self) -> float:
        return (self.steps - self.step) / self.rate if self.rate else math.inf

    @property
    def in_words(self) -> str:
        left = f"{self.seconds_left:.0f} s left" if self.rate else "…"
        return f"loss {self.loss:.4f} · {self.rate:.1f} steps/s · {left}"


class Learner(Protocol):
    """What learns on a student."""

    trigger: str

    @property
    def learns_texts(self) -> bool:
        """Whether captions are embedded anew at each step."""

    def groups(self) -> list[tuple[dict[str, torch.nn.Parameter], float]]:
        """Parameters by name, with their learning rate."""

    def adapter(self) -> Lora | Embeddings: ...

    def caption(self, text: str, is_reg: bool) -> str:
        """A caption as it is learnt."""


class Training:
    """A student that learns. `run` does the steps that are missing. `cached` False: nothing is kept, for comparison."""

    def __init__(
        self,
        training: str,
        folder: ModelFolder,
        batches: Batches,
        learner: Callable[[Student, Settings], Learner],
        settings: Settings,
        dtype: str,
        store: Store,
        cached: bool = True,
    ):
        self.id, self.settings, self.batches, self.store = training, settings, batches, store
        self._processes = PartialState()  # only this one, unless `accelerate launch` started several
        self._student = Student(folder, dtype)
        self._scaler = torch.amp.GradScaler(self._student.device.type, enabled=dtype == "float16")
        self._lower: Any = nullcontext if dtype == "float32" else self._autocast
        self._dtype = getattr(torch, dtype)
        self._learner = learner(self._student, settings)
        if settings.checkpointing:
            self._student.spare_memory()
        if settings.compiled:
            self._student.compile()
        groups = self._learner.groups()
        self._parameters = {name: parameter for group, _ in groups for name, parameter in group.items()}
        self._rates = [rate for _, rate in groups]
        self._optimizer = torch.optim.AdamW(
            [{"params": list(group.values()), "lr": rate} for group, rate in groups],
            betas=BETAS,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._mean = {name: p.detach().clone() for name, p in self._parameters.items()} if settings.ema else {}
        room = MOST_BYTES // (2 * self._processes.num_processes)
        self._latents = Cache(room if cached and batches.cacheable else 0)
        self._texts = Cache(room if cached and not self._learner.learns_texts else 0)
        self._together = min(MOST_ENCODED, max(dataset.batch_size for dataset in batches.datasets))
        self.record = Record()

    @property
    def prediction_type(self) -> str:
        return self._student.objective.prediction

    @property
    def trigger(self) -> str:
        return self._learner.trigger

    @property
    def loss(self) -> float:
        return _mean(self.record.late)

    def run(self, told: Callable[[Progress], None]) -> None:
        """Do the steps that are missing, from the last checkpoint. Raises Diverged, PictureError, and what `told` raises."""
        settings = self.settings
        if found := checkpoints.load(self.store, self.id):
            self._restore(*found)
        started, before, first = time.monotonic(), self.record.seconds, self.record.step
        with _own_random_numbers(), ThreadPoolExecutor(1) as reader:
            ahead = self._read(reader, first * settings.accumulation)
            for step in range(first, settings.steps):
                torch.manual_seed(mixed(settings.seed, step))
                loss = 0.0
                for part in range(settings.accumulation):
                    number = step * settings.accumulation + part
                    ready, ahead = ahead, self._read(reader, number + 1)
                    loss += self._learn(number, *ready.result()) / settings.accumulation
                self._note_loss(step, loss)
                self._change(step)
                done = self.record.step = step + 1
                self.record.seconds = before + time.monotonic() - started
                shown: tuple[tuple[str, str], ...] = ()
                if done % settings.checkpoint_every == 0 or done == settings.steps:
                    shown = self._checkpoint()
                told(Progress(done, settings.steps, self.loss, (done - first) / (time.monotonic() - started), shown))

    def adapter(self) -> Lora | Embeddings:
        """What was learnt; with `ema`, its mean."""
        with self._as_kept():
            return self._learner.adapter()

    # --- a step ----------------------------------------------------------------------------------------------------------

    def _read(self, reader: ThreadPoolExecutor, number: int) -> "Future[_Read]":
        """Have the pixels of a batch read, ahead of their turn, but for those whose latents are held."""

        def read() -> _Read:
            whole = self.batches.batch(number)
            batch = Batch(whole.items[self._mine], whole.size)
            ready = {_key(item): pixels(item) for item in batch.items if _key(item) not in self._latents}
            return len(whole.items), batch, lambda item: ready[_key(item)] if _key(item) in ready else pixels(item)

        return reader.submit(read)

    @property
    def _mine(self) -> slice:
        """This process's part of a batch: all of it where there is one process."""
        return slice(self._processes.process_index, None, self._processes.num_processes)

    def _autocast(self) -> Any:
        return torch.autocast(self._student.device.type, self._dtype)

    def _learn(self, number: int, whole: int, batch: Batch, read: Callable[[Item], torch.Tensor]) -> float:
        """Add the gradient of a batch of `whole` images in all processes, over the number of batches in a step; its loss."""
        settings, student, device = self.settings, self._student, self._student.device
        random = torch.Generator().manual_seed(mixed(settings.seed, number, 1))
        objective = student.objective
        times = objective.draw(whole, settings.timesteps, random)
        dropped = torch.rand(whole, generator=random) < settings.caption_dropout
        cells = self._cells(batch)
        drawn, noise = (torch.randn(whole, *cells, generator=random) for _ in range(2))
        times, dropped, drawn, noise = (of_all[self._mine] for of_all in (times, dropped, drawn, noise))
        if not batch.items:
            return self._of_all(torch.zeros((), device=device)).item()
        with self._lower():
            moments = self._moments(batch, read)
            clean = student.latents(moments, drawn.to(device)).to(device)
            noise, times = noise.to(device), times.to(device)
            captions = [
                "" if drop else self._learner.caption(item.caption, item.is_reg)
                for item, drop in zip(batch.items, dropped.tolist(), strict=True)
            ]
            noisy = objective.noisy(clean, noise, times)
            predicted = student.predict(
                noisy.to(student.denoiser.dtype),
                times,
                self._embeddings(captions),
                [Place.of(item) for item in batch.items],
            )
        errors = squared_errors(predicted, objective.target(clean, noise, times), self._mask(batch, clean))
        prior = [settings.prior_weight if item.is_reg else 1.0 for item in batch.items]
        weights = objective.weights(times, settings.min_snr_gamma) * torch.tensor(prior, device=device)
        loss = (errors * weights).sum() / whole
        self._scaler.scale(loss / settings.accumulation).backward()
        return float(self._of_all(loss.detach()))

    def _of_all(self, mine: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""
        return reduce(mine, "sum") if self._processes.num_processes > 1 else mine

    def _add_up(self, parameters: list[torch.nn.Parameter]) -> None:
        """Give each parameter the sum of its gradients in all processes, which are sent as one."""
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        summed = self._of_all(torch.cat([gradient.flatten() for gradient in own]))
        parts = summed.split([gradient.numel() for gradient in own])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def _cells(self, batch: Batch) -> tuple[int, int, int]:
        """Channels, height and width of a batch's latents."""
        width, height = batch.size
        config, factor = (
            self._student.pipeline.vae.config,
            2 ** (len(self._student.pipeline.vae.config.block_out_channels) - 1),
        )
        return config.latent_channels, height // factor, width // factor

    def _moments(self, batch: Batch, read: Callable[[Item], torch.Tensor]) -> torch.Tensor:
        by_key = {_key(item): item for item in batch.items}

        def compute(keys: list[Any]) -> list[tuple[torch.Tensor, ...]]:
            width, height = batch.size
            some = max(1, min(self._together, ENCODED_PIXELS // (width * height)))
            return in_calls(
                keys, some, lambda call: (self._student.moments(torch.stack([read(by_key[k]) for k in call])),)
            )

        return torch.stack(
            [held.to(self._student.device) for (held,) in self._latents.get([_key(i) for i in batch.items], compute)]
        )

    def _embeddings(self, captions: list[str]) -> tuple[torch.Tensor, ...]:
        if self._learner.learns_texts:
            return self._student.texts(captions)

        def compute(texts: list[str]) -> list[tuple[torch.Tensor, ...]]:
            with torch.no_grad(), self._student.exact():
                return in_calls(texts, self._together, self._student.texts)

        held = zip(*self._texts.get(captions, compute), strict=True)
        return tuple(torch.stack([tensor.to(self._student.device) for tensor in tensors]) for tensors in held)

    def _mask(self, batch: Batch, like: torch.Tensor) -> torch.Tensor | None:
        """The weights of the latents' places, [n, 1, h', w']; None: all alike."""
        if not any(item.view.masked for item in batch.items):
            return None
        width, height = batch.size
        each = [mask(item) for item in batch.items]
        whole = torch.stack([torch.ones(1, height, width) if one is None else one for one in each])
        return F.interpolate(whole, like.shape[-2:], mode="area").to(like.device)

    def _change(self, step: int) -> None:
        """Change the weights by the step's gradient. Raises Diverged."""
        settings = self.settings
        parameters = list(self._parameters.values())
        if self._processes.num_processes > 1:
            self._add_up(parameters)
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip or math.inf)
        if not self._scaler.is_enabled() and not math.isfinite(norm):  # the scaler leaves such a step out by itself
            raise Diverged(f"training {self.id}: the gradient of step {step + 1} is {float(norm)}; {self._advice}")
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * settings.rate(step)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        if settings.ema:
            decay = min(settings.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    self._mean[name].lerp_(parameter, 1 - decay)

    def _note_loss(self, step: int, loss: float) -> None:
        """Note the loss of a step. Raises Diverged."""
        record = self.record
        if not math.isfinite(loss):
            raise Diverged(f"training {self.id}: the loss of step {step + 1} is {loss}; {self._advice}")
        if len(record.early) < SMOOTHED:
            record.early.append(loss)
        record.late = [*record.late[1 - SMOOTHED :], loss]
        if step >= 2 * SMOOTHED and _mean(record.late) > RUNAWAY * _mean(record.early):
            raise Diverged(
                f"training {self.id}: the loss rose from {_mean(record.early):.4f} to {_mean(record.late):.4f} by step {step + 1} (means "
                f"of {SMOOTHED} steps); {self._advice}"
            )

    @property
    def _advice(self) -> str:
        return (
            "nothing of it is published. Lower the learning rate (learning_rate, now "
            f"{self.settings.learning_rate:g}), or raise warmup; in float16, take bfloat16"
        )

    # --- its state -------------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> tuple[tuple[str, str], ...]:
        if not self._processes.is_main_process:
            return ()
        tensors: dict[str, torch.Tensor] = {f"weight/{name}": parameter for name, parameter in self._parameters.items()}
        tensors |= {f"mean/{name}": mean for name, mean in self._mean.items()}
        for name, parameter in self._parameters.items():
            if moments := self._optimizer.state[parameter]:  # SDXL reads no embedding of its first encoder's last layer
                tensors |= {f"{key}/{name}": moments[key] for key in MOMENTS}
        self.record.scaler = self._scaler.state_dict()
        checkpoints.save(self.store, self.id, self.record, tensors)
        if not self.settings.samples:
            return ()
        with self._as_kept():
            return samples.make(
                self._student, self.settings, self.batches.datasets[0].resolution, self.store, self._sample_key
            )

    def _sample_key(self, number: int) -> str:
        return layout.training_sample(self.id, self.record.step, number)

    def _restore(self, record: Record, tensors: dict[str, torch.Tensor]) -> None:
        self.record = record
        self._scaler.load_state_dict(record.scaler)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"weight/{name}"])
                if f"{MOMENTS[0]}/{name}" in tensors:
                    moments = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in MOMENTS}
                    self._optimizer.state[parameter] = moments
            for name, mean in self._mean.items():
                mean.copy_(tensors[f"mean/{name}"])
        log.info("training %s goes on after step %d", self.id, record.step)

    @contextmanager
    def _as_kept(self) -> Iterator[None]:
        """With the mean in the place of the weights, where there is one."""
        own = {name: self._parameters[name].detach().clone() for name in self._mean}
        with torch.no_grad():
            for name, mean in self._mean.items():
                self._parameters[name].copy_(mean)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weights in own.items():
                    self._parameters[name].copy_(weights)

    def close(self) -> None:
        """Give the device's memory back."""
        del self._student, self._learner, self._optimizer, self._parameters, self._latents, self._texts
        free_memory()


def _key(item: Item) -> tuple[str, Any]:
    return item.picture.id, item.view


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Dropout draws from torch's global numbers, which others in this process find as they were."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices):
        yield
