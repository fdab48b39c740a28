"""Generation: the recurrent step equals the full forward pass, sampling rules in closed cases, streaming text."""

import base64
import json
import math
import random
import shutil
import zlib

import harness
import numpy as np
import pytest
import torch

import train_jepa as tj

TINY = dict(model_dim=64, num_layers=3, d_state=8, expand=1, mlp_mult=1, train_seq_len=32, ssd_chunk=8, num_heads=4,
            num_kv_heads=2)
ALONE = type("Alone", (), dict(rank=0, world=1, main=True, dtype=torch.float32, device=torch.device("cpu"),
                               to_device=staticmethod(lambda t: t), sum_host=staticmethod(lambda t: t)))()


def lively(**knobs):
    """A model with no zero-initialized output, so that every path matters."""
    model, _ = tj.build_models(tj.Config(**TINY | knobs))
    g = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=g)
    return model.requires_grad_(False)


@pytest.mark.parametrize("mixer, prefill", [("mamba2", 5), ("attention", 2), ("mam", 1), ("mam", 17)])
def test_step_logits_equal_full_forward_logits(mixer, prefill):
    """Prefill by the chunked scan, then one recurrence step per token; fp32, other order of sums: 2e-5 absolute."""
    model = lively(mixer=mixer)
    ids = torch.randint(1, 256, (1, 40), generator=torch.Generator().manual_seed(2))
    whole = model.logits(model(ids, torch.float32)[0])[0]
    h, states = model(ids[:, :prefill], torch.float32)
    seen = [model.logits(h)[0]]
    for t in range(prefill, 40):
        h, states = model(ids[:, t:t + 1], torch.float32, states)
        seen.append(model.logits(h)[0])
    assert torch.allclose(torch.cat(seen), whole, atol=2e-5, rtol=0)


def test_generate_conditions_on_the_prompt_and_on_what_it_drew():
    """Greedy: each token is the argmax of a full forward pass over all before it."""
    model, prompt = lively(), [0, 72, 105]
    drawn = list(tj.generate(model, prompt, 25, ALONE, lambda logits: int(logits[1:].argmax()) + 1, stop=0))
    ids = list(prompt)
    for token in drawn:
        logits = model.logits(model(torch.tensor([ids]), torch.float32)[0][0, -1])
        assert int(logits[1:].argmax()) + 1 == token
        ids.append(token)
    assert len(drawn) == 25


def test_generate_ends_at_the_stop_token_and_after_count():
    model = lively()
    answers = iter([5, 6, 0, 7])
    assert list(tj.generate(model, [0], 10, ALONE, lambda logits: next(answers), stop=0)) == [5, 6]
    assert list(tj.generate(model, [0], 0, ALONE, lambda logits: 1, stop=0)) == []
    assert list(tj.generate(model, [0], 3, ALONE, lambda logits: 1, stop=0)) == [1, 1, 1]


def test_state_per_token_is_constant_for_mamba_blocks():
    model, sizes = lively(), set()
    h, states = model(torch.tensor([[0] * 40]), torch.float32)
    for _ in range(30):
        sizes.add(sum(t.numel() for state in states for t in state))
        h, states = model(torch.tensor([[1]]), torch.float32, states)
    assert len(sizes) == 1


