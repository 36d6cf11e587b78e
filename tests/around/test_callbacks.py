"""The callbacks do what a loop does, find the optimizer, and go on from the trainers' own checkpoints bit for bit."""

import builtins
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_regpen.callbacks
from torch_regpen import L1, RegularizedOptimizer
from torch_regpen.callbacks.regularizer import Regularizer
from torch_regpen.schedules import CosineRamp, LamScheduler, LinearRamp, TargetSparsity
from torch_regpen.tensorboard import WeightLogger

STEPS = 12  # optimizer steps of a training: 4 epochs of 3 steps, each of 2 batches


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def optimizer_on(model):
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    return RegularizedOptimizer(adam, L1(model, 0.02), mode="dual")


def data():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(24, 8, generator=generator), torch.randint(3, (24,), generator=generator))


def batches():
    return DataLoader(data(), batch_size=4)


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def to_sparsity(optimizer):
    return TargetSparsity(optimizer, 0.5, steps=10, every=1)


def ramp(optimizer):
    return LinearRamp(optimizer.penalty, 10)


def ramp_after_a_pause(optimizer):
    return LamScheduler(optimizer.penalty, lambda step: max(step - 7, 0) / 5)


def loop(schedule=None, freeze_at=None):
    """The training that the callbacks are to do, written out."""
    model = network()
    optimizer = optimizer_on(model)
    schedule = schedule and schedule(optimizer)
    steps = 0
    for _ in range(4):
        for i, batch in enumerate(batches()):
            (loss_of(model, batch) / 2).backward()
            if i % 2:
                optimizer.step()
                steps += 1
                if schedule:
                    schedule.step()
                if steps == freeze_at:
                    optimizer.freeze_zeros()
                optimizer.zero_grad()
    return model


def assert_same(model, expected):
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any((p == 0).any() for p in model.parameters())


class Written:
    """A writer that keeps the steps and the values of a scalar."""

    def __init__(self, tag="penalty/lam"):
        self.tag, self.points = tag, []

    def add_scalar(self, tag, value, step):
        if tag == self.tag:
            self.points.append((step, value))

    def add_histogram_raw(self, *args, **kw):
        """Nobody looks."""


# Lightning


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning")


