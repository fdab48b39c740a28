"""Storage grids: closed forms, hand values, and snap(w) = decode(encode(w)) bit for bit."""

import math
import re

import numpy as np
import pytest
import torch

import train_jepa as tj

GRIDS = [
    "int4",
    "int5",
    "int6",
    "int7",
    "int8a",
    "int4s0.35",
    "int5s0.2",
    "int8s1",
    "int8",
    "int8f",
    "fp8",
    "bf16",
    "fp16",
    "fp32",
]
INTN = [g for g in GRIDS if g.startswith("int") and g not in ("int8", "int8f")]


def bits(t):
    return t.contiguous().view(torch.int32)


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, std=0.03):
        return torch.randn(shape, generator=g) * std

    return {
        "matrix": normal(70, 96),
        "wide": normal(3, 5000),
        "tall": normal(900, 2),
        "column": normal(50, 1),
        "row": normal(1, 77),
        "conv": normal(40, 1, 4),
        "cube": normal(6, 5, 4),
        "vector": normal(130),
        "one": normal(1),
        "scalar": torch.tensor(0.7),
        "blocks": normal(700, 640),
        "tails": normal(64, 64) * torch.randn(64, 64, generator=g).exp(),
        "zero rows": torch.cat([torch.zeros(3, 40), normal(3, 40), -torch.zeros(2, 40)]),
        "constant": torch.full((5, 9), -0.3),
        "minus zero": torch.full((4, 4), -0.0),
        "denormal": torch.full((4, 8), 1e-42) * torch.arange(-4, 4),
        "tiny": normal(9, 50, std=1e-12),
        "large": normal(9, 50, std=1e4).clamp(-6e4, 6e4),
        "empty": torch.empty(0, 8),
        "ones": torch.ones(20),
        "strided": normal(64, 48).T,
        "half steps": torch.arange(-14, 15).reshape(1, -1) * 0.5,
    }


@pytest.mark.parametrize("name", GRIDS)
def test_snap_is_decode_of_encode_bit_for_bit(name):
    grid = tj.Grid.parse(name)
    assert str(grid) == name
    for label, w in tensors().items():
        before = w.clone()
        snapped = tj.snap(w, grid)
        decoded = tj.decode(tj.encode(w, grid, label), grid, w.shape)
        assert snapped.dtype == decoded.dtype == torch.float32 and snapped.shape == decoded.shape == w.shape, label
        assert torch.equal(bits(snapped), bits(decoded)), label
        assert torch.equal(bits(w), bits(before)), label
        out = torch.full(w.shape, math.nan)
        assert tj.snap(w, grid, out=out) is out and torch.equal(bits(out), bits(snapped)), label
        half = tj.snap(w, grid, out=torch.empty(w.shape, dtype=torch.bfloat16))
        assert torch.equal(bits(half.float()), bits(snapped.bfloat16().float())), label
        if w.is_contiguous():
            assert torch.equal(bits(tj.snap(before, grid, out=before)), bits(snapped)), label


@pytest.mark.parametrize("name", INTN)
def test_intn_equals_its_formula(name):
    """The formula row by row, in plain scalars of fp32 and bf16."""
    grid, w = tj.Grid.parse(name), tensors(1)["matrix"]
    snapped, arrays = tj.snap(w, grid), tj.encode(w, grid)
    for r in range(0, len(w), 7):
        row = w[r].tolist()
        if "s" in name:
            k = float(name.partition("s")[2])
            step, qmax = torch.tensor(k * math.sqrt(sum(v * v for v in row) / len(row))), 127
        else:
            qmax = 2 ** (int(name[3]) - 1) - 1
            step = torch.tensor(max(max(map(abs, row)), 1e-8)) / qmax
        scale = step.bfloat16().float()
        assert arrays["s"][r].float() == scale and arrays["s"].dtype == torch.bfloat16
        q = [max(-qmax, min(qmax, round(float(np.float32(v) / np.float32(scale))))) for v in row]
        assert arrays["q"][r].tolist() == q  # Python's round is half to even too
        assert torch.equal(snapped[r], (torch.tensor(q, dtype=torch.float32) * scale).bfloat16().float())


