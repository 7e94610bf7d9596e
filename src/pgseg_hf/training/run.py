"""The training loop: resumable, on a single CPU or many GPUs."""

import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, broadcast, gather_object, send_to_device, set_seed
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..distributed import sum_over_processes
from ..modeling_pgseg import PGSegModel
from ..run_records import config_fields, differences, vocabulary_of
from .arguments import Arguments
from .building import (
    build_model,
    build_processor,
    build_stream,
    full_weights,
    process_group_settings,
    sync_batchnorm,
    without_scalars,
)
from .checkpoints import load_checkpoint, prepare_output_dir, resolve_resume, save_checkpoint
from .evaluating import Evaluator, best_metric
from .finishing import model_card, publish, save_weights, upload
from .gradient_cache import GradientCache, average_gradients
from .optimization import ExponentialMovingAverage, build_optimizer, cosine_schedule, own_settings_kept
from .reporting import Clock, Meter, RunLog

# Settings that may change when a run is resumed; the run prints the changes. Data and model must stay the same.
CHANGEABLE = (
    *("learning_rate", "warmup_learning_rate", "min_learning_rate", "backbone_learning_rate_factor"),
    *("warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "chunk_size", "ema_decay"),
)


COUNTS = ("step", "best_step", "bad_steps", "bad_in_a_row")


class Run:
    """A training run: its components and its steps."""

    def __init__(self, arguments: Arguments):
        self.arguments = arguments
        chosen, data, run = arguments
        self.options = run
        assert run.output_dir is not None  # checked by RunArguments
        self.output_dir = Path(run.output_dir)
        if run.threads:
            torch.set_num_threads(run.threads)
        self.accelerator = accelerator = Accelerator(
            cpu=run.cpu,
            mixed_precision=run.mixed_precision,
            log_with=None if run.report_to == "none" else run.report_to.split(","),
            project_dir=run.output_dir,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[process_group_settings(run)],
        )
        self.refuse_what_cannot_be()
        if not run.overwrite_output_dir:
            resolve_resume(run.output_dir, run.resume_from_checkpoint)
        set_seed(run.seed)
        model = build_model(chosen).to(accelerator.device)
        if self.is_sharded:
            model = without_scalars(model)
        self.config = model.config
        self.processor = build_processor(chosen, data, model.config)
        self.depends_on = config_fields(model.config) | {
            "freeze_token_embeddings": chosen.freeze_token_embeddings,
            "vocabulary of the tokenizer": vocabulary_of(self.processor.tokenizer),
        }
        self.stream = build_stream(
            data, run, model, self.processor, accelerator.process_index, accelerator.num_processes
        )
        self.evaluator = Evaluator(run, self.processor, accelerator)
        self.repo_id = run.hub_model_id or self.output_dir.resolve().name
        if run.push_to_hub and accelerator.is_main_process:
            self.repo_id = HfApi().create_repo(self.repo_id, exist_ok=True).repo_id
        self.prepare(model)
        self.meter, self.clock = Meter(accelerator), Clock()
        self.step = self.best_step = self.bad_steps = self.bad_in_a_row = 0
        self.best: tuple[str, float] | None = None
        self.figures: dict[str, float] = {}
        self.seconds_before = 0.0
        self.started = time.monotonic()

    def prepare(self, model: nn.Module) -> None:
        """Builds optimizer and schedule, then prepares the output folder, once all settings have been checked."""
        run, accelerator = self.options, self.accelerator
        if run.sync_batchnorm and not run.chunk_size:  # each chunk has its own statistics
            model = sync_batchnorm(model)
        epochs = 0 if run.max_steps else (run.num_epochs or 0) * self.stream.batches_per_epoch
        self.total_steps = run.max_steps or max(1, math.ceil(epochs))
        self.ema = ExponentialMovingAverage(model, run.ema_decay) if run.ema_decay else None
        betas, factor = (run.adam_beta1, run.adam_beta2), run.backbone_learning_rate_factor
        optimizer = build_optimizer(model, run.learning_rate, run.weight_decay, betas, factor)
        start, floor = run.warmup_learning_rate, run.min_learning_rate
        schedule = cosine_schedule(
            optimizer,
            warmup_steps=int(run.warmup_ratio * self.total_steps),
            total_steps=self.total_steps,
            start=run.learning_rate / 100 if start is None else start,
            floor=run.learning_rate / 10 if floor is None else floor,
        )
        self.resume = prepare_output_dir(
            accelerator, self.output_dir, run.resume_from_checkpoint, run.overwrite_output_dir
        )
        self.model, self.optimizer, self.schedule = accelerator.prepare(model, optimizer, schedule)
        self.plain_model = accelerator.unwrap_model(self.model)
        self.cache: GradientCache | None = None
        if run.chunk_size:
            self.cache = GradientCache(self.plain_model, run.chunk_size, accelerator.autocast)
        # Until here all processes used the same seed; from now on each draws its own noise.
        set_seed(run.seed + accelerator.process_index)

    def refuse_what_cannot_be(self) -> None:
        accelerator, options = self.accelerator, self.options
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != accelerator.num_processes:
            raise ValueError(
                f"{launched} processes were launched, but each runs on its own; to train on CPUs, pass --cpu true."
            )
        by_accelerate = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
        if by_accelerate and "WORLD_SIZE" not in os.environ:
            raise ValueError(
                "accelerate launch starts a single process on CPUs; to train with N processes, run "
                "torchrun --nproc_per_node N examples/train_pgseg.py ... --cpu true"
            )
        if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
            raise ValueError("mixed_precision fp16 needs a GPU; use bf16 or no.")
        wanted = set() if options.report_to == "none" else set(options.report_to.split(",")) - {"all"}
        missing = sorted(wanted - set(map(str, get_available_trackers())))
        if missing:
            raise ValueError(
                f"report_to has trackers that are unknown or not installed: {', '.join(missing)}."
            )
        if self.is_sharded and (options.chunk_size or options.ema_decay):
            raise ValueError("chunk_size and ema_decay do not support FSDP; remove them or train with DDP.")

    @property
    def is_sharded(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.FSDP

    def load(self) -> None:
        """Restores everything from the checkpoint, if there is one."""
        if self.resume is None:
            return
        with own_settings_kept(self.optimizer, self.schedule.scheduler):
            progress, position = load_checkpoint(self.accelerator, self.resume, self.ema, self.depends_on)
        self.stream.load_state_dict(position["stream"])
        self.meter.load_state_dict(position["meter"])
        for name in COUNTS:
            setattr(self, name, progress[name])
        self.best = tuple(progress["best"]) if progress["best"] else None
        self.seconds_before = progress["seconds"]
        self.meter.bad.update(progress["bad_parts"])
        self.accelerator.print(f"Resuming from {self.resume}, step {self.step}.")
        for change in differences(progress.get("settings", {}), self.settings):
            self.accelerator.print(f"Changed setting: {change}.")
        other = differences(progress.get("measured_with", {}), self.evaluator.measured_with)
        if self.best and other:
            self.best, self.best_step = None, 0
            self.accelerator.print(
                f"The best metric so far is discarded, because the evaluation changed: {', '.join(other)}."
            )

    def save(self) -> None:
        """Writes a checkpoint."""
        position = {"stream": self.stream.state_dict(), "meter": self.meter.state_dict()}
        extra = {name: getattr(self, name) for name in (*COUNTS, "best", "seconds", "depends_on", "settings")}
        extra |= {"bad_parts": dict(self.meter.bad), "measured_with": self.evaluator.measured_with}
        keep = self.options.keep_checkpoints
        save_checkpoint(self.accelerator, self.output_dir, self.step, position, extra, keep, self.ema)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that may change when a run is resumed."""
        settings = {name: getattr(self.options, name) for name in CHANGEABLE}
        precision = self.accelerator.mixed_precision
        return settings | {"steps of the run": self.total_steps, "mixed_precision": precision}

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def train(self) -> dict[str, Any]:
        """Trains until the last step; returns the content of `all_results.json`."""
        options, accelerator = self.options, self.accelerator
        self.load()
        settings = {name: value for part in self.arguments for name, value in asdict(part).items()}
        log = RunLog(
            accelerator, self.output_dir, self.total_steps, self.step, settings, options.project_name
        )
        batches = iter(self.stream)
        self.announce()
        self.clock.skip()
        while self.step < self.total_steps:
            batch = send_to_device(next(batches), accelerator.device)
            self.clock.waited()
            parts, norm = self.train_step(batch)
            self.step += 1
            self.meter.add(parts | {"grad_norm": norm})
            self.clock.computed(options.batch_size * accelerator.num_processes)
            log.bar.update()
            if self.step % options.log_steps == 0 or self.step == self.total_steps:
                self.log_line(log)
            if self.is_due(options.eval_steps or self.total_steps) and self.evaluator:
                self.evaluate(log)
            if self.is_due(options.checkpoint_steps):
                self.save()
            self.clock.skip()
        results = self.finish()
        self.drop_wrapped_model()
        log.close()
        return results

    def drop_wrapped_model(self) -> None:
        """Releases DDP, so that torch.distributed holds the last reference to the process group. If DDP held it, it
        would wait for the group's thread while holding the GIL, for which that thread may be waiting."""
        del self.model
        self.accelerator.free_memory()

    def is_due(self, every: int | None) -> bool:
        return bool(every and (self.step % every == 0 or self.step == self.total_steps))

    def train_step(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """Runs an optimizer step; returns the terms of the loss and the gradient norm."""
        accelerator = self.accelerator
        buffers = {name: buffer.clone() for name, buffer in self.plain_model.named_buffers()}
        if self.cache is not None:
            with accelerator.no_sync(self.model):
                parts = self.cache.backward(batch, accelerator.backward)
            average_gradients(self.plain_model.parameters())
        else:
            outputs = self.model(**batch)
            accelerator.backward(outputs.loss)
            losses = {name: value for name, value in outputs.items() if name.endswith("_loss")}
            parts = {name.removesuffix("_loss"): value for name, value in losses.items()}
            parts |= {"total": outputs.loss, "negatives": outputs.num_negatives}
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        is_finite = norm.isfinite() & parts["total"].isfinite()
        is_bad = bool(sum_over_processes((~is_finite).float()) > 0)
        if not is_bad or accelerator.scaler is not None:
            self.optimizer.step()  # a gradient scaler skips bad steps itself and adapts its scale
        self.optimizer.zero_grad()
        self.schedule.step()
        if is_bad:
            for name, buffer in self.plain_model.named_buffers():
                buffer.copy_(buffers[name])
        self.count_bad(is_bad)
        if self.ema is not None and not is_bad:
            self.ema.update_parameters(self.plain_model)
        return parts, norm

    def count_bad(self, is_bad: bool) -> None:
        """Counts steps without a finite gradient, which change nothing; too many in a row end the run."""
        self.bad_steps += is_bad
        self.bad_in_a_row = self.bad_in_a_row + 1 if is_bad else 0
        if self.bad_in_a_row >= self.options.max_bad_steps:
            raise ValueError(
                f"{self.bad_in_a_row} steps in a row, up to step {self.step}, had no finite gradient; resume from the "
                "last checkpoint with a lower learning_rate, a smaller max_grad_norm, or bf16 instead of fp16."
            )

    def announce(self) -> None:
        options, processes = self.options, self.accelerator.num_processes
        batch = options.batch_size * processes
        weights = sum(parameter.numel() for parameter in self.plain_model.parameters())
        chunks = f", encoded {options.chunk_size} at a time" if options.chunk_size else ""
        self.accelerator.print(
            f"{weights:,} parameters, NPR variant {self.config.npr_variant}, loss {self.config.contrastive_loss}. "
            f"{self.total_steps} steps of {batch} images ({options.batch_size} x {processes} processes{chunks}); "
            f"each image is contrasted with the texts of all {batch} images."
        )

    def log_line(self, log: RunLog) -> None:
        means = self.meter.means()
        rate = self.schedule.get_last_lr()[0]
        line = means | {"learning_rate": rate, "epoch": self.stream.epoch, "bad_steps": float(self.bad_steps)}
        line["images_per_second"] = self.clock.images_per_second
        parts = {name: value for name, value in means.items() if name != "grad_norm"}
        log.line(self.step, line, {**parts, "lr": rate, "images/s": self.clock.images_per_second})

    @contextmanager
    def model_to_keep(self) -> Iterator[PGSegModel]:
        """A context with the unsharded model: averaged weights, if any, and the main process's buffers."""
        for each in (self.plain_model, self.ema):
            for buffer in each.buffers() if each is not None else ():
                broadcast(buffer)
        if self.is_sharded:
            with torch.random.fork_rng(devices=[]):
                model = PGSegModel(self.config).to(self.accelerator.device)
            model.load_state_dict(full_weights(self.plain_model))
            yield model
        elif self.ema is not None:
            with self.ema.applied_to(self.plain_model):
                yield self.plain_model
        else:
            yield self.plain_model

    def evaluate(self, log: RunLog) -> None:
        """Evaluates the model, draws images, and saves the weights if they are the best so far."""
        with self.model_to_keep() as model:
            figures = self.evaluator(model, self.options.eval_limit)
            if self.options.eval_limit is None and self.step == self.total_steps:
                self.figures = figures
            metric = best_metric(figures)
            if metric and (self.best is None or metric[1] >= self.best[1]):
                self.best, self.best_step = metric, self.step
                self.save_folder(model, "best")
            drawings = {}
            if self.accelerator.is_main_process:
                drawings = self.evaluator.draw(model, self.output_dir / "drawings", self.step)
        log.drawings(self.step, drawings)
        log.line(self.step, {f"eval_{name}": value for name, value in figures.items()})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.accelerator.print(f"\nstep {self.step}: {shown}")

    def save_folder(self, model: PGSegModel, name: str) -> Path:
        """Writes a `from_pretrained` folder."""
        folder = self.output_dir / name
        if self.accelerator.is_main_process:
            save_weights(model, self.processor, folder)
        self.accelerator.wait_for_everyone()
        return folder

    def finish(self) -> dict[str, Any]:
        """Writes the last weights and evaluates them on all images; returns the results."""
        with self.model_to_keep() as model:
            if self.evaluator and not self.figures:
                self.figures = self.evaluator(model)
            folder = self.save_folder(model, ".last")
        clock, options = self.clock, self.options
        results = {
            "steps": self.step,
            "epoch": self.stream.epoch,
            "global_batch_size": options.batch_size * self.accelerator.num_processes,
            "num_processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
            "device": str(self.accelerator.device),
            "train_runtime": self.seconds,
            "train_images_per_second": clock.images_per_second,
            "model_images_per_second": clock.model_images_per_second,
            "loader_images_per_second": self.stream.images_per_second * self.accelerator.num_processes,
            "bad_steps": self.bad_steps,
            "bad_parts": dict(self.meter.bad),
            "records": dict(sum(gather_object([self.stream.counts]), Counter())),
            **{f"eval_{name}": value for name, value in self.figures.items()},
        }
        if self.best is not None:
            results |= {"best_step": self.best_step, f"best_{self.best[0]}": self.best[1]}
        if self.accelerator.is_main_process:
            repo_id = self.repo_id if options.push_to_hub else None
            card = model_card(self.plain_model, self.arguments, results, repo_id)
            publish(folder, self.output_dir, card, results)
            self.tell(results)
            if options.push_to_hub:
                print(f"Uploaded to {upload(self.output_dir, self.repo_id)}.")
        self.accelerator.wait_for_everyone()
        return results

    def tell(self, results: dict[str, Any]) -> None:
        loader, model = results["loader_images_per_second"], results["model_images_per_second"]
        verdict = (
            "the loader keeps up" if loader >= model else "the loader is the bottleneck, increase num_workers"
        )
        if not self.clock.images:
            verdict = "there were no steps left"
        counts = results["records"]
        left_out = {reason: count for reason, count in counts.items() if reason != "read"}
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"
        bad = ", ".join(f"{name} {count} times" for name, count in results["bad_parts"].items())
        print(
            f"{self.step} steps in {self.seconds / 60:.1f} minutes, {results['train_images_per_second']:.1f} images/s; "
            f"loader {loader:.1f} images/s, model {model:.1f} images/s: {verdict}.\n"
            f"Records read: {counts.get('read', 0)}; skipped: {reasons}. Steps skipped: {self.bad_steps}.\n"
            f"Loss terms that were not finite and were ignored: {bad or 'none'}.\n"
            f"The model is in {self.output_dir}."
        )
