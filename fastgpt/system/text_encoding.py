"""Drops byte order marks from UTF-8 text, and gives advice for text in another encoding."""

import codecs

BOM = "\ufeff"  # the byte order mark, by which some editors begin a UTF-8 file
SAMPLE = 1 << 16  # bytes by which an encoding is recognized
# An encoding is named if at least the given share of the characters beyond ASCII lies in the range. Bytes of one
# encoding are often valid in another, but make other characters there. Scripts: Hangul; hiragana and katakana.
SCRIPTS = (
    ("CP949", ("\uac00", "\ud7a3"), 0.5),  # which holds EUC-KR
    ("EUC-JP", ("\u3041", "\u30ff"), 0.25),
    ("CP932", ("\u3041", "\u30ff"), 0.25),  # which holds Shift_JIS
)


def without_bom(text: str) -> str:
    """The text without a byte order mark at its beginning. A second one is a character, and stays."""
    return text.removeprefix(BOM)


def advice(data: bytes) -> str:
    """The command that converts a text to UTF-8; `data` is its beginning, which is not UTF-8."""
    return f"convert it to UTF-8 first, with: iconv -f {_likely(data) or 'ITS-ENCODING'} -t UTF-8"


def _likely(data: bytes) -> str | None:
    """The probable encoding of the bytes, by its name for iconv; None if none stands out."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    for name, (first, last), share in SCRIPTS:
        try:
            text = codecs.getincrementaldecoder(name)().decode(data[:SAMPLE])  # a character cut at the end is left out
        except UnicodeDecodeError:
            continue
        beyond = [char for char in text if not char.isascii()]
        if beyond and sum(first <= char <= last for char in beyond) >= share * len(beyond):
            return name
    return None
