"""Parts of a run that are the user's own: model, rows, loss, optimizer, schedule, callbacks; and what a state holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from minivlm2vec import Embedder, VLM2Vec, VLM2VecConfig, register
from minivlm2vec.lora import LoraConfig
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.projector import Projector
from minivlm2vec.rows import Pair
from minivlm2vec.train import (
    DataConfig,
    LogConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
    Trainer,
    check_data,
    read_config,
    train,
)
from minivlm2vec.train.data import Row
from minivlm2vec.train.loss import contrastive_loss
from minivlm2vec.train.model import set_training
from minivlm2vec.weights import load_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return new_checkpoint(tmp_path_factory.mktemp("base") / "m", seed=1)


class Numbers:
    """A `RowSource` without pictures."""

    def check(self, *, thoroughly=False):
        pass

    def batch(self, step, batch_size, part=slice(None)):
        numbers = range(step * batch_size, (step + 1) * batch_size)
        return [Row(f"number {i}", Pair(f"{i}?", ""), (Pair(f"{i}!", ""),), (), None) for i in numbers[part]]

    def sample(self, n):
        return self.batch(-1, n)


def config(base, out, *, steps=2, save=0, batch_size=3, **other) -> TrainConfig:
    optim = OptimConfig(batch_size=batch_size, chunk_size=2, steps=steps, warmup=0, lr=1e-3)
    return TrainConfig(str(base), str(out), DataConfig(workers=1), optim=optim, log=LogConfig(save=save), **other)


def trainer(base, out, *, steps=2, save=0, settings=None, **parts) -> Trainer:
    made = config(base, out, steps=steps, save=save, **settings or {})
    return Trainer(made, **{"device": "cpu", "data": Numbers()} | parts)


def one_step(t: Trainer) -> dict[str, float]:
    return t.train_step(t.loader.prepare(t.own_rows(t.step)))


def stopped_and_resumed(base, tmp_path, **parts) -> tuple[Trainer, Trainer]:
    """A run of four steps, and one of the same that was stopped after the third and went on from the second.

    Parts are made anew for each: they are called without arguments."""

    def make(name):
        return trainer(base, tmp_path / name, steps=4, save=2, **{key: part() for key, part in parts.items()})

    whole = make("whole")
    whole.run()
    part = make("part")
    train_step = part.train_step
    part.train_step = lambda prepared: train_step(prepared) if part.step < 3 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        part.run()
    resumed = make("part")
    assert resumed.step == 2
    resumed.run()
    return whole, resumed


def same_state(a: Trainer, b: Trainer) -> None:
    assert a.parameters.keys() == b.parameters.keys()
    for name, p in a.parameters.items():
        assert torch.equal(p, b.parameters[name]), name
        other = b.optimizer.state[b.parameters[name]]
        assert a.optimizer.state[p].keys() == other.keys()
        for key, value in a.optimizer.state[p].items():
            assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]


# --- optimizers and rates ----------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p.values(), lr=0.1, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p.values(), lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p.values(), lr=1e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p.values(), lr=1e-2),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_any_optimizer_resumes_exactly(base, tmp_path, kind):
    whole, resumed = stopped_and_resumed(base, tmp_path, optimizer=lambda: OPTIMIZERS[kind])
    same_state(whole, resumed)


def test_an_optimizer_whose_state_cannot_be_saved_says_so(base, tmp_path):
    class Remembers(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["history"] = [1, 2]

    t = trainer(base, tmp_path, optimizer=lambda p: Remembers(p.values(), lr=0.1))
    with pytest.raises(ValueError, match="Remembers's history, a list, cannot be saved"):
        t.run()
    assert not list(tmp_path.glob("*step*"))


def test_groups_keep_their_own_rates_under_a_schedule(base, tmp_path):
    def two_rates(parameters):
        tower = [p for name, p in parameters.items() if name.startswith("vision.")]
        rest = [p for name, p in parameters.items() if not name.startswith("vision.")]
        return torch.optim.SGD([{"params": rest, "lr": 1e-2}, {"params": tower, "lr": 1e-4}])

    seen = []

    def rates(trainer, record):
        seen.append([group["lr"] for group in trainer.optimizer.param_groups])

    t = trainer(base, tmp_path, steps=3, optimizer=two_rates, schedule=lambda step: 1 / (1 + step), callbacks=[rates])
    t.run()
    assert torch.tensor(seen).flatten().tolist() == pytest.approx([1e-2, 1e-4, 5e-3, 5e-5, 1e-2 / 3, 1e-4 / 3])


def test_more_steps_go_on_and_fewer_do_not(base, tmp_path):
    trainer(base, tmp_path, steps=2, schedule=lambda step: 1.0).run()
    longer = trainer(base, tmp_path, steps=4, schedule=lambda step: 1.0)
    assert longer.step == 2
    longer.run()
    whole = trainer(base, tmp_path / "whole", steps=4, schedule=lambda step: 1.0)
    whole.run()
    same_state(whole, longer)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"step-000004 is beyond optim\.steps 3"):
        trainer(base, tmp_path, steps=3)


def test_one_gpu_for_two_processes_of_a_machine_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="device cuda:0 is one GPU for the 2 processes"):
        trainer(base, tmp_path, device="cuda:0")


# --- losses and callbacks ----------------------------------------------------------------------------------


def test_a_loss_that_is_a_function_is_minimised(base, tmp_path):
    calls = []

    def loss(queries, targets, about):
        calls.append((queries.shape, targets.shape, about.owner.tolist()))
        return contrastive_loss(queries, targets, about, temperature=0.5)

    t = trainer(base, tmp_path, loss=loss)
    record = one_step(t)
    assert calls == [((3, t.model.config.decoder.hidden_size),) * 2 + ([0, 1, 2],)]
    assert "temperature" not in record
    assert record["loss"] != one_step(trainer(base, tmp_path))["loss"]


class Scaled(nn.Module):
    """A loss with a parameter and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, queries, targets, about):
        self.calls += 1
        return contrastive_loss(queries, targets, about, temperature=1 / self.scale)


