"""The numbers of attention maps as JSON, a head at a time.

The file holds an object with the names of the page's data (see `page_data.values`), but
- `maps`: weights as numbers, [layer][head][query][key], with six significant digits: a row sums to 1 within 1e-5;
- `lens`: `ids` and `probabilities` as lists, [row][position][likeliest first].
"""

import json
from collections.abc import Iterator
from typing import Any

import torch

from fastgpt.inspection import logit_lens
from fastgpt.inspection.attention import token_text
from fastgpt.inspection.page_data import Content, head_values, token_values
from fastgpt.inspection.snapshot import Snapshot


def parts(content: Content) -> Iterator[str]:
    """The file's parts. The maps must have been kept."""
    mentioned = sorted({id for one in content.snapshots for id in one.lens.ids.unique().tolist()})
    about = {
        "title": content.title,
        "source": content.source,
        "model": content.model,
        "tokens": [token_values(content.tokenizer, token) for token in content.tokens.tolist()],
        "layers": content.layers,
        "vocabulary": {str(id): token_text(content.tokenizer, id) for id in mentioned},
        "shapes": [step._asdict() for step in content.snapshots[-1].steps],
    }
    yield _json(about)[:-1] + ', "checkpoints": ['
    for at, one in enumerate(content.snapshots):
        yield ", " if at else ""
        yield from _snapshot_parts(one, content.config.n_layer)
    yield "]}\n"


def _snapshot_parts(one: Snapshot, n_layer: int) -> Iterator[str]:
    about = {
        **one.origin._asdict(),
        "heads": [[head_values(head) for head in layer.heads] for layer in one.layers.values()],
        "losses": [None, *one.outcome.losses.tolist()],
        "ranks": [None, *one.outcome.ranks.tolist()],
        "lens": {
            "rows": logit_lens.row_names(n_layer),
            "ids": one.lens.ids.tolist(),
            "probabilities": one.lens.probabilities.tolist(),
        },
    }
    yield _json(about)[:-1] + ', "maps": ['
    for at, layer in enumerate(one.layers.values()):
        assert layer.maps is not None
        yield ",\n[" if at else "["
        yield from (("," if head else "") + _rows(weights) for head, weights in enumerate(layer.maps))
        yield "]"
    yield "]}"


def _rows(weights: torch.Tensor) -> str:
    """A matrix (T, T) as JSON."""
    return f"[{','.join('[' + ','.join(f'{weight:.6g}' for weight in row) + ']' for row in weights.tolist())}]"


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, allow_nan=False)
