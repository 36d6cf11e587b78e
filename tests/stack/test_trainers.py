"""Trainers, unmodified: they take the wrapper as an optimizer, and what they do is what a loop does."""

import copy
import re
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from helpers.nets import assert_same, network
from helpers.optimizers import modes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_regpen import L1, L2, GroupLasso, RegularizedOptimizer
from torch_regpen.schedules import LinearRamp

EXAMPLES = Path(__file__).parents[2] / "examples"
LAM = 0.02
EPOCHS = 2


def dataset():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(32, 5, generator=generator), torch.randn(32, 3, generator=generator))


def loader():
    return DataLoader(dataset(), batch_size=8)


def loss_of(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def optimizer_on(model, mode):
    adamw = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    return RegularizedOptimizer(adamw, L1(model, LAM) + L2(model, LAM), mode)


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)


def loop(model, mode, accumulate=1, clip=None, dtype=None):
    """What each trainer is compared with; the scheduler steps once an epoch."""
    optimizer = optimizer_on(model, mode)
    scheduler = cosine(optimizer)
    for _ in range(EPOCHS):
        for i, batch in enumerate(loader()):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = loss_of(model, batch)
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
    return model


def run_example(name, *argv):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(EXAMPLES / name))["main"](argv)


def zeros_in(table):
    """The zeros in a summary, and the elements: its last row."""
    zeros, elements = re.findall(r"(\d+)/(\d+)", table)[-1]
    return int(zeros), int(elements)


# Lightning


@pytest.fixture
def lightning():
    module = pytest.importorskip("lightning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield module


def lightning_module(lightning, mode, penalty_inside=False):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.optimizer = optimizer_on(self.net, mode)
            if penalty_inside:
                self.penalty = self.optimizer.penalty

        def training_step(self, batch, _):
            return loss_of(self.net, batch)

        def configure_optimizers(self):
            return {"optimizer": self.optimizer, "lr_scheduler": cosine(self.optimizer)}

    return Module()


def trainer_of(lightning, folder, **kw):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    kw = quiet | {"enable_checkpointing": False, "max_epochs": EPOCHS} | kw
    return lightning.Trainer(accelerator="cpu", default_root_dir=folder, **kw)


@modes
def test_lightning_is_a_loop_with_accumulation_and_clipping(lightning, mode, tmp_path):
    module = lightning_module(lightning, mode)
    trainer_of(lightning, tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.5).fit(module, loader())
    assert_same(module.net, loop(network(), mode, accumulate=2, clip=0.5), 1e-6)


@modes
def test_lightning_is_a_loop_in_bfloat16(lightning, mode, tmp_path):
    module = lightning_module(lightning, mode)
    trainer_of(lightning, tmp_path, precision="bf16-mixed").fit(module, loader())
    assert_same(module.net, loop(network(), mode, dtype=torch.bfloat16), 1e-6)


@modes
def test_lightning_resumes_from_its_own_checkpoint_bit_for_bit(lightning, mode, tmp_path):
    straight = lightning_module(lightning, mode, penalty_inside=True)
    straight.penalty.penalties[0].lam = 3 * LAM
    trainer_of(lightning, tmp_path).fit(straight, loader())
    first = lightning_module(lightning, mode, penalty_inside=True)
    first.penalty.penalties[0].lam = 3 * LAM
    trainer = trainer_of(lightning, tmp_path, max_epochs=1)
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "epoch.ckpt")
    resumed = lightning_module(lightning, mode, penalty_inside=True)
    trainer_of(lightning, tmp_path).fit(resumed, loader(), ckpt_path=tmp_path / "epoch.ckpt")
    assert_same(resumed.net, straight.net)
    assert resumed.penalty.penalties[0].lam == 3 * LAM