def test_int4_hand_values():
    w = torch.tensor([[7.0, -7.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.49, 3.51, 0.0]])
    assert tj.encode(w, tj.Grid.parse("int4"))["q"].tolist() == [[7, -7, 0, 2, 2, 0, -2, 0, 4, 0]]
    assert tj.snap(w, tj.Grid.parse("int4")).tolist() == [[7, -7, 0, 2, 2, 0, -2, 0, 4, 0]]
    zero = tj.snap(torch.tensor([[-0.2, 0.2, 7.0], [-0.0, 0.0, 0.0]]), tj.Grid.parse("int4"))
    assert not torch.signbit(zero[:, :2]).any()  # the file has one zero
    # 0.1/7 = 0.0142857 lies between the bf16 numbers 0.0142822 and 0.0143433;
    # 7 x 0.0142822 = 0.0999756, between 0.0998535 and 0.100098
    arrays = tj.encode(torch.tensor([[0.1, 0.05]]), tj.Grid.parse("int4"))
    assert arrays["s"].float().item() == 0.0142822265625
    assert tj.snap(torch.tensor([[0.1]]), tj.Grid.parse("int4")).item() == 0.10009765625


def test_every_symbol_range_is_used_and_kept():
    torch.manual_seed(0)
    for name in INTN + ["int8", "int8f"]:
        grid = tj.Grid.parse(name)
        w = torch.randn(200, 300) * torch.logspace(-2 if name in ("int8", "int8f") else -6, 3, 200)[:, None]
        q = tj.encode(w, grid)["q"]
        assert q.abs().max() <= grid.qmax
        if "s" not in name and name != "int8f":
            assert (q.abs().amax(1) == grid.qmax).all()
    w = torch.zeros(1, 100_000)
    w[0, 0] = 1000.0  # 316 deviations: clamped
    assert tj.encode(w, tj.Grid.parse("int4s0.35"))["q"][0, 0] == 127
    peaks = 1 + torch.arange(1, 2000)[:, None] / 2000  # absmax symbols cannot exceed their range unclamped
    for b, name in ((7, "int4"), (15, "int5"), (31, "int6"), (63, "int7"), (127, "int8a")):
        assert (tj.encode(peaks, tj.Grid.parse(name))["q"] == b).all()


def test_fp8_bf16_fp16():
    w = torch.tensor([0.0, -0.0, 448, 460, 1e9, -1e9, 2.0**-9, 2.0**-10, 1.0625, 1.1875, 0.3, 240])
    want = [0.0, -0.0, 448, 448, 448, -448, 2.0**-9, 0.0, 1.0, 1.25, 0.3125, 240]  # ties to even
    got = tj.snap(w, tj.Grid.parse("fp8"))
    assert got.tolist() == want and torch.signbit(got[1])
    assert torch.equal(got, got.bfloat16().float())
    assert tj.snap(torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8]), tj.Grid.parse("bf16")).tolist() == [1.0, 1 + 2.0**-6]
    assert tj.snap(torch.tensor([1 + 2.0**-11, 1e-8]), tj.Grid.parse("fp16")).tolist() == [1.0, 0.0]
    for name in ("fp8", "bf16", "fp16", "fp32"):  # plain types: twice is once
        for label, w in tensors(3).items():
            once = tj.snap(w, tj.Grid.parse(name))
            assert torch.equal(bits(tj.snap(once, tj.Grid.parse(name))), bits(once)), (name, label)


@pytest.mark.parametrize("columns", [1, 2, 3, 512, 4097])
def test_int8_clip_is_the_percentile(columns):
    torch.manual_seed(columns)
    w = torch.randn(20, columns) * 0.05
    arrays = tj.encode(w, tj.Grid.parse("int8"))
    clip = torch.quantile(w.abs().double(), 0.9999984, dim=1)
    assert arrays["s"].dtype == torch.float16
    torch.testing.assert_close(arrays["s"].double(), clip / 127, rtol=2.0**-10, atol=2.0**-24)  # fp16 rounding
    error = (tj.snap(w, tj.Grid.parse("int8")) - w).abs().amax(1)
    assert (error <= arrays["s"].float() * 0.5 + clip.float() * 1.1e-3).all()
    assert torch.equal(tj.encode(w, tj.Grid.parse("int8f"))["s"], torch.full((20,), 1 / 127).half())


