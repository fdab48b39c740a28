"""README's shell blocks, in order and as they stand there, in a clone of this folder as it is now.

What differs from a reader's machine comes by the environment: the Python that runs the tests in place of an own .venv,
the CPU profile, trainings of one step, scores of 2,048 tokens, and a pytest that lists the suite but does not run it.
SLOW=1 shortens the trainings alone. A block behind `<!-- not run by the tests: reason -->` is left out."""
import os
import re
import subprocess
import sys

import harness
import pytest
from conftest import ROOT

BLOCKS = re.findall(r"^(?:<!-- not run by the tests: ([^\n]+) -->\n)?```bash\n(.*?)^```",
                    (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
SHORT = dict(ITERATIONS=1, PROFILE="cpu", SKIP_VENV=1, PYTHON=sys.executable, PYTEST_ADDOPTS="--collect-only -qq")
if os.environ.get("SLOW") != "1":
    SHORT |= dict(MAX_WALLCLOCK_SECONDS=0, WARMUP_STEPS=0, VAL_MAX_TOKENS=2048, PROBE_STEPS=0, SLIDING_EVAL=0,
                  TEMP_SCALING=0, VAL_LOSS_EVERY=0)


@pytest.fixture(scope="module")
def clone(tmp_path_factory, demo_data):
    """This folder's files that git would take, changed ones as they are, with a .venv that is the tests' own."""
    folder = tmp_path_factory.mktemp("readme") / "clone"
    names = subprocess.check_output(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run("git init -q && git add -A && git -c user.name=t -c user.email=t@t commit -qm t", shell=True,
                   check=True, cwd=folder)
    (folder / ".venv").symlink_to(sys.prefix)  # .gitignore names a folder, not a link
    (folder / ".git/info/exclude").write_text("/.venv\n")
    return folder


def test_what_is_left_out_says_why():
    left_out = [block for reason, block in BLOCKS if reason]
    assert all(re.search("TRAIN_SHARDS|nnodes|SBATCH", block) for block in left_out) and len(left_out) == 3


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for reason, block in BLOCKS if not reason],
                         ids=lambda block: re.sub(r"\W+", "_", block.splitlines()[0])[:40])
def test_a_block_runs_without_an_error(clone, block):
    done = subprocess.run(["bash", "-eo", "pipefail"], input=block, text=True, cwd=clone, capture_output=True,
                          env=harness.plain_environment(**SHORT), timeout=900)
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    for name in re.findall(r"RUN_ID=(\w+)\b", block):
        if os.path.isdir(clone / "runs" / name):
            assert (clone / f"runs/{name}/result.json").is_file(), name
    assert subprocess.check_output(["git", "status", "--porcelain"], cwd=clone) == b"", "files that git does not ignore"