def test_the_lightning_example_logs_to_lightnings_tensorboard(lightning, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_example("lightning_callback.py", "--epochs", "4", "--logdir", str(tmp_path))
    zeros, elements = zeros_in(capsys.readouterr().out)
    assert elements == 7400
    assert zeros > 0
    (folder,) = {file.parent for file in tmp_path.rglob("events.out*")}
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()
    assert {"weights/0.weight", "weights/2.weight"} <= set(events.Tags()["histograms"])
    assert [event.step for event in events.Scalars("penalty/value")] == [50]  # of the 60 steps, every 50th


# Accelerate


@pytest.fixture
def accelerate():
    module = pytest.importorskip("accelerate")
    yield module
    module.state.AcceleratorState._reset_state(True)
    module.state.GradientState._reset_state()


def accelerated(accelerate, model, mode, epochs=EPOCHS, accumulate=1, clip=None, resume=None, save=None, **kw):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **kw)
    optimizer = optimizer_on(model, mode)
    penalty = optimizer.penalty
    ramp = LinearRamp(penalty, 6)
    prepared, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    accelerator.register_for_checkpointing(penalty, ramp)
    if resume:
        accelerator.load_state(resume)
    for _ in range(epochs):
        for batch in batches:
            with accelerator.accumulate(prepared):
                accelerator.backward(loss_of(prepared, batch))
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ramp.step()
    if save:
        accelerator.save_state(save)
    return model


@modes
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_is_a_loop_with_accumulation_and_clipping(accelerate, mode, precision):
    model = accelerated(accelerate, network(), mode, accumulate=2, clip=0.5, mixed_precision=precision)
    expected = network()
    optimizer = optimizer_on(expected, mode)
    ramp = LinearRamp(optimizer.penalty, 6)
    for _ in range(EPOCHS):
        for i, batch in enumerate(loader()):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = loss_of(expected, batch) / 2
            loss.backward()
            if i % 2:
                nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                ramp.step()
    assert_same(model, expected, 1e-6)


@modes
def test_accelerate_saves_and_loads_all_of_it(accelerate, mode, tmp_path):
    straight = accelerated(accelerate, network(), mode)
    accelerated(accelerate, network(), mode, epochs=1, save=str(tmp_path))
    resumed = accelerated(accelerate, network(), mode, epochs=1, resume=str(tmp_path))
    assert_same(resumed, straight)


def test_the_accelerate_example_makes_zeros(accelerate, capsys):
    run_example("accelerate_loop.py", "--epochs", "6")
    zeros, elements = zeros_in(capsys.readouterr().out)
    assert 0 < zeros < elements == 7400


# The Hugging Face Trainer


@pytest.fixture
def transformers():
    module = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    module.logging.set_verbosity_error()
    return module


class Sentences(torch.utils.data.Dataset):
    def __init__(self):
        self.tokens = torch.randint(2, 50, (24, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


class InOrder(torch.utils.data.IterableDataset):
    """The same, which the Trainer does not shuffle."""

    def __iter__(self):
        return (Sentences()[i] for i in range(len(Sentences())))


def gpt2(transformers):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


def trained(transformers, model, mode, folder, sentences, resume=None, **kw):
    optimizer = optimizer_on(model, mode)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 2, 12)
    kw = {"max_steps": 6, "save_strategy": "no"} | kw
    args = transformers.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True, **kw
    )
    trainer = transformers.Trainer(model=model, args=args, train_dataset=sentences, optimizers=(optimizer, scheduler))
    trainer.train(resume_from_checkpoint=resume)
    return model


