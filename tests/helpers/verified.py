"""The verdict of `python -m fastgpt.verify` on a run's folder."""

import re

from fastgpt import cli, verify


class Verified:
    """What the command says of a folder: its exit code, the table's rows by step, and the lines on stderr."""

    def __init__(self, capsys, *arguments: str):
        capsys.readouterr()
        self.code = cli.run(verify.main, list(arguments))
        out, err = capsys.readouterr()
        self.faults = err.splitlines()
        lines = out.splitlines()
        self.header = lines[0].split() if lines else []
        self.rows = {int(re.match(r" *([\d,]+) ", line)[1].replace(",", "")): line for line in lines[1:]}

    def cells(self, step: int) -> list[str]:
        """The row of a step, without the size's unit."""
        return re.sub(r"(?<=\d) [KMG]iB", "", self.rows[step]).replace(", ", ",").split()
