"""All buffers as parts of one tensor a dtype."""

import torch
from torch import nn

from fastssl.step.train_step import FlatBuffers

ALIGNMENT_BYTES = 256


def test_buffers_begin_where_an_allocation_could():
    """cuDNN reads batch norm's statistics in vectors: an odd number of elements before them is a misaligned address."""
    module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(5))
    module.register_buffer("odd", torch.ones(1))
    module[0].running_mean.fill_(2.0)
    values = {name: buffer.clone() for name, buffer in module.named_buffers()}
    flat = FlatBuffers(module)
    starts = {name: x.storage_offset() * x.element_size() for name, x in module.named_buffers()}
    assert {start % ALIGNMENT_BYTES for start in starts.values()} == {0}
    of_floats = [start for name, start in starts.items() if not name.endswith("num_batches_tracked")]
    assert len(set(of_floats)) == len(of_floats)
    assert all(torch.equal(x, values[name]) for name, x in module.named_buffers())

    flat.keep()
    for buffer in module.buffers():
        buffer.add_(1)
    flat.put_back_unless(torch.tensor(False))
    assert all(torch.equal(x, values[name]) for name, x in module.named_buffers())
