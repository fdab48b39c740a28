"""Section "kernels": on a CPU every Triton kernel is proven in the interpreter (interpreter_kernels.py) and compiled
for sm_90 (sm90_kernels.py), each in a process of its own since Triton reads its mode at import; the chunked head runs
here as it does in CPU training. Tests marked cuda compare with float64 at the configurations' sizes on a GPU."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interpreter_kernels import (
    GRIDS,
    check_head,
    check_snap,
    compare,
    conv_naive,
    head_inputs,
    mix_by,
    mix_case,
    mix_naive,
    mlp_by,
    mlp_case,
    mlp_naive,
    off,
    one_graph,
    one_graph_inputs,
    outputs_and_grads,
    snap_items,
    ssd_by,
    ssd_case,
    ssd_naive,
)

import train_jepa as K

HERE = Path(__file__).parent
cuda, slow = pytest.mark.cuda, pytest.mark.slow  # conftest.py skips cuda where there is none
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_mamba = pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="mamba_ssm is not installed")


# -- CPU ---------------------------------------------------------------------------------------------------------------
def spawn(*command, **env):
    """A Python process that finds train_jepa, behind whatever PYTHONPATH the test gives."""
    path = os.pathsep.join(filter(None, (env.pop("PYTHONPATH", ""), str(HERE.parent))))
    return subprocess.Popen([sys.executable, *command], cwd=HERE, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | env)


@pytest.fixture(scope="module", autouse=True)
def side_runs(request):
    """Both processes run beside the other tests; the two tests that need them stand last and wait."""
    asked = {item.originalname for item in request.session.items}
    if not asked & {"test_interpreter_parity", "test_compiles_for_sm90"} or not importlib.util.find_spec("triton"):
        yield {}
        return
    runs = {
        "interpreter": spawn("-m", "pytest", "-q", "-x", "interpreter_kernels.py", "-p", "no:cacheprovider",
                             TRITON_INTERPRET="1", MAMBA_DETERMINISTIC="1"),
        "sm90": spawn("sm90_kernels.py"),
    }
    yield runs
    for run in runs.values():
        run.kill()
        run.communicate()


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 3e-6), (torch.bfloat16, 3e-2)), ids=("fp32", "bf16"))
@pytest.mark.parametrize("softcap, kind, z_loss", ((15.0, "poly", 1e-2), (30.0, "tanh", 0.0), (0.0, "poly", 1e-4)))
def test_chunked_head_on_cpu(dtype, tolerance, softcap, kind, z_loss):
    """bf16: logits of some units are known to 2^-9 of themselves."""
    inputs, targets = head_inputs(dtype, 37, 300, bias=kind == "poly")
    check_head(inputs, targets, softcap, kind, z_loss, tolerance, rows=8)


def test_head_keeps_fp32_masters_gradient():
    """With an fp32 weight and bf16 h the weight's gradient arrives in fp32, not rounded to bf16."""
    (h, w), targets = head_inputs(torch.float32, 64, 50, bias=False)
    loss, _ = K.token_loss_fused(h.detach().bfloat16().requires_grad_(), w, None, targets, rows=16)
    grad, = torch.autograd.grad(loss, [w])
    assert grad.dtype == torch.float32 and not torch.equal(grad, grad.bfloat16().float())


def test_head_without_gradient_saves_nothing():
    inputs, targets = head_inputs(torch.float32, 20, 30)
    with torch.no_grad():
        loss, nll = K.token_loss_fused(*inputs, targets, softcap=15.0, z_loss=1e-4)
    assert not loss.requires_grad
    with_grad = K.token_loss_fused(*inputs, targets, softcap=15.0, z_loss=1e-4)
    assert off(loss, with_grad[0]) < 1e-6 and off(nll, with_grad[1]) < 1e-6


@pytest.mark.slow
def test_head_ops_pass_opcheck():
    inputs, targets = head_inputs(torch.float32, 9, 30)
    torch.library.opcheck(torch.ops.jepa.head_train, (*inputs, targets, 15.0, "poly", 1e-4, 4))
    torch.library.opcheck(torch.ops.jepa.head_train, (*inputs[:2], None, targets, 30.0, "tanh", 0.0, 0))


