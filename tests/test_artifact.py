"""The container, the codecs, the artifact: round trips to the bit; files that are damaged, foreign or hostile."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import random
import struct
import time
import zlib
from pathlib import Path

import harness
import numpy as np
import pytest
import torch

import train_jepa as tj

FUZZ = int(os.environ.get("FUZZ_COUNT", 2000))  # mutated files per run; 10,000 for the long test
CONFIG = {"MODEL_DIM": 64, "TOKENIZER": "byte", "temperature": 0.97, "nested": {"a": [1, None, True]}}
GRIDS = ["int4", "int5", "int6", "int7", "int8a", "int4s0.35", "int8", "int8f", "fp8", "bf16", "fp16", "fp32"]
CODECS = ["rans", "zlib", "zstd", "brotli", "lzma"]


def bits(t):
    return t.contiguous().view(torch.int32)


def small(seed=0):
    g = torch.Generator().manual_seed(seed)
    t = {
        f"{grid}.{i}": (torch.randn(shape, generator=g) * 0.03 * (i + 1), tj.Grid.parse(grid))
        for grid in GRIDS
        for i, shape in enumerate([(33, 15), (7, 64), (5, 1, 4), (11,)])
    }
    return t | {
        "zero": (torch.zeros(9, 9), tj.Grid.parse("int4")),
        "none": (torch.zeros(0, 3), tj.Grid.parse("int4")),
        "scalar": (torch.tensor(1.5), tj.Grid.parse("bf16")),
    }


def full_bpe(seed=0):
    """The stored tensors of the full BPE model, 32.8M numbers; all matrices from N(0, 0.03^2)."""
    g = torch.Generator().manual_seed(seed)
    t, d, e, v = {}, 640, 336, 8192

    def put(name, grid, *shape):
        t[name] = (torch.randn(shape, generator=g) * 0.03 + (0 if len(shape) == 2 else 1), tj.Grid.parse(grid))

    put("token_embed", "fp8", v, e)
    put("embed_proj", "int4", d, e)
    put("embed_proj_rev", "int4", e, d)
    put("vocab_bias", "bf16", v)
    put("skip", "bf16", 5, d)
    for i in range(10):
        put(f"blocks.{i}.in_proj", "int4", 2 * d + 128 + 10, d)
        put(f"blocks.{i}.out_proj", "int4", d, d)
        put(f"blocks.{i}.conv", "bf16", d + 128, 1, 4)
        for name, n in (
            ("conv_bias", d + 128),
            ("norm", d),
            ("ssm_scale", d),
            ("mix", 2 * d),
            ("dt_bias", 10),
            ("A_log", 10),
        ):
            put(f"blocks.{i}.{name}", "bf16", n)
        if i % 2 == 0:
            put(f"blocks.{i}.fc", "int4", 4 * d, d)
            put(f"blocks.{i}.down", "int4", d, 4 * d)
    return t


def same(tensors, got):
    assert list(tensors) == list(got)
    for name, (w, grid) in tensors.items():
        assert got[name].shape == w.shape and torch.equal(bits(got[name]), bits(tj.snap(w, grid))), name


def reseal(data: bytes) -> bytes:
    return data + hashlib.sha256(data).digest()


def rebuild(path, edit=None, text=None, payload=None):
    """The file with another header (edited or given as text) or payload; prefix sizes and checksum made right."""
    data = path.read_bytes()
    magic, version, stored, raw = tj.PREFIX.unpack(data[: tj.PREFIX.size])
    header = json.loads(zlib.decompress(data[tj.PREFIX.size : tj.PREFIX.size + stored]))
    if edit:
        header = edit(header) or header
    text = json.dumps(header).encode() if text is None else text
    head = zlib.compress(text)
    body = data[tj.PREFIX.size + stored : -32] if payload is None else payload
    path.write_bytes(reseal(tj.PREFIX.pack(magic, version, len(head), len(text)) + head + body))
    return path


@pytest.fixture(scope="module")
def artifact_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "m"
    tj.write_artifact(path, CONFIG, small(), ("rans",))
    return path.read_bytes()


@pytest.fixture
def artifact(tmp_path, artifact_bytes):
    (tmp_path / "model.jepa").write_bytes(artifact_bytes)
    return tmp_path / "model.jepa"


def refused(path, match=".", reader=None):
    with pytest.raises(tj.UserError, match=match) as caught:
        (reader or tj.read_artifact)(path)
    message = str(caught.value)
    assert message.count(str(path)) == 1 and message.isprintable() and len(message) < len(str(path)) + 260


# ------------------------------------------------------------------------------------------------ round trips
@pytest.mark.parametrize("codecs", [*((c,) for c in CODECS), tuple(CODECS)])
def test_file_round_trip_to_the_bit(tmp_path, codecs):
    tensors = small()
    report = tj.write_artifact(tmp_path / "m", CONFIG, tensors, codecs)
    config, got, grids = tj.read_artifact(tmp_path / "m")
    same(tensors, got)
    assert config == CONFIG and {n: str(g) for n, g in grids.items()} == {n: str(g) for n, (_, g) in tensors.items()}
    assert report["bytes"] == (tmp_path / "m").stat().st_size and report["codec"] in codecs
    assert (
        set(report["codec_bytes"]) == set(codecs)
        and min(report["codec_bytes"].values()) == report["codec_bytes"][report["codec"]]
    )
    first = (tmp_path / "m").read_bytes()
    tj.write_artifact(tmp_path / "m", CONFIG, tensors, codecs)
    assert (tmp_path / "m").read_bytes() == first and os.listdir(tmp_path) == ["m"]


def test_empty_models(tmp_path):
    for tensors in (
        {},
        {"a": (torch.zeros(0, 5), tj.Grid.parse("int4"))},
        {"b": (torch.zeros(3, 0), tj.Grid.parse("fp8"))},
        {"c": (torch.zeros(1), tj.Grid.parse("bf16"))},
        {"d": (torch.zeros(1, 1), tj.Grid.parse("int4"))},
    ):
        tj.write_artifact(tmp_path / "m", {}, tensors)
        same(tensors, tj.read_artifact(tmp_path / "m")[1])


def test_rans_on_every_kind_of_stream():
    rng = np.random.default_rng(0)
    for lengths in ([0], [1], [2], [3, 0, 1], [4097, 4096, 4095], [70_000, 5, 33_333], [3_000_000]):
        for make in (
            lambda n: rng.integers(0, 256, n),
            lambda n: np.full(n, 7),
            lambda n: rng.geometric(0.9, n).clip(0, 255),
            lambda n: np.where(rng.random(n) < 1e-5, 200, 3),
        ):
            data = make(sum(lengths)).astype(np.uint8)
            coded = tj.rans_encode(data, lengths)
            assert np.array_equal(tj.rans_decode(coded, lengths), data)
            if sum(lengths) > 10**6:  # tables, lanes and the precision of frequencies cost under 0.2% of 8 bits
                assert len(coded) < tj.entropy_bytes(data) + 0.002 * len(data) + 1200


def test_frequencies_sum_and_cover():
    rng = np.random.default_rng(0)
    for _ in range(300):
        counts = (rng.random(256) < rng.random()) * rng.geometric(10.0 ** -rng.integers(0, 7), 256)
        f = tj.frequencies(counts)
        assert ((f > 0) == (counts > 0)).all() and f.sum() == (1 << tj.BITS if counts.any() else 0)


def test_estimate_predicts_the_file(tmp_path):
    """Under 2% for models of 0.3 to 1 MB of several grids; the large one is held in test_full_model."""
    g = torch.Generator().manual_seed(0)
    for grid, tail in (
        ("int4", 0.0),
        ("int5", 0.3),
        ("int4s0.35", 0.5),
        ("int4s0.5", 0.0),
        ("int8", 0.2),
        ("fp8", 0.4),
    ):
        tensors = {
            f"m{i}": (
                torch.randn(400, 320, generator=g) * (torch.randn(400, 1, generator=g) * tail).exp() * 0.03,
                tj.Grid.parse(grid),
            )
            for i in range(5)
        }
        estimate = tj.estimate_bytes(tensors)
        real = tj.write_artifact(tmp_path / "m", CONFIG, tensors, ("rans", "zlib"))["bytes"]
        assert abs(estimate / real - 1) < 0.02, (grid, estimate, real)


@pytest.mark.parametrize("share", (0.8, 0.97, 1.15))
def test_fitted_steps_fill_the_budget_and_change_no_other_grid(tmp_path, share):
    """A normal weight's entropy falls by the logarithm of the step: that says where the factor must end."""
    g, parse = torch.Generator().manual_seed(2), tj.Grid.parse
    tensors = {"a": (torch.randn(512, 400, generator=g), parse("int4s0.385")),
               "b": (torch.randn(300, 200, generator=g), parse("int4s0.5")),
               "c": (torch.randn(100, 200, generator=g), parse("int8a")), "d": (torch.randn(90), parse("bf16"))}
    plain = tj.estimate_bytes(tensors)
    budget, seen = int(share * plain), []
    rounded = lambda scaled: seen.append(scaled) or {"a": tj.encode(*scaled["a"])}
    fitted, given, factor, estimate = tj.fit_steps(tensors, budget, rounded)
    assert fitted is seen[-1] and len(seen) <= 4 and estimate == tj.estimate_bytes(fitted, given)
    size = tj.write_artifact(tmp_path / "m", CONFIG, fitted, ("rans",), given=given)["bytes"]
    assert abs(size - 0.9985 * budget) < 0.003 * budget
    weights = 512 * 400 + 300 * 200
    assert abs(math.log2(factor) - 8 * (plain - 0.9985 * budget) / weights) < 0.03
    read = tj.read_artifact(tmp_path / "m")[2]
    assert [str(read[name]) for name in "abcd"] == [f"int4s{0.385 * factor:.4g}", f"int4s{0.5 * factor:.4g}", "int8a",
                                                    "bf16"]
    same(fitted, tj.read_artifact(tmp_path / "m")[1])


