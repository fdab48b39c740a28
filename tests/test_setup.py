"""setup_jepa.sh and tools/prepare_data.py: environment, demo shards, download through a stubbed hub, byte conversion,
restart. Most tests call prepare_data.main in this process; those of the shell script run it."""
import contextlib
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import prepare_data
import pytest

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "data/demo/fineweb_8192_bpe.model"

FAKE_HUB = '''
"""Serves FAKE_HUB/<repo>/... ; FAKE_OFFLINE: no network; FAKE_BREAK=name: that download breaks off;
FAKE_DAMAGE=name and FAKE_DAMAGE_TIMES: so many downloads of it are cut short; every download is logged."""
import os, shutil
from pathlib import Path
from types import SimpleNamespace
HUB = Path(os.environ["FAKE_HUB"])

class HfApi:
    def dataset_info(self, repo, timeout=None):
        if os.environ.get("FAKE_OFFLINE"):
            raise OSError("Name or service not known")
        if not (HUB / repo).is_dir():
            raise OSError("404")
        names = [str(p.relative_to(HUB / repo)) for p in (HUB / repo).rglob("*") if p.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n) for n in names])

def hf_hub_download(repo_id, filename, repo_type, local_dir, force_download=False):
    assert repo_type == "dataset"
    log = HUB / "log"
    earlier = log.read_text().splitlines().count(filename) if log.exists() else 0
    with open(log, "a") as file:
        file.write(filename + "\\n")
    if os.environ.get("FAKE_BREAK") and filename.endswith(os.environ["FAKE_BREAK"]):
        raise OSError("connection reset\\nsecond line")
    target = Path(local_dir) / filename
    target.parent.mkdir(parents=True, exist_ok=True)
    data = (HUB / repo_id / filename).read_bytes()
    damage = os.environ.get("FAKE_DAMAGE")
    if damage and filename.endswith(damage) and earlier < int(os.environ.get("FAKE_DAMAGE_TIMES", "1")):
        data = data[:-2]
    target.write_bytes(data)
    return str(target)
'''
FAKE_TORCH = '''
import os
from types import SimpleNamespace
__version__ = "0.0"
version = SimpleNamespace(cuda=None)
COUNT = int(os.environ.get("FAKE_GPUS", "0"))
cuda = SimpleNamespace(is_available=lambda: COUNT > 0, device_count=lambda: COUNT, get_device_name=lambda i: "Fake GPU")
'''


def write_shard(path, tokens):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


def read_shard(path):
    data = path.read_bytes()
    header = np.frombuffer(data[:1024], "<i4")
    assert (header[0], header[1]) == (20240520, 1) and not header[3:].any()
    assert len(data) == 1024 + 2 * header[2]
    return np.frombuffer(data[1024:], "<u2")


REQUIREMENTS = ("requirements.txt", "requirements-dev.txt")
ALONE = ("setup_jepa.sh", "tools/prepare_data.py", *REQUIREMENTS)    # what set-up consists of
VARIABLES = ("TRAIN_SHARDS", "FINEWEB_KINDS", "SOURCE_PATH", "SOURCE_TOKENIZER", "BYTES_PATH", "TEXT_PATH", "TEXT_NAME",
             "TEXT_PIECE")


