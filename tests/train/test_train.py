"""Training: the config, the rows, and the loop on a tiny model."""

import dataclasses
import json
import math
import shutil
import sys

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from minivlm2vec import Embedder
from minivlm2vec.cli import main
from minivlm2vec.lora import LoraConfig
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.rows import as_input
from minivlm2vec.train import engine
from minivlm2vec.train.config import DataConfig, LogConfig, LossConfig, OptimConfig, TrainConfig, read_config
from minivlm2vec.train.data import TrainingData
from minivlm2vec.train.optim import linear
from minivlm2vec.train.trainer import Trainer, TrainingError
from tests.support.helpers import close

SETS = ("Emoji-i2t", "Scene-Change", "Grid-Where", "Emoji-t2i")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return new_checkpoint(tmp_path_factory.mktemp("base") / "m", seed=1)


def settings(base, out, *, data=None, loss=None, optim=None, log=None, **other) -> TrainConfig:
    return TrainConfig(
        model=str(base),
        out=str(out),
        data=DataConfig(**{"root": "mini", "sets": SETS, "workers": 1} | (data or {})),
        loss=LossConfig(**loss or {}),
        optim=OptimConfig(**{"batch_size": 4, "chunk_size": 3, "steps": 4, "warmup": 1, "lr": 1e-3} | (optim or {})),
        log=LogConfig(**{"save": 0} | (log or {})),
        **other,
    )


def trainer(*args, **kwargs) -> Trainer:
    return Trainer(settings(*args, **kwargs), device="cpu")


def prepared(t: Trainer, step: int | None = None):
    return t.loader.prepare(t.own_rows(t.step if step is None else step))


def gradients(t: Trainer) -> dict[str, torch.Tensor]:
    t.value = t.backward(prepared(t, 0))[0]
    return {name: p.grad.clone() for name, p in t.parameters.items() if p.grad is not None}


def same_gradients(a: dict, b: dict, rtol: float = 2e-5) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        close(name, a[name], b[name], rtol * float(b[name].abs().max()) + 1e-7)


# --- config ------------------------------------------------------------------------------------------------


def toml(tmp_path, text):
    path = tmp_path / "c.toml"
    path.write_text(text)
    return path


def test_defaults_are_the_published_run(tmp_path):
    c = read_config(toml(tmp_path, 'model = "m"\nout = "o"\n[data]\nroot = "r"\n'))
    assert (c.loss.temperature, c.optim.batch_size, c.optim.steps, c.optim.lr) == (0.02, 1024, 2000, 2e-5)
    assert (c.optim.warmup, c.data.max_length, c.data.num_crops, c.data.rows_per_set) == (200, 256, 4, 50_000)
    assert not (c.loss.symmetric or c.loss.mask_duplicates or c.loss.learn_temperature or c.lora or c.freeze)


def test_values_become_the_fields_types(tmp_path):
    c = read_config(toml(tmp_path, """
        model = "m"
        out = "o"
        freeze = ["vision"]
        [data]
        root = "r"
        sets = ["a", "b"]
        [loss]
        dims = [8, 16]
        [optim]
        lr = 1
        betas = [0.9, 0.99]
    """))  # fmt: skip
    assert c.data.sets == ("a", "b") and c.loss.dims == (8, 16) and c.freeze == ("vision",)
    assert c.optim.lr == 1.0 and isinstance(c.optim.lr, float) and c.optim.betas == (0.9, 0.99)
    lora = read_config(toml(tmp_path, 'model = "m"\nout = "o"\n[data]\nroot = "r"\n[lora]\nr = 4\nuse_dora = true'))
    assert lora.lora == LoraConfig(r=4, use_dora=True)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('model = "m"\nout = "o"', "data is missing"),
        ('model = "m"\nout = "o"\n[data]\nroot = "r"\nvariants = "x"', "data.variants; did you mean variant"),
        ('model = "m"\nout = "o"\n[data]\nroot = 3', "data.root is 3; a str is needed"),
        ('model = "m"\nout = "o"\n[data]\nroot = "r"\n[optim]\nsteps = 1.5', "optim.steps is 1.5; a int is needed"),
        ('model = "m"\nout = "o"\n[data]\nroot = "r"\n[optim]\nsteps = true', "optim.steps is True"),
        ('model = "m"\nout = "o"\n[data]\nroot = "r"\n[optim]\nlr = -1.0', "optim.lr is -1.0"),
        ('model = "m"\nout = "o"\n[data]\nroot = "r"\nsub_batch = 3', "1024 is no multiple of data.sub_batch 3"),
        ('model = "m"\nout = "o"\ndistributed = "tp"\n[data]\nroot = "r"', "'tp'; it is 'ddp' or 'fsdp'"),
        ("model = ", "c.toml: "),
    ],
)
def test_a_bad_setting_is_named(tmp_path, text, match):
    with pytest.raises(ValueError, match=match):
        read_config(toml(tmp_path, text))


