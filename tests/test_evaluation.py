"""Bits per byte: every token once, sliding against a naive loop, temperature, carried state, diagnostics."""

import math

import harness
import pytest
import torch
import torch.nn.functional as F

import train_jepa as tj

ALONE = type("Alone", (), dict(rank=0, world=1, main=True, cuda=False, dtype=torch.float32, device=torch.device("cpu"),
                               to_device=staticmethod(lambda t: t), sum_host=staticmethod(lambda t: t),
                               sum_=staticmethod(lambda t: t)))()


def ranks(world):
    """Runtimes of `world` ranks whose sums are taken by the test."""
    shared = dict(vars(type(ALONE)))
    return [type("Rank", (), shared | dict(rank=rank, world=world, main=rank == 0))() for rank in range(world)]


class Fake:
    """A model whose tokens are positions: records each scored (target, context length), with a loss known per target.

    Ids are 0..n-1 in order, so h carries (id, number of tokens that the model has seen before and with it)."""
    V = 4096

    def __init__(self):
        self.scored, self.calls = {}, 0

    def __call__(self, ids, dtype, states=None):
        self.calls += 1
        seen = torch.arange(1, ids.size(1) + 1).expand_as(ids)
        start = 0 if states is None else states
        return torch.stack((ids, seen + start), -1).double(), start + ids.size(1)

    def logits(self, h):
        for token, context in h.tolist():
            self.scored.setdefault(int(token) + 1, []).append(int(context))
        # probability of the next id is exp(-loss): the rest is one far id's
        nll = loss_of(h[:, 0].long() + 1)
        logits = torch.full((len(h), self.V), -1e4, dtype=torch.float64)
        logits[torch.arange(len(h)), h[:, 0].long() + 1] = -nll
        logits[:, self.V - 1] = torch.log1p(-torch.exp(-nll))
        return logits


def loss_of(token):
    return 0.5 + (token * 7919 % 101).double() / 50


def vocabulary(v=Fake.V):
    return tj.Vocabulary(torch.arange(v) % 3 + 1, torch.zeros(v, dtype=torch.bool), torch.zeros(v, dtype=torch.bool), 0)


def fake(n, T, batch_tokens=64, runtime=ALONE):
    """An evaluator of a Fake; it keeps this rank's sums as `total`."""
    def keep(total):
        evaluator.total = total
        return total
    runtime = type("Keeping", (type(runtime),), dict(sum_host=staticmethod(keep)))()
    evaluator = tj.Evaluator(Fake(), torch.arange(n + 1), vocabulary(), T, batch_tokens, runtime)
    return evaluator


def longest_contexts(n, T, stride):
    """Naive: for each target, the window among all offered (every `stride`, and the one that ends with the text) that
    gives the longest context without having scored the target before any earlier window could: by position."""
    found = {}
    for target in range(1, n + 1):
        if target <= T:
            found[target] = target
            continue
        # windows start at k*stride and score their last `stride` targets; the last one ends at n
        starts = [s for s in range(0, n - T + 1, stride) if s < target <= s + T]
        if not any(s + T - stride < target for s in starts):
            starts = [n - T]
        found[target] = max(target - s for s in starts if s == n - T or s + T - stride < target)
    return found


@pytest.mark.parametrize("batch_tokens", [1, 8, 24, 1000])
def test_standard_scores_every_token_once_with_the_known_loss(batch_tokens):
    e = fake(48, 8, batch_tokens)
    score = e.standard()[0]
    assert e.model.scored == {t: [(t - 1) % 8 + 1] for t in range(1, 49)}
    assert score.loss == pytest.approx(float(loss_of(torch.arange(1, 49)).mean()), rel=1e-12)
    bytes_ = int((torch.arange(1, 49) % 3 + 1).sum())
    assert score.bpb == pytest.approx(float(loss_of(torch.arange(1, 49)).sum()) / math.log(2) / bytes_, rel=1e-12)


@pytest.mark.parametrize("n,T,stride", [(n, T, s) for n, T in ((8, 8), (24, 8), (31, 8), (40, 16), (33, 16), (17, 16))
                                        for s in (1, 3, 5, 8, 16) if s <= T])
