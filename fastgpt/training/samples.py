"""Shows what the model writes while it trains: whole samples, and previews, one line each at chosen steps.

A preview continues the same words of the val split every time, so that one watches the model learn.
"""

from collections.abc import Callable, Iterator

from rich.cells import cell_len, set_cell_size

from fastgpt.errors import RunFailed
from fastgpt.loggers.console import Display, print_product
from fastgpt.model.gpt import GPT
from fastgpt.system import out_of_memory
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.training.setup import Setup

# How a model continues an opening, piece by piece: (model, tokenizer, opening, seed).
Sample = Callable[[GPT, Tokenizer, str, int], Iterator[str]]

PREVIEW_STEPS = (0, 50, 100, 250)  # and ten times these, and so on
PREVIEW_COLUMNS = 88  # of its text


def is_previewed(step: int) -> bool:
    """Whether a preview comes after this step: 0, 50, 100, 250, 500, 1000, 2500, ..."""
    while step > PREVIEW_STEPS[-1] and step % 10 == 0:
        step //= 10
    return step in PREVIEW_STEPS


class Samples:
    """Samples of a run's model; drawing one changes nothing in the run.

    Args:
        sample: continues a text.
        stopping: true where a signal asks to cut a sample short.
    """

    def __init__(self, setup: Setup, display: Display, sample: Sample, stopping: Callable[[], bool]):
        self.setup, self.display, self.sample, self.stopping = setup, display, sample, stopping
        self.opening = setup.data.opening()

    def show(self, step: int) -> None:
        """Show what is due after a step that is not the last."""
        config = self.setup.config
        if config.preview and is_previewed(step):
            self.display.product(f"step {step:>5}  {self._preview()}")
        if step and config.sample_interval and step % config.sample_interval == 0:
            self.display.product(f"--- sample at step {step}\n{self._drawn(self.stopping)}\n---")

    def conclude(self, step: int) -> None:
        """Show the sample after the last step; no signal cuts it short."""
        print_product(f"--- sample after step {step}\n{self._drawn()}\n---")

    def _preview(self) -> str:
        """One line that fills the columns; line breaks and runs of blanks are single spaces."""
        text = self._drawn(self.stopping, lambda text: cell_len(_one_line(text)) >= PREVIEW_COLUMNS)
        return set_cell_size(_one_line(text), PREVIEW_COLUMNS).rstrip()

    def _drawn(
        self, stopping: Callable[[], bool] = lambda: False, is_enough: Callable[[str], bool] = lambda text: False
    ) -> str:
        """The opening and its continuation, cut short where `stopping` or `is_enough` says so."""
        model, data = self.setup.state.model, self.setup.data
        model.eval()
        try:
            with out_of_memory.caught():
                text = self.opening
                for piece in self.sample(model, data.tokenizer, self.opening, self.setup.config.seed):
                    if stopping() or is_enough(text):
                        break
                    text += piece
                return text
            return "(out of memory)"
        except RunFailed as error:
            return f"({error})"
        finally:
            model.train()


def _one_line(text: str) -> str:
    return " ".join(text.split())
