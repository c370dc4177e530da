"""Looks for problems in the records of a run, a function for each; `fastgpt.inspection.rules` lists them.

A function gets a `Case` and returns its evidence, a sentence with steps and values, or None. The thresholds stand above
the function that they belong to. They are chosen so that nothing is found in a healthy run.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from fastgpt.inspection.history import History
from fastgpt.inspection.panels import by_layer, layer_name
from fastgpt.system.units import counted

FEW = 5  # records whose median stands for the loss at a step
OUTLIER = "standard deviations above"  # is in the reason for which `skip_loss_sigma` skips a step


@dataclass(frozen=True)
class Case:
    """One run, as the rules see it.

    Attributes:
        uniform: loss of a uniform guess, if the vocabulary is known.
        sample: a text that the model generated, if one was made.
    """

    history: History
    uniform: float | None = None
    sample: str | None = None

    @property
    def warmed_up(self) -> int:
        """The step at which the learning rate has reached its peak so far."""
        steps, rates = self.history.curve("lr")
        return int(steps[np.argmax(rates)]) if steps.size else 0

    def after_warmup(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (N,) and values (N,) of a key after the warm-up."""
        steps, values = self.history.curve(key)
        return steps[steps > self.warmed_up], values[steps > self.warmed_up]


def not_finite(case: Case) -> str | None:
    records = case.history.records
    returned = [record for record in records if "rolled_back_from" in record]
    skipped = [record for record in records if "skipped" in record and record not in returned]
    skipped = [record for record in skipped if OUTLIER not in str(record["skipped"])]
    lost = [record for record in records if any(key in record and record[key] is None for key in ("loss", "val_loss"))]
    said = []
    if skipped:
        steps, why = _some([record["step"] for record in skipped]), str(skipped[-1]["skipped"])
        said.append(f"{counted(len(skipped), 'step')} changed nothing ({steps}), the last because {why}")
    if returned:
        last = returned[-1]
        why = last.get("skipped", "of what its record does not say")
        way = f"the last from step {last['rolled_back_from']} to {last['step']}, because {why}"
        said.append(f"{counted(len(returned), 'return')} to an earlier checkpoint, {way}")
    if lost:
        said.append(f"the loss is not a number at {_some([record['step'] for record in lost])}")
    return "; ".join(said) or None


NEAR_GUESS = 0.98  # times the loss of a uniform guess


def guessing(case: Case) -> str | None:
    steps, loss = case.after_warmup("loss")
    if case.uniform is None or loss.size < 2 * FEW or (end := np.median(loss[-FEW:])) < NEAR_GUESS * case.uniform:
        return None
    return (
        f"at step {steps[-1]:,}, after a warm-up to step {case.warmed_up:,}, the train loss is {end:.4f}; a uniform "
        f"guess scores {case.uniform:.4f}"
    )


WORSE_THAN_GUESS = 1.1  # times its loss: that of random weights is within a few percent of it