def test_sliding_scores_every_token_once_with_the_longest_context(n, T, stride):
    for batch in (1, 3, 64):
        e = fake(n, T)
        score = e.sliding(stride, batch)
        assert e.model.scored == {t: [c] for t, c in longest_contexts(n, T, stride).items()}, (batch, e.model.scored)
        assert min(c for t, (c,) in e.model.scored.items() if t > T) > T - stride if n > T else True
        assert score.loss == pytest.approx(float(loss_of(torch.arange(1, n + 1)).mean()), rel=1e-12)


def test_sliding_uses_no_more_forward_passes_than_batches_of_windows():
    e = fake(96, 16)
    e.sliding(4, 5)
    assert e.model.calls == 1 + math.ceil(20 / 5)


def test_on_a_gpu_each_pass_has_one_shape_and_the_same_scores():
    """torch.compile makes a graph per shape; padding must not reach the scores."""
    gpu = type("GPU", (type(ALONE),), dict(cuda=True))()
    for run, shape in ((lambda e: e.standard(), (2, 24)), (lambda e: [e.sliding(5, 3)], (3, 24)),
                       (lambda e: e.carried(), (1, 48))):
        plain, padded = fake(173, 24), fake(173, 24, runtime=gpu)
        call, shapes = padded.forward, set()

        def forward(ids, dtype, states=None, call=call, shapes=shapes):
            shapes.add(tuple(ids.shape))
            return call(ids, dtype, states)
        padded.forward = forward
        assert run(padded) == run(plain) and shapes == {shape}
        assert padded.model.scored == plain.model.scored


@pytest.mark.parametrize("world", [2, 3, 4, 12])
@pytest.mark.parametrize("lane", [tj.LANE, 5])
def test_any_number_of_ranks_scores_every_token_once(world, lane, monkeypatch):
    monkeypatch.setattr(tj, "LANE", lane)
    for way in (lambda e: e.standard(), lambda e: e.sliding(3, 2), lambda e: e.carried()):
        whole = fake(40, 8)
        way(whole)
        total, scored = torch.zeros(1, dtype=torch.float64), {}
        for runtime in ranks(world):
            e = fake(40, 8, runtime=runtime)
            way(e)
            total += e.total
            assert not set(scored) & set(e.model.scored)
            scored |= e.model.scored
        assert scored == whole.model.scored
        assert torch.allclose(total, whole.total, rtol=1e-14)


def test_carried_gives_each_token_all_of_its_past():
    for batch_tokens in (8, 24, 1000):
        e = fake(40, 8, batch_tokens)
        e.carried()[0]
        assert e.model.scored == {t: [t] for t in range(1, 41)}


# -- with a real model --------------------------------------------------------------------------------------------

CONFIG = tj.Config(model_dim=64, num_layers=2, d_state=8, expand=1, mlp_mult=1, train_seq_len=24, ssd_chunk=8)


@pytest.fixture(scope="module")
def model():
    model, _ = tj.build_models(CONFIG)
    g = torch.Generator().manual_seed(3)
    for parameter in model.parameters():  # zero-initialized outputs would hide the context
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=g)
    return model.requires_grad_(False)


def evaluator(model, n, batch_tokens=72, seq_len=24):
    tokens = torch.randint(1, 256, (n + 1,), generator=torch.Generator().manual_seed(1))
    return tj.Evaluator(model, tokens, tj.byte_vocabulary(), seq_len, batch_tokens, ALONE)


def test_bpb_of_bytes_is_the_loss_over_ln_2(model):
    score = evaluator(model, 96).standard()[0]
    assert score.bpb == pytest.approx(score.loss / math.log(2), rel=1e-14)


def test_a_document_mark_counts_no_bytes_but_its_loss_counts(model):
    e = evaluator(model, 96)
    e.tokens[50] = tj.BYTE_BOS
    e = tj.Evaluator(model, e.tokens, tj.byte_vocabulary(), 24, 72, ALONE)
    score = e.standard()[0]
    assert e.bytes == 95 and score.bpb == pytest.approx(score.loss * 96 / 95 / math.log(2), rel=1e-14)


