"""Triton kernels against float64 references in Triton's interpreter; test_kernels.py runs this file in a process of its
own with TRITON_INTERPRET=1 and MAMBA_DETERMINISTIC=1, and borrows the references.

fp32 and fp16 only: the interpreter's bf16 dot is wrong. Tolerances are relative to the largest entry: fp32 sums of
some hundred terms; in fp16 the roundings of the products' inputs count, up to four in a row."""
import contextlib
import json
import math
import os
import re
import types

import pytest
import torch
import torch.nn.functional as F
from tolerance import bound
from torch._subclasses.fake_tensor import FakeTensorMode

import train_jepa as K

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs inside test_kernels.py")
TOLERANCE = {torch.float32: bound(256), torch.float16: bound(4, torch.float16)}
# A logit is a sum of 16 products and reaches 16 where no cap holds it; its error is the relative error of exp(logit).
HEAD_TOLERANCE = TOLERANCE | {torch.float32: bound(16, scale=16)}
OPS = torch.ops.jepa
COST = re.compile(r"\(about \+\d+ ms .*modelled\)$")
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=("fp32", "fp16"))


def off(a, b):
    """Largest difference relative to the largest entry of b."""
    a, b = a.double(), b.double()
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() if b.numel() else 0.0


def ssd_naive(x, dt, A, B, C, D, initial_state=None):
    """The recurrence, step by step, in float64."""
    x, dt, A, B, C, D = (t.double() for t in (x, dt, A, B, C, D))
    h = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[2]) if initial_state is None else initial_state.double()
    ys = []
    for t in range(x.shape[1]):
        h = h * (dt[:, t] * A).exp()[..., None, None]
        h = h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None]
        ys.append((h * C[:, t, None, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(ys, 1), h


def conv_naive(u, weight, bias, initial=None):
    K_ = weight.shape[-1]
    before = u.new_zeros(u.shape[0], K_ - 1, u.shape[2]) if initial is None else initial
    padded = torch.cat((before, u), 1).double()
    pre = F.conv1d(padded.transpose(1, 2), weight.double(), bias.double(), groups=u.shape[2]).transpose(1, 2)
    return F.silu(pre), padded[:, padded.shape[1] - (K_ - 1):]


def head_naive(h, weight, bias, targets, softcap, softcap_type):
    """nll and lse in float64 from the definition."""
    x = h.double() @ weight.double().T + (0 if bias is None else bias.double())
    if softcap and softcap_type == "poly":
        u = (x / softcap).clamp(-2, 2)
        x = softcap * (u * (1 - u**2 / 3 + u**4 / 15)).clamp(-1, 1)
    elif softcap:
        x = softcap * (x / softcap).tanh()
    lse = x.logsumexp(1)
    return lse - x.gather(1, targets[:, None]).squeeze(1), lse


def mix_naive(wide, conv_weight, conv_bias, dt_bias, A_log, D, gain, conv_state=None, ssm_state=None):
    """Convolution, scan, gate and norm in float64; wide is z, x, B, C, dt and padding."""
    A = -A_log.double().exp()
    inner, channels, H = len(gain), len(conv_bias), len(A)
    v, tail = conv_naive(wide[..., inner:inner + channels], conv_weight, conv_bias, conv_state)
    N = (channels - inner) // 2
    dt = F.softplus(wide[..., inner + channels:inner + channels + H].double() + dt_bias)
    y, final = ssd_naive(v[..., :inner].unflatten(-1, (H, inner // H)), dt, A, v[..., inner:inner + N],
                         v[..., inner + N:], D, ssm_state)
    g = y.flatten(2) * F.silu(wide[..., :inner].double())
    return g / (g.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain, final, tail


def mlp_naive(x, up, down, leak, eps):
    """The MLP in float64 from its definition."""
    h = x.double() @ up.double().T
    h = torch.where(h > 0, h, leak * h) ** 2
    h = h if eps is None else h / (h.square().mean(-1, keepdim=True) + eps).sqrt()
    return (h @ down.double().T,)


def mlp_case(dtype, n, D, hidden, device="cpu"):
    g = torch.Generator().manual_seed(n)
    make = lambda *shape, scale=1.0: (torch.randn(shape, generator=g) * scale).to(device, dtype).requires_grad_()
    return make(2, n, D), make(hidden, D, scale=D**-0.5), make(D, hidden, scale=hidden**-0.5)


def mlp_by(form, leak, eps):
    return lambda *inputs: (form(*inputs, leak, eps),)


def ssd_case(dtype, b=2, T=50, H=3, P=16, N=16, initial=False, device="cpu", seed=0):
    """Random SSD inputs as the mixer makes them: x, B, C are slices of one wider tensor."""
    g = torch.Generator().manual_seed(seed)
    xbc = torch.randn(b, T, H * P + 2 * N, generator=g).to(device, dtype)
    x, B, C = xbc[..., :H * P].unflatten(-1, (H, P)), xbc[..., H * P:H * P + N], xbc[..., H * P + N:]
    dt = (torch.rand(b, T, H, generator=g) * 0.5 + 0.01).to(device)
    A, D = -torch.rand(H, generator=g).to(device) - 0.1, torch.randn(H, generator=g).to(device)
    inputs = [x, dt, A, B, C, D] + ([torch.randn(b, H, P, N, generator=g).to(device)] if initial else [])
    return [t.detach().requires_grad_() for t in inputs]


def outputs_and_grads(f, inputs, seed=1):
    """Outputs of f and the gradients of a random linear form of them."""
    outputs = f(*inputs)
    g = torch.Generator().manual_seed(seed)
    total = sum((o.double() * torch.randn(o.shape, generator=g).to(o.device)).sum() for o in outputs)
    return [o.detach() for o in outputs], torch.autograd.grad(total, inputs)


def compare(f, reference, inputs, tolerance):
    got, want = outputs_and_grads(f, inputs), outputs_and_grads(reference, inputs)
    worst = [off(a, b) for a, b in zip(got[0] + list(got[1]), want[0] + list(want[1]))]
    assert max(worst) <= tolerance, [f"{w:.1e}" for w in worst]


def ssd_by(form, chunk):
    return lambda x, dt, A, B, C, D, h0=None: form(x, dt, A, B, C, D, chunk=chunk, initial_state=h0)


def head_inputs(dtype, n, V, E=16, scale=1.0, bias=True, device="cpu"):
    g = torch.Generator().manual_seed(n + V)
    h, w = torch.randn(n, E, generator=g) * scale, torch.randn(V, E, generator=g)
    inputs = [h.to(device, dtype), w.to(device, dtype)] + ([torch.randn(V, generator=g).to(device)] if bias else [])
    targets = torch.randint(V, (n,), generator=g).to(device)
    targets[0], targets[-1] = 0, V - 1
    return [t.requires_grad_() for t in inputs], targets


def check_head(inputs, targets, softcap, softcap_type, z_loss, tolerance, rows=0):
    """Loss and gradients of the fused head against float64, with an upstream factor."""
    bias = inputs[2] if len(inputs) == 3 else None
    options = dict(softcap=softcap, softcap_type=softcap_type)
    loss, mean = K.token_loss_fused(*inputs[:2], bias, targets, z_loss=z_loss, rows=rows, **options)
    got = torch.autograd.grad(loss * 0.125, inputs)
    nll, lse = head_naive(*inputs[:2], bias, targets, softcap, softcap_type)
    want = torch.autograd.grad((nll.mean() + z_loss * lse.square().mean()) * 0.125, inputs)
    assert not mean.requires_grad and off(mean, nll.mean()) <= tolerance
    assert off(loss, nll.mean() + z_loss * lse.square().mean()) <= tolerance
    assert max(off(a, b) for a, b in zip(got, want)) <= tolerance, [f"{off(a, b):.1e}" for a, b in zip(got, want)]


GRIDS = [K.Grid.parse(name) for name in ("int4", "int5", "int6", "int4s0.1", "fp8", "bf16")]


def snap_items(device="cpu", dtype=torch.bfloat16, wide=1300):
    """Masters of many magnitudes with rows of zeros, ties, subnormal and saturating FP8 values, all formats."""
    g, items = torch.Generator().manual_seed(0), []
    for fmt, param in (grid.fused for grid in GRIDS):
        for shape in ((9, wide), (7, 64), (3, 4), (640,), (5, 1, 4)):
            w = torch.randn(shape, generator=g)
            if w.dim() == 2:
                w *= 10.0 ** torch.randint(-7, 4, (shape[0], 1), generator=g)
                w[1] = 0
                w[2] = torch.arange(shape[1]) % 15 - 7.5  # ties on the INT4 grid
            if fmt == "fp8":
                w.view(-1)[:6] = torch.tensor([2.0**-10, 3 * 2.0**-10, -1e-9, 500.0, -449.0, 0.0155])
            w = w.to(device)
            items.append((w, torch.empty(shape, dtype=dtype, device=device), fmt, param))
    return items


def check_snap(items):
    """In training and in the artifact the same bits: the kernel against `snap`, which is decode(encode(w))."""
    K.FusedSnap(items)()
    for w, out, fmt, param in items:
        want = K.snap(w, next(grid for grid in GRIDS if grid.fused == (fmt, param))).to(out.dtype)
        assert torch.equal(out.view(torch.int16), want.view(torch.int16)), (fmt, param, tuple(w.shape))


# -- what the subprocess runs ------------------------------------------------------------------------------------------
@pytest.fixture
def cuda_stubs(monkeypatch):
    """What mamba-ssm asks of a GPU at launch."""
    monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: types.SimpleNamespace(multi_processor_count=8))


@DTYPES
@pytest.mark.parametrize("V, n, rows", ((300, 21, 8), (256, 9, 0), (17000, 3, 0)), ids=("ragged", "bytes", "pytorch"))
@pytest.mark.parametrize("softcap, kind, z_loss", ((15.0, "poly", 1e-2), (30.0, "tanh", 0.0), (0.0, "poly", 1e-4)))
def test_head(dtype, V, n, rows, softcap, kind, z_loss):
    inputs, targets = head_inputs(dtype, n, V, bias=kind == "poly")
    check_head(inputs, targets, softcap, kind, z_loss, HEAD_TOLERANCE[dtype], rows)


@pytest.mark.parametrize("softcap, kind", ((15.0, "poly"), (30.0, "tanh"), (0.0, "poly")))
def test_head_large_logits_and_zero_rows(softcap, kind):
    inputs, targets = head_inputs(torch.float32, 7, 300, scale=100.0)
    with torch.no_grad():
        inputs[0][3] = 0
    check_head(inputs, targets, softcap, kind, 1e-4, 1e-4)  # fp32 knows a logit of 1000 to 1e-4


def test_snap_bit_equal():
    check_snap(snap_items())
    check_snap(snap_items(dtype=torch.float16, wide=70)[:6])
    check_snap([item for item in snap_items(wide=1304) if item[0].shape[-1] % 8 == 0])  # wide loads


def test_snap_shows_nan():
    w, out = torch.ones(2, 8), torch.empty(2, 8, dtype=torch.bfloat16)
    w[0, 3] = float("nan")
    for fmt, param in (("int", 7), ("fp8", 0), ("bf16", 0)):
        K.FusedSnap([(w, out, fmt, param)])()
        assert out[0, 3].isnan() and not out[1].isnan().any()


def mix_case(dtype, b=2, T=35, H=3, P=16, N=16, pad=5, K_=4, initial=False, device="cpu"):
    """Inputs of mamba_mix with `pad` columns behind dt."""
    g, inner = torch.Generator().manual_seed(0), H * P
    make = lambda *shape: torch.randn(shape, generator=g).to(device)
    channels = inner + 2 * N
    inputs = [make(b, T, inner + channels + H + pad).to(dtype), make(channels, 1, K_) * 0.5, make(channels),
              make(H) - 1, make(H), make(H), make(inner)]
    inputs += [make(b, K_ - 1, channels).to(dtype), make(b, H, P, N)] if initial else []
    return [t.requires_grad_() for t in inputs]


def mix_by(form, chunk=16):
    def run(*inputs):
        out, (tail, final) = form(*inputs[:7], chunk=chunk, state=inputs[7:] or None)
        return out, final, tail
    return run


@DTYPES
@pytest.mark.parametrize("T, H, P, N, K_, pad, chunk, initial", (
    (35, 3, 16, 32, 4, 5, 16, False), (70, 2, 16, 16, 4, 6, 32, True), (2, 3, 16, 32, 3, 0, 16, True),
    (1, 2, 32, 16, 4, 2, 16, False), (1, 2, 16, 16, 2, 1, 16, True), (17, 5, 16, 16, 2, 1, 16, True),
    (16, 2, 32, 64, 3, 0, 16, False), (20, 1, 16, 16, 1, 3, 16, False)))
def test_mamba_mix(dtype, T, H, P, N, K_, pad, chunk, initial):
    """Results and every gradient. The norm divides by the size of its row: errors of y count relative to that."""
    inputs = mix_case(dtype, T=T, H=H, P=P, N=N, K_=K_, pad=pad, initial=initial)
    compare(mix_by(K.mamba_mix_triton, chunk), mix_naive, inputs, 2 * TOLERANCE[dtype])
    if dtype == torch.float32:
        compare(mix_by(K.mamba_mix, chunk), mix_naive, inputs, 2 * TOLERANCE[dtype])


def test_mamba_mix_real_tile():
    """The tile of the configurations: chunk, headdim and state of 64; a row of zeros; strong and weak decay; dt past
    softplus' linear end and near 0."""
    inputs = mix_case(torch.float32, b=1, T=80, H=2, P=64, N=64, initial=True)
    with torch.no_grad():
        inputs[0][:, 5] = 0
        inputs[0][:, 7, -7:] = 25.0
        inputs[0][:, 9, -7:] = -25.0
        inputs[4][0], inputs[4][1] = math.log(16.0), math.log(1e-3)
    compare(mix_by(K.mamba_mix_triton, 64), mix_naive, inputs, 2 * TOLERANCE[torch.float32])


def test_mamba_mix_one_gradient_alone():
    inputs = mix_case(torch.float32, b=1, T=20, H=1, initial=True)
    for pick in (0, 1):
        used = inputs if pick == 0 else [t for i, t in enumerate(inputs) if i not in (5, 6)]  # D, gain: not the state
        got = torch.autograd.grad(mix_by(K.mamba_mix_triton)(*inputs)[pick].sum(), used)
        expected = torch.autograd.grad(mix_naive(*inputs)[pick].sum(), used)
        assert max(map(off, got, expected)) <= 2 * TOLERANCE[torch.float32]


@DTYPES
@pytest.mark.parametrize("n, D, hidden", ((75, 64, 256), (20, 128, 384), (1, 64, 128)))
@pytest.mark.parametrize("leak", (0.0, 0.5))
@pytest.mark.parametrize("eps", (None, 1e-6))
def test_mlp(dtype, n, D, hidden, leak, eps):
    """Several tiles of rows and columns, and parts of one."""
    compare(mlp_by(K.mlp_fused, leak, eps), lambda *i: mlp_naive(*i, leak, eps), mlp_case(dtype, n, D, hidden),
            2 * TOLERANCE[dtype])


@pytest.mark.parametrize("knobs, fused", (
    ({}, True), (dict(activation="leaky_relu2", mlp_norm=False), True), (dict(activation="swiglu"), False),
    (dict(model_dim=96), False), (dict(model_dim=64, mlp_mult=1), False)), ids=str)
def test_mlps_of_a_model_take_the_kernel_where_tiles_fit_and_gradients_are_asked_for(knobs, fused, monkeypatch):
    """The same results and gradients; without gradients, as for GPTQ's moments, each layer runs."""
    c, calls = K.Config(**dict(model_dim=64, mlp_mult=4) | knobs), []
    own = K.mlp_fused
    monkeypatch.setattr(K, "mlp_fused", lambda *a: calls.append(1) or own(*a))
    mlp, plain = (K.MLP(c, K.Kernels(mlp=on)) for on in (True, False))
    torch.nn.init.normal_(mlp.down.weight, std=0.1)
    plain.load_state_dict(mlp.state_dict())
    x, scale = torch.randn(3, 5, c.model_dim), torch.rand(c.model_dim)
    grads = lambda part: outputs_and_grads(lambda x, *_: (part(x, scale),), [x.requires_grad_(), *part.parameters()])
    (got, right), (want, expected) = grads(mlp), grads(plain)
    assert len(calls) == fused
    assert max(map(off, (*got, *right), (*want, *expected))) <= TOLERANCE[torch.float32]
    with torch.no_grad():
        mlp(x, scale)
    assert len(calls) == fused


@pytest.mark.parametrize("dtype, T, initial", ((torch.float16, 20, False), (torch.float32, 17, True)))
def test_ssd_mamba_ssm(dtype, T, initial, cuda_stubs):
    compare(ssd_by(K.ssd_mamba_ssm, 16), ssd_naive, ssd_case(dtype, T=T, H=2, initial=initial), TOLERANCE[dtype])


@pytest.mark.parametrize("pick", (0, 1), ids=("y", "state"))
def test_ssd_mamba_ssm_one_gradient_alone(pick, cuda_stubs):
    inputs = ssd_case(torch.float32, b=1, T=20, H=1)
    used = inputs if pick == 0 else inputs[:4]  # C and D do not reach the state
    got = torch.autograd.grad(ssd_by(K.ssd_mamba_ssm, 16)(*inputs)[pick].sum(), used)
    want = torch.autograd.grad(ssd_naive(*inputs)[pick].sum(), used)
    assert max(map(off, got, want)) <= TOLERANCE[torch.float32]


def test_opcheck(cuda_stubs):
    inputs, targets = head_inputs(torch.float32, 5, 40)
    torch.library.opcheck(OPS.head_train, (*inputs, targets, 15.0, "poly", 1e-4, 2))
    inputs = mix_case(torch.float32, b=1, T=6, H=1, initial=True)
    torch.library.opcheck(OPS.mamba_mix, (*inputs, 16, True))
    torch.library.opcheck(OPS.mamba_mix, (*inputs[:7], None, None, 16, True))
    torch.library.opcheck(OPS.mlp, (*(t.flatten(0, -2) for t in mlp_case(torch.float32, 3, 64, 128)), 0.5, True))
    inputs = ssd_case(torch.float32, b=1, T=6, H=1, initial=True)
    few = ("test_schema", "test_autograd_registration", "test_faketensor")  # the interpreter takes seconds per run
    torch.library.opcheck(OPS.ssd_mamba_ssm, (*inputs, 16), test_utils=few)
    torch.library.opcheck(OPS.ssd_mamba_ssm, (*inputs[:6], None, 16), test_utils=few)


def check_fake_strides(op, args):
    """Inductor trusts the fake's strides, and opcheck does not compare them."""
    real = op(*args)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    for r, f in zip(*((o,) if isinstance(o, torch.Tensor) else o for o in (real, fake))):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


def test_fake_strides(cuda_stubs):
    with torch.no_grad():
        inputs, targets = head_inputs(torch.float16, 5, 40)
        check_fake_strides(OPS.head_train, (*inputs, targets, 15.0, "poly", 1e-4, 2))
        inputs = mix_case(torch.float16, T=18, initial=True)
        out, final, *saved = OPS.mamba_mix(*inputs, 16, True)
        check_fake_strides(OPS.mamba_mix, (*inputs, 16, True))
        check_fake_strides(OPS.mamba_mix, (*inputs, 16, False))
        check_fake_strides(OPS.mamba_mix_backward, (out, final, *inputs, *saved, 16, True))
        inputs = [t.flatten(0, -2) for t in mlp_case(torch.float16, 3, 64, 128)]
        for norm in (True, False):
            z, power, *saved = OPS.mlp(*inputs, 0.5, norm)
            check_fake_strides(OPS.mlp, (*inputs, 0.5, norm))
            check_fake_strides(OPS.mlp_backward, (z, power if norm else None, *inputs, *saved, 0.5, norm))
        inputs = ssd_case(torch.float16, b=2, T=18, H=2, initial=True)
        check_fake_strides(OPS.ssd_mamba_ssm, (*inputs, 16))
        check_fake_strides(OPS.ssd_mamba_ssm_backward, (*OPS.ssd_mamba_ssm(*inputs, 16), *inputs, 16))


def one_graph(mix, chunk, *inputs):
    """Mixer -> head as the model strings them together."""
    *inputs, head, bias, targets = inputs
    out, (_, final) = mix(inputs[0].tanh(), *inputs[1:], chunk=chunk)
    loss, _ = K.token_loss_fused(out.flatten(0, 1), head, bias, targets, softcap=15.0, z_loss=1e-4)
    return loss + final.square().mean()


def one_graph_inputs(dtype=torch.float32, device="cpu", V=40, **sizes):
    """Leaves, and the targets."""
    inputs, g = mix_case(dtype, device=device, **sizes), torch.Generator().manual_seed(1)
    head, bias = torch.randn(V, len(inputs[-1]), generator=g), torch.randn(V, generator=g)
    inputs += [head.to(device, dtype).requires_grad_(), bias.to(device).requires_grad_()]
    return inputs, torch.randint(V, (inputs[0][..., 0].numel(),), generator=g).to(device)


@pytest.mark.parametrize("name", ("fused", "mamba_ssm"))
def test_compiles_to_one_graph(name, cuda_stubs):
    mix = K.FORMS[name].mix
    inputs, targets = one_graph_inputs(b=1, T=10, H=2)
    plain = one_graph(mix, 16, *inputs, targets)
    compiled = torch.compile(one_graph, fullgraph=True, backend="aot_eager")(mix, 16, *inputs, targets)
    assert off(compiled, plain) <= 1e-6
    for a, b in zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(plain, inputs)):
        assert off(a, b) <= 1e-5


# -- self-check --------------------------------------------------------------------------------------------------------
@pytest.fixture
def choose(tmp_path, monkeypatch):
    """choose_kernels as on a GPU, with a cache of its own; afterwards no kernel stays replaced."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    runtime = K.Runtime(K.Config(device="cpu"))
    yield lambda **knobs: K.choose_kernels(K.Config(vocab_size=300, **knobs), runtime)
    K.REPLACED.clear()


def test_check_passes_and_is_remembered(choose, tmp_path, monkeypatch):
    kernels, note = choose()
    assert (kernels.name, kernels.mix, note) == ("fused", K.mamba_mix_triton, "")
    found = json.loads(next(tmp_path.glob("train_jepa_check_*.json")).read_text())
    assert found == dict.fromkeys(K.check_table(K.Config(), torch.device("cpu"), torch.float32), "")
    monkeypatch.setattr(K, "kernel_fault", None)  # not asked again
    assert choose()[0] == kernels
    with pytest.raises(TypeError):
        choose(logit_softcap=0.0)  # another kernel
    assert choose(kernel_check="0")[0] == kernels and kernels.mlp and not choose(mlp_kernel="torch")[0].mlp


def raising(message):
    def launch(*arguments, **options):
        raise RuntimeError(message)
    return launch


class Broken:
    """A kernel whose launch does `launch`."""
    def __init__(self, launch):
        self.launch = launch

    def __getitem__(self, grid):
        return self.launch


# name of the check, kernel, and how it is broken
BREAKS = {
    "head-wrong": ("head", "head_rows", lambda *a, **k: None),
    "head-compile": ("head", "head_rows", raising("no such type")),
    "conv-launch": ("mixer", "conv_bwd", raising("out of resources\nmore")),
    "conv-wrong": ("mixer", "conv_fwd", lambda u, w, b, i, out, **k: out.fill_(1.0)),
    "scan-compile": ("mixer", "ssd_scan", raising("PassManager::run failed")),
    "scan-nan": ("mixer", "ssd_bwd_bc", lambda *a, **k: a[8].fill_(float("nan"))),
    "mlp-wrong": ("mlp", "mlp_product", lambda *a, **k: a[3].fill_(1.0)),
    "mlp-compile": ("mlp", "mlp_product", raising("no such type")),
    "gate-wrong": ("mixer", "gate_norm_bwd", lambda *a, **k: None)}


@pytest.mark.parametrize("case", BREAKS)
def test_broken_kernel_is_replaced(case, choose, monkeypatch, cuda_stubs):
    check, kernel, launch = BREAKS[case]
    monkeypatch.setattr(K, kernel, Broken(launch))
    kernels, note = choose()
    assert note.startswith(f"kernel {check}: ") and COST.search(note) and "\n" not in note, note
    assert ("RuntimeError" if "launch" in case or "compile" in case else "off by") in note
    assert K.REPLACED == {check}
    assert kernels.mlp == (check != "mlp") and kernels.name == ("mamba_ssm" if check == "mixer" else "fused")
    inputs, targets = head_inputs(torch.float32, 7, 40)
    if check == "head":  # without the kernel the op does the same in PyTorch
        check_head(inputs, targets, 15.0, "poly", 1e-4, HEAD_TOLERANCE[torch.float32])
    with pytest.raises(K.UserError, match="KERNEL_CHECK=strict: kernel (head|mixer|mlp): "):
        choose(kernel_check="strict")


def test_broken_mixer_without_mamba_ssm_runs_in_pytorch(choose, monkeypatch):
    def missing(launcher):
        raise K.UserError("mamba_ssm is not what we know")
    monkeypatch.setattr(K, "ssd_scan", Broken(raising("no such type")))
    monkeypatch.setattr(K, "mamba_ssm", missing)
    for knobs in ({}, dict(ssd_kernel="fused")):
        kernels, note = choose(**knobs)
        assert kernels == K.Kernels(mlp=True) and "kernel mixer: " in note and "not what we know" in note


def test_broken_snap_is_replaced(choose, monkeypatch):
    """Weights compares the kernel with the artifact's grid on the weights themselves."""
    c = K.Config(model_dim=64, num_layers=2, device="cpu", vocab_size=300, tokenizer="bpe")
    with K.Runtime(c) as runtime:
        model, _ = K.build_models(c)
        weights = K.Weights(model, None, K.storage_plan(model, c), c, runtime)
        weights.fused_snap = K.fused_snaps(weights.groups)
        assert weights.snap_fault() == "" and weights.fused_snap
        for launch, text in ((lambda *a, **k: None, "differs"), (raising("no such type"), "RuntimeError: no such")):
            monkeypatch.setattr(K, "snap_rows", Broken(launch))
            weights.fused_snap = K.fused_snaps(weights.groups)
            weights.load()
            assert text in weights.snap_fault() and not weights.fused_snap
            weights.load(qat=True)  # by PyTorch, once a kernel has failed