def blown_up(case: Case) -> str | None:
    steps, loss = case.history.curve("loss")
    early, values = steps[: (loss.size + 1) // 2], loss[: (loss.size + 1) // 2]
    if case.uniform is None or case.history.imported or not values.size or guessing(case):
        return None
    worst = int(np.argmax(values))
    if values[worst] < WORSE_THAN_GUESS * case.uniform:
        return None
    return f"at step {early[worst]:,} the train loss is {values[worst]:.4f}; a uniform guess scores {case.uniform:.4f}"


RISE, NOISE = 0.05, 3.0  # of the loss, and in standard deviations of a record


def diverging(case: Case) -> str | None:
    steps, loss = case.history.curve("loss")
    if loss.size < 4 * FEW:
        return None
    medians = _medians(loss)
    low = int(np.argmin(medians))
    noise = float(np.std(loss[FEW // 2 : FEW // 2 + medians.size] - medians))
    if medians[-1] - medians[low] <= max(RISE * medians[low], NOISE * noise):
        return None
    where = steps[low + FEW // 2]
    return (
        f"the train loss was {medians[low]:.4f} around step {where:,}, and is {medians[-1]:.4f} at step {steps[-1]:,}"
    )


STUCK = 0.65  # times the loss of a uniform guess: counting how often each token occurs does about as well


def stuck(case: Case) -> str | None:
    found = _flat(case)
    if found is None or not _is_high(case) or guessing(case):
        return None
    return f"{found[1]}; a uniform guess scores {case.uniform:.4f}"


def plateau(case: Case) -> str | None:
    found = _flat(case)
    return None if found is None or _is_high(case) or _rate_is_spent(case, found[0]) else found[1]


def decayed_early(case: Case) -> str | None:
    found = _flat(case)
    if found is None or _is_high(case) or not _rate_is_spent(case, found[0]):
        return None
    return f"{found[1]}; the learning rate was below a fifth of its peak in all of them"


LATE, FALL = (
    0.4,
    0.0125,
)  # the share of the records that are late, and that by which the loss of a run that learns falls
DECAYED = 0.2  # of the peak learning rate


def _flat(case: Case) -> tuple[int, str] | None:
    """The first of the late steps, and the evidence, if the loss fell by less than `FALL` in them, 95% sure."""
    steps, loss = case.after_warmup("loss")
    count = int(LATE * loss.size)
    if count < 2 * FEW:
        return None
    x, y = steps[-count:] - steps[-count], loss[-count:]
    if x[-1] <= 0:  # a damaged file
        return None
    (slope, start), covariance = np.polyfit(x, y, 1, cov="unscaled")
    error = np.sqrt(covariance[0, 0] * np.sum((y - slope * x - start) ** 2) / (count - 2))
    most = (2 * error - slope) * x[-1] / y.mean()
    if most >= FALL or slope * x[-1] > RISE * y.mean():
        return None
    change = f"{start:.4f} to {start + slope * x[-1]:.4f}"
    return int(steps[-count]), f"from step {steps[-count]:,} to {steps[-1]:,} the train loss went from {change}"


def _is_high(case: Case) -> bool:
    loss = case.history.curve("loss")[1]
    return case.uniform is not None and bool(np.median(loss[-FEW:]) >= STUCK * case.uniform)


def _rate_is_spent(case: Case, since: int) -> bool:
    steps, rates = case.history.curve("lr")
    return bool(rates.size and (rates[steps >= since] < DECAYED * rates.max()).all())


WORSE = 0.01  # of the val loss


def overfitting(case: Case) -> str | None:
    val_steps, val = case.history.val_curve()
    steps, loss = case.history.curve("loss")
    best = int(np.argmin(val)) if val.size else 0
    if val.size - best < 3 or val[-1] < (1 + WORSE) * val[best]:  # two evaluations since the best
        return None
    then, now = loss[steps <= val_steps[best]][-FEW:], loss[-FEW:]
    if not then.size or np.mean(now) >= np.mean(then):
        return None
    return (
        f"val loss was lowest at step {val_steps[best]:,} ({val[best]:.4f}) and is {val[-1]:.4f} at step "
        f"{val_steps[-1]:,}, while train loss fell from {np.mean(then):.4f} to {np.mean(now):.4f}"
    )


BEFORE = 10  # records with which one is compared
JUMP, FAR = 0.1, 8.0  # of the loss, and in standard deviations, as the median of their distances tells
MAD = 1.4826  # standard deviations of normal noise in the median of its distances


def spikes(case: Case) -> str | None:
    steps, loss = case.history.curve("loss")
    parts = []
    if loss.size > BEFORE:
        windows = np.lib.stride_tricks.sliding_window_view(loss, BEFORE)[:-1]
        usual = np.median(windows, axis=1)
        near = MAD * np.median(np.abs(windows - usual[:, None]), axis=1)  # of ten records: often far too small
        everywhere = usual * MAD * np.median(np.abs(loss[BEFORE:] - usual) / np.maximum(usual, 1e-9))
        high = loss[BEFORE:] - usual > np.maximum(JUMP * usual, FAR * np.maximum(near, everywhere))
        starts = np.flatnonzero(high & ~np.concatenate([[False], high[:-1]]))
        said = [f"from {usual[at]:.4f} to {loss[BEFORE + at]:.4f} at step {steps[BEFORE + at]:,}" for at in starts[:3]]
        more = f", and {starts.size - 3:,} more" if starts.size > 3 else ""
        parts = [f"the train loss jumped {', '.join(said)}{more}"] if said else []
    outliers = [record["step"] for record in case.history.records if OUTLIER in str(record.get("skipped"))]
    if outliers:
        parts.append(f"{counted(len(outliers), 'step')} with such a loss changed nothing ({_some(outliers)})")
    return "; ".join(parts) or None


NEARLY_ALL, FAR_ABOVE = 0.95, 10.0  # of the records, and times `grad_clip`: small batches clip at 3 and are well


def clipped(case: Case) -> str | None:
    limit = case.history.settings.get("grad_clip")
    steps, norms = case.after_warmup("grad_norm")
    if not isinstance(limit, int | float) or limit <= 0 or norms.size < 2 * FEW:
        return None
    share, usual = np.mean(norms > limit), np.median(norms)
    if share < NEARLY_ALL or usual < FAR_ABOVE * limit:
        return None
    since = f"since step {steps[0]:,} the gradient is clipped in {share:.0%} of the records"
    return f"{since}; its norm is {usual:.3g} (median)"


SLOW, LONG = 0.5, 0.2  # of the usual speed, and of the records: so many had it


def slower(case: Case) -> str | None:
    steps, speed = case.history.curve("tokens_per_second")
    if speed.size < 3 * FEW:
        return None
    usual = _medians(speed, max(FEW, int(LONG * speed.size))).max()
    fast = np.flatnonzero(speed >= SLOW * usual)[-1]
    if speed.size - 1 - fast < FEW:
        return None
    now = np.median(speed[fast + 1 :])
    return f"since step {steps[fast + 1]:,} training runs at {now:,.0f} tokens/s; before, at up to {usual:,.0f}"


REACHED = 0.95  # of the peak learning rate


def warming_up(case: Case) -> str | None:
    steps, rates = case.history.curve("lr")
    end, peak = (case.history.settings.get(name) for name in ("max_iters", "learning_rate"))
    if rates.size < 2 or end is None or peak is None or steps[-1] < end:
        return None
    if rates[-1] <= rates[-2] or rates[-1] > REACHED * peak:
        return None
    return f"at step {steps[-1]:,}, the last, the learning rate had risen to {rates[-1]:.3g}; its peak is {peak:g}"


MANY_DEAD, LARGE_UPDATE = 0.5, 0.1  # of a layer's units, and of a weight's size in one step


def dead_units(case: Case) -> str | None:
    steps, shares = by_layer(case.history.records, "dead_units")
    if not steps.size:
        return None
    return _layers_above(shares[-1], MANY_DEAD, f"at step {steps[-1]:,}", "units dead", ".0%")


def large_updates(case: Case) -> str | None:
    steps, ratios = by_layer(case.history.records, "update_ratio")
    ratios, steps = ratios[steps > case.warmed_up][-FEW:], steps[steps > case.warmed_up][-FEW:]
    if steps.size < FEW:
        return None
    since = f"since step {steps[0]:,}"
    return _layers_above(np.median(ratios, axis=0), LARGE_UPDATE, since, "update / weight in a step", ".2g")


def _layers_above(values: np.ndarray, limit: float, when: str, what: str, form: str) -> str | None:
    places = np.flatnonzero(values > limit).tolist()
    found = [f"{layer_name(place, values.size)} {values[place]:{form}}" for place in places]
    return f"{when}, {what}: {', '.join(found)}" if found else None


WINDOW, REPEATED = 12, 0.5  # characters, and the share of windows that stood in the sample before


def repeating(case: Case) -> str | None:
    text = case.sample or ""
    counts = Counter(text[at : at + WINDOW] for at in range(len(text) - WINDOW + 1))
    total = sum(counts.values())
    if total < 2 * WINDOW or (share := 1 - len(counts) / total) < REPEATED:
        return None
    piece, times = counts.most_common(1)[0]
    return f"{share:.0%} of a sample of {len(text):,} characters is a repetition; {piece!r} stands in it {times} times"


def _medians(values: np.ndarray, count: int = FEW) -> np.ndarray:
    """The running medians (N - count + 1,) of values (N,), of `count` at a time."""
    return np.median(np.lib.stride_tricks.sliding_window_view(values, count), axis=-1)


def _some(steps: list[int]) -> str:
    """Steps in words: "step 3", or "steps 3 to 9"."""
    return f"step {steps[0]:,}" if len(set(steps)) == 1 else f"steps {min(steps):,} to {max(steps):,}"
