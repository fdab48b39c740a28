"""Trainer and Run: what a step keeps, what a run writes down when it ends early."""
import json

import harness
import pytest
import torch
from harness import TINY

import train_jepa as tj

CARRY = dict(CARRY_STATE=1, EVAL_STATE="carry")


def trainer_of(**knobs) -> tj.Trainer:
    config = tj.Config.from_env({name: str(value) for name, value in (TINY | knobs).items()}).validate()
    runtime = tj.Runtime(config)
    return tj.Trainer(config, runtime, tj.SyntheticStream(config.vocab_size))


def test_carried_states_are_copies_of_the_graphs_outputs():
    """CUDA graphs write each replay's outputs into the same memory: two micro-batches must not share it."""
    trainer = trainer_of(**CARRY)
    step, shared = trainer.losses, {}

    def replay(*arguments):
        loss, parts, states = step(*arguments)
        if not shared:
            shared["states"] = tj.map_states(torch.clone, states)
        for static, new in zip(shared["states"], states):
            for a, b in zip(static, new):
                a.copy_(b)
        return loss, parts, shared["states"]

    expected = trainer_of(**CARRY)
    trainer.losses = replay
    for one in (trainer, expected):
        one.weights.load()
        one.accumulate(0, tj.loss_weights(0.0, one.config))
    for micro in trainer.micros:
        for a, b in zip(trainer.states[micro], expected.states[micro]):
            assert all(map(torch.equal, a, b))


def test_carried_states_leave_the_graph_without_gradients():
    trainer = trainer_of(**CARRY)
    weights = tj.loss_weights(0.0, trainer.config)
    inputs = trainer.step_inputs(0, 0)
    _, _, states = trainer.losses(*inputs, torch.tensor(weights[:4]), trainer.states[0], weights.active)
    assert not any(tensor.requires_grad for state in states for tensor in state)