def test_fitted_steps_stop_at_half_and_at_twice_the_step_that_was_asked_for():
    tensors = {"w": (torch.randn(64, 64, generator=torch.Generator().manual_seed(3)), tj.Grid.parse("int4s0.4"))}
    for budget, factor in ((1, 2.0), (1 << 30, 0.5)):
        fitted, _, found, _ = tj.fit_steps(tensors, budget)
        assert found == factor and str(fitted["w"][1]) == f"int4s{0.4 * factor:.4g}"
    assert tj.fit_steps({"w": (torch.ones(8), tj.Grid.parse("bf16"))}, 10)[1:3] == ({}, 2.0)


@pytest.mark.parametrize("turn", (False, True))
@pytest.mark.parametrize("grid", ("fp8", "int4"))
def test_the_direction_of_unlike_statistics_is_found(tmp_path, grid, turn):
    """An embedding's rows share a mean, so its columns are narrow; behind relu^2 columns are of unlike size."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(1, 96, generator=g) + 0.3 * torch.randn(3000, 96, generator=g) if grid == "fp8" else \
        torch.randn(192, 768, generator=g) * torch.randn(1, 768, generator=g).exp()
    w = w.T.contiguous() if turn else w
    tensors = {"w": (w, tj.Grid.parse(grid)), "beside": (torch.randn(70, 50, generator=g), tj.Grid.parse(grid))}
    report = tj.write_artifact(tmp_path / "m", CONFIG, tensors, ("rans",))
    same(tensors, tj.read_artifact(tmp_path / "m")[1])
    if grid == "fp8" or not turn:                # rows of unlike size have steps of unlike size: nothing left to find
        symbols = tj.encode(*tensors["w"])["q"].view(torch.int8) + tensors["w"][1].qmax
        assert tj.by_columns(symbols.view(torch.uint8).numpy(), grid == "int4") is not turn
        assert report["bytes"] < 0.93 * report["entropy_bytes"]


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="SLOW=1: the full model, all codecs, about 20 s")
def test_full_model(tmp_path):
    tensors = full_bpe()
    assert sum(w.numel() for w, _ in tensors.values()) > 32.7e6
    began = time.perf_counter()
    report = tj.write_artifact(tmp_path / "m", CONFIG, tensors)
    wrote = time.perf_counter()
    got = tj.read_artifact(tmp_path / "m")[1]
    print(report, f"write {wrote - began:.1f} s, read {time.perf_counter() - wrote:.2f} s")
    same(tensors, got)
    assert report["bytes"] <= 13_900_000 and abs(report["bytes"] / report["entropy_bytes"] - 1) < 0.02
    assert abs(tj.estimate_bytes(tensors) / report["bytes"] - 1) < 0.02


def test_full_model_with_our_coder_alone(tmp_path):
    tensors = full_bpe()
    report = tj.write_artifact(tmp_path / "m", CONFIG, tensors, ("rans",))
    assert report["bytes"] <= 13_900_000 and abs(report["bytes"] / report["entropy_bytes"] - 1) < 0.02
    same(tensors, tj.read_artifact(tmp_path / "m")[1])


def test_snap_and_file_agree_for_awkward_weights(tmp_path):
    g, tensors = torch.Generator().manual_seed(1), {}
    for name in GRIDS:
        weights = {
            "zeros": -torch.zeros(40, 30),
            "denormal": torch.full((3, 3), -1e-41),
            "halves": torch.arange(-14, 15).reshape(1, -1) * 0.5,
            "strided": torch.randn(30, 50, generator=g).T,
            "scales": torch.randn(60, 33, generator=g) * torch.logspace(-9, 4, 60)[:, None],
        }
        tensors |= {f"{name} {kind}": (w, tj.Grid.parse(name)) for kind, w in weights.items()}
    tj.write_artifact(tmp_path / "m", {}, tensors, ("rans",))
    same(tensors, tj.read_artifact(tmp_path / "m")[1])


# ------------------------------------------------------------------------------------------------ tensors (checkpoints)
def checkpoint_tensors():
    g = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(40, 50, generator=g),
        "double": torch.randn(7, generator=g, dtype=torch.float64),
        "half": torch.randn(3, 3, generator=g).bfloat16(),
        "count": torch.tensor(1 << 60),
        "rng": torch.get_rng_state(),
        "mask": torch.tensor([[1, 0]], dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "strided": torch.randn(6, 4, generator=g).T,
        "nan": torch.tensor([math.nan, -0.0, math.inf]),
    }


def test_tensors_round_trip(tmp_path):
    tensors, meta = checkpoint_tensors(), {"step": 7, "loss": [0.1, 2.5e-300], "hash": "a" * 64, "big": 1 << 70}
    size = tj.write_tensors(tmp_path / "c", "checkpoint", meta, tensors)
    got_meta, got = tj.read_tensors(tmp_path / "c", "checkpoint")
    assert size == (tmp_path / "c").stat().st_size and got_meta == meta and list(got) == list(tensors)
    for name, t in tensors.items():
        assert got[name].dtype == t.dtype and got[name].shape == t.shape and got[name].is_contiguous()
        assert torch.equal(got[name].reshape(-1).view(torch.uint8), t.contiguous().reshape(-1).view(torch.uint8)), name
    got["w"].add_(1)  # writable memory of its own
    refused(tmp_path / "c", "its kind is 'checkpoint', not 'artifact'")
    with pytest.raises(AssertionError, match="z has dtype complex64"):
        tj.write_tensors(tmp_path / "d", "checkpoint", {}, {"z": torch.zeros(2, dtype=torch.complex64)})
    assert os.listdir(tmp_path) == ["c"]


def test_meta_that_is_not_json_is_an_error_before_anything_is_written(tmp_path):
    for meta in ({"x": torch.zeros(1)}, {"x": object()}):
        with pytest.raises(TypeError):
            tj.write_tensors(tmp_path / "c", "checkpoint", meta, {})
    with pytest.raises(ValueError):
        tj.write_artifact(tmp_path / "m", {"temperature": math.nan}, {})
    assert not os.listdir(tmp_path)


def test_non_finite_numbers_of_a_checkpoints_meta_are_stored_as_null(tmp_path):
    meta = {"score": (math.nan, 1.25), "deep": {"a": [math.inf, -math.inf, [math.nan]]}, "text": "NaN", "n": 3}
    tj.write_tensors(tmp_path / "c", "checkpoint", meta, {})
    assert tj.read_tensors(tmp_path / "c", "checkpoint")[0] == {
        "score": [None, 1.25], "deep": {"a": [None, None, [None]]}, "text": "NaN", "n": 3}
    assert math.isnan(meta["score"][0])  # the caller's own stays as it is


class FullDisk:
    """A file that refuses to hold more than a few bytes."""

    def __init__(self, file, limit):
        self.file, self.left = file, limit

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *fault):
        self.file.close()


@pytest.mark.parametrize("limit", [0, 100, 5000])
def test_disk_full_keeps_the_old_file(tmp_path, monkeypatch, limit):
    path = tmp_path / "c"
    tj.write_tensors(path, "checkpoint", {"step": 1}, checkpoint_tensors())
    before = path.read_bytes()
    monkeypatch.setattr(
        tj,
        "open",
        lambda name, mode="r": FullDisk(open(name, mode), limit) if "w" in mode else open(name, mode),
        raising=False,
    )
    with pytest.raises(tj.UserError, match="No space left") as caught:
        tj.write_tensors(path, "checkpoint", {"step": 2}, checkpoint_tensors())
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_fault_or_interrupt_while_syncing_keeps_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "c"
    tj.write_tensors(path, "checkpoint", {"step": 1}, {})
    before = path.read_bytes()
    for fault, seen in (
        (OSError(errno.EIO, "Input/output error"), tj.UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):

        def fail(*a, fault=fault):
            raise fault

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(seen):
                tj.write_tensors(path, "checkpoint", {"step": 2}, {})
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["c"]


def test_unwritable_places(tmp_path):
    for path in (tmp_path / "missing" / "m", tmp_path):
        with pytest.raises(tj.UserError, match="cannot be written"):
            tj.write_tensors(path, "checkpoint", {}, {})
    assert not os.listdir(tmp_path)


def test_a_codec_that_fails_is_an_error(tmp_path, monkeypatch):
    def fail(piece):
        raise MemoryError("no room")

    monkeypatch.setitem(tj.CODECS, "zlib", tj.CODECS["zlib"]._replace(encode=fail))
    with pytest.raises(MemoryError, match="no room"):
        tj.write_artifact(tmp_path / "m", {}, small())
    assert not os.listdir(tmp_path)


def test_codecs_that_are_not_installed_are_named(tmp_path, monkeypatch):
    tj.write_artifact(tmp_path / "z", {}, small(), ("zstd",))
    tj.write_artifact(tmp_path / "b", {}, small(), ("brotli",))
    for name in ("brotli", "zstd"):
        monkeypatch.setitem(tj.CODECS, name, tj.CODECS[name]._replace(module=None))
    report = tj.write_artifact(tmp_path / "m", {}, small())
    assert set(report["codec_bytes"]) == {"lzma", "zlib", "rans"}
    refused(tmp_path / "z", "codec zstd is missing: install .*zstandard")
    refused(tmp_path / "b", "codec brotli is missing: install brotli")


def test_streams_in_several_pieces(tmp_path, monkeypatch):
    """Repeated tensors, for which a general codec wins; its sections are PIECE bytes each."""
    monkeypatch.setattr(tj, "PIECE", 1 << 16)
    matrix = torch.randn(200, 256)
    tensors = {f"n{i}": (matrix, tj.Grid.parse("int4")) for i in range(8)}
    for codecs in (CODECS, ("zlib",), ("zstd",), ("lzma",)):
        report = tj.write_artifact(tmp_path / "m", {}, tensors, codecs)
        assert report["codec"] != "rans" and len(tj.read_container(tmp_path / "m", "artifact")[1]) > 3
        same(tensors, tj.read_artifact(tmp_path / "m")[1])


# ------------------------------------------------------------------------------------------------ damage
def test_every_truncation_and_extension(artifact):
    data = artifact.read_bytes()
    for n in [*range(0, 60), *range(60, len(data), 301), *range(len(data) - 40, len(data))]:
        artifact.write_bytes(data[:n])
        refused(artifact)
    artifact.write_bytes(data + b"\0")
    refused(artifact, "checksum")


def test_every_bit_of_the_prefix_and_many_others(artifact):
    data, rng = artifact.read_bytes(), random.Random(0)
    places = [
        *range(8 * tj.PREFIX.size),
        *rng.sample(range(8 * len(data)), 150),
        *range(8 * len(data) - 256, 8 * len(data), 3),
    ]
    for bit in places:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        artifact.write_bytes(flipped)
        refused(artifact)


def test_foreign_files(tmp_path):
    import io
    import pickle

    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer)
    shard = np.zeros(256, "<i4")
    shard[:3] = 20240520, 1, 0
    for i, data in enumerate(
        [
            b"",
            b"\0",
            b"hello\n",
            pickle.dumps({"a": 1}),
            buffer.getvalue(),
            shard.tobytes(),
            os.urandom(5000),
            zlib.compress(b"x" * 1000),
            b"JEPAFILE",
            b"JEPAFILE" * 20,
        ]
    ):
        path = tmp_path / f"f{i}"
        path.write_bytes(data)
        refused(path)
        refused(path, reader=lambda p: tj.read_tensors(p, "checkpoint"))
    refused(tmp_path, "cannot be read")
    refused(tmp_path / "missing", "No such file")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    refused(tmp_path / "link", "cannot be read")


# ------------------------------------------------------------------------------------------------ hostile files
def entry(header, **change):
    header["sections"][0].update(change)


def drop(header, key):
    del header["sections"][0][key]


def tensor(header, i, j, value):
    header["meta"]["tensors"][i][j] = value


EDITS = {
    "other kind": lambda h: h.update(kind="checkpoint"),
    "kind is a list": lambda h: h.update(kind=[1]),
    "no meta": lambda h: h.pop("meta") and None,
    "meta is a list": lambda h: h.update(meta=[]),
    "sections is a dict": lambda h: h.update(sections={}),
    "header is a list": lambda h: [h],
    "section is a list": lambda h: h.update(sections=[[]]),
    "section lacks": lambda h: drop(h, "raw"),
    "section more": lambda h: entry(h, path="/etc/passwd"),
    "negative": lambda h: entry(h, stored=-1),
    "fraction": lambda h: entry(h, stored=10.0),
    "truth as size": lambda h: entry(h, raw=True),
    "text as size": lambda h: entry(h, raw="12"),
    "huge stored": lambda h: entry(h, stored=1 << 45),
    "very huge": lambda h: entry(h, stored=1 << 400),
    "huge raw": lambda h: entry(h, raw=1 << 45, shape=[1 << 45]),
    "unknown codec": lambda h: entry(h, codec="pickle"),
    "codec null": lambda h: entry(h, codec=None),
    "codec list": lambda h: entry(h, codec=[]),
    "as zstd": lambda h: entry(h, codec="zstd"),
    "as lzma": lambda h: entry(h, codec="lzma"),
    "as brotli": lambda h: entry(h, codec="brotli"),
    "as zlib": lambda h: entry(h, codec="zlib"),
    "raw codec": lambda h: entry(h, codec="raw"),
    "twice": lambda h: h["sections"].append(dict(h["sections"][0], stored=0)),
    "no sections": lambda h: h.update(sections=[]),
    "no config": lambda h: h["meta"].pop("config") and None,
    "config list": lambda h: h["meta"].update(config=[]),
    "tensors dict": lambda h: h["meta"].update(tensors={}),
    "tensor name": lambda h: tensor(h, 0, 0, 3),
    "same tensor": lambda h: tensor(h, 0, 0, h["meta"]["tensors"][1][0]),
    "grid": lambda h: tensor(h, 0, 1, "int3"),
    "grid type": lambda h: tensor(h, 0, 1, {"a": 1}),
    "other grid": lambda h: tensor(h, 0, 1, "int5"),
    "shape swapped": lambda h: tensor(h, 0, 2, [15, 33]),
    "huge shape": lambda h: tensor(h, 0, 2, [1 << 30, 1 << 30]),
    "rows": lambda h: tensor(h, 0, 2, [1 << 39, 0]),
    "many dimensions": lambda h: tensor(h, 0, 2, [1 << 39] * 100_000),
    "shape text": lambda h: tensor(h, 0, 2, "ab"),
    "nested shape": lambda h: tensor(h, 0, 2, [[3]]),
    "tensor more": lambda h: h["meta"]["tensors"].append(["new", "int4", [5, 5]]),
    "tensor less": lambda h: h["meta"]["tensors"].pop() and None,
    "streams": lambda h: h["meta"].update(streams=[]),
    "streams null": lambda h: h["meta"].update(streams=None),
    "many streams": lambda h: h["meta"].update(streams=[0] * 200_000),
    "stream": lambda h: h["meta"]["streams"].__setitem__(0, -5),
    "streams shifted": lambda h: h["meta"]["streams"].reverse(),
    "huge stream": lambda h: h["meta"]["streams"].__setitem__(0, 1 << 62),
}


@pytest.mark.parametrize("label", EDITS)
def test_edited_header_with_a_right_checksum(artifact, label):
    match = "storage grid" if label.startswith("grid") else "damaged or foreign file"
    refused(rebuild(artifact, EDITS[label]), match)


@pytest.mark.parametrize("change", [dict(dtype="object"), dict(dtype=[]), dict(shape=[3]), dict(shape=[1] * 9),
                                    dict(shape=3), dict(shape=[-7]), dict(codec="zlib"), dict(stored=1 << 45)], ids=str)
def test_edited_section_of_a_checkpoint(tmp_path, change):
    tj.write_tensors(tmp_path / "c", "checkpoint", {}, checkpoint_tensors())
    refused(rebuild(tmp_path / "c", lambda h: entry(h, **change)), "damaged or foreign file",
            lambda path: tj.read_tensors(path, "checkpoint"))


def too_many_tensors(header):
    header["meta"]["tensors"] = [["w", "int4", []]] * 60_000  # just below the limit in bytes


BOMBS = {
    "nothing": b"", "open": b"{", "no text": b"\xff\xfe", "utf-16": '{"kind":[[[[[[[[[]]]]]]]]]}'.encode("utf-16"),
    "nested lists": b"[" * 100_000, "nested objects": b'{"a":' * 50_000,
    "nested within": b'{"a":' + b"[" * 9 + b"]" * 9 + b"}",
    "null": b"null", "key twice": b'{"kind":"artifact","kind":"artifact"}', "nan": b'{"kind":NaN}',
    "infinity": b'{"kind":-Infinity}', "large number": b'{"kind":1e999}', "many digits": b"9" * 5000,
    "long text": b'"' + b"a" * (1 << 20) + b'"', "half a character": b'{"kind":"\\ud800"}',
    "empty lists": b"[" + b"[]," * 300_000 + b"[]]", "empty objects": b"[" + b"{}," * 300_000 + b"{}]",
    "quotes": b'"' * (1 << 20), "escapes": b'"' + b"\\" * ((1 << 20) - 2) + b'"', "escaped quotes": b'\\"' * (1 << 19),
    "brackets in a text": b'"' + b"[" * 1000 + b'"', "terminal": b'{"kind":"' + b"\\u001b[31m" * 80_000 + b'"}',
    "30 MB": b'{"kind":"' + b"x" * (30 << 20) + b'"}',
}


@pytest.mark.parametrize("label", BOMBS)
def test_header_text(artifact, label):
    before, began = peak(reset=True), time.process_time()
    refused(rebuild(artifact, text=BOMBS[label]), "damaged or foreign file")
    assert peak() - before < 200 << 20 and time.process_time() - began < 5


def test_table_of_too_many_tensors(artifact):
    before, began = peak(reset=True), time.process_time()
    refused(rebuild(artifact, too_many_tensors), "damaged or foreign file")
    assert peak() - before < 200 << 20 and time.process_time() - began < 5


@pytest.mark.parametrize("text,depth", [('{"a":[[{"b":"[[[[[[[[["}]]}', 4), ('["\\"]]]]","[[[[[["]', 1),
                                        ("[[[[[[[[]]]]]]]]", 8)])
def test_nesting_is_counted_outside_of_texts(monkeypatch, text, depth):
    header = f'{{"kind":"artifact","meta":{{"x":{text}}},"sections":[]}}'
    monkeypatch.setattr(tj, "MAX_DEPTH", depth + 2)
    assert tj.parse_header(header.encode(), "artifact") == json.loads(header)
    monkeypatch.setattr(tj, "MAX_DEPTH", depth + 1)
    with pytest.raises(ValueError, match="nested"):
        tj.parse_header(header.encode(), "artifact")


def test_limits_of_the_header_fit_full_size_models_several_times(tmp_path):
    """The full BPE model and 16 hybrid blocks, as artifact and as checkpoint; counts do not depend on the width."""
    hybrid = dict(NUM_LAYERS=16, MIXER="mmmmmmmammmmmmma", MLP_MULT=3, MLP_EVERY=1, EXPAND=2, DT_GRID="int8a")
    bpe = dict(TOKENIZER="bpe", VOCAB_SIZE=512, MODEL_DIM=64, NUM_LAYERS=10, MLP_MULT=4, MLP_EVERY=2, EXPAND=1,
               EMBED_DIM=32, TIE_EMBEDDINGS=1, QUANT_BITS=4)
    def counts(**knobs):
        config = tj.Config.from_env({name: str(value) for name, value in knobs.items()}).validate()
        model, jepa = tj.build_models(config)
        roles = [(name, p) for name, _, p in tj.named_roles(model) + tj.named_roles(jepa, "jepa.")]
        plan = tj.storage_plan(model, config)
        entries = tj.artifact_tensors(((name, p) for name, p in roles if name in plan), plan)
        return roles, entries, 4 * len(roles) + 2 * config.num_layers * config.micro_batches  # average, moments, states

    deep = [counts(**bpe | hybrid | dict(NUM_LAYERS=layers, MIXER="mamba2")) for layers in (1, 2)]
    most = tj.Config.knobs()["NUM_LAYERS"].metadata["high"]  # no run may end with an artifact that is too large
    for limit, (one, two) in ((tj.MAX_ENTRIES["artifact"], [len(count[1]) for count in deep]),
                              (tj.MAX_ENTRIES["checkpoint"], [count[2] for count in deep])):
        assert one + (most - 1) * (two - one) <= limit
    for knobs in (bpe, bpe | hybrid):
        roles, entries, sections = counts(**knobs)
        print(f"{len(entries)} tensors in the artifact, {sections} sections in a checkpoint")
        assert 10 * len(entries) < tj.MAX_ENTRIES["artifact"] and 10 * sections < tj.MAX_ENTRIES["checkpoint"]
        long = max(len(f"optimizer/exp_avg_sq/{name}") for name, _ in roles)
        assert 10 * sections * (long + 100) < tj.MAX_HEADER["checkpoint"]
        assert 10 * len(entries) * (long + 40) < tj.MAX_HEADER["artifact"]
    many = {str(i): (torch.zeros(1), tj.Grid.parse("bf16")) for i in range(5000)}
    with pytest.raises(tj.UserError, match="5000 tensors are too many"):  # nothing is written that is not read
        tj.write_artifact(tmp_path / "m", {}, many, ("zlib",))
    with pytest.raises(tj.UserError, match="40000 tensors are too many"):
        tj.write_tensors(tmp_path / "c", "checkpoint", {}, {str(i): torch.zeros(0) for i in range(40_000)})


def test_header_that_inflates_without_end(artifact):
    bomb, limit = zlib.compress(b" " * (1 << 26)), tj.MAX_HEADER["artifact"]
    for raw in (100, 1 << 16, limit, limit + 1, (1 << 32) - 1):
        artifact.write_bytes(reseal(tj.PREFIX.pack(tj.MAGIC, tj.VERSION, len(bomb), raw) + bomb))
        refused(artifact)
    for stored in (0, len(bomb) + 1, (1 << 32) - 1):
        artifact.write_bytes(reseal(tj.PREFIX.pack(tj.MAGIC, tj.VERSION, stored, 100) + bomb))
        refused(artifact)


def peak(reset=False) -> int:
    """Largest resident memory of this process so far, in bytes; reset: from now on."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024