def test_operations_per_token_are_constant():
    """Same ATen calls on the same shapes at token 3 and at token 50."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            log.append((str(func), [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]))
            return func(*args, **(kwargs or {}))
    model, logs, log = lively(), [], []

    def choose(logits):
        logs.append(list(log))
        log.clear()
        return int(logits.argmax()) or 1
    with Count():
        list(tj.generate(model, [0, 1, 2], 60, ALONE, choose, stop=-1))
    assert logs[3] == logs[50] and len(logs[3]) > 20


# -- choosing a token ---------------------------------------------------------------------------------------------

def draws(logits, n=2000, temperature=1.0, top_k=0, top_p=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    found = [tj.choose_token(torch.tensor(logits), temperature, top_k, top_p, g) for _ in range(n)]
    return [found.count(i) / n for i in range(len(logits))]


LOGITS = [math.log(p) for p in (0.1, 0.5, 0.15, 0.25)]


def test_temperature_0_is_the_most_likely():
    assert draws(LOGITS, 20, temperature=0) == [0, 1, 0, 0]


def test_temperature_1_draws_the_softmax_and_2_its_square_root():
    assert draws(LOGITS) == pytest.approx([0.1, 0.5, 0.15, 0.25], abs=0.04)      # 3.5 sigma of 2000 draws
    roots = [math.sqrt(p) for p in (0.1, 0.5, 0.15, 0.25)]
    assert draws(LOGITS, temperature=2) == pytest.approx([r / sum(roots) for r in roots], abs=0.04)
    assert draws(LOGITS, 200, temperature=1e-3) == [0, 1, 0, 0]


def test_top_k_keeps_the_k_most_likely_and_their_proportions():
    assert draws(LOGITS, 200, top_k=1) == [0, 1, 0, 0]
    assert draws(LOGITS, top_k=2) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.04)
    assert draws(LOGITS, 500, top_k=99) == pytest.approx([0.1, 0.5, 0.15, 0.25], abs=0.08)


def test_top_p_keeps_the_smallest_set_with_that_probability():
    assert draws(LOGITS, 200, top_p=0.001) == [0, 1, 0, 0]
    assert draws(LOGITS, 200, top_p=0.49) == [0, 1, 0, 0]
    assert draws(LOGITS, top_p=0.7) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.04)
    assert draws(LOGITS, top_p=0.85) == pytest.approx([0, 0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9], abs=0.04)
    assert draws(LOGITS, top_k=3, top_p=0.7)[0] == 0


def test_forbidden_ids_are_never_drawn():
    assert draws([0.0, -math.inf, 1.0], 300)[1] == 0
    assert draws([-math.inf, -math.inf, -5.0], 20, top_p=0.3) == [0, 0, 1]


# -- text ---------------------------------------------------------------------------------------------------------

def streamed(ids, pieces=None):
    parts = list(tj.stream_text(ids, pieces))
    return parts, "".join(parts)


@pytest.mark.parametrize("text", ["plain", "naïve café", "漢字かな", "🙂🚀 mixed é", ""])
def test_valid_utf8_comes_out_whole_and_character_by_character(text):
    parts, whole = streamed(text.encode())
    assert whole == text and "\ufffd" not in "".join(parts)
    assert all(len(part) <= 1 for part in parts)


@pytest.mark.parametrize("data", [b"\xff", b"\x80abc", b"caf\xc3", b"\xe6\xbc", b"\xf0\x9f\x99", b"\xc3(",
                                  b"a\xf5\x80b", b"\xed\xa0\x80", b"\xc0\xaf", bytes(range(1, 256))])
def test_broken_utf8_becomes_replacement_marks_as_python_decodes_it(data):
    parts, whole = streamed(data)
    assert whole == data.decode("utf-8", "replace") and "\ufffd" in whole
    whole.encode("utf-8")  # printable on any UTF-8 terminal: no surrogates


def test_random_bytes_stream_to_what_the_whole_decodes_to():
    rng = random.Random(0)
    for _ in range(300):
        data = bytes(rng.choice(b"ab\xc3\xa9\xe6\xbc\xa2\xf0\x9f\x99\x82\xff\x80") for _ in range(rng.randrange(30)))
        assert streamed(data)[1] == data.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def pieces(demo_data):
    return tj.load_sentencepiece(str(demo_data.tokenizer))


@pytest.mark.parametrize("text", ["Alice was beginning to get very tired", "  two  spaces", "naïve 漢字 🙂 end", "🙂",
                                  "x\ny"])
def test_bpe_streaming_equals_the_whole_decoded(pieces, text):
    ids = pieces.encode(text)
    parts, whole = streamed(ids, pieces)
    assert whole == pieces.decode(ids) and "\ufffd" not in "".join(parts[:-1])


def test_random_bpe_ids_stream_to_the_whole_decoded_and_nothing_is_taken_back(pieces):
    rng = random.Random(1)
    bytes_ = [i for i in range(pieces.vocab_size()) if pieces.is_byte(i)]
    normal = [i for i in range(pieces.vocab_size()) if not (pieces.is_byte(i) or pieces.is_control(i)
                                                            or pieces.is_unknown(i) or pieces.is_unused(i))]
    for _ in range(200):
        ids = [rng.choice(bytes_ if rng.random() < 0.4 else normal) for _ in range(rng.randrange(1, 25))]
        assert streamed(ids, pieces)[1] == pieces.decode(ids)


# -- MODE=sample --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def artifact(tmp_path_factory, demo_data):
    folder = tmp_path_factory.mktemp("sampled")
    assert harness.run(folder, ITERATIONS=2).code == 0
    return folder / "r/model.jepa"


def sample(folder, artifact, **knobs):
    child = harness.run(folder, MODE="sample", ARTIFACT=artifact, SAMPLE_TOKENS=30, **knobs)
    assert child.code == 0, child.text()
    child.output.read_bytes().decode("utf-8")
    return child.text()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_text_and_another_seed_another(tmp_path, artifact):
    first = sample(tmp_path, artifact, PROMPT="Once upon", SEED=1)
    assert first.startswith("Once upon") and len(first) > 15
    assert sample(tmp_path, artifact, PROMPT="Once upon", SEED=1) == first
    assert sample(tmp_path, artifact, PROMPT="Once upon", SEED=2) != first
    several = sample(tmp_path, artifact, PROMPT="Once upon", SEED=1, NUM_SAMPLES=3)
    assert several.count("Once upon") == 3 and first.rstrip("\n") in several


def test_sampling_writes_no_run_folder_and_bad_input_is_one_line(tmp_path, artifact):
    for knobs, part in ((dict(ARTIFACT=""), "ARTIFACT"), (dict(ARTIFACT=tmp_path / "none.jepa"), "none.jepa"),
                        (dict(ARTIFACT=artifact, TOP_P=2), "TOP_P=2"),
                        (dict(ARTIFACT=artifact, TEMPERATURE=-1), "TEMPERATURE")):
        child = harness.run(tmp_path, MODE="sample", **knobs)
        assert child.code == 2 and len(child.errors()) == 1 and part in child.errors()[0], child.text()
        assert "Traceback" not in child.text()
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_the_prompts_document_mark_is_left_out(tmp_path, artifact):
    assert len(sample(tmp_path, artifact, PROMPT="", SEED=3)) > 1


# -- vocabularies of artifacts -----------------------------------------------------------------------------------------

def forge(path, artifact, **vocabulary) -> str:
    """A copy of the artifact, with a right checksum, whose vocabulary has other values."""
    meta, sections = tj.read_container(artifact, "artifact")
    meta["config"]["vocabulary"] |= vocabulary
    tj.write_container(path, "artifact", meta, sections)
    return str(path)


def codes(counts) -> str:
    """Packed byte counts, nothing a boundary."""
    return base64.b64encode(zlib.compress((np.asarray(counts) * 4).astype("<u2").tobytes())).decode()


@pytest.mark.parametrize("change", [
    dict(codes=codes([16_383] * 256)), dict(codes=codes([1] * 256)), dict(bos_id=10), dict(source="0" * 64)],
    ids=["16383", "bos counts", "bos_id", "source"])
@pytest.mark.parametrize("mode", ["eval", "sample"])
def test_a_forged_byte_table_is_refused(tmp_path, artifact, change, mode):
    forged = forge(tmp_path / "forged.jepa", artifact, **change)
    child = harness.run(tmp_path, MODE=mode, ARTIFACT=forged)
    assert child.code == 2 and len(child.errors()) == 1, child.text()[-2000:]
    assert "byte counts" in child.errors()[0] and "bpb" not in child.text()


def test_a_bpe_model_is_scored_with_its_own_tokenizer_on_its_own_shards(tmp_path, demo_data):
    bpe = dict(TOKENIZER="bpe", VOCAB_SIZE=8192, EMBED_DIM=16, DATA_PATH=demo_data.bpe, VAL_MAX_TOKENS=64,
               TOKENIZER_PATH=demo_data.tokenizer)
    assert harness.run(tmp_path, ITERATIONS=1, **bpe).code == 0
    artifact = tmp_path / "r/model.jepa"
    forged = forge(tmp_path / "forged.jepa", artifact, codes=codes([16_383] * 8192))
    shards = tmp_path / "shards"
    shutil.copytree(demo_data.bytes, shards)
    (shards / "source.json").write_text(json.dumps(dict(tokenizer="bytes", vocab_size=256)))

    def evaluate(**knobs):
        child = harness.run(tmp_path, MODE="eval", **bpe | knobs)
        assert "Traceback" not in child.text()
        return child

    child = evaluate(ARTIFACT=artifact)
    assert child.code == 0 and "warning" not in child.text(), child.text()
    child = evaluate(ARTIFACT=artifact, TOKENIZER_PATH="")
    assert child.code == 0 and "TOKENIZER_PATH checks them" in child.text()
    child = evaluate(ARTIFACT=forged)
    assert child.code == 2 and "its byte counts are not those of TOKENIZER_PATH" in child.errors()[0]
    child = evaluate(ARTIFACT=artifact, DATA_PATH=shards)
    assert child.code == 2 and "source.json says that the shards hold bytes" in child.errors()[0]
    (shards / "source.json").unlink()  # nothing says it: the score does
    child = evaluate(ARTIFACT=artifact, DATA_PATH=shards)
    assert child.code == 0 and "warning: more than 8 bits per byte" in child.text()
    (shards / "source.json").write_text(json.dumps(dict(tokenizer=tj.file_hash(demo_data.tokenizer))))
    child = harness.run(tmp_path, RUN_ID="other", DATA_PATH=shards)
    assert child.code == 2 and "the model reads bytes" in child.errors()[0] and not (tmp_path / "other").exists()
