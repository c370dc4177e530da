"""A training run, from its first step, or its last checkpoint, to its end.

The data flows forward: corpus -> loader -> model -> loss -> optimizer -> checkpoint. Common failures do not end the
run: a bad step changes nothing (`guard`), several in a row lead back to the last good checkpoint (`rollback`), a
micro-batch that does not fit into the memory is divided, a signal is answered after the micro-batch, and what a full
disk refused is written with the next checkpoint.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from fastgpt.checkpoint import run_folder, store
from fastgpt.checkpoint.source import Source
from fastgpt.config.fields import validate, validate_fields
from fastgpt.config.training import TrainConfig
from fastgpt.errors import RunFailed, UsageError
from fastgpt.loggers import console
from fastgpt.loggers.base import Logger
from fastgpt.loggers.console import Display, print_product
from fastgpt.loggers.registry import LOGGERS
from fastgpt.model import memory
from fastgpt.system import contention, out_of_memory, threads
from fastgpt.system.device import peak_flops, peak_memory, synchronize
from fastgpt.system.signals import Signals
from fastgpt.training import report
from fastgpt.training.checkpoints import Checkpoints
from fastgpt.training.guard import Verdict
from fastgpt.training.log import RunLog
from fastgpt.training.report import RunSummary
from fastgpt.training.rollback import Rollback
from fastgpt.training.samples import Sample, Samples
from fastgpt.training.setup import Setup, open_folder, prepare
from fastgpt.training.speed import Stopwatch, flops_per_token
from fastgpt.training.start import with_warmup
from fastgpt.training.validation import Validation

MOST_UNREAD = 1000  # steps whose verdicts may stay on the device


def train(
    config: TrainConfig, sample: Sample, loggers: Sequence[Logger] = (), source: Source | None = None
) -> RunSummary:
    """Train, or continue, the run that the configuration describes.

    Args:
        sample: continues a text, for the samples that the run shows.
        loggers: get the run's records beside the loggers that every run has.
        source: the model that `init_from` names, if it is open already.

    Raises:
        UsageError: the flags, the data or the folder make the run impossible; nothing was lost.
        RunFailed: the run cannot go on; the checkpoints that it had saved are whole.
    """
    validate_fields(TrainConfig, vars(config))
    if config.dry_run:
        raise UsageError("`dry_run=True` is for the command, which prints a table; to train, leave it out")
    if config.resuming:
        run_folder.mend(Path(config.out_dir))
    validate(config)
    if config.warmup_iters is None:
        config = with_warmup(config)
    run_folder.check_free(Path(config.out_dir))
    with out_of_memory.caught() as shortage, threads.restored(), Signals(patient=False) as signals:
        setup = prepare(config, source)
        with run_folder.locked(setup.out_dir):
            log = _log_of(setup, loggers)
            with log:
                open_folder(setup, log)
                run = Run(setup, log, signals, sample)
                run.train()
            return run.conclude()
    # In an update, for one, and then half of the weights may have changed: nothing is saved.
    raise RunFailed(memory.lacking("outside of forward and backward passes", config, shortage.reason))


def _log_of(setup: Setup, loggers: Sequence[Logger]) -> RunLog:
    """The loggers that every run has, those that were given, and the display."""
    uniform = math.log(setup.data.tokenizer.vocab_size)
    display = Display(console.stderr(), setup.config.max_iters, uniform, settled=2 if setup.config.compile else 1)
    with run_folder.explained(setup.out_dir):
        return RunLog(display, [*(make(setup.out_dir) for make in LOGGERS), *loggers])


class Run:
    """The training loop of a run that is prepared and whose folder is open."""

    def __init__(self, setup: Setup, log: RunLog, signals: Signals, sample: Sample):
        self.setup, self.config, self.state = setup, setup.config, setup.state
        self.log, self.signals = log, signals
        self.model, self.step = setup.state.model, setup.state.step
        self.checkpoints = Checkpoints(setup, log, signals)
        self.validation = Validation(setup, log, self.checkpoints)
        self.rollback = Rollback(setup, log, self.checkpoints, self.validation)
        self.samples = Samples(setup, log.display, sample, self._answer_signals)
        self.watch, self.slowness = Stopwatch(setup.device), contention.Slowness(setup.threads)
        self.rate = 0.0  # learning rate of the last step

    def train(self) -> None:
        """Take the steps that are left. From here on signals wait for a checkpoint."""
        report.introduce(self.log.display.console, self.setup)
        self.log.display.start(self.state.progress)
        on_cpu = self.setup.device.type == "cpu"
        with contention.watching(self.setup.threads if on_cpu else 1), self.checkpoints:
            self.signals.patient = True
            self.validation.announce_set()
            self.take_steps()
            self.save_the_rest()
            self.signals.patient = False

    def take_steps(self) -> None:
        """Train, evaluate and save until the run is finished, its time is over or a signal came."""
        config, state, over = self.config, self.state, False
        deadline = time.monotonic() + 60 * (config.max_minutes or math.inf)
        if state.owes_evaluation:
            self._evaluate_and_save()
        if not state.progress.step:
            self.samples.show(0)
        while not (state.is_finished or over or self.signals.caught):
            with self.watch:
                if self.take_step():
                    continue
                step, over = state.progress.step, time.monotonic() > deadline
                due = step % config.eval_interval == 0 or step == config.max_iters or over
                logged = due or step % config.log_interval == 0
                save = self.signals.save_asked or store.is_kept(step, config.keep_every)
                read = logged or save or len(self.step.guard.unread) >= MOST_UNREAD
                verdicts = self.step.guard.read() if read else []  # waits for the device
            self._advise()
            if not self.rollback.follow(verdicts):
                continue
            if logged:
                self._log(verdicts[-1])
            if due:
                self._evaluate_and_save()
            elif save:
                self.checkpoints.save()
            self.checkpoints.poll()
            if not state.is_finished:
                self.samples.show(step)

    def take_step(self) -> bool:
        """One optimizer step. Micro-batches that do not fit into the memory are made smaller for the rest of the run.

        Returns:
            True where a signal cut it short; the step then was not taken, and can be taken again.
        """
        progress = self.state.progress
        place = progress.step + progress.skipped_batches  # in the order of the data
        while True:
            batches = self.setup.micro_batches.of_step(place)
            self.log.display.begin("micro", progress.step, len(batches))
            with out_of_memory.caught() as shortage:
                loss = self.step.accumulate(progress.step, batches, self._is_step_to_stop)
                break
            self._divide_micro_batches(shortage.reason)
        if loss is None:
            self.step.abandon()
            self.watch.drop()
            return True
        _, self.rate = self.step.update(progress.step, loss)
        progress.step += 1
        progress.tokens += self.config.tokens_per_step
        return False

    def save_the_rest(self) -> None:
        """Save the steps since the last checkpoint, if there are any, and wait until it is written."""
        self.checkpoints.wait()
        if self.state.progress.step != self.checkpoints.begun:
            verdicts = self.step.guard.read()
            if self.rollback.follow(verdicts):
                if verdicts:
                    self._log(verdicts[-1])
                self.checkpoints.save()
        self.checkpoints.wait()

    def conclude(self) -> RunSummary:
        """Print a sample and the result, after the loggers have finished."""
        progress, watch, finished = self.state.progress, self.watch, self.state.is_finished
        summary = RunSummary(
            steps=progress.step,
            finished=finished,
            best_step=progress.best_step,
            best_val_loss=progress.best_val_loss,
            val_loss=progress.val_loss,
            bits_per_byte=report.bits_per_byte(progress.best_val_loss, self.setup.data),
            train_seconds=watch.seconds,
            tokens_per_second=watch.steps * self.config.tokens_per_step / watch.seconds if watch.steps else None,
            peak_memory=peak_memory(self.setup.device),
            stopped_by=None if finished else self.signals.caught,
            saved_step=self.checkpoints.finished,
            failures=self.log.failures,
        )
        if summary.stopped_by is None:
            self.samples.conclude(progress.step)
        print_product(report.conclude(summary, self.config, self.log.conclusion, self.setup.data))
        return summary

    def _answer_signals(self) -> bool:
        """Do what signals ask, between two batches: write a checkpoint of the last step, or stop.

        Returns:
            True where what is under way must be dropped: a signal stops the run, or it went back to an earlier step.
        """
        if self.signals.save_asked and self.state.progress.step != self.checkpoints.begun:
            if not self.rollback.follow(self.step.guard.read()):
                return True
            self.checkpoints.save()
        return self.signals.caught is not None

    def _is_step_to_stop(self, done: int) -> bool:
        """Show that `done` micro-batches of a step are done, and answer signals before the next one."""
        if self.watch.first:
            synchronize(self.setup.device)  # the time of the first micro-batches predicts that of a step
        self.log.display.reach(done)
        if done == self.log.display.count:
            return False
        with self.watch.paused():
            return self._answer_signals()

    def _divide_micro_batches(self, reason: str | None) -> None:
        """After a step ran out of memory: make the micro-batches smaller, or save what is done and give up."""
        self.step.abandon()
        if self.setup.device.type == "cuda":
            torch.cuda.empty_cache()
        number, micro_batches = self.state.progress.step + 1, self.setup.micro_batches
        if not micro_batches.divide():
            self._give_up(f"in step {number} with one sequence at a time", reason)
        self.log.say(
            f"out of memory in step {number}: going on with `batch_size` {micro_batches.batch_size} "
            f"`gradient_accumulation_steps` {micro_batches.count}, the same sequences in each step"
        )

    def _give_up(self, where: str, reason: str | None) -> NoReturn:
        """End a run that lacks memory; what is done is saved."""
        self.save_the_rest()
        raise RunFailed(memory.lacking(where, self.config, reason))

    def _evaluate_and_save(self) -> None:
        """Measure the val loss, unless a signal cuts that short, and save."""
        loss = None
        with out_of_memory.caught() as shortage:
            loss = self.validation.measure(self._answer_signals)
        if shortage.reason is not None:
            where = f"in the evaluation after step {self.state.progress.step} with one sequence at a time"
            self._give_up(where, shortage.reason)
        self.checkpoints.wait()  # the best model is not in one that failed
        if loss is not None:
            self.validation.take(loss)
        self.checkpoints.save()

    def _log(self, verdict: Verdict) -> None:
        """Record the last step, and the speed since the last record."""
        seconds, progress = self.watch.lap(), self.state.progress
        speed = self.config.tokens_per_step / seconds if seconds else None
        peak = peak_flops(self.setup.device, self.setup.dtype)
        flops = flops_per_token(self.config, self.model.num_parameters())
        self.log.log(
            {
                "step": progress.step,
                "tokens": progress.tokens,
                "loss": verdict.loss,
                "lr": self.rate,
                "grad_norm": verdict.norm,
                "ms": seconds * 1e3 if seconds else None,
                "tokens_per_second": speed,
                "mfu": flops * speed / peak if peak and speed else None,
                "memory": peak_memory(self.setup.device),
                **({"stats": self.step.statistics.read()} if self.step.statistics else {}),
            }
        )

    def _advise(self) -> None:
        """Say once that other programs slow the steps down; a GPU's steps are not timed one by one."""
        seconds = self.watch.last if self.setup.device.type == "cpu" else None
        if seconds and (advice := self.slowness.advice(seconds)):
            self.log.say(advice)
