"""What `fastssl eval` evaluates by default: what takes little time next to the training.

The choice depends on sizes and on the training's time in the run's metrics, not on a clock: every evaluation of a run,
with the same settings and number of threads, makes the same one.
"""

import itertools
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastssl.config import Config
from fastssl.evaluation.config import ProtocolName
from fastssl.evaluation.cost import LEAST_LIMIT_S, Job, Sizes, within
from fastssl.evaluation.images import Part
from fastssl.evaluation.protocols import PROTOCOLS
from fastssl.models.backbones import build_backbone, without_pretraining
from fastssl.plan.epochs import describe_time
from fastssl.processes.launch import num_threads_of
from pipelines.views import build_eval_spec

RAW_PIXELS, UNTRAINED = "raw pixels", "untrained encoder"
MAX_RAW_BYTES = 4 << 30  # raw pixels are held in memory, as fp32
_PASSES_PER_IMAGE = 6  # of a training step: two views or more, forward and backward
_UNKNOWN_IMAGE_S = 1e-3  # of a small encoder, where the run has no record of its training


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is evaluated.

    Attributes:
        protocols: Protocols by the name of the encoder.
        record: What the choice was made from, for eval.jsonl; JSON values.
        duration: A line that says how long it takes; None: it is short.
        left_out: A line about what is left out; None: nothing is.
    """

    protocols: dict[str, list[ProtocolName]]
    record: dict[str, Any]
    duration: str | None
    left_out: str | None


def plan_evaluation(
    cfg: Config,
    encoders: Sequence[str],
    train: Part,
    test: Part,
    device: torch.device,
    *,
    image_px: int,
    trained: tuple[float, int] | None,
    is_asked_for: bool,
) -> Plan:
    """Choose what fits into eval.time_fraction of the training's time, the trained encoders first.

    Where the protocols are named, and without a record of the training, the trained encoders are evaluated by all
    protocols, and only the baselines have to fit; with eval.baselines=true they are evaluated whatever they take. On a
    GPU, the trained encoders are evaluated by all protocols that compute there; the others have to fit.

    Args:
        cfg: The run's configuration.
        encoders: Names of the trained encoders, the most important one first.
        train: Training part.
        test: Test part.
        device: Where features are computed.
        image_px: Side of the images that the encoders were trained on.
        trained: Seconds and images of the training, as `training_time` finds them.
        is_asked_for: Whether the protocols were named on the command line.
    """
    limit_s = None
    if cfg.eval.time_fraction:
        limit_s = max(LEAST_LIMIT_S, cfg.eval.time_fraction * (trained[0] if trained else 0.0))
    image_s = trained[0] / trained[1] / _PASSES_PER_IMAGE if trained else _UNKNOWN_IMAGE_S
    is_cpu, eval_px = device.type == "cpu", build_eval_spec(cfg.views).size_px
    readers = {id(part.reader): part.reader for part in (train, test)}
    num_encoded = sum(reader.num_samples for reader in readers.values())

    def jobs_of(encoder: str, num_features: int, *, is_asked_for: bool, is_trained: bool = False) -> list[Job]:
        sizes = Sizes(
            num_train=len(train.ids),
            num_test=len(test.ids),
            num_features=num_features,
            num_classes=int(max(train.labels.max(), test.labels.max())) + 1,
            image_s=image_s,
            num_cores=num_threads_of(cfg.run) if is_cpu else 0,
        )
        is_too_large = encoder == RAW_PIXELS and 4 * num_features * num_encoded > MAX_RAW_BYTES
        return [
            Job(
                encoder=encoder,
                protocol=name,
                cost_s=PROTOCOLS[name].cost_s(cfg.eval, sizes),
                encode_s=math.inf if is_too_large and not is_asked_for else num_encoded * image_s,
                is_asked_for=is_asked_for or (is_trained and not is_cpu and not PROTOCOLS[name].is_on_host),
            )
            for name in cfg.eval.what
            if encoder != RAW_PIXELS or not PROTOCOLS[name].needs_images
        ]

    _, num_features = build_backbone(without_pretraining(cfg.model), image_px)
    jobs: list[Job] = []
    for encoder in encoders:
        jobs += jobs_of(encoder, num_features, is_asked_for=is_asked_for or trained is None, is_trained=True)
    if cfg.eval.baselines is not False:
        is_wanted = cfg.eval.baselines is True
        untrained = jobs_of(UNTRAINED, num_features, is_asked_for=is_wanted)
        raw = jobs_of(RAW_PIXELS, 3 * eval_px**2, is_asked_for=is_wanted)
        jobs += [job for pair in itertools.zip_longest(untrained, raw) for job in pair if job]
    kept, left_out, expected_s = within(jobs, limit_s)
    protocols: dict[str, list[ProtocolName]] = {}
    for job in kept:
        protocols.setdefault(job.encoder, []).append(job.protocol)
    record = {
        "training_s": round(trained[0], 1) if trained else None,
        "limit_s": limit_s and round(limit_s, 1),
        "expected_s": round(expected_s, 1),
        "left_out": [[job.encoder, job.protocol] for job in left_out],
    }
    duration = f"the evaluation takes about {describe_time(expected_s)}" if expected_s > LEAST_LIMIT_S else None
    return Plan(protocols=protocols, record=record, duration=duration, left_out=_left_out(left_out, protocols, limit_s))


def _left_out(jobs: Sequence[Job], encoded: Container[str], limit_s: float | None) -> str | None:
    """A line about these jobs; the features of the encoders in `encoded` are computed anyway."""
    if not jobs:
        return None
    each = []
    for encoder, group in itertools.groupby(sorted(jobs, key=lambda job: job.encoder), key=lambda job: job.encoder):
        found = list(group)
        total_s = sum(job.cost_s for job in found) + (0.0 if encoder in encoded else found[0].encode_s)
        takes = f"about {describe_time(total_s)}" if math.isfinite(total_s) else "more memory than it is worth"
        each.append(f"{encoder} by {', '.join(job.protocol for job in found)} ({takes})")
    if limit_s is None:
        return f"left out: {'; '.join(each)}. All of it: --set eval.baselines=true"
    return (
        f"left out, for an evaluation within {describe_time(limit_s)} (eval.time_fraction of the training's time): "
        f"{'; '.join(each)}. All of it: --set eval.time_fraction=0 eval.baselines=true"
    )