def test_step_in_deviations_beats_the_maximum_at_equal_entropy():
    """Rate and distortion: same bytes, less error on rows with tails (spec: k sigma with all symbols that occur)."""
    torch.manual_seed(0)
    w = torch.randn(400, 640) * torch.randn(400, 640).mul(0.4).exp()

    def rate_and_error(name):
        grid = tj.Grid.parse(name)
        return (
            tj.entropy_bytes(tj.encode(w, grid)["q"].view(torch.uint8).numpy()),
            ((tj.snap(w, grid) - w) ** 2).sum() / (w**2).sum(),
        )

    rate, error = rate_and_error("int4")
    best = min((rate_and_error(f"int4s{k / 100:.12g}") for k in range(30, 120, 2)), key=lambda re: abs(re[0] - rate))
    assert abs(best[0] / rate - 1) < 0.02 and best[1] < 0.95 * error


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_a_number_is_refused_by_name(name, bad):
    w = torch.zeros(4, 4)
    w[2, 1] = bad
    with pytest.raises(tj.UserError, match="blocks.3.down.*NaN or infinity"):
        tj.encode(w, tj.Grid.parse(name), "blocks.3.down")


@pytest.mark.parametrize("name,value", [("int4", 3.4e38), ("bf16", 3.4e38), ("fp16", 7e4), ("int8", 1e7)])
def test_overflow_is_refused_by_name(name, value):
    with pytest.raises(tj.UserError, match="^head holds values too large"):
        tj.encode(torch.full((2, 2), value), tj.Grid.parse(name), "head")
    tj.encode(torch.full((2, 2), value / 3), tj.Grid.parse(name), "head")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "int",
        "int3",
        "int9",
        "int7a",
        "int4a",
        "INT4",
        "int4 ",
        "int4s",
        "int4s0",
        "int4s-1",
        "int4s0.350",
        "int4snan",
        "int4s1e9",
        "int4s0.0009",
        "int4s10.5",
        "int4s.5",
        "int8as1",
        "fp8f",
        "bf16f",
        "fp4",
        "intn",
        "int4f",
        None,
        4,
        "int4s" + "1" * 400,
    ],
)
def test_unknown_grid_names(name):
    with pytest.raises(tj.UserError, match="storage grid"):
        tj.Grid.parse(name)


def test_other_dtypes_and_gradients():
    w = torch.nn.Parameter(torch.randn(8, 16))
    assert not tj.snap(w, tj.Grid.parse("int4")).requires_grad
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        v = w.detach().to(dtype)
        for name in GRIDS:
            assert torch.equal(tj.snap(v, tj.Grid.parse(name)), tj.snap(v.float(), tj.Grid.parse(name)))


def test_threads_do_not_change_the_grid():
    w, threads = torch.randn(3, 400_000), torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append([bits(tj.snap(w, tj.Grid.parse(name))) for name in GRIDS])
        assert all(torch.equal(a, b) for a, b in zip(*results))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.cuda
@pytest.mark.parametrize("name", GRIDS)
def test_cuda_equals_cpu(name):
    for label, w in tensors().items():
        if label != "denormal":  # CUDA may flush them
            assert torch.equal(
                bits(tj.snap(w.cuda(), tj.Grid.parse(name)).cpu()), bits(tj.snap(w, tj.Grid.parse(name)))
            ), label


def test_every_grid_is_one_row_of_the_table():
    """A name belongs to one kind, says itself, and its arrays fit what the kind says of the file."""
    for name in GRIDS:
        assert sum(bool(re.fullmatch(kind.pattern, name)) for kind in tj.GRIDS) == 1
        grid = tj.Grid.parse(name)
        arrays = tj.encode(torch.randn(6, 10), grid)
        assert set(arrays) == ({"q"} if grid.symbols else set()) | ({grid.values} if grid.dtype else set())
        if grid.symbols:
            numbers = arrays["q"].view(torch.int8).int() + grid.qmax
            assert arrays["q"].shape == (6, 10) and 0 <= (numbers & 255).min() and (numbers & 255).max() <= grid.top
        if grid.dtype:
            assert arrays[grid.values].dtype == grid.dtype
        assert grid.fused is None or grid.fused[0] in tj.FORMATS


