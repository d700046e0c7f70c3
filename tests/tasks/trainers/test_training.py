"""Trainings of tiny pipelines with random weights, one of each shape the engine takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.adapters import Embeddings, Lora, read_adapter, write_adapter
from tasks.engines import Adapter, Order, open_engine
from tasks.engines.models import ModelFolder, default_recipe
from tasks.errors import Stopped
from tasks.store import Store, layout
from tasks.trainers import Diverged, Settings, Trained, TrainingError, check_fits, checkpoints, train, training_id
from tasks.trainers.batches import Batches, pixels
from tasks.trainers.lora import LoraLearner, with_word
from tasks.trainers.pictures import Dataset, Subset
from tasks.trainers.student import Student
from tasks.trainers.textual_inversion import TextualInversionLearner
from tasks.trainers.training import Progress, Training
from tests.drawn_pictures import pictures
from tests.tasks.adapters.loras import facts
from tests.tiny_pipelines import TINY, poison

SIZE = (16, 16)
SHORT = Settings(steps=4, rank=2, learning_rate=1e-2, checkpoint_every=2)


def datasets(count: int = 6, batch_size: int = 2, **subset: Any) -> list[Dataset]:
    return [Dataset((Subset(pictures(count, SIZE), **subset),), SIZE, batch_size)]


@pytest.fixture(scope="module", params=["sd15", "sd2", "sdxl", "sd3", "flux"])
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(TINY[request.param](tmp_path_factory.mktemp("models") / request.param))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(TINY["sd2"](tmp_path_factory.mktemp("models") / "sd2"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(TINY["sdxl"](tmp_path_factory.mktemp("models") / "sdxl"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def settings(**changes: Any) -> Settings:
    return Settings.model_validate({**SHORT.model_dump(), **changes})


def stopped_after(step: int) -> Callable[[Progress], None]:
    def told(progress: Progress) -> None:
        if progress.step == step:
            raise Stopped("as if it was killed")

    return told


def test_every_family_learns_and_its_adapter_is_worn(any_model: str, store: Store) -> None:
    done = train(any_model, datasets(), settings(text_encoder=True), store)
    assert isinstance(done.adapter, Lora) and done.steps == 4 and 0 < done.loss < 10
    folder = ModelFolder(Path(any_model))
    assert any(module.startswith("text_encoder.") for module in done.adapter.modules)
    recipe = default_recipe(any_model, steps=2, width=16, height=16)
    engine, orders = open_engine(any_model, recipe.dtype, 1), [Order("a dog", "", 1)]
    digest = write_adapter(
        store, done.adapter, facts(architecture=folder.pipeline, prediction_type=done.prediction_type)
    )
    wearing = replace(recipe, adapters=(Adapter(store.uri(layout.adapter(digest)), digest),))
    before, after, again = (engine.generate(orders, one).pixels for one in (recipe, wearing, recipe))
    assert (before != after).any() and (before == again).all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.3, "ema": 0.9, "caption_dropout": 0.3, "text_encoder": True, "schedule": "cosine", "warmup": 1},
        {"accumulation": 2, "min_snr_gamma": 5.0, "timesteps": "mid", "targets": "wide"},
        {"method": "textual_inversion", "vectors": 2},
    ],
    ids=["plain", "chance everywhere", "accumulated", "words"],
)
def test_stopped_anywhere_it_ends_in_the_same_weights(sd: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    asked = settings(steps=7, **changes)
    undisturbed = train(sd, datasets(), asked, Store(tmp_path / "undisturbed"))
    store = Store(tmp_path / "disturbed")
    for stop in (3, 5, 5, 6):  # a resume of a resume of …
        with pytest.raises(Stopped):
            train(sd, datasets(), asked, store, stopped_after(stop))
    steps: list[int] = []
    resumed = train(sd, datasets(), asked, store, lambda progress: steps.append(progress.step))
    assert steps == [7]
    assert resumed.adapter.digest == undisturbed.adapter.digest and resumed.loss == undisturbed.loss
    again = train(sd, datasets(), asked, store, lambda progress: pytest.fail("nothing is left to do"))
    assert again.adapter.digest == undisturbed.adapter.digest


def test_a_training_in_float16_whose_scale_was_too_large_ends_in_the_same_weights(
    sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first steps overflow and are left out: by the optimizer's count, too, which is fewer than the training's."""
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**40, backoff_factor=2.0**-12)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    asked = settings(steps=8, dtype="float16")
    undisturbed = train(sd, datasets(), asked, Store(tmp_path / "undisturbed"))
    store = Store(tmp_path / "disturbed")
    with pytest.raises(Stopped):
        train(sd, datasets(), asked, store, stopped_after(5))
    record, tensors = checkpoints.load(store, undisturbed.training) or pytest.fail("no checkpoint")
    assert record.scaler["scale"] < 2.0**40
    assert all(0 < int(step) < record.step for name, step in tensors.items() if name.startswith("step/"))
    assert train(sd, datasets(), asked, store).adapter.digest == undisturbed.adapter.digest


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["lora", "textual_inversion"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_half_precision_learns_and_shows_samples(
    name: str, method: str, dtype: str, request: pytest.FixtureRequest, store: Store
) -> None:
    asked = settings(method=method, dtype=dtype, sample_prompts="a dog", dropout=0.5 if method == "lora" else 0)
    told: list[Progress] = []
    done = train(request.getfixturevalue(name), datasets(), asked, store, told.append)
    assert 0 < done.loss < 10 and done.dtype == dtype
    assert len([sample for progress in told for sample in progress.samples]) == 2


@pytest.mark.slow
def test_a_compiled_model_learns_the_same_and_resumes_in_the_same_weights(sd: str, tmp_path: Path) -> None:
    asked = settings(steps=3, checkpoint_every=1, sample_prompts="a dog", learning_rate=1e-3)
    plain = train(sd, datasets(2), asked, Store(tmp_path / "plain"))
    compiled = asked.model_copy(update={"compiled": True})
    done = train(sd, datasets(2), compiled, Store(tmp_path / "whole"))
    store = Store(tmp_path / "stopped")
    with pytest.raises(Stopped):
        train(sd, datasets(2), compiled, store, stopped_after(2))
    assert train(sd, datasets(2), compiled, store).adapter.digest == done.adapter.digest
    assert isinstance(plain.adapter, Lora) and isinstance(done.adapter, Lora)
    for name, tensor in plain.adapter.tensors.items():
        torch.testing.assert_close(done.adapter.tensors[name], tensor, rtol=1e-2, atol=1e-4)


def test_what_is_frozen_computes_in_its_own_precision(sdxl: str, store: Store) -> None:
    """SDXL's VAE overflows in float16, and is float32 there."""
    with training(sdxl, store, settings(), dtype="float16") as running:
        student = running._student
        assert student.pipeline.vae.dtype == torch.float32
        (item, *_) = running.batches.batch(0).items
        expected = student.moments(pixels(item)[None])
        with running._lower():
            assert torch.equal(student.moments(pixels(item)[None]), expected)


def test_a_training_is_another_one_when_anything_that_decides_its_weights_is(sd: str) -> None:
    def named(data: list[Dataset], asked: Settings, base: str = "b", dtype: str = "float32") -> str:
        return training_id(base, data, asked, dtype)

    same = named(datasets(), SHORT)
    assert same == named(datasets(), settings(checkpoint_every=1, sample_prompts="a dog", alpha=SHORT.rank))
    others = [
        named(datasets(5), SHORT),
        named(datasets(batch_size=3), SHORT),
        named(datasets(flip_aug=True), SHORT),
        named(datasets(), settings(seed=1)),
        named(datasets(), settings(alpha=3)),
        named(datasets(), SHORT, base="c"),
        named(datasets(), SHORT, dtype="bfloat16"),
    ]
    assert len({same, *others}) == 1 + len(others)


@contextmanager
def training(
    model: str, store: Store, asked: Settings, data: list[Dataset] | None = None, **options: Any
) -> Iterator[Training]:
    folder = ModelFolder(Path(model))
    learner = TextualInversionLearner if asked.method == "textual_inversion" else LoraLearner
    batches = Batches(data or datasets(), asked.seed, folder.multiple)
    running = Training("t", folder, batches, learner, asked, options.pop("dtype", "float32"), store, **options)
    try:
        yield running
    finally:
        running.close()


def digest_of(model: str, place: Path, asked: Settings, data: list[Dataset] | None = None, **options: Any) -> str:
    with training(model, Store(place), asked, data, **options) as running:
        running.run(lambda progress: None)
        return running.adapter().digest


def test_what_is_cached_changes_nothing(any_model: str, tmp_path: Path) -> None:
    data = datasets(flip_aug=True)
    both = {
        digest_of(any_model, tmp_path / str(cached), settings(steps=6), data, cached=cached) for cached in (True, False)
    }
    assert len(both) == 1


def gradients(
    model: str, store: Store, asked: Settings, data: list[Dataset], numbers: range
) -> dict[str, torch.Tensor]:
    """Of the batches with these numbers."""
    with training(model, store, asked, data) as running:
        for number in numbers:
            batch = running.batches.batch(number)
            running._learn(number, len(batch.items), batch, pixels)
        return {name: p.grad.clone() for name, p in running._parameters.items() if p.grad is not None}


def test_a_step_follows_the_mean_of_its_batches(sd: str, store: Store) -> None:
    together = gradients(sd, store, settings(accumulation=2), datasets(), range(2))
    first, second = (gradients(sd, store, settings(), datasets(), range(n, n + 1)) for n in range(2))
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, (first[name] + second[name]) / 2)


