"""A byte order mark is no text, and text in another encoding is refused with the command that converts it."""

import pytest

from fastgpt.errors import UsageError
from fastgpt.system import text_encoding
from fastgpt.system.files import decode_utf8

KOREAN = "안녕하세요. 이것은 한국어 문장이고, ASCII도 있습니다.\n" * 20
JAPANESE = "これは日本語の文章です。学校で毎日カタカナを勉強します。\n" * 20


@pytest.mark.parametrize(
    ("text", "expected"), [("\ufeffab", "ab"), ("\ufeff\ufeffab", "\ufeffab"), ("a\ufeff", "a\ufeff")]
)
def test_one_byte_order_mark_is_dropped_at_the_start_of_a_file(text: str, expected: str):
    assert decode_utf8(text.encode(), "the file") == expected


@pytest.mark.parametrize(
    ("text", "encoding", "named"),
    [
        (KOREAN, "euc_kr", "CP949"),
        (KOREAN + "뷁", "cp949", "CP949"),
        (JAPANESE, "euc_jp", "EUC-JP"),
        (JAPANESE, "shift_jis", "CP932"),
        (KOREAN, "utf-16", "UTF-16"),
        ("Où est l'été à Noël ?", "latin-1", "ITS-ENCODING"),
        ("上海是中国的一个大城市, 我们学习语言模型", "gb18030", "ITS-ENCODING"),
        ("Это русский текст", "cp1251", "ITS-ENCODING"),
    ],
)
def test_text_that_is_not_utf8_is_refused_with_the_command_that_converts_it(text: str, encoding: str, named: str):
    with pytest.raises(UsageError, match=f"the file is not UTF-8: byte .*; convert.* iconv -f {named} -t UTF-8$"):
        decode_utf8(text.encode(encoding), "the file")


def test_a_long_text_is_recognized_by_its_beginning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_encoding, "SAMPLE", 3)  # ends within a character
    assert "CP949" in text_encoding.advice(KOREAN.encode("cp949"))
