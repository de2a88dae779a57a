"""The ops of a view, one file each; docs/adding_an_augmentation.md shows how to add one."""

from collections.abc import Sequence

from kernels.augment.ops.affine import AFFINE
from kernels.augment.ops.base import Op, PointwiseOp
from kernels.augment.ops.blur import BLUR
from kernels.augment.ops.crop import CROP
from kernels.augment.ops.flip import FLIP
from kernels.augment.ops.grayscale import GRAYSCALE
from kernels.augment.ops.jitter import JITTER
from kernels.augment.ops.solarize import SOLARIZE

# In the order of application. The ops named in OPS are loops of the pixel op, which call the pointwise ops.
BEFORE_BLUR: Sequence[PointwiseOp] = [
    GRAYSCALE,
]
AFTER_BLUR: Sequence[PointwiseOp] = [
    SOLARIZE,
]
OPS: tuple[Op, ...] = (CROP, AFFINE, FLIP, JITTER, *BEFORE_BLUR, BLUR, *AFTER_BLUR)

if len({op.number for op in OPS}) < len(OPS):  # they would be drawn from the same random numbers
    raise ValueError(f"OPS: two ops have one number: {', '.join(f'{op.name} {op.number}' for op in OPS)}")
