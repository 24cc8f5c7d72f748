"""The training loop: rows -> vectors -> InfoNCE -> gradients by GradCache -> AdamW, with logs and exact resumption."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..lora import add_lora, exclude_frozen
from ..model import VLM2Vec
from ..processor import Loaded, Processor
from ..weights import load_model, resolve
from . import checkpoint, engine
from .config import TrainConfig
from .data import NONE, Row, content_id, open_data
from .gradcache import cached_backward
from .loss import Targets, contrastive_loss, hit_rate
from .pictures import draw_sheet

MAX_SCALE = 100.0  # of similarities, where the temperature is learned; CLIP's (arXiv 2103.00020)


class TrainingError(RuntimeError):
    """The loss or its gradient is NaN or infinite. The message names the step and the rows."""


@dataclass(frozen=True)
class Prepared:
    """One process' share of a batch: rows, their inputs (queries, then targets), and what the targets are."""

    rows: list[Row]
    inputs: list[Loaded]
    about: Targets

    @property
    def row_of(self) -> list[int]:
        """The row of each input."""
        return [*range(len(self.rows)), *self.about.owner.tolist()]


class Trainer:
    """A training run.

    Args:
        config: see `TrainConfig`.
        device: default CUDA where there is one, else the CPU; under torchrun, this process' own.

    Where `config.out` holds a checkpoint of the same run, the run goes on from there. On CUDA, products are computed
    in bfloat16 (autocast, see `TrainConfig`) and frozen weights kept in it.

    Attributes:
        model, data, processor, optimizer, engine; step: how many steps are done; lora: the adapters, or None.

    Raises ValueError for rows that cannot be used, or a checkpoint in `out` that is of other settings.
    """

    def __init__(self, config: TrainConfig, *, device: torch.device | str | None = None):
        self.config, self.out = config, Path(config.out)
        self.device = engine.start_processes(device)
        if config.optim.batch_size % engine.world_size():
            raise ValueError(f"optim.batch_size {config.optim.batch_size} is no multiple of {engine.world_size()} "
                             "processes")  # fmt: skip
        self.data = open_data(config.data, seed=config.seed)
        self.data.check()
        self.data.batch(0, config.optim.batch_size, NONE)  # raises where there are too few rows
        self.source = resolve(config.model)
        torch.manual_seed(config.seed + engine.rank())
        self.model = self._build_model()
        self.processor = Processor.from_pretrained(self.source, self.model.config, num_crops=config.data.num_crops)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.loss.temperature), device=self.device))
        bf16 = self.device.type == "cuda" if config.autocast is None else config.autocast
        amp = torch.bfloat16 if bf16 else None
        self.engine = engine.Engine(engine.Encoder(self.model, amp), config.distributed, self.device)
        self.parameters, self.optimizer = self._build_optimizer()
        self.step = self._resume()

    def run(self) -> Path:
        """Trains to the last step; returns the folder of the last checkpoint."""
        log, optim = self.config.log, self.config.optim
        with Log(self.out, self.step, log.tensorboard) as write, ThreadPoolExecutor(self.config.data.workers) as pool:
            for prepared in self._batches(pool):
                write(self.train_step(prepared))
                last = self.step == optim.steps
                if log.pictures and (self.step % log.pictures == 0 or last):
                    self.write_pictures()
                if last or (log.save and self.step % log.save == 0):
                    self.save()
        return self.out / f"step-{self.step:06d}"

    def train_step(self, prepared: Prepared) -> dict[str, float]:
        """One step on one process' share of a batch; returns what the log gets."""
        start, optim = time.perf_counter(), self.config.optim
        lr = self._set_lr()
        self.optimizer.zero_grad(set_to_none=True)
        loss, hits = self.backward(prepared)
        norm = self._clip(prepared)
        self.optimizer.step()
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(MAX_SCALE))
        self.step += 1
        seconds = time.perf_counter() - start
        return {
            "step": self.step, "loss": loss, "hit_rate": hits, "grad_norm": norm, "lr": lr,
            "temperature": self.temperature, "seconds": seconds, "rows_per_second": optim.batch_size / seconds,
        }  # fmt: skip

    def backward(self, prepared: Prepared) -> tuple[float, float]:
        """Adds the gradient of the whole batch's loss to the parameters; returns the loss and the hit rate."""
        self.model.train()
        n = len(prepared.rows)
        about = self._gather(prepared.about, n)
        size = self.config.optim.chunk_size or len(prepared.inputs)
        chunks = [prepared.inputs[i : i + size] for i in range(0, len(prepared.inputs), size)]

        def loss(vectors: Tensor) -> Tensor:
            value = self._loss(engine.gather_rows(vectors[:n]), engine.gather_rows(vectors[n:]), about)
            if not value.isfinite():
                raise self._error("the loss is", value.item(), prepared, vectors)
            return value

        value, vectors = cached_backward(
            lambda chunk: self._encode(self.engine.encoder, chunk), chunks, loss,
            device=self.device, again=lambda chunk: self._encode(self.engine.trained, chunk), hold=self.engine.hold,
            scale=engine.world_size(), idle=self.engine.idle(len(chunks), self.device),
        )  # fmt: skip
        gathered = engine.gather_rows(vectors[:n]), engine.gather_rows(vectors[n:])
        return float(value), hit_rate(*gathered, about)

    def prepare(self, rows: Sequence[Row], pool: ThreadPoolExecutor | None = None) -> Prepared:
        """Reads and cuts the rows' images and tokenises their texts. Raises ValueError naming the row at fault."""
        use_negatives = self.config.loss.hard_negatives
        numbered = [(i, pair, True) for i, row in enumerate(rows) for pair in row.positives]
        numbered += [(i, pair, False) for i, row in enumerate(rows) for pair in row.negatives if use_negatives]
        pairs = [(row, row.query) for row in rows] + [(rows[i], pair) for i, pair, _ in numbered]
        inputs = list((pool.map if pool else map)(lambda pair: self._load(*pair), pairs))
        about = Targets(
            owner=torch.tensor([i for i, _, _ in numbered]),
            positive=torch.tensor([positive for _, _, positive in numbered]),
            content=torch.tensor([content_id(pair, rows[i].images) for i, pair, _ in numbered]),
        )
        return Prepared(list(rows), inputs, about)

    def own_rows(self, step: int) -> list[Row]:
        """This process' share of the rows of a step, counted from 0."""
        n = self.config.optim.batch_size // engine.world_size()
        part = slice(engine.rank() * n, (engine.rank() + 1) * n)
        return self.data.batch(step, self.config.optim.batch_size, part)

    def save(self) -> Path:
        """Writes a checkpoint of the present step; to be called by all processes."""
        return checkpoint.write(
            self.out, self.step, self.model, source=self.source, lora=self.lora, base_model=self.config.model,
            parameters=self.parameters, optimizer=self.optimizer, device=self.device, config=_comparable(self.config),
        )  # fmt: skip

    def write_pictures(self) -> None:
        """pictures/step-<step>.png: up to eight sampled queries and the five nearest of the sample's targets."""
        self.model.eval()
        rows = self.data.sample(self.config.log.picture_rows)
        targets = list({(p.text, p.image, r.images.place): (p, r.images) for r in rows for p in r.positives}.values())
        shown = rows[:8]
        inputs = [self._load(r, r.query) for r in shown]
        inputs += [self._load_pair("a sampled target", pair, images) for pair, images in targets]
        size = self.config.optim.chunk_size or len(inputs)
        parts = [self._encode(self.engine.encoder, inputs[i : i + size]).detach() for i in range(0, len(inputs), size)]
        vectors = nn.functional.normalize(torch.cat(parts))
        scores, best = (vectors[: len(shown)] @ vectors[len(shown) :].T).topk(min(5, len(targets)))
        if engine.rank() == 0:
            found = [
                [(*targets[j], s, targets[j][0] in row.positives) for j, s in zip(js, ss, strict=True)]
                for row, js, ss in zip(shown, best.tolist(), scores.tolist(), strict=True)
            ]
            path = self.out / "pictures" / f"step-{self.step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_sheet([(r.query, r.images) for r in shown], found).save(path)

    @property
    def temperature(self) -> float:
        return math.exp(-self.log_scale.item()) if self.config.loss.learn_temperature else self.config.loss.temperature

    def _build_model(self) -> VLM2Vec:
        config, cuda = self.config, self.device.type == "cuda"
        dtype = torch.bfloat16 if config.lora and cuda else torch.float32
        model = load_model(self.source, device=self.device, dtype=dtype)
        model.requires_grad_(True)
        _freeze(model, config.freeze)
        self.lora = config.lora and exclude_frozen(config.lora, model)
        if self.lora:
            add_lora(model, self.lora, generator=torch.Generator().manual_seed(config.seed))
        if cuda:
            for p in (p for p in model.parameters() if not p.requires_grad):
                p.data = p.data.to(torch.bfloat16)
        if config.gradient_checkpointing:
            engine.checkpoint_layers(model)
        if not any(p.requires_grad for p in model.vision.parameters()):
            engine.without_gradient(model.vision)
        return model

    def _build_optimizer(self) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
        o = self.config.optim
        parameters = {n: p for n, p in self.engine.encoder.named_parameters() if p.requires_grad}
        groups = [{"params": list(parameters.values()), "weight_decay": o.weight_decay}]
        if self.config.loss.learn_temperature:
            parameters["log_scale"] = self.log_scale
            groups.append({"params": [self.log_scale], "weight_decay": 0.0})
        fused = self.device.type in ("cuda", "cpu")
        return parameters, torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=fused)

    def _resume(self) -> int:
        folder = checkpoint.newest(self.out)
        if folder is None:
            return 0
        step, before = checkpoint.read_config_of(folder)
        differing = _differences(before, _comparable(self.config))
        if differing:
            raise ValueError(f"{folder} is of a run with other settings: {'; '.join(differing)}. Choose another `out`, "
                             "or restore them")  # fmt: skip
        checkpoint.restore(folder, self.parameters, self.optimizer, self.device)
        return step

    def _batches(self, pool: ThreadPoolExecutor) -> Iterator[Prepared]:
        """The remaining batches; the next is read while one computes."""
        steps = self.config.optim.steps
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(lambda step: self.prepare(self.own_rows(step), pool), self.step)
            for step in range(self.step, steps):
                prepared = coming.result()
                if step + 1 < steps:
                    coming = ahead.submit(lambda step: self.prepare(self.own_rows(step), pool), step + 1)
                yield prepared

    def _load(self, row: Row, pair: Any) -> Loaded:
        return self._load_pair(row.name, pair, row.images, row)

    def _load_pair(self, name: str, pair: Any, images: Any, row: Row | None = None) -> Loaded:
        try:
            item = {"text": pair.text} | ({"image": images.source(pair.image)} if pair.image else {})
            return self.processor.load(self.processor.plan(item, max_length=self.config.data.max_length))
        except (ValueError, OSError) as e:
            raise ValueError(f"{name}: {e}") from e

    def _encode(self, module: nn.Module, chunk: Sequence[Loaded]) -> Tensor:
        return module(self.processor.pack(chunk).to(self.device, non_blocking=True))

    def _gather(self, about: Targets, num_queries: int) -> Targets:
        """The targets of all processes; queries are counted through."""
        owner = about.owner + engine.rank() * num_queries
        parts = (engine.gather_rows(x.to(self.device)) for x in (owner, about.positive, about.content))
        return Targets(*parts)

    def _loss(self, queries: Tensor, targets: Tensor, about: Targets) -> Tensor:
        c = self.config.loss
        temperature = (-self.log_scale).exp() if c.learn_temperature else c.temperature
        return contrastive_loss(
            queries, targets, about,
            temperature=temperature, symmetric=c.symmetric, mask_duplicates=c.mask_duplicates, dims=c.dims,
        )  # fmt: skip

    def _set_lr(self) -> float:
        o = self.config.optim
        lr = o.lr * learning_rate_factor(self.step, o.warmup, o.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _clip(self, prepared: Prepared) -> float:
        """Scales the gradient to `clip` at most, the temperature's apart; returns its norm before."""
        clip, parameters = self.config.optim.clip, [p for p in self.parameters.values() if p is not self.log_scale]
        norm = engine.whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if not norm.isfinite():
            raise self._error("the gradient's norm is", float(norm), prepared)
        if clip:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        return float(norm)

    def _error(self, what: str, value: float, prepared: Prepared, vectors: Tensor | None = None) -> TrainingError:
        bad = [] if vectors is None else (~vectors.isfinite().all(1)).nonzero().flatten().tolist()
        rows = sorted({prepared.row_of[i] for i in bad}) or range(len(prepared.rows))
        names = [prepared.rows[i].name for i in rows]
        which = "rows whose vectors are not finite" if bad else "rows of the batch"
        return TrainingError(
            f"{what} {value} at step {self.step + 1}; {which} (process {engine.rank()}): "
            + "; ".join(names[:20])
            + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        )


class Log:
    """log.jsonl, and TensorBoard's files; of the first process alone. Lines after `step` are of a run that was
    interrupted before its next checkpoint, and are taken out."""

    def __init__(self, out: Path, step: int, tensorboard: bool):
        self.file = self.board = None
        if engine.rank():
            return
        out.mkdir(parents=True, exist_ok=True)
        path = out / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")
        if tensorboard:
            self.board = _summary_writer()(out / "tensorboard", purge_step=step + 1)

    def __call__(self, record: dict[str, float]) -> None:
        if self.file:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        if self.board:
            for name, value in record.items():
                self.board.add_scalar(name, value, record["step"])

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        for one in (self.file, self.board):
            if one:
                one.close()


def learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """Of step 0, 1, …: rises linearly from 0 to 1 at `warmup`, falls linearly to 0 at `steps`."""
    return step / warmup if step < warmup else max(0.0, (steps - step) / max(1, steps - warmup))


def _freeze(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        try:
            model.get_submodule(name).requires_grad_(False)
        except AttributeError:
            known = ", ".join(n for n, _ in model.named_children())
            raise ValueError(f"freeze: the model has no module {name!r}; there are {known} and their parts") from None
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"freeze: nothing is left to train without {', '.join(names)}")


def _comparable(config: TrainConfig) -> dict[str, Any]:
    """What must be equal for a run to go on; as JSON gives it back."""
    settings = {k: v for k, v in config.as_dict().items() if k not in ("out", "log")}
    return json.loads(json.dumps(settings))


def _differences(a: Any, b: Any, name: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{name}.{k}".lstrip("."))]
    return [] if a == b else [f"{name} was {a!r} and is {b!r}"]


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("log.tensorboard needs tensorboard: pip install 'minivlm2vec[train]'") from None
    return SummaryWriter