def test_sliding_at_stride_T_is_the_standard_evaluation(model):
    """fp32 products in batches of other sizes: equal to 1e-6 relative."""
    e = evaluator(model, 96)
    assert e.sliding(24, 3).loss == pytest.approx(e.standard()[0].loss, rel=1e-6)


@pytest.mark.parametrize("n,stride", [(24, 5), (60, 1), (61, 7), (59, 24), (72, 12)])
def test_sliding_equals_a_naive_loop_over_tokens(model, n, stride):
    e = evaluator(model, n)
    total = 0.0
    for target, context in longest_contexts(n, 24, stride).items():
        h = model(e.tokens[None, target - context:target], torch.float32)[0]
        total += float(F.cross_entropy(model.logits(h[0, -1:]), e.tokens[target:target + 1]))
    assert e.sliding(stride, 4).loss == pytest.approx(total / n, rel=2e-6)


def test_carried_equals_one_forward_of_the_whole_text(model):
    e = evaluator(model, 24 * 7, batch_tokens=48)
    h = model(e.tokens[None, :-1], torch.float32)[0]
    whole = float(F.cross_entropy(model.logits(h[0]), e.tokens[1:]))
    assert e.carried()[0].loss == pytest.approx(whole, rel=2e-6)


def test_batch_size_does_not_change_the_score(model):
    scores = [evaluator(model, 240, batch).standard()[0].loss for batch in (1, 24, 100, 10_000)]
    assert max(scores) - min(scores) < 1e-6 * scores[0]
    sliding = [evaluator(model, 100).sliding(7, batch).loss for batch in (1, 4, 64)]
    assert max(sliding) - min(sliding) < 1e-6 * sliding[0]


# -- states carried with attention --------------------------------------------------------------------------------

def hybrid(pattern, n, **knobs):
    """A model of this pattern with random outputs, and an evaluator of n targets."""
    config = tj.Config(model_dim=64, num_layers=len(pattern), mixer=pattern, d_state=8, expand=1, mlp_mult=1,
                       num_heads=4, num_kv_heads=2, train_seq_len=24, ssd_chunk=8)
    model, _ = tj.build_models(config)
    g = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=g)
    return evaluator(model.requires_grad_(False), n, **knobs)


@pytest.mark.parametrize("pattern", ["mam", "aam", "a"])
def test_a_hybrid_carried_with_an_overlap_that_covers_the_text_equals_one_forward_of_the_whole(pattern):
    e = hybrid(pattern, 24 * 7)
    h = e.model(e.tokens[None, :-1], torch.float32)[0]
    whole = float(F.cross_entropy(e.model.logits(h[0]), e.tokens[1:]))
    assert e.carried(overlap=24 * 7)[0].loss == pytest.approx(whole, rel=2e-6)
    assert abs(e.carried(overlap=8)[0].loss - whole) > 1e-4                     # and the overlap matters


def test_one_attention_block_carried_equals_sliding_windows_with_that_overlap():
    """Keys and values of a single block depend on their own token: the windows of stride T - overlap see the same."""
    e = hybrid("a", 24 + 16 * 5)
    assert e.carried(overlap=8)[0].loss == pytest.approx(e.sliding(16, 4).loss, rel=2e-6)


def test_the_state_space_part_of_a_hybrid_is_carried_past_the_overlap():
    """With attention's output silenced, a hybrid is a Mamba-2 model: any overlap gives its carried score."""
    e = hybrid("mam", 24 * 7)
    e.model.blocks[1].mixer.out_proj.weight.data.zero_()
    assert e.carried(overlap=0)[0].loss == pytest.approx(e.carried(overlap=24 * 7)[0].loss, rel=2e-6)


@pytest.mark.parametrize("overlap", [0, 3, 7, 8, 40])
@pytest.mark.parametrize("n", [8, 16, 40])
def test_carried_with_an_overlap_scores_every_token_once_in_pieces_of_a_sequence(n, overlap):
    e = fake(n, 8)
    lengths, trim = [], lambda states, o: states
    forward = e.forward
    e.model.trim_states, e.forward = trim, lambda ids, *rest: lengths.append(ids.size(1)) or forward(ids, *rest)
    e.carried(overlap=overlap)
    assert e.model.scored == {t: [t] for t in range(1, n + 1)}
    assert lengths[0] == 8 and max(lengths[1:], default=0) <= (8 - overlap if overlap < 8 else 8)