def test_a_loss_with_parameters_is_trained_and_resumed(base, tmp_path):
    whole, resumed = stopped_and_resumed(base, tmp_path, loss=Scaled)
    assert whole.parameters["loss.scale"].item() != 2.0
    same_state(whole, resumed)
    assert whole.loss.calls == resumed.loss.calls == 4


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)])
def test_checkpoints_say_what_the_loss_trained(tmp_path, lora):
    """Matryoshka's sizes, and the temperature where it was learned: whole models and adapters. Vectors are cut to these
    sizes and no longer to those of the model that training began from."""
    base = new_checkpoint(tmp_path / "base", config={"minivlm2vec": {"dims": [32], "temperature": 0.5}})
    loss = LossConfig(dims=(8, 64), learn_temperature=True)
    t = trainer(base, tmp_path / "out", settings={"loss": loss, "lora": lora})
    folder = t.run()
    file = folder / ("adapter_config.json" if lora else "config.json")
    own = json.loads(file.read_text())["minivlm2vec"]
    assert own == {"dims": [8, 64], "temperature": t.loss.temperature} and own["temperature"] != 0.02
    model = {"name_or_path": base, "adapter": folder} if lora else {"name_or_path": folder}
    e = Embedder.from_pretrained(**model, device="cpu", truncate_dim=8, show_progress=False)
    assert e.encode(["a"]).shape == (1, 8) and e.model.config.trained.temperature == own["temperature"]
    with pytest.raises(ValueError, match="trained to have them cut to 8, 64"):
        Embedder.from_pretrained(**model, device="cpu", truncate_dim=32, show_progress=False)

    def own_loss(queries, targets, about):
        return contrastive_loss(queries, targets, about)

    folder = trainer(base, tmp_path / "own", loss=own_loss, settings={"lora": lora}).run()
    config = json.loads((folder / file.name).read_text())
    assert config.get("minivlm2vec") == ({"dims": [], "temperature": None} if lora else None)


