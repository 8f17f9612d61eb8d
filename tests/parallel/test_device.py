"""The CPU backend: what megatron-core asks of CUDA is answered for the CPU."""

import threading

import torch

from megatron_sage.parallel import backend, device, install_cpu_backend


def test_backend_belongs_to_the_device() -> None:
    assert (device().type, backend()) in (("cpu", "gloo"), ("cuda", "nccl"))


def test_cuda_literals_end_on_this_machines_device() -> None:
    """In any thread: Megatron's optimizer and checkpoints create tensors so."""
    results = []

    def create() -> None:
        results.extend(
            [
                torch.zeros(2, device="cuda"),
                torch.tensor([1.0], device=torch.device("cuda")),
                torch.empty_like(torch.ones(2), device="cuda:0"),
                torch.ones(2).cuda(),
                torch.ones(1, device=torch.cuda.current_device()),
            ]
        )

    thread = threading.Thread(target=create)
    thread.start()
    thread.join()
    assert len(results) == 5
    assert {tensor.device.type for tensor in results} == {device().type}
    assert results[1].cuda().type() == "torch.cuda.FloatTensor"


def test_torch_device_contexts_still_work() -> None:
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"
    assert torch.zeros(2, device="meta").device.type == "meta"


def test_installing_twice_wraps_once() -> None:
    before = torch.zeros
    install_cpu_backend()
    assert torch.zeros is before


def test_type_still_converts() -> None:
    assert torch.ones(2).type(torch.float64).dtype is torch.float64
    assert torch.ones(2).type("torch.DoubleTensor").dtype is torch.float64


def test_random_state_and_streams() -> None:
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3, device=device())
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3, device=device()), first)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