@pytest.mark.parametrize("codec", ["zlib", "zstd", "brotli", "lzma"])
def test_decompression_bombs(codec):
    def quick_lzma(data):
        import lzma
        return lzma.compress(data, lzma.FORMAT_RAW, filters=[tj.LZMA2[0] | {"preset": 0}])

    fast = {
        "zlib": zlib.compress,
        "lzma": quick_lzma,
        "zstd": tj.zstandard.compress,
        "brotli": lambda data: tj.brotli.compress(data, quality=5),
    }
    bomb, lengths, row = fast[codec](b"\0" * (64 << 20)), [1 << 20], tj.CODECS[codec]
    section = tj.Section("0", codec, len(bomb), 1 << 20, "uint8", [1 << 20])
    before = peak(reset=True)
    for raw in (0, 1, 1000, 1 << 20):
        most = 2 * raw + (1 << 15) if codec == "brotli" else raw + 1  # brotli makes whole blocks
        assert len(row.decode(bomb, raw + 1)) <= most
    with pytest.raises(ValueError, match="another size"):
        tj.unpack([(section, memoryview(bomb))], lengths)
    assert peak() - before < 24 << 20  # of 64 MB of zeros
    good = row.encode(b"abc" * 1000)
    for n in range(len(good)):
        with contextlib.suppress(Exception):  # each library has its own class of errors
            assert (b"abc" * 1000).startswith(row.decode(good[:n], 3001)), n
    for raw in (2999, 3001, 1 << 40):
        cut = section._replace(stored=len(good), raw=raw)
        with pytest.raises((ValueError, MemoryError)):
            tj.unpack([(cut, memoryview(good))], [raw])