class Copy:
    """Set-up and the embedded corpus in a folder with a space, over stubs of torch and of the hub's client."""

    def __init__(self, folder):
        self.root = folder / "my repo"
        self.stubs, self.hub = folder / "stubs", folder / "hub"
        (self.root / "tools").mkdir(parents=True)
        self.hub.mkdir()
        self.stubs.mkdir()
        for name in ALONE:
            shutil.copy(ROOT / name, self.root / name)
        shutil.copytree(ROOT / "data/demo", self.root / "data/demo")
        (self.stubs / "huggingface_hub.py").write_text(FAKE_HUB)
        (self.stubs / "torch.py").write_text(FAKE_TORCH)
        self.datasets = self.root / "data/datasets"

    def setup(self, *arguments, code=0, **env):
        """Output of setup_jepa.sh."""
        base = {k: os.environ[k] for k in ("PATH", "HOME", "LANG") if k in os.environ}
        base |= {"SKIP_VENV": "1", "PYTHON": sys.executable, "PYTHONPATH": str(self.stubs), "FAKE_HUB": str(self.hub)}
        done = subprocess.run(["bash", str(self.root / "setup_jepa.sh"), *arguments], capture_output=True, text=True,
                              env=base | env, cwd="/", timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def prepare(self, action, code=0, **env):
        """Output of `prepare_data.py action`, in this process."""
        with pytest.MonkeyPatch.context() as patch, io.StringIO() as output:
            for name in VARIABLES:
                patch.delenv(name, raising=False)
            for name, value in ({"FAKE_HUB": str(self.hub)} | env).items():
                patch.setenv(name, value)
            for name, source in (("huggingface_hub", FAKE_HUB), ("torch", FAKE_TORCH)):
                module = types.ModuleType(name)
                exec(source, module.__dict__)
                patch.setitem(sys.modules, name, module)
            patch.setattr(prepare_data, "ROOT", self.root)
            patch.chdir("/")
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                got = prepare_data.main([action])
            assert got == code, output.getvalue()
            return output.getvalue()

    def downloads(self):
        log = self.hub / "log"
        names = [Path(line).name for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        return names

    def state(self):
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in self.datasets.rglob("*.bin")}


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A copy with the demo shards made once, to be read only."""
    made = Copy(tmp_path_factory.mktemp("demo"))
    made.text = made.setup("demo")
    return made


def with_demo(copy, demo):
    """The demo shards put into `copy`, as if it had made them."""
    shutil.copytree(demo.root / "data", copy.root / "data", dirs_exist_ok=True)


def fill_hub(hub, train=3, listed=None):
    """The layout of the published copies, with tiny shards; `listed`: training shards the manifest counts."""
    repo, name = hub / "kevclark/parameter-golf/datasets", "fineweb10B_sp8192"
    rng = np.random.default_rng(0)
    for i in range(train):
        write_shard(repo / f"datasets/{name}/fineweb_train_{i:06d}.bin", rng.integers(4, 8192, 100 + i))
    write_shard(repo / f"datasets/{name}/fineweb_val_000000.bin", rng.integers(4, 8192, 50))
    write_shard(repo / "datasets/fineweb10B_sp4096/fineweb_val_000000.bin", [1])
    (repo / "tokenizers").mkdir()
    shutil.copy(MODEL, repo / "tokenizers")
    stats = {"files_train": train if listed is None else listed, "files_val": 1}
    (repo / "manifest.json").write_text(json.dumps({"datasets": [{"name": name, "stats": stats}]}))
    for i in range(2):
        write_shard(hub / f"mistobaan/fineweb10B_bytes/fineweb_train_{i:06d}.bin", rng.integers(0, 256, 30))
    write_shard(hub / "mistobaan/fineweb10B_bytes/fineweb_val_000000.bin", rng.integers(0, 256, 20))


# ---- text of the script

@pytest.mark.parametrize("name", ["setup_jepa.sh", "run_jepa_bpe.sh", "run_jepa_byte.sh", "run_bytejepa.sh",
                                  "tools/launch.sh", "tools/experiments.sh", "tests/run.sh", ".ci/run"])
def test_shell_syntax_and_line_length(name):
    assert subprocess.run(["bash", "-n", str(ROOT / name)]).returncode == 0
    assert max(map(len, (ROOT / name).read_text().splitlines())) <= 100


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_requirements_are_pinned_and_justified(name):
    for line in (ROOT / name).read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.match(r"[A-Za-z_-]+==[\w.]+(; platform_system == \"Linux\")? +# \S", line), line
            assert "transformers" not in line


# ---- shards

@pytest.mark.parametrize("tokens", [np.arange(5), iter([np.arange(3), np.array([3, 4], "<u2")]), [np.arange(5)]])
def test_write_shard_takes_an_array_or_several(tmp_path, tokens):
    path = tmp_path / "new/fineweb_train_000000.bin"
    assert prepare_data.write_shard(path, tokens) == 5
    assert read_shard(path).tolist() == prepare_data.read_shard(path).tolist() == [0, 1, 2, 3, 4]
    assert list(path.parent.iterdir()) == [path]           # no temporary file
    assert prepare_data.write_shard(str(path), np.array([], int)) == 0 and read_shard(path).size == 0


# ---- demo

def test_demo_shards(demo):
    copy = demo
    alice = (ROOT / "data/demo/alice_valid.txt").read_bytes()
    values = read_shard(copy.datasets / "demo_bytes/fineweb_val_000000.bin")
    assert values[0] == 0 and values[1:].astype("u1").tobytes() == alice
    train = read_shard(copy.datasets / "demo_bytes/fineweb_train_000000.bin")
    pieces = [piece.strip() for piece in train.astype("u1").tobytes().split(b"\0")[1:]]
    novels = lzma.decompress((ROOT / "data/demo/novels_train.txt.xz").read_bytes())
    letters = lambda text: re.sub(rb"[\s\"`']", b"", text)  # a layout changes white space and quotes, nothing else
    lines = [len(line.decode()) for piece in pieces for line in piece.split(b"\n")]
    found, whole = [letters(piece) for piece in pieces], letters(novels)
    assert len(pieces) > 250 and train.max() < 256 and len(whole) == sum(map(len, found))
    assert all(piece in whole for piece in found) and sorted(found, key=whole.index) != found
    assert sum(length > 75 for length in lines) < 5 and max(lines) > 70
    text = b"\n".join(pieces)
    assert min(text.count(sign) for sign in (b"\n\n  ", b".  ", b"`", b'"', b". ")) > 500
    for split, documents in (("train", len(pieces)), ("val", 1)):
        tokens = read_shard(copy.datasets / f"demo_sp8192/fineweb_{split}_000000.bin")
        assert tokens[0] == 1 and (tokens == 1).sum() == documents and tokens.max() < 8192
    assert (copy.root / "data/tokenizers/fineweb_8192_bpe.model").read_bytes() == MODEL.read_bytes()


def test_demo_bpe_decodes_to_the_normalized_text(demo):
    from sentencepiece import SentencePieceProcessor
    copy = demo
    model = SentencePieceProcessor(model_file=str(MODEL))
    tokens = read_shard(copy.datasets / "demo_sp8192/fineweb_val_000000.bin")
    text = (ROOT / "data/demo/alice_valid.txt").read_text(encoding="utf-8")
    assert model.decode(tokens[1:].tolist()) == model.normalize(text).replace("▁", " ")


def test_demo_repeats_without_work_and_repairs(copy, demo):
    with_demo(copy, demo)
    state = copy.state()
    assert "document(s)" not in copy.prepare("demo")
    assert copy.state() == state
    target = copy.datasets / "demo_bytes/fineweb_train_000000.bin"
    whole = target.read_bytes()
    target.write_bytes(whole[:-2])
    copy.prepare("demo")
    assert target.read_bytes() == whole
    assert copy.datasets / "demo_sp8192/fineweb_val_000000.bin" in state.keys() & copy.state().keys()


def test_summary_and_usage(copy, demo):
    text, count = demo.text, len(read_shard(demo.datasets / "demo_bytes/fineweb_train_000000.bin"))
    for word in ("Python ", "torch ", "CUDA ", "mamba-ssm ", f"demo_bytes: train 1 shard(s), {count:,} tokens"):
        assert word in text
    assert "usage: bash setup_jepa.sh" in copy.setup("nonsense", code=2)


def test_command_line_of_prepare_data(copy):
    command = [sys.executable, str(copy.root / "tools/prepare_data.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 2 and done.stderr.startswith("prepare_data.py: usage") and done.stderr.count("\n") == 1
    shutil.rmtree(copy.root / "data/demo")
    done = subprocess.run([*command, "demo"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("prepare_data.py: data/demo/fineweb_8192_bpe.model is missing")


def test_set_up_starts_in_a_folder_without_data(copy):
    shutil.rmtree(copy.root / "data")
    copy.setup("env")
    text = copy.setup("demo", code=1)
    assert "is missing" in text and len(text.splitlines()) == 1
    fill_hub(copy.hub)
    assert "fineweb10B_sp8192: train 3 shard(s)" in copy.setup("fineweb")


# ---- text

def test_text_makes_both_kinds_once_with_the_first_pieces_held_out(copy, tmp_path):
    pieces = [f"Piece {i} begins.\nIt has two lines, caf\u00e9 and \u2014 a dash.\n" for i in range(120)]
    source = tmp_path / "own text.txt.xz"
    source.write_bytes(lzma.compress("\f\n".join(pieces).encode()))
    copy.prepare("text", TEXT_PATH=str(source), TEXT_NAME="own")
    values = {split: read_shard(copy.datasets / f"own_bytes/fineweb_{split}_000000.bin") for split in ("train", "val")}
    for split, part in (("val", pieces[:2]), ("train", pieces[2:])):
        assert bytes(values[split].astype(np.uint8)).decode() == "".join("\0" + piece for piece in part)
        tokens = read_shard(copy.datasets / f"own_sp8192/fineweb_{split}_000000.bin")
        assert (tokens == 1).sum() == len(part) and tokens[0] == 1 and tokens.max() < 8192
    before = copy.state()
    assert "complete" in copy.prepare("text", TEXT_PATH=str(source), TEXT_NAME="own") and copy.state() == before
    copy.prepare("text", TEXT_PATH=str(source), TEXT_NAME="own", TEXT_PIECE="10")   # no blank line in them: not cut
    cut = read_shard(copy.datasets / "own_bytes/fineweb_train_000000.bin")
    documents = bytes(cut.astype(np.uint8)).decode().split("\0")[1:]
    assert documents != (pieces[2:]) and sorted(documents) == sorted(piece + "\n\n" for piece in pieces[2:])


def test_a_text_is_cut_before_paragraphs_and_the_held_out_part_stays_apart(copy, tmp_path):
    paragraphs = [f"{part} paragraph {i} of a longer text." for part in "ABC" for i in range(40)]
    source = tmp_path / "t.txt"
    source.write_text("\f\n".join("\n\n".join(paragraphs[at:at + 40]) for at in (0, 40, 80)))
    copy.prepare("text", TEXT_PATH=str(source), TEXT_NAME="t", TEXT_PIECE="100")
    found = {split: bytes(read_shard(copy.datasets / f"t_bytes/fineweb_{split}_000000.bin").astype(np.uint8)).decode()
             .split("\0")[1:] for split in ("train", "val")}
    assert {document[0] for document in found["val"]} == {"A"} and all(len(d) < 200 for d in found["train"])
    assert sorted(p for d in found["train"] for p in d.split("\n\n") if p) == sorted(paragraphs[40:])
    assert "TEXT_PIECE=a few" in copy.prepare("text", TEXT_PATH=str(source), TEXT_PIECE="a few", code=2)


def text_shards(copy, name):
    """{split: documents} of the byte shards of a text."""
    shards = {split: copy.datasets / f"{name}_bytes/fineweb_{split}_000000.bin" for split in ("train", "val")}
    return {split: bytes(read_shard(path).astype(np.uint8)).decode().split("\0")[1:] for split, path in shards.items()}


def test_a_plain_text_is_cut_at_a_paragraph(copy, tmp_path):
    """Without form feeds: the last 2%, at least 64,000 bytes; one line says so, another what to do next."""
    text = "".join(f"Paragraph {i}, with “quotes”.\nIts second line.\n\n" for i in range(6000))
    source = tmp_path / "plain book.txt"
    source.write_text("\ufeff" + text)
    line, *_, last = (copy.prepare("text", TEXT_PATH=str(source))).splitlines()
    (train,), (val,) = text_shards(copy, "plain-book").values()
    held_out = len(val.encode())
    assert train + val == text and val.startswith("Paragraph ") and 64_000 <= held_out < 64_100
    assert line == (f"prepare_data.py: {source}: no form feeds between pieces, so the last {held_out:,} of "
                    f"{len(text.encode()):,} bytes ({held_out / len(text.encode()):.1%}), from the beginning of a "
                    "paragraph, are held out for validation")
    assert "DATA_PATH=data/datasets/plain-book_sp8192 bash run_jepa_bpe.sh" in last
    copy.prepare("text", TEXT_PATH=str(source), TEXT_PIECE="5000")
    cut = text_shards(copy, "plain-book")
    assert len(cut["train"]) > 20 and len(cut["val"]) > 10
    assert sorted(p for d in cut["val"] for p in d.split("\n\n") if p) == sorted(p for p in val.split("\n\n") if p)


@pytest.mark.parametrize("text, start, what", [
    (b"a b\n\n" * 10 ** 6, 4_900_000, "paragraph"),              # 2%
    (b"a b\r\n\r\n" * 30_000, 210_000 - 64_001, "paragraph"),    # 64,000 bytes
    (b"a b\n\nc d.\n" + b"e f\n" * 25_000, 50_002, "line"),
    (b"title\n\n" + b"word " * 1000, 2502, "word"),              # half of a short text
    ("é".encode() * 101, 102, "character"), (b"", 0, "character")])
def test_where_the_held_out_end_begins(text, start, what):
    """Never more than twice the share, so that a lone paragraph at the top does not take all."""
    assert prepare_data.held_out_start(text) == (start, what)
    text[start:].decode()


@pytest.mark.parametrize("content, why", [
    (None, "names a UTF-8 text file"), (b"", "0 bytes of text cannot give training and validation"),
    (b"\f\n \n", "cannot give training and validation"),
    ("caf\u00e9 in latin1".encode("latin1"), "is no UTF-8: byte 3 is 0xe9; convert it, such as: iconv -f latin1"),
    ("UTF-16 text".encode("utf-16"), "is no UTF-8: byte 0 is 0xff; convert it, such as: iconv -f utf-16 -t utf-8")])
def test_a_text_that_will_not_do_is_one_line(copy, tmp_path, content, why):
    source = tmp_path / "t.txt"
    if content is not None:
        source.write_bytes(content)
    text = copy.prepare("text", TEXT_PATH=str(source), code=2)
    assert why in text and f"TEXT_PATH={source}" in text and not list(copy.datasets.glob("t_*"))
    assert len(text.splitlines()) == 1


def test_compressed_texts_that_will_not_do(copy, tmp_path):
    source = tmp_path / "t.txt.xz"
    source.write_bytes(lzma.compress(b"x" * 1500 + b"\xe4"))
    assert "decompressed, is no UTF-8: byte 1,500 is 0xe4" in copy.prepare("text", TEXT_PATH=str(source), code=2)
    source.write_bytes(lzma.compress(b"text")[:-9])
    assert "t.txt.xz: cannot be read (Compressed" in copy.prepare("text", TEXT_PATH=str(source), code=2)


@pytest.mark.parametrize("name", ["demo", "fineweb10B_sp8192", "a/b", "..", ".hidden"])
def test_a_text_cannot_take_the_place_of_other_data(copy, tmp_path, name):
    (tmp_path / "t.txt").write_text("some text\n\n" * 9)
    text = copy.prepare("text", TEXT_PATH=str(tmp_path / "t.txt"), TEXT_NAME=name, code=2)
    assert text.startswith(f"prepare_data.py: TEXT_NAME={name}: ") and len(text.splitlines()) == 1


# ---- source.json

BYTES = {"tokenizer": "bytes", "vocab_size": 256}
SP8192 = {"tokenizer": hashlib.sha256(MODEL.read_bytes()).hexdigest(), "vocab_size": 8192}


def sidecar(folder):
    """The fields of source.json for readers of the shards."""
    record = json.loads((folder / "source.json").read_text())
    return {name: record[name] for name in ("tokenizer", "vocab_size")}


def test_shards_say_what_their_tokens_are(copy, demo, tmp_path):
    """Demo and text; folders of before, without these fields, get them and keep their shards."""
    assert sidecar(demo.datasets / "demo_bytes") == BYTES and sidecar(demo.datasets / "demo_sp8192") == SP8192
    with_demo(copy, demo)
    path = copy.datasets / "demo_sp8192/source.json"
    record, state = json.loads(path.read_text()), copy.state()
    path.write_text(json.dumps({name: value for name, value in record.items() if name not in SP8192}))
    copy.prepare("demo")
    assert json.loads(path.read_text()) == record and copy.state() == state
    (tmp_path / "t.txt").write_text("some text\n\n" * 9)
    copy.prepare("text", TEXT_PATH=str(tmp_path / "t.txt"))
    assert sidecar(copy.datasets / "t_bytes") == BYTES and sidecar(copy.datasets / "t_sp8192") == SP8192


def test_downloads_say_what_their_tokens_are(copy):
    fill_hub(copy.hub)
    copy.prepare("fineweb")
    for name, facts in (("fineweb10B_bytes", BYTES), ("fineweb10B_sp8192", SP8192)):
        path = copy.datasets / name / "source.json"
        record = json.loads(path.read_text())
        assert sidecar(path.parent) == facts
        path.write_text(json.dumps({key: value for key, value in record.items() if key not in facts}))    # of before
        copy.prepare("fineweb", FAKE_OFFLINE="1")
        assert json.loads(path.read_text()) == record


def test_long_work_says_how_far_it_is(monkeypatch, capsys):
    """Lines where there is no terminal for a bar."""
    monkeypatch.setattr(prepare_data, "PROGRESS_SECONDS", 0)
    with prepare_data.progress_bar(2000, desc="own_bytes", unit="token") as bar:
        bar.update(1500)
    assert capsys.readouterr().out == "prepare_data.py: own_bytes: 1,500 of 2,000, 75%\n"


# ---- fineweb

def test_fineweb_downloads_checks_and_rests(copy):
    fill_hub(copy.hub, train=3)
    text = copy.prepare("fineweb") + copy.prepare("summary")
    source = copy.hub / "kevclark/parameter-golf/datasets/datasets/fineweb10B_sp8192"
    for path in source.iterdir():
        assert (copy.datasets / "fineweb10B_sp8192" / path.name).read_bytes() == path.read_bytes()
    assert len(list((copy.datasets / "fineweb10B_bytes").glob("*.bin"))) == 3
    assert (copy.root / "data/tokenizers/fineweb_8192_bpe.model").is_file()
    assert "fineweb10B_sp8192: train 3 shard(s), 303 tokens; val 1 shard(s), 50 tokens" in text
    assert not list(copy.root.rglob(".partial")) and not (copy.root / "data/.download").exists()
    copy.downloads()
    copy.prepare("fineweb", FAKE_OFFLINE="1")                # complete: asks nobody
    assert copy.downloads() == []


def test_fineweb_takes_the_manifest_count_and_the_limit(copy):
    fill_hub(copy.hub, train=4, listed=3)
    folder = copy.datasets / "fineweb10B_sp8192"
    copy.prepare("fineweb", TRAIN_SHARDS="1", FINEWEB_KINDS="sp8192")
    assert sorted(p.name for p in folder.glob("*.bin")) == ["fineweb_train_000000.bin", "fineweb_val_000000.bin"]
    copy.downloads()
    copy.prepare("fineweb", FINEWEB_KINDS="sp8192")
    assert len(list(folder.glob("*train*.bin"))) == 3      # the fourth is there but not counted
    assert "fineweb_train_000000.bin" not in copy.downloads()
    assert "TRAIN_SHARDS=no" in copy.prepare("fineweb", TRAIN_SHARDS="no", code=2)


def test_fineweb_takes_what_ten_minutes_need_unless_told_otherwise(copy, monkeypatch):
    assert (prepare_data.DEFAULT_SHARDS - 1) * 1e8 < 10_000 * 524_288 < prepare_data.DEFAULT_SHARDS * 1e8
    monkeypatch.setattr(prepare_data, "DEFAULT_SHARDS", 2)
    fill_hub(copy.hub, train=5)
    shards = lambda: len(list((copy.datasets / "fineweb10B_sp8192").glob("fineweb_train_*.bin")))
    text = copy.prepare("fineweb", FINEWEB_KINDS="sp8192")
    assert shards() == 2 and "3 shards of kevclark/parameter-golf, up to 0.6 GB; TRAIN_SHARDS=all takes 3 more" in text
    text = copy.prepare("fineweb", FINEWEB_KINDS="sp8192", TRAIN_SHARDS="all")
    assert shards() == 5 and "6 shards of kevclark/parameter-golf, up to 1.2 GB\n" in text
    assert "complete" in copy.prepare("fineweb", FINEWEB_KINDS="sp8192") and shards() == 5
    assert "FINEWEB_KINDS" in copy.prepare("fineweb", FINEWEB_KINDS="sp99", code=2)


def test_fineweb_missing_shards_and_missing_manifest(copy):
    fill_hub(copy.hub, train=2, listed=5)
    assert "holds 2 train shards of fineweb10B_sp8192, 5 are wanted" in copy.prepare("fineweb", code=1)
    (copy.hub / "kevclark/parameter-golf/datasets/manifest.json").unlink()
    assert "no manifest.json" in copy.prepare("fineweb")
    assert len(list((copy.datasets / "fineweb10B_sp8192").glob("*train*.bin"))) == 2


def test_fineweb_damaged_download_is_fetched_again(copy):
    fill_hub(copy.hub)
    assert "is damaged" in copy.prepare("fineweb", FAKE_DAMAGE="sp8192/fineweb_train_000001.bin")
    assert copy.downloads().count("fineweb_train_000001.bin") == 3      # twice for sp8192, once for bytes
    read_shard(copy.datasets / "fineweb10B_sp8192/fineweb_train_000001.bin")
    damaged = copy.datasets / "fineweb10B_sp8192/fineweb_train_000002.bin"
    damaged.write_bytes(damaged.read_bytes()[:500])
    copy.prepare("fineweb")
    assert read_shard(damaged).size == 102
    assert copy.downloads().count("fineweb_train_000002.bin") == 1


def test_fineweb_damaged_for_good(copy):
    fill_hub(copy.hub)
    text = copy.prepare("fineweb", code=1, FAKE_DAMAGE="sp8192/fineweb_train_000001.bin", FAKE_DAMAGE_TIMES="9")
    assert "damaged" in text and "twice" in text
    assert not (copy.datasets / "fineweb10B_sp8192/fineweb_train_000001.bin").exists()


def test_fineweb_resumes_after_a_broken_download(copy):
    fill_hub(copy.hub)
    text = copy.prepare("fineweb", code=1, FAKE_BREAK="sp8192/fineweb_train_000002.bin")
    assert "broke off (connection reset); repeat this command" in text and "second line" not in text
    assert (copy.datasets / "fineweb10B_sp8192/.partial").exists()
    copy.downloads()
    copy.prepare("fineweb")
    names = copy.downloads()
    assert names.count("fineweb_train_000002.bin") == 1 and names.count("fineweb_train_000000.bin") == 1    # of bytes


def test_no_network_is_one_line(copy):
    text = copy.prepare("fineweb", code=3, FAKE_OFFLINE="1")
    lines = [line for line in text.splitlines() if "cannot reach" in line]
    assert len(lines) == 1 and "bash setup_jepa.sh demo" in lines[0]


@pytest.mark.parametrize("gpus, offline, where, why", [
    ("0", "", "demo_sp8192", "demo corpus: no CUDA device found"),
    ("8", "1", "demo_sp8192", "demo corpus instead"),
    ("8", "", "fineweb10B_sp8192", "FineWeb: a CUDA device is there"),
])
def test_default_choice_says_why(copy, demo, gpus, offline, where, why):
    fill_hub(copy.hub)
    with_demo(copy, demo)
    text = copy.setup(FAKE_GPUS=gpus, FAKE_OFFLINE=offline)
    assert why in text and (copy.datasets / where / "fineweb_val_000000.bin").exists()
    assert (copy.datasets / "fineweb10B_sp8192").exists() == (where != "demo_sp8192")
    if gpus == "8":
        assert "8 x Fake GPU" in text


# ---- bytes

TEXTS = ["Über den Wolken – the naïve café\tand 3 spaces   end.", "second “document” with 漢字 and 🙂 emoji",
         "tail of the first shard", "\u2581odd", "no\x00nul", ""]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A SentencePiece model with byte fallback, trained here."""
    import sentencepiece
    folder = tmp_path_factory.mktemp("spm")
    text = (ROOT / "data/demo/alice_valid.txt").read_text(encoding="utf-8")
    (folder / "corpus.txt").write_text(text[:40000])
    made = {}
    for name, extra in {"plain": {}, "prefix": {"add_dummy_prefix": True}}.items():
        options = dict(input=str(folder / "corpus.txt"), model_prefix=str(folder / name), vocab_size=400,
                       model_type="bpe", byte_fallback=True, add_dummy_prefix=False, bos_id=1, eos_id=2, pad_id=0,
                       unk_id=3, minloglevel=2) | extra
        sentencepiece.SentencePieceTrainer.train(**options)
        made[name] = folder / f"{name}.model"
    return made


def documents_of(values):
    """Byte values of a shard, split at the boundary mark 0."""
    return values.astype("u1").tobytes().split(b"\0")[1:]


@pytest.mark.parametrize("kind", ["plain", "prefix"])
def test_bytes_from_sentencepiece_shards(copy, small_model, kind):
    from sentencepiece import SentencePieceProcessor
    model = SentencePieceProcessor(model_file=str(small_model[kind]))
    source = copy.root / "sp"
    tokens = np.concatenate([[1, *model.encode(t)] for t in TEXTS])
    cut = len(tokens) // 3                                  # inside a document, and inside a character at best
    while not model.is_byte(int(tokens[cut])):
        cut += 1
    write_shard(source / "fineweb_train_000000.bin", tokens[:cut + 1])
    write_shard(source / "fineweb_train_000001.bin", tokens[cut + 1:])
    write_shard(source / "fineweb_val_000000.bin", [1, *model.encode("val text"), 3, *model.encode("on"), 2, 0])
    copy.prepare("bytes", SOURCE_PATH="sp", SOURCE_TOKENIZER=str(small_model[kind]), BYTES_PATH="out dir")
    out = copy.root / "out dir"
    values = np.concatenate([read_shard(out / f"fineweb_train_{i:06d}.bin") for i in range(2)])
    expected = [model.decode(model.encode(t)).replace("\0", "").encode() for t in TEXTS]
    assert documents_of(values) == expected
    assert documents_of(read_shard(out / "fineweb_val_000000.bin")) == [b"val texton"]    # unk, eos, pad: no bytes


def test_bytes_restart_and_refusals(copy, small_model):
    from sentencepiece import SentencePieceProcessor
    path = small_model["plain"]
    model, source = SentencePieceProcessor(model_file=str(path)), copy.root / "sp"
    for i in range(3):
        write_shard(source / f"fineweb_train_{i:06d}.bin", [1, *model.encode("some text " * (i + 1))])
    env = {"SOURCE_PATH": str(source), "SOURCE_TOKENIZER": str(path)}
    write_shard(source / "fineweb_val_000000.bin", [1, 60000])
    text = copy.prepare("bytes", code=1, **env)
    assert "token id 60000, but the tokenizer has 400 pieces" in text
    out = copy.datasets / "sp_bytes"
    assert (out / ".partial").exists() and not (out / "fineweb_val_000000.bin").exists()
    before = copy.state()
    assert len(before) == 3
    os.truncate(out / "fineweb_train_000001.bin", 1030)    # as if damaged since
    write_shard(source / "fineweb_val_000000.bin", [1, *model.encode("now sound")])
    copy.prepare("bytes", **env)
    after = copy.state()
    changed = {p.name for p in after if after[p] != before.get(p)}
    assert changed == {"fineweb_train_000001.bin", "fineweb_val_000000.bin"}
    assert documents_of(read_shard(out / "fineweb_train_000001.bin")) == [b"some text some text"]
    copy.prepare("bytes", **env)
    assert copy.state() == after and not (out / ".partial").exists() and sidecar(out) == BYTES
    record = json.loads((out / "source.json").read_text())
    record |= {"tokenizer": record.pop("source_tokenizer")}            # as it was written before
    (out / "source.json").write_text(json.dumps({k: v for k, v in record.items() if k != "vocab_size"}))
    copy.prepare("bytes", **env)
    assert copy.state() == after and sidecar(out) == BYTES
    assert "SOURCE_TOKENIZER" in copy.prepare("bytes", code=2, SOURCE_PATH=str(source))
    assert "no SentencePiece model" in copy.prepare("bytes", code=1, SOURCE_PATH=str(source), SOURCE_TOKENIZER="/nil")
    assert "not made by this conversion" in copy.prepare("bytes", code=2, BYTES_PATH=str(source), **env | {
        "SOURCE_PATH": str(out)})


def test_bytes_of_the_embedded_corpus(copy, demo):
    from sentencepiece import SentencePieceProcessor
    with_demo(copy, demo)
    text = copy.prepare("bytes", FAKE_OFFLINE="1")
    assert "decoding the demo corpus instead" in text
    model = SentencePieceProcessor(model_file=str(MODEL))
    for split in ("train", "val"):
        raw = documents_of(read_shard(copy.datasets / f"demo_bytes/fineweb_{split}_000000.bin"))
        decoded = documents_of(read_shard(copy.datasets / f"demo_sp8192_bytes/fineweb_{split}_000000.bin"))
        assert decoded == [model.normalize(t.decode()).replace("▁", " ").encode() for t in raw]


def test_bytes_from_the_hub(copy, small_model):
    from sentencepiece import SentencePieceProcessor
    model = SentencePieceProcessor(model_file=str(small_model["plain"]))
    root = copy.hub / "willdepueoai/parameter-golf/datasets"
    for split in ("train", "val"):
        write_shard(root / f"datasets/fineweb10B_sp1024/fineweb_{split}_000000.bin", [1, *model.encode(f"a {split}")])
    (root / "tokenizers").mkdir()
    shutil.copy(small_model["plain"], root / "tokenizers/fineweb_1024_bpe.model")
    copy.prepare("bytes")
    shard = copy.datasets / "fineweb10B_sp1024_bytes/fineweb_val_000000.bin"
    assert documents_of(read_shard(shard)) == [b"a val"]


# ---- environment

FAKE_PYTHON = '''#!/usr/bin/env bash
# Stands for an interpreter: makes "virtual environments" that hold it, logs pip, passes the rest to a real Python.
echo "$*" >>"$CALLS"
if [[ "$1 $2" == "-m venv" ]]; then
    rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"
elif [[ "$1 $2" == "-m pip" ]]; then
    [[ "$*" == *requirements* && -n "$FAIL_PIP" ]] && exit 1
    if [[ "$*" == *mamba* ]]; then [[ -n "$FAIL_MAMBA" ]] && exit 1; touch "$CALLS.mamba"; fi
    exit 0
elif [[ "$1 $2" == "-m uv" ]]; then
    exit "${FAIL_UV:-0}"
elif [[ "$*" == *'version("torch")'* ]]; then
    [[ -n "$HAS_TORCH" ]] && echo "$HAS_TORCH"
elif [[ "$*" == *importlib.metadata* ]]; then
    [[ -e "$CALLS.mamba" ]]
else
    exec "$REAL" "$@"
fi
'''


@pytest.fixture
def venv(copy, tmp_path):
    python, calls = tmp_path / "python3", tmp_path / "calls"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def run(code=0, action="env", **env):
        calls.write_text("")
        text = copy.setup(action, code=code, **{"SKIP_VENV": "", "PYTHON": str(python), "CALLS": str(calls),
                                               "REAL": sys.executable} | env)
        log = run.log = calls.read_text()
        return text, "-m venv" in log, "-r requirements.txt" in log, "mamba-ssm==" in log
    return run


def test_environment_is_made_once(copy, venv):
    assert venv()[1:] == (True, True, True)
    assert venv()[1:] == (False, False, False)
    stamp = copy.root / ".venv/.jepa-requirements"
    assert stamp.read_text().strip() == hashlib.sha256((copy.root / "requirements.txt").read_bytes()).hexdigest()
    with open(copy.root / "requirements.txt", "a") as file:
        file.write("# changed\n")
    assert venv()[1:] == (False, True, False)


def test_environment_failing_half_way_and_repeating(copy, venv):
    text, *_ = venv(code=1, FAIL_PIP="1")
    assert "pip could not install" in text and not (copy.root / ".venv/.jepa-requirements").exists()
    assert venv()[1:] == (False, True, True)
    (copy.root / ".venv/bin/python").unlink()              # half-made: repaired
    text, made, *_ = venv()
    assert made and "incomplete" in text
    shutil.rmtree(copy.root / ".venv")
    (copy.root / ".venv").symlink_to("nowhere")
    assert venv()[1]


def test_mamba_failure_is_a_warning(venv):
    text, *_ = venv(FAIL_MAMBA="1")
    assert "warning: mamba-ssm could not be installed" in text
    assert venv()[1:] == (False, False, True)              # tried again, nothing else is


def test_requirements_of_tests_are_installed_when_asked_for(copy, venv):
    stamp = copy.root / ".venv/.jepa-requirements-dev"
    venv()
    assert "requirements-dev.txt" not in venv.log and not stamp.exists()
    text, *_ = venv(action="dev", code=1, FAIL_PIP="1")
    assert "pip could not install requirements-dev.txt" in text and not stamp.exists()
    assert venv(action="dev")[1:] == (False, False, False) and "-r requirements-dev.txt" in venv.log and stamp.exists()
    venv(action="dev")
    assert "-m pip install" not in venv.log
    with open(copy.root / "requirements-dev.txt", "a") as file:
        file.write("# changed\n")
    venv(action="dev")
    assert "-r requirements-dev.txt" in venv.log


def nvidia_smi(folder, answer, code=0):
    """A folder for PATH whose nvidia-smi gives this answer."""
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{answer}'\nexit {code}\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


PIN = re.search(r"^torch==\S+", (ROOT / "requirements.txt").read_text(), re.M)[0]


@pytest.mark.parametrize("answer, code, env, cpu", [
    ("580.65.06", 0, {}, False), ("580.65.06\n580.65.06", 0, {}, False), ("No devices were found", 6, {}, True),
    ("580.65.06", 0, dict(TORCH_BUILD="cpu"), True), ("", 9, dict(TORCH_BUILD="cuda"), False),
    ("", 9, dict(HAS_TORCH=PIN.removeprefix("torch==") + "+cpu"), False), ("", 9, dict(HAS_TORCH="1.0"), True)])
def test_torch_for_cpus_where_nvidia_smi_shows_no_gpu(venv, tmp_path, answer, code, env, cpu):
    text, _, required, _ = venv(PATH=nvidia_smi(tmp_path / "smi", answer, code), **env)
    assert (f"-m uv pip install -q --python .venv/bin/python --torch-backend cpu {PIN}" in venv.log) == cpu
    assert (f"no NVIDIA GPU: installing {PIN} for CPUs" in text) == cpu and required and "cannot be fetched" not in text


def test_torch_for_cpus_that_cannot_be_fetched_is_left_to_pip(venv, tmp_path):
    text, _, required, _ = venv(PATH=nvidia_smi(tmp_path / "smi", "", 9), FAIL_UV="2")
    assert required and "cannot be fetched here" in text


def test_an_unknown_build_of_torch_is_named(venv):
    assert "TORCH_BUILD=gpu: it is auto, cuda or cpu" in venv(TORCH_BUILD="gpu", code=2)[0]


@pytest.mark.parametrize("answer, env, words", [
    ("535.183.01", {}, "NVIDIA driver 535.183.01 is too old for torch's CUDA 13: update it to 580"),
    ("580.65.06", {}, "torch cannot use the GPU that nvidia-smi shows"),
    ("535.183.01", dict(CUDA_VISIBLE_DEVICES=""), None), ("535.183.01", dict(FAKE_GPUS="1"), None), ("none", {}, None)])
def test_a_gpu_that_torch_cannot_use_is_said(copy, tmp_path, answer, env, words):
    command = ["bash", "-c", "source ./setup_jepa.sh; cuda_devices"]
    env = dict(SKIP_VENV="1", PYTHON=sys.executable, PYTHONPATH=str(copy.stubs),
               PATH=nvidia_smi(tmp_path / "smi", answer)) | env
    done = subprocess.run(command, cwd=copy.root, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == env.get("FAKE_GPUS", "0")
    assert len(done.stderr.splitlines()) == bool(words) and (words or "") in done.stderr


def test_wrong_python_is_named(copy, tmp_path):
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    assert f"PYTHON={old} is no Python 3.11" in copy.setup("env", code=1, SKIP_VENV="", PYTHON=str(old))