def test_attention_re_reads_a_quarter_of_a_sequence_by_default_and_so_never_sees_more_than_in_training():
    """In a hybrid of 10,000 steps, an overlap as long as its rows cost 0.03 BPB (RESULTS.md, long runs)."""
    hybrid = dict(mixer="ma", num_layers=2, train_seq_len=64)
    assert tj.Config(**hybrid).overlap == 16 and tj.Config(**hybrid, attention_overlap=40).overlap == 40
    assert tj.Config(train_seq_len=64).overlap is None
    spans = []
    e = fake(200, 64)
    e.model.trim_states = lambda states, overlap: min(states, overlap)  # the fake's state counts the tokens seen
    forward = e.forward
    e.forward = lambda ids, dtype, states: spans.append((states or 0) + ids.size(1)) or forward(ids, dtype, states)
    e.carried(overlap=tj.Config(**hybrid).overlap)
    assert max(spans) == 64 and len(spans) == 4


@pytest.mark.parametrize("n", [64, 160, 163, 167])
def test_a_long_text_is_carried_in_eight_lanes_each_from_empty_states(n, monkeypatch):
    """Positions in a lane count from its start; the few targets left over see the T tokens before them."""
    monkeypatch.setattr(tj, "LANE", 8)
    e, length = fake(n, 8, batch_tokens=32), n // 8
    e.carried()
    expected = {t: [(t - 1) % length + 1] for t in range(1, 8 * length + 1)}
    assert e.model.scored == expected | {t: [8 - (n - t)] for t in range(8 * length + 1, n + 1)}


@pytest.mark.parametrize("pattern, overlap", [("mm", None), ("mam", 160)])
def test_lanes_equal_a_forward_of_each(pattern, overlap, monkeypatch):
    monkeypatch.setattr(tj, "LANE", 24)
    e = hybrid(pattern, 24 * 16 + 3)
    lanes = torch.stack((e.tokens[:-1], e.tokens[1:]))[:, :24 * 16].view(2, 8, 48)
    nll = lambda x, y: F.cross_entropy(e.model.logits(e.model(x, torch.float32)[0]).flatten(0, -2), y.flatten(),
                                       reduction="none")
    total = nll(*lanes).sum() + nll(e.tokens[None, -25:-1], e.tokens[-24:])[-3:].sum()
    assert e.carried(overlap=overlap)[0].loss == pytest.approx(float(total) / e.targets, rel=2e-6)
    monkeypatch.setattr(tj, "LANE", 1 << 20)
    assert abs(e.carried(overlap=overlap)[0].loss - float(total) / e.targets) > 1e-5  # lanes begin without a past


# -- test-time training -------------------------------------------------------------------------------------------

WAYS = {"reset": dict(), "sliding": dict(sliding_eval=True, sliding_eval_stride=8, sliding_batch_size=5),
        "carried": dict(eval_state="carry")}


def adapting(way="reset", pattern="mm", **knobs):
    return tj.Config(**dict(model_dim=64, num_layers=2, d_state=8, expand=1, mlp_mult=1, num_heads=4, num_kv_heads=2,
                            train_seq_len=24, ssd_chunk=8, mixer=pattern, adapt_chunk_tokens=50, adapt_lr=0.05,
                            attention_overlap=8) | WAYS[way] | knobs)


def plain_score(e, c):
    if c.eval_state == "carry":
        return e.carried(overlap=c.overlap)[0]
    return e.sliding(c.sliding_eval_stride, c.sliding_batch_size) if c.sliding_eval else e.standard()[0]


class Recording(tj.Evaluator):
    """Keeps the NLL of every batch with a hash of the weights that made it."""
    def _nll(self, h, targets, temperatures):
        nll = super()._nll(h, targets, temperatures)
        weights = hash(tuple(float(p.detach().double().sum()) for p in self.model.parameters()))
        self.record.append((targets.numel(), float(nll), weights))
        return nll


def recording(e):
    other = Recording(e.model, e.tokens, e.vocabulary, e.seq_len, e.sequences * e.seq_len, e.runtime)
    other.record = []
    return other