def test_hostile_rans():
    rng, damage = np.random.default_rng(0), (ValueError, zlib.error)  # to be turned into a UserError by the reader
    lengths = [5000, 300]
    data = rng.geometric(0.3, 5300).clip(0, 255).astype(np.uint8)
    coded = tj.rans_encode(data, lengths)
    for n in [*range(0, 80), len(coded) - 4, len(coded) - 1]:
        with pytest.raises(damage):
            tj.rans_decode(coded[:n], lengths)
    for wrong in ([5300], [5300, 0], [300, 5000], [5000, 301], [4999, 300], [], [5000, 300, 0]):
        with pytest.raises(damage):
            tj.rans_decode(coded, wrong)
    size = struct.unpack("<I", coded[:4])[0]
    for table in (np.zeros(512, "<u2"), np.full(512, 128 + 1, "<u2"), np.full(512, 65535, "<u2")):
        packed = zlib.compress(np.ascontiguousarray(table.view(np.uint8).reshape(-1, 2).T).tobytes())
        with pytest.raises(damage):
            tj.rans_decode(struct.pack("<I", len(packed)) + packed + coded[4 + size :], lengths)
    for state in (0, 1, (1 << 31) - 1, 1 << 63, (1 << 64) - 1):
        hostile = bytearray(coded)
        hostile[4 + size : 12 + size] = struct.pack("<Q", state)
        with pytest.raises(damage):
            tj.rans_decode(hostile, lengths)


