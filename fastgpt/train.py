"""Train a GPT.

    python -m fastgpt.train                                       # fits the machine, about two minutes on a CPU
    python -m fastgpt.train --preset baby --dataset shakespeare
    python -m fastgpt.train --init_from resume --max_iters 4000

The data flows forward: corpus -> loader -> model -> loss -> optimizer -> checkpoint.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastgpt import checkpoint, cli, corpus, dispatch, report, tokenizer
from fastgpt.config import PRESETS, TrainConfig
from fastgpt.corpus import Corpus
from fastgpt.device import (
    autocast,
    peak_flops,
    peak_memory,
    resolve_device,
    resolve_dtype,
    synchronize,
)
from fastgpt.errors import UsageError
from fastgpt.generate import TextGenerator
from fastgpt.loader import IGNORED, Loader
from fastgpt.metrics import Display, MetricsFile, Stopwatch, flops_per_token
from fastgpt.model import GPT
from fastgpt.optim import learning_rate, make_optimizer, set_learning_rate
from fastgpt.report import RunSummary
from fastgpt.signals import Signals

SAMPLE_TOKENS = 200
EVAL_TOKENS = 8192  # in a batch of an evaluation, at least
FIXED_SHAPE = ("block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "bias", "position", "tokenizer")


def train(config: TrainConfig) -> RunSummary:
    """Train, or continue, the run that the configuration describes.

    Raises:
        UsageError: anything in the flags, the data or the folder that makes the run impossible; nothing was lost.
    """
    return Run(config).train()


class Run:
    """A run under way: everything that `out_dir` holds, and what is on the device."""

    def __init__(self, config: TrainConfig):
        resuming = config.init_from == "resume"
        self.console = Console(stderr=True)
        self.out_dir = Path(config.out_dir)
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        saved, about = checkpoint.load_run(self.out_dir) if resuming else (None, {})
        if saved is None:
            _claim(self.out_dir, config.overwrite)
        recorded = about.get("columns") if about.get("device") == self.device.type else None
        ops = dispatch.resolve(config.kernels, self.device, recorded=recorded)
        data = corpus.prepare(
            config.dataset,
            tokenizer=config.tokenizer,
            vocab_size=config.vocab_size,
            corpus_file=config.corpus_file,
            gpt2_vocab=config.gpt2_vocab,
            data_dir=config.data_dir,
        )
        if saved is not None:
            _check_resume(self.out_dir, config, saved, about, data)
        self.config = dataclasses.replace(config, vocab_size=data.tokenizer.vocab_size)
        self.data = data
        self.train_loader = self._loader(data.train(), "train")
        self.val_loader = self._loader(data.val(), "val")
        torch.manual_seed(config.seed)
        with self.device:
            self.model = GPT(self.config, ops)
        self.optimizer = make_optimizer(self.model, self.config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.step, self.best_val_loss, self.best_step, self.val_loss = 0, math.inf, 0, math.inf
        if resuming:
            self._restore()
        self.compiled = torch.compile(self.model) if config.compile else self.model
        self.watch = Stopwatch()
        self.peak = peak_flops(self.device, self.dtype)
        self.flops = flops_per_token(self.config, self.model.num_parameters())
        if saved is None and config.overwrite and checkpoint.holds_run(self.out_dir):
            checkpoint.delete_run(self.out_dir)  # only now that nothing refuses the new run any more
        self._write_folder(config)

    def train(self) -> RunSummary:
        config, began = self.config, time.monotonic()
        report.introduce(self.console, config, self.model, self.data, self.device, self.dtype, self.step)
        metrics = MetricsFile(self.out_dir / "metrics.jsonl", self.step)
        limit = math.inf if config.max_minutes is None else config.max_minutes * 60
        with Signals() as signals, Display(self.console, self.step, config.max_iters) as display:
            warm = False
            while self.step < config.max_iters:
                self.watch.start()
                if warm:
                    loss, norm, rate = self._train_step()
                else:
                    # The first step compiles and allocates; it is done, but not timed.
                    loss, norm, rate = self._first_step()
                    self.watch, warm = Stopwatch(), True
                last = self.step == config.max_iters or time.monotonic() - began > limit or bool(signals.caught)
                if self.step % config.log_interval == 0 or last:
                    self._log(metrics, display, loss.item(), norm.item(), rate)
                else:
                    self.watch.stop(1)
                due = self.step % config.eval_interval == 0 or last
                if due:
                    evaluated = signals.caught is None
                    if evaluated:
                        self._evaluate(metrics, display)
                    self._save(display, evaluated)
                if config.sample_interval and self.step % config.sample_interval == 0 and not last:
                    display.product(f"--- sample at step {self.step}\n{self._sample()}\n---")
                if last:
                    break
        metrics.close()
        return self._finish(signals.caught)

    def _first_step(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        try:
            result = self._train_step()
        except RuntimeError as error:
            if not isinstance(error, _compiler_errors(self.config.compile)):
                raise
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UsageError(f"--compile failed: {reason}; install a C++ compiler, or pass --no-compile") from error
        synchronize(self.device)
        return result

    def _train_step(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """One optimizer step: (mean loss of its micro-batches, gradient norm, learning rate)."""
        config = self.config
        # Dropout is a pure function of (seed, step), so a resumed run repeats it.
        torch.manual_seed((config.seed + (self.step + 1) * 0x9E3779B97F4A7C15) % 2**64)
        rate = learning_rate(self.step, config)
        set_learning_rate(self.optimizer, rate)
        micros = config.gradient_accumulation_steps
        total = torch.zeros((), device=self.device)
        with autocast(self.device, self.dtype):  # around all micro-batches: the weights are cast once
            for micro in range(micros):
                x, y = self.train_loader.batch(self.step, micro, micros, config.batch_size)
                loss = self.compiled(x, y) / micros
                self.scaler.scale(loss).backward()
                total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total, norm, rate

    def _log(self, metrics: MetricsFile, display: Display, loss: float, norm: float, rate: float) -> None:
        self.watch.stop(1)
        seconds = self.watch.lap()
        speed = self.config.tokens_per_step / seconds if seconds else None
        record = {
            "step": self.step,
            "tokens": self.step * self.config.tokens_per_step,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "ms": seconds * 1e3 if seconds else None,
            "tokens_per_second": speed,
            "mfu": self.flops * speed / self.peak if self.peak and speed else None,
            "memory": peak_memory(self.device),
        }
        metrics.write(record)
        display.show(record)

    @torch.no_grad()
    def _evaluate(self, metrics: MetricsFile, display: Display) -> None:
        """Mean loss over the val split, or over fixed batches of it."""
        config = self.config
        self.model.eval()
        rows = max(config.batch_size, EVAL_TOKENS // config.block_size)
        if config.eval_iters:
            batches = self.val_loader.fixed(config.eval_iters, config.batch_size)
        else:
            batches = self.val_loader.whole(rows)
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        with autocast(self.device, self.dtype):
            for x, y in batches:
                counted = int((y != IGNORED).sum())
                total += self.model(x, y).double() * counted
                count += counted
        self.model.train()
        self.val_loss = display.val_loss = total.item() / count
        if self.val_loss < self.best_val_loss:
            self.best_val_loss, self.best_step = self.val_loss, self.step
        metrics.write({"step": self.step, "tokens": self.step * config.tokens_per_step, "val_loss": self.val_loss})

    def _save(self, display: Display, evaluated: bool) -> None:
        losses = {"val_loss": self.val_loss, "best_val_loss": self.best_val_loss}
        state = {
            **{name: loss for name, loss in losses.items() if math.isfinite(loss)},  # JSON has no infinity
            "best_step": self.best_step,
            "scaler": self.scaler.state_dict(),
        }
        folder = checkpoint.save(self.out_dir, self.step, self.model, self.optimizer, state)
        if self.best_step == self.step:
            checkpoint.point(self.out_dir, "best", folder)
        checkpoint.prune(self.out_dir)
        best = "the best so far" if self.best_step == self.step else f"the best is {self.best_val_loss:.4f}"
        how = f"val loss {self.val_loss:.4f}, {best}" if evaluated else "stopped before an evaluation"
        display.say(f"step {self.step}: {how}; saved {folder}")

    def _restore(self) -> None:
        folder = checkpoint.find(self.out_dir, "latest")
        checkpoint.verify(folder)
        checkpoint.load_model(folder, self.model)
        checkpoint.load_optimizer(folder, self.model, self.optimizer)
        state = checkpoint.load_state(folder)
        self.step, self.val_loss = state["step"], state.get("val_loss", math.inf)
        self.best_val_loss, self.best_step = state.get("best_val_loss", math.inf), state["best_step"]
        self.scaler.load_state_dict(state["scaler"])
        if self.step >= self.config.max_iters:
            raise UsageError(
                f"--max_iters {self.config.max_iters}: {self.out_dir} is already at step {self.step}; "
                f"continue with a larger one, such as --max_iters {2 * self.step}"
            )

    def _write_folder(self, config: TrainConfig) -> None:
        """Save the configuration as it was asked for, and what was resolved beside it."""
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            checkpoint.save_run(
                self.out_dir,
                config,
                columns=self.model.ops.columns,
                device=self.device.type,
                corpus={"name": self.data.name, "source_sha256": self.data.source_sha256},
                torch=torch.__version__,
            )
            self.data.tokenizer.save(self.out_dir / "tokenizer.json")
        except OSError as error:
            raise UsageError(f"--out_dir {self.out_dir} cannot be written: {error.strerror}") from None

    def _loader(self, tokens: Any, split: str) -> Loader:
        return Loader(
            tokens,
            self.config.block_size,
            self.data.tokenizer.vocab_size,
            seed=self.config.seed,
            device=self.device,
            name=f"{self.data.name}'s {split} split",
        )

    def _sample(self) -> str:
        self.model.eval()
        text = TextGenerator(self.model, self.data.tokenizer).generate(
            max_new_tokens=SAMPLE_TOKENS, seed=self.config.seed
        )
        self.model.train()
        return text

    def _finish(self, stopped_by: int | None) -> RunSummary:
        from fastgpt.plots import plot_loss  # matplotlib, which the first step need not wait for

        picture = plot_loss(self.out_dir)
        speed = self.watch.steps * self.config.tokens_per_step / self.watch.total if self.watch.steps else 0.0
        summary = RunSummary(
            steps=self.step,
            best_step=self.best_step,
            best_val_loss=self.best_val_loss,
            val_loss=self.val_loss,
            bits_per_byte=report.bits_per_byte(self.best_val_loss, self.data),
            train_seconds=self.watch.total,
            tokens_per_second=speed,
            peak_memory=peak_memory(self.device),
            stopped_by=stopped_by,
        )
        if stopped_by is None:
            print(f"--- sample after step {self.step}\n{self._sample()}\n---")
        report.conclude(summary, self.out_dir, picture, self.data)
        return summary


def _compiler_errors(compiling: bool) -> tuple[type[Exception], ...]:
    """What torch.compile raises, whose module is slow to import and so is left alone without it."""
    if not compiling:
        return ()
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


def _claim(out_dir: Path, overwrite: bool) -> None:
    """Make sure that out_dir holds no run that would be lost or mixed."""
    if out_dir.exists() and not out_dir.is_dir():
        raise UsageError(f"--out_dir {out_dir} is a file; name a folder")
    if checkpoint.holds_run(out_dir) and not overwrite:
        raise UsageError(
            f"--out_dir {out_dir} already holds a run; continue it with --init_from resume, "
            "keep it and name another --out_dir, or delete it with --overwrite"
        )


def _check_resume(
    out_dir: Path, config: TrainConfig, saved: TrainConfig, about: Mapping[str, Any], data: Corpus
) -> None:
    """A resumed run keeps its shape, its vocabulary and its text."""
    for name in FIXED_SHAPE:
        asked, had = getattr(config, name), getattr(saved, name)
        if asked != had:
            raise UsageError(f"--{name} {asked}: the run in {out_dir} has {had}, and a resume keeps it; leave it out")
    if data.tokenizer != tokenizer.load(out_dir / "tokenizer.json"):
        raise UsageError(
            f"--dataset {config.dataset}: its vocabulary is not that of the run in {out_dir}; "
            "resume with the run's own data, or start another --out_dir"
        )
    sha256 = about.get("corpus", {}).get("source_sha256")
    if data.source_sha256 != sha256:
        raise UsageError(
            f"--dataset {config.dataset}: the text changed since the run in {out_dir} began (sha256 "
            f"{data.source_sha256[:8]}, then {str(sha256)[:8]}); restore it, or start another --out_dir"
        )


def main(argv: Sequence[str] | None = None) -> int:
    why = ""

    def start(preset: str | None, given: Mapping[str, Any]) -> TrainConfig:
        nonlocal why
        if given.get("init_from") == "resume":
            if preset is not None:
                raise UsageError(f"--preset {preset}: --init_from resume keeps the run's own settings; leave it out")
            out_dir = given.get("out_dir", "out")
            saved, _ = checkpoint.load_run(Path(out_dir))
            why = f"resume: the settings of the run in {out_dir}, changed by what was given"
            return dataclasses.replace(saved, out_dir=out_dir)
        kind = resolve_device(given.get("device", "auto")).type
        fitting = "baby" if kind == "cuda" else "cpu"
        why = f"preset {preset or fitting}" + ("" if preset else f": it fits a {kind} device (others: --preset NAME)")
        config = PRESETS[preset or fitting]
        return dataclasses.replace(config, vocab_size=None) if "tokenizer" in given else config

    config = cli.parse(
        TrainConfig,
        argv,
        prog="python -m fastgpt.train",
        description="Train a GPT on text.",
        presets=PRESETS,
        start=start,
    )
    print(why, file=sys.stderr)
    summary = train(config)
    return 0 if summary.stopped_by is None else 128 + summary.stopped_by


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
