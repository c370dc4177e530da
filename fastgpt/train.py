"""Train a GPT.

    python -m fastgpt.train                                       # fits the machine, about a minute on a CPU
    python -m fastgpt.train --preset baby --dataset shakespeare
    python -m fastgpt.train --init_from resume --max_iters 4000

The data flows forward: corpus -> loader -> model -> loss -> optimizer -> checkpoint.
"""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import torch
from rich.console import Console

from fastgpt import checkpoint, cli, corpus, dispatch, evaluate, report, run_folder
from fastgpt.config import PRESETS, TrainConfig, validate
from fastgpt.device import autocast, peak_flops, peak_memory, resolve_device, resolve_dtype
from fastgpt.errors import UsageError
from fastgpt.generate import TextGenerator
from fastgpt.loader import Loader
from fastgpt.metrics import Display, Lasting, MetricsFile, Stopwatch, flops_per_token, print_product
from fastgpt.model import GPT
from fastgpt.report import RunSummary
from fastgpt.signals import Signals
from fastgpt.step import TrainStep
from fastgpt.workload import Workload

SAMPLE_TOKENS = 200


def train(config: TrainConfig) -> RunSummary:
    """Train, or continue, the run that the configuration describes.

    Raises:
        UsageError: anything in the flags, the data or the folder that makes the run impossible; nothing was lost.
    """
    validate(config)
    run = Run(config)
    with run_folder.locked(run.out_dir):
        run.open()
        return run.train()


@dataclass
class Progress:
    """How far a run is: what `state.json` says beside the weights. Losses are None before the first evaluation."""

    step: int = 0
    tokens: int = 0
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int = 0