@pytest.mark.parametrize("pattern", ["mm", "ma"])
@pytest.mark.parametrize("way", WAYS)
def test_adapted_at_rate_0_is_the_plain_score_bit_for_bit(way, pattern):
    e, c = hybrid(pattern, 24 * 13), adapting(way, pattern, adapt_lr=0.0)
    assert e.adapted(c) == plain_score(e, c)


@pytest.mark.parametrize("way", WAYS)
def test_adapted_scores_each_chunk_with_the_weights_before_it_and_restores_them(way):
    e, c = recording(hybrid("ma", 24 * 13)), adapting(way, "ma")
    before = {name: p.detach().clone() for name, p in e.model.named_parameters()}
    flags, trained = [p.requires_grad for p in e.model.parameters()], []
    train = tj.Adaptation.train

    def note(self, first, stop):
        trained.append((first, stop, sum(count for count, *_ in e.record)))
        train(self, first, stop)
    tj.Adaptation.train = note
    try:
        adapted = e.adapted(c)
    finally:
        tj.Adaptation.train = train
    assert all(torch.equal(p, before[name]) for name, p in e.model.named_parameters())
    assert flags == [p.requires_grad for p in e.model.parameters()]
    # chunks follow each other without gaps, each trained on after all of its tokens were scored; the last is not
    assert len(trained) >= 3 and all(stop == scored for _, stop, scored in trained)
    assert [first for first, *_ in trained] == [0, *(stop for _, stop, _ in trained[:-1])]
    assert trained[-1][1] < e.targets == sum(count for count, *_ in e.record)
    # one set of weights per chunk, another after each training; the first chunk as without training
    weights = [w for *_, w in e.record]
    ends = [stop for _, stop, _ in trained] + [e.targets]
    scored, sets = 0, [set() for _ in ends]
    for count, _, w in e.record:
        scored += count
        sets[next(i for i, end in enumerate(ends) if scored <= end)].add(w)
    assert all(len(s) == 1 for s in sets) and len(set(weights)) == len(ends)
    learned, e.record = e.record, []
    assert adapted != plain_score(e, c)
    first = [x[:2] for x in learned if x[2] == weights[0]]
    assert first == [x[:2] for x in e.record[:len(first)]]


@pytest.mark.parametrize("way", WAYS)
def test_scores_do_not_change_when_later_tokens_change(way):
    """The text from token 200 on is another: every batch that ends before it has the same NLL, bit for bit."""
    records = []
    for changed in (False, True):
        e, c = recording(hybrid("ma", 24 * 13)), adapting(way, "ma")
        if changed:
            e.tokens[200:] = (e.tokens[200:] + 7) % 256
        e.adapted(c)
        records.append(e.record)
    scored = 0
    for (count, *one), (_, *other) in zip(*records):
        scored += count
        if scored < 200:
            assert one == other
    assert records[0][-1] != records[1][-1]


def test_adapted_learns_a_repeated_text_and_only_the_named_parameters():
    e = hybrid("mm", 24 * 40)
    e.tokens[:] = torch.arange(len(e.tokens)) % 5 + 60
    plain, all_of_it = e.standard()[0].loss, e.adapted(adapting(adapt_steps=2)).loss
    scalars = e.adapted(adapting(adapt_params="scalars", adapt_steps=2)).loss
    assert all_of_it < 0.8 * plain and scalars < 0.95 * plain
    adaptation = tj.Adaptation(e, adapting(adapt_params="scalars"))
    names = {name for name, role, p in tj.named_roles(e.model) if any(p is q for q in adaptation.parameters)}
    assert "token_embed" not in names and "blocks.0.mlp.up.weight" not in names and "blocks.0.mixer.A_log" in names


