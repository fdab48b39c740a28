"""Loss terms against naive float64 versions written here from their formulas."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_jepa as tj
from train_jepa import covariance_term, jepa_loss, sigreg, sigreg_null, token_loss_fused


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def directions(count, width, seed=9):
    return F.normalize(normal(count, width, seed=seed), dim=-1)


# -- SIGReg ------------------------------------------------------------------------------------------------------------

def naive_sigreg(z, directions, knots, axis):
    """One direction, one knot, one position at a time, in float64 numpy."""
    z, directions = z.double().numpy(), directions.double().numpy()
    ts = np.linspace(0.2, 4.0, knots)
    step = ts[1] - ts[0]
    groups = {"batch": [z[:, s] for s in range(z.shape[1])], "time": list(z), "both": [z.reshape(-1, z.shape[2])]}[axis]
    total, count = 0.0, 0
    for samples in groups:
        for direction in directions:
            projected = samples @ direction
            for i, t in enumerate(ts):
                phi = math.exp(-t * t / 2)
                weight = (step if i in (0, knots - 1) else 2 * step) * phi
                total += weight * ((np.cos(t * projected).mean() - phi) ** 2 + np.sin(t * projected).mean() ** 2)
            count += 1
    return total / count


@pytest.mark.parametrize("axis", ["batch", "time", "both"])
@pytest.mark.parametrize("knots", [2, 5, 17])
def test_sigreg_is_its_formula(axis, knots):
    z, rays = normal(5, 4, 6) * 1.5 + 0.3, directions(7, 6)
    # fp32 cosines of arguments up to some tens: 1e-6 each
    assert sigreg(z, rays, knots, axis).item() == pytest.approx(naive_sigreg(z, rays, knots, axis), rel=2e-5)


@pytest.mark.parametrize("samples, level", [(64, 0.0164), (8, 0.131)])
def test_sigregs_null_level_is_the_specified_one(samples, level):
    assert sigreg_null(samples) == pytest.approx(level, rel=0.005)  # the published figures have three digits
    # Monte Carlo: 32 directions of independent coordinates at 200 positions; scatter of one term about its mean / 80
    found = sigreg(normal(samples, 200, 32), torch.eye(32), 17).item()
    assert found == pytest.approx(level, rel=0.05)


def test_sigregs_knots_are_no_host_constant_of_the_graph():
    seen = []
    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph.forward
    z, rays = normal(4, 3, 5), directions(6, 5)
    found = torch.compile(lambda z: sigreg(z, rays), fullgraph=True, backend=backend)(z)
    assert found == sigreg(z, rays) and "new_tensor" not in seen and torch.tensor not in seen


def test_sigreg_of_a_collapsed_latent_is_far_above_its_null_level():
    assert sigreg(torch.zeros(64, 10, 8), directions(16, 8)) > 20 * sigreg_null(64)


def test_sigreg_works_in_fp32_on_bf16_latents_and_gives_them_gradients():
    z = normal(8, 3, 6).bfloat16().requires_grad_()
    loss = sigreg(z, directions(5, 6))
    loss.backward()
    expected = naive_sigreg(z.detach(), directions(5, 6), 17, "batch")
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=2e-5)
    assert z.grad.abs().max() > 0


def test_sigregs_gradient_is_that_of_its_formula():
    z = normal(4, 3, 5, dtype=torch.float64)
    rays = directions(6, 5)
    found = torch.autograd.grad(sigreg(leaf := z.float().requires_grad_(), rays), leaf)[0]
    for index in ((0, 0, 0), (3, 2, 4), (1, 1, 2)):
        step = torch.zeros_like(z)
        step[index] = 1e-5
        slope = (naive_sigreg(z + step, rays, 17, "batch") - naive_sigreg(z - step, rays, 17, "batch")) / 2e-5
        assert found[index].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


# -- covariance term ---------------------------------------------------------------------------------------------------

def naive_covariance_term(z):
    flat = z.double().numpy().reshape(-1, z.size(-1))
    cov = np.cov(flat, rowvar=False)
    off_diagonal = (cov**2).sum(where=~np.eye(len(cov), dtype=bool))
    return np.maximum(0, 1 - np.sqrt(np.diag(cov))).mean() + 0.04 * off_diagonal / len(cov)


def test_covariance_term_is_its_formula():
    z = normal(3, 5, 4) @ normal(4, 4, seed=2) * 0.6 + 5
    assert covariance_term(z).item() == pytest.approx(naive_covariance_term(z), rel=2e-5)


def test_covariance_terms_gradient_is_that_of_its_formula():
    """The term takes a short way back: no gradient of the mean, one product instead of two."""
    z = normal(2, 40, 6) * 0.3 + 5
    wide = z.double().requires_grad_()
    covariance = torch.cov(wide.flatten(0, 1).T)
    off = covariance.square().sum() - covariance.diagonal().square().sum()
    naive = F.relu(1 - (covariance.diagonal() + 1e-8).sqrt()).mean() + 0.04 * off / 6
    found = torch.autograd.grad(covariance_term(z.requires_grad_()), z)[0]
    expected = torch.autograd.grad(naive, wide)[0]
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()  # fp32, centred on a mean of 5


def test_covariance_term_closed_forms():
    collapsed = torch.full((4, 6, 8), 3.0)
    assert covariance_term(collapsed).item() == pytest.approx(1, abs=2e-4)             # sqrt(1e-8) = 1e-4
    corners = torch.tensor([[a, b] for a in (-2.0, 2.0) for b in (-2.0, 2.0)]).view(2, 2, 2)
    assert covariance_term(corners).item() == 0                                        # spread out and uncorrelated
    copied = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).view(1, 2, 2)                    # variance 2, covariance 2
    assert covariance_term(copied).item() == pytest.approx(0.04 * 2 * 4 / 2, rel=1e-6)
    small = corners / 2 * 3**0.5 / 2 * 0.5                                             # variance 1/4 per dimension
    assert covariance_term(small).item() == pytest.approx(0.5, rel=1e-5)


def test_covariance_term_of_a_collapsed_latent_has_a_finite_gradient():
    z = torch.ones(2, 3, 4, requires_grad=True)
    covariance_term(z).backward()
    assert z.grad.isfinite().all()


# -- rollout -----------------------------------------------------------------------------------------------------------

def head(**knobs) -> tj.JepaHead:
    torch.manual_seed(3)
    config = tj.Config.from_env(dict(MODEL_DIM="64", **{name: str(value) for name, value in knobs.items()}))
    found = tj.JepaHead(config)
    with torch.no_grad():  # off its zero initialization
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return found.double()


def naive_rollout(jepa, z, steps):
    """Every prediction from its own chain: position t, k steps on."""
    total = []
    for k in range(1, steps + 1):
        errors = []
        for t in range(z.size(1) - k):
            guess = z[:, t:t + 1]
            for _ in range(k):
                hidden = F.gelu(F.linear(guess, jepa.fc.weight, jepa.fc.bias))
                guess = F.linear(F.linear(hidden, jepa.out.weight, jepa.out.bias), jepa.pred_proj.weight)
            errors.append((guess - z[:, t + k:t + k + 1]).square().mean())
        total.append(torch.stack(errors).mean())
    return torch.stack(total).mean()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_rollout_is_the_mean_over_horizons_of_chained_predictions(steps):
    jepa, z = head(), normal(2, 9, 64, dtype=torch.float64)
    found = jepa_loss(jepa, z, steps, False)
    # the distance is taken in fp32
    assert found.item() == pytest.approx(naive_rollout(jepa, z, steps).item(), rel=1e-6)


def test_extended_latents_give_the_same_loss_and_gradients():
    """The form of CUDA: a 1 and seven zeros behind each latent, biases as columns of weights."""
    jepa, h = head(), normal(2, 9, 64, dtype=torch.float64)
    latent = jepa.latent
    z = jepa.project(h, extend=True)
    tail = torch.zeros(2, 9, 8, dtype=torch.float64)
    tail[..., 0] = 1
    assert torch.equal(z[..., latent:], tail) and torch.allclose(z[..., :latent], jepa.project(h), rtol=1e-12)
    guess = jepa.predict(z)
    assert torch.equal(guess[..., latent:], tail)
    assert torch.allclose(guess[..., :latent], jepa.predict(jepa.project(h)), rtol=1e-10, atol=1e-12)
    found = [torch.autograd.grad(jepa_loss(jepa, jepa.project(h, extend), 3, False), list(jepa.parameters()))
             for extend in (True, False)]
    for one, other in zip(*found):  # the distance is taken in fp32
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_only_linear_projectors_with_biases_are_extended():
    h = normal(2, 5, 64, dtype=torch.float64)
    for knobs in (dict(PROJECTOR_TYPE="mlp"), dict(PROJECTOR_TYPE="none", PREDICTOR_NORM=1)):
        jepa = head(**knobs)
        assert torch.equal(jepa.project(h, extend=True), jepa.project(h))


def test_picked_positions_have_the_gradient_of_indexing_when_one_comes_twice():
    z, weight = normal(3, 7, 4, dtype=torch.float64).requires_grad_(), normal(3, 5, 4, dtype=torch.float64, seed=1)
    positions = torch.tensor([6, 2, 2, 0, 2])
    found, expected = (torch.autograd.grad((part * weight).sum(), z)[0]
                       for part in (tj.Picked.apply(z, positions), z[:, positions]))
    assert torch.equal(tj.Picked.apply(z, positions), z[:, positions])
    assert torch.allclose(found, expected, rtol=1e-12) and found[:, 1].abs().max() == 0


def test_system_bs_predictor_is_norm_linear_gelu_linear_without_biases():
    jepa = head(PROJECTOR_TYPE="none", PREDICTOR_NORM=1, PREDICTOR_HIDDEN_MULT=1)
    h = normal(2, 5, 64, dtype=torch.float64) * 3
    assert sorted(dict(jepa.named_parameters())) == ["fc.weight", "out.weight"]
    assert jepa.project(h) is h
    guess = F.gelu(h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() @ jepa.fc.weight.T) @ jepa.out.weight.T
    assert torch.allclose(jepa.predict(h), guess, rtol=1e-12)
    expected = (guess[:, :-1] - h[:, 1:]).square().mean()
    assert jepa_loss(jepa, h, 1, True).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("detach", [False, True])
def test_detach_targets_stops_gradients_into_targets_only(detach):
    jepa, z = head(), normal(1, 2, 64, dtype=torch.float64).requires_grad_()
    jepa_loss(jepa, z, 1, detach).backward()
    source, target = z.grad[:, 0], z.grad[:, 1]  # two positions, one horizon: the first predicts, the second is met
    assert source.abs().max() > 0 and bool(target.abs().max() > 0) != detach


PREDICTOR = {"fc.weight": (256, 64), "fc.bias": (256,), "out.weight": (64, 256), "out.bias": (64,)}
TWO_LAYERS = {"fc.weight": (128, 64), "fc.bias": (128,), "out.weight": (64, 128), "out.bias": (64,), "gain": (128,),
              "shift": (128,)}


@pytest.mark.parametrize("projector, layers", [("linear", {"weight": (64, 64)}), ("mlp", TWO_LAYERS)])
def test_the_jepa_head_has_the_specified_layers(projector, layers):
    torch.manual_seed(0)
    found = tj.JepaHead(tj.Config.from_env(dict(MODEL_DIM="64", PROJECTOR_TYPE=projector, PREDICTOR_HIDDEN_MULT="4")))
    expected = PREDICTOR | {f"{part}.{name}": shape for part in ("projector", "pred_proj")
                            for name, shape in layers.items()}
    assert {name: tuple(p.shape) for name, p in found.named_parameters()} == expected
    assert found.out.weight.abs().max() == 0 and found.fc.weight.abs().max() > 0


def test_the_mlp_projector_is_linear_layernorm_gelu_linear():
    mlp, x = head(PROJECTOR_TYPE="mlp").projector, normal(2, 3, 64, dtype=torch.float64)
    hidden = x @ mlp.fc.weight.T + mlp.fc.bias
    hidden = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = F.gelu(hidden * mlp.gain + mlp.shift) @ mlp.out.weight.T + mlp.out.bias
    assert torch.allclose(mlp(x), expected, rtol=1e-10)  # float64


# -- token loss --------------------------------------------------------------------------------------------------------

def capped(logits, cap, kind):
    if not cap:
        return logits
    u = (logits / cap).clamp(-2, 2)
    return cap * torch.tanh(logits / cap) if kind == "tanh" else cap * (u * (1 - u**2 / 3 + u**4 / 15)).clamp(-1, 1)


@pytest.mark.parametrize("cap, kind", [(0.0, "poly"), (15.0, "poly"), (2.0, "poly"), (30.0, "tanh"), (2.0, "tanh")])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
def test_token_loss_and_its_gradients_are_cross_entropy_plus_z_loss(cap, kind, bias):
    leaves = [normal(11, 6) * 2, normal(37, 6, seed=1), normal(37, seed=2)][:3 if bias else 2]
    leaves = [t.requires_grad_() for t in leaves]
    targets, z_loss = torch.arange(11) * 3 % 37, 0.01
    wide = [t.detach().double().requires_grad_() for t in leaves]
    logits = capped(wide[0] @ wide[1].T + (wide[2] if bias else 0), cap, kind)
    nll = F.cross_entropy(logits, targets)
    expected = nll + z_loss * logits.logsumexp(-1).square().mean()
    b = leaves[2] if bias else None
    found, seen = token_loss_fused(leaves[0], leaves[1], b, targets, softcap=cap, softcap_type=kind, z_loss=z_loss,
                                   rows=4)
    assert found.dtype == torch.float32 and not seen.requires_grad
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert seen.item() == pytest.approx(nll.item(), rel=1e-6)
    for a, e in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, wide)):
        assert (a - e).abs().max() <= 3e-6 * e.abs().max()  # fp32 softmax of some tens of logits


def test_z_loss_defaults_to_its_published_weight():
    assert tj.Config().z_loss == 1e-4


def test_softcap_closed_forms():
    x = torch.tensor([0.0, 1e-3, 15.0, 30.0, 1e4, -30.0, -1e9])
    poly = tj.soft_cap(x, 15.0, "poly")
    assert poly[0] == 0 and poly[1].item() == pytest.approx(1e-3, rel=1e-6)
    assert poly[2].item() == pytest.approx(15 * (1 - 1 / 3 + 1 / 15), rel=1e-6)  # u = 1
    assert poly[3:].tolist() == [15, 15, -15, -15]                              # u = 2 is beyond 1 and clamped
    assert tj.soft_cap(x, 30.0, "tanh")[2].item() == pytest.approx(30 * math.tanh(0.5), rel=1e-6)
    assert torch.equal(tj.soft_cap(x, 0.0, "poly"), x)
    line = torch.arange(-5000, 5001) * 0.012
    for kind in ("poly", "tanh"):
        found = tj.soft_cap(line, 15.0, kind)
        assert (found.diff() >= 0).all() and found.abs().max() <= 15 and torch.allclose(found, -found.flip(0))


# -- all terms together ------------------------------------------------------------------------------------------------

SMALL = dict(MODEL_DIM="64", NUM_LAYERS="2", EXPAND="1", D_STATE="16", MLP_MULT="1", VOCAB_SIZE="256", SSD_CHUNK="16",
             TRAIN_SEQ_LEN="16", TRAIN_BATCH_TOKENS="32", MICRO_BATCHES="1", JEPA_COV="0.5", JEPA_STEPS="2")


@pytest.mark.parametrize("anticollapse", ["sigreg", "covariance"])
def test_loss_terms_are_the_single_functions_and_only_those_asked_for(anticollapse):
    c = tj.Config.from_env(SMALL | {"ANTICOLLAPSE": anticollapse})
    model, jepa = tj.build_models(c)
    h, targets = normal(2, 16, 64), torch.arange(32).view(2, 16)
    positions, rays = torch.tensor([1, 5, 5]), directions(4, 64)
    every = tj.loss_terms(c, model, jepa, h, targets, positions, rays, tj.Active(True, True, True, True))
    z = jepa.project(h)
    anti = covariance_term(z) if anticollapse == "covariance" else sigreg(z[:, positions], rays)
    nll = F.cross_entropy(model.logits(h).flatten(0, 1), targets.flatten())
    z_loss = 1e-4 * model.logits(h).logsumexp(-1).square().mean()
    expected = dict(ce=nll + z_loss, nll=nll, jepa=jepa_loss(jepa, z, 2, False), anti=anti, cov=covariance_term(z))
    assert set(every) == set(expected)
    for name, value in expected.items():
        assert every[name].item() == pytest.approx(value.item(), rel=1e-5), name  # fp32 sums of 32 positions
    for i, name in enumerate(tj.TERMS):
        alone = tj.loss_terms(c, model, jepa, h, targets, positions, rays, tj.Active(*(i == k for k in range(4))))
        assert set(alone) == {name} | ({"nll"} if name == "ce" else set())


def test_every_step_weighs_the_covariance_term_logs_it_and_reports_its_gradient(tmp_path):
    """JEPA_COV is a term like the others: in the total, in metrics.jsonl, in the log line, in the gradient shares."""
    import json

    import harness
    cov = dict(JEPA_COV=0.5, DIAGNOSTICS=1, PROBE_STEPS=0, ITERATIONS=2, TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=2)
    child = harness.run(tmp_path, **cov)
    assert child.code == 0, child.text()
    lines = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert all(line["cov"] > 0 for line in trained) and " cov:" in child.text()
    assert "cov_grad_ratio" in lines[-1] and "cov_grad_cosine" in lines[-1]