class Run:
    """A run: made without writing into its folder, then opened, then trained."""

    def __init__(self, config: TrainConfig):
        resuming = config.init_from == "resume"
        self.asked, self.out_dir = config, Path(config.out_dir)
        self.device = resolve_device(config.device)
        if resuming:
            checkpoint.find(self.out_dir, "latest")
        else:
            run_folder.claim(self.out_dir, config.overwrite)
        about = run_folder.load(self.out_dir)[1] if resuming else {}
        same = about.get("device") == self.device.type  # as the run began on: then its choices are kept
        recorded = about.get("dtype", "auto") if same else "auto"
        columns = about.get("columns") if same else None
        resolve = functools.partial(dispatch.resolve, config.kernels, self.device, recorded=columns)
        dtype = recorded if config.dtype == "auto" else config.dtype
        self.dtype = resolve_dtype(dtype, self.device, interpreted=resolve().interpreted)
        self.data = corpus.prepare(
            config.dataset,
            tokenizer=config.tokenizer,
            vocab_size=config.vocab_size,
            corpus_file=config.corpus_file,
            gpt2_vocab=config.gpt2_vocab,
            data_dir=config.data_dir,
        )
        if resuming:
            run_folder.check_resume(self.out_dir, config, self.data)
        self.config = dataclasses.replace(config, vocab_size=self.data.tokenizer.vocab_size)
        self.train_loader, self.val_loader = self._loaders()
        ops = resolve(workload=Workload.of_training(self.config, self.dtype))
        torch.manual_seed(config.seed)
        with self.device:
            self.model = GPT(self.config, ops)
        self.step = TrainStep(self.model, self.config, self.device, self.dtype)
        self.progress = Progress()
        self.watch = Stopwatch(self.device)
        self.console = Console(file=cast(IO[str], Lasting(sys.stderr)))

    def open(self) -> None:
        """Take the folder, which is now this process's: restore what is resumed, or make room for what is new."""
        if self.config.init_from == "resume":
            self._restore()
            return
        run_folder.claim(self.out_dir, self.config.overwrite)
        if self.config.overwrite:
            run_folder.delete(self.out_dir)

    def train(self) -> RunSummary:
        config, progress = self.config, self.progress
        report.introduce(self.console, config, self.model, self.data, self.device, self.dtype, progress.step)
        deadline = time.monotonic() + 60 * (config.max_minutes or math.inf)
        metrics = MetricsFile(self.out_dir / "metrics.jsonl", progress.step)
        with Signals() as signals, metrics, Display(self.console, config.max_iters) as display:
            while True:
                with self.watch:
                    loss, norm, rate = self._train_step()
                    finished, signal = progress.step == config.max_iters, signals.caught
                    last = finished or signal is not None or time.monotonic() > deadline
                    due = last or progress.step % config.eval_interval == 0
                    logged = None
                    if due or progress.step % config.log_interval == 0:
                        logged = loss.item(), norm.item(), rate  # waits for the device
                if logged:
                    record = self._record(*logged)
                    metrics.write(record)
                    display.show(record, progress.val_loss)
                if due:
                    # A finished run is evaluated whatever happens; a stopped one saves at once.
                    val_loss = self._evaluate(metrics, signals, finished)
                    folder = self._save()
                    display.say(report.saved(progress.step, folder, progress.best_val_loss, val_loss))
                if last:
                    break
                if config.sample_interval and progress.step % config.sample_interval == 0:
                    display.product(f"--- sample at step {progress.step}\n{self._sample()}\n---")
        return self._finish(None if finished else signal)

    def _train_step(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """One optimizer step: (mean loss of its micro-batches, gradient norm, learning rate)."""
        config, progress = self.config, self.progress
        micros = config.gradient_accumulation_steps
        batches = (self.train_loader.batch(progress.step, m, micros, config.batch_size) for m in range(micros))
        result = self.step(progress.step, batches)
        progress.step += 1
        progress.tokens += config.tokens_per_step
        return result

    def _record(self, loss: float, norm: float, rate: float) -> dict[str, float | int | None]:
        """A line of `metrics.jsonl` about the steps since the last one."""
        seconds = self.watch.lap()
        speed = self.config.tokens_per_step / seconds if seconds else None
        peak = peak_flops(self.device, self.dtype)
        flops = flops_per_token(self.config, self.model.num_parameters())
        return {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "ms": seconds * 1e3 if seconds else None,
            "tokens_per_second": speed,
            "mfu": flops * speed / peak if peak and speed else None,
            "memory": peak_memory(self.device),
        }

    def _evaluate(self, metrics: MetricsFile, signals: Signals, finished: bool) -> float | None:
        """The val loss, or None where a signal came first."""
        progress = self.progress
        batches = evaluate.batches(self.val_loader, self.config)
        loss = evaluate.mean_loss(
            self.model,
            batches,
            autocast(self.device, self.dtype),
            stopping=lambda: signals.caught is not None and not finished,
        )
        if loss is None:
            return None
        progress.val_loss = loss
        if progress.best_val_loss is None or loss < progress.best_val_loss:
            progress.best_val_loss, progress.best_step = loss, progress.step
        metrics.write({"step": progress.step, "tokens": progress.tokens, "val_loss": loss})
        return loss

    def _save(self) -> Path:
        """Write what the run is made from, and a checkpoint."""
        run_folder.save(
            self.out_dir,
            self.asked,
            self.data.tokenizer,
            {
                "columns": self.model.ops.columns,
                "device": self.device.type,
                "dtype": str(self.dtype).removeprefix("torch."),
                "corpus": {"name": self.data.name, "source_sha256": self.data.source_sha256},
                "torch": torch.__version__,
            },
        )
        state = {
            "progress": dataclasses.asdict(self.progress),
            "scaler": self.step.scaler.state_dict(),
            "vocabulary": self.data.tokenizer.sha256(),
        }
        folder = checkpoint.save(self.out_dir, self.progress.step, self.model, self.step.optimizer, state)
        if self.progress.best_step == self.progress.step:
            checkpoint.point(self.out_dir, "best", folder)
        checkpoint.prune(self.out_dir)
        return folder

    def _restore(self) -> None:
        folder = checkpoint.find(self.out_dir, "latest")
        checkpoint.verify(folder)
        state = checkpoint.load_state(folder)
        checkpoint.check_vocabulary(folder, self.data.tokenizer)
        self.model.load_weights(checkpoint.load_weights(folder))
        checkpoint.load_optimizer(folder, self.model, self.step.optimizer)
        if state["scaler"]:  # empty where the run was not in float16 until now
            self.step.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        step = self.progress.step
        if step >= self.config.max_iters:
            raise UsageError(
                f"--max_iters {self.config.max_iters}: {self.out_dir} is already at step {step}; "
                f"continue with a larger one, such as --max_iters {2 * step}"
            )
        if self.progress.best_step == step:
            checkpoint.point(self.out_dir, "best", folder)  # a crash may have come between `latest` and `best`

    def _loaders(self) -> tuple[Loader, Loader]:
        """Of the train and the val split."""
        needed, shortest = self.config.block_size + 1, min(self.data.train_tokens, self.data.val_tokens)
        if shortest < needed:
            fix = f"try --block_size {shortest - 1}, or " if shortest > 1 else ""
            raise UsageError(
                f"--block_size {self.config.block_size} needs {needed:,} tokens in each split, and {self.data.name} "
                f"has {self.data.train_tokens:,} to train on and {self.data.val_tokens:,} to validate on; "
                f"{fix}use a longer text"
            )
        splits = {"train": self.data.train(), "val": self.data.val()}
        train_loader, val_loader = (
            Loader(
                tokens,
                self.config.block_size,
                self.data.tokenizer.vocab_size,
                seed=self.config.seed,
                device=self.device,
                name=f"{self.data.name}'s {split} split",
            )
            for split, tokens in splits.items()
        )
        return train_loader, val_loader

    def _sample(self) -> str:
        self.model.eval()
        generator = TextGenerator(self.model, self.data.tokenizer)
        text = generator.generate(max_new_tokens=SAMPLE_TOKENS, seed=self.config.seed)
        self.model.train()
        return text

    def _finish(self, stopped_by: int | None) -> RunSummary:
        from fastgpt.plots import plot_loss  # matplotlib, which the first step need not wait for

        progress, watch = self.progress, self.watch
        picture = plot_loss(self.out_dir)
        summary = RunSummary(
            steps=progress.step,
            finished=progress.step == self.config.max_iters,
            best_step=progress.best_step,
            best_val_loss=progress.best_val_loss,
            val_loss=progress.val_loss,
            bits_per_byte=report.bits_per_byte(progress.best_val_loss, self.data),
            train_seconds=watch.seconds,
            tokens_per_second=watch.steps * self.config.tokens_per_step / watch.seconds if watch.steps else None,
            peak_memory=peak_memory(self.device),
            stopped_by=stopped_by,
        )
        if stopped_by is None:
            print_product(f"--- sample after step {progress.step}\n{self._sample()}\n---")
        print_product(report.conclude(summary, self.config, picture, self.data))
        return summary


def starting_point(preset: str | None, given: Mapping[str, object]) -> tuple[TrainConfig, str]:
    """The configuration that the given flags change, and why it is this one.

    A resume continues with the run's own settings; otherwise it is the named preset, or the one that fits the device.
    """
    if given.get("init_from") == "resume":
        if preset is not None:
            raise UsageError(f"--preset {preset}: --init_from resume keeps the run's own settings; leave it out")
        out_dir = str(given.get("out_dir", "out"))
        checkpoint.find(Path(out_dir), "latest")
        saved, _ = run_folder.load(Path(out_dir))
        why = f"resume: the settings of the run in {out_dir}, changed by what was given"
        return dataclasses.replace(saved, out_dir=out_dir), why
    kind = resolve_device(str(given.get("device", "auto"))).type
    fitting = "baby" if kind == "cuda" else "cpu"
    why = f"preset {preset}" if preset else f"preset {fitting}: it fits a {kind} device (others: --preset NAME)"
    config = PRESETS[preset or fitting]
    # Another tokenizer than the preset's brings its own vocabulary.
    return (dataclasses.replace(config, vocab_size=None) if "tokenizer" in given else config), why


def main(argv: Sequence[str] | None = None) -> int:
    preset, given = cli.read(
        TrainConfig, argv, prog="python -m fastgpt.train", description="Train a GPT on text.", presets=PRESETS
    )
    start, why = starting_point(preset, given)
    config = cli.change(start, given)
    print(why, file=sys.stderr)
    summary = train(config)
    return 0 if summary.stopped_by is None else 128 + summary.stopped_by


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