def test_the_step_is_sgd_with_momentum_clip_and_cosine():
    """Against torch.optim.SGD on the same mean loss, with a clip by norm, over three chunks of two sequences."""
    c = adapting(adapt_lr=0.3, adapt_clip=0.5, adapt_steps=2)
    e, twin = hybrid("ma", 24 * 8), hybrid("ma", 24 * 8)
    parameters = [p.requires_grad_(True) for p in twin.model.parameters()]
    sgd = torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
    with tj.Adaptation(e, c) as adaptation:
        for first in (0, 48, 96):
            adaptation.train(first, first + 48)
            rows = twin.tokens[first:first + 49]
            sgd.param_groups[0]["lr"] = 0.3 * (1 + math.cos(math.pi * first / (24 * 8))) / 2
            for _ in range(2):
                sgd.zero_grad()
                h, _ = twin.model(rows[:-1].view(-1, 24), torch.float32)
                F.cross_entropy(twin.model.logits(h).flatten(0, 1), rows[1:]).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 0.5)
                sgd.step()
        for ours, theirs in zip(adaptation.parameters, parameters):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)   # fp32, two orders of summation


def test_a_gradient_that_is_not_finite_changes_nothing():
    e, c = hybrid("mm", 24 * 8), adapting()
    with tj.Adaptation(e, c) as adaptation:
        adaptation.gradient = lambda first, stop: torch.full_like(adaptation.master, math.nan)
        adaptation.train(0, 48)
        assert all(torch.equal(p, value) for p, (value, _) in zip(adaptation.parameters, adaptation.before))


