"""A trainer of anybody's model, loss and batches; and what its constructor leaves alone."""

import inspect
import signal
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
import yaml
from torch import nn

import fastssl
from fastssl.config import build_config
from fastssl.errors import ConfigError
from fastssl.losses import Mio, MioConfig
from fastssl.models.two_view import TwoViewModel
from fastssl.tracking.writers import read_rows
from fastssl.trainer import Trainer

PARTS = """
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

class Views(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        image = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(index))
        return image, image.flip(2)

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images):
        return self.net(images)

class Agreement(nn.Module):
    def forward(self, z_a, z_b):
        return (z_a - z_b).square().mean() + (1 - z_a.std(0)).relu().mean()

def config(folder, **changes):
    from fastssl.config import build_config
    return build_config({
        "run": {"dir": folder, "device": "cpu", "num_threads": 1, "log_every_steps": 1, **changes.pop("run", {})},
        "data": {"global_batch_size": changes.pop("batch", 8)},
        "views": {"size_px": changes.pop("size_px", 12)},
        "model": {"projector_hidden": [8], "projector_dim": 4},
        "optim": {"warmup_epochs": 0},
        "train": {"num_epochs": 2},
    })
"""
OWN = """
import sys
from parts import *
from fastssl import Trainer

folder, resume = sys.argv[1:]
trainer = Trainer(
    config(folder, run={"resume": resume, "checkpoint_every_steps": 3}),
    model=Encoder(), loss=Agreement(), loader=DataLoader(Views(), batch_size=8),
)
print(trainer.train().path)
"""


@pytest.fixture
def program(tmp_path, command):
    """Run a program next to parts.py; its output."""

    def run(text: str, *arguments: str | Path, **options):
        (tmp_path / "parts.py").write_text(PARTS)
        (tmp_path / "program.py").write_text(textwrap.dedent(text))
        return command(sys.executable, tmp_path / "program.py", *arguments, **options)

    return run


def tiny_parts() -> dict[str, object]:
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    views = torch.randn(8, 3, 12, 12)
    return {"model": encoder, "loss": Mio(), "loader": [(views, views.flip(3))]}


def test_a_constructor_starts_opens_and_writes_nothing(tmp_path) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    parts = tiny_parts()
    was_initialized = torch_dist.is_initialized()  # by a training of another test in this process
    random_state = torch.random.get_rng_state()
    trainer = Trainer(build_config({"run": {"dir": str(tmp_path / "run")}}), **parts)  # pyright: ignore
    assert torch_dist.is_initialized() == was_initialized
    assert not trainer.folder.path.exists()
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert len(inspect.getsource(Trainer.__init__).splitlines()) < 40


def test_the_configuration_says_what_was_given(tmp_path) -> None:
    cfg = build_config({"run": {"dir": str(tmp_path)}})
    parts = tiny_parts() | {"loss": Mio(MioConfig(negative="jensen"))}
    trainer = Trainer(cfg, **parts)  # pyright: ignore
    assert trainer.cfg.custom == {
        "model": "torch.nn.modules.container.Sequential",
        "loader": "builtins.list",
    }
    assert trainer.cfg.loss == MioConfig(negative="jensen")


def test_own_model_loss_and_batches_are_trained_and_used(program, tmp_path, in_process) -> None:
    folder = tmp_path / "run"
    done = program(OWN, folder, "never")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder)
    assert "Agreement on 32 images, Encoder (0.00 M parameters), global batch 8 on 1 x cpu" in done.stdout
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "kind" not in row]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss"] < rows[0]["loss"]
    custom = yaml.safe_load((folder / "config.yaml").read_text())["custom"]
    assert custom == {
        "model": "parts.Encoder",
        "loss": "parts.Agreement",
        "loader": "torch.utils.data.dataloader.DataLoader",
    }

    with pytest.raises(ConfigError, match=r"was trained with parts\.Encoder: pass such a module as backbone="):
        fastssl.load_encoder(folder)
    namespace: dict[str, type] = {}
    exec(PARTS, namespace)
    encoder = fastssl.load_encoder(folder, backbone=namespace["Encoder"]())
    assert encoder(torch.zeros(2, 3, 12, 12)).shape == (2, 6)
    for name in ("eval", "hessian"):
        refused = in_process(name, folder)
        assert refused.returncode == 2
        assert "given from Python: a command cannot build it" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