def test_callbacks_add_to_the_log(base, tmp_path):
    def double(trainer, record):
        record["double"] = 2 * trainer.step

    trainer(base, tmp_path, callbacks=[double]).run()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["double"] for record in log] == [2, 4]


def test_the_functions_of_the_package(base, tmp_path):
    assert train(config(base, tmp_path), device="cpu", data=Numbers()) == tmp_path / "step-000002"
    with pytest.raises(ValueError, match=r"data\.root or data\.source is needed"):
        check_data(config(base, tmp_path))


# --- models ------------------------------------------------------------------------------------------------


@register("projector", "normed")
class Normed(nn.Module):
    """A projector that keeps running statistics behind the plain one."""

    def __init__(self, config, backend=None):
        super().__init__()
        self.projector = Projector(config, backend=backend)
        self.norm, self.dropout = nn.BatchNorm1d(config.decoder.hidden_size), nn.Dropout(0.5)

    def forward(self, x, grids):
        return self.dropout(self.norm(self.projector(x, grids)))


@register("pooling", "normed")
class NormedPooling(nn.Module):
    width, affine = None, True  # a test takes others

    def __init__(self, config, backend=None):
        super().__init__()
        self.norm = nn.BatchNorm1d(self.width or config.decoder.hidden_size, affine=self.affine)

    def forward(self, x, cu_seqlens):
        return self.norm(x)[cu_seqlens[1:].long() - 1]


def normed_model(base):
    model = load_model(base).requires_grad_(True)
    model.pooling = NormedPooling(model.config)
    return model


def test_running_statistics_are_counted_once_and_resumed(base, tmp_path):
    """GradCache encodes each of a step's three chunks twice."""
    whole, resumed = stopped_and_resumed(base, tmp_path, model=lambda: normed_model(base))
    for a, b in zip(whole.model.buffers(), resumed.model.buffers(), strict=True):
        assert torch.equal(a, b)
    assert whole.model.pooling.norm.num_batches_tracked == 4 * 3
    assert whole.model.pooling.norm.running_mean.any()
    same_state(whole, resumed)


def test_a_run_with_another_model_is_refused_by_name(base, tmp_path, monkeypatch):
    trainer(base, tmp_path, model=normed_model(base)).run()
    monkeypatch.setattr(NormedPooling, "affine", False)
    fewer = normed_model(base)
    with pytest.raises(ValueError, match=r"optimizer_groups\.0\.parameters was '\d+ \(.*\)' and is '\d+ "):
        trainer(base, tmp_path, model=fewer)
    monkeypatch.setattr(NormedPooling, "affine", True)
    monkeypatch.setattr(NormedPooling, "width", 7)
    wider = normed_model(base)
    with pytest.raises(ValueError, match=r"another shape is .*pooling.norm.running_mean \[1, \d+\], here \[1, 7\]"):
        trainer(base, tmp_path, model=wider)


@register("pooling", "mean of a run")
def mean(x, cu_seqlens):
    return torch.stack([part.mean(0) for part in x.split(cu_seqlens.diff().tolist())])


def test_a_run_with_another_pooling_or_causality_is_refused_by_name(base, tmp_path):
    model = load_model(base).requires_grad_(True)
    model.pooling, model.causal = mean, False
    trainer(base, tmp_path, model=model).run()
    with pytest.raises(ValueError, match=r"parts.causal was False and is True; parts.pooling was 'mean' and is 'last_"):
        trainer(base, tmp_path)


def test_a_run_with_another_loss_or_optimizer_is_refused_by_name(base, tmp_path):
    trainer(base, tmp_path).run()
    with pytest.raises(ValueError, match=r"parts.loss was 'ContrastiveLoss' and is 'Scaled'"):
        trainer(base, tmp_path, loss=Scaled())
    with pytest.raises(ValueError, match=r"parts.optimizer was 'AdamW' and is 'SGD'"):
        trainer(base, tmp_path, optimizer=OPTIMIZERS["sgd"])


