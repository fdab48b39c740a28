"""Compiles every Triton kernel for an H100 (sm_90) on a machine without a GPU, at the sizes of the configurations, and
prints one JSON line per compiled kernel: registers, stack (spilled bytes live there), shared memory, warps.

The launches run for real up to the point of the launch itself, so the compiled specializations (dtypes, alignment of
pointers and strides) are those of a run. python tests/sm90_kernels.py | column -t shows the table."""
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["MAMBA_DETERMINISTIC"] = "1"  # one autotune configuration per kernel of mamba-ssm
os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import train_jepa as K  # noqa: E402

BF16 = torch.bfloat16
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")


class H100:
    """As much of a driver as compiling needs."""
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_device_capability = staticmethod(lambda *_: (9, 0))
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))


def install(on_kernel):
    """Compile for sm_90 whatever is launched, tell on_kernel, and launch nothing."""
    compile_ = JITFunction._do_compile

    def compiling(self, *args, **kwargs):
        start = time.time()
        kernel = compile_(self, *args, **kwargs)
        on_kernel(self.__name__, kernel, time.time() - start)
        return kernel

    JITFunction._do_compile = compiling
    CompiledKernel.run = property(lambda self: lambda *_: None)
    CompiledKernel.launch_metadata = lambda *_: None
    triton.runtime.driver.set_active(H100())
    K.runs_triton = lambda device: True
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=132)


def resources(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    number = lambda key: int(re.search(key + r":(\d+)", text)[1])
    return dict(registers=number("REG"), stack=number("STACK") + number("LOCAL"), shared=kernel.metadata.shared,
                warps=kernel.metadata.num_warps)


def leaf(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def head(V, E, softcap, kind, bias):
    h, w, t = leaf(16, E, dtype=BF16), leaf(V, E, dtype=BF16), torch.zeros(16, dtype=torch.long)
    b = leaf(V) if bias else None
    K.token_loss_fused(h, w, b, t, softcap=softcap, softcap_type=kind, z_loss=1e-4)[0].backward()


def mamba_ssm(H, T, chunk):
    v = leaf(2, T, H * 64 + 128, dtype=BF16)
    x, B, C = v[..., :H * 64].unflatten(-1, (H, 64)), v[..., H * 64:H * 64 + 64], v[..., H * 64 + 64:]
    inputs = x, leaf(2, T, H), leaf(H), B, C, leaf(H)
    for carried in (False, True):
        initial = leaf(2, H, 64, 64) if carried else None
        y, final = K.ssd_mamba_ssm(*inputs, chunk=chunk, initial_state=initial)
        (y.sum() + (final.sum() if carried else 0)).backward()


def mixer(H, width, T, initials=(False, True)):
    """From in_proj's output of `width` columns to what out_proj takes."""
    inner, channels = H * 64, H * 64 + 128
    inputs = leaf(2, T, width, dtype=BF16), leaf(channels, 1, 4), leaf(channels), leaf(H), leaf(H), leaf(H), leaf(inner)
    for carried in initials:
        state = (leaf(2, 3, channels, dtype=BF16), leaf(2, H, 64, 64)) if carried else None
        out, (_, final) = K.mamba_mix_triton(*inputs, state=state)
        (out.sum() + (final.sum() if carried else 0)).backward()
        with torch.no_grad():  # the scan that saves nothing
            K.mamba_mix_triton(*inputs, state=state)


def mlp(D, hidden, leak, eps, dtype=BF16):
    inputs = (leaf(*shape, dtype=dtype) for shape in ((16, D), (hidden, D), (D, hidden)))
    K.mlp_fused(*inputs, leak, eps).sum().backward()


def snap():
    for dtype in (BF16, torch.float32):
        K.FusedSnap([(torch.zeros(8, 640), torch.zeros(8, 640, dtype=dtype), "int", 7)])()


CASES = {
    "BPE head V=8192": lambda: head(8192, 336, 15.0, "poly", True),
    "byte head V=256": lambda: head(256, 256, 15.0, "poly", True),
    "ByteJEPA head V=256": lambda: head(256, 512, 30.0, "tanh", False),
    "snap": snap,
    "BPE mixer": lambda: mixer(10, 1424, 1024),
    "BPE mixer, rows of 1418": lambda: mixer(10, 1418, 1024, initials=(False,)),
    "BPE MLP": lambda: mlp(640, 2560, 0.0, 1e-6),
    "full-size preset's MLP": lambda: mlp(512, 1536, 0.5, 1e-6),
    "BPE MLP in fp32, for the self-check": lambda: mlp(640, 2560, 0.0, 1e-6, torch.float32),
    "ByteJEPA MLP": lambda: mlp(512, 1024, 0.0, None),
    "byte mixer": lambda: mixer(12, 1680, 8192, initials=(True,)),
    **{f"BPE mamba-ssm chunk {c}": lambda c=c: mamba_ssm(10, 1024, c) for c in (64, 128, 256)},
    **{f"byte mamba-ssm chunk {c}": lambda c=c: mamba_ssm(12, 8192, c) for c in (128, 256)},
}

if __name__ == "__main__":
    found = []
    install(lambda *k: found.append(k))
    for case, launch in CASES.items():
        launch()
        for name, kernel, seconds in found:
            print(json.dumps(dict(case=case, kernel=name, **resources(kernel), seconds=round(seconds, 1))), flush=True)
        print(json.dumps(dict(case=case, launched=True)), flush=True)
        found.clear()