def test_entropy_of_known_histograms():
    assert tj.entropy_bytes(np.zeros(1000, np.uint8)) == 0 and tj.entropy_bytes(np.empty(0, np.uint8)) == 0
    assert tj.entropy_bytes(np.arange(256, dtype=np.uint8)) == pytest.approx(256)
    assert tj.entropy_bytes(np.array([0, 0, 0, 1], np.uint8)) == pytest.approx(
        (0.75 * math.log2(4 / 3) + 0.25 * 2) * 4 / 8
    )


# -- grids by role, rounding by effect -----------------------------------------------------------------------------

ROLES = dict(TOKENIZER="byte", MODEL_DIM="64", NUM_LAYERS="2", EXPAND="2", D_STATE="16", MLP_MULT="2", EMBED_DIM="32",
             TIE_EMBEDDINGS="1", TRAIN_SEQ_LEN="32", TRAIN_BATCH_TOKENS="256", DEVICE="cpu", COMPILE_MODE="off",
             MLP_GRID="int5", PROJ_GRID="int4s0.35", DT_GRID="int8a", EMBED_GRID="int6")


def built(**knobs):
    config = tj.Config.from_env(ROLES | knobs).validate()
    torch.manual_seed(0)
    return config, *tj.build_models(config)


def test_each_role_has_its_grid():
    config, model, _ = built()
    plan = tj.storage_plan(model, config)
    assert plan["blocks.0.mlp.up.weight"] == plan["blocks.1.mlp.down.weight"] == "int5"
    assert plan["blocks.0.mixer.out_proj.weight"] == "int4s0.35" and plan["token_embed"] == "int6"
    assert plan["blocks.0.mixer.in_proj.weight"] == "int4s0.35+2xint8a"  # 128 / 64 = 2 heads, one dt row each
    assert plan["blocks.0.mixer.A_log"] == plan["vocab_bias"] == "bf16"
    assert tj.storage_plan(model, tj.Config()) == tj.storage_plan(model, tj.Config(mlp_grid="int5", proj_grid="int5",
                                                                                  embed_grid="bf16"))


def test_training_on_grids_by_role_is_bit_for_bit_what_the_file_decodes_to(tmp_path):
    config, model, jepa = built()
    plan = tj.storage_plan(model, config)
    weights = tj.Weights(model, jepa, plan, config, tj.Runtime(config))
    weights.load(qat=True)
    trained = {name: t.clone() for name, t in weights.tensors("compute").items()}
    masters = weights.tensors()
    stored = tj.artifact_tensors(((name, masters[name]) for name in plan), plan)
    assert "blocks.0.mixer.in_proj.weight[288]" in stored and len(stored) == len(plan) + 2
    tj.write_artifact(tmp_path / "m", {}, stored)
    read = tj.whole_tensors(tj.read_artifact(tmp_path / "m")[1], "m")
    assert read.keys() == plan.keys()
    for name, tensor in read.items():
        assert torch.equal(bits(tensor), bits(trained[name])), name
    dt, rest = trained["blocks.0.mixer.in_proj.weight"][288:], masters["blocks.0.mixer.in_proj.weight"][288:]
    assert (dt - rest).abs().max() <= rest.abs().max() / 127  # half a step of 8 bits, and its rounding to bf16


@pytest.mark.parametrize("shapes", [{"a[3]": (2, 4)}, {"a": (3, 4), "a[4]": (2, 4)}, {"a": (3, 4), "a[3]": (2, 5)},
                                    {"a[3]": (2, 4), "a": (3, 4)}, {"a": (3, 4), "a[x]": (2, 4)},
                                    {"a": (), "a[1]": (2,)}])
