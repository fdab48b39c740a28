"""Speed of the Mamba-2 mixer on CPU, side by side with Hugging Face transformers' Mamba-2 in one run.

    .venv/bin/python -m pip install -q --target .bench transformers==4.57.1    (for this script alone)
    PYTHONPATH=.bench .venv/bin/python tools/bench_mixer.py [THREADS]

Both mixers have the same sizes and the same weights; their outputs are compared first. Then one layer's forward and
backward pass is timed, in turns, on the same input; medians, and their ratio. The last line is JSON."""
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_jepa as tj

DIM, STATE, ROUNDS = 256, 64, 5
CASES = [(1, 1024, 1), (4, 1024, 1), (4, 1024, 2)]  # batch, length, expand


def theirs(expand: int, ours: tj.Mamba2) -> torch.nn.Module:
    """transformers' mixer with our weights, at its own default chunk length of 256."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    config = Mamba2Config(num_heads=expand * DIM // 64, head_dim=64, hidden_size=DIM, state_size=STATE, expand=expand,
                          n_groups=1, num_hidden_layers=1, vocab_size=256)
    mixer = Mamba2Mixer(config, layer_idx=0)
    mixer.load_state_dict(ours.state_dict())
    return mixer


def first(output):
    return output[0] if isinstance(output, tuple) else output


def timed(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def seconds(mixer, u: torch.Tensor) -> float:
    u = u.detach().requires_grad_()
    return timed(lambda: first(mixer(u)).sum().backward())


def compare(batch: int, length: int, expand: int, mixers: dict) -> dict:
    u = torch.randn(batch, length, DIM)
    with torch.no_grad():
        outputs = [first(mixer(u)) for mixer in mixers.values()]
    times = {name: [] for name in mixers}
    for turn in range(ROUNDS + 1):
        for name, mixer in mixers.items():
            if turn <= 2 or name == "ours":  # the slow one gets two turns after its warm-up
                times[name].append(seconds(mixer, u))
    speed = {name: batch * length / statistics.median(spent[1:]) for name, spent in times.items()}
    return dict(batch=batch, length=length, expand=expand, tokens_per_second=speed,
                largest_difference=float((outputs[0] - outputs[-1]).abs().max() / outputs[0].abs().max()),
                ratio=speed["ours"] / speed["transformers"] if "transformers" in speed else None)


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
    tj.keep_freed_memory()  # as every run of the trainer on a CPU does
    torch.manual_seed(0)
    square = torch.randn(2048, 2048)
    best = min(timed(lambda: square @ square) for _ in range(5))
    facts = dict(dim=DIM, d_state=STATE, chunk=64,
                 matmul_gflops=2 * 2048 ** 3 / best / 1e9,
                 threads=torch.get_num_threads(), cpu=tj.cpu_name(),
                 torch=torch.__version__, transformers=None, cases=[])
    try:
        import transformers
        facts["transformers"] = transformers.__version__
    except ImportError:
        print("transformers is not installed: our mixer alone; see the top of this file", file=sys.stderr)
    for batch, length, expand in CASES:
        config = tj.Config(model_dim=DIM, d_state=STATE, d_conv=4, expand=expand, ssd_chunk=64)
        ours = tj.Mamba2(config, tj.Kernels())
        mixers = {"ours": lambda u, ours=ours: ours(u)[0]}
        if facts["transformers"]:
            mixers["transformers"] = theirs(expand, ours)
        case = compare(batch, length, expand, mixers)
        facts["cases"].append(case)
        speeds = ", ".join(f"{name} {speed:,.0f} tokens/s" for name, speed in case["tokens_per_second"].items())
        ratio = f"; {case['ratio']:.1f} times; outputs {case['largest_difference']:.0e} apart" if case["ratio"] else ""
        print(f"batch {batch}, length {length}, width {DIM}, expand {expand}: {speeds}{ratio}", flush=True)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