def test_claims_within_bounds_that_the_data_do_not_keep(artifact):
    """A tensor table that promises 512 MB from a few kB: refused without the memory."""

    def promise(header):
        header["meta"] = {"config": {}, "tensors": [["w", "fp32", [1 << 27]]], "streams": [1 << 27] * 4}
        entry(header, raw=1 << 29, shape=[1 << 29])

    before = peak(reset=True)
    began = time.process_time()
    for codec in ("rans", "zlib", "zstd", "brotli", "lzma"):
        refused(rebuild(artifact, lambda h, c=codec: promise(h) or entry(h, codec=c)))
    assert peak() - before < 64 << 20 and time.process_time() - began < 5


def test_a_stored_nan_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tj, "all_finite", lambda t: True)
    for grid in ("bf16", "fp16", "fp32"):
        tj.write_artifact(tmp_path / grid, {}, {"w": (torch.tensor([1.0, math.nan]), tj.Grid.parse(grid))})
    monkeypatch.undo()
    for grid in ("bf16", "fp16", "fp32"):
        refused(tmp_path / grid, "NaN")


@pytest.mark.parametrize("value", ["9" * 100_000, "\x1b[31m" * 1000, [1] * 100_000, "e\u0301\n" * 100],
                         ids=["digits", "terminal", "list", "accents"])