@pytest.mark.skipif(sys.version_info >= (3, 11), reason="tomllib is part of this Python")
def test_toml_on_python_3_10(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(ImportError, match=r"minivlm2vec\[train\]"):
        read_config(toml(tmp_path, ""))


def test_learning_rate():
    factors = [linear(OptimConfig(warmup=2, steps=6))(s) for s in range(7)]
    assert factors == [0, 0.5, 1, 0.75, 0.5, 0.25, 0]
    assert linear(OptimConfig(warmup=0, steps=10))(0) == 1


# --- rows --------------------------------------------------------------------------------------------------

GOOD = {"qry": "<|image_1|>\nq", "qry_image_path": "images/a.png", "pos_text": "p", "pos_image_path": ""}


@pytest.fixture
def root(tmp_path):
    """Two sets: 10 good rows, and 7 of text alone."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (30, 20), "red").save(folder / "images/a.png")
    write_rows(folder, "A", [GOOD | {"pos_text": f"p{i}"} for i in range(10)])
    write_rows(folder, "B", [{"qry": f"q{i}", "qry_image_path": "", "pos_text": f"p{i}", "pos_image_path": ""}
                             for i in range(7)])  # fmt: skip
    return folder


def write_rows(folder, name, rows, variant="original"):
    (folder / name).mkdir(exist_ok=True)
    (folder / name / f"{variant}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_of_jsonl_and_parquet(root):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [json.loads(line) | {"neg_text": "n", "neg_image_path": None}
            for line in (root / "A/original.jsonl").read_text().splitlines()]  # fmt: skip
    (root / "C").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), root / "C/original-00000-of-00001.parquet")
    data = TrainingData(DataConfig(str(root)))
    assert {name: len(r) for name, r in data.sets.items()} == {"A": 10, "B": 7, "C": 10}
    a, c = data.rows[data.sets["A"][3]], data.rows[data.sets["C"][3]]
    assert (a.query, a.positives) == (c.query, c.positives) == (("<|image_1|>\nq", "images/a.png"), (("p3", ""),))
    assert a.negatives == () and c.negatives == (("n", ""),)
    assert c.name == "C, row 3"


def test_lists_are_several_positives_and_negatives(root):
    lists = {"pos_text": ["x", "y"], "pos_image_path": ["", "images/a.png"], "neg_text": ["", "n"]}
    write_rows(root, "A", [GOOD | lists | {"neg_image_path": ["", ""]}])
    row = TrainingData(DataConfig(str(root), sets=("A",))).rows[0]
    assert row.positives == (("x", ""), ("y", "images/a.png")) and row.negatives == (("n", ""),)


def test_all_broken_rows_are_named_at_once(root):
    bad = [
        GOOD | {"pos_text": ""}, GOOD | {"pos_text": ["a", "b"], "pos_image_path": [""]}, {"qry": "x"}, [1],
        GOOD | {"neg_text": "p", "neg_image_path": ""}, GOOD | {"qry": 3}, GOOD | {"qry_image_path": "../../etc/x"},
    ]  # fmt: skip
    write_rows(root, "A", [GOOD, *bad[:-1]])
    with pytest.raises(ValueError) as e:
        TrainingData(DataConfig(str(root)))
    lines = str(e.value).splitlines()
    assert lines[0] == "6 rows cannot be used:"
    assert lines[1:] == [
        "A, row 1: the positive has neither text nor image",
        "A, row 2: positive: 2 texts but 1 image paths",
        "A, row 3: column qry_image_path is missing; there are qry",
        "A, row 4: a row is a JSON object, got list",
        "A, row 5: a negative is the same as a positive",
        "A, row 6: the query: text and image path are strings, got int, str",
    ]
    write_rows(root, "A", [GOOD, bad[-1]])
    with pytest.raises(ValueError, match=r"A, row 1: .*leaves the image folder"):
        TrainingData(DataConfig(str(root))).check()


def test_missing_and_unreadable_pictures(root):
    (root / "images/b.png").write_bytes(b"no picture")
    write_rows(root, "A", [GOOD, GOOD | {"qry_image_path": "images/b.png"}])
    data = TrainingData(DataConfig(str(root)))
    data.check()
    with pytest.raises(ValueError, match=r"1 rows cannot be used:\nA, row 1: images/b.png: not an image"):
        data.check(thoroughly=True)
    write_rows(root, "A", [GOOD | {"qry_image_path": "images/c.png"}])
    with pytest.raises(ValueError, match=r"A, row 0: image images/c.png is not in"):
        TrainingData(DataConfig(str(root))).check()


def test_check_names_broken_rows_before_anything_else(root, tmp_path, capsys):
    path = toml(tmp_path, f'model = "none/there"\nout = "o"\n[data]\nroot = "{root}"\n[optim]\nbatch_size = 4\n')
    assert main(["train", str(path), "--check"]) == 0
    assert capsys.readouterr().out == "17 rows of 2 sets can be used\n"
    (root / "images/a.png").write_bytes(b"no picture")
    assert main(["train", str(path), "--check"]) == 1
    err = capsys.readouterr().err
    assert "10 rows cannot be used" in err and "A, row 0: images/a.png: not an image" in err


def test_the_cap_takes_the_first_rows_or_random_ones(root):
    def texts(**options):
        data = TrainingData(DataConfig(str(root), sets=("A",), rows_per_set=4, **options), seed=5)
        return [row.positives[0].text for row in data.rows]

    assert texts(row_choice="first") == ["p0", "p1", "p2", "p3"]
    assert len(set(texts())) == 4 and texts() != texts(row_choice="first") and texts() == texts()


@pytest.mark.parametrize("size", [1, 3])
def test_an_epoch_sees_every_row_once_in_blocks_of_one_set(root, size):
    data = TrainingData(DataConfig(str(root), sub_batch=size), seed=2)
    batches = [[row.name for row in data.batch(step, 3)] for step in range(5)]
    seen = [name for batch in batches for name in batch]
    assert len(seen) == len(set(seen)) == 15  # of 17: what fills no block or batch waits
    if size == 3:
        assert all(len({name.split(",")[0] for name in batch}) == 1 for batch in batches)
    else:
        assert any(len({name.split(",")[0] for name in batch}) == 2 for batch in batches)
    second = [row.name for step in range(5, 10) for row in data.batch(step, 3)]
    assert len(set(second)) == 15 and second != seen
    again = TrainingData(DataConfig(str(root), sub_batch=size), seed=2)
    assert [row.name for row in again.batch(7, 3)] == second[6:9]  # order depends on seed and step alone


def test_too_few_rows_and_missing_sets(root):
    with pytest.raises(ValueError, match="a batch of 32 rows in blocks of 1 is more than the data has: A 10, B 7"):
        TrainingData(DataConfig(str(root))).batch(0, 32)
    with pytest.raises(FileNotFoundError, match=r"holds no original\*.parquet"):
        TrainingData(DataConfig(str(root), sets=("X",)))
    with pytest.raises(ValueError, match="holds no row of 'diverse_instruction'"):
        TrainingData(DataConfig(str(root), variant="diverse_instruction"))


# --- the loop ----------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_plain_code(base, tmp_path):
    t = trainer(base, tmp_path, loss={"hard_negatives": False}, gradient_checkpointing=False)
    ours = gradients(t)
    rows = t.own_rows(0)
    t.model.zero_grad()
    q = t.model(t.processor([as_input(r.query, r.images) for r in rows]))
    p = t.model(t.processor([as_input(r.positives[0], r.images) for r in rows]))
    loss = F.cross_entropy(q @ p.T / 0.02, torch.arange(len(rows)))
    loss.backward()
    assert t.value == pytest.approx(loss.item(), rel=1e-5)
    same_gradients(ours, {n: p.grad for n, p in t.parameters.items()}, 1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_chunk_size_and_checkpointing_change_no_gradient(base, tmp_path, checkpointing):
    expected = gradients(trainer(base, tmp_path, optim={"chunk_size": 0}, gradient_checkpointing=False))
    for size in (1, 3, 0):
        t = trainer(base, tmp_path, optim={"chunk_size": size}, gradient_checkpointing=checkpointing)
        same_gradients(gradients(t), expected, 1e-4)


@pytest.mark.parametrize("target", ["down_proj", "qkv_proj", "out_proj"])
def test_checkpointing_keeps_the_inputs_of_frozen_layers(base, tmp_path, target):
    """With adapters behind a frozen block: in inference the block adds to its input in place, here it must not."""
    lora = LoraConfig(r=2, lora_dropout=0.3, target_modules=(target,))
    results = []
    for checkpointing in (False, True):
        t = trainer(base, tmp_path, lora=lora, gradient_checkpointing=checkpointing)
        for p in t.parameters.values():
            p.data.normal_(std=0.2, generator=torch.Generator().manual_seed(p.numel()))
        torch.manual_seed(0)
        results.append(gradients(t))
    same_gradients(*results)


def test_a_frozen_tower_changes_no_other_gradient(base, tmp_path):
    free = gradients(trainer(base, tmp_path))
    frozen = gradients(trainer(base, tmp_path, freeze=("vision",)))
    assert frozen.keys() == {n for n in free if not n.startswith("vision.")}
    same_gradients(frozen, {n: free[n] for n in frozen}, 1e-4)


def test_hard_negatives_are_really_used(base, tmp_path):
    data = {"sets": ("Grid-Where",)}
    with_them = trainer(base, tmp_path, data=data)
    batch = prepared(with_them)
    assert len(batch.inputs) == 12 and int((~batch.about.positive).sum()) == 4
    without = trainer(base, tmp_path, data=data, loss={"hard_negatives": False})
    assert len(prepared(without).inputs) == 8
    gradients(with_them), gradients(without)
    assert with_them.value > without.value + 1e-3


@pytest.mark.parametrize(
    "loss",
    [{"symmetric": True}, {"mask_duplicates": True}, {"dims": (8, 64)}, {"temperature": 0.1}],
    ids=lambda d: next(iter(d)),
)
def test_options_reach_the_loss(base, tmp_path, loss):
    data = {"sets": ("Emoji-Group",)}  # few classes: duplicates in every batch
    values = []
    for options in ({}, loss):
        t = trainer(base, tmp_path, data=data, loss=options, optim={"batch_size": 12})
        gradients(t)
        values.append(t.value)
    assert abs(values[0] - values[1]) > 1e-3


def test_a_learned_temperature_is_trained(base, tmp_path):
    t = trainer(base, tmp_path, loss={"learn_temperature": True, "temperature": 0.05}, optim={"lr": 1e-2})
    for _ in range(2):
        t.train_step(prepared(t))
    assert t.loss.temperature != pytest.approx(0.05, rel=1e-4)
    t.loss.log_scale.data.fill_(9.0)
    assert t.loss.temperature == pytest.approx(0.01, rel=1e-5)
    record = t.train_step(prepared(t))
    assert 0.01 <= record["temperature"] <= 0.01 * math.exp(1.1e-2), "from there, one step of Adam at this rate"


def test_it_overfits_32_pairs(base, tmp_path):
    data = {"sets": ("Emoji-i2t",)}
    optim = {"batch_size": 32, "chunk_size": 32, "steps": 44, "lr": 5e-4, "warmup": 5, "betas": (0.9, 0.98)}
    trainer(base, tmp_path, data=data, optim=optim, gradient_checkpointing=False).run()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    print([(r["loss"], r["hit_rate"]) for r in log])
    assert log[0]["hit_rate"] < 0.2 and log[-1]["hit_rate"] == 1.0 and log[-1]["loss"] < 0.3


def test_gradients_are_clipped(base, tmp_path):
    t = trainer(base, tmp_path, optim={"clip": 0.5})
    record = t.train_step(prepared(t, 0))
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in t.parameters.values()))
    assert record["grad_norm"] > 1 and norm == pytest.approx(0.5, rel=1e-4)


# --- what is written ---------------------------------------------------------------------------------------

RUNS = {
    "full": {"loss": {"learn_temperature": True}},
    "dora": {"lora": LoraConfig(r=2, lora_dropout=0.2, use_dora=True)},
}


@pytest.mark.parametrize("kind", RUNS)
def test_resumed_equals_uninterrupted_bit_for_bit(base, tmp_path, kind):
    options = RUNS[kind] | {"log": {"save": 2}, "optim": {"steps": 4}}
    whole = trainer(base, tmp_path / "whole", **options)
    whole.run()
    part = trainer(base, tmp_path / "part", **options)
    train_step = part.train_step
    part.train_step = lambda prepared: train_step(prepared) if part.step < 3 else 1 / 0  # one step after a checkpoint
    with pytest.raises(ZeroDivisionError):
        part.run()
    assert sorted(p.name for p in (tmp_path / "part").iterdir()) == ["log.jsonl", "step-000002"]
    torch.manual_seed(99)
    resumed = trainer(base, tmp_path / "part", **options)
    assert resumed.step == 2
    resumed.run()
    for name, p in whole.parameters.items():
        assert torch.equal(p, resumed.parameters[name]), name
        for key, value in whole.optimizer.state[p].items():
            assert torch.equal(value, resumed.optimizer.state[resumed.parameters[name]][key]), (name, key)
    logs = [[json.loads(line) for line in (tmp_path / d / "log.jsonl").read_text().splitlines()]
            for d in ("whole", "part")]  # fmt: skip
    assert [(r["step"], r["loss"], r["lr"]) for r in logs[0]] == [(r["step"], r["loss"], r["lr"]) for r in logs[1]]
    assert not (tmp_path / "part/step-000002/training").exists()  # only the newest can be gone on from


def test_a_written_model_gives_the_trained_models_vectors(base, tmp_path):
    t = trainer(base, tmp_path, optim={"steps": 2})
    folder = t.run()
    e = Embedder.from_pretrained(folder, device="cpu", show_progress=False)
    inputs = ["a", {"text": "what?", "image": Image.new("RGB", (70, 50), "red")}]
    with torch.no_grad():
        expected = t.model.eval()(t.processor(inputs))
    close("vectors", torch.from_numpy(e.encode(inputs)), expected, 3e-6)
    plain = Embedder.from_pretrained(base, device="cpu", show_progress=False)
    assert abs(plain.encode(inputs) - e.encode(inputs)).max() > 1e-3


def test_a_written_adapter_gives_the_trained_models_vectors(base, tmp_path):
    t = trainer(base, tmp_path, optim={"steps": 3, "lr": 3e-2}, lora=LoraConfig(r=2, use_dora=True))
    folder = t.run()
    e = Embedder.from_pretrained(base, adapter=folder, device="cpu", show_progress=False)
    inputs = ["a", {"text": "what?", "image": Image.new("RGB", (70, 50), "red")}]
    with torch.no_grad():
        expected = t.model.eval()(t.processor(inputs))
    close("vectors", torch.from_numpy(e.encode(inputs)), expected, 3e-6)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert not (folder / "model.safetensors").exists()


def test_other_settings_do_not_go_on(base, tmp_path):
    trainer(base, tmp_path, optim={"steps": 1}).run()
    with pytest.raises(ValueError, match=r"other settings: optim.lr was 0.001 and is 0.002; .*seed was 0 and is 1"):
        trainer(base, tmp_path, optim={"steps": 1, "lr": 0.002}, seed=1)
    assert trainer(base, tmp_path, optim={"steps": 1}, log={"pictures": 7}).step == 1


def test_a_nan_loss_stops_with_the_step_and_the_rows(base, tmp_path):
    t = trainer(base, tmp_path)
    t.train_step(prepared(t, 0))
    rows = t.own_rows(1)
    bad = rows[2]
    rows[2] = dataclasses.replace(bad, query=bad.query._replace(text=bad.query.text + "\x07"))
    with torch.no_grad():
        t.model.decoder.embed_tokens.weight[t.processor.tokenizer("\x07")[-1]] = torch.nan
    before = {n: p.clone() for n, p in t.parameters.items()}
    with pytest.raises(TrainingError) as e:
        t.train_step(t.loader.prepare(rows))
    assert str(e.value) == f"the loss is nan at step 2; rows whose vectors are not finite (process 0): {bad.name}"
    for n, p in t.parameters.items():
        torch.testing.assert_close(p, before[n], rtol=0, atol=0, equal_nan=True)


def test_an_infinite_gradient_stops_too(base, tmp_path):
    t = trainer(base, tmp_path)
    rows = t.own_rows(0)
    t.model.decoder.layers[0].mlp.down_proj.weight.register_hook(lambda g: g * torch.inf)
    with pytest.raises(TrainingError, match=r"the gradient's norm is (nan|inf) at step 1; rows of the batch.*") as e:
        t.train_step(t.loader.prepare(rows))
    assert all(row.name in str(e.value) for row in rows)


def test_an_image_that_vanishes_is_named(root, base, tmp_path):
    t = trainer(base, tmp_path / "out", data={"root": str(root), "sets": ("A",)})
    (root / "images/a.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"A, row \d: .*a.png"):
        prepared(t, 0)


def test_pictures_and_tensorboard(base, tmp_path):
    pytest.importorskip("tensorboard")
    log = {"save": 0, "pictures": 1, "picture_rows": 6, "tensorboard": True}
    plain, drawn = (trainer(base, tmp_path / name, optim={"steps": 2}, log=options) for name, options in
                    (("a", {}), ("b", log)))  # fmt: skip
    plain.run(), drawn.run()
    names = sorted(p.name for p in (tmp_path / "b/pictures").iterdir())
    assert names == ["step-000001.png", "step-000002.png"]
    with Image.open(tmp_path / "b/pictures/step-000002.png") as sheet:
        assert sheet.size == (6 * 174 + 6, 6 * 174 + 6) and len(sheet.getcolors(1 << 20)) > 100
    assert list((tmp_path / "b/tensorboard").glob("events.*"))
    for n, p in plain.parameters.items():
        assert torch.equal(p, drawn.parameters[n]), n  # looking changes nothing


def test_frozen_modules_get_no_adapter(base, tmp_path):
    t = trainer(base, tmp_path, lora=LoraConfig(r=2), freeze=("vision", "decoder.layers.0"))
    assert t.parameters and not any("vision" in n or "layers.0." in n for n in t.parameters)
    with pytest.raises(ValueError, match="no module 'tower'"):
        trainer(base, tmp_path, lora=LoraConfig(r=2), freeze=("tower",))


def test_freezing_mistakes(base, tmp_path):
    with pytest.raises(ValueError, match="no module 'tower'; there are vision, projector, decoder"):
        trainer(base, tmp_path, freeze=("tower",))
    with pytest.raises(ValueError, match="nothing is left to train"):
        trainer(base, tmp_path, freeze=("vision", "projector", "decoder"))


@pytest.mark.parametrize("frozen", [(), ("vision",), ("vision", "projector", "decoder.embed_tokens")])
@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, use_dora=True), LoraConfig(r=2, target_modules=("down_proj",))])
def test_bfloat16_autocast_on_what_is_trained_in_float32(base, tmp_path, frozen, lora):
    """As on CUDA: frozen weights in bfloat16, the tower without gradient in bfloat16 throughout."""
    t = trainer(base, tmp_path, freeze=() if lora else frozen, lora=lora)
    batch = t.processor(["a", {"text": "what?", "image": Image.new("RGB", (70, 50), "red")}])
    with torch.no_grad():
        expected = F.normalize(t.engine.encoder(batch))
    for p in t.model.parameters():
        p.data = p.data if p.requires_grad else p.data.bfloat16()
    vectors = F.normalize(engine.Encoder(t.model, torch.bfloat16)(batch))
    vectors[:, :9].sum().backward()
    close("vectors", vectors.detach(), expected, 0.02)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in t.parameters.values())


def test_a_chunk_without_images_touches_the_tower(base, tmp_path):
    """Else processes would reduce gradients of different parameters."""
    t = trainer(base, tmp_path)
    encoder = engine.Encoder(t.model)
    encoder(t.processor(["a", "b"])).sum().backward()
    assert all(p.grad is not None for p in t.model.parameters())
    assert not any(p.grad.any() for p in t.model.vision.parameters())


def test_the_command(base, tmp_path, capsys):
    text = f'model = "{base}"\nout = "{tmp_path}/out"\n[data]\nroot = "mini"\nsets = ["Emoji-t2i"]\nworkers = 2\n'
    path = toml(tmp_path, text + "[optim]\nbatch_size = 2\nsteps = 2\nwarmup = 1\n")
    assert main(["train", str(path), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path}/out/step-000002\n"
    shutil.rmtree(tmp_path / "out/step-000002/training")
    assert main(["train", str(path), "--device", "cpu"]) == 0  # nothing to go on from: from the beginning
