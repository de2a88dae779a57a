"""Input and output of a check."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from fastssl.config import Config

Status = Literal["ok", "warn", "fail", "skipped"]


class Finding(NamedTuple):
    """The outcome of one check.

    Attributes:
        status: "skipped" means that this machine does not have it and this run does not need it.
        detail: What was found.
        advice: What to do; empty if all is well.
        check: Name of the check.
    """

    status: Status
    detail: str
    advice: str = ""
    check: str = ""

    def line(self) -> str:
        """Human-readable line."""
        return f"{self.status:8}  {self.check:10}  {self.detail}" + (f" -> {self.advice}" if self.advice else "")

    def as_dict(self) -> dict[str, str]:
        """Machine-readable form."""
        return {"check": self.check, "status": self.status, "detail": self.detail, "advice": self.advice}


@dataclass(frozen=True)
class Node:
    """The requirements on this machine."""

    cfg: Config | None = None
    data: str | Path | None = None

    @property
    def wants_gpu(self) -> bool:
        """Whether the run requires a GPU."""
        return self.cfg is not None and self.cfg.run.device == "cuda"

    @property
    def num_gpus(self) -> int:
        """Number of GPUs that torch can use."""
        import torch

        from fastssl.machine.nvidia_gpu import has_gpu

        return torch.cuda.device_count() if has_gpu() else 0

    def without_gpu(self, what: str) -> Finding:
        """The finding of a check that needs a GPU, if there is none."""
        if self.wants_gpu:
            return Finding("fail", f"{what}: torch finds no GPU", "run.device is cuda: see the check named gpu")
        return Finding("skipped", f"{what}: torch finds no GPU")