@pytest.mark.parametrize("planted", [0.7, 0.9, 1.0, 1.06, 1.36])
def test_temperature_search_finds_a_planted_temperature(planted):
    """Tokens drawn from softmax(logits / planted): the best on a grid of 0.02 lies within sampling error of it."""
    table = torch.randn(64, 64, generator=torch.Generator().manual_seed(5)) * 2

    class Bigram:
        def __call__(self, ids, dtype, states=None):
            return table[ids], None

        def logits(self, h):
            return h
    p, g, tokens = torch.softmax(table / planted, -1), torch.Generator().manual_seed(6), [0]
    draws = torch.multinomial(p, 20_000, replacement=True, generator=g)
    for index in range(40_000 // 2):
        tokens.append(int(draws[tokens[-1], index]))
    vocab = tj.Vocabulary(torch.ones(64, dtype=torch.int64), torch.zeros(64, dtype=torch.bool),
                          torch.zeros(64, dtype=torch.bool), 0)
    found = tj.best_temperature(tj.Evaluator(Bigram(), torch.tensor(tokens), vocab, 100, 4000, ALONE).standard)
    assert abs(found - planted) <= 0.04


def test_several_temperatures_in_one_pass_equal_single_passes(model):
    e = evaluator(model, 96)
    together = [s.loss for s in e.standard([0.8, 1.0, 1.5])]
    assert together == pytest.approx([e.standard([t])[0].loss for t in (0.8, 1.0, 1.5)], rel=1e-12)
    h = model(e.tokens[:-1].view(-1, 24), torch.float32)[0]
    direct = float(F.cross_entropy(model.logits(h).flatten(0, 1) / 0.8, e.tokens[1:]))
    assert together[0] == pytest.approx(direct, rel=1e-6)


@pytest.mark.slow
def test_number_of_ranks_does_not_change_the_score_of_a_run(tmp_path, diagnosed):
    """Evaluation alone, of one artifact, with gloo: all ranks' sums in fp64, forward passes of other sizes."""
    knobs = dict(MODE="eval", ARTIFACT=diagnosed / "model.jepa", SLIDING_EVAL=1, SLIDING_EVAL_STRIDE=8,
                 SLIDING_BATCH_SIZE=16, EVAL_STATE="carry", VAL_MAX_TOKENS=500, VAL_BATCH_SIZE=256, EVAL_ADAPT=1,
                 ADAPT_CHUNK_TOKENS=100, ADAPT_LR=0.02)
    reports = []
    for world in (1, 2):
        ranks = harness.run_ranks(tmp_path, world, **knobs)
        assert [child.code for child in ranks] == [0] * world, ranks[0].text()[-2000:]
        reports.append(tj.json.loads(ranks[0].text().splitlines()[-1]))
    for report in reports[1:]:
        for key in ("roundtrip_val_bpb", "sliding_val_bpb", "carried_val_bpb", "adapted_val_bpb"):
            assert report[key] == pytest.approx(reports[0][key], rel=1e-6)
        assert abs(report["adapted_val_bpb"] - report["carried_val_bpb"]) > 1e-4


# -- diagnostics on constructed latents ---------------------------------------------------------------------------

def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_effective_rank_of_isotropic_rank_2_and_constant_latents():
    assert tj.effective_rank(gaussian(64, 128, 16)) == pytest.approx(16, rel=0.01)   # 8192 samples: Wishart spread
    plane = gaussian(64, 128, 2) @ torch.linalg.qr(gaussian(16, 2, seed=1))[0].T
    assert tj.effective_rank(plane) == pytest.approx(2, rel=0.01)
    line = gaussian(64, 128, 1) * gaussian(16, seed=1)
    assert tj.effective_rank(line) == pytest.approx(1, abs=0.01)
    spectrum = torch.tensor([4.0, 2.0, 1.0, 1.0])                                    # entropy 1.2130 nats
    exact = torch.linalg.qr(gaussian(4000, 4) - gaussian(4000, 4).mean(0))[0]
    share = spectrum / spectrum.sum()
    assert tj.effective_rank((exact * spectrum.sqrt())[None] * 50) == pytest.approx(
        math.exp(-float((share * share.log()).sum())), rel=0.01)
    assert math.isfinite(tj.effective_rank(torch.ones(2, 3, 5))) and math.isfinite(tj.effective_rank(gaussian(2, 3, 1)))


def test_within_share_of_constant_rows_alike_rows_and_independent_values():
    rows = gaussian(32, 1, 8).expand(32, 50, 8)
    assert tj.within_share(rows) == pytest.approx(0, abs=1e-12)
    alike = gaussian(1, 50, 8).expand(32, 50, 8)
    assert tj.within_share(alike) == pytest.approx(1, rel=1e-6)
    assert tj.within_share(gaussian(32, 50, 8)) == pytest.approx(1 - 1 / 50, rel=0.01)
    half = rows + gaussian(32, 50, 8, seed=2)                                        # variances 1 and 1
    assert tj.within_share(half) == pytest.approx(0.5, abs=0.06)                     # 32 row means: +-0.05
    assert 0 <= tj.within_share(torch.ones(2, 3, 4)) <= 1


def test_lag1_autocorrelation_of_white_noise_constant_rows_alternation_rotation_and_ar1():
    assert abs(tj.lag1_autocorrelation(gaussian(32, 200, 8))) < 3 / math.sqrt(32 * 199 * 8)
    assert tj.lag1_autocorrelation(gaussian(64, 1, 8).expand(64, 50, 8)) == pytest.approx(1, abs=1e-6)
    signs = (-1.0) ** torch.arange(50)
    assert tj.lag1_autocorrelation(signs.view(1, 50, 1) * torch.ones(4, 50, 3)) == pytest.approx(-1, abs=1e-6)
    angle = 0.3 * torch.arange(2000)
    turning = torch.stack((angle.cos(), angle.sin()), -1)[None]
    assert tj.lag1_autocorrelation(turning) == pytest.approx(math.cos(0.3), abs=2e-3)  # 2000 steps: no whole turns
    x, noise = torch.zeros(64, 400, 4), gaussian(64, 400, 4)
    for t in range(1, 400):
        x[:, t] = 0.8 * x[:, t - 1] + noise[:, t]
    assert tj.lag1_autocorrelation(x) == pytest.approx(0.8, abs=0.01)


def test_predictability_of_a_perfect_a_mean_and_a_wrong_guess():
    target = gaussian(16, 40, 8)
    assert tj.predictability(target, target) == 1
    assert tj.predictability(target.mean((0, 1)).expand_as(target), target) == pytest.approx(0, abs=1e-6)
    assert tj.predictability(-target, target) == pytest.approx(-3, abs=0.01)
    assert tj.predictability(target + 0.5 * gaussian(16, 40, 8, seed=1), target) == pytest.approx(0.75, abs=0.02)
    spread = target * torch.tensor([10.0] + [0.1] * 7)                               # weighted by variance
    guess = spread.clone()
    guess[..., 1:] = 0
    assert tj.predictability(guess, spread) > 0.99


def test_sigreg_of_a_gaussian_meets_its_null_and_collapse_does_not():
    directions = F.normalize(gaussian(64, 32, seed=9), dim=-1)
    null = tj.sigreg_null(256)
    values = torch.stack([tj.sigreg(gaussian(256, 20, 32, seed=s), directions) for s in range(5)])
    assert float(values.mean()) == pytest.approx(null, rel=0.05)
    for collapsed in (torch.zeros(256, 20, 32), gaussian(1, 20, 32).expand(256, 20, 32), 0.2 * gaussian(256, 20, 32),
                      gaussian(256, 20, 2) @ torch.linalg.qr(gaussian(32, 2))[0].T):
        assert float(tj.sigreg(collapsed, directions)) > 5 * null
    constant = gaussian(256, 1, 32).expand(256, 20, 32)                              # the batch axis cannot see it
    assert float(tj.sigreg(constant, directions)) < 1.5 * null
    assert float(tj.sigreg(constant, directions, axis="time")) > 20 * tj.sigreg_null(20)


def test_gradient_shares_of_planted_gradients():
    a, b = gaussian(50), gaussian(50, seed=1)
    b -= a * (a @ b) / (a @ a)
    h = gaussian(50, seed=2).requires_grad_()
    found = tj.gradient_shares(h, {"ce": h @ a, "same": 2 * (h @ a), "across": h @ b, "against": -0.5 * (h @ a)})
    assert found["same_grad_ratio"] == pytest.approx(2, rel=1e-5)
    assert found["same_grad_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["across_grad_ratio"] == pytest.approx(float(b.norm() / a.norm()), rel=1e-5)
    assert found["across_grad_cosine"] == pytest.approx(0, abs=1e-5)
    assert found["against_grad_ratio"] == pytest.approx(0.5, rel=1e-5)
    assert found["against_grad_cosine"] == pytest.approx(-1, abs=1e-5)
    assert "ce_grad_ratio" not in found and h.grad is None
    assert tj.gradient_shares(h, {"ce": (h * h).sum()}) == {}


@pytest.mark.slow
def test_linear_probe_learns_what_is_linear_and_nothing_from_noise():
    n, targets = 5000, torch.randint(0, 8, (5000,), generator=torch.Generator().manual_seed(0))
    h, lengths = F.one_hot(targets, 8).float() * 20, torch.ones(5000, dtype=torch.int64)
    assert tj.linear_probe(h, targets, lengths, 8, 300, 0) < 0.1
    assert tj.linear_probe(gaussian(n, 8), targets, lengths, 8, 100, 0) == pytest.approx(3, abs=0.05)  # log2(8)
    assert tj.linear_probe(h, targets, lengths * 2, 8, 0, 0) == pytest.approx(1.5, rel=1e-5)           # untrained
    assert tj.linear_probe(h, targets, lengths, 8, 50, 1) == tj.linear_probe(h, targets, lengths, 8, 50, 1)


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory, demo_data):
    """The folder of a finished run with DIAGNOSTICS=1."""
    folder = tmp_path_factory.mktemp("diagnosed")
    child = harness.run(folder, DIAGNOSTICS=1, PROBE_STEPS=5, ITERATIONS=3, VAL_LOSS_EVERY=2)
    assert child.code == 0, child.text()[-1500:]
    return folder / "r"


def test_diagnostics_of_a_run_are_complete_and_in_range(diagnosed):
    found = tj.json.loads((diagnosed / "result.json").read_text())["diagnostics"]
    assert 0 <= found["top1_accuracy"] <= found["top5_accuracy"] <= found["top10_accuracy"] <= 1
    assert -1 <= found["jepa_cosine"] <= 1 and found["jepa_mse"] >= 0
    assert 0 < found["probe_bpb"] < 10 and found["predictability_1"] <= 1
    assert 1 <= found["z_effective_rank"] <= 64 and found["sigreg_over_null"] > 0
    assert set(found) >= {"h_effective_rank", "h_within_share", "z_within_share", "z_lag1_autocorrelation",
                          "predictability_1", "predictability_2", "jepa_grad_ratio", "anti_grad_cosine"}


@pytest.mark.slow
def test_diagnostics_change_nothing_in_training(tmp_path, diagnosed):
    assert harness.run(tmp_path, ITERATIONS=3, VAL_LOSS_EVERY=2).code == 0
    assert tj.file_hash(diagnosed / "model.jepa") == tj.file_hash(tmp_path / "r/model.jepa")