def test_parts_that_do_not_join_are_refused(shapes):
    with pytest.raises(tj.UserError, match="do not join"):
        tj.whole_tensors({name: torch.zeros(shape) for name, shape in shapes.items()}, "file")


def one_weight_at_a_time(w, scale, moments, limit):
    """GPTQ's definition in numpy, row by row: round a weight, let the rest answer optimally, drop its column from the
    inverse Hessian by elimination. Quadratic forms alone, no Cholesky factor."""
    rows, order = w.double().numpy(), np.argsort(-np.diag(moments), kind="stable")
    found = np.zeros_like(rows)
    damped = moments + np.eye(len(moments)) * (0.01 * np.diag(moments).mean() + 1e-12)
    for r in range(len(rows)):
        inverse, left = np.linalg.inv(damped), rows[r].copy()
        for j in order:
            found[r, j] = np.clip(np.rint(left[j] / scale[r]), -limit, limit)
            left -= (left[j] - found[r, j] * scale[r]) / inverse[j, j] * inverse[:, j]
            inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            inverse[j, j] = 1.0  # its column is out of play
    return found


def correlated_inputs(width, seed=0, count=400):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=g, dtype=torch.float64)
    x = x @ torch.randn(width, width, generator=g, dtype=torch.float64) + x * 3
    return x.T @ x / count


@pytest.mark.parametrize("name", ["int4", "int5", "int4s0.5", "int8"])
def test_compensated_rounding_is_the_definition(name):
    grid, g = tj.Grid.parse(name), torch.Generator().manual_seed(1)
    w, moments = torch.randn(6, 150, generator=g) * 0.05, correlated_inputs(150)  # more than one block of 128 columns
    arrays, _ = tj.round_compensated(w, grid, moments)
    plain = tj.encode(w, grid)
    assert torch.equal(arrays["s"], plain["s"])
    expected = one_weight_at_a_time(w, plain["s"].double().numpy(), moments.numpy(), grid.qmax)
    steps = plain["s"].double().numpy()[:, None]
    damage = lambda q: (((error := w.double().numpy() - q * steps) @ moments.numpy()) * error).sum(1)
    kept = damage(expected) < damage(plain["q"].double().numpy())
    assert kept.any() and (arrays["q"].numpy() == np.where(kept[:, None], expected, plain["q"].numpy())).mean() > 0.999


@pytest.mark.parametrize("name", ["int4", "int6", "int4s0.35", "int8", "int8a"])
@pytest.mark.parametrize("seed", range(5))
def test_compensated_rounding_never_raises_the_output_error(name, seed):
    grid, g = tj.Grid.parse(name), torch.Generator().manual_seed(seed)
    w = torch.randn(30, 40, generator=g) * torch.rand(30, 1, generator=g)
    moments = (correlated_inputs(40, seed), torch.eye(40, dtype=torch.float64),
               torch.diag(torch.arange(40.0, dtype=torch.float64)))[seed % 3]  # the last has an input that is never on
    arrays, gain = tj.round_compensated(w, grid, moments)
    errors = [((e := w.double() - tj.decode(a, grid, w.shape).double()) @ moments * e).sum(1)
              for a in (arrays, tj.encode(w, grid))]
    assert (errors[0] <= errors[1] * (1 + 1e-12)).all()
    assert gain == pytest.approx(float(errors[0].sum() / errors[1].sum()))
    assert arrays["q"].abs().max() <= grid.qmax
    if seed % 3 == 0:
        assert gain < 0.8


def test_moments_of_inputs_are_those_of_the_layers():
    config, model, _ = built()
    tokens = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(0))
    moments = tj.input_moments(model, tokens.split(2), lambda x: model(x, torch.float32)[0])
    assert moments.keys() == {name for name, layer in model.named_modules() if isinstance(layer, tj.Linear)}
    x = tj.rms_norm(model.blocks[0].mix[0] * model.embed(tokens, torch.float32), 1e-6).flatten(0, 1).double()
    assert torch.allclose(moments["blocks.0.mixer.in_proj"], x.T @ x / len(x), rtol=1e-5, atol=1e-6)
