"""Shared by all tests: import path, thread counts, skipping of cuda tests, the demo shards."""
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
os.environ.setdefault("OMP_NUM_THREADS", "1")    # tests are many small products: more threads only wait for each other
os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_collection_modifyitems(items):
    if not any("cuda" in item.keywords for item in items):
        return
    import torch
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def demo_data():
    """Folders of the demo shards (.bpe, .bytes) and the tokenizer of the first; made if missing."""
    data = SimpleNamespace(bpe=ROOT / "data/datasets/demo_sp8192", bytes=ROOT / "data/datasets/demo_bytes",
                           tokenizer=ROOT / "data/demo/fineweb_8192_bpe.model")
    if not all((folder / "fineweb_val_000000.bin").exists() for folder in (data.bpe, data.bytes)):
        subprocess.run(["bash", str(ROOT / "setup_jepa.sh"), "demo"], check=True, stdout=subprocess.DEVNULL,
                       env=os.environ | {"SKIP_VENV": "1", "PYTHON": sys.executable})
    return data
