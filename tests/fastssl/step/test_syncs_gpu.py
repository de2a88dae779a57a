"""On a GPU no step waits for the device, plain or captured, and both report the same.

Steps are run and their reports read as the trainer does it, under CUDA's own detection of such waits.
"""

import itertools
from contextlib import contextmanager, nullcontext

import pytest
import torch

from fastssl.step.cuda_graph import NUM_PLAIN_STEPS, CapturedStep
from fastssl.step.late_reports import LateReports
from tests.helpers.tiny_step import OPTIMIZERS, batch_of, build, rates_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:.*[Ss]ynchronization debug mode:UserWarning"),
]

DEVICE = torch.device("cuda")
FIRST_CHECKED = NUM_PLAIN_STEPS + 1  # the step before is captured, which waits; kernels are compiled by then
NUM_STEPS = FIRST_CHECKED + 2
SKIPPED = FIRST_CHECKED


@contextmanager
def waits_are_errors():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def reports_of(*, captured, optimizer, **settings):
    """Whether each step was taken, its loss and the norm of its gradient; one of the checked steps is skipped."""
    steps, *_ = build(optimizer=optimizer, device=DEVICE, **settings)
    batches = [batch_of(step, step == SKIPPED, DEVICE) for step in range(NUM_STEPS)]
    reports, found = LateReports(DEVICE), []
    with torch.cuda.stream(torch.cuda.current_stream()):  # gives back the stream that a captured step replaces
        taker = CapturedStep(steps, DEVICE) if captured else steps
        for step, batch in enumerate(batches):
            with waits_are_errors() if step >= FIRST_CHECKED else nullcontext():
                reports.add(
                    taker.run(batch, **rates_of(step, optimizer)),
                    step=step + 1,
                    wants_stop=False,
                    wants_save=False,
                    is_searching=False,
                    sample_ids=batch.sample_ids,
                    settings={},
                )
                found += reports.read(keep=1)
        found += reports.read(keep=0)
        torch.cuda.synchronize()
    assert [report.step for report in found] == list(range(1, NUM_STEPS + 1))
    assert [report.taken for report in found] == [step != SKIPPED for step in range(NUM_STEPS)]
    return torch.tensor([[report.loss, report.grad_norm] for report in found])


def test_a_wait_is_an_error_here():
    """Or the tests below would pass whatever the step does."""
    x = torch.ones(1, device=DEVICE)
    with pytest.raises(RuntimeError, match="synchronizing"), waits_are_errors():
        x.item()


@pytest.mark.parametrize(("loss", "optimizer"), itertools.product(("mio", "minc", "byol"), OPTIMIZERS))
def test_no_step_waits_and_the_captured_one_reports_what_the_plain_one_does(loss, optimizer):
    settings = {"loss": loss, "optimizer": optimizer}
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        plain = reports_of(captured=False, **settings)
        captured = reports_of(captured=True, **settings)
    torch.testing.assert_close(captured, plain, rtol=1e-3, atol=1e-5, equal_nan=True)
    assert len(plain[:, 0].unique()) >= NUM_STEPS - 1  # nothing stands still


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(("loss", "optimizer"), [("mio", "sgd"), ("minc", "lars"), ("byol", "adamw")])
def test_no_step_waits_in_bf16_with_clipping(loss, optimizer, captured):
    found = reports_of(captured=captured, loss=loss, optimizer=optimizer, precision="bf16", clip=0.5)
    assert found[[step != SKIPPED for step in range(NUM_STEPS)]].isfinite().all()