@pytest.mark.slow
def test_an_own_run_goes_on_where_it_was_stopped(program, tmp_path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert program(OWN, whole, "never").returncode == 0
    stop = OWN.replace("print(trainer", "import os, signal\nreal = trainer.take_step\n").replace(
        ".train().path)",
        "\ndef take_step(batch):\n    real(batch)\n    trainer.step == 5 and os.kill(os.getpid(), signal.SIGTERM)\n"
        "trainer.take_step = take_step\ntry:\n    trainer.train()\nexcept Exception as error:\n    print(error)",
    )
    preempted = program(stop, stopped, "never")
    assert preempted.returncode == 0, preempted.stderr
    assert "goes on after step" in preempted.stdout
    assert program(OWN, stopped, "auto").returncode == 0
    losses = [[row["loss"] for row in read_rows(run / "metrics.jsonl")] for run in (whole, stopped)]
    assert losses[0] == losses[1]


REFUSED = {
    "batch": "data.global_batch_size is 16, but the loader's batches hold 8 images on each of 1 processes: set it to 8",
    "model=nn.Linear(2, 2)": "model.backbone: Linear does not accept images of 12 px",
    "model=nn.Conv2d(3, 4, 3)": "model.backbone: Conv2d does not return one feature vector per image",
    "loader=[torch.zeros(8, 3, 12, 12)]": "loader: a batch must be at least two views",
    "loader=[[torch.zeros(8, 3, 16, 16)] * 2]": "views.size_px is 12, but the loader's first view is 16x16 px",
    "loss=Spectral()": "loader: its batches have 3 views, loss spectral takes 2",
    "loader=Short([[torch.zeros(8, 3, 12, 12)] * 2])": "loader: epoch 0 ended after 1 batches, its length is 2",
}


def test_parts_that_do_not_fit_end_with_one_line(program, tmp_path) -> None:
    text = f"""
        from parts import *
        from fastssl import Trainer
        from fastssl.errors import UserError
        from fastssl.losses import Spectral
        from pipelines.errors import DataError

        class Short(list):
            def __len__(self):
                return 2

        for change in {list(REFUSED)!r}:
            parts = dict(model=Encoder(), loss=Agreement(), loader=DataLoader(Views(), batch_size=8))
            name, _, value = change.partition("=")
            if value:
                parts[name] = eval(value)
            if name == "loss":
                parts["loader"] = [[torch.zeros(8, 3, 12, 12)] * 3]
            cfg = config({str(tmp_path / "run")!r}, batch=16 if name == "batch" else 8)
            try:
                Trainer(cfg, **parts).train()
            except (UserError, DataError) as error:
                print(error)
    """
    done = program(text)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if " images, " not in line]  # but for the headline
    assert len(lines) == len(REFUSED)
    for line, message in zip(lines, REFUSED.values(), strict=True):
        assert line.startswith(message)


def test_a_trainer_trains_once_and_leaves_the_environment_as_it_was(program, tmp_path) -> None:
    """A second training in one process, and programs that are started later, are not ranks of the first."""
    text = f"""
        import os, subprocess, sys
        from parts import *
        import fastssl.train
        from fastssl import Trainer

        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
        for number in range(2):
            parts = dict(model=Encoder(), loss=Agreement(), loader=DataLoader(Views(), batch_size=8))
            trainer = Trainer(config({str(tmp_path)!r} + f"/run_{{number}}"), **parts)
            trainer.train()
            assert not {{"RANK", "LOCAL_RANK", "WORLD_SIZE"}} & set(os.environ)
        try:
            trainer.train()
        except fastssl.errors.ConfigError as error:
            print(error)
        print(callable(fastssl.train), fastssl.train.__name__)
    """
    done = program(text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [
        f"run.dir: {tmp_path / 'run_1'} already contains a run: resume it with --set run.resume=auto, or choose "
        "another run.dir",
        "True train",
    ]


def test_subclasses_and_own_backbones_count_as_custom(tmp_path) -> None:
    class MyMio(Mio):
        pass

    cfg = build_config({"run": {"dir": str(tmp_path)}, "model": {"projector_hidden": [8]}})
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    parts = tiny_parts() | {"loss": MyMio(), "model": TwoViewModel(cfg.model, 12, backbone=backbone)}
    assert Trainer(cfg, **parts).cfg.custom.keys() == {"model", "loss", "loader"}  # pyright: ignore
