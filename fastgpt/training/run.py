"""A training run, from its first step, or its last checkpoint, to its end.

The data flows forward: corpus -> loader -> model -> loss -> optimizer -> checkpoint. What can go wrong on the way does
not end the run: a bad step changes nothing (`guard`), a row of them leads back to the last good checkpoint, a
micro-batch that is too large is made smaller, a signal waits for the micro-batch, a full disk for the next checkpoint.
"""

import dataclasses
import functools
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, cast

import torch
from rich.console import Console

from fastgpt.checkpoint import run_folder, store
from fastgpt.checkpoint.progress import Progress
from fastgpt.checkpoint.writer import Saver
from fastgpt.config.fields import validate, validate_fields
from fastgpt.config.training import TrainConfig
from fastgpt.data import corpus, loader
from fastgpt.data.loader import MicroBatches
from fastgpt.errors import RunFailed, UsageError, shown
from fastgpt.evaluation import loss as evaluation_loss
from fastgpt.evaluation.loss import EvaluationSet
from fastgpt.loggers.console import Display, print_product
from fastgpt.loggers.jsonl import MetricsFile, Record
from fastgpt.model import memory
from fastgpt.model.gpt import GPT
from fastgpt.ops import autotune, table
from fastgpt.ops.workload import Workload
from fastgpt.system import contention, finite, out_of_memory, threads
from fastgpt.system.device import (
    autocast,
    peak_flops,
    peak_memory,
    resolve_device,
    resolve_dtype,
    synchronize,
)
from fastgpt.system.files import regular
from fastgpt.system.signals import Signals
from fastgpt.system.streams import Lasting
from fastgpt.system.units import counted
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.training import report
from fastgpt.training.guard import Verdict
from fastgpt.training.report import RunSummary
from fastgpt.training.speed import Stopwatch, flops_per_token
from fastgpt.training.start import with_warmup
from fastgpt.training.state import TrainingState

MOST_UNREAD = 1000  # steps whose verdicts may wait on the device


# How a model continues an opening, piece by piece: (model, tokenizer, opening, seed).
Sample = Callable[[GPT, Tokenizer, str, int], Iterator[str]]


def train(config: TrainConfig, sample: Sample) -> RunSummary:
    """Train, or continue, the run that the configuration describes.

    Args:
        sample: how the model continues a text, for the samples that the run shows.

    Raises:
        UsageError: anything in the flags, the data or the folder that makes the run impossible; nothing was lost.
        RunFailed: the run cannot go on; what it had saved is there.
    """
    validate_fields(TrainConfig, vars(config))
    if config.resuming:
        run_folder.mend(Path(config.out_dir))
    validate(config)
    if config.warmup_iters is None:
        config = with_warmup(config)
    run_folder.check_free(Path(config.out_dir))
    with out_of_memory.caught() as shortage, threads.restored(), Signals(patient=False) as noted:
        run = Run(config, sample)
        with run_folder.locked(run.out_dir):
            run.open()
            return run.train(noted)
    # In an update, for one, and then half of the weights may have changed: nothing is saved.
    raise RunFailed(memory.lacking("outside of forward and backward passes", config, shortage.reason))