def test_one_forward_pass_of_the_validation_takes_val_batch_size_over_micro_batches():
    config = tj.Config.from_env({name: str(value) for name, value in
                                 (TINY | dict(VAL_BATCH_SIZE=512, MICRO_BATCHES=4, VAL_MAX_TOKENS=1024)).items()})
    run = tj.Run(config, tj.Runtime(config))
    shapes = []
    run.evaluator.forward = lambda ids, *rest: shapes.append(tuple(ids.shape)) or run.trainer.model(ids, *rest)
    run.evaluator.standard()
    assert set(shapes) == {(512 // 4 // 32, 32)} and "per MICRO_BATCHES forward passes" in \
        tj.Config.knobs()["VAL_BATCH_SIZE"].metadata["help"]


def test_the_carried_scores_temperature_is_chosen_with_carried_states():
    """Two stand-in scores whose best temperatures differ: each pass takes the one of its own kind."""
    class Stub:
        def on(self, tokens):
            return self

        def standard(self, temperatures=(1.0,), label=""):
            return [tj.Score(abs(t - 1.3), 1.0) for t in temperatures]

        def carried(self, temperatures=(1.0,), overlap=None):
            return [tj.Score(abs(t - 0.7), 2.0) for t in temperatures]

    lines = []
    result = tj.final_scores(Stub(), tj.Config(eval_state="carry"), torch.zeros(9), lines.append)
    assert (result["temperature"], result["carried_temperature"]) == (1.3, 0.7)
    assert result["tempered_val_loss"] == 0 and result["carried_val_loss"] == 0 and result["sliding_val_bpb"] is None
    assert [line.split()[0] for line in lines] == ["roundtrip", "tempered", "carried"]
    assert "temperature:0.7 " in lines[-1]


CLOCK = """
reading, caps, spans = [0.0], set(), []
forward, measure = tj.LanguageModel.forward, tj.measure_progress
def counted(self, ids, *a, **k):
    reading[0] += 1e-3 * ids.numel()
    return forward(self, ids, *a, **k)
def noted(step, iterations, elapsed, cap):
    caps.add(cap)
    return measure(step, iterations, elapsed, cap)
def timed(name):
    work = getattr(tj, name)
    def wrapped(*a, **k):
        started = reading[0]
        value = work(*a, **k)
        spans.append(reading[0] - started)
        return value
    setattr(tj, name, wrapped)
tj.LanguageModel.forward, tj.measure_progress, tj.now, tj.CALIBRATION = counted, noted, lambda: reading[0], 4096
train = tj.Run.train
def begin(self):
    spans.clear()
    train(self)
tj.Run.train = begin
timed("input_moments"), timed("search_temperatures")
finish = tj.Run.finish
def end(self):
    result = finish(self)
    print("witness", result["train_seconds"], sum(spans), max(caps), result["data_seconds"], result["steps"])
tj.Run.finish = end
"""


@pytest.mark.parametrize("knobs", [{}, dict(ROUNDING="compensated"), dict(ROUNDING="compensated", EVAL_STATE="carry"),
                                   dict(RESERVE_SECONDS=30, ROUNDING="compensated"), dict(TEMP_SCALING=0)], ids=str)
def test_all_reading_of_training_data_ends_within_the_wall_clock(tmp_path, knobs):
    """On a clock of forward passes: training, GPTQ's moments and the temperature search fit into the cap."""
    knobs = dict(MAX_WALLCLOCK_SECONDS=50, ITERATIONS=1000, TEMP_SCALING=1, ROUNDING_TOKENS=3000) | knobs
    child = harness.run(tmp_path, CLOCK, **knobs)
    assert child.code == 0, child.text()[-2000:]
    words = next(line for line in child.text().splitlines() if line.startswith("witness"))
    trained, later, cap, reported, steps = map(float, words.split()[1:])
    searches = (1 + (knobs.get("EVAL_STATE") == "carry")) * 2 * 4.096 * knobs["TEMP_SCALING"]
    moments = 2.976 * ("ROUNDING" in knobs)                    # 93 sequences of 32
    assert later == pytest.approx(searches + moments) and steps > 50
    reserve = knobs.get("RESERVE_SECONDS", 1.25 * (searches + 3.0 * ("ROUNDING" in knobs)))
    assert cap == pytest.approx(50 - reserve, abs=0.1) and trained <= cap
    assert reported == pytest.approx(trained + later) and reported <= 50
    assert "WITHIN 50 s" in child.text()


def test_a_run_that_fails_in_its_warm_up_says_so_in_its_log(tmp_path):
    child = harness.run(tmp_path, "def full(self):\n    raise tj.torch.OutOfMemoryError\ntj.Trainer.warm_up = full")
    assert child.code == 2 and f"raise MICRO_BATCHES={TINY['MICRO_BATCHES']}" in child.errors()[0]
    last = (tmp_path / "r/log.txt").read_text().splitlines()[-1]
    assert last.startswith("ended: out of GPU memory") and "raise MICRO_BATCHES=" in last


def test_an_unforeseen_error_is_named_in_the_log_and_not_hidden(tmp_path):
    child = harness.run(tmp_path, "def broken(self, progress):\n    raise LookupError('xyz')\n"
                                  "tj.Trainer.train_step = broken")
    assert child.code == 1 and "LookupError: xyz" in child.text()
    assert (tmp_path / "r/log.txt").read_text().splitlines()[-1] == "ended: LookupError: xyz"


def test_a_score_that_is_not_finite_is_saved_as_null_and_restored(tmp_path):
    knobs = dict(ITERATIONS=4, CHECKPOINT_EVERY=2, VAL_LOSS_EVERY=2)
    spoil = ("standard = tj.Evaluator.standard\n"
             "tj.Evaluator.standard = lambda self, *a, **k: [tj.Score(float('nan'), float('nan'))]\n")
    child = harness.run(tmp_path, spoil + "tj.Run.finish = lambda self: None\n", **knobs)
    assert child.code == 0, child.text()
    newest = tj.Checkpoints(tmp_path / "r/checkpoints", 2).paths()[0]
    assert tj.read_tensors(newest, "checkpoint")[0]["score"] == [None, None]
    child = harness.run(tmp_path, "tj.Run.finish = lambda self: print('score', self.score)\n", **knobs)
    assert child.code == 0 and "resumed at step 4" in child.text() and "loss=nan" in child.text()


def test_curves_show_every_kind_of_term(tmp_path):
    lines = [dict(kind="train", step=i, ce=3.0 - i / 9, jepa=0.1, anti=None, cov=0.5) for i in range(1, 9)]
    lines += [dict(kind="validation", step=i, val_bpb=3.0 - i / 9) for i in (0, 4, 8)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    tj.plot_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
