"""Token shards for train_jepa.py:   python tools/prepare_data.py demo|fineweb|bytes|text|summary

demo     shards of both kinds from the embedded corpus in data/demo
fineweb  published shards and their tokenizer from the Hugging Face hub: FINEWEB_KINDS, TRAIN_SHARDS
bytes    byte shards decoded from SentencePiece shards: SOURCE_PATH, SOURCE_TOKENIZER, BYTES_PATH
text     shards of both kinds from a text of your own: TEXT_PATH, TEXT_NAME, TEXT_PIECE
summary  versions, devices and the shards that are there

The head of setup_jepa.sh, which makes the environment and then calls this file, describes these
environment variables. Relative paths count from the repository. A repeated action keeps what is
there and sound; a file gets its name when it is complete. Exit codes: 0 done, 1 failed, 2 wrong
input, 3 no network; the reason is one line on stderr.

A shard is 256 little-endian int32 (magic, version, number of tokens, zeros), then uint16 tokens:
the format of https://github.com/openai/parameter-golf. Beside the shards lies source.json. Its
fields for readers of the shards:
    tokenizer    "bytes", or the sha256 of the SentencePiece model file (64 hexadecimal digits)
    vocab_size   number of token ids: 256, or the number of pieces
Its other fields tell this file what the shards were made from.
"""
import contextlib
import hashlib
import json
import lzma
import os
import random
import re
import shutil
import sys
import time
from itertools import accumulate
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
DATASETS, TOKENIZERS, DEMO = Path("data/datasets"), Path("data/tokenizers"), Path("data/demo")
STAGING = Path("data/.download")
DEMO_MODEL = DEMO / "fineweb_8192_bpe.model"
PROGRESS_SECONDS = 10    # between lines about long work, where no bar can be shown

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
BOS = 1     # SentencePiece shards: begins each document
MARK = 0    # byte shards: begins each document and costs no bytes; a NUL of the text is dropped
# Training shards that are downloaded by default: 10,000 steps of 524,288 tokens, the most that ten
# minutes are asked for, read 52.4 published shards of 1e8 tokens.
DEFAULT_SHARDS = 53
SHARD_GB = 0.2      # of 1e8 tokens of two bytes
SHARD_NAME = re.compile(r"fineweb_(train|val)_(\d{6})\.bin")
# kind: (Hugging Face data set, folder of the shards in it and here, tokenizer)
HUB = {
    "sp8192": ("kevclark/parameter-golf", "fineweb10B_sp8192", "fineweb_8192_bpe.model"),
    "sp1024": ("willdepueoai/parameter-golf", "fineweb10B_sp1024", "fineweb_1024_bpe.model"),
    "bytes": ("mistobaan/fineweb10B_bytes", "fineweb10B_bytes", None),
}


class Failure(Exception):
    """An action that cannot go on; the message is one line and says what would be right."""
    code = 1


class UserError(Failure):
    """Invalid user input; the message names the variable or file and says how to fix it."""
    code = 2


class NoNetwork(Failure):
    """The hub does not answer; setup_jepa.sh without an argument then takes the demo."""
    code = 3


def note(text):
    print(f"prepare_data.py: {text}", flush=True)


class ProgressLines:
    """Stands for a tqdm bar in a pipe: a line every PROGRESS_SECONDS."""

    def __init__(self, total, desc):
        self.total, self.desc, self.count, self.last = total, desc, 0, time.monotonic()

    def update(self, count):
        self.count += count
        if time.monotonic() - self.last >= PROGRESS_SECONDS:
            self.last = time.monotonic()
            note(f"{self.desc}: {self.count:,} of {self.total:,}, {self.count / max(self.total, 1):.0%}")