def test_other_groups_and_settings_of_the_same_kind_are_refused(base, tmp_path):
    def sgd(lr=1e-3, only=""):
        return lambda ps: torch.optim.SGD([p for n, p in ps.items() if n.startswith(only)], lr=lr)

    class Scaling:
        def __init__(self, k):
            self.k = k

        def __call__(self, queries, targets, about):
            return contrastive_loss(queries, targets, about) * self.k

    trainer(base, tmp_path, optimizer=sgd(), loss=Scaling(1)).run()
    assert trainer(base, tmp_path, optimizer=sgd(), loss=Scaling(1)).step == 2
    for parts, message in [
        ({"optimizer": sgd(1e-2)}, r"optimizer_groups\.0\.lr was 0\.001 and is 0\.01"),
        ({"optimizer": sgd(only="decoder.")}, r"optimizer_groups\.0\.parameters was '\d+ \(.*\)' and is '\d+ \(.*\)'"),
        ({"loss": Scaling(7)}, r"loss_settings\.k was 1 and is 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer(base, tmp_path, **{"optimizer": sgd(), "loss": Scaling(1)} | parts)


def test_what_is_frozen_stays_in_eval_and_unchanged(base, tmp_path):
    published = VLM2VecConfig.from_json(base)
    model = load_model(base, config=published.with_parts(projector="normed")).requires_grad_(True)
    set_training(model)
    assert model.training and model.projector.norm.training and model.projector.dropout.training
    t = trainer(base, tmp_path, model=model, settings={"freeze": ("projector", "vision")})
    before = {name: b.clone() for name, b in model.named_buffers()}
    one_step(t)
    assert model.training and model.decoder.training and not model.vision.training
    assert not any(m.training for m in model.projector.modules())
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name]), name
    model.projector.requires_grad_(True)
    set_training(model)
    assert all(m.training for m in model.projector.modules())


def test_a_model_that_is_given_keeps_what_it_froze(base, tmp_path):
    model = load_model(base).requires_grad_(False)
    model.decoder.layers[1].requires_grad_(True)
    t = trainer(base, tmp_path, model=model)
    assert t.model is model and all(name.startswith("decoder.layers.1.") for name in t.parameters)
    assert t.parameters


@register("pooling", "head of a run")
class Head(nn.Module):
    def __init__(self, config, backend=None):
        super().__init__()
        self.matrix = nn.Linear(config.decoder.hidden_size, 6)

    def forward(self, x, cu_seqlens):
        return self.matrix(x[cu_seqlens[1:].long() - 1])


PLUGIN = """
from minivlm2vec import register
from torch import nn

@register("pooling", "plugged head")
class Head(nn.Linear):
    def __init__(self, config, backend=None):
        super().__init__(config.decoder.hidden_size, 5)
        self.dimension = 5

    def forward(self, x, cu_seqlens):
        return super().forward(x[cu_seqlens[1:].long() - 1])
"""


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)], ids=["whole", "lora"])
def test_a_registered_pooling_is_trained_kept_and_found_again(base, tmp_path, lora):
    t = trainer(base, tmp_path / "run", settings={"parts": {"pooling": "head of a run", "causal": False}, "lora": lora})
    before = t.model.pooling.matrix.weight.detach().clone()
    folder = t.run()
    after = t.model.pooling.matrix.weight
    assert "pooling.matrix.weight" in t.parameters and not torch.equal(before, after)
    names = (base, folder) if lora else (folder, None)
    e = Embedder.from_pretrained(names[0], adapter=names[1], device="cpu", optimize=False, show_progress=False)
    assert torch.equal(e.model.pooling.matrix.weight, after) and e.model.causal is False
    assert trainer(base, tmp_path / "run", settings={"parts": dict(t.config.parts), "lora": lora}).step == 2
    with pytest.raises(ValueError, match=r"parts\.causal was False and is True"):
        trainer(base, tmp_path / "run", settings={"lora": lora})


@register("model", "with a head")
class WithHead(VLM2Vec):
    def __init__(self, config, backend=None):
        super().__init__(config, backend=backend)
        self.head = nn.Linear(config.decoder.hidden_size, 4)

    def forward(self, batch, *, normalize=True):
        return self.head(super().forward(batch, normalize=normalize))


