"""Tokenize text before training: `python data/prepare.py --dataset pydocs --tokenizer char`.

It is the command `fastgpt prepare`; see fastgpt/prepare.py.
"""

from fastgpt import cli
from fastgpt.prepare import main

if __name__ == "__main__":
    raise SystemExit(cli.run(main))