def test_head_compiles_to_one_graph():
    inputs, targets = head_inputs(torch.float32, 12, 30)
    f = lambda h, w, b: K.token_loss_fused(h.tanh(), w, b, targets, softcap=15.0, z_loss=1e-4)[0] * 2
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(f(*inputs), inputs)):
        assert off(a, b) < 1e-6


@pytest.mark.parametrize("T", (1, 3, 20))
@pytest.mark.parametrize("initial", (False, True))
def test_conv_torch(T, initial):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, T, 10), (10, 1, 4), (10,), (2, 3, 10))[:4 if initial else 3]
    inputs = [torch.randn(s, generator=g).requires_grad_() for s in shapes]
    compare(lambda u, w, b, i=None: K.causal_conv_silu(u, w, b, initial=i), conv_naive, inputs, 3e-6)
    tail = K.causal_conv_silu(*inputs[:3])[1]
    assert tail.untyped_storage().nbytes() == tail.nbytes  # it must not keep the inputs alive


def test_chunk_follows_the_form_unless_it_is_set():
    for name, chunk in (("mamba_ssm", 256), ("fused", 64), ("torch", 64)):
        kernels = K.FORMS[name]
        assert K.Mamba2(K.Config(), kernels).chunk == chunk
        assert K.Mamba2(K.Config(ssd_chunk=128), kernels).chunk == 128


def test_snap_in_closed_form():
    w = torch.tensor([[0.7, -0.35, 0.05, 0.0], [0.0, 0.0, 0.0, -0.0]])
    out = K.snap(w, K.Grid.parse("int4"))
    scale = torch.tensor(0.7 / 7).bfloat16().float()
    assert torch.equal(out[0].float(), (torch.tensor([7.0, -3.0, 0.0, 0.0]) * scale).bfloat16().float()) or \
        torch.equal(out[0].float(), (torch.tensor([7.0, -4.0, 0.0, 0.0]) * scale).bfloat16().float())
    assert not out[1].signbit().any()  # an integer zero has no sign in the artifact either


@slow
def test_without_triton_and_mamba_ssm():
    """The file imports and the head trains without triton; importing it starts no CUDA context; a missing mamba_ssm
    is one line that says what to do."""
    code = """if True:
        import importlib.util, sys, torch
        sys.modules["triton"] = None
        import train_jepa as K
        assert K.triton is None and not torch.cuda.is_initialized()
        h, w = (torch.randn(n, 8, requires_grad=True) for n in (5, 12))
        K.token_loss_fused(h, w, None, torch.arange(5), softcap=15.0)[0].backward()
        assert h.grad.isfinite().all() and w.grad.isfinite().all()
        importlib.util.find_spec = lambda name: None
        try: K.mamba_ssm("fwd")
        except K.UserError as e: print("USER", e)"""
    text = spawn("-c", code).communicate(timeout=60)[0]
    assert text.startswith("USER SSD_KERNEL=mamba_ssm") and "not installed" in text and text.count("\n") == 1, text


def choose(kernel, device, **knobs):
    runtime = SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16, main_first=lambda work: work())
    return K.choose_kernels(K.Config(ssd_kernel=kernel, kernel_check="0", **knobs), runtime)


def test_bad_input(monkeypatch):
    with pytest.raises(K.UserError, match="SSD_KERNEL=fused needs a CUDA device"):
        choose("fused", "cpu")
    assert choose("auto", "cpu") == (K.Kernels(), "")
    assert choose("torch", "cuda", mlp_kernel="torch") == (K.Kernels(), "")
    assert choose("torch", "cuda") == (K.Kernels(mlp=K.triton is not None), "")
    for knob, value in (("d_state", 24), ("ssd_chunk", 256), ("d_conv", 5)):
        with pytest.raises(K.UserError, match=f"{knob.upper()}={value}"):
            choose("fused", "cuda", **{knob: value})

    def missing(launcher):
        raise K.UserError("mamba_ssm is not what we know")
    monkeypatch.setattr(K, "mamba_ssm", missing)
    with pytest.raises(K.UserError, match="not what we know"):
        choose("mamba_ssm", "cuda")
    monkeypatch.setattr(K, "triton", SimpleNamespace())
    assert choose("auto", "cuda")[0].name == "fused" and choose("auto", "cuda")[1] == ""
    kernels, note = choose("auto", "cuda", d_state=24)
    assert kernels.name == "torch" and "D_STATE=24" in note and "not what we know" in note
    monkeypatch.setattr(K, "triton", None)
    kernels, note = choose("auto", "cuda")
    assert kernels == K.Kernels() and "not what we know" in note and note.count("\n") == 1
    with pytest.raises(K.UserError, match="SSD_KERNEL=fused needs the package triton"):
        choose("fused", "cuda")


