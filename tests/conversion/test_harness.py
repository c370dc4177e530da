"""lm-evaluation-harness gives our model the results of its own model `hf` on the converted folder."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from fastgpt.interchange import huggingface_export
from fastgpt.tokenizer.byte import ByteTokenizer
from tests.helpers.exports import exported

PAIRS = [
    ("The quick brown", " fox"),
    ("The quick brown ", "fox"),
    ("", "An end"),
    ("x" * 40, " y"),
    ("The quick", " b"),
]
TEXTS = ["The quick brown fox jumps over a lazy dog.", "nine wise cats", "e", "x" * 20 + "watch from trees", "\n\n \n"]
ANSWERS = [
    ("The quick", {"until": ["."], "max_gen_toks": 9}),
    ("nine " * 9, {"until": ["e"], "max_gen_toks": 7, "do_sample": False}),
]


@pytest.mark.peers
def test_results_are_those_of_the_harness_own_model(tmp_path: Path):
    for name in ("lm_eval", "transformers", "accelerate", "peft"):
        pytest.importorskip(name, reason="needs the extra peers")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from fastgpt.generation.lm_eval_model import HarnessModel

    tokenizer = ByteTokenizer(ends=True)
    huggingface_export.write(exported(tokenizer, block_size=24)[1], tmp_path, "float32")
    theirs = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", batch_size=2, logits_cache=False)
    ours = HarnessModel(str(tmp_path), device="cpu", dtype="float32", prefix_token_id=theirs.prefix_token_id)

    def asked(kind: str, arguments: list[tuple]) -> SimpleNamespace:
        instances = [Instance(request_type=kind, doc={}, arguments=own, idx=0) for own in arguments]
        return SimpleNamespace(ours=getattr(ours, kind)(instances), theirs=getattr(theirs, kind)(instances))

    found = asked("loglikelihood", PAIRS)
    assert [own for own, _ in found.ours] == pytest.approx([own for own, _ in found.theirs], rel=1e-5)
    assert [greedy for _, greedy in found.ours] == [greedy for _, greedy in found.theirs]
    found = asked("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert found.ours == pytest.approx(found.theirs, rel=1e-5)
    found = asked("generate_until", ANSWERS)
    assert found.ours == found.theirs