def test_regularisation_weighs_what_it_is_told_to(sd: str, store: Store) -> None:
    def both(weight: float) -> dict[str, torch.Tensor]:
        data = [Dataset((Subset(pictures(1, SIZE)), Subset(pictures(1, SIZE, "reg"), is_reg=True)), SIZE, 2)]
        return gradients(sd, store, settings(prior_weight=weight), data, range(1))

    none, half, whole = both(0), both(0.5), both(1)
    for name, gradient in half.items():
        torch.testing.assert_close(gradient, (none[name] + whole[name]) / 2, rtol=1e-4, atol=1e-7)
    assert any((none[name] != whole[name]).any() for name in none)


def test_alpha_is_kept_and_written_in_both_forms(sd: str, store: Store) -> None:
    done = train(sd, datasets(), settings(alpha=0.7), store)
    assert isinstance(done.adapter, Lora) and set(done.adapter.alphas.values()) == {0.7}
    digest = write_adapter(store, done.adapter, facts())
    for name in ("adapter.safetensors", "kohya.safetensors"):
        found = read_adapter(store.path(f"{layout.adapter(digest)}/{name}"))
        assert found.digest == digest == done.adapter.digest


def test_targets_are_whom_they_name(sd: str) -> None:
    def modules(targets: str) -> set[str]:
        return set(LoraLearner(Student(ModelFolder(Path(sd)), "float32"), settings(targets=targets)).layers)

    attention, wide, two = modules("attention"), modules("wide"), modules("to_q, attn2.to_k")
    assert two < attention < wide
    assert {name.rsplit(".", 1)[1] for name in two} == {"to_q", "to_k"}
    assert any("resnets" in name for name in wide) and not any(
        "conv_in" in name or "time_embedding" in name for name in wide
    )
    with pytest.raises(TrainingError, match="fit no module of the unet"):
        modules("to_z")