@pytest.mark.parametrize("name", ["MODEL_DIM", "MIXER", "ACTIVATION"])
def test_knobs_of_a_hostile_header_are_quoted_in_short_printable_lines(name, value):
    config = tj.Config()
    with pytest.raises(tj.UserError, match=name) as caught:
        tj.config_of_artifact(config, {"model": config.model_config() | {name: value}})
    assert len(str(caught.value)) < 1000 and str(caught.value).isascii()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One of: flips, a cut, an insertion, a copied span, numbers of prefix or header overwritten; mostly resealed."""
    body, way = bytearray(data[:-32]), rng.randrange(7)
    at = rng.randrange(len(body))
    if way == 0:
        for _ in range(rng.choice((1, 1, 8))):
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    elif way == 1:
        del body[at:]
    elif way == 2:
        body[at:at] = rng.randbytes(rng.randrange(1, 40))
    elif way == 3:
        body[at : at + rng.randrange(1, 40)] = body[rng.randrange(len(body)) :][: rng.randrange(40)]
    elif way == 4:
        place = rng.choice((8, 12, 16, at))
        body[place : place + 4] = struct.pack(
            "<I", rng.choice((0, 1, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1))
        )
    elif way == 5:  # the header's own numbers and words
        stored = tj.PREFIX.unpack(body[: tj.PREFIX.size])[2]
        text = bytearray(zlib.decompress(body[tj.PREFIX.size : tj.PREFIX.size + stored]))
        for _ in range(rng.randrange(1, 4)):
            spot = rng.randrange(len(text))
            text[spot : spot + rng.randrange(3)] = rng.choice(
                (b"9", b"0", b"-", b"[", b"}", b",", b"99999999999", b"1e9", b'"', b"int4", b"null")
            )
        head = zlib.compress(bytes(text))
        body = tj.PREFIX.pack(tj.MAGIC, tj.VERSION, len(head), len(text)) + head + body[tj.PREFIX.size + stored :]
    else:
        span = rng.randrange(1, 100)
        body[at : at + span] = rng.choice((b"\0", b"\xff")) * min(span, len(body) - at)
    return reseal(bytes(body)) if rng.random() < 0.85 else bytes(body) + data[-32:]


def fuzz(count: int, folder: Path, seed: int = 0) -> dict:
    """Mutated artifacts and checkpoints: refused by UserError, or read; bounded time and memory. Returns the counts."""
    rng, outcome, slowest = random.Random(seed), {"refused": 0, "read": 0}, 0.0
    tensors = {k: v for k, v in small().items() if k.endswith((".0", "zero"))}
    samples = []
    for codecs in (("rans",), ("zlib",), ("zstd",), ("brotli",), ("lzma",)):
        tj.write_artifact(folder / "m", CONFIG, tensors, codecs)
        samples.append(((folder / "m").read_bytes(), tj.read_artifact))
    tj.write_tensors(folder / "m", "checkpoint", {"step": 3}, checkpoint_tensors())
    samples += [((folder / "m").read_bytes(), lambda p: tj.read_tensors(p, "checkpoint"))] * 3
    before = peak(reset=True)
    for _ in range(count):
        data, reader = rng.choice(samples)
        (folder / "m").write_bytes(mutate(data, rng))
        began = time.process_time()
        try:
            reader(folder / "m")  # a resealed change of a weight is another valid model
            outcome["read"] += 1
        except tj.UserError as error:
            outcome["refused"] += 1
            assert str(error).isprintable() and len(str(error)) < len(str(folder)) + 260
        slowest = max(slowest, time.process_time() - began)
    return outcome | {"slowest_s": slowest, "memory_bytes": peak() - before}


def test_fuzz(tmp_path):
    count = FUZZ // 4
    outcome = fuzz(count, tmp_path)
    print(f"{count} mutated files: {outcome}")
    assert outcome["refused"] + outcome["read"] == count and outcome["refused"] > count / 2
    assert outcome["slowest_s"] < 5 and outcome["memory_bytes"] < 128 << 20


SIZES = [dict(), dict(QUANT_BITS=5), dict(QUANT_BITS=6, MLP_MULT=3), dict(QUANT_STEP="sigma", QUANT_K=0.5),
         dict(QUANT_STEP="sigma", QUANT_K=0.35, DT_GRID="int8a"), dict(MLP_GRID="int5", EMBED_GRID="int6"),
         dict(TIE_EMBEDDINGS=0), dict(EXPAND=2), dict(ACTIVATION="leaky_relu2", MLP_EVERY=1),
         dict(TOKENIZER="bpe", VOCAB_SIZE=8192, EMBED_DIM=64)]
# Hybrids as PRESET=best at full size: step in σ, compensated rounding, an MLP in every block
HYBRID = dict(NUM_HEADS=4, NUM_KV_HEADS=2, QUANT_STEP="sigma", DT_GRID="int8a", EMBED_GRID="int7", MLP_EVERY=1,
              MLP_MULT=2, ACTIVATION="leaky_relu2", QAT_FRACTION=0, ROUNDING="compensated", ROUNDING_TOKENS=8192,
              MIN_LR=0.1)
SIZES += [HYBRID | dict(MIXER="mmam", QUANT_K=0.385), HYBRID | dict(MIXER="maam", QUANT_K=0.34),
          HYBRID | dict(MIXER="mmmmam", NUM_LAYERS=6, QUANT_K=0.42, EXPAND=2)]


@pytest.mark.slow
@pytest.mark.parametrize("knobs", SIZES, ids=lambda knobs: ",".join(f"{k}={v}" for k, v in knobs.items())[-60:])
def test_describe_predicts_the_bytes_of_trained_models(tmp_path, demo_data, knobs):
    """MODE=describe knows the configuration alone, before a step is done: within 2% of the file after 40 steps."""
    knobs = harness.TINY | dict(
        MODEL_DIM=128, NUM_LAYERS=4, MLP_MULT=4, MLP_EVERY=2, TRAIN_SEQ_LEN=64, TRAIN_BATCH_TOKENS=1024,
        MICRO_BATCHES=1, JEPA_WEIGHT=0, SIGREG_LAMBDA=0, ITERATIONS=40, MATRIX_LR=0.02, EMBED_LR=0.02, SCALAR_LR=0.03,
        WARMDOWN_FRACTION=0.5, WARMUP_STEPS=0) | knobs
    if knobs["TOKENIZER"] == "bpe":
        knobs |= dict(DATA_PATH=demo_data.bpe, TOKENIZER_PATH=demo_data.tokenizer)
    child = harness.run(tmp_path, **knobs)
    assert child.code == 0, child.text()[-2000:]
    real = json.loads((tmp_path / "r/result.json").read_text())["artifact_bytes"]
    predicted = tj.estimated_bytes(tj.Config.from_env({k: str(v) for k, v in knobs.items()}).validate())
    assert abs(predicted / real - 1) < 0.02, (predicted, real)


def test_the_largest_fit_fits_and_the_next_does_not():
    config = tj.Config.from_env(dict(TOKENIZER="byte", MODEL_DIM="64", NUM_LAYERS="2", EXPAND="1", MLP_MULT="2",
                                     QUANT_BITS="4", DEVICE="cpu"))
    for name, step in (("model_dim", 64), ("mlp_mult", 1)):
        best = tj.largest_fit(config, name, step, 300_000)
        sizes = [tj.estimated_bytes(dataclasses.replace(config, **{name: value})) for value in (best, best + step)]
        assert sizes[0] <= 300_000 < sizes[1] and best % step == 0
    assert tj.largest_fit(config, "model_dim", 64, 1000) is None