@slow
@needs_triton
def test_broken_mamba_ssm_is_one_line(tmp_path):
    """An interface we do not know, and a package that fails to import, each become one line that says what to do."""
    (tmp_path / "mamba_ssm/ops/triton").mkdir(parents=True)
    for d in ("mamba_ssm", "mamba_ssm/ops", "mamba_ssm/ops/triton"):
        (tmp_path / d / "__init__.py").write_text("import selective_scan_cuda" if d == "mamba_ssm" else "")
    code = f"""if True:
        import pathlib, train_jepa as K
        bodies = "raise AttributeError('triton has no such thing')", "_mamba_chunk_scan_combined_fwd = lambda x: 0"
        for body in bodies:
            pathlib.Path({str(tmp_path)!r}, "mamba_ssm/ops/triton/ssd_combined.py").write_text(body)
            try: K.mamba_ssm("fwd")
            except K.UserError as e: print("USER", e)"""
    lines = spawn("-c", code, PYTHONPATH=str(tmp_path)).communicate(timeout=60)[0].splitlines()
    assert len(lines) == 2 and all(line.startswith("USER SSD_KERNEL=mamba_ssm") for line in lines), lines
    assert "no such thing" in lines[0] and "TypeError" in lines[1], lines


@slow
@needs_triton
@needs_mamba
def test_compiles_for_sm90(side_runs):
    """All kernels, mamba-ssm's too: no spills worth the name (32 bytes), shared memory within an SM's 227 KB."""
    text = side_runs["sm90"].communicate(timeout=1200)[0]
    assert side_runs["sm90"].returncode == 0, text[-4000:]
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    kernels = [line for line in lines if "kernel" in line]
    assert {k["kernel"] for k in kernels} >= {
        "head_rows", "conv_fwd", "conv_bwd", "snap_rows", "ssd_scan", "ssd_bwd_bc", "gate_norm",
        "gate_norm_bwd", "mlp_product", "_chunk_scan_fwd_kernel", "_chunk_state_fwd_kernel",
        "_chunk_scan_chunk_state_bwd_dx_kernel", "_chunk_cumsum_bwd_kernel"}
    assert len([line for line in lines if "launched" in line]) == 16
    bad = [k for k in kernels if k["stack"] > 32 or k["shared"] > 227 * 1024]
    assert not bad, bad


@slow
@needs_triton
@needs_mamba
def test_interpreter_parity(side_runs):
    text = side_runs["interpreter"].communicate(timeout=1200)[0]
    assert side_runs["interpreter"].returncode == 0, text[-6000:]
    assert " passed" in text and "skipped" not in text, text[-2000:]


# -- GPU, at the sizes of the configurations ---------------------------------------------------------------------------
# bf16 inputs hold 8 bits, and the kernels round products' inputs to them: 2e-2 of the largest entry, the decay's
# gradient included. fp32 runs the same kernels with exact products and shows that the rest is rounding: 1e-4.
BF16, GPU_TOLERANCE = torch.bfloat16, {torch.bfloat16: 2e-2, torch.float32: 1e-4}
SIZES = pytest.mark.parametrize("T, H", ((1024, 10), (1000, 12)), ids=("bpe", "ragged"))


@cuda
@pytest.mark.parametrize("n, V, E, softcap, kind, bias", (
    (8192, 8192, 336, 15.0, "poly", True), (3000, 256, 256, 15.0, "poly", True), (3000, 256, 512, 30.0, "tanh", False),
    (600, 65536, 128, 15.0, "poly", True)))
def test_cuda_head(n, V, E, softcap, kind, bias):
    inputs, targets = head_inputs(BF16, n, V, E, scale=E**-0.5, bias=bias, device="cuda")
    check_head(inputs, targets, softcap, kind, 1e-4, GPU_TOLERANCE[BF16])


