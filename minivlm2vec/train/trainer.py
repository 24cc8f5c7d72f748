"""The recipe: rows -> vectors -> InfoNCE -> gradients by GradCache -> AdamW, with a log and exact resumption."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import resolve
from ..config import Trained, VLM2VecConfig, changes
from ..distributed import Ranks
from ..errors import some
from ..lora import write_adapter
from ..model import VLM2Vec
from ..processor import Loaded, Processor
from ..registry import load_plugin
from ..rows import Pair
from ..weights import write_checkpoint
from . import checkpoint, engine
from .config import TrainConfig
from .data import NONE, Pictures, Row, RowSource, open_data
from .gradcache import cached_backward
from .inputs import Prepared, RowLoader
from .log import Log
from .loss import ContrastiveLoss, Loss, Targets, hit_rate
from .model import set_training, trainable_model
from .optim import LOSS, MakeOptimizer, Schedule, adamw, described_groups, is_plain, linear, set_rates
from .pictures import nearest_sheet

Record = dict[str, float]  # of a step, by name: what log.jsonl and TensorBoard get
# Called in every process after each step, before its record is logged: what it adds to the record is logged too.
# `trainer.step` steps are done.
Callback = Callable[["Trainer", Record], None]


class TrainingError(RuntimeError):
    """The loss or its gradient is NaN or infinite. The message names the step and the rows."""


def train(config: TrainConfig, *, device: torch.device | str | None = None, **parts: Any) -> Path:
    """Trains as `Trainer(config, **parts)` does, and returns the folder of the last checkpoint. Under torchrun every
    process calls this."""
    return Trainer(config, device=device, **parts).run()


def check_data(config: TrainConfig) -> RowSource:
    """The rows of a run, all read and their pictures decoded. Raises ValueError naming those at fault, and where there
    are too few for a batch."""
    data = open_data(config.data, seed=config.seed)
    data.check(thoroughly=True)
    data.batch(0, config.optim.batch_size, NONE)
    return data


class Trainer:
    """A training run.

    Args:
        config: see `TrainConfig`; the parts below stand in for what it describes.
        device: default CUDA where there is one, else the CPU. Under torchrun each process has its own GPU.
        model: a model of your own, for `config.model`'s configuration and tokenizer, in the dtype that it is to be
            trained in. What does not require gradients stays as it is. Its parts have registered names
            (`registry.register`), under which its checkpoints bring them back.
        data: a `RowSource`.
        loss: see `Loss`.
        optimizer, schedule, callbacks: see `optim.MakeOptimizer`, `optim.Schedule` and `Callback` above.

    Where `config.out` holds a checkpoint of the same run, the run goes on from there, and beyond its last step where
    there are more now. On CUDA, products are computed in bfloat16 (autocast, see `TrainConfig`) and frozen weights
    kept in it. Modules that are frozen throughout stay in `eval`.

    Attributes:
        step: how many steps are done.
        parameters: those that are trained, by name.
        recorded: what config.json of the checkpoints says of the model.
        lora: the adapters, or None.
        model, data, loss, optimizer, schedule, processor, ranks, device.

    Raises ValueError for rows that cannot be used, or a checkpoint in `out` that is of another run.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        device: torch.device | str | None = None,
        model: VLM2Vec | None = None,
        data: RowSource | None = None,
        loss: Loss | None = None,
        optimizer: MakeOptimizer | None = None,
        schedule: Schedule | None = None,
        callbacks: Sequence[Callback] = (),
    ):
        self.config, self.out = config, Path(config.out)
        self.ranks = Ranks()
        self.device = _device(self.ranks, device)
        self.data = open_data(config.data, seed=config.seed) if data is None else data
        _check_batches(self.data, config.optim.batch_size, self.ranks)
        self.source = resolve(config.model)
        torch.manual_seed(config.seed + self.ranks.rank)
        for plugin in config.plugins:
            load_plugin(plugin)
        self.model, self.recorded, self.lora = trainable_model(config, self.source, self.device, model)
        self.processor = Processor.from_pretrained(
            self.source,
            self.model.config,
            num_crops=config.data.num_crops,
            num_image_tokens=self.model.num_image_tokens,
        )
        self.loader = RowLoader(
            self.processor, max_length=config.data.max_length, hard_negatives=config.loss.hard_negatives
        )
        self.loss: Loss = ContrastiveLoss(config.loss) if loss is None else loss
        for module in self._loss_modules():
            module.to(self.device)
        bf16 = self.device.type == "cuda" if config.autocast is None else config.autocast
        encoder = engine.Encoder(self.model, torch.bfloat16 if bf16 else None)
        self.engine = engine.Engine(encoder, config.distributed, self.device, self.ranks)
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad} | {
            f"{LOSS}{n}": p for m in self._loss_modules() for n, p in m.named_parameters() if p.requires_grad
        }
        self.optimizer = (optimizer or adamw(config.optim))(self.parameters)
        self.schedule = schedule or linear(config.optim)
        self.callbacks = tuple(callbacks)
        self.step = self._resume()

    def run(self) -> Path:
        """Trains to the last step; returns the folder of the last checkpoint."""
        log, steps = self.config.log, self.config.optim.steps
        out = self.out if self.ranks.first else None
        with Log(out, self.step, tensorboard=log.tensorboard) as write:
            for prepared in self._batches():
                record = self.train_step(prepared)
                for callback in self.callbacks:
                    callback(self, record)
                write(record)
                last = self.step == steps
                if log.pictures and (last or self.step % log.pictures == 0):
                    self.write_pictures()
                if last or (log.save and self.step % log.save == 0):
                    self.save()
        return self.out / f"step-{self.step:06d}"

    def train_step(self, prepared: Prepared) -> Record:
        """One step on this process' share of a batch."""
        start = time.perf_counter()
        set_rates(self.optimizer, self.schedule(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        loss, hits = self.backward(prepared)
        norm = self._clip(prepared)
        self.optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - start
        record = {"step": self.step, "loss": loss, "hit_rate": hits, "grad_norm": norm,
                  "lr": self.optimizer.param_groups[0]["lr"]}  # fmt: skip
        if isinstance(self.loss, ContrastiveLoss):
            record["temperature"] = self.loss.temperature
        return record | {"seconds": seconds, "rows_per_second": self.config.optim.batch_size / seconds}

    def backward(self, prepared: Prepared) -> tuple[float, float]:
        """Adds the gradient of the whole batch's loss to the parameters; returns the loss and the hit rate."""
        set_training(self.model)
        n = len(prepared.rows)
        about = self._gather(prepared.about, n)
        size = self.config.optim.chunk_size or len(prepared.inputs)
        chunks = [prepared.inputs[i : i + size] for i in range(0, len(prepared.inputs), size)]

        hits = 0.0

        def loss(vectors: Tensor) -> Tensor:
            nonlocal hits
            queries, targets = (self.ranks.gather(part) for part in (vectors[:n], vectors[n:]))
            value = self.loss(queries, targets, about)
            if not value.isfinite():
                raise self._error("the loss is", value.item(), prepared, vectors)
            hits = hit_rate(queries, targets, about)
            return value

        first_pass = engine.keeping_buffers(self.model, lambda chunk: self._encode(self.engine.encoder, chunk))
        value, _ = cached_backward(
            first_pass, chunks, loss,
            device=self.device, again=lambda chunk: self._encode(self.engine.trained, chunk), hold=self.engine.hold,
            scale=self.ranks.world, dummies=self.engine.dummy_chunks(len(chunks)),
        )  # fmt: skip
        return float(value), hits

    def own_rows(self, step: int) -> list[Row]:
        """This process' share of the rows of a step, counted from 0."""
        size = self.config.optim.batch_size
        own = self.ranks.share(range(size))
        return self.data.batch(step, size, slice(own[0], own[-1] + 1))

    def save(self) -> Path:
        """Writes a checkpoint of the present step; to be called by all processes."""
        if self.lora is not None:
            weights = checkpoint.adapter_weights(self.model, self.lora, self.ranks)
            parts = self.lora.parts | changes(VLM2VecConfig.from_json(self.source).trained, self._trained())
            write = partial(write_adapter, config=replace(self.lora, parts=parts), base_model=self.config.model)
        else:
            weights = checkpoint.model_weights(self.model, self.ranks)
            config = replace(self.recorded, trained=self._trained())
            write = partial(write_checkpoint, config=config, source=self.source)
        return checkpoint.write(self.out, self.step, self._state(), weights, write, self._settings())

    def write_pictures(self) -> None:
        """pictures/step-<step>.png: up to eight sampled queries and the five nearest of the sample's targets."""
        self.model.eval()
        sheet = nearest_sheet(self.data.sample(self.config.log.picture_rows), self._vectors)
        if self.ranks.first:
            path = self.out / "pictures" / f"step-{self.step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(path)

    def _loss_modules(self) -> list[nn.Module]:
        """The loss, if it is a module, with parameters and buffers perhaps."""
        return [self.loss] if isinstance(self.loss, nn.Module) else []

    def _trained(self) -> Trained:
        trained = getattr(self.loss, "trained", None)
        return trained() if trained else Trained()

    def _state(self) -> checkpoint.RunState:
        buffers = checkpoint.persistent_buffers(self.model) | {
            f"{LOSS}{name}": b for m in self._loss_modules() for name, b in checkpoint.persistent_buffers(m).items()
        }
        return checkpoint.RunState(self.parameters, buffers, self.optimizer, self.device, self.ranks)

    def _settings(self) -> dict[str, Any]:
        """The configuration, and what can be told of the parts that it does not name: their kinds, the optimizer's
        groups, the loss' plain attributes."""
        parts = {"model": self.model, "pooling": self.model.pooling, "data": self.data, "loss": self.loss,
                 "optimizer": self.optimizer}  # fmt: skip
        kinds = {name: _kind(part) for name, part in parts.items()}
        groups = described_groups(self.optimizer, {id(p): name for name, p in self.parameters.items()})
        loss = {k: v for k, v in getattr(self.loss, "__dict__", {}).items() if not k.startswith("_") and is_plain(v)}
        loss.pop("training", None)
        told = {"causal": self.model.causal, "optimizer_groups": groups, "loss_settings": loss}
        return self.config.as_dict() | {"parts": kinds | told}

    def _resume(self) -> int:
        folder = checkpoint.newest(self.out)
        if folder is None:
            return 0
        step = checkpoint.check_settings(folder, self._settings())
        self._state().restore(folder)
        return step

    def _batches(self) -> Iterator[Prepared]:
        """The remaining batches; the next is read while one computes."""
        with ThreadPoolExecutor(self.config.data.workers) as pool, ThreadPoolExecutor(1) as ahead:
            coming: list[Future[Prepared]] = []
            for step in range(self.step, self.config.optim.steps):
                coming.append(ahead.submit(lambda step: self.loader.prepare(self.own_rows(step), pool), step))
                if len(coming) > 1:
                    yield coming.pop(0).result()
            for last in coming:
                yield last.result()

    def _encode(self, module: nn.Module, chunk: Sequence[Loaded]) -> Tensor:
        return module(self.processor.pack(chunk).to(self.device, non_blocking=True))

    @torch.no_grad()
    def _vectors(self, pairs: Sequence[tuple[str, Pair, Pictures]]) -> Tensor:
        """Unit vectors [n, D] of pairs, each with its row's name and where its picture is."""
        inputs = [self.loader.load(*one) for one in pairs]
        size = self.config.optim.chunk_size or len(inputs)
        parts = [self._encode(self.engine.encoder, inputs[i : i + size]) for i in range(0, len(inputs), size)]
        return nn.functional.normalize(torch.cat(parts))

    def _gather(self, about: Targets, num_queries: int) -> Targets:
        """The targets of all processes; queries are counted through."""
        owner = about.owner + self.ranks.rank * num_queries
        return Targets(*(self.ranks.gather(x.to(self.device)) for x in (owner, about.positive, about.content)))

    def _clip(self, prepared: Prepared) -> float:
        """Scales the gradient to `clip` at most, that of the loss' own parameters apart; returns its norm before."""
        clip = self.config.optim.clip
        parameters = [p for name, p in self.parameters.items() if not name.startswith(LOSS)]
        norm = engine.whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if not norm.isfinite():
            raise self._error("the gradient's norm is", float(norm), prepared)
        if clip:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        return float(norm)

    def _error(self, what: str, value: float, prepared: Prepared, vectors: Tensor | None = None) -> TrainingError:
        bad = [] if vectors is None else (~vectors.isfinite().all(1)).nonzero().flatten().tolist()
        rows = sorted({prepared.row_of[i] for i in bad}) or range(len(prepared.rows))
        which = "rows whose vectors are not finite" if bad else "rows of the batch"
        names = some([prepared.rows[i].name for i in rows], 20)
        return TrainingError(f"{what} {value} at step {self.step + 1}; {which} (process {self.ranks.rank}): {names}")


def _device(ranks: Ranks, wanted: torch.device | str | None) -> torch.device:
    device = torch.device(ranks.device(wanted, exclusive=True) or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def _check_batches(data: RowSource, size: int, ranks: Ranks) -> None:
    if size % ranks.world:
        raise ValueError(f"optim.batch_size {size} is no multiple of {ranks.world} processes")
    data.check()
    data.batch(0, size, NONE)  # raises where there are too few rows


def _kind(part: Any) -> str:
    """The name of a function, or of an object's class."""
    return getattr(part, "__qualname__", type(part).__qualname__)
