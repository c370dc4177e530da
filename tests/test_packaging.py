"""The contents of the packages: typed packages in the wheel, and in the source distribution all that the tests need."""

import re
import tomllib

from fastgpt.inspection import page
from tests.helpers.places import ROOT


def test_both_packages_say_that_they_are_typed_and_ship_that():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package, folder in (("fastgpt", ROOT / "fastgpt"), ("fastgpt_kernels", ROOT / "kernels" / "fastgpt_kernels")):
        assert (folder / "py.typed").is_file()
        assert "py.typed" in project["package-data"][package]


def test_the_wheel_holds_the_parts_of_the_page():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    shipped = {path for pattern in project["package-data"]["fastgpt"] for path in (ROOT / "fastgpt").glob(pattern)}
    assert {page.FOLDER / name for name in ("template.html", "style.css", *page.SCRIPTS)} <= shipped


def test_setuptools_finds_every_room():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert project["packages"]["find"]["where"] == [".", "kernels"]
    assert {"fastgpt", "fastgpt.*", "fastgpt_kernels"} == set(project["packages"]["find"]["include"])
    folders = {path.parent for path in (ROOT / "fastgpt").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_source_distribution_holds_what_tests_import_and_read():
    manifest = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()
    pytest_paths = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]
    beside = set(pytest_paths["ini_options"]["pythonpath"]) - {".", "kernels"}  # packages are shipped anyway
    assert {f"graft {folder}" for folder in ("tests", *beside)} <= set(manifest)
    named = {name for line in manifest if line.startswith("include ") for name in line.split()[1:]}
    assert {"data/prepare.py", "noxfile.py", ".ci/run", "CHANGELOG.md", "CONTRIBUTING.md"} <= named
    assert {"graft docs", "graft .github"} <= set(manifest)


def test_the_source_distribution_holds_the_stubs_that_pyright_reads():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert (ROOT / tools["pyright"]["stubPath"] / "triton" / "__init__.pyi").is_file()
    assert f"graft {tools['pyright']['stubPath']}" in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()


def test_readme_gets_a_cpu_build_that_the_package_accepts():
    """A newer one would be replaced, with gigabytes of CUDA libraries."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    (torch,) = (need for need in needs if need.startswith("torch"))
    (line,) = re.findall(r'pip install "(torch[^"]*)" --index-url', (ROOT / "README.md").read_text(encoding="utf-8"))
    assert line.removeprefix("torch") in torch.removeprefix("torch").split(",")