def test_a_class_with_new_parameters_names_them(base, tmp_path):
    settings = {"parts": {"model": "with a head"}}
    with pytest.raises(ValueError, match=r"2 parameters have no tensor: head\.weight, head\.bias"):
        trainer(base, tmp_path, settings=settings)
    t = trainer(base, tmp_path, settings=settings | {"skip": ("head.",)})
    folder = t.run()
    again = load_model(folder)
    assert type(again) is WithHead and torch.equal(again.head.weight, t.model.head.weight)


def test_the_toml_file_names_parts_and_plugins(base, tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "c.toml").write_text(
        f"""
        out = "{tmp_path / "out"}"
        model.checkpoint = "{base}"
        model.pooling = "plugged head"
        model.plugins = ["{tmp_path / "mine.py"}"]
        data.root = "none"
        """
    )
    read = read_config(tmp_path / "c.toml")
    assert (read.model, read.parts) == (str(base), {"pooling": "plugged head"})
    folder = trainer(base, tmp_path / "run", settings={"parts": read.parts, "plugins": read.plugins}).run()
    (tmp_path / "t.csv").write_text("text\na\n")
    command = [sys.executable, "-m", "minivlm2vec", "embed", str(tmp_path / "t.csv"), "-o", str(tmp_path / "v.npy")]
    command += ["--model", str(folder), "--device", "cpu", "--plugin", str(tmp_path / "mine.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "1 vectors of 5" in done.stderr, done.stderr


def test_parts_that_cannot_be_are_refused_before_anything_is_computed(base, tmp_path):
    for settings, message in [
        ({"parts": {"pooling": "nobody's"}}, 'pooling "nobody\'s" is not registered'),
        ({"parts": {"poling": "mean"}}, "did you mean pooling"),
        ({"plugins": (str(tmp_path / "none.py"),)}, "none.py does not exist"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer(base, tmp_path, settings=settings)
    with pytest.raises(ValueError, match=r"model\.pooling chooses a part of the model that is loaded, and a model is"):
        trainer(base, tmp_path, settings={"parts": {"pooling": "normed"}}, model=load_model(base))
    model = load_model(base).requires_grad_(True)
    model.pooling = lambda x, cu_seqlens: x[cu_seqlens[1:].long() - 1]
    with pytest.raises(ValueError, match=r"pooling is .*lambda.*, and would be last_token"):
        trainer(base, tmp_path, model=model)
    (tmp_path / "c.toml").write_text('out = "x"\ndata.root = "y"\n[model]\npooling = "mean"\n')
    with pytest.raises(ValueError, match=r"c\.toml: model\.checkpoint is missing"):
        read_config(tmp_path / "c.toml")
    (tmp_path / "c.toml").write_text('out = "x"\ndata.root = "y"\n[model]\ncheckpoint = "z"\nplugin = ["a"]\n')
    with pytest.raises(ValueError, match=r"no setting is named model\.plugin; did you mean plugins"):
        read_config(tmp_path / "c.toml")


# --- several processes -------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from tests.train.test_parts import OPTIMIZERS, Scaled, normed_model, same_state, stopped_and_resumed
import torch

base, out = sys.argv[1], Path(sys.argv[2])
for kind in ("ddp", "fsdp"):
    parts = {"model": lambda: normed_model(base), "loss": Scaled, "optimizer": lambda: OPTIMIZERS["sgd"]}
    parts["settings"] = lambda: {"distributed": kind, "batch_size": 4}
    whole, resumed = stopped_and_resumed(base, out / kind, **parts)
    same_state(whole, resumed)
    for a, b in zip(whole.model.buffers(), resumed.model.buffers(), strict=True):
        assert torch.equal(a, b)
    statistics = whole.ranks.gather(whole.model.pooling.norm.running_mean[None])
    assert not torch.equal(*statistics), "each process has its own"
print("well")
"""


def test_two_processes_resume_their_own_statistics_and_any_optimizer(base, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command += [str(tmp_path / "script.py"), str(base), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("well") == 2, done.stderr[-3000:]
