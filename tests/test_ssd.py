"""Scan, causal convolution and Mamba-2 mixer against their definitions and against mamba-ssm."""
import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tolerance import bound

import train_jepa as tj
from train_jepa import causal_conv_silu, ssd_chunked, ssd_position

FP32 = bound(256)  # relative to the largest entry: sums of some hundred terms


def off(found, expected) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def recurrence(x, dt, A, B, C, D, initial_state=None):
    """The definition in float64, one position after the other."""
    x, dt, A, B, C, D = (t.double() for t in (x, dt, A, B, C, D))
    state = x.new_zeros(x.size(0), x.size(2), x.size(3), B.size(2)) if initial_state is None else initial_state.double()
    rows = []
    for t in range(x.size(1)):
        added = torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], B[:, t])
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + added
        rows.append(torch.einsum("bhpn,bn->bhp", state, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(rows, 1), state


def case(length, batch=2, heads=3, width=5, size=7, initial=False, dtype=torch.float32, seed=0, rate=1.0):
    """Random inputs; `rate` scales dt and so the decay."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    tensors = [draw(batch, length, heads, width), F.softplus(draw(batch, length, heads)) * rate, -draw(heads).exp(),
               draw(batch, length, size), draw(batch, length, size), draw(heads)]
    return tensors, draw(batch, heads, width, size) if initial else None


LENGTHS = pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 32, 50])
INITIAL = pytest.mark.parametrize("initial", [False, True], ids=["zeros", "initial"])


@LENGTHS
@INITIAL
def test_chunked_is_the_recurrence_for_any_length(length, initial):
    tensors, state = case(length, initial=initial)
    y, final = ssd_chunked(*tensors, chunk=16, initial_state=state)
    expected, expected_final = recurrence(*tensors, state)
    assert y.shape == tensors[0].shape and y.dtype == torch.float32 and final.dtype == torch.float32
    assert off(y, expected) < FP32 and off(final, expected_final) < FP32


@INITIAL
def test_steps_are_the_recurrence(initial):
    (x, dt, A, B, C, D), state = case(20, initial=initial)
    expected, expected_final = recurrence(x, dt, A, B, C, D, state)
    state = x.new_zeros(2, 3, 5, 7) if state is None else state
    for t in range(20):
        part = slice(t, t + 1)
        y, state = ssd_position(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, chunk=64, initial_state=state)
        assert off(y, expected[:, part]) < FP32
    assert off(state, expected_final) < FP32


@pytest.mark.parametrize("chunk", [1, 3, 8, 64, 1024])
def test_the_chunk_length_does_not_matter(chunk):
    tensors, state = case(70, initial=True)
    y, final = ssd_chunked(*tensors, chunk=chunk, initial_state=state)
    expected, expected_final = recurrence(*tensors, state)
    assert off(y, expected) < FP32 and off(final, expected_final) < FP32


@pytest.mark.parametrize("length", [1, 13, 24])
@INITIAL
def test_gradients_are_those_of_the_recurrence(length, initial):
    tensors, state = case(length, initial=initial)
    inputs = [t.requires_grad_() for t in (*tensors, *([state] if initial else []))]
    g = torch.Generator().manual_seed(1)
    weigh_y, weigh_state = torch.randn(2, length, 3, 5, generator=g), torch.randn(2, 3, 5, 7, generator=g)
    loss = lambda y, final: (y * weigh_y).sum() + (final * weigh_state).sum()
    found = torch.autograd.grad(loss(*ssd_chunked(*tensors, chunk=8, initial_state=state)), inputs)
    expected = torch.autograd.grad(loss(*recurrence(*tensors, state)), inputs)
    for name, a, b in zip(("x", "dt", "A", "B", "C", "D", "initial"), found, expected):
        assert off(a, b) < FP32, name


@INITIAL
def test_gradcheck_in_float64(initial):
    (x, dt, A, B, C, D), state = case(7, batch=1, heads=2, width=2, size=3, initial=initial, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, dt, A, B, C, D, *([state] if initial else []))]
    scan = lambda x, dt, A, B, C, D, state=None: ssd_chunked(x, dt, A, B, C, D, chunk=3, initial_state=state)
    assert torch.autograd.gradcheck(scan, inputs)


@pytest.mark.parametrize("rate", [1e3, 1e6, 1e-8])
def test_extreme_decay_gives_finite_values_and_gradients(rate):
    tensors, state = case(40, initial=True, rate=rate)
    inputs = [t.requires_grad_() for t in (*tensors, state)]
    y, final = ssd_chunked(*tensors, chunk=16, initial_state=state)
    expected, _ = recurrence(*tensors, state)
    assert off(y, expected) < FP32
    for name, grad in zip("x dt A B C D initial".split(), torch.autograd.grad(y.sum() + final.sum(), inputs)):
        assert grad.isfinite().all(), name


def test_bf16_keeps_the_state_in_fp32_and_stays_close():
    tensors, _ = case(100, seed=3)
    low = [t.bfloat16() if i in (0, 3, 4) else t for i, t in enumerate(tensors)]
    y, final = ssd_chunked(*low, chunk=16)
    expected, expected_final = recurrence(*low)
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    limit = bound(2, torch.bfloat16)  # factors and result are rounded to 8 bits, the sums are fp32
    assert off(y, expected) < limit and off(final, expected_final) < limit / 2


def test_a_sequence_cut_anywhere_with_its_state_carried_is_the_whole():
    tensors, state = case(37, initial=True)
    whole, final = ssd_chunked(*tensors, chunk=8, initial_state=state)
    part = lambda a, b: [t[:, a:b] if t.ndim > 1 else t for t in tensors]
    for cut in (1, 8, 21, 36):
        first, middle = ssd_chunked(*part(0, cut), chunk=8, initial_state=state)
        second, end = ssd_chunked(*part(cut, 37), chunk=8, initial_state=middle)
        assert off(torch.cat((first, second), 1), whole) < FP32 and off(end, final) < FP32


# -- convolution -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_the_convolution_is_torch_conv1d_with_silu(taps, length):
    g = torch.Generator().manual_seed(taps)
    u, weight, bias = (torch.randn(*s, generator=g).requires_grad_() for s in ((2, length, 6), (6, 1, taps), (6,)))
    out, tail = causal_conv_silu(u, weight, bias)
    conv = F.conv1d(F.pad(u.transpose(1, 2), (taps - 1, 0)), weight, bias, groups=6).transpose(1, 2)
    upstream = torch.randn(out.shape, generator=g)
    assert off(out, F.silu(conv)) < 1e-6  # at most five terms
    assert torch.equal(tail, F.pad(u, (0, 0, taps - 1, 0))[:, length:])
    for a, b in zip(torch.autograd.grad(out, (u, weight, bias), upstream),
                    torch.autograd.grad(F.silu(conv), (u, weight, bias), upstream)):
        assert off(a, b) < 2e-6


def test_the_convolution_cut_anywhere_with_its_inputs_carried_is_the_whole():
    g = torch.Generator().manual_seed(0)
    u, weight, bias = (torch.randn(*s, generator=g) for s in ((2, 11, 6), (6, 1, 4), (6,)))
    whole, tail = causal_conv_silu(u, weight, bias)
    for cut in (1, 2, 3, 7, 10):  # also parts shorter than the kernel's reach
        first, carried = causal_conv_silu(u[:, :cut], weight, bias)
        second, end = causal_conv_silu(u[:, cut:], weight, bias, initial=carried)
        assert off(torch.cat((first, second), 1), whole) < 1e-6 and torch.equal(end, tail)  # five terms


# -- mixer -------------------------------------------------------------------------------------------------------------

def build(**knobs):
    return tj.Mamba2(tj.Config(d_conv=4, **knobs), tj.Kernels())


@pytest.fixture
def mixer():
    torch.manual_seed(0)
    return build(model_dim=64, d_state=16, expand=2, ssd_chunk=8)


def test_mixer_shapes_and_initial_values_are_mamba_2s():
    torch.manual_seed(0)
    found = build(model_dim=640, d_state=64, expand=1)
    shapes = {name: tuple(p.shape) for name, p in found.named_parameters()}
    assert shapes == {"in_proj.weight": (2 * 640 + 128 + 10, 640), "conv1d.weight": (768, 1, 4), "conv1d.bias": (768,),
                      "dt_bias": (10,), "A_log": (10,), "D": (10,), "norm.weight": (640,),
                      "out_proj.weight": (640, 640)}
    many = build(model_dim=64, d_state=8, expand=200)  # 200 heads, to see distributions
    dt, A = F.softplus(many.dt_bias.detach()), many.A_log.detach().exp()
    assert 0.001 * 0.999 <= dt.min() < 0.0015 and 0.06 < dt.max() <= 0.1001
    # three standard errors of 200 uniform draws: 3 * 1.33 / 14 of log dt, 3 * 4.3 / 14 of A
    assert abs(dt.log().mean().item() - math.log(0.01)) < 0.3
    assert 1 <= A.min() < 1.5 and 15.5 < A.max() <= 16 and abs(A.mean() - 8.5) < 1
    assert torch.equal(many.D, torch.ones(200)) and torch.equal(many.norm.weight, torch.ones(12800))
    bound = 640 ** -0.5
    assert found.in_proj.weight.abs().max() <= bound and abs(found.in_proj.weight.std() / bound * 3**0.5 - 1) < 0.01
    assert 0.45 < found.conv1d.weight.abs().max() <= 0.5 and 0.45 < found.conv1d.bias.abs().max() <= 0.5


def naive_mixer(mixer, u):
    """Spec section 5 in float64; rows of in_proj in the order z, x, B, C, dt."""
    heads, width, size = mixer.state_shapes[1]
    inner = heads * width
    z, xBC, dt = (u @ mixer.in_proj.weight.T).split((inner, inner + 2 * size, heads), -1)
    conv = F.conv1d(F.pad(xBC.transpose(1, 2), (3, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=inner + 2 * size)
    x, B, C = F.silu(conv).transpose(1, 2).split((inner, size, size), -1)
    dt = torch.log(1 + torch.exp(dt + mixer.dt_bias))
    y, _ = recurrence(x.unflatten(-1, (heads, 64)), dt, -mixer.A_log.exp(), B, C, mixer.D)
    y = y.flatten(2) * z * torch.sigmoid(z)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    return y @ mixer.out_proj.weight.T


@pytest.mark.parametrize("scale", [1.0, 0.03])  # small inputs bring the norm's epsilon into play
def test_the_mixer_is_its_formula_with_its_gradients(mixer, scale):
    with torch.no_grad():
        for p in (mixer.D, mixer.norm.weight, mixer.dt_bias):
            p.add_(torch.randn_like(p) * 0.3)
    wide = copy.deepcopy(mixer).double()
    g = torch.Generator().manual_seed(1)
    u, upstream = torch.randn(2, 21, 64, generator=g) * scale, torch.randn(2, 21, 64, generator=g)
    leaves = [u.requires_grad_(), *mixer.parameters()]
    wide_leaves = [u.detach().double().requires_grad_(), *wide.parameters()]
    found, expected = mixer(u)[0], naive_mixer(wide, wide_leaves[0])
    assert off(found, expected) < 5e-6  # two products and a scan in fp32
    for name, a, b in zip(["u", *dict(mixer.named_parameters())], torch.autograd.grad(found, leaves, upstream),
                          torch.autograd.grad(expected, wide_leaves, upstream.double())):
        assert off(a, b) < 2e-5, name  # per-head sums over all positions, partly cancelling


def test_the_mixer_cut_anywhere_with_its_state_carried_is_the_whole(mixer):
    u = torch.randn(2, 27, 64, generator=torch.Generator().manual_seed(1))
    whole, final = mixer(u)
    for cut in (1, 2, 8, 20, 26):
        first, state = mixer(u[:, :cut])
        second, state = mixer(u[:, cut:], state)
        assert off(torch.cat((first, second), 1), whole) < 5e-6  # the scan's rounding, seen through a norm
        assert torch.allclose(state[0], final[0], atol=1e-6) and off(state[1], final[1]) < FP32


def test_mixer_steps_are_its_forward_pass(mixer):
    u = torch.randn(2, 21, 64, generator=torch.Generator().manual_seed(1))
    whole, final = mixer(u)
    _, state = mixer(u[:, :5])
    for t in range(5, 21):
        y, state = mixer(u[:, t:t + 1], state)
        assert off(y, whole[:, t:t + 1]) < 5e-6
    assert off(state[1], final[1]) < FP32 and off(state[0], final[0]) < 1e-6


MAMBA_SSM = r'''
import contextlib, importlib.util, sys, types
from unittest import mock
import torch
torch.cuda.device = lambda *a: contextlib.nullcontext()
torch.cuda.get_device_properties = lambda *a: types.SimpleNamespace(multi_processor_count=4)
spec = importlib.util.find_spec("mamba_ssm")
parent = types.ModuleType("mamba_ssm")
parent.__path__, parent.__spec__ = list(spec.submodule_search_locations), spec
sys.modules["mamba_ssm"] = parent
if importlib.util.find_spec("huggingface_hub") is None:
    sys.modules["huggingface_hub"] = types.SimpleNamespace(PyTorchModelHubMixin=type("PyTorchModelHubMixin", (), {}))
from mamba_ssm.modules import mamba2 as theirs
import train_jepa as tj
from tolerance import bound

assert theirs.causal_conv1d_fn is None, "causal_conv1d is installed; the reference must run without it"
worst = {}
for dim, expand, length, d_state in ((64, 2, 24, 16), (128, 1, 19, 16)):  # per-head sums here do not all but cancel
    torch.manual_seed(length)
    config = tj.Config(model_dim=dim, d_state=d_state, d_conv=4, expand=expand, ssd_chunk=16)
    ours = tj.Mamba2(config, tj.Kernels())
    with torch.no_grad():
        for p in (ours.D, ours.norm.weight, ours.dt_bias):
            p.add_(torch.randn_like(p) * 0.3)
    other = theirs.Mamba2(d_model=dim, d_state=d_state, d_conv=4, expand=expand, headdim=64, ngroups=1, chunk_size=16,
                          use_mem_eff_path=False)
    other.load_state_dict(ours.state_dict())  # strict: the same names and shapes
    u = torch.randn(1, length, dim)
    upstream = torch.randn(1, length, dim)
    results = []
    for module in (ours, other):
        v = u.clone().requires_grad_()
        y = module(v)
        y = y[0] if isinstance(y, tuple) else y
        names = sorted(dict(module.named_parameters()))
        grads = torch.autograd.grad(y, [v] + [dict(module.named_parameters())[n] for n in names], upstream)
        results.append(dict(zip(["y", "u", *names], [y, *grads])))
    assert results[0].keys() == results[1].keys() and len(results[0]) == 10
    for name, value in results[1].items():
        assert value.abs().max() > 1e-4, f"{name} is all but zero: nothing is compared"
        error = float(((results[0][name] - value).abs().max() / value.abs().max()).detach())
        worst[name] = max(error, worst.get(name, 0.0))
print({name: f"{value:.1e}" for name, value in worst.items()})
# the gradients of decay and step sum over 24 positions, 64 channels and 16 states, partly cancelling
limit = dict.fromkeys(worst, 1e-5) | dict.fromkeys(("A_log", "dt_bias"), bound(24 * 64 * 16))
bad = {name: value for name, value in worst.items() if not value <= limit[name]}
sys.exit(f"relative error above {limit}: {bad}" if bad else 0)
'''


@pytest.mark.slow
def test_the_mixer_equals_mamba_ssms_mamba2_with_the_same_weights(tmp_path):
    """Output and every gradient in fp32; its kernels run in Triton's interpreter, in their own process."""
    pytest.importorskip("triton", reason="mamba-ssm needs triton")
    if tj.importlib.util.find_spec("mamba_ssm") is None:
        pytest.skip("mamba_ssm is not installed")
    script = tmp_path / "compare.py"
    script.write_text(MAMBA_SSM)
    environ = os.environ | dict(TRITON_INTERPRET="1", MAMBA_DETERMINISTIC="1", OMP_NUM_THREADS="1",
                                CUDA_VISIBLE_DEVICES="",
                                PYTHONPATH=os.pathsep.join((str(Path(tj.__file__).parent), str(Path(__file__).parent))),
                                TRITON_CACHE_DIR=str(tmp_path / "cache"))
    done = subprocess.run([sys.executable, str(script)], env=environ, cwd=tmp_path, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@INITIAL
def test_gradcheck_of_the_convolution_in_float64(initial):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)
    inputs = [draw(3, 9, 5), draw(5, 1, 4), draw(5), *([draw(3, 3, 5)] if initial else [])]
    assert torch.autograd.gradcheck(lambda u, w, b, i=None: causal_conv_silu(u, w, b, initial=i), inputs)
