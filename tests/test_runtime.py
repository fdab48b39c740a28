"""The process among its peers: device, precision, sums over ranks. Whole runs on several ranks: test_distributed.py."""
import os
import re
import time

import pytest
import torch

import train_jepa as tj
from train_jepa import Config, Runtime, UserError


@pytest.fixture
def precision():
    """Puts the global precision settings back."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture
def fake_gpus(monkeypatch):
    """Two GPUs with bf16, as far as Runtime asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "a fake GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


# -- device and compute type -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("knobs, cuda, dtype", [
    ({}, True, torch.bfloat16), (dict(dtype="fp32"), True, torch.float32), (dict(device="cpu"), False, torch.float32),
    (dict(device="cpu", dtype="bf16"), False, torch.bfloat16), (dict(device="cuda"), True, torch.bfloat16)])
def test_device_and_compute_type_follow_the_knobs(knobs, cuda, dtype, fake_gpus, precision):
    with Runtime(Config(**knobs)) as runtime:
        assert (runtime.cuda, runtime.dtype, runtime.device.type) == (cuda, dtype, "cuda" if cuda else "cpu")


def test_devices_that_are_not_there_are_refused(fake_gpus, precision, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="rank 2 has no GPU, 2 are found"):
        Runtime(Config())
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Runtime(Config()).device == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    with pytest.raises(UserError, match="a fake GPU has no bf16; take DTYPE=fp32"):
        Runtime(Config())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="DEVICE=cuda"):
        Runtime(Config(device="cuda"))


# -- precision ---------------------------------------------------------------------------------------------------------

def test_fp32_products_keep_their_bits_on_cuda(fake_gpus, precision):
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    Runtime(Config())
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


@pytest.mark.cuda
def test_fp32_products_on_the_gpu_are_accurate_to_fp32(precision):
    """TF32 has 10 bits of mantissa: relative errors of 1e-4 and more; fp32 stays near 1e-7."""
    runtime = Runtime(Config())
    generator = torch.Generator().manual_seed(0)
    z, w = (torch.randn(512, 256, generator=generator) for _ in range(2))
    exact = z.double().T @ w.double()
    product = (z.to(runtime.device).T @ w.to(runtime.device)).cpu().double()
    assert float((product - exact).norm() / exact.norm()) < 2e-6
    image, kernel = z.view(1, 8, 128, 128), w[:16, :72].reshape(16, 8, 3, 3)
    exact = torch.conv2d(image.double(), kernel.double())
    product = torch.conv2d(image.to(runtime.device), kernel.to(runtime.device)).cpu().double()
    assert float((product - exact).norm() / exact.norm()) < 2e-6


# -- one rank ----------------------------------------------------------------------------------------------------------

def test_collectives_of_one_rank_give_back_what_they_get(precision):
    with Runtime(Config(device="cpu")) as runtime:
        tensor = torch.arange(6.0).view(3, 2)
        assert runtime.sum_host(tensor) is tensor and runtime.sum_(tensor) is None
        assert runtime.gather(tensor) == (tensor, None)
        assert runtime.agree(1, -2.5) == [1, -2.5] and runtime.collect("x") == ["x"]
        assert runtime.main_first(lambda: 7) == 7
        with pytest.raises(UserError, match="no room"):
            runtime.main_first(lambda: (_ for _ in ()).throw(UserError("no room")))
        facts = runtime.describe()
        assert facts["device_type"] == "cpu" and facts["dtype"] == "float32" and facts["world_size"] == 1


def test_journals_are_cut_back_to_the_lengths_of_the_checkpoint(tmp_path):
    folder = tj.RunFolder(tmp_path / "r", True)
    folder.log("one", console=False)
    folder.metric(step=1)
    sizes = folder.sizes()
    folder.log("two", console=False)
    folder.metric(step=2)
    resumed = tj.RunFolder(tmp_path / "r", True, sizes)
    resumed.log("three", console=False)
    assert (tmp_path / "r/log.txt").read_text() == "one\nthree\n"
    assert (tmp_path / "r/metrics.jsonl").read_text() == '{"step": 1}\n'
    silent = tj.RunFolder(tmp_path / "other", False)
    silent.log("nothing")
    silent.metric(step=1)
    silent.write_json("result.json", {})
    assert silent.sizes() == {} and not (tmp_path / "other").exists()


# -- what a silent process says ----------------------------------------------------------------------------------------

def test_silence_is_broken_by_what_is_being_done_and_only_then(capsys):
    heartbeat = tj.Heartbeat(every=0.1)
    heartbeat.start()
    assert heartbeat.daemon
    time.sleep(0.3)
    assert capsys.readouterr().err == ""  # nothing is being done
    for _ in heartbeat.follow(range(3), "step"):
        time.sleep(0.25)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(re.fullmatch(r"\[\d\d:\d\d:\d\d\] step [012]/3", line) for line in lines)
    assert {line[-3:] for line in lines} == {"0/3", "1/3", "2/3"}
    heartbeat.doing = "much"
    for _ in range(20):  # output as often as every 0.02 s: no line in between
        heartbeat.spoke = time.monotonic() + 10
        time.sleep(0.02)
    assert capsys.readouterr().err == "" and heartbeat.doing == "much"
    heartbeat.doing = ""


def test_items_whose_number_is_told_are_passed_on():
    assert list(tj.progress_bar(range(3), "things")) == [0, 1, 2] and tj.HEARTBEAT.doing == ""
    assert list(tj.progress_bar("ab", "things", show=False)) == ["a", "b"] and not list(tj.progress_bar((), "things"))


def test_a_machine_is_busy_when_more_run_than_it_has_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(tj, "machine_load", lambda: 2.5)
    assert tj.busy_machine() == "" and tj.busy_machine(1) == "a load of 2.5 on 2 cores"