class Run:
    """A run: made without writing into its folder, then opened, then trained."""

    def __init__(self, config: TrainConfig, sample: Sample):
        self.sample = sample
        resuming = config.resuming
        self.out_dir = Path(config.out_dir)
        self.device = resolve_device(config.device)
        if resuming:
            store.require(self.out_dir)
            run_folder.named_step(self.out_dir, config.init_from)
        else:
            run_folder.claim(self.out_dir, config.overwrite)
        saved, about = run_folder.load(self.out_dir) if resuming else (config, {})
        if resuming:
            config = run_folder.relocated(self.out_dir, config)
        self.asked = run_folder.anchored(config)
        same = about.get("device") == self.device.type  # as the run began on: then its choices are kept
        recorded = about.get("dtype", "auto") if same else "auto"
        backends = about.get("columns") if same else None
        self.threads = self._use_threads(about.get("threads") if same else None)
        resolve = functools.partial(table.resolve, config.kernels, self.device, recorded=backends)
        dtype = recorded if config.dtype == "auto" else config.dtype
        self.dtype = resolve_dtype(dtype, self.device, interpreted=resolve().interpreted)
        # A text that was allowed to change is read with the run's vocabulary, from then on.
        self.own_vocabulary = resuming and (config.allow_data_change or about.get("corpus", {}).get("own_vocabulary"))
        self.reading = run_folder.reading(about) if resuming else corpus.READING
        self.data = corpus.prepare(
            config.dataset,
            tokenizer=config.tokenizer,
            vocab_size=config.vocab_size,
            corpus_file=config.corpus_file,
            gpt2_vocab=config.gpt2_vocab,
            vocabulary=run_folder.vocabulary(self.out_dir) if self.own_vocabulary else None,
            data_dir=config.data_dir,
            reading=self.reading,
        )
        if resuming:
            run_folder.check_resume(self.out_dir, config, self.data)
        self.config = dataclasses.replace(config, vocab_size=self.data.tokenizer.vocab_size)
        self.train_loader, self.val_loader = loader.loaders(self.data, self.config, self.device)
        self.micro_batches = MicroBatches(self.train_loader, config.batch_size, config.gradient_accumulation_steps)
        memory.check_training(self.config, self.device)
        self.ops = resolve(choose=autotune.chooser(Workload.of_training(self.config, self.dtype)))
        self.evaluation, unnamed = self._evaluation_set(saved, about.get("evaluation", {}))
        val_set = self.evaluation.identity
        self.state = TrainingState(self.config, self.ops, self.data, self.device, self.dtype, val_set, unnamed)
        self.model, self.step = self.state.model, self.state.step
        self.saver = Saver(self.out_dir, config.keep_last, beside=config.async_save)
        self.saved_step = self.last_saved = 0  # of the last checkpoint that was begun, and that was finished
        self.saved_best: tuple[float | None, int] = (None, 0)  # of the last that was finished
        self.returns: Counter[int] = Counter()  # rollbacks to each step, which the disk may not have taken
        self.unfit_step: int | None = None  # whose weights are not finite
        self.failures = 0
        self.watch, self.slowness = Stopwatch(self.device), contention.Slowness(self.threads)
        self.console = Console(file=cast(IO[str], Lasting(sys.stderr)))

    def _evaluation_set(self, saved: TrainConfig, recorded: Mapping[str, int]) -> tuple[EvaluationSet, str]:
        """The recorded evaluation set, or that of new settings; and the identity of one that an older version had.

        Args:
            saved: the configuration that the record was made with.
        """
        batch_size, tokens = recorded.get("batch_size", saved.batch_size), self.data.val_tokens
        chosen = EvaluationSet.of(self.config, self.data, batch_size)
        if "windows" in recorded and saved.eval_iters == self.config.eval_iters:
            chosen = dataclasses.replace(chosen, windows=recorded["windows"])
        # Those of older versions drew their windows at random, except of the whole split.
        whole = not recorded and not evaluation_loss.plan(saved.eval_iters, tokens)
        return chosen, dataclasses.replace(chosen, windows=0).identity if whole else "windows drawn at random"

    @property
    def progress(self) -> Progress:
        return self.state.progress

    def open(self) -> None:
        """Take the folder, which is now this process's: restore what is resumed, or make room for what is new."""
        metrics = self.out_dir / "metrics.jsonl"
        with run_folder.explained(self.out_dir):
            regular(metrics)  # before anything changes: to open a pipe would take for ever
        resumed = self._resume() if self.config.resuming else None
        if not resumed:
            run_folder.claim(self.out_dir, self.config.overwrite)
        run_folder.check_disk(self.out_dir, self.config, self.model.num_parameters(), self.progress.step)
        if self.config.overwrite:
            run_folder.delete(self.out_dir)
        with run_folder.explained(self.out_dir):
            if resumed:
                store.point_best(self.out_dir, self.progress.best_step)  # a crash may have come before `latest`
                store.point(self.out_dir, "latest", resumed)  # the damaged, or those that were left, are undone
            self.metrics = MetricsFile(metrics, self.progress)

    def train(self, signals: Signals) -> RunSummary:
        """Take the steps that are left, and tell how it went; once there are steps, signals wait for a checkpoint."""
        config, self.signals = self.config, signals
        report.introduce(
            *(self.console, config, self.model, self.data, self.device, self.dtype, self.evaluation),
            self.progress.step,
        )
        uniform = math.log(self.data.tokenizer.vocab_size) if self.progress.step == 0 else None
        display = Display(self.console, config.max_iters, uniform, settled=2 if config.compile else 1)
        watching = contention.watching(self.threads if self.device.type == "cpu" else 1)
        with watching, self.metrics, display as self.display, self.saver:
            signals.patient = True
            self._begin_evaluation_set()
            self._take_steps()
            self._save_the_rest()
            signals.patient = False
        return self._finish(None if self._is_finished() else signals.caught)

    def _begin_evaluation_set(self) -> None:
        """Say and record that val losses are measured on another evaluation set from here on, if they are."""
        progress, now = self.progress, self.evaluation.identity
        if progress.val_set == now:
            return
        self.display.say(
            f"step {progress.step}: evaluations read {now} from here on, and before {shown(progress.val_set)}; "
            "which checkpoint is best begins anew"
        )
        progress.val_set = now
        self._write({"step": progress.step, "tokens": progress.tokens, "val_set": now})

    def _take_steps(self) -> None:
        """Steps, evaluations and checkpoints, until the run is finished, its time is over or a signal came."""
        config, over = self.config, False
        deadline = time.monotonic() + 60 * (config.max_minutes or math.inf)
        if self._owes_evaluation():
            self._evaluate_and_save()
        while not (self._is_finished() or over or self.signals.caught):
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
                self._log(verdicts[-1])
            if due:
                self._evaluate_and_save()
            elif asked:
                self._save()
            self._tell_of_save(wait=False)
            if config.sample_interval and step % config.sample_interval == 0 and not self._is_finished():
                self.display.product(f"--- sample at step {step}\n{self._sample(self._is_asked_to_stop)}\n---")

    def _use_threads(self, recorded: int | None) -> int:
        """Compute with as many threads as --threads says; `recorded`: with how many the run did so on this device."""
        count = threads.use(self.asked.threads, recorded)
        if self.device.type == "cpu" and recorded not in (None, count):
            print(
                f"going on with --threads {count}, where the run had {recorded}: floats are summed in another order, "
                "so bits may differ",
                file=sys.stderr,
            )
        return count

    def _advise(self) -> None:
        """Tell once where steps are slow because of other programs; a GPU's are not timed one by one."""
        seconds = self.watch.last if self.device.type == "cpu" else None
        if seconds and (advice := self.slowness.advice(seconds)):
            self.display.say(advice)

    def _is_finished(self) -> bool:
        return self.progress.step >= self.config.max_iters and not self._owes_evaluation()

    def _owes_evaluation(self) -> bool:
        """Whether the last step calls for an evaluation that has not been, because a signal cut it short."""
        step, config = self.progress.step, self.config
        due = step == config.max_iters or step % config.eval_interval == 0
        return due and step > 0 and self.progress.evaluated_step != step

    def _train_step(self) -> bool:
        """One optimizer step; where its micro-batches do not fit into the memory, they are made smaller for good.

        Returns:
            True where a signal cut it short; it is then as if it had not begun.
        """
        place = self.progress.step + self.progress.skipped_batches  # in the order of the data
        while True:
            batches = self.micro_batches.of_step(place)
            self.display.begin("micro", self.progress.step, len(batches))
            with out_of_memory.caught() as shortage:
                loss = self.step.accumulate(self.progress.step, batches, self._is_step_to_stop)
                break
            self._divide_micro_batches(shortage.reason)
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
            synchronize(self.device)  # so that the time of the first ones tells that of a step
        self.display.reach(done)
        if done == self.display.count:
            return False
        with self.watch.paused():
            return self._is_asked_to_stop()

    def _divide_micro_batches(self, reason: str | None) -> None:
        """After a step ran out of memory: make the micro-batches smaller, or save what is done and give up."""
        self.step.abandon()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        number = self.progress.step + 1
        if not self.micro_batches.divide():
            self._save_the_rest()
            where = f"in step {number} with one sequence at a time"
            raise RunFailed(memory.lacking(where, self.config, reason))
        self.display.say(
            f"out of memory in step {number}: going on with --batch_size {self.micro_batches.batch_size} "
            f"--gradient_accumulation_steps {self.micro_batches.count}, the same sequences in each step"
        )

    def _follow(self, verdicts: Sequence[Verdict]) -> bool:
        """Tell of the last steps that were skipped; False where they were too many, and the run has gone back."""
        for step, verdict in enumerate(verdicts, self.progress.step - len(verdicts) + 1):
            if verdict.skipped is None or verdict.scaling:
                continue
            batch = step - 1 + self.progress.skipped_batches
            self.display.say(f"step {step}: skipped, because {verdict.skipped} (batch {batch} of the data)")
            tokens = self.progress.tokens - (self.progress.step - step) * self.config.tokens_per_step
            self._write({"step": step, "tokens": tokens, "skipped": verdict.skipped, "batch": batch})
            if verdict.in_row >= self.config.rollback_after:
                self._roll_back(step, verdict.skipped)
                return False
        return True

    def _log(self, verdict: Verdict) -> None:
        record = self._record(verdict)
        self._write(record)
        self.display.show(record, self.progress.val_loss)

    def _write(self, record: Record) -> None:
        """Append to `metrics.jsonl`; a disk that does not take it does not stop the run."""
        try:
            self.metrics.write(record)
        except OSError as error:
            self.failures += 1
            self.display.say(f"warning: {self.metrics.path} misses a line of step {record['step']}: {error}")

    def _record(self, verdict: Verdict) -> Record:
        """A line of `metrics.jsonl` about the steps since the last one."""
        seconds = self.watch.lap()
        speed = self.config.tokens_per_step / seconds if seconds else None
        peak = peak_flops(self.device, self.dtype)
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
            "memory": peak_memory(self.device),
        }

    def _evaluate_and_save(self) -> None:
        """Measure the val loss, unless a signal cuts that short, and save."""
        loss = self._evaluate()
        self._tell_of_save(wait=True)  # one that failed does not hold the best model
        progress = self.progress
        if loss is not None:
            if bad := finite.first_not_finite(self.model.weights()):
                self.display.say(f"warning: step {progress.step}: not saved, as its weights are not finite: {bad}")
                self.unfit_step = progress.step
            good = math.isfinite(loss) and not bad
            progress.val_loss, progress.evaluated_step = loss if good else None, progress.step
            if good and (progress.best_val_loss is None or loss < progress.best_val_loss):
                progress.best_val_loss, progress.best_step = loss, progress.step
            self._write({"step": progress.step, "tokens": progress.tokens, "val_loss": loss})
        self._save()

    def _evaluate(self) -> float | None:
        """The val loss, or None where a signal cut it short; what is done is saved where the memory is too small."""
        done = itertools.count()
        self.display.begin("evaluation", self.progress.step, self.evaluation.count)

        def stopping() -> bool:
            self.display.reach(next(done))
            return self._is_asked_to_stop()

        with out_of_memory.caught() as shortage:
            return evaluation_loss.mean_loss(
                self.model, self.evaluation.batches(self.val_loader), autocast(self.device, self.dtype), stopping
            )
        self._save_the_rest()
        where = f"in the evaluation after step {self.progress.step} with one sequence at a time"
        raise RunFailed(memory.lacking(where, self.config, shortage.reason))

    def _is_asked_to_stop(self) -> bool:
        """Do what signals want, between two batches: write a checkpoint of the last step, or stop.

        Returns:
            True where what is under way is to be dropped, also because the run went back to an earlier step.
        """
        if self.signals.save_asked and self.progress.step != self.saved_step:
            if not self._follow(self.step.guard.read()):
                return True
            self._save()
        return self.signals.caught is not None

    def _save(self, returned: bool = False) -> None:
        """Write a checkpoint, or begin to, and what the run is made from; `returned`: after going back to its step."""
        self._tell_of_save(wait=True)  # of the one before, which may still be under way
        progress = self.progress
        if progress.step == self.unfit_step:
            self.signals.save_asked = False
            return
        progress.rollbacks = progress.rollbacks if returned else 0
        snapshot = self.state.snapshot()
        val_loss = progress.val_loss if progress.val_loss is not None else math.nan
        judged = report.judged(progress.best_val_loss, val_loss if progress.evaluated_step == progress.step else None)
        self.saved_step = progress.step
        self.saving = judged, (progress.best_val_loss, progress.best_step)
        beside = self.saver.beside
        self.saver.save(snapshot, progress.best_step, self._describe)
        if not self.saver.beside:
            self._tell_of_save(wait=True)
        if beside and not self.saver.beside:
            self.display.say("no memory or thread for --async_save: training waits for its checkpoints from here on")
        self.signals.save_asked = False

    def _save_the_rest(self) -> None:
        """Write a checkpoint of the steps since the last one, if there are any, and wait for it."""
        self._tell_of_save(wait=True)
        if self.progress.step != self.saved_step:
            verdicts = self.step.guard.read()
            if self._follow(verdicts):
                if verdicts:
                    self._log(verdicts[-1])
                self._save()
        self._tell_of_save(wait=True)

    def _describe(self) -> None:
        """Write what the run is made from into its folder, and what it logged to the disk."""
        self.metrics.sync()
        run_folder.save(
            self.out_dir,
            self.asked,
            self.data.tokenizer,
            {
                "columns": self.model.ops.backends,
                "device": self.device.type,
                "dtype": str(self.dtype).removeprefix("torch."),
                "threads": self.threads,
                "corpus": {
                    "name": self.data.name,
                    "source_sha256": self.data.source_sha256,
                    "own_vocabulary": bool(self.own_vocabulary),
                    "reading": self.reading,
                },
                "evaluation": {"windows": self.evaluation.windows, "batch_size": self.evaluation.batch_size},
                "torch": torch.__version__,
            },
        )

    def _tell_of_save(self, wait: bool) -> None:
        """Say what became of the last save, if it is known; one that failed is made up for by the next."""
        outcome = self.saver.outcome(wait)
        if outcome is None:
            return
        told, best = self.saving
        if outcome.saved:
            self.saved_best = best
            self.display.say(f"step {outcome.step}: {told}; saved {outcome.folder}")
            self.last_saved = outcome.step
        elif self.progress.best_step == outcome.step:  # no checkpoint holds the best model
            self.progress.best_val_loss, self.progress.best_step = self.saved_best
        if outcome.error:
            self.failures += 1
            what = "old checkpoints were not deleted" if outcome.saved else "not saved, the checkpoint before it stays"
            why = (str(outcome.error) or type(outcome.error).__name__).splitlines()[0]
            self.display.say(f"warning: step {outcome.step}: {what}: {why}")

    def _resume(self) -> Path:
        """Take up the newest checkpoint that is whole, or the very one that --init_from names."""
        folder = run_folder.named_step(self.out_dir, self.config.init_from)
        if folder is None:
            folder = store.newest_intact(self.out_dir, functools.partial(print, file=sys.stderr))
        else:
            store.verify(folder)
        self._load(folder)
        step = self.progress.step
        if step > self.config.max_iters or self._is_finished():
            raise UsageError(
                f"--max_iters {self.config.max_iters}: {self.out_dir} is already at step {step}; "
                f"continue with a larger one, such as --max_iters {2 * step}"
            )
        return folder

    def _load(self, folder: Path) -> None:
        """Become the run that was saved there. Raises `CorruptCheckpoint`."""
        self.state.load(folder)
        self.saved_step = self.last_saved = self.progress.step
        self.saved_best = self.progress.best_val_loss, self.progress.best_step

    def _roll_back(self, step: int, why: str) -> None:
        """Go back to the last checkpoint before the row of skipped steps, and leave out the data since.

        Raises:
            RunFailed: going back there has not helped before, as often as --max_rollbacks says.
        """
        self._tell_of_save(wait=True)
        skipped = self.progress.skipped_batches
        folder = store.newest_good(self.out_dir, step)
        if folder:
            self._load(folder)
            self.step.guard.open()
        else:
            self.state.reset()
            self.saved_step = self.last_saved = 0
        self.unfit_step = None  # when the run is there again, it has other weights
        back_to, count = self.progress.step, self.config.rollback_after
        row = "a step was skipped" if count == 1 else f"{count} steps in a row were skipped"
        returns = max(self.returns[back_to], self.progress.rollbacks) + 1
        self.returns[back_to] = self.progress.rollbacks = returns
        if returns > self.config.max_rollbacks:
            raise RunFailed(
                f"step {step}: {row}, the last because {why}; {counted(returns - 1, 'return')} to step {back_to} did "
                f"not help: {self._calmer()}, or look at batch {step - 1 + skipped} of the data"
            )
        left_out = [back_to + skipped, step - 1 + skipped]
        self.progress.skipped_batches = left_out[1] + 1 - back_to
        self.display.say(
            f"step {step}: {row}, the last because {why}; back to step {back_to}, and batches {left_out[0]} to "
            f"{left_out[1]} are left out"
        )
        try:
            self.metrics.take_back(self.progress)
        except OSError as error:
            self.failures += 1
            self.display.say(f"warning: {self.metrics.path} keeps the steps that are done again: {error}")
        tokens = self.progress.tokens
        record = {"step": back_to, "tokens": tokens, "rolled_back_from": step, "skipped": why, "batches": left_out}
        self._write(record)
        self._begin_evaluation_set()
        if folder:
            self._save(returned=True)  # so that a resume need not find out again

    def _calmer(self) -> str:
        """Advice for a run whose losses or gradients are not finite."""
        clip = self.config.grad_clip
        return f"lower --learning_rate {self.config.learning_rate:g}, or " + (
            f"lower --grad_clip {clip:g}" if clip else "clip gradients, which --grad_clip 0 does not: set it to 1"
        )

    def _sample(self, stopping: Callable[[], bool] = lambda: False) -> str:
        """Some words of the val split and how the model continues them, cut short where `stopping` says so."""
        self.model.eval()
        opening = self.data.opening()
        try:
            with out_of_memory.caught():
                pieces = self.sample(self.model, self.data.tokenizer, opening, self.config.seed)
                return opening + "".join(itertools.takewhile(lambda _: not stopping(), pieces))
            return "(out of memory)"
        except RunFailed as error:
            return f"({error})"
        finally:
            self.model.train()

    def _finish(self, stopped_by: int | None) -> RunSummary:
        from fastgpt.loggers.curves import plot_loss  # matplotlib, which the first step need not wait for

        progress, watch = self.progress, self.watch
        try:
            picture = str(plot_loss(self.out_dir))
        except OSError as error:
            self.failures += 1
            picture = f"not drawn: {error}"
        summary = RunSummary(
            steps=progress.step,
            finished=self._is_finished(),
            best_step=progress.best_step,
            best_val_loss=progress.best_val_loss,
            val_loss=progress.val_loss,
            bits_per_byte=report.bits_per_byte(progress.best_val_loss, self.data),
            train_seconds=watch.seconds,
            tokens_per_second=watch.steps * self.config.tokens_per_step / watch.seconds if watch.steps else None,
            peak_memory=peak_memory(self.device),
            stopped_by=stopped_by,
            saved_step=self.last_saved,
            failures=self.failures,
        )
        if stopped_by is None:
            print_product(f"--- sample after step {progress.step}\n{self._sample()}\n---")
        print_product(report.conclude(summary, self.config, picture, self.data))
        return summary