def lightning_fit(lightning, folder, callbacks=(), epochs=4, resume=None, make=optimizer_on, accumulate=2):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.optimizer = make(self.net)
            for found in [self.optimizer] if isinstance(self.optimizer, RegularizedOptimizer) else []:
                self.penalty = found.penalty  # lambda travels with the model, as in the example

        def training_step(self, batch, _):
            return loss_of(self.net, batch)

        def configure_optimizers(self):
            return self.optimizer

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        default_root_dir=folder,
        **dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing"), False),
    )
    trainer.fit(module, batches(), ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return module.net


@pytest.mark.parametrize(
    ("schedule", "freeze_at"), [(to_sparsity, None), (ramp, 8), (None, 5), (ramp_after_a_pause, None)]
)
def test_lightning_with_the_callback_is_the_loop(lightning, tmp_path, schedule, freeze_at):
    callback = torch_regpen.callbacks.LightningRegularizer(schedule=schedule, freeze_at=freeze_at)
    model = lightning_fit(lightning, tmp_path, [callback])
    assert_same(model, loop(schedule, freeze_at))
    assert callback.steps == STEPS


@pytest.mark.parametrize("epochs", [2, 3])
@pytest.mark.parametrize(("schedule", "freeze_at"), [(to_sparsity, None), (ramp, 8), (ramp_after_a_pause, None)])
def test_lightning_resumes_bit_for_bit(lightning, tmp_path, schedule, freeze_at, epochs):
    kw = {"schedule": schedule, "freeze_at": freeze_at}
    LightningRegularizer = torch_regpen.callbacks.LightningRegularizer
    lightning_fit(lightning, tmp_path, [LightningRegularizer(**kw)], epochs=epochs)
    resumed = LightningRegularizer(**kw)
    model = lightning_fit(lightning, tmp_path, [resumed], resume=tmp_path / f"{epochs}.ckpt")
    assert_same(model, loop(schedule, freeze_at))
    assert resumed.steps == STEPS


def test_lightning_resumes_a_callback_for_each_of_two_optimizers(lightning, tmp_path):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.nets = nn.ModuleList([network(), network()])
            self.made = [optimizer_on(net) for net in self.nets]

        def training_step(self, batch, _):
            for net, optimizer in zip(self.nets, self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(loss_of(net, batch))
                optimizer.step()

        def configure_optimizers(self):
            return self.made

    def fit(epochs, resume=None):
        module = Module()
        callbacks = [
            LightningRegularizer(made, schedule=LinearRamp(made.penalty, steps))
            for made, steps in zip(module.made, (5, 50), strict=True)
        ]
        off = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing"), False)
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=callbacks, default_root_dir=tmp_path, **off
        )
        trainer.fit(module, batches(), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module, [made.penalty.lam for made in module.made]

    LightningRegularizer = torch_regpen.callbacks.LightningRegularizer
    whole, lams = fit(4)
    fit(2)
    resumed, resumed_lams = fit(4, tmp_path / "2.ckpt")
    assert resumed_lams == lams == pytest.approx([0.02, 0.02 * 24 / 50])
    assert_same(resumed, whole)


def test_lightning_logs_after_each_optimizer_step(lightning, tmp_path):
    writer = Written()
    callback = torch_regpen.callbacks.LightningRegularizer(
        schedule=ramp, logger=lambda optimizer: WeightLogger(writer, optimizer, every=5)
    )
    lightning_fit(lightning, tmp_path, [callback])
    assert writer.points == [(5, pytest.approx(0.01)), (10, pytest.approx(0.02))]


def test_lightning_without_a_regularized_optimizer_is_refused(lightning, tmp_path):
    callback = torch_regpen.callbacks.LightningRegularizer(freeze_at=3)
    with pytest.raises(ValueError, match=r"has Adam, and no RegularizedOptimizer.*configure_optimizers return"):
        lightning_fit(lightning, tmp_path, [callback], make=lambda net: torch.optim.Adam(net.parameters()))


def test_lightnings_own_wrapper_is_seen_through(lightning):
    optimizer = optimizer_on(network())
    wrapped = lightning.pytorch.core.optimizer.LightningOptimizer(optimizer)
    callback = torch_regpen.callbacks.LightningRegularizer(wrapped)
    callback._attach([wrapped])
    wrapped.zero_grad()
    optimizer.step()
    assert callback.steps == 1


# The Trainer of transformers


@pytest.fixture
def transformers():
    pytest.importorskip("accelerate")
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    return module


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels):
        return {"loss": loss_of(self.net, (x, labels))}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(data())

    def __getitem__(self, i):
        x, y = data()[i]
        return {"x": x, "labels": y}


def transformers_fit(transformers, folder, callback, resume=None, make=optimizer_on, stop_at=None, **kw):
    model = WithLoss()
    args = transformers.TrainingArguments(
        output_dir=folder,
        num_train_epochs=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="steps",
        save_steps=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **kw,
    )

    class Interrupted(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == stop_at

    optimizer = make(model.net)
    trainer = transformers.Trainer(
        model=model,
        args=args,
        train_dataset=Rows(),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        callbacks=[callback, Interrupted()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return model.net


@pytest.mark.parametrize(("schedule", "freeze_at"), [(to_sparsity, None), (ramp, 3), (ramp, 8)])
def test_the_trainer_resumes_bit_for_bit(transformers, tmp_path, schedule, freeze_at):
    kw = {"schedule": schedule, "freeze_at": freeze_at}
    TrainerRegularizer = torch_regpen.callbacks.TrainerRegularizer
    straight = transformers_fit(transformers, tmp_path / "straight", TrainerRegularizer(**kw))
    transformers_fit(transformers, tmp_path / "first", TrainerRegularizer(**kw), stop_at=4)
    resumed = TrainerRegularizer(**kw)
    checkpoint = str(tmp_path / "first" / "checkpoint-4")
    model = transformers_fit(transformers, tmp_path / "second", resumed, resume=checkpoint)
    assert_same(model, straight)
    assert resumed.steps == STEPS


def test_the_trainer_steps_and_logs_by_optimizer_steps(transformers, tmp_path):
    writer = Written()
    callback = torch_regpen.callbacks.TrainerRegularizer(
        schedule=ramp, logger=lambda optimizer: WeightLogger(writer, optimizer, every=5)
    )
    transformers_fit(transformers, tmp_path, callback)
    assert writer.points == [(5, pytest.approx(0.01)), (10, pytest.approx(0.02))]


def test_a_trainer_without_a_regularized_optimizer_is_refused(transformers, tmp_path):
    callback = torch_regpen.callbacks.TrainerRegularizer(freeze_at=3)
    with pytest.raises(ValueError, match=r"has AcceleratedOptimizer, and no RegularizedOptimizer.*optimizers=\("):
        transformers_fit(transformers, tmp_path, callback, make=lambda net: torch.optim.Adam(net.parameters()))


def test_a_trainer_that_would_replace_the_callback_is_refused(transformers, tmp_path):
    TrainerRegularizer = torch_regpen.callbacks.TrainerRegularizer
    transformers_fit(transformers, tmp_path, TrainerRegularizer(schedule=ramp), stop_at=4)
    kw = {"resume": str(tmp_path / "checkpoint-4"), "restore_callback_states_from_checkpoint": True}
    with pytest.raises(ValueError, match="leave it at False"):
        transformers_fit(transformers, tmp_path, TrainerRegularizer(schedule=ramp), **kw)


# What both share


def attached(optimizers, **kw):
    regularizer = Regularizer(**kw)
    regularizer._attach(optimizers)
    return regularizer


def test_a_schedule_may_be_given_as_it_is_where_the_optimizer_is_known():
    optimizer = optimizer_on(network())
    attached([optimizer], optimizer=optimizer, schedule=CosineRamp(optimizer.penalty, 2))
    optimizer.step()
    assert optimizer.penalty.lam == pytest.approx(0.01)


def test_after_the_training_steps_do_not_count():
    optimizer = optimizer_on(network())
    regularizer = attached([optimizer])
    regularizer._detach()
    optimizer.step()
    assert regularizer.steps == 0


def test_a_second_training_goes_on_with_the_count_and_the_schedule():
    first, second = optimizer_on(network()), optimizer_on(network())
    regularizer = attached([first], schedule=ramp)
    first.step()
    regularizer._detach()
    regularizer._attach([second])
    second.step()
    assert regularizer.steps == 2
    assert second.penalty.lam == pytest.approx(0.02 * 2 / 10)
    assert first.penalty.lam == pytest.approx(0.02 * 1 / 10)


def test_zeros_can_be_frozen_from_the_start():
    optimizer = optimizer_on(network())
    attached([optimizer], freeze_at=0)
    assert optimizer.zeros_are_frozen


def test_of_several_optimizers_one_must_be_named():
    one, other = optimizer_on(network()), optimizer_on(network())
    with pytest.raises(ValueError, match=r"has 2 RegularizedOptimizers.*optimizer=\.\.\."):
        attached([one, other])
    regularizer = attached([one, other], optimizer=other)
    one.step()
    assert regularizer.steps == 0
    other.step()
    assert regularizer.steps == 1


def test_what_belongs_to_another_optimizer_is_refused():
    optimizer, stranger = optimizer_on(network()), optimizer_on(network())
    with pytest.raises(ValueError, match="the given optimizer is not one that the trainer has"):
        attached([optimizer], optimizer=stranger)
    with pytest.raises(ValueError, match="TargetSparsity was made for an optimizer that the trainer does not use"):
        attached([optimizer], schedule=to_sparsity(stranger))


def test_a_saved_schedule_is_not_dropped_silently():
    state = attached([optimizer_on(network())], schedule=ramp).state_dict()
    regularizer = Regularizer()
    regularizer.load_state_dict(state)
    with pytest.raises(ValueError, match="holds the state of a schedule"):
        regularizer._attach([optimizer_on(network())])


@pytest.mark.parametrize(
    ("kw", "error", "match"),
    [
        ({"optimizer": torch.optim.SGD([torch.ones(1)], 0.1)}, TypeError, "optimizer is a SGD.*RegularizedOptimizer"),
        ({"schedule": 3}, TypeError, "schedule is a int.*torch_regpen.schedules"),
        ({"logger": "runs"}, TypeError, "logger is a str.*WeightLogger"),
        ({"freeze_at": 2.0}, TypeError, "freeze_at=2.0 is a float.*int, 0 or more"),
        ({"freeze_at": -1}, ValueError, "freeze_at=-1; allowed is an int, 0 or more"),
    ],
)
def test_a_bad_argument_is_refused_at_once(kw, error, match):
    with pytest.raises(error, match=match):
        Regularizer(**kw)


def test_a_callable_that_makes_something_else_is_refused():
    with pytest.raises(TypeError, match="the callable for the schedule returned a float"):
        attached([optimizer_on(network())], schedule=lambda optimizer: optimizer.penalty.lam)


@pytest.mark.parametrize(
    ("name", "module"), [("LightningRegularizer", "lightning"), ("TrainerRegularizer", "huggingface")]
)
def test_without_the_framework_the_extra_is_named(name, module, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kw):
        if name.split(".")[0] in ("lightning", "pytorch_lightning", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kw)

    monkeypatch.delitem(sys.modules, f"torch_regpen.callbacks.{module}", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf'{name} needs .*: pip install "torch_regpen\[stack\]"'):
        getattr(torch_regpen.callbacks, name)
