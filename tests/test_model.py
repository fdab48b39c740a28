"""The model: causality, U-Net, tie modes, attention and MLPs against independent forms, carried states."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from gpu_stand_in import OnGpu
from tolerance import bound
from torch import nn

import train_jepa as tj
from train_jepa import Config

SMALL = dict(MODEL_DIM="64", NUM_LAYERS="4", EXPAND="1", EMBED_DIM="32", D_STATE="8", MLP_MULT="2", VOCAB_SIZE="50",
             NUM_HEADS="4", NUM_KV_HEADS="2", SSD_CHUNK="8", TRAIN_SEQ_LEN="64", TOKENIZER="bpe", TIE_EMBEDDINGS="1")
PATTERNS = pytest.mark.parametrize("mixer", ["mamba2", "attention", "amma"])


def configure(**knobs) -> Config:
    return Config.from_env(SMALL | {name: str(value) for name, value in knobs.items()})


def build(stir=True, **knobs) -> tj.LanguageModel:
    """A small model, moved off its zero and one initializations."""
    torch.manual_seed(0)
    model = tj.LanguageModel(configure(**knobs))
    if stir:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.1))
    return model


def ids(*shape, vocab=50, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def logits(model, tokens, dtype=torch.float32):
    return model.logits(model(tokens, dtype)[0])


def off(found, expected) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


# -- whole model -------------------------------------------------------------------------------------------------------

@PATTERNS
@pytest.mark.parametrize("layers", [3, 4])
def test_no_position_sees_what_comes_later(mixer, layers):
    model, tokens = build(MIXER=mixer[:layers] if len(mixer) == 4 else mixer, NUM_LAYERS=layers), ids(2, 20)
    before = logits(model, tokens)
    for position in (0, 7, 8, 19):  # also at the borders of the scan's chunks
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 50
        after = logits(model, changed)
        assert torch.equal(before[:, :position], after[:, :position])
        assert (before[:, position:] != after[:, position:]).any(-1).all()  # and every later one sees it


def test_rows_of_a_batch_do_not_see_each_other():
    model, tokens = build(MIXER="mmam"), ids(3, 20)
    assert off(logits(model, tokens[1:2]), logits(model, tokens)[1:2]) < 1e-5  # other matrix shapes, other rounding


class Tag(nn.Module):
    """A mixer that adds a known vector: with all else silenced, the U-Net becomes arithmetic."""
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, u, state=None, scale=1.0):
        return scale * torch.full_like(u, self.value), state


@pytest.mark.parametrize("layers, encoders", [(4, 2), (5, 2), (3, 1), (1, 0), (2, 1)])
def test_skips_are_last_in_first_out_and_odd_counts_leave_the_last_decoders_without(layers, encoders, monkeypatch):
    model = build(stir=False, NUM_LAYERS=layers, MLP_MULT=0)
    decoders, skips = layers - encoders, min(encoders, layers - encoders)
    assert model.skip_weights.shape == (skips, 64) and torch.equal(model.skip_weights, torch.ones(skips, 64))
    with torch.no_grad():
        for index in range(skips):
            model.skip_weights[index] = 10.0 ** (index + 1)
    for index, block in enumerate(model.blocks):
        block.mixer = Tag(float(index + 1))
    monkeypatch.setattr(tj, "rms_norm", lambda x, eps, weight=None: x)
    h, _ = model(ids(1, 3), torch.float32)
    x, pushed = model.embed(ids(1, 3), torch.float32), []
    for index in range(encoders):
        x = x + (index + 1)
        pushed.append(x)
    for decoder in range(decoders):
        if pushed:
            x = x + 10.0 ** (decoder + 1) * pushed.pop()
        x = x + (encoders + decoder + 1)
    assert torch.allclose(h, x, rtol=1e-6)  # one rounding per addition


def test_a_block_is_the_specified_sum():
    torch.manual_seed(0)
    block = tj.Block(configure(MLP_NORM=1), 0, tj.Kernels())
    block.mixer, mlp = Tag(0.5), block.mlp
    assert torch.equal(block.mix, torch.stack((torch.ones(64), torch.zeros(64))))
    assert torch.equal(block.mixer_scale, torch.ones(64)) and torch.equal(block.mlp_scale, torch.ones(64))
    with torch.no_grad():
        for p in block.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    x, x0 = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    y = block.mix[0] * x + block.mix[1] * x0
    y = y + block.mixer_scale * 0.5
    y = y + block.mlp_scale * mlp(y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    assert off(block(x, x0)[0], y) < 1e-6


def test_an_mlp_stands_in_every_nth_block_from_the_first():
    for every, expected in ((1, [1, 1, 1, 1, 1]), (2, [1, 0, 1, 0, 1]), (3, [1, 0, 0, 1, 0])):
        model = build(NUM_LAYERS=5, MLP_EVERY=every)
        assert [block.mlp is not None for block in model.blocks] == [bool(n) for n in expected]
    assert all(block.mlp is None for block in build(MLP_MULT=0).blocks)


def test_the_embedding_is_normalized_and_starts_at_its_std():
    model = build(stir=False, VOCAB_SIZE=2000)
    assert abs(model.token_embed.std() / 0.02 - 1) < 0.02  # 64,000 draws: 0.3% scatter
    x0 = model.embed(ids(2, 5), torch.float32)
    assert (x0.square().mean(-1) - 1).abs().max() < 4e-3  # eps 1.2e-7 beside rows of 1e-4 and more
    tied = build(stir=False, VOCAB_SIZE=2000, EMBED_STYLE="tied", EMBED_DIM=64, TIE_EMBEDDINGS=1)
    assert abs(tied.token_embed.std() / 0.005 - 1) < 0.02
    untied = build(stir=False, VOCAB_SIZE=2000, EMBED_STYLE="tied", EMBED_DIM=64, TIE_EMBEDDINGS=0)  # system B's
    assert abs(untied.token_embed.std() - 1) < 0.02 and not untied.lm_head.any()


@pytest.mark.parametrize("knobs", [{}, dict(EMBED_DIM=64)], ids=["projected", "of the width"])
def test_many_tokens_look_up_the_projected_table_with_the_same_gradients(knobs):
    model, tokens = build(**knobs).double(), ids(2, 40)
    weights = [p for name, p in model.named_parameters() if "embed_proj." in name or name == "token_embed"]
    direction = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = model.embed(tokens, torch.float64)  # 80 tokens, 50 rows
    parts = torch.cat([model.embed(part, torch.float64) for part in tokens.split(20, dim=1)], dim=1)
    assert torch.allclose(whole, parts, rtol=1e-12)
    for found, expected in zip(*(torch.autograd.grad((x * direction).sum(), weights) for x in (whole, parts))):
        assert off(found, expected) <= 1e-12


def test_hidden_states_are_normalized():
    h = build()(ids(2, 9), torch.float32)[0]
    assert torch.allclose(h.square().mean(-1), torch.ones(2, 9), atol=1e-4)


@pytest.mark.parametrize("tie", [0, 1, 2, 3])
def test_every_parameter_gets_a_gradient_once_zeros_have_moved(tie):
    config = configure(MIXER="amma", TIE_EMBEDDINGS=tie, PROJECTOR_TYPE="mlp")
    torch.manual_seed(0)
    model, jepa = tj.LanguageModel(config), tj.JepaHead(config)
    with torch.no_grad():
        for p in (*model.parameters(), *jepa.parameters()):
            p.add_(torch.randn_like(p) * 0.1)
    tokens = ids(2, 20)
    h, _ = model(tokens, torch.float32)
    loss = F.cross_entropy(model.logits(h).flatten(0, 1), ids(2, 20, seed=1).flatten())
    (loss + jepa.predict(jepa.project(h)).square().mean()).backward()
    silent = [name for module in (model, jepa) for name, p in module.named_parameters()
              if p.grad is None or not p.grad.abs().max() > 0]
    assert not silent


def test_every_parameter_has_exactly_one_known_role():
    for tie in range(4):
        for mixer in ("mmam", "attention"):
            model = build(MIXER=mixer, TIE_EMBEDDINGS=tie)
            roles = tj.named_roles(model)
            assert sorted(name for name, _, _ in roles) == sorted(dict(model.named_parameters()))
            for name, role, p in roles:
                if role == "matrix":
                    assert p.ndim == 2, name
                assert (role == "state") == name.endswith(("dt_bias", "A_log", ".D")), name


# -- head --------------------------------------------------------------------------------------------------------------

HEAD_PARTS = {0: {"lm_head": (50, 64)}, 1: {"embed_proj_rev.weight": (32, 64)},
              2: {"embed_proj_rev.weight": (32, 64), "lm_head_correction": (50, 32)}, 3: {"adapter.weight": (32, 64)}}


@pytest.mark.parametrize("tie", [0, 1, 2, 3])
def test_tie_modes_have_their_parameters_and_their_formula(tie):
    model = build(stir=False, TIE_EMBEDDINGS=tie)
    common = {"token_embed": (50, 32), "embed_proj.weight": (64, 32), "vocab_bias": (50,), "skip_weights": (2, 64)}
    found = {name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith("blocks.")}
    assert found == common | HEAD_PARTS[tie]
    assert torch.equal(model.vocab_bias, torch.zeros(50))
    if tie == 2:
        assert torch.equal(model.lm_head_correction, torch.zeros(50, 32))
    model = build(TIE_EMBEDDINGS=tie)
    h = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)) * 3
    raw = {0: lambda: h @ model.lm_head.T, 1: lambda: h @ model.embed_proj_rev.weight.T @ model.token_embed.T,
           2: lambda: h @ model.embed_proj_rev.weight.T @ (model.token_embed + model.lm_head_correction).T,
           3: lambda: F.gelu(h @ model.adapter.weight.T) @ model.token_embed.T}[tie]() + model.vocab_bias
    u = (raw / 15).clamp(-2, 2)
    assert off(model.logits(h), 15 * (u * (1 - u**2 / 3 + u**4 / 15)).clamp(-1, 1)) < 2e-6
    assert off(F.linear(model.features(h), model.head()) + model.vocab_bias, raw) < 2e-6


@pytest.mark.parametrize("tie, extra", [(1, set()), (2, {"lm_head_correction"}), (3, {"adapter.weight"}),
                                        (0, {"lm_head"})])
def test_no_projections_where_the_embedding_has_the_models_width(tie, extra):
    model = build(TIE_EMBEDDINGS=tie, EMBED_DIM=0, VOCAB_BIAS=0)
    found = {name for name, _ in model.named_parameters() if not name.startswith("blocks.")}
    assert found == {"token_embed", "skip_weights"} | extra


def test_system_bs_head_has_no_bias_and_caps_by_tanh():
    model = build(EMBED_DIM=64, VOCAB_BIAS=0, SOFTCAP_TYPE="tanh", LOGIT_SOFTCAP=30, MIXER="attention")
    h = torch.randn(2, 3, 64) * 20
    assert model.vocab_bias is None and off(model.logits(h), 30 * torch.tanh(h @ model.token_embed.T / 30)) < 2e-6


# -- attention ---------------------------------------------------------------------------------------------------------

def attention(kv_heads=2):
    torch.manual_seed(0)
    layer = tj.Attention(configure(NUM_KV_HEADS=kv_heads), tj.Kernels())
    assert layer.out_proj.weight.abs().max() == 0 and torch.equal(layer.q_gain, torch.full((4,), 1.5))
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return layer


def naive_attention(layer, u):
    """Float64, one query at a time; rotary as multiplication by complex numbers over pairs (i, i + width/2)."""
    width = layer.width
    heads, kv_heads = (len(proj.weight) // width for proj in (layer.q_proj, layer.k_proj))
    norm = lambda t: t / (t.square().mean(-1, keepdim=True) + layer.eps).sqrt()
    position = torch.arange(u.size(1), dtype=torch.float64)
    rate = 10000.0 ** (-2 * torch.arange(width // 2, dtype=torch.float64) / width)
    turn = torch.polar(torch.ones(u.size(1), width // 2, dtype=torch.float64), -position[:, None] * rate)

    def rotate(t):  # (B,T,width); the direction of turning is a convention shared by q and k
        pairs = torch.complex(t[..., :width // 2], t[..., width // 2:]) * turn
        return torch.cat((pairs.real, pairs.imag), -1)

    outs = []
    for head in range(heads):
        group = head // (heads // kv_heads)
        part = lambda proj, index: u @ proj.weight[index * width:(index + 1) * width].T
        q = rotate(norm(part(layer.q_proj, head))) * layer.q_gain[head]
        k, v = rotate(norm(part(layer.k_proj, group))), part(layer.v_proj, group)
        rows = []
        for t in range(u.size(1)):
            weight = torch.softmax((k[:, :t + 1] @ q[:, t, :, None]).squeeze(-1) / math.sqrt(width), -1)
            rows.append((weight[..., None] * v[:, :t + 1]).sum(1))
        outs.append(torch.stack(rows, 1))
    return torch.cat(outs, -1) @ layer.out_proj.weight.T


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_an_independent_float64_form_with_its_gradients(kv_heads):
    layer = attention(kv_heads)
    wide = copy.deepcopy(layer).double()
    g = torch.Generator().manual_seed(1)
    u, upstream = torch.randn(2, 13, 64, generator=g).requires_grad_(), torch.randn(2, 13, 64, generator=g)
    v = u.detach().double().requires_grad_()
    found, expected = layer(u)[0], naive_attention(wide, v)
    assert off(found, expected) <= 1e-5
    names = [name for name, _ in layer.named_parameters()]
    for name, a, b in zip(["u", *names], torch.autograd.grad(found, [u, *layer.parameters()], upstream),
                          torch.autograd.grad(expected, [v, *wide.parameters()], upstream.double())):
        assert off(a, b) <= 1e-5, name


@pytest.mark.parametrize("cuts", [(1,), (4, 5, 9), (9, 10)])
def test_attention_in_pieces_is_the_float64_form_and_takes_no_mask(cuts, monkeypatch):
    """A mask beside grouped queries would rule out the fast kernel on CUDA (torch's docs of enable_gqa)."""
    layer, u = attention(kv_heads=2), torch.randn(2, 13, 64, generator=torch.Generator().manual_seed(2))
    masks, sdpa = [], F.scaled_dot_product_attention

    def watched(*args, **options):
        masks.append(options.get("attn_mask", args[3] if len(args) > 3 else None))
        return sdpa(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    state, outs, bounds = None, [], (0, *cuts, 13)
    for start, stop in zip(bounds, bounds[1:]):
        out, state = layer(u[:, start:stop], state)
        outs.append(out)
    assert off(torch.cat(outs, 1), naive_attention(copy.deepcopy(layer).double(), u.double())) <= 1e-5
    assert masks == [None] * (len(cuts) + 1)


def rotate(x, start):
    """x (B,heads,T,width) at positions start, start+1, ..."""
    return tj.rotate(x, tj.rotary_table(start + x.size(2), x.size(3), 10000.0, x.device)[:, start:])


def test_rotary_positions_above_256_differ_even_in_bf16():
    x = torch.ones(1, 1, 1, 16, dtype=torch.bfloat16)
    turned = [rotate(x, position)[0, 0, 0] for position in range(250, 600)]
    assert all(not torch.equal(a, b) for a, b in zip(turned, turned[1:]))
    # angles in bf16 would make 1024 and 1027 one position
    exact = rotate(x.float(), 1027)
    assert off(turned := rotate(x, 1027), exact) < 0.01 and off(turned, rotate(x.float(), 1024)) > 0.1


def test_rotary_angles_are_constants_of_the_graph():
    layer, u = attention(), torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    seen = []
    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward
    found, _ = torch.compile(layer, fullgraph=True, dynamic=False, backend=backend)(u)
    assert torch.equal(found, layer(u)[0]) and seen and not [name for name in seen if "cos" in name]


def test_rotary_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    product = lambda a, b: float((rotate(q, a) * rotate(k, b)).sum())
    assert product(5, 2) == pytest.approx(product(1005, 1002), abs=2e-3)  # fp32 angles of 1000 are off by 6e-5 each
    assert abs(product(5, 2) - product(5, 3)) > 0.01


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_attention_with_carried_keys_is_the_whole(cut):
    layer, u = attention(), torch.randn(2, 13, 64, generator=torch.Generator().manual_seed(1))
    whole, (k, v) = layer(u)
    first, state = layer(u[:, :cut])
    second, state = layer(u[:, cut:], state)
    assert off(torch.cat((first, second), 1), whole) < 2e-6
    assert off(state[0], k) < 2e-6 and off(state[1], v) < 2e-6 and k.shape == (2, 13, 2, 16)


# -- MLP ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("activation", ["relu2", "leaky_relu2", "swiglu"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
def test_mlps_are_their_formulas_and_start_silent(activation, norm):
    torch.manual_seed(0)
    c, u = configure(MLP_MULT=3, ACTIVATION=activation, MLP_NORM=int(norm)), torch.randn(2, 5, 64)
    mlp = tj.MLP(c, tj.Kernels())
    assert mlp.up.weight.shape == (192 * (2 if activation == "swiglu" else 1), 64)
    assert mlp.down.weight.shape == (64, 192)
    assert mlp(u).abs().max() == 0
    nn.init.normal_(mlp.down.weight)
    hidden = u @ mlp.up.weight.T
    hidden = {"relu2": lambda: hidden.clamp(min=0) ** 2,
              "leaky_relu2": lambda: torch.where(hidden < 0, hidden / 2, hidden) ** 2,
              "swiglu": lambda: hidden[..., :192] * hidden[..., :192].sigmoid() * hidden[..., 192:]}[activation]()
    if norm:
        hidden = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert off(mlp(u), hidden @ mlp.down.weight.T) < 2e-6


# -- states ------------------------------------------------------------------------------------------------------------

@PATTERNS
def test_a_text_cut_anywhere_with_states_carried_is_the_whole(mixer):
    model, tokens = build(MIXER=mixer), ids(2, 30)
    whole, _ = model(tokens, torch.float32)
    for cut in (1, 8, 17, 29):
        first, states = model(tokens[:, :cut], torch.float32)
        second, _ = model(tokens[:, cut:], torch.float32, states)
        assert off(torch.cat((first, second), 1), whole) < 2e-5  # four blocks of rounding, each through a norm


@PATTERNS
def test_steps_are_the_forward_pass(mixer):
    model, tokens = build(MIXER=mixer), ids(2, 20)
    whole, _ = model(tokens, torch.float32)
    _, states = model(tokens[:, :6], torch.float32)
    for t in range(6, 20):
        h, states = model(tokens[:, t:t + 1], torch.float32, states)
        assert off(h, whole[:, t:t + 1]) < 2e-5


@PATTERNS
def test_empty_states_are_those_before_the_first_token(mixer):
    model, tokens = build(MIXER=mixer), ids(2, 20)
    states = model.empty_states(2, torch.float32, tokens.device)
    whole, after = model(tokens, torch.float32)
    h, _ = model(tokens, torch.float32, states)
    assert off(h, whole) < 2e-5
    for letter, empty, state in zip(configure(MIXER=mixer).pattern, states, after):
        assert (empty is None) == (letter == "a")  # keys and values have no fixed size
        for zeros, tensor in zip(empty or (), state):
            assert zeros.shape == tensor.shape and zeros.dtype == tensor.dtype and not zeros.any()


def test_functions_map_over_the_tensors_of_states():
    one, two = [(torch.ones(2), torch.zeros(3)), (torch.ones(1),)], [(torch.ones(2), torch.ones(3)), (torch.ones(1),)]
    (a, b), (c,) = tj.map_states(lambda x, y: x + 2 * y, one, two)
    assert a.tolist() == [3, 3] and b.tolist() == [2, 2, 2] and c.tolist() == [3]


@pytest.mark.parametrize("weighted", [False, True])
def test_the_eager_norm_is_torchs_with_its_gradients(weighted):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 7, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True) if weighted else None
    inputs = [x, weight] if weighted else [x]
    assert torch.autograd.gradcheck(lambda *t: tj.rms_norm(t[0], 1e-3, *t[1:]), inputs)
    expected = torch.nn.functional.rms_norm(x, (7,), weight, 1e-3)
    assert torch.allclose(tj.rms_norm(x, 1e-3, weight), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(tj.rms_norm(torch.zeros(2, 7), 1e-6), torch.zeros(2, 7))


def test_bf16_follows_fp32():
    model, tokens = build(MIXER="mmam"), ids(2, 20)
    low = model(tokens, torch.bfloat16)[0]
    assert low.dtype == torch.bfloat16 and model.logits(low).dtype == torch.float32
    error = (low.float() - model(tokens, torch.float32)[0]).square().mean().sqrt()
    assert error < 0.1  # h has rms 1; bf16 rounds at 0.4%, some dozens of times


def test_the_same_seed_builds_the_same_weights_and_another_seed_others():
    one, two = tj.build_models(configure(SEED=1)), tj.build_models(configure(SEED=1))
    for a, b in zip(one, two):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(one[0].token_embed, tj.build_models(configure(SEED=2))[0].token_embed)


# -- the GPU's branches, on CPU tensors --------------------------------------------------------------------------------
FORMS = pytest.mark.parametrize("knobs", [
    dict(MIXER="amma", ACTIVATION="leaky_relu2", JEPA_DIM=8, JEPA_COV=1, DETACH_TARGETS=1),
    dict(MLP_NORM=0, JEPA_STEPS=2, EMBED_DIM=0),
    dict(MIXER="attention", MLP_NORM=0, PREDICTOR_NORM=1, PROJECTOR_TYPE="none", ANTICOLLAPSE="covariance")], ids=str)


@FORMS
def test_the_gpus_branches_compute_what_the_cpus_do(knobs):
    """All loss terms, and the gradients of every parameter."""
    c, positions = configure(**knobs), torch.tensor([3, 9, 20, 9])
    model, jepa = build(**knobs), tj.JepaHead(c)
    with torch.no_grad():
        for p in jepa.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    parameters, tokens = [*model.parameters(), *jepa.parameters()], ids(4, 25)
    directions = F.normalize(torch.randn(6, c.latent), dim=-1)
    active = tj.Active(True, True, True, c.jepa_cov > 0)

    def terms(tokens):
        h, _ = model(tokens[:, :-1], torch.float32)
        found = tj.loss_terms(c, model, jepa, h, tokens[:, 1:], positions, directions, active)
        return h, found, torch.autograd.grad(sum(found[name] for name in tj.TERMS if name in found), parameters)

    (on_gpu, found, grads), (_, expected, right) = terms(tokens.as_subclass(OnGpu)), terms(tokens)
    assert isinstance(on_gpu, OnGpu) and found.keys() == expected.keys()
    assert max(off(found[name], expected[name]) for name in found) <= bound(64)
    largest = max(float(grad.abs().max()) for grad in right)  # D's gradient is a sum whose terms cancel
    for name, a, b in zip([name for part in (model, jepa) for name, _ in part.named_parameters()], grads, right):
        assert float((a - b).abs().max()) <= bound(256, scale=2) * (float(b.abs().max()) + largest / 16), name


@FORMS
def test_every_linear_layer_shows_its_inputs_on_a_gpu_too(knobs):
    """Compensated rounding needs them: a layer without moments would be rounded plainly, and nothing would say it."""
    model, tokens = build(**knobs), ids(2, 20)
    moments = lambda tokens: tj.input_moments(model, [tokens], lambda x: model(x, torch.float32)[0])
    found, expected = moments(tokens.as_subclass(OnGpu)), moments(tokens)
    layers = {name for name, layer in model.named_modules() if isinstance(layer, tj.Linear)}
    assert found.keys() == expected.keys() == layers
    assert max(off(found[name], expected[name]) for name in found) <= bound(64)
