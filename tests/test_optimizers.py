"""Optimizers, weight groups, quantization-aware weights, averaging and the ghost warm-up."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train_jepa as tj
from train_jepa import Config, orthogonalize

SMALL = dict(MODEL_DIM="64", NUM_LAYERS="3", EXPAND="2", EMBED_DIM="32", D_STATE="8", MLP_MULT="2", VOCAB_SIZE="256",
             TIE_EMBEDDINGS="1", NUM_HEADS="4", NUM_KV_HEADS="2", TRAIN_SEQ_LEN="16", TRAIN_BATCH_TOKENS="128",
             MICRO_BATCHES="4", JEPA_STEPS="2", COMPILE_MODE="off", DEVICE="cpu", DTYPE="fp32", SSD_CHUNK="16",
             QUANT_BITS="4", FP_STORAGE="FP8")
EXACT = lambda monkeypatch: monkeypatch.setattr(tj, "matmul_dtype", lambda device_type: torch.float32)


def configure(**knobs) -> Config:
    return Config.from_env(SMALL | {name: str(value) for name, value in knobs.items()}).validate()


def trainer(**knobs) -> tj.Trainer:
    config = configure(**knobs)
    return tj.Trainer(config, tj.Runtime(config), Tokens())


class Tokens:
    """A stream of pseudo-random bytes."""
    data = np.random.default_rng(0).integers(0, 256, 5000)

    def __len__(self):
        return len(self.data)

    def read(self, position, count):
        return self.data[(position + np.arange(count)) % len(self.data)]


def fill_gradients(t: tj.Trainer, seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    """Random gradients in every group, as if autograd had left them; returns them by name."""
    g, found = torch.Generator().manual_seed(seed), {}
    t.weights.zero_grad()
    for group in t.weights.groups:
        group.grad.copy_(torch.randn(group.grad.shape, generator=g) * size)
        group.touched = True
        found |= {name: grad.clone() for name, grad in zip(group.names, group.grad)}
    return found


def matrix_groups(t: tj.Trainer) -> list[tj.Group]:
    return [group for group in t.weights.groups if group.owner == "matrix"]


def grids_of(t: tj.Trainer) -> dict[str, str]:
    return {name: group.grid for group in t.weights.groups for name in group.names if group.grid}


def bits(t: torch.Tensor) -> bytes:
    return t.detach().contiguous().numpy().tobytes()


def snapshot(t: tj.Trainer) -> dict[str, bytes]:
    """Every bit of weights, moments, counters and averages."""
    found = {f"master/{name}": bits(w) for name, w in t.weights.tensors().items()}
    found |= {f"average/{name}": bits(w) for name, w in t.weights.tensors("average").items()}
    return found | {name: bits(w) for name, w in t.optimizer.state().items() if not name.startswith("skipped")}


# -- orthogonalization -------------------------------------------------------------------------------------------------

def quintic(s, steps):
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5), (5, 1)], ids=str)
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_quintic_maps_every_singular_value_by_its_polynomial(shape, steps, monkeypatch):
    EXACT(monkeypatch)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    expected = u @ torch.diag(quintic(s / s.norm(), steps)) @ v
    # fp32: errors of one step (6e-8) grow by up to 3.44 in each following one
    assert (orthogonalize(x[None], steps)[0] - expected).abs().max() < 3e-7 * 3.5**steps


def test_bf16_leaves_singular_values_near_one(monkeypatch):
    monkeypatch.setattr(tj, "matmul_dtype", lambda device_type: torch.bfloat16)
    x = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(0))  # condition about 10
    found = orthogonalize(x, 5)
    s = torch.linalg.svdvals(found.float())
    assert found.dtype == torch.bfloat16 and 0.6 < s.min() and s.max() < 1.25


@pytest.mark.parametrize("shape", [(5, 8, 12), (3, 12, 8), (1, 7, 7)], ids=str)
def test_a_batch_is_its_matrices_one_by_one_and_tall_is_wide_transposed(shape, monkeypatch):
    EXACT(monkeypatch)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, shape[0])[:, None, None]
    together = orthogonalize(x, 3)
    for index in range(shape[0]):
        alone = orthogonalize(x[index:index + 1], 3)[0]
        assert torch.allclose(together[index], alone, atol=2e-5)  # fp32, see above
    assert torch.allclose(orthogonalize(x.mT.contiguous(), 3).mT, together, atol=2e-5)


def test_a_zero_matrix_stays_zero_and_scale_does_not_matter(monkeypatch):
    EXACT(monkeypatch)
    assert orthogonalize(torch.zeros(1, 4, 6), 5).abs().max() == 0
    x = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(orthogonalize(x * 1000, 3), orthogonalize(x, 3), atol=2e-5)


# -- Muon and AdamW ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("row_norm", [0, 1])
def test_muon_is_a_naive_per_matrix_implementation(row_norm, monkeypatch):
    EXACT(monkeypatch)
    t = trainer(ROW_NORM=row_norm, MUON_WD=0.3, MATRIX_LR=0.05, GRAD_CLIP_NORM=0)
    names = {name for group in t.weights.groups if group.owner == "matrix" for name in group.names}
    weights = {name: w.double() for name, w in t.weights.tensors().items() if name in names}
    buffers = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step, (scale, momentum) in enumerate(((1.0, 0.85), (1.0, 0.9), (0.5, 0.95))):
        grads = fill_gradients(t, step)
        for group in matrix_groups(t):  # a row so small that the normalization's epsilon counts
            group.grad[:, -1] *= 1e-4
            for name in group.names:
                grads[name][-1] *= 1e-4
        t.optimizer.step(scale, momentum)
        for name, w in weights.items():
            g = grads[name].double()
            buffers[name] = momentum * buffers[name] + g
            update = g + momentum * buffers[name]
            if row_norm:
                update = update / (update.square().mean(1, keepdim=True) + 2.0**-23).sqrt()
            u, s, v = torch.linalg.svd(update, full_matrices=False)
            update = u @ torch.diag(quintic(s / s.norm(), 3)) @ v
            weights[name] = w * (1 - 0.05 * scale * 0.3) - 0.05 * scale * max(1, w.size(0) / w.size(1))**0.5 * update
    found = t.weights.tensors()
    assert {tuple(w.shape) for w in weights.values()} >= {(64, 32), (32, 64), (128, 64), (64, 128)}  # wide and tall
    for name, w in weights.items():
        # three updates of entries up to 0.2, each from an fp32 iteration (see above)
        assert (found[name] - w).abs().max() < 2e-5, name


def test_adamw_groups_are_torchs_unfused_adamw_per_parameter():
    t = trainer(GRAD_CLIP_NORM=0, SCALAR_LR=0.02, EMBED_LR=0.03, ADAM_WD=0.1, BETA1=0.8, BETA2=0.9, ADAM_EPS=1e-6)
    copies, settings = {}, []
    for group in t.weights.groups:
        for name, w in zip(group.names, group.master):
            if group.owner != "matrix":
                copies[name] = torch.nn.Parameter(w.clone())
                rate = 0.03 if name == "token_embed" else 0.02
                decay = 0.0 if name.endswith(("dt_bias", "A_log", ".D")) else 0.1
                settings.append(dict(params=[copies[name]], base=rate, weight_decay=decay))
    reference = torch.optim.AdamW(settings, lr=1.0, betas=(0.8, 0.9), eps=1e-6, fused=False, foreach=False)
    for step, scale in enumerate((1.0, 1.0, 0.5, 0.25, 0.0)):
        grads = fill_gradients(t, step, 10.0**-step)
        t.optimizer.step(scale, 0.95)
        for group in reference.param_groups:
            group["lr"] = group["base"] * scale
        for name, parameter in copies.items():
            parameter.grad = grads[name]
        reference.step()
    found = t.weights.tensors()
    assert len(copies) > 20
    for name, parameter in copies.items():
        assert torch.allclose(found[name], parameter.data, rtol=1e-5, atol=1e-6), name  # another order of operations


EXPECTED_OWNER = [  # first match counts; spec section 7
    (("dt_bias", "A_log", ".D"), "state"), (("token_embed",), "embed"), (("lm_head",), "head"),
    (("lm_head_correction",), "scalar"),
    (("bias", "scale", "mix", "skip_weights", "vocab_bias", "conv1d.weight", "norm.weight", "q_gain", "gain",
      "shift"), "scalar"),
    (("proj.weight", "up.weight", "down.weight", "embed_proj.weight", "embed_proj_rev.weight", "adapter.weight",
      "fc.weight", "out.weight", "projector.weight", "pred_proj.weight"), "matrix")]


@pytest.mark.parametrize("style, projector", [("projected", "linear"), ("tied", "mlp")])
@pytest.mark.parametrize("tie", [0, 1, 2, 3])
def test_every_parameter_has_its_specified_owner_rate_and_decay(style, tie, projector):
    t = trainer(TIE_EMBEDDINGS=tie, EMBED_STYLE=style, PROJECTOR_TYPE=projector, MIXER="mam", EMBED_LR=0.01,
                SCALAR_LR=0.02, TIED_EMBED_LR=0.03, HEAD_LR=0.04, ADAM_WD=0.05)
    rates = dict(scalar=(0.02, 0.05), state=(0.02, 0.0), head=(0.04, 0.05),
                 embed=(0.03 if style == "tied" and tie else 0.01, 0.05))
    expected = sorted([*dict(t.model.named_parameters()), *(f"jepa.{name}" for name, _ in t.jepa.named_parameters())])
    assert sorted(name for group in t.weights.groups for name in group.names) == expected
    settings = {id(group): options for group, options in zip(t.optimizer.adam_groups, t.optimizer.adam.param_groups)}
    assert len(settings) + len(matrix_groups(t)) == len(t.weights.groups)
    wrong = []
    for group in t.weights.groups:
        for name in group.names:
            owner = next(owner for endings, owner in EXPECTED_OWNER if name.endswith(endings))
            if owner == "head" and style == "projected":
                owner = "matrix"
            if owner == "matrix":
                right = group.owner == "matrix" and id(group) not in settings and group.master.ndim == 3
            else:
                options = settings.get(id(group))
                right = options is not None and (options["base_lr"], options["weight_decay"]) == rates[owner]
            if not right:
                wrong.append((name, group.owner, owner))
    assert not wrong


def test_a_parameter_in_two_groups_or_in_none_is_an_error():
    config = configure()
    model, jepa = tj.build_models(config)
    model.blocks[1].mixer.in_proj.weight = model.blocks[0].mixer.in_proj.weight
    with pytest.raises(AssertionError, match="owner"):
        tj.Weights(model, jepa, tj.storage_plan(model, config), config, tj.Runtime(config))
    model, jepa = tj.build_models(config)
    model.stray = torch.nn.Parameter(torch.zeros(3))  # its module names no role for it
    with pytest.raises(KeyError):
        tj.Weights(model, jepa, {}, config, tj.Runtime(config))


@pytest.mark.parametrize("limit, size", [(1.0, 1.0), (1.0, 1e-6), (0.5, 1e-3), (0.0, 1.0)])
def test_clipping_scales_all_gradients_by_the_global_norm(limit, size):
    t = trainer(GRAD_CLIP_NORM=limit)
    grads = fill_gradients(t, 0, size)
    norm = torch.cat([g.double().flatten() for g in grads.values()]).norm().item()
    found, ok = t.optimizer.step(1.0, 0.95)
    assert found.item() == pytest.approx(norm, rel=1e-5) and ok.item() == 1
    factor = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
    for group in t.weights.groups:
        for name, g in zip(group.names, group.grad):
            assert torch.allclose(g, grads[name] * factor, rtol=1e-5), name


def test_clipping_can_be_left_out_as_the_warm_up_does():
    t = trainer(GRAD_CLIP_NORM=0.01)
    grads = fill_gradients(t, 0)
    t.optimizer.step(1.0, 0.95, clip=False)
    assert all(torch.equal(g, grads[name]) for group in t.weights.groups for name, g in zip(group.names, group.grad))


@pytest.mark.parametrize("where, value", [("token_embed", math.inf), ("blocks.0.mixer.in_proj.weight", math.nan),
                                          ("vocab_bias", -math.inf), ("jepa.fc.weight", math.nan)])
@pytest.mark.parametrize("first", [True, False], ids=["first-step", "later"])
def test_a_non_finite_gradient_changes_no_bit_of_weights_moments_or_counters(where, value, first):
    t = trainer(SWA_START=0.5)
    for step in range(0 if first else 2):
        fill_gradients(t, step)
        _, ok = t.optimizer.step(1.0, 0.95)
        t.weights.average(0.9, ok)
    before = snapshot(t)
    fill_gradients(t, 9)
    for group in t.weights.groups:
        if where in group.names:
            group.grad[group.names.index(where)].view(-1)[1] = value
    _, ok = t.optimizer.step(1.0, 0.95)
    assert ok.item() == 0 and (t.optimizer.skipped.item(), t.optimizer.skipped_in_row.item()) == (1, 1)
    if not first:
        t.weights.average(0.9, ok)
    after = snapshot(t)
    assert {name for name in before if before[name] != after[name]} == set()
    for name in set(after) - set(before):  # moments that the first step made
        assert not any(after[name]), name
    fill_gradients(t, 10)
    _, ok = t.optimizer.step(1.0, 0.95)
    assert ok.item() == 1 and (t.optimizer.skipped.item(), t.optimizer.skipped_in_row.item()) == (1, 0)
    assert all(torch.isfinite(w).all() for w in t.weights.tensors().values())
    assert snapshot(t)["master/token_embed"] != before["master/token_embed"]


def test_a_run_with_a_skipped_step_ends_as_the_run_without_it():
    with_skip, without = trainer(), trainer()
    for seed in (0, 1, 2):
        if seed == 1:
            fill_gradients(with_skip, 7)
            with_skip.weights.groups[0].grad.fill_(math.nan)
            with_skip.optimizer.step(1.0, 0.9)
        for t in (with_skip, without):
            fill_gradients(t, seed)
            t.optimizer.step(1.0, 0.9)
    assert snapshot(with_skip) == snapshot(without)


def test_optimizer_state_put_into_a_fresh_optimizer_continues_bit_for_bit():
    one, two = trainer(), trainer()
    for seed in (0, 1):
        fill_gradients(one, seed)
        one.optimizer.step(1.0, 0.9)
    for name, w in two.weights.tensors().items():
        w.copy_(one.weights.tensors()[name])
    tj.restore_views(two.optimizer.state(), {name: w.clone() for name, w in one.optimizer.state().items()})
    for t in (one, two):
        fill_gradients(t, 5)
        t.optimizer.step(0.7, 0.95)
    assert snapshot(one) == snapshot(two)


def test_tensors_of_a_file_are_put_back_by_name_shape_and_type_or_refused():
    one, two = trainer(), trainer(SEED=1)
    tensors = {name: w + 1 for name, w in one.weights.tensors().items()}
    tj.restore_views(two.weights.tensors(), tensors)
    two.weights.average(0.5, torch.ones(()))  # makes room
    tj.restore_views(two.weights.tensors("average"), {name: w * 2 for name, w in tensors.items()})
    for name, w in tensors.items():
        assert torch.equal(two.weights.tensors()[name], w) and torch.equal(two.weights.tensors("average")[name], 2 * w)
    for wrong in (torch.zeros(3), tensors["token_embed"].half()):
        with pytest.raises(ValueError, match="token_embed is torch.float"):
            tj.restore_views(two.weights.tensors(), tensors | {"token_embed": wrong})
    with pytest.raises(KeyError, match="skipped"):
        tj.restore_views(two.optimizer.state(), {})


class SignDescent:
    """A matrix optimizer of another kind: the sign of a mean, which is one row wide."""
    def __init__(self, config, runtime):
        self.config = config

    def init(self, group):
        group.state["mean"] = torch.zeros_like(group.master[:, :1])

    def update(self, groups, scale, momentum, ok):
        for group in groups:
            mean = group.state["mean"]
            mean.lerp_(torch.where(ok > 0, group.grad, 0.0).mean(1, keepdim=True), 1 - momentum)
            group.master.sub_(mean.sign() * (self.config.matrix_lr * scale * ok))


def test_another_matrix_optimizer_needs_no_other_change(monkeypatch):
    monkeypatch.setattr(tj, "Muon", SignDescent)
    one, two = trainer(), trainer()
    before = one.weights.tensors()["blocks.0.mixer.in_proj.weight"].clone()
    one.train_step(tj.Progress(0, 0.0, 10))
    step = (one.weights.tensors()["blocks.0.mixer.in_proj.weight"] - before).abs()
    assert torch.allclose(step, torch.tensor(0.02), atol=1e-6)
    state = {name: w.clone() for name, w in one.optimizer.state().items()}
    assert state["mean/blocks.0.mixer.in_proj.weight"].shape == (1, 64)
    tj.restore_views(two.optimizer.state(), state)
    assert all(torch.equal(w, state[name]) for name, w in two.optimizer.state().items())
    one.optimizer.reset_after_warmup(everything=True)
    assert not any(w.any() for w in one.optimizer.state().values())


class Launches(TorchDispatchMode):
    """Counts operations that compute or copy; on CUDA each is a launch or a few. What `hidden` wraps counts as one."""
    views = {"view", "_unsafe_view", "select", "slice", "split", "t", "transpose", "permute", "expand", "unsqueeze",
             "squeeze", "detach", "alias", "as_strided", "unbind", "_reshape_alias", "lift_fresh", "unfold",
             "split_with_sizes", "empty", "empty_like", "new_empty", "is_same_size", "_record_function_enter_new",
             "_record_function_exit"}

    def __init__(self):
        super().__init__()
        self.count, self.inside = 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not self.inside and function.__name__.split(".")[0] not in self.views
        return function(*args, **(kwargs or {}))

    def hidden(self, function):
        def run(*args):
            self.count += 1
            self.inside = True
            try:
                return function(*args)
            finally:
                self.inside = False
        return run


def test_a_step_launches_at_most_eighty_operations_outside_its_compiled_graphs():
    t, launches = trainer(DTYPE="bf16", NUM_LAYERS=10, MICRO_BATCHES=1, QAT_FRACTION=1, SWA_START=1), Launches()
    step = tj.Progress(0, 0.5, 10)
    t.train_step(step)
    matrix, calls = t.optimizer.matrix, []
    t.losses = launches.hidden(lambda *args: calls.append("losses") or t._losses(*args))
    backward, t.weights.fused_snap = torch.Tensor.backward, [lambda: None] * 2
    matrix.directions, matrix.descend = map(launches.hidden, (matrix._directions, matrix._descend))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", launches.hidden(backward))
        with launches:
            t.train_step(step)
    assert calls == ["losses"] and 20 < launches.count + len(t.weights.fused_snap) <= 80


def test_muons_compiled_halves_equal_the_eager_ones_and_new_rates_compile_nothing(monkeypatch):
    EXACT(monkeypatch)
    graphs, runtime = [], SimpleNamespace(rank=0, world=1, cuda=False, to_device=lambda t: t,
                                          gather=lambda t: (t, None))
    eager, fast = (tj.Muon(configure(ROW_NORM=1), runtime) for _ in range(2))
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward
    fast.directions, fast.descend = (torch.compile(half, backend=backend, fullgraph=True, dynamic=False)
                                     for half in (fast._directions, fast._descend))
    def groups():
        g = torch.Generator().manual_seed(0)
        draw = lambda shape: torch.randn(shape, generator=g)
        return [SimpleNamespace(master=draw(shape), grad=draw(shape), state={"momentum": draw(shape)})
                for shape in ((3, 8, 4), (2, 4, 12), (1, 5, 5))]

    sets = groups(), groups()
    with torch.no_grad():
        for step, ok in enumerate((1.0, 1.0, 0.0, 1.0)):
            for muon, own in zip((eager, fast), sets):
                muon.update(own, 1 - 0.1 * step, 0.85 + 0.02 * step, torch.tensor(ok))
    assert len(graphs) == 2
    for one, other in zip(*sets):
        assert torch.equal(one.master, other.master) and torch.equal(one.state["momentum"], other.state["momentum"])


# -- gradients ---------------------------------------------------------------------------------------------------------

def test_gradients_of_micro_batches_add_up_to_that_of_the_whole_batch():
    t = trainer(JEPA_WEIGHT=0, SIGREG_LAMBDA=0, Z_LOSS=0)
    t.weights.load()
    t.accumulate(0, tj.LossWeights(1.0, 0.0, 0.0, 0.0, "joint"))
    x, y = (torch.cat(part) for part in zip(*(t.batches(0, micro) for micro in range(4))))
    t2 = trainer(JEPA_WEIGHT=0, SIGREG_LAMBDA=0, Z_LOSS=0)
    t2.weights.load()
    loss = F.cross_entropy(t2.model.logits(t2.model(x, torch.float32)[0]).flatten(0, 1), y.flatten())
    parameters = dict(t2.model.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
    for group in t.weights.groups:
        for name, g in zip(group.names, group.grad):
            e = expected[name]
            assert (g - e).abs().max() <= 2e-5 * e.abs().max() + 1e-9, name  # four partial sums in fp32


def test_bf16_gradients_are_summed_over_micro_batches_in_fp32():
    parts = []
    for micros in ([0], [1], [2], [3], range(4)):
        t = trainer(DTYPE="bf16")
        t.micros = micros
        t.weights.load()
        t.accumulate(0, tj.LossWeights(1.0, 1.0, 1.0, 0.0, "joint"))
        parts.append({name: g.clone() for group in t.weights.groups for name, g in zip(group.names, group.grad)})
    for name, whole in parts[4].items():
        assert torch.equal(whole, sum(part[name] for part in parts[:4])) or \
            torch.allclose(whole, sum(part[name] for part in parts[:4]), rtol=1e-6, atol=1e-9), name
    assert t.weights.raw.dtype == torch.bfloat16 and not t.weights.raw.any()


def test_gradients_do_not_outlive_their_step():
    t = trainer(WARMUP_STEPS=0)
    t.train_step(tj.Progress(0, 0.0, 100))
    assert not t.weights.grad.any() and not t.weights.raw.any()
    assert not any(group.touched for group in t.weights.groups)


def test_parameters_that_no_loss_reached_keep_their_weights_and_moments():
    t = trainer(LOSS_SCHEDULE="staged", ADAM_WD=0.1)
    t.train_step(tj.Progress(0, 0.5, 50))
    before = snapshot(t)
    t.train_step(tj.Progress(1, 0.9, 10))  # CE alone
    changed = {name for name, value in snapshot(t).items() if before[name] != value}
    assert changed and not any("/jepa." in name for name in changed)


def test_carried_states_are_those_of_the_rows_so_far_and_hold_no_graph():
    t = trainer(CARRY_STATE=1, JEPA_WEIGHT=0, SIGREG_LAMBDA=0)
    t.weights.load()
    rows = {micro: [] for micro in t.micros}
    for step in range(3):
        for micro in t.micros:
            rows[micro].append(t.step_inputs(step, micro)[0])
        t.accumulate(step, tj.LossWeights(1.0, 0.0, 0.0, 0.0, "joint"))
        t.position += t.batches.values_per_step()
    for micro in t.micros:
        _, expected = t.model(torch.cat(rows[micro], 1), torch.float32)
        for state, whole in zip(t.states[micro], expected):
            for carried, tensor in zip(state, whole, strict=True):
                assert not carried.requires_grad
                assert torch.allclose(carried, tensor, rtol=1e-4, atol=1e-5)  # fp32 through three blocks


# -- grid, averages, warm-up -------------------------------------------------------------------------------------------

def naive_grid(w: torch.Tensor, grid: str) -> torch.Tensor:
    """Storage grids of spec section 8, row by row in numpy."""
    w = w.float()
    if grid == "bf16":
        return w.bfloat16().float()
    if grid == "fp8":
        return w.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    top = 2 ** (int(grid.removeprefix("int")) - 1) - 1
    rows = []
    for row in w:
        scale = torch.tensor(max(float(row.abs().max()), 1e-8)).div(top).bfloat16().float()
        rows.append((torch.tensor(np.clip(np.rint((row / scale).numpy()), -top, top)) * scale).bfloat16().float())
    return torch.stack(rows)


@pytest.mark.parametrize("bits_, storage", [(4, "FP8"), (5, "BF16"), (6, "FP8")])
def test_qat_computes_on_the_storage_grid_and_touches_no_bit_of_the_masters(bits_, storage):
    t = trainer(QUANT_BITS=bits_, FP_STORAGE=storage, TIE_EMBEDDINGS=2)
    before = snapshot(t)
    t.weights.load(qat=True)
    compute, grids = t.weights.tensors("compute"), grids_of(t)
    assert set(grids) == set(dict(t.model.named_parameters()))  # every stored tensor, none that is training-only
    assert set(grids.values()) == {f"int{bits_}", "bf16", *(["fp8"] if storage == "FP8" else [])}
    for name, master in t.weights.tensors().items():
        expected = naive_grid(master, grids[name]) if name in grids else master
        assert torch.equal(compute[name], expected), name
    assert compute["blocks.0.mixer.in_proj.weight"].unique().numel() > 100 and snapshot(t) == before
    parameters = dict(t.model.named_parameters())
    assert all(torch.equal(parameters[name], compute[name]) for name in grids)  # what the model really uses
    t.weights.load(qat=False)
    for name, master in t.weights.tensors().items():
        assert torch.equal(t.weights.tensors("compute")[name], master)


def test_forward_and_backward_of_a_qat_step_run_on_the_grid_and_the_update_lands_on_the_masters():
    t = trainer(WARMUP_STEPS=0, MATRIX_LR=1e-6, SCALAR_LR=1e-6, EMBED_LR=1e-6)
    masters = {name: w.clone() for name, w in t.weights.tensors().items()}
    seen, inner = {}, t.losses
    def spy(*args):
        seen.update({name: p.detach().clone() for name, p in t.model.named_parameters()})
        return inner(*args)
    t.losses = spy
    t.train_step(tj.Progress(0, 0.0, 10))
    name, grids = "blocks.0.mixer.in_proj.weight", grids_of(t)
    assert torch.equal(seen[name], naive_grid(masters[name], grids[name]))
    moved = (t.weights.tensors()[name] - masters[name]).abs().max()
    assert 0 < moved < 1e-5  # far below a grid step of about 0.02: a master that had been snapped would have moved more


def test_qat_follows_its_fraction():
    t = trainer(WARMUP_STEPS=0, QAT_FRACTION=0.5)
    calls, inner = [], t.weights.load
    t.weights.load = lambda which="master", qat=False: (calls.append(qat), inner(which, qat))
    for step, fraction in enumerate((0.0, 0.49, 0.5, 0.99)):
        t.train_step(tj.Progress(step, fraction, 10))
    assert calls == [False, False, True, True]


def test_averaging_starts_from_the_weights_at_its_start_and_follows_its_decay():
    t = trainer(SWA_START=0.5, SWA_DECAY=0.9, WARMUP_STEPS=0)
    expected = None
    initial = {name: w.clone() for name, w in t.weights.tensors().items()}
    for step, fraction in enumerate((0.2, 0.4, 0.6, 0.8, 0.9)):
        t.train_step(tj.Progress(step, fraction, 10))
        now = {name: w.double() for name, w in t.weights.tensors().items()}
        if fraction < 0.5:
            assert all(group.average is None for group in t.weights.groups)
            continue
        expected = now if expected is None else {name: 0.9 * expected[name] + 0.1 * now[name] for name in now}
        for name, w in t.weights.tensors("average").items():
            assert torch.allclose(w.double(), expected[name], rtol=1e-5, atol=1e-7), name
    assert not torch.allclose(t.weights.tensors("average")["vocab_bias"], initial["vocab_bias"])
    t.weights.load("average", qat=True)
    grids = grids_of(t)
    for name, w in t.weights.tensors("average").items():
        assert torch.equal(t.weights.tensors("compute")[name], naive_grid(w, grids[name]) if name in grids else w), name


@pytest.mark.parametrize("rollback", ["weights", "all"])
def test_ghost_warm_up_gives_back_weights_position_and_randomness(rollback):
    t = trainer(WARMUP_STEPS=3, WARMUP_ROLLBACK=rollback)
    masters = {name: bits(w) for name, w in t.weights.tensors().items()}
    torch.manual_seed(123)
    rng = torch.get_rng_state()
    t.warm_up()
    assert masters == {name: bits(w) for name, w in t.weights.tensors().items()}
    assert t.position == 0 and torch.equal(torch.get_rng_state(), rng)
    assert all(group.grad.abs().max() == 0 for group in t.weights.groups)
    state = t.optimizer.state()
    counters = {name: w for name, w in state.items() if name.startswith("step/")}
    assert counters and all(w.item() == 0 for w in counters.values())
    for kind in ("momentum/", "exp_avg/", "exp_avg_sq/"):
        moments = [w.abs().max().item() for name, w in state.items() if name.startswith(kind)]
        assert moments and (max(moments) > 0) == (rollback == "weights"), kind


def test_ghost_warm_up_with_full_rollback_changes_nothing_of_the_run():
    plain, warmed = trainer(WARMUP_STEPS=0), trainer(WARMUP_STEPS=3, WARMUP_ROLLBACK="all")
    warmed.warm_up()
    for t in (plain, warmed):
        for step in range(3):
            t.train_step(tj.Progress(step, step / 10, 10 - step))
    one, two = plain.weights.tensors(), warmed.weights.tensors()
    assert [name for name in one if bits(one[name]) != bits(two[name])] == []
    assert plain.position == warmed.position == 3 * 4 * 33


def test_ghost_warm_up_runs_at_base_rate_without_qat_and_clip():
    t = trainer(WARMUP_STEPS=2, GRAD_CLIP_NORM=1e-3, WARMDOWN_FRACTION=1.0)
    seen, step, load = [], t.optimizer.step, t.weights.load
    t.optimizer.step = lambda *args, clip=True: (seen.append((*args, clip)), step(*args, clip=clip))[1]
    t.weights.load = lambda which="master", qat=False: (seen.append(qat), load(which, qat))
    t.warm_up()
    assert seen[:4] == [False, (1.0, 0.95, False)] * 2


# -- the step's loss ---------------------------------------------------------------------------------------------------

def test_the_training_loss_is_the_weighted_sum_of_its_terms():
    t = trainer(JEPA_STEPS=2, DETACH_TARGETS=1)
    t.weights.load()
    with torch.no_grad():
        for p in (*t.model.parameters(), *t.jepa.parameters()):
            p.add_(torch.randn_like(p) * 0.05)
    x, y, positions = t.step_inputs(0, 1)
    assert positions.shape == (16,) and t.directions.shape == (64, 64)
    assert torch.allclose(t.directions.norm(dim=1), torch.ones(64))
    weights = torch.tensor([2.0, 3.0, 0.5, 0.25])
    total, parts, _ = t.losses(x, y, positions, weights, None, tj.Active(True, True, True, True))
    h = t.model(x, torch.float32)[0]
    out = t.model.logits(h).double().flatten(0, 1)
    ce = F.cross_entropy(out, y.flatten())
    z = t.jepa.project(h)
    jepa = tj.jepa_loss(t.jepa, z, 2, True)
    anti = tj.sigreg(z[:, positions], t.directions)
    expected = 2 * (ce + 1e-4 * out.logsumexp(-1).square().mean()) + 3 * jepa + 0.5 * anti
    cov = tj.covariance_term(z)
    expected = expected + 0.25 * cov
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)  # fp32 sums
    assert parts.tolist() == pytest.approx([ce.item(), jepa.item(), anti.item(), cov.item()], rel=1e-5)


@pytest.mark.parametrize("weights, forbidden", [((1, 0, 0), "project jepa_loss sigreg"), ((1, 1, 0), "sigreg"),
                                                ((0, 1, 1), "token_loss_fused"), ((1, 0, 1), "jepa_loss")])
def test_a_term_of_weight_zero_is_not_computed(weights, forbidden, monkeypatch):
    t = trainer()
    def fail(*args, **kwargs):
        raise AssertionError("computed at weight 0")
    for name in forbidden.split():
        if name == "project":
            monkeypatch.setattr(t.jepa, "project", fail)
        else:
            monkeypatch.setattr(tj, name, fail)
    t.weights.load()
    assert t.accumulate(0, tj.LossWeights(*map(float, weights), 0.0, "joint")).isfinite().all()


def test_the_covariance_term_alone_trains_the_projector():
    t = trainer(JEPA_WEIGHT=0, SIGREG_LAMBDA=0, JEPA_COV=1)
    t.weights.load()
    t.accumulate(0, tj.LossWeights(1.0, 0.0, 0.0, 1.0, "joint"))
    grads = {name: grad for group in t.weights.groups for name, grad in zip(group.names, group.grad)}
    assert grads["jepa.projector.weight"].abs().max() > 0


@pytest.mark.parametrize("knobs", [{}, dict(CARRY_STATE=1)], ids=["stream", "lanes"])
def test_tokens_for_the_temperature_are_unseen_or_none(knobs, monkeypatch):
    """Trained positions are collected from the batches themselves."""
    monkeypatch.setattr(tj, "CALIBRATION", 300)
    t, seen = trainer(**knobs), set()
    def read(position, count):
        seen.update((position + np.arange(count - 1)) % len(t.stream))
        return Tokens.read(t.stream, position, count)
    monkeypatch.setattr(t.stream, "read", read, raising=False)
    verdicts = []
    for step in range(60):
        for micro in t.micros:
            t.step_inputs(step, micro)
        t.position += t.batches.values_per_step()
        at = tj.Run.unseen_position(SimpleNamespace(trainer=t))
        verdicts.append(at is not None)
        if at is not None:
            assert not seen & set(range(at, at + 300)), step
    assert verdicts[0] and not verdicts[-1]


def test_sigreg_positions_and_directions_follow_seed_step_and_micro_batch_alone():
    one, two = trainer(), trainer()
    torch.rand(7)  # the global generator plays no part
    assert torch.equal(one.directions, two.directions) and not torch.equal(one.directions, trainer(SEED=1).directions)
    draw = lambda t, step, micro: t.step_inputs(step, micro)[2].tolist()
    assert draw(one, 3, 1) == draw(two, 3, 1)
    assert len({tuple(draw(one, step, micro)) for step in range(4) for micro in range(4)}) == 16