def test_the_mean_of_the_weights_is_what_is_kept(sd: str, tmp_path: Path) -> None:
    """With a decay that has hardly begun, the mean is a mixture of all states: other weights than the last."""
    with training(sd, Store(tmp_path), settings(ema=0.999)) as running:
        states: list[torch.Tensor] = []
        name = next(iter(running._parameters))
        running.run(lambda progress: states.append(running._parameters[name].detach().clone()))
        mean = running._mean[name]
        expected = running.adapter()
    decays = [min(0.999, (1 + step) / (10 + step)) for step in range(4)]
    with training(sd, Store(tmp_path / "other"), settings(ema=0.999)) as fresh:
        value = fresh._parameters[name].detach().clone()
    for decay, state in zip(decays, states, strict=True):
        value = decay * value + (1 - decay) * state
    torch.testing.assert_close(mean, value)
    assert isinstance(expected, Lora) and any(torch.equal(tensor, mean) for tensor in expected.tensors.values())


def test_a_loss_that_is_no_number_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    model = poison(TINY["sd15"](tmp_path / "model"), "x")
    data = [Dataset((Subset(tuple(replace(one, caption="x") for one in pictures(4, SIZE))),), SIZE, 2)]
    store = Store(tmp_path / "store")
    with pytest.raises(Diverged, match=r"the loss of step 1 is nan.*learning_rate"):
        train(str(model), data, SHORT, store)
    assert store.list("") == []


