"""A training run, from its first step, or its last checkpoint, to its end.

The data flows forward: corpus -> loader -> model -> loss -> optimizer -> checkpoint. What can go wrong on the way does
not end the run: a bad step changes nothing (`guard`), several in a row roll the run back (`rollback`), a micro-batch
that is too large is made smaller, a signal waits for the micro-batch, and a full disk is made up for by the next
checkpoint.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, cast

import torch
from rich.console import Console

from fastgpt.checkpoint import run_folder
from fastgpt.checkpoint.progress import Progress
from fastgpt.config.fields import validate, validate_fields
from fastgpt.config.training import TrainConfig
from fastgpt.errors import RunFailed, shown
from fastgpt.evaluation import loss as evaluation_loss
from fastgpt.loggers.console import Display, print_product
from fastgpt.loggers.jsonl import MetricsFile
from fastgpt.loggers.logger import Logger, Record
from fastgpt.model import memory
from fastgpt.model.gpt import GPT
from fastgpt.system import contention, finite, out_of_memory, threads
from fastgpt.system.device import autocast, peak_flops, peak_memory, synchronize
from fastgpt.system.signals import Signals
from fastgpt.system.streams import Lasting
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.training import report
from fastgpt.training.checkpoints import Checkpoints
from fastgpt.training.guard import Verdict
from fastgpt.training.report import RunSummary
from fastgpt.training.rollback import Rollbacks
from fastgpt.training.setup import Setup, prepare, take_folder
from fastgpt.training.speed import Stopwatch, flops_per_token
from fastgpt.training.start import with_warmup

MOST_UNREAD = 1000  # steps whose verdicts may wait on the device

# How a model continues an opening, piece by piece: (model, tokenizer, opening, seed).
Sample = Callable[[GPT, Tokenizer, str, int], Iterator[str]]


def train(config: TrainConfig, sample: Sample, loggers: Sequence[Logger] = ()) -> RunSummary:
    """Train, or continue, the run that the configuration describes.

    Args:
        sample: how the model continues a text, for the samples that the run shows.
        loggers: take the run's records, beside its metrics.jsonl and the console.

    Raises:
        UsageError: anything in the settings, the data or the folder that makes the run impossible; nothing was lost.
        RunFailed: the run cannot go on; what it had saved is there.
    """
    validate_fields(TrainConfig, vars(config))
    if config.resuming:
        run_folder.mend(Path(config.out_dir))
    validate(config)
    if config.warmup_iters is None:
        config = with_warmup(config)
    run_folder.check_free(Path(config.out_dir))
    try:
        with threads.restored(), Signals(patient=False) as signals:
            setup = prepare(config)
            with run_folder.locked(setup.out_dir):
                metrics = take_folder(setup)
                return Run(setup, metrics, sample, signals, loggers).train()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory.is_out_of_memory(error):
            raise
        # In an update, for one, and then half of the weights may have changed: nothing is saved.
        raise RunFailed(memory.lacking("outside of forward and backward passes", config, error)) from None


class Run:
    """The loop: steps, evaluations, checkpoints and samples, in a folder that belongs to this process."""

    def __init__(
        self,
        setup: Setup,
        metrics: MetricsFile,
        sample: Sample,
        signals: Signals,
        loggers: Sequence[Logger] = (),
    ):
        self.setup, self.config, self.state = setup, setup.config, setup.state
        self.model, self.step = setup.state.model, setup.state.step
        self.metrics, self.sample, self.signals = metrics, sample, signals
        self.console = Console(file=cast(IO[str], Lasting(sys.stderr)))
        uniform = math.log(setup.data.tokenizer.vocab_size) if self.progress.step == 0 else None
        settled = 2 if self.config.compile else 1
        self.display = Display(self.console, self.config.max_iters, uniform, settled)
        self.loggers: list[Logger] = [metrics, self.display, *loggers]
        self.checkpoints = Checkpoints(setup, self._describe, self.display.say, self._warn)
        self.rollbacks = Rollbacks(setup)
        self.watch, self.slowness = Stopwatch(setup.device), contention.Slowness(setup.threads)
        self.rate = 0.0  # the learning rate of the last step
        self.unfit_step: int | None = None  # whose weights are not finite
        self.failures = 0

    @property
    def progress(self) -> Progress:
        return self.state.progress

    def train(self) -> RunSummary:
        """Take the steps that are left, and tell how it went; once there are steps, signals wait for a checkpoint."""
        setup = self.setup
        report.introduce(
            *(self.console, self.config, self.model, setup.data, setup.device, setup.dtype, setup.evaluation),
            self.progress.step,
        )
        with ExitStack() as stack:
            stack.enter_context(contention.watching(setup.threads if setup.device.type == "cpu" else 1))
            for logger in self.loggers[2:]:
                stack.callback(logger.finish)
            stack.enter_context(self.metrics)
            stack.enter_context(self.display)
            stack.enter_context(self.checkpoints)
            self.signals.patient = True
            for logger in self.loggers[1:]:  # metrics.jsonl was started when it was opened
                logger.start(self.progress)
            self._begin_evaluation_set()
            self._take_steps()
            self._save_the_rest()
            self.signals.patient = False
        return self._finish(None if self.state.is_finished() else self.signals.caught)

    def _take_steps(self) -> None:
        """Steps, evaluations and checkpoints, until the run is finished, its time is over or a signal came."""
        config, over = self.config, False
        deadline = time.monotonic() + 60 * (config.max_minutes or math.inf)
        if self.state.owes_evaluation():
            self._evaluate_and_save()
        while not (self.state.is_finished() or over or self.signals.caught):
            with self.watch:
                if self._train_step():
                    continue
                step, over = self.progress.step, time.monotonic() > deadline
                due = step % config.eval_interval == 0 or step == config.max_iters or over
                logged = due or step % config.log_interval == 0
                asked = self.signals.save_asked
                read = logged or asked or len(self.step.guard.unread) >= MOST_UNREAD
                verdicts = self.step.guard.read() if read else []  # waits for the device
            self._advise()
            if not self._follow(verdicts):
                continue
            if logged:
                self._log(self._record(verdicts[-1]))
            if due:
                self._evaluate_and_save()
            elif asked:
                self._save()
            self.checkpoints.poll()
            if config.sample_interval and step % config.sample_interval == 0 and not self.state.is_finished():
                self.display.product(f"--- sample at step {step}\n{self._sample(self._is_asked_to_stop)}\n---")

    def _train_step(self) -> bool:
        """One optimizer step; where its micro-batches do not fit into the memory, they are made smaller for good.

        Returns:
            True where a signal cut it short; it is then as if it had not begun.
        """
        place = self.progress.step + self.progress.skipped_batches  # in the order of the data
        while True:
            batches = self.setup.micro_batches.of_step(place)
            self.display.begin("micro", self.progress.step, len(batches))
            loss = None
            with out_of_memory.caught() as lack:
                loss = self.step.accumulate(self.progress.step, batches, self._is_step_to_stop)
            if lack.reason is None:
                break
            self._divide_micro_batches(lack.reason)
        if loss is None:
            self.step.abandon()
            self.watch.drop()
            return True
        _, self.rate = self.step.update(self.progress.step, loss)
        self.progress.step += 1
        self.progress.tokens += self.config.tokens_per_step
        return False

    def _is_step_to_stop(self, done: int) -> bool:
        """Show how many micro-batches of a step are done, and do what signals want before the others."""
        if self.watch.first:
            synchronize(self.setup.device)  # so that the time of the first ones tells that of a step
        self.display.reach(done)
        if done == self.display.count:
            return False
        with self.watch.paused():
            return self._is_asked_to_stop()

    def _divide_micro_batches(self, reason: str) -> None:
        """After a step ran out of memory: make the micro-batches smaller, or save what is done and give up."""
        self.step.abandon()
        if self.setup.device.type == "cuda":
            torch.cuda.empty_cache()
        number, micro_batches = self.progress.step + 1, self.setup.micro_batches
        if not micro_batches.divide():
            self._save_the_rest()
            where = f"in step {number} with one sequence at a time"
            raise RunFailed(memory.lacking(where, self.config, reason))
        self.display.say(
            f"out of memory in step {number}: going on with `batch_size` {micro_batches.batch_size} "
            f"`gradient_accumulation_steps` {micro_batches.count}, the same sequences in each step"
        )

    def _follow(self, verdicts: Sequence[Verdict]) -> bool:
        """Tell of the last steps that were skipped; False where they were too many, and the run has gone back."""
        for step, verdict in enumerate(verdicts, self.progress.step - len(verdicts) + 1):
            if verdict.skipped is None or verdict.scaling:
                continue
            batch = step - 1 + self.progress.skipped_batches
            self.display.say(f"step {step}: skipped, because {verdict.skipped} (batch {batch} of the data)")
            tokens = self.progress.tokens - (self.progress.step - step) * self.config.tokens_per_step
            self._log({"step": step, "tokens": tokens, "skipped": verdict.skipped, "batch": batch})
            if verdict.in_row >= self.config.rollback_after:
                self._roll_back(step, verdict.skipped)
                return False
        return True

    def _roll_back(self, step: int, why: str) -> None:
        """Go back to the last good checkpoint. Raises `RunFailed` where that did not help before."""
        self.checkpoints.wait()
        made = self.rollbacks.go_back(step, why)
        self.checkpoints.restart()
        self.unfit_step = None  # when the run is there again, it has other weights
        self.display.say(made.message)
        for logger in self.loggers:
            try:
                logger.start(self.progress)
            except OSError as error:
                self._warn(f"{logger} keeps the steps that are done again: {error}")
        self._log(made.record)
        self._begin_evaluation_set()
        if made.folder:
            self.checkpoints.save()  # so that a resume need not find out again
            self.signals.save_asked = False

    def _begin_evaluation_set(self) -> None:
        """Say and record that val losses are measured on another evaluation set from here on, if they are."""
        progress, now = self.progress, self.setup.evaluation.identity
        if progress.val_set == now:
            return
        self.display.say(
            f"step {progress.step}: evaluations read {now} from here on, and before {shown(progress.val_set)}; "
            "which checkpoint is best begins anew"
        )
        progress.val_set = now
        self._log({"step": progress.step, "tokens": progress.tokens, "val_set": now})

    def _evaluate_and_save(self) -> None:
        """Measure the val loss, unless a signal cuts that short, and save."""
        loss = self._evaluate()
        self.checkpoints.wait()  # one that failed does not hold the best model
        progress = self.progress
        if loss is not None:
            if bad := finite.first_not_finite(self.model.weights()):
                self.display.say(f"warning: step {progress.step}: not saved, as its weights are not finite: {bad}")
                self.unfit_step = progress.step
            good = math.isfinite(loss) and not bad
            progress.val_loss, progress.evaluated_step = loss if good else None, progress.step
            if good and (progress.best_val_loss is None or loss < progress.best_val_loss):
                progress.best_val_loss, progress.best_step = loss, progress.step
            self._log({"step": progress.step, "tokens": progress.tokens, "val_loss": loss})
        self._save()

    def _evaluate(self) -> float | None:
        """The val loss, or None where a signal cut it short; what is done is saved where the memory is too small."""
        setup, done = self.setup, itertools.count()
        self.display.begin("evaluation", self.progress.step, setup.evaluation.count)

        def stopping() -> bool:
            self.display.reach(next(done))
            return self._is_asked_to_stop()

        with out_of_memory.caught() as lack:
            batches = setup.evaluation.batches(setup.val_loader)
            return evaluation_loss.mean_loss(self.model, batches, autocast(setup.device, setup.dtype), stopping)
        self._save_the_rest()
        where = f"in the evaluation after step {self.progress.step} with one sequence at a time"
        raise RunFailed(memory.lacking(where, self.config, lack.reason or ""))

    def _sample(self, stopping: Callable[[], bool] = lambda: False) -> str:
        """Some words of the val split and how the model continues them, cut short where `stopping` says so."""
        opening = self.setup.data.opening()
        self.model.eval()
        try:
            with out_of_memory.caught():
                pieces = self.sample(self.model, self.setup.data.tokenizer, opening, self.config.seed)
                return opening + "".join(itertools.takewhile(lambda _: not stopping(), pieces))
            return "(out of memory)"
        except RunFailed as error:
            return f"({error})"
        finally:
            self.model.train()

    def _is_asked_to_stop(self) -> bool:
        """Do what signals want, between two batches: write a checkpoint of the last step, or stop.

        Returns:
            True where what is under way is to be dropped, also because the run went back to an earlier step.
        """
        if self.signals.save_asked and self.progress.step != self.checkpoints.begun:
            if not self._follow(self.step.guard.read()):
                return True
            self._save()
        return self.signals.caught is not None

    def _save(self) -> None:
        """Write a checkpoint, or begin to, unless the weights are not finite."""
        self.checkpoints.wait()
        if self.progress.step != self.unfit_step:
            self.progress.rollbacks = 0
            self.checkpoints.save()
        self.signals.save_asked = False

    def _save_the_rest(self) -> None:
        """Write a checkpoint of the steps since the last one, if there are any, and wait for it."""
        self.checkpoints.wait()
        if self.progress.step != self.checkpoints.begun:
            verdicts = self.step.guard.read()
            if self._follow(verdicts):
                if verdicts:
                    self._log(self._record(verdicts[-1]))
                self._save()
        self.checkpoints.wait()

    def _describe(self) -> None:
        """Write what the run is made of into its folder, and what it logged to the disk."""
        self.metrics.sync()
        self.setup.save()

    def _log(self, record: Record) -> None:
        """Give the loggers a record; a disk that does not take it does not stop the run."""
        for logger in self.loggers:
            try:
                logger.log(record)
            except OSError as error:
                self._warn(f"{logger} misses a line of step {record['step']}: {error}")

    def _record(self, verdict: Verdict) -> Record:
        """A record of the training loss, and of the speed since the last one."""
        seconds = self.watch.lap()
        speed = self.config.tokens_per_step / seconds if seconds else None
        peak = peak_flops(self.setup.device, self.setup.dtype)
        flops = flops_per_token(self.config, self.model.num_parameters())
        return {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": verdict.loss,
            "lr": self.rate,
            "grad_norm": verdict.norm,
            "ms": seconds * 1e3 if seconds else None,
            "tokens_per_second": speed,
            "mfu": flops * speed / peak if peak and speed else None,
            "memory": peak_memory(self.setup.device),
        }

    def _warn(self, text: str) -> None:
        """Tell of a failure that does not stop the run, and count it."""
        self.failures += 1
        self.display.say(f"warning: {text}")

    def _advise(self) -> None:
        """Tell once where steps are slow because of other programs; a GPU's are not timed one by one."""
        seconds = self.watch.last if self.setup.device.type == "cpu" else None
        if seconds and (advice := self.slowness.advice(seconds)):
            self.display.say(advice)

    def _finish(self, stopped_by: int | None) -> RunSummary:
        from fastgpt.loggers.curves import plot_loss  # matplotlib, which the first step need not wait for

        progress, watch, data = self.progress, self.watch, self.setup.data
        try:
            picture = str(plot_loss(self.setup.out_dir))
        except OSError as error:
            self.failures += 1
            picture = f"not drawn: {error}"
        summary = RunSummary(
            steps=progress.step,
            finished=self.state.is_finished(),
            best_step=progress.best_step,
            best_val_loss=progress.best_val_loss,
            val_loss=progress.val_loss,
            bits_per_byte=report.bits_per_byte(progress.best_val_loss, data),
            train_seconds=watch.seconds,
            tokens_per_second=watch.steps * self.config.tokens_per_step / watch.seconds if watch.steps else None,
            peak_memory=peak_memory(self.setup.device),
            stopped_by=stopped_by,
            saved_step=self.checkpoints.finished,
            failures=self.failures,
            out_dir=self.config.out_dir,
        )
        if stopped_by is None:
            print_product(f"--- sample after step {progress.step}\n{self._sample()}\n---")
        print_product(report.conclude(summary, self.config, picture, data))
        return summary
