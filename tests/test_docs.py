"""README.md, KNOBS.md and their like: commands that can run, names that exist, links that lead somewhere."""
import re
import subprocess

import pytest
from conftest import ROOT

import train_jepa as tj

PAGES = ("README.md", "RESULTS.md", "CONTRIBUTING.md", "CHANGELOG.md", "KNOBS.md")
NAME = re.compile(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*(?==)")  # of NAME=value
SET_UP = set(re.findall(r"[A-Z]\w+", (ROOT / "setup_jepa.sh").read_text().partition("\nVENV=")[0]))
TOOLS = {name.upper() for tool in ("compare", "submit") for name in
         re.findall(r"^    (\w+): \w+ = knob\(", (ROOT / f"tools/{tool}.py").read_text(), re.M)}
LEFT = set(re.findall(r"`([A-Z_]+)", (ROOT / "CHANGELOG.md").read_text().partition("**Moved:**")[0]))
KNOWN = {*tj.Config.knobs(), *tj.SCRIPT_KNOBS} | SET_UP | TOOLS | {"OMP_NUM_THREADS"}


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[str]:
    """The shell commands of a page, a text per block."""
    return re.findall(r"^```bash\n(.*?)^```", page(name), re.M | re.S)


@pytest.mark.parametrize("name", PAGES)
def test_shell_blocks_are_valid_and_name_what_exists(name):
    for block in blocks(name):
        done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        commands = re.sub(r"#.*", "", block)
        assert set(NAME.findall(commands)) <= KNOWN, set(NAME.findall(commands)) - KNOWN
        for path in re.findall(r"\b(?:bash|python) ((?:\w+/)?\w+\.(?:sh|py))", commands):
            assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_knobs_in_the_text_exist(name):
    words = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page(name), flags=re.S))
    names = {found for word in words for found in NAME.findall(word)}
    names |= {word for word in words if re.fullmatch(r"[A-Z]+(_[A-Z]+)+", word)}
    listed = vars(tj).keys() | {"JEPA_WIEGHT", "NAME"}  # tables of the script; placeholders
    assert names <= KNOWN | LEFT | listed, names - KNOWN - LEFT - listed


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    anchors = {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")
               for title in re.findall(r"^#+ (.+)$", page(name), re.M)}
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_sentences_of_the_readme_are_short():
    text = re.sub(r"```.*?```|<!--.*?-->|^[|#!][^\n]*$", "", page("README.md"), flags=re.M | re.S)
    text = re.sub(r"`[^`]*`", "X", text)
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*- )", text)
    sentences = [part.split() for paragraph in paragraphs for part in re.split(r"(?<=[.!?])\s", paragraph)]
    lengths = [len(words) for words in sentences if len(words) > 1]
    assert len(lengths) > 100 and sum(lengths) / len(lengths) <= 25
