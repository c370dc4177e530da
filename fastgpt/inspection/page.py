"""Builds the page of attention maps: one HTML file that holds its style, its scripts and its data, and loads nothing.

The parts lie beside this file in page/: template.html, style.css, and the scripts, in the order of `SCRIPTS`. They are
put in as they are written. The data follow as JSON in a `<script>` that is no code.

A Content-Security-Policy lets the page run these scripts and this style alone, named by their hashes, and reach no
other file.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("page")
# Each may use the functions of those before it, and of those after it once the page runs.
SCRIPTS = (
    "data.js",
    "words.js",
    "colours.js",
    "state.js",
    "tokens.js",
    "details.js",
    "heads.js",
    "heat.js",
    "lines.js",
    "lens.js",
    "shapes.js",
    "main.js",
)
SLOT = re.compile(r"\{\{(\w+)\}\}")


def build(data: Mapping[str, Any]) -> str:
    """The HTML of a page. It opens from a file, without a server or a network.

    Args:
        data: plain values for JSON. Numbers that are not finite become null, which the page shows as a dash.
    """
    style = _read("style.css")
    scripts = [_read(name) for name in SCRIPTS]
    filled = {
        "policy": _policy(style, scripts),
        "title": html.escape(_unicode(str(data["title"]))),
        "style": style,
        "data": _json(data),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    # In one pass, so that nothing in the data is taken for a slot.
    return SLOT.sub(lambda slot: filled[slot[1]], _read("template.html"))


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _policy(style: str, scripts: list[str]) -> str:
    """Forbids everything but the page's own code. `img-src data:` is for the icon, which is written in the page."""
    allowed = " ".join(map(_hash, scripts))
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _hash(code: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"


def _json(data: Mapping[str, Any]) -> str:
    """JSON in ASCII, also where text holds half a surrogate pair. Without `<`, no text in it can end the element."""
    text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    """The same value with None for each number that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unicode(text: str) -> str:
    """Text that can be written as UTF-8: a path's bytes that are no text become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