@cuda
def test_cuda_head_memory():
    """Peak extra memory is a chunk of logits and the gradients, never an (n, V) tensor."""
    inputs, targets = head_inputs(BF16, 65536, 8192, 336, scale=0.05, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    K.token_loss_fused(*inputs, targets, softcap=15.0, z_loss=1e-4)[0].backward()
    assert torch.cuda.max_memory_allocated() - before < 400 * 2**20  # the bf16 logits alone would be 1024 MiB


@cuda
@SIZES
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=("bf16", "fp32"))
@pytest.mark.parametrize("pad", (0, 6))
@pytest.mark.parametrize("initial", (False, True))
def test_cuda_mixer(initial, pad, dtype, T, H):
    inputs = mix_case(dtype, T=T, H=H, P=64, N=64, pad=pad, initial=initial, device="cuda")
    compare(mix_by(K.mamba_mix_triton, 64), mix_naive, inputs, GPU_TOLERANCE[dtype])


@cuda
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=("bf16", "fp32"))
@pytest.mark.parametrize("n, D, hidden, leak, eps", (
    (4096, 512, 1024, 0.0, None), (3001, 512, 1536, 0.5, 1e-6), (1000, 640, 2560, 0.0, 1e-6),
    (500, 192, 384, 0.5, 1e-6)))
def test_cuda_mlp(n, D, hidden, leak, eps, dtype):
    compare(mlp_by(K.mlp_fused, leak, eps), lambda *i: mlp_naive(*i, leak, eps), mlp_case(dtype, n, D, hidden, "cuda"),
            GPU_TOLERANCE[dtype])


@cuda
def test_cuda_snap_bit_equal():
    check_snap(snap_items("cuda", wide=2560))
    for grid in GRIDS:
        for w, *_ in snap_items("cuda", wide=2560):
            on_gpu, on_cpu = K.snap(w, grid), K.snap(w.cpu(), grid)
            assert torch.equal(on_gpu.cpu().view(torch.int32), on_cpu.view(torch.int32)), (grid, tuple(w.shape))


@cuda
@SIZES
@pytest.mark.parametrize("chunk", (128, 256))
@pytest.mark.parametrize("initial", (False, True))
def test_cuda_ssd_mamba_ssm(initial, chunk, T, H):
    """In bf16 alone: its products of fp32 inputs run in TF32."""
    inputs = ssd_case(BF16, b=2, T=T, H=H, P=64, N=64, initial=initial, device="cuda")
    compare(ssd_by(K.ssd_mamba_ssm, chunk), ssd_naive, inputs, GPU_TOLERANCE[BF16])


@cuda
def test_cuda_forms_agree_at_8192():
    inputs = mix_case(BF16, b=1, T=8192, H=12, P=64, N=64, initial=True, device="cuda")
    fused, other = K.FORMS["fused"], K.FORMS["mamba_ssm"]
    compare(mix_by(fused.mix, fused.chunk), mix_by(other.mix, other.chunk), inputs, GPU_TOLERANCE[BF16])


@cuda
def test_cuda_runs_are_bitwise_equal():
    inputs = mix_case(BF16, b=4, T=1024, H=10, P=64, N=64, device="cuda")
    (a, ga), (b, gb) = (outputs_and_grads(mix_by(K.mamba_mix_triton, 64), inputs) for _ in range(2))
    assert all(torch.equal(s, t) for s, t in zip(a + list(ga), b + list(gb)))


@cuda
@pytest.mark.parametrize("name", ("fused", "mamba_ssm"))
def test_cuda_one_compiled_graph(name):
    mix, chunk = K.FORMS[name].mix, K.FORMS[name].chunk
    inputs, targets = one_graph_inputs(BF16, "cuda", V=8192, b=2, T=1024, H=10, P=64, N=64)
    plain = one_graph(mix, chunk, *inputs, targets)
    compiled = torch.compile(one_graph, fullgraph=True)(mix, chunk, *inputs, targets)
    assert off(compiled, plain) <= 1e-2
    for a, b in zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(plain, inputs)):
        assert off(a, b) <= GPU_TOLERANCE[BF16]
