"""Shards, the token stream, batches, and the bytes that tokens stand for."""
import dataclasses
import io
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch

import train_jepa as tj
from train_jepa import Batches, TokenStream, UserError, Vocabulary, bpe_vocabulary, shard_length

DEMO = tj.Path(tj.__file__).with_name("data") / "demo"


def write_shard(path, tokens):
    """The shard format of the challenge: 256 little-endian int32 of header, then uint16 tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens).astype("<u2").tobytes())


@pytest.fixture
def shard(tmp_path):
    """A function that writes tokens as the next training shard and returns its path."""
    def write(tokens, part="train"):
        path = tmp_path / f"fineweb_{part}_{len(list(tmp_path.iterdir())):06d}.bin"
        write_shard(path, tokens)
        return path
    return write


# -- shards ------------------------------------------------------------------------------------------------------------

def test_a_shard_reads_back(shard):
    tokens = np.arange(1000) * 7 % 8192
    path = shard(tokens)
    stream = TokenStream([path], 8192)
    assert shard_length(path) == 1000 and np.array_equal(stream.read(0, 1000), tokens)
    assert np.array_equal(stream.read(990, 10), tokens[-10:])


def test_an_empty_shard_reads_as_no_tokens(shard):
    assert shard_length(shard([])) == 0


def test_shards_that_are_not_intact_are_refused_by_name(shard, tmp_path):
    good = shard(np.arange(100)).read_bytes()

    def words(**changes):
        header = np.frombuffer(good[:1024], "<i4").copy()
        for index, value in changes.items():
            header[int(index[1:])] = value
        return header.tobytes() + good[1024:]

    cases = dict(truncated=good[:-1], half=good[:600], nothing=b"", too_long=good + b"\0\0",
                 foreign=b"PK\3\4" + good[4:], text=b"hello " * 500, version=words(w1=2),
                 big_endian=np.frombuffer(good, "<i4").astype(">i4").tobytes(),
                 more=words(w2=101), fewer=words(w2=99), huge=words(w2=2**31 - 1), negative=words(w2=-1))
    for name, data in cases.items():
        path = tmp_path / f"{name}.bin"
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"{name}.bin") as caught:
            shard_length(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="missing.bin"):
        shard_length(tmp_path / "missing.bin")
    os.mkfifo(tmp_path / "fifo.bin")  # nobody writes into it
    for path in (tmp_path, tmp_path / "fifo.bin"):
        with pytest.raises(UserError, match="not a token shard"):
            shard_length(path)


def test_missing_folder_and_missing_part_name_the_knob(tmp_path, shard):
    shard([1])
    for folder, part in ((tmp_path / "nowhere", "train"), (tmp_path, "val")):
        with pytest.raises(UserError, match="DATA_PATH=.*fineweb_" + part):
            tj.find_shards(str(folder), part)
    assert tj.find_shards(str(tmp_path), "train")


def test_shards_are_found_in_order(tmp_path):
    for number in (10, 2, 0):
        write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", [number])
    assert TokenStream(tj.find_shards(str(tmp_path), "train"), 256).read(0, 3).tolist() == [0, 2, 10]


# -- stream ------------------------------------------------------------------------------------------------------------

def test_the_stream_reads_across_shards_and_wraps_around_at_any_position(shard):
    tokens = np.arange(23)
    stream = TokenStream([shard(tokens[:7]), shard([]), shard(tokens[7:8]), shard(tokens[8:])], 256)
    assert len(stream) == 23
    for position in range(50):
        for count in (1, 5, 23, 60):
            expected = [(position + i) % 23 for i in range(count)]
            assert stream.read(position, count).tolist() == expected
    assert stream.read(0, 1).dtype == np.int64
    assert stream.read(23 * 10**12 + 4, 2).tolist() == [4, 5]  # positions of very long runs


def test_a_token_id_outside_the_vocabulary_is_refused_with_shard_and_knob(shard):
    good, bad = shard([1, 255]), shard([3, 256, 4])
    with pytest.raises(UserError, match=f"{bad.name}: token id 256, but VOCAB_SIZE=256"):
        TokenStream([good, bad], 256)
    TokenStream([good, bad], 257)


def test_a_token_id_outside_the_vocabulary_behind_the_first_scan_is_refused_when_read(shard):
    tokens = np.zeros(4_000_100, np.uint16)
    tokens[-1] = 300
    stream = TokenStream([shard(tokens)], 256)
    stream.read(4_000_000, 50)
    with pytest.raises(UserError, match="token id 300"):
        stream.read(4_000_050, 100)


def test_a_shard_that_shrinks_while_in_use_is_refused_when_read(shard):
    path = shard(np.zeros(5000))
    stream = TokenStream([path], 256)
    os.truncate(path, 1024 + 2 * 1000)
    assert len(stream.read(900, 100)) == 100
    with pytest.raises(UserError, match=f"{path.name}: became shorter while in use"):
        stream.read(900, 101)
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name}: cannot be read"):
        stream.read(0, 1)


def test_a_stream_without_tokens_is_refused(shard):
    with pytest.raises(UserError, match="no tokens"):
        TokenStream([shard([]), shard([])], 256)


# -- batches -----------------------------------------------------------------------------------------------------------



class Counter:
    """A stream whose token at position i is i modulo its length."""
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def read(self, position, count):
        return (position + np.arange(count, dtype=np.int64)) % self.length


def test_a_micro_batch_takes_its_tokens_plus_one_and_shifts_by_one():
    batches = Batches(Counter(10**6), micro_batches=3, sequences=4, seq_len=5)
    x, y = batches(100, 1)
    values = torch.arange(100 + 21, 100 + 42)  # 4 * 5 + 1 values, after those of micro-batch 0
    assert torch.equal(x, values[:-1].view(4, 5)) and torch.equal(y, values[1:].view(4, 5))
    assert batches.values_per_step() == 3 * 21


def test_micro_batches_and_steps_read_disjoint_spans_without_gaps():
    batches, seen, position = Batches(Counter(10**6), micro_batches=4, sequences=2, seq_len=8), [], 0
    for _ in range(3):
        for micro in range(4):
            x, y = batches(position, micro)
            seen += x.flatten().tolist() + [int(y[-1, -1])]
        position += batches.values_per_step()
    assert seen == list(range(3 * 4 * 17))


RANK_0 = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), dtype=torch.float32, cuda=False,
                         to_device=lambda t: t, main_first=lambda work: work())


@pytest.mark.parametrize("lanes", [0, 1])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_ranks_of_any_number_together_read_the_same_micro_batches(world, lanes, monkeypatch, shard):
    config = tj.Config.from_env(dict(MODEL_DIM="64", NUM_LAYERS="1", EXPAND="1", TRAIN_SEQ_LEN="4", MLP_MULT="0",
                                     TRAIN_BATCH_TOKENS="64", COMPILE_MODE="off", DEVICE="cpu",
                                     LANES=str(lanes))).validate()
    stream, seen = TokenStream([shard(np.arange(200))], 256), {}
    for rank in range(world):
        trainer = tj.Trainer(config, SimpleNamespace(**{**vars(RANK_0), "rank": rank, "world": world}), stream)
        for micro in trainer.micros:
            assert micro not in seen
            seen[micro] = [t.tolist() for t in trainer.step_inputs(5, micro)]
    reference = tj.Trainer(config, RANK_0, stream)
    assert seen == {micro: [t.tolist() for t in reference.step_inputs(5, micro)] for micro in range(8)}
    assert seen[0][2] != seen[1][2]  # each micro-batch draws its own SIGReg positions
    if lanes:  # of 200 // 16 tokens for each of the 16 rows
        assert [row[0] for micro in range(8) for row in seen[micro][0]] == [12 * row for row in range(16)]


def test_carried_states_read_the_same_rows_as_lanes_alone(shard):
    stream, seen = TokenStream([shard(np.arange(200))], 256), []
    for knobs in (dict(LANES="1"), dict(CARRY_STATE="1"), {}):
        config = tj.Config.from_env(dict(MODEL_DIM="64", NUM_LAYERS="1", EXPAND="1", TRAIN_SEQ_LEN="4", MLP_MULT="0",
                                         TRAIN_BATCH_TOKENS="64", COMPILE_MODE="off", DEVICE="cpu", **knobs)).validate()
        trainer = tj.Trainer(config, RANK_0, stream)
        trainer.position = 4
        seen.append([trainer.step_inputs(1, micro)[0].tolist() for micro in trainer.micros])
    assert seen[0] == seen[1] != seen[2]


def test_a_lane_goes_on_where_its_row_ended():
    length, micro_batches, rows, seq_len = 1200, 2, 3, 10
    batches = Batches(Counter(length), micro_batches, rows, seq_len, lanes=True)
    lane, position = length // 6, 0
    assert batches.values_per_step() == seq_len
    for step in range(4):
        for micro in range(micro_batches):
            x, y = batches(position, micro)
            starts = torch.tensor([(micro * rows + row) * lane + step * seq_len for row in range(rows)])
            assert torch.equal(x, starts[:, None] + torch.arange(seq_len)) and torch.equal(y, x + 1)
        position += batches.values_per_step()


def test_validation_is_cut_to_whole_rows_and_to_its_limit(shard, tmp_path):
    shard(np.arange(103) % 256, "val")
    load = lambda limit, length=10: tj.load_validation(tj.Config(data_path=str(tmp_path), val_max_tokens=limit,
                                                                 train_seq_len=length))
    assert torch.equal(load(0), torch.arange(101)) and len(load(25)) == 21 and len(load(10**6)) == 101
    assert len(load(0, 102)) == 103 and len(load(102, 102)) == 103  # a set that fits exactly is not lost
    for limit, length in ((9, 10), (0, 103)):
        with pytest.raises(UserError, match="TRAIN_SEQ_LEN"):
            load(limit, length)


# -- vocabularies ------------------------------------------------------------------------------------------------------

def document_bytes(vocabulary: Vocabulary, ids: list[int]) -> int:
    """Sum of target_bytes over a document that begins with its mark."""
    ids = torch.tensor([vocabulary.bos_id, *ids])
    return int(vocabulary.target_bytes(ids[:-1], ids[1:]).sum())


def expected_bytes(model, text: str) -> int:
    """UTF-8 length of the text as the tokenizer normalizes it, without the space it puts in front."""
    return len(model.normalize(text).removeprefix("\u2581").replace("\u2581", " ").encode())


TEXTS = ["Hello world.", " leading space", "two  spaces   three", "trailing ", "line\nbreak\n\nand\ttab", "\n",
         "naïve café", "e\u0301 combining", "\u4e2d\u6587\u5b57\u7b26\uff0c\u65e5\u672c\u8a9e",
         "\ufb01 ligature \u00bd \u2116",
         "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 emoji", "\u00a0no-break", "\u3000ideographic",
         "zero\u200bwidth", "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627", "a", " ", "",
         "\u2581 the mark itself \u2581\u2581", "<s> </s> <unk> as text", "\u0378 unassigned", "0123 x=1; {}[]",
         "\U0001d518\U0001d52b\U0001d526 fraktur"]


@pytest.fixture(scope="module")
def demo_model():
    return sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "fineweb_8192_bpe.model"))


@pytest.fixture(scope="module")
def demo_vocabulary():
    return bpe_vocabulary(str(DEMO / "fineweb_8192_bpe.model"), 8192)


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_bytes_of_a_document_are_its_normalized_length(text, demo_model, demo_vocabulary):
    assert document_bytes(demo_vocabulary, demo_model.encode(text)) == expected_bytes(demo_model, text)


def test_bytes_of_ascii_text_are_its_own_length(demo_model, demo_vocabulary):
    text = "The quick brown fox, 42 times; it's \"done\" (almost)."
    assert document_bytes(demo_vocabulary, demo_model.encode(text)) == len(text)


def test_real_text_every_paragraph_counts_its_bytes_and_the_ratio_is_that_of_english(demo_model, demo_vocabulary):
    text = (DEMO / "alice_valid.txt").read_text(encoding="utf-8")
    paragraphs = text.split("\n\n")
    tokens = total = 0
    for paragraph in paragraphs:
        ids = demo_model.encode(paragraph)
        assert document_bytes(demo_vocabulary, ids) == expected_bytes(demo_model, paragraph)
        tokens, total = tokens + len(ids) + 1, total + document_bytes(demo_vocabulary, ids)
    assert len(paragraphs) > 500
    # BPB / NLL = tokens / (bytes ln 2): 0.387 on FineWeb; English far from [0.25, 0.5] means miscounted bytes
    assert 0.25 < tokens / total / np.log(2) < 0.5
    whole = demo_model.encode(text)
    assert document_bytes(demo_vocabulary, whole) == expected_bytes(demo_model, text)


def test_documents_in_one_stream_count_as_they_do_alone(demo_model, demo_vocabulary):
    documents = [demo_model.encode(text) for text in TEXTS]
    stream = torch.tensor([token for ids in documents for token in (1, *ids)])
    counted = demo_vocabulary.target_bytes(stream[:-1], stream[1:])
    assert int(counted.sum()) == sum(document_bytes(demo_vocabulary, ids) for ids in documents)
    assert counted[stream[1:] == 1].sum() == 0  # the mark between documents costs nothing


def test_special_pieces_count_nothing_and_are_boundaries(demo_model, demo_vocabulary):
    for token in (0, 1, 2, 3):
        silent = demo_model.is_control(token) or demo_model.is_unknown(token)
        assert bool(demo_vocabulary.boundary[token]) == silent
        assert not silent or int(demo_vocabulary.base_bytes[token]) == 0
    word = demo_model.piece_to_id("\u2581the")
    count = lambda before: int(demo_vocabulary.target_bytes(torch.tensor(before), torch.tensor(word)))
    assert demo_vocabulary.bos_id == demo_model.bos_id() == 1
    assert (count(1), count(3), count(word)) == (3, 3, 4)  # a space is written only after text


def train_model(path, **options) -> str:
    """A small SentencePiece model on part of Alice; returns its path."""
    lines = (DEMO / "alice_valid.txt").read_text(encoding="utf-8").splitlines()[:400]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=buffer, minloglevel=2,
                                             num_threads=1, **options)
    path.write_bytes(buffer.getvalue())
    return str(path)


def test_damaged_tokenizers_are_refused_in_one_printable_line_or_read(tmp_path):
    """FUZZ_COUNT files with flips, cuts, insertions, other spans; each in a fork, for the library is C++."""
    data = Path(train_model(tmp_path / "m", model_type="bpe", vocab_size=400, byte_fallback=True)).read_bytes()
    rng, path, count = random.Random(0), tmp_path / "damaged.model", int(os.environ.get("FUZZ_COUNT", 200))
    for _ in range(count):
        body, at = bytearray(data), rng.randrange(len(data))
        span, way = slice(at, at + rng.randrange(1, 60)), rng.randrange(5)
        if way == 0:
            for _ in range(rng.choice((1, 8, 50))):
                body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        else:
            body[span if way < 4 else slice(at, None)] = (
                b"", rng.randbytes(20), data[:rng.randrange(40)], rng.choice((b"\0", b"\xff")) * 30, b"")[way]
        path.write_bytes(body)
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                bpe_vocabulary(str(path), 400)
            except UserError as error:
                os._exit(0 if str(error).isprintable() and len(str(error)) < len(str(path)) + 250 else 3)
            except BaseException:
                os._exit(4)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, body[:200]


@pytest.mark.parametrize("options", [
    dict(model_type="bpe", vocab_size=400, byte_fallback=True, pad_id=0, bos_id=1, eos_id=-1, unk_id=3),
    dict(model_type="unigram", vocab_size=400, byte_fallback=True, add_dummy_prefix=False),
    dict(model_type="bpe", vocab_size=400, byte_fallback=True, normalization_rule_name="identity",
         remove_extra_whitespaces=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3),
    dict(model_type="bpe", vocab_size=420, byte_fallback=True, split_digits=True,
         user_defined_symbols=["<tag>", "\u2581and"]),
], ids=["bpe", "unigram-no-prefix", "bpe-identity", "bpe-user-symbols"])
def test_models_of_other_kinds_account_for_every_byte_too(options, tmp_path):
    path = train_model(tmp_path / "m.model", **options)
    model = sentencepiece.SentencePieceProcessor(model_file=path)
    vocabulary = bpe_vocabulary(path, options["vocab_size"])
    for text in TEXTS:
        ids = model.encode(text)
        assert not any(model.is_unknown(token) for token in ids)
        written = model.normalize(text)
        expected = len(written.replace("\u2581", " ").encode()) - (written.startswith("\u2581") and bool(ids))
        assert document_bytes(vocabulary, ids) == expected, text


def test_unknown_pieces_without_byte_fallback_count_nothing(tmp_path):
    path = train_model(tmp_path / "m.model", model_type="bpe", vocab_size=200, byte_fallback=False)
    model = sentencepiece.SentencePieceProcessor(model_file=path)
    vocabulary = bpe_vocabulary(path, 200)
    ids = model.encode("a 中 the")
    assert model.unk_id() in ids
    counted = [int(vocabulary.target_bytes(torch.tensor(a), torch.tensor(b))) for a, b in zip([1] + ids, ids)]
    unknown = ids.index(model.unk_id())
    assert counted[unknown] == 0
    assert counted[unknown + 1] == len(model.id_to_piece(ids[unknown + 1]).strip("\u2581"))


def test_tokenizers_that_do_not_fit_are_refused_by_knob(tmp_path):
    with pytest.raises(UserError, match="8192 pieces, but VOCAB_SIZE=4096"):
        bpe_vocabulary(str(DEMO / "fineweb_8192_bpe.model"), 4096)
    foreign = tmp_path / "foreign.model"
    for data in (b"", b"not a model at all", (DEMO / "fineweb_8192_bpe.model").read_bytes()[:5000]):
        foreign.write_bytes(data)
        with pytest.raises(UserError, match="TOKENIZER_PATH") as caught:
            bpe_vocabulary(str(foreign), 8192)
        assert "\n" not in str(caught.value)
    name = "\u2581the".encode()  # the first piece of that name becomes invalid UTF-8
    foreign.write_bytes((DEMO / "fineweb_8192_bpe.model").read_bytes().replace(name, b"\xff" * len(name), 1))
    with pytest.raises(UserError, match="TOKENIZER_PATH=.*not a SentencePiece model .*utf-8"):
        bpe_vocabulary(str(foreign), 8192)
    for path in ("", str(tmp_path / "missing.model"), str(tmp_path)):
        with pytest.raises(UserError, match="TOKENIZER_PATH"):
            bpe_vocabulary(path, 8192)


def test_byte_vocabulary_counts_one_per_byte_and_nothing_for_the_mark():
    vocabulary = tj.byte_vocabulary()
    assert document_bytes(vocabulary, list("naïve \U0001f600".encode())) == len("naïve \U0001f600".encode())
    ids = torch.tensor([0, 65, 0, 66])
    assert vocabulary.target_bytes(ids[:-1], ids[1:]).tolist() == [1, 0, 1]


@pytest.mark.parametrize("which", ["byte", "bpe"])
def test_a_vocabulary_survives_packing_through_json(which, demo_vocabulary):
    vocabulary = tj.byte_vocabulary() if which == "byte" else demo_vocabulary
    packed = json.loads(json.dumps(vocabulary.pack()))
    found = Vocabulary.unpack(packed, len(vocabulary.base_bytes))
    assert found.bos_id == vocabulary.bos_id
    assert found.source == vocabulary.source and len(found.source) == (5 if which == "byte" else 64)
    for name in ("base_bytes", "space", "boundary"):
        assert torch.equal(getattr(found, name), getattr(vocabulary, name))


def test_damaged_packed_vocabularies_are_refused(demo_vocabulary):
    packed = demo_vocabulary.pack()
    bad = [{}, {"bos_id": 1}, {**packed, "codes": "!"}, {**packed, "codes": packed["codes"][:100]},
           {**packed, "bos_id": 8192},
           {**packed, "bos_id": -1}, {**packed, "bos_id": "x"},
           {**packed, "bos_id": float("inf")}, None, {**packed, "codes": None}, {**packed, "codes": 5}]
    for form in bad:
        with pytest.raises(UserError, match="vocabulary"):
            Vocabulary.unpack(form, 8192)
    for size in (8191, 8193, 256):
        with pytest.raises(UserError, match="vocabulary"):
            Vocabulary.unpack(packed, size)


# -- which tokenizer made the shards -----------------------------------------------------------------------------------

def test_shards_of_another_tokenizer_are_refused_by_their_sidecar(tmp_path, demo_vocabulary):
    config, byte = tj.Config(data_path=str(tmp_path)), tj.byte_vocabulary()
    other = dataclasses.replace(demo_vocabulary, source="0" * 64)
    for source in (None, "bytes", demo_vocabulary.source):
        (tmp_path / "source.json").write_text(json.dumps({"tokenizer": source, "vocab_size": 256}))
        assert tj.shards_source(str(tmp_path)) == source
        for vocabulary in (byte, demo_vocabulary, other):
            if source in (None, vocabulary.source):
                tj.check_source(config, vocabulary)
                continue
            with pytest.raises(UserError, match="DATA_PATH=.*source.json") as caught:
                tj.check_source(config, vocabulary)
            assert "\n" not in str(caught.value)
    tj.check_source(config, dataclasses.replace(byte, source=""))  # an artifact of v0.1 does not say it


def test_a_sidecar_that_says_nothing_or_is_no_json(tmp_path):
    path = tmp_path / "source.json"
    assert tj.shards_source(str(tmp_path)) is None
    for text in ("{}", '{"alice_valid.txt": "59ba"}'):  # the last: v0.1's
        path.write_text(text)
        assert tj.shards_source(str(tmp_path)) is None
    for data in (b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(data)
        with pytest.raises(UserError, match="source.json: cannot be read") as caught:
            tj.shards_source(str(tmp_path))
        assert str(caught.value).isprintable()
    path.unlink()
    path.mkdir()
    assert tj.shards_source(str(tmp_path)) is None