@modes
def test_the_hugging_face_trainer_is_a_loop_with_accumulation_and_clipping(transformers, mode, tmp_path):
    start = gpt2(transformers)
    kw = {"gradient_accumulation_steps": 2, "max_steps": 3, "max_grad_norm": 0.5}
    model = trained(transformers, copy.deepcopy(start), mode, tmp_path, InOrder(), **kw)
    optimizer = optimizer_on(start, mode)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 2, 12)
    for i, batch in enumerate(DataLoader(Sentences(), batch_size=4)):
        (start(**batch).loss / 2).backward()
        if i % 2:
            nn.utils.clip_grad_norm_(start.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert_same(model, start, 1e-5)


@pytest.mark.parametrize("mode", ["coupled", "dual"])
def test_the_hugging_face_trainer_resumes_from_its_own_checkpoint(transformers, mode, tmp_path):
    straight = trained(transformers, gpt2(transformers), mode, tmp_path / "straight", Sentences())
    trained(transformers, gpt2(transformers), mode, tmp_path, Sentences(), save_strategy="steps", save_steps=3)
    other = gpt2(transformers)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    resumed = trained(transformers, other, mode, tmp_path, Sentences(), resume=str(tmp_path / "checkpoint-3"))
    assert_same(resumed, straight)


def test_a_units_weights_in_gpt2_are_the_columns_of_its_conv1d(transformers):
    """Its Conv1D has its input units along dim 0, unlike nn.Linear."""
    model = gpt2(transformers)
    name = "transformer.h.0.mlp.c_fc.weight"
    weight = model.get_parameter(name)
    assert weight.shape == (16, 64)
    value = GroupLasso(model, 1.0, select=name)()
    torch.testing.assert_close(value, 4.0 * weight.norm(dim=0).sum())


def test_the_hugging_face_example_makes_zeros(transformers, capsys):
    run_example("huggingface_trainer.py", "--steps", "20")
    zeros, elements = zeros_in(capsys.readouterr().out)
    assert 0 < zeros < elements == 17408


# skorch


@pytest.fixture
def skorch():
    pytest.importorskip("sklearn")
    return pytest.importorskip("skorch")


def adamw_with_penalty(param_groups, mode, **kw):
    """What stands in for an optimizer's class."""
    weights = [p for group in param_groups for p in group["params"] if p.ndim >= 2]
    every = [p for group in param_groups for p in group["params"]]
    assert len(every) == 4
    return RegularizedOptimizer(
        torch.optim.AdamW(param_groups, weight_decay=0.0, **kw), [L1(weights, LAM), L2(weights, LAM)], mode
    )


@modes
def test_skorch_is_a_loop(skorch, mode):
    module = network()
    net = skorch.NeuralNetRegressor(
        module,
        optimizer=adamw_with_penalty,
        optimizer__mode=mode,
        lr=0.01,
        max_epochs=EPOCHS,
        batch_size=8,
        train_split=None,
        verbose=0,
        callbacks=[("schedule", skorch.callbacks.LRScheduler(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=5))],
    )
    x, y = dataset().tensors
    net.fit(x, y)
    assert_same(net.module_, loop(network(), mode), 1e-6)
    assert isinstance(net.optimizer_, RegularizedOptimizer)


def test_skorch_goes_on_from_saved_parameters(skorch, tmp_path):
    def net(epochs):
        return skorch.NeuralNetRegressor(
            network(), optimizer=adamw_with_penalty, optimizer__mode="dual", lr=0.01, max_epochs=epochs, batch_size=8,
            train_split=None, verbose=0,
        )  # fmt: skip

    x, y = dataset().tensors
    straight = net(2).fit(x, y)
    first, resumed = net(1).fit(x, y), net(1).initialize()
    files = {"f_params": tmp_path / "params.pt", "f_optimizer": tmp_path / "optimizer.pt"}
    first.save_params(**files)
    resumed.load_params(**files)
    resumed.partial_fit(x, y)
    assert_same(resumed.module_, straight.module_)


def test_the_skorch_example_searches_for_lambda(skorch, capsys):
    run_example("skorch_net.py", "--epochs", "2")
    out = capsys.readouterr().out
    assert len(re.findall(r"lambda .*: accuracy 0\.\d+", out)) == 3
    assert re.search(r"[\d,]+ of 3,700 weights are exactly zero", out)