def progress_bar(total, desc, **options):
    """A context whose value has update(n): a tqdm bar on a terminal, lines elsewhere."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm
        if sys.stderr.isatty():
            return tqdm(total=total, desc=desc, leave=False, **options)
    return contextlib.nullcontext(ProgressLines(total, desc))


# ---- files

def read_json(path):
    """The object in a JSON file; {} if it is missing or damaged."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path, value):
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def copy_file(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sentencepiece_model(path):
    from sentencepiece import SentencePieceProcessor
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise Failure(f"{path} is no SentencePiece model ({first_line(error)})") from None


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- shards

def count_tokens(path):
    """Number of tokens of a shard; ValueError with the defect unless it is sound."""
    header = np.fromfile(path, "<i4", HEADER_INTS)
    if len(header) < HEADER_INTS or header[0] != MAGIC:
        raise ValueError("no shard: the magic number is missing")
    if header[1] != VERSION:
        raise ValueError(f"version {header[1]} instead of {VERSION}")
    expected, size = 4 * HEADER_INTS + 2 * int(header[2]), path.stat().st_size
    if header[2] < 0 or size != expected:
        raise ValueError(f"{size:,} bytes instead of {expected:,}")
    return int(header[2])


def is_sound(path):
    try:
        return count_tokens(path) >= 0
    except (OSError, ValueError):
        return False


def read_shard(path):
    """Tokens (n,) uint16 of a shard as a read-only memory map; Failure unless it is sound."""
    try:
        count = count_tokens(path)
    except (OSError, ValueError) as error:
        raise Failure(f"{path}: {error}") from None
    return np.memmap(path, "<u2", "r", 4 * HEADER_INTS, (count,)) if count else np.empty(0, "<u2")


def write_shard(path, tokens):
    """Write a shard: under a temporary name, renamed when it is complete.

    tokens: an array (n,), or an iterable of such arrays that are written one after the other.
    Returns the number of tokens."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, count = path.with_name(f".{path.name}.tmp"), 0
    with open(temporary, "wb") as file:
        file.write(bytes(4 * HEADER_INTS))
        for part in [tokens] if isinstance(tokens, np.ndarray) else tokens:
            file.write(np.ascontiguousarray(part, "<u2").data)
            count += len(part)
        if count >= 2**31:
            raise Failure(f"{path}: {count:,} tokens are too many for one shard")
        header = np.zeros(HEADER_INTS, "<i4")
        header[:3] = MAGIC, VERSION, count
        file.seek(0)
        file.write(header.data)
    os.replace(temporary, path)
    return count


def shards_in(folder, split=None):
    """Shard files of a folder in reading order, training first; of one split if it is given."""
    shards = [(match[1] != "train", match[2], path) for path in folder.glob("*.bin")
              if (match := SHARD_NAME.fullmatch(path.name)) and split in (None, match[1])]
    return [path for *_, path in sorted(shards)]


def split_of(path):
    return SHARD_NAME.fullmatch(path.name)[1]


def train_limit(default=None):
    """TRAIN_SHARDS as a number; `default` where it is not set; None (no limit) for "all"."""
    text = os.environ.get("TRAIN_SHARDS", "")
    if text in ("", "all"):
        return None if text else default
    if not (text.isdecimal() and int(text) > 0):
        raise UserError(f"TRAIN_SHARDS={text}: it is a number of shards, 1 or more, or all")
    return int(text)


# ---- source.json: what the tokens of a folder of shards are

def token_facts(tokenizer=None):
    """The fields of source.json for readers: of a SentencePiece model file, else of bytes."""
    if tokenizer is None:
        return {"tokenizer": "bytes", "vocab_size": 256}
    return {"tokenizer": sha256(tokenizer),
            "vocab_size": sentencepiece_model(tokenizer).vocab_size()}


def write_source(folder, source, tokenizer=None):
    """Write source.json, unless it says the same already: what the shards were made from, and
    the fields for readers."""
    record = source | token_facts(tokenizer)
    if read_json(folder / "source.json") != record:
        write_json(folder / "source.json", record)


def made_from(folder):
    """source.json without the fields for readers, which older ones lack."""
    return {key: value for key, value in read_json(folder / "source.json").items()
            if key not in ("tokenizer", "vocab_size")}


# ---- documents to shards: demo and text

BATCH = 256         # documents that are encoded together


def byte_document(text):
    data = np.frombuffer(text.encode(), np.uint8)
    return np.concatenate(([MARK], data[data != MARK])).astype("<u2")


def encoded(documents, kind, model, bar):
    """Yield the tokens of the documents, an array (n,) uint16 per batch. kind: sp8192 or bytes."""
    for start in range(0, len(documents), BATCH):
        batch = documents[start:start + BATCH]
        if kind == "bytes":
            parts = map(byte_document, batch)
        else:
            parts = ([BOS, *ids] for ids in model.encode(batch, num_threads=os.cpu_count() or 1))
        yield np.concatenate([np.asarray(part, "<u2") for part in parts])
        bar.update(len(batch))


def single_shards(folder):
    """{split: path} of a data set with one shard per split."""
    return {split: folder / f"fineweb_{split}_000000.bin" for split in ("train", "val")}


TOKENIZER_OF = {"sp8192": DEMO_MODEL, "bytes": None}


def stale_folders(name, source):
    """{kind: folder} of the data sets NAME_sp8192 and NAME_bytes that are missing, damaged or were
    made from another `source`. The others get the fields for readers if those are missing."""
    stale = {}
    for kind, tokenizer in TOKENIZER_OF.items():
        folder = DATASETS / f"{name}_{kind}"
        sound = all(map(is_sound, single_shards(folder).values()))
        if sound and made_from(folder) == source:
            write_source(folder, source, tokenizer)
        else:
            stale[kind] = folder
    return stale


def write_folders(folders, documents, source):
    """One shard per split in each of `folders` ({kind: folder}). documents: {split: texts}."""
    model = sentencepiece_model(DEMO_MODEL)
    for kind, folder in folders.items():
        for split, path in single_shards(folder).items():
            texts = documents[split]
            with progress_bar(len(texts), desc=folder.name) as bar:
                count = write_shard(path, encoded(texts, kind, model, bar))
            note(f"{path}: {len(texts)} document(s), {count:,} tokens")
        write_source(folder, source, TOKENIZER_OF[kind])


def read_text(path):
    """Text of a UTF-8 file, plain or .xz, without a byte order mark; UserError for others."""
    try:
        data = path.read_bytes()
        data = lzma.decompress(data) if path.suffix == ".xz" else data
        return data.decode().removeprefix("\ufeff")
    except (OSError, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
    except UnicodeDecodeError as error:
        encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        decompressed = ", decompressed," if path.suffix == ".xz" else ""
        raise UserError(f"{path}:{decompressed} is no UTF-8: byte {error.start:,} is "
                        f"0x{data[error.start]:02x}; convert it, such as: iconv -f {encoding} "
                        "-t utf-8 OLD >NEW") from None


def cut_and_shuffle(documents, size):
    """The documents cut before paragraphs into pieces of about `size` characters, in a fixed random
    order: a short run then sees a bit of everything; whole novels in a row would teach it one
    voice after the other."""
    pieces = []
    for document in documents:
        piece = ""
        for paragraph in document.split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) >= size:
                pieces.append(piece)
                piece = ""
        if piece.strip():
            pieces.append(piece)
    random.Random(0).shuffle(pieces)
    return pieces


# ---- demo: the embedded corpus

DEMO_PIECE = 8000   # characters
DEMO_LAYOUT = 1     # raised when `lay_out` changes: shards made before are then made anew


def wrap(text, width):
    """`text` cut at spaces into lines of at most `width` columns, longer ones where a word is."""
    lines = []
    while len(text) > width:
        cut = text.rfind(" ", 1, width + 1)
        if cut < 0 and (cut := text.find(" ", width)) < 0:
            break
        lines.append(text[:cut])
        text = text[cut + 1:]
    return "\n".join([*lines, text])


def lay_out(piece, rng):
    """The piece set as one of many plain-text editions might set it.

    In the file of novels most paragraphs are one line with single spaces and straight double
    quotes. A byte model that has seen this layout only fails on any other. So lines of 60 to 75
    columns, indents, wide spaces after sentences and `single quotes' are chosen by `rng`."""
    width, indent = rng.randint(60, 75), " " * rng.choice((0, 2, 4))
    gap, single_quotes = " " * rng.randint(1, 2), rng.random() < 0.5
    paragraphs = [" ".join(paragraph.split()) for paragraph in piece.split("\n\n")]
    if single_quotes:
        paragraphs = [re.sub(r'"([^"]*)"', r"`\1'", text) for text in paragraphs]
    paragraphs = [re.sub(r"([.!?:;][\"']?) (?=\S)", r"\1" + gap, text) for text in paragraphs]
    return "\n\n".join(wrap(indent + text, width) if text else text for text in paragraphs)


def prepare_demo():
    """data/datasets/demo_sp8192 and demo_bytes: novels for training, Alice for validation."""
    novels, alice = DEMO / "novels_train.txt.xz", DEMO / "alice_valid.txt"
    for path in (DEMO_MODEL, novels, alice):
        if not path.is_file():
            raise Failure(f"{path} is missing: the demo corpus is the folder data/demo of the "
                          "repository; FineWeb instead: bash setup_jepa.sh fineweb")
    source = {path.name: sha256(path) for path in (DEMO_MODEL, novels, alice)}
    source |= {"piece": DEMO_PIECE, "layout": DEMO_LAYOUT}
    if not (TOKENIZERS / DEMO_MODEL.name).is_file():
        copy_file(DEMO_MODEL, TOKENIZERS / DEMO_MODEL.name)
    folders = stale_folders("demo", source)
    if folders:
        rng = random.Random(1)
        pieces = cut_and_shuffle(read_text(novels).split("\f\n"), DEMO_PIECE)
        documents = {"train": [lay_out(piece, rng) for piece in pieces],
                     "val": read_text(alice).split("\f\n")}
        write_folders(folders, documents, source)


# ---- text: a text of the user's

HELD_OUT, HELD_OUT_BYTES = 0.02, 64_000    # of a text without pieces: the larger, at most half


def held_out_start(data):
    """Where the held-out end of a text begins: data (UTF-8) -> (index, what begins there).

    The last place before a paragraph, else a line, else a word, that holds out the wanted share
    but at most twice as much and half of the rest; any character where there is none."""
    share = min(max(int(HELD_OUT * len(data)), HELD_OUT_BYTES), len(data) // 2)
    latest = len(data) - share
    for mark, name in ((b"\n\n", "paragraph"), (b"\r\n\r\n", "paragraph"), (b"\n", "line"),
                       (b" ", "word")):
        start = data.rfind(mark, max(latest - share, latest // 2), latest)
        if start >= 0:
            return start + len(mark), name
    while latest < len(data) and data[latest] & 0xC0 == 0x80:    # inside a character
        latest += 1
    return latest, "character"


def split_text(path, text):
    """{split: documents} of a text: the first 2% of its pieces are held out for validation, or the
    end of a text without pieces. A line says which."""
    pieces = [piece for piece in re.split(r"\f\r?\n", text) if piece.strip()]
    if len(pieces) > 1:
        count = max(1, len(pieces) // 50)
        note(f"{path}: {len(pieces):,} pieces, of which the first {count} are held out for "
             "validation")
        return {"train": pieces[count:], "val": pieces[:count]}
    data = (pieces or [""])[0].encode()
    start, name = held_out_start(data)
    documents = {"train": [data[:start].decode()], "val": [data[start:].decode()]}
    if not all(texts[0].strip() for texts in documents.values()):
        raise UserError(f"TEXT_PATH={path}: {len(data):,} bytes of text cannot give training and "
                        "validation")
    rest = len(data) - start
    note(f"{path}: no form feeds between pieces, so the last {rest:,} of {len(data):,} bytes "
         f"({rest / len(data):.1%}), from the beginning of a {name}, are held out for validation")
    return documents


def text_name(path):
    """TEXT_NAME or the file's name; UserError if it would make another's folder."""
    name = os.environ.get("TEXT_NAME") or re.sub(r"[^\w-]+", "-", path.name.split(".")[0])
    if not re.fullmatch(r"\w[\w.-]*", name) or re.match(r"demo$|fineweb10B", name):
        raise UserError(f"TEXT_NAME={name}: it is the beginning of a folder's name, other than "
                        "demo and fineweb10B...; give one: TEXT_NAME=mine")
    return name


def prepare_text():
    """data/datasets/NAME_sp8192 and NAME_bytes from the text TEXT_PATH."""
    path = Path(os.environ.get("TEXT_PATH", ""))
    if not (path.is_file() and os.access(path, os.R_OK)):
        raise UserError(f"TEXT_PATH={path}: it names a UTF-8 text file, plain or .xz")
    name, size = text_name(path), os.environ.get("TEXT_PIECE") or "0"
    if not size.isdecimal():
        raise UserError(f"TEXT_PIECE={size}: it is a number of characters, or 0")
    source = {"text": sha256(path), "piece": int(size)}
    folders = stale_folders(name, source)
    if folders:
        try:
            text = read_text(path)
        except UserError as error:
            raise UserError(f"TEXT_PATH={error}") from None
        documents = split_text(path, text)
        if int(size):
            documents = {split: cut_and_shuffle(texts, int(size))
                         for split, texts in documents.items()}
        write_folders(folders, documents, source)
    else:
        note(f"{DATASETS / name}_sp8192 and {DATASETS / name}_bytes: complete")
    note(f"train on them: DATA_PATH={DATASETS / name}_sp8192 bash run_jepa_bpe.sh, or "
         f"DATA_PATH={DATASETS / name}_bytes bash run_jepa_byte.sh")


# ---- fineweb: download from the Hugging Face hub

def hub():
    quiet = "0" if sys.stderr.isatty() else "1"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", quiet)
    import huggingface_hub
    return huggingface_hub


def remote_files(repo):
    """Names of all files of a Hugging Face data set; NoNetwork when it cannot be asked."""
    try:
        info = hub().HfApi().dataset_info(repo, timeout=15)
        return [sibling.rfilename for sibling in info.siblings]
    except Exception as error:             # the client raises a dozen unrelated types for one cause
        raise NoNetwork(f"cannot reach the Hugging Face data set {repo} ({first_line(error)}); "
                        "with network repeat this command, without: bash setup_jepa.sh "
                        "demo") from None


def shortest_named(files, name):
    """The remote path with the file name `name` that is the shortest; None if there is none."""
    return min((f for f in files if Path(f).name == name), key=len, default=None)


def download(repo, name, target, force=False):
    """One file, resumed where an earlier try stopped, moved to `target` when it is complete."""
    staging = STAGING / repo.replace("/", "--")
    try:
        path = Path(hub().hf_hub_download(repo_id=repo, filename=name, repo_type="dataset",
                                          local_dir=str(staging), force_download=force))
    except Exception as error:             # as above
        raise Failure(f"download of {name} from {repo} broke off ({first_line(error)}); repeat "
                      "this command: finished shards stay") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or not path.resolve().is_relative_to(staging.resolve()):
        copy_file(path, target)            # a link into the hub's cache: the cache keeps its file
    else:
        os.replace(path, target)


def manifest_counts(repo, files, folder):
    """{split: number of shards} as manifest.json of the data set counts them; {} without one."""
    manifest = shortest_named(files, "manifest.json")
    entry = {}
    if manifest:
        download(repo, manifest, DATASETS / folder / "manifest.json", force=True)
        entries = read_json(DATASETS / folder / "manifest.json").get("datasets", [])
        entry = next((e for e in entries if isinstance(e, dict) and e.get("name") == folder), {})
    stats = entry.get("stats") or {}
    counts = {split: stats.get(f"files_{split}") for split in ("train", "val")}
    if all(isinstance(count, int) for count in counts.values()):
        return counts
    note(f"{repo}: no manifest.json with counts for {folder}; all shards listed there are taken")
    return {}


def remote_shards(repo, files, folder):
    """{split: remote paths of its shards in order}, as many as the manifest counts."""
    shards = [f for f in files if SHARD_NAME.fullmatch(Path(f).name)]
    if len({Path(f).parent for f in shards}) != 1:     # otherwise all are of one data set
        shards = [f for f in shards if Path(f).parent.name == folder]
    counts, plan = manifest_counts(repo, files, folder), {}
    for split in ("val", "train"):
        paths = sorted((f for f in shards if split_of(Path(f)) == split),
                       key=lambda f: Path(f).name)
        count = counts.get(split, max(1, len(paths)))
        if len(paths) < count:
            raise Failure(f"{repo} holds {len(paths)} {split} shards of {folder}, "
                          f"{count} are wanted")
        plan[split] = paths[:count]
    return plan


def fetch_shard(repo, name, target):
    """A sound shard at `target`, downloaded if missing or damaged; Failure if damaged twice."""
    for attempt in range(2):
        if target.exists():
            try:
                count_tokens(target)
                return
            except ValueError as error:
                note(f"{target} is damaged ({error}): fetching it again")
                target.unlink()
        download(repo, name, target, force=attempt > 0)
    try:
        count_tokens(target)
    except ValueError as error:
        target.unlink()
        raise Failure(f"{name} of {repo} is damaged ({error}), twice; repeat this command "
                      "later") from None


def is_complete(folder, repo, tokenizer, limit):
    """True if the record of an earlier download names `repo` and all its shards are sound."""
    record = read_json(folder / "source.json")
    if record.get("repo") != repo or (folder / ".partial").exists():
        return False
    if tokenizer and not (TOKENIZERS / tokenizer).is_file():
        return False
    return all(is_sound(folder / name) for name in record["val"] + record["train"][:limit])


def fetch(kind):
    """The shards of one kind and their tokenizer in data/; asks nobody when they are complete."""
    repo, name, tokenizer = HUB[kind]
    folder, limit = DATASETS / name, train_limit(DEFAULT_SHARDS)
    model = TOKENIZERS / tokenizer if tokenizer else None
    if is_complete(folder, repo, tokenizer, limit):
        write_source(folder, made_from(folder), model)
        note(f"{folder}: complete")
        return
    files = remote_files(repo)
    plan = remote_shards(repo, files, name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".partial").touch()          # the run scripts take no folder that has this file
    if tokenizer:
        remote = shortest_named(files, tokenizer)
        if remote is None:
            raise Failure(f"{repo} holds no {tokenizer}")
        download(repo, remote, model)
        sentencepiece_model(model)
    shards = plan["val"] + plan["train"][:limit]
    left = len(plan["train"][len(shards) - len(plan["val"]):])
    more = f"; TRAIN_SHARDS=all takes {left} more" if left else ""
    note(f"{folder}: {len(shards)} shards of {repo}, up to {SHARD_GB * len(shards):.1f} GB{more}")
    with progress_bar(len(shards), desc=name, unit="shard") as bar:
        for remote in shards:
            fetch_shard(repo, remote, folder / Path(remote).name)
            bar.update(1)
    record = {split: [Path(f).name for f in paths] for split, paths in plan.items()}
    write_source(folder, {"repo": repo, **record}, model)
    (folder / ".partial").unlink()
    note(f"{folder}: complete, {len(shards)} shards")


def prepare_fineweb():
    """The published shards of FINEWEB_KINDS (default: sp8192 and bytes)."""
    kinds = os.environ.get("FINEWEB_KINDS", "sp8192 bytes").split()
    if not kinds or not set(kinds) <= set(HUB):
        raise UserError(f"FINEWEB_KINDS={' '.join(kinds)}: it lists some of {', '.join(HUB)}")
    for kind in kinds:
        fetch(kind)
    shutil.rmtree(STAGING, ignore_errors=True)


# ---- bytes: SentencePiece shards decoded to byte shards, in constant memory

class Decoder:
    """Tables from token ids to bytes, by the rule of the byte accounting.

    A boundary is a control, unknown or unused piece. A piece after a boundary loses its leading
    space. BOS becomes MARK, other boundaries nothing."""

    def __init__(self, path):
        model = sentencepiece_model(path)
        pieces, count = [], model.vocab_size()
        self.boundary = np.array([model.is_control(i) or model.is_unknown(i) or model.is_unused(i)
                                  for i in range(count)])
        self.leading_space = np.zeros(count, bool)
        for i in range(count):
            piece = model.id_to_piece(i)
            if self.boundary[i]:
                pieces.append(bytes([MARK]) if i == model.bos_id() else b"")
            elif model.is_byte(i):
                pieces.append(bytes([int(piece[3:5], 16)]).replace(bytes([MARK]), b""))
            else:
                pieces.append(piece.replace("▁", " ").encode().replace(bytes([MARK]), b""))
                self.leading_space[i] = piece.startswith("▁")
        self.bytes = np.frombuffer(b"".join(pieces), np.uint8)
        self.length = np.array([len(piece) for piece in pieces])
        self.start = np.array([0, *accumulate(self.length.tolist())])[:-1]

    def decode(self, ids, after_boundary):
        """ids (n,) -> bytes (m,) uint8. after_boundary: the id before ids[0] is a boundary."""
        boundary = self.boundary[ids]
        dropped = self.leading_space[ids] & np.concatenate(([after_boundary], boundary[:-1]))
        length, start = self.length[ids] - dropped, self.start[ids] + dropped
        ends = np.cumsum(length)
        total = ends[-1] if len(ends) else 0
        return self.bytes[np.repeat(start - (ends - length), length) + np.arange(total)]

    def stream(self, path, after_boundary, bar, chunk=1 << 20):
        """Yield the bytes of a shard, an array per `chunk` tokens."""
        ids, count = read_shard(path), len(self.boundary)
        for begin in range(0, len(ids), chunk):
            part = np.array(ids[begin:begin + chunk])
            if part.max() >= count:
                raise Failure(f"{path}: token id {part.max()}, but the tokenizer has "
                              f"{count} pieces")
            yield self.decode(part, after_boundary)
            after_boundary = bool(self.boundary[part[-1]])
            bar.update(len(part))

    def ends_with_boundary(self, path):
        ids = read_shard(path)
        return not len(ids) or bool(self.boundary[ids[-1]])


def decode_source():
    """(folder of SentencePiece shards, its tokenizer): the user's, else FineWeb, else the demo."""
    if "SOURCE_PATH" in os.environ:
        if "SOURCE_TOKENIZER" not in os.environ:
            raise UserError("SOURCE_PATH needs SOURCE_TOKENIZER, the shards' SentencePiece model")
        return Path(os.environ["SOURCE_PATH"]), Path(os.environ["SOURCE_TOKENIZER"])
    _, folder, tokenizer = HUB["sp1024"]
    try:
        fetch("sp1024")
        return DATASETS / folder, TOKENIZERS / tokenizer
    except NoNetwork as error:
        note(f"{error}".split("; ")[0] + ": decoding the demo corpus instead")
    prepare_demo()
    return DATASETS / "demo_sp8192", DEMO_MODEL


def begin_conversion(output, folder, tokenizer):
    """The record of the conversion into `output`, empty if that holds nothing or other shards."""
    record = read_json(output / "source.json")
    origin = {"source_tokenizer": sha256(tokenizer), "folder": str(folder.resolve())}
    if "source_tokenizer" not in record and "tokenizer" in record:    # an older form
        record |= {"source_tokenizer": record["tokenizer"]}
    if shards_in(output) and "shards" not in record:
        raise UserError(f"{output} holds shards that were not made by this conversion; "
                        "name another folder: BYTES_PATH=")
    output.mkdir(parents=True, exist_ok=True)
    (output / ".partial").touch()
    if {key: record.get(key) for key in origin} != origin:
        for path in shards_in(output):     # decoded from other shards or with another tokenizer
            path.unlink()
        record = origin | {"mark": MARK, "shards": {}}
    write_source(output, record)
    return record | token_facts()


def prepare_bytes():
    """Byte shards BYTES_PATH (default: data/datasets/NAME_bytes) from SentencePiece shards."""
    folder, tokenizer = decode_source()
    shards = shards_in(folder, "train")[:train_limit()] + shards_in(folder, "val")
    if not shards:
        raise UserError(f"{folder} holds no shards named fineweb_train_NNNNNN.bin or "
                        "fineweb_val_NNNNNN.bin")
    output = Path(os.environ.get("BYTES_PATH") or DATASETS / f"{folder.resolve().name}_bytes")
    if output.resolve() == folder.resolve():
        raise UserError(f"BYTES_PATH={output} is the source folder itself")
    decoder = Decoder(tokenizer)
    counts = {path: len(read_shard(path)) for path in shards}
    record = begin_conversion(output, folder, tokenizer)
    with progress_bar(sum(counts.values()), desc=output.name, unit="token", unit_scale=True) as bar:
        for before, path in zip([None, *shards], shards):
            target, source = output / path.name, [counts[path], path.stat().st_mtime_ns]
            entry = record["shards"].get(path.name, {})
            if (entry.get("source") == source and is_sound(target)
                    and count_tokens(target) == entry["bytes"]):
                bar.update(counts[path])
                continue
            # The shard may begin with the rest of a document of the shard before it.
            first = before is None or split_of(before) != split_of(path)
            after_boundary = first or decoder.ends_with_boundary(before)
            count = write_shard(target, decoder.stream(path, after_boundary, bar))
            record["shards"][path.name] = {"source": source, "bytes": count}
            write_json(output / "source.json", record)
            note(f"{target}: {count:,} values from {counts[path]:,} tokens")
    (output / ".partial").unlink()
    note(f"{output}: {len(shards)} byte shards, documents begin with {MARK}")


# ---- summary

def package_version(name):
    from importlib.metadata import PackageNotFoundError, version
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def print_summary():
    """Versions, devices, and the data sets with their numbers of shards and tokens."""
    print(f"\nSummary\n  Python     {sys.version.split()[0]}  {sys.executable}")
    try:
        import torch
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        devices = ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names))
        print(f"  torch      {torch.__version__}")
        cuda = torch.version.cuda or "not in this build"
        print(f"  CUDA       {cuda}; {devices or 'no GPU found'}")
    except ImportError as error:
        print(f"  torch      cannot be imported: {error}")
    print(f"  mamba-ssm  {package_version('mamba_ssm') or 'not installed (optional)'}")
    folders = [folder for folder in sorted(DATASETS.glob("*")) if shards_in(folder)]
    for folder in folders:
        parts = []
        for split in ("train", "val"):
            counts = [count_tokens(path) for path in shards_in(folder, split) if is_sound(path)]
            parts.append(f"{split} {len(counts)} shard(s), {sum(counts):,} tokens")
        state = "  (incomplete)" if (folder / ".partial").exists() else ""
        print(f"  {folder}: {'; '.join(parts)}{state}")
    if not folders:
        print(f"  no shards in {DATASETS}")


ACTIONS = {"demo": prepare_demo, "fineweb": prepare_fineweb, "bytes": prepare_bytes,
           "text": prepare_text, "summary": print_summary}


def main(argv=None):
    """Run the action that argv names in the repository's folder; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if len(argv) != 1 or argv[0] not in ACTIONS:
            raise UserError(f"usage: python tools/prepare_data.py {'|'.join(ACTIONS)}")
        os.chdir(ROOT)
        ACTIONS[argv[0]]()
        return 0
    except Failure as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