def test_a_gradient_that_is_no_number_ends_it_before_a_weight_is_changed(sd: str, store: Store) -> None:
    with training(sd, store, settings(clip=0)) as running:
        name, parameter = next(iter(running._parameters.items()))
        before = parameter.detach().clone()
        parameter.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
        with pytest.raises(Diverged, match=r"the gradient of step 1 is (inf|nan).*learning_rate"):
            running.run(lambda progress: None)
        assert torch.equal(running._parameters[name], before)
    assert store.list("") == []


def test_a_loss_that_runs_away_ends_it(sd: str, store: Store) -> None:
    with training(sd, store, settings(steps=300)) as running:
        for step in range(120):
            running._note_loss(step, 0.1)
        for step in range(120, 132):  # the mean of fifty is not yet three times what it was
            running._note_loss(step, 0.9)
        with pytest.raises(Diverged, match=r"rose from 0\.1000 to 0\.30"):
            running._note_loss(132, 0.9)


# --- textual inversion -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_only_the_new_words_vectors_move(name: str, request: pytest.FixtureRequest, store: Store) -> None:
    model = request.getfixturevalue(name)
    asked = settings(method="textual_inversion", placeholder="<toy>", vectors=2, initializer="d")
    student = Student(ModelFolder(Path(model)), "float32")
    before = {part: encoder.get_input_embeddings().weight.clone() for part, encoder in student.clip_encoders.items()}
    learner = TextualInversionLearner(student, asked)
    begin = {part: vectors.detach().clone() for part, vectors in learner.vectors.items()}
    done = train(model, datasets(), asked, store)
    assert isinstance(done.adapter, Embeddings) and done.trigger == "<toy>"
    (vectors,) = done.adapter.tokens.values()
    assert len(vectors) == len(before) and all(one.shape[0] == 2 for one in vectors)
    for part, now in zip(sorted(begin), vectors, strict=True):
        assert (now != begin[part]).all(dim=1).any()
    learning = TextualInversionLearner(Student(ModelFolder(Path(model)), "float32"), asked)
    assert [len(group) for group, _ in learning.groups()] == [len(before)]
    for part, encoder in student.clip_encoders.items():
        assert torch.equal(encoder.get_input_embeddings().weight, before[part])


def test_words_that_cannot_be_learnt_are_refused(sd: str, tmp_path: Path) -> None:
    student = Student(ModelFolder(Path(sd)), "float32")
    with pytest.raises(TrainingError, match="knows the word 'a' already"):
        TextualInversionLearner(student, settings(method="textual_inversion", placeholder="a"))
    with pytest.raises(TrainingError, match="method=lora"):
        check_fits(settings(method="textual_inversion"), ModelFolder(TINY["sd3"](tmp_path / "sd3")))


def test_the_word_stands_in_each_caption() -> None:
    assert with_word("a dog", "<toy>") == "<toy> a dog" and with_word("a <toy>", "<toy>") == "a <toy>"
    assert with_word("", "<toy>") == "<toy>" and with_word("a dog", "") == "a dog"
    assert with_word("a caterpillar", "cat") == "cat a caterpillar" and with_word("a cat.", "cat") == "a cat."


# --- DreamBooth ------------------------------------------------------------------------------------------------------


def test_dreambooth_makes_its_class_once_and_mixes_it_in(sd: str, store: Store) -> None:
    asked = settings(method="dreambooth", token="sks", class_prompt="a dog", class_images=5)
    done: Trained = train(sd, datasets(), asked, store)
    made = store.list("trainings/classes")
    assert len(made) == 5 and done.trigger == "sks"
    stamps = [Path(store.path(key)).stat().st_mtime_ns for key in made]
    longer = train(sd, datasets(), settings(**asked.model_dump() | {"steps": 6}), store)
    assert [Path(store.path(key)).stat().st_mtime_ns for key in store.list("trainings/classes")] == stamps
    without = train(sd, datasets(), settings(**asked.model_dump() | {"class_images": 0}), store)
    assert len({done.adapter.digest, longer.adapter.digest, without.adapter.digest}) == 3


def test_samples_are_made_at_checkpoints(sd: str, store: Store) -> None:
    told: list[Progress] = []
    done = train(sd, datasets(), settings(sample_prompts="a dog | a cat"), store, told.append)
    samples = [sample for progress in told for sample in progress.samples]
    assert [prompt for prompt, _ in samples] == ["a dog", "a cat"] * 2
    keys = [key for _, key in samples]
    assert keys == [layout.training_sample(done.training, step, number) for step in (2, 4) for number in (0, 1)]
    assert all(store.read(key).startswith(b"\x89PNG") for key in keys)
