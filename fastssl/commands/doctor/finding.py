"""What a check is told, and what it says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from fastssl.config import Config

Status = Literal["ok", "warn", "fail", "not here"]


class Finding(NamedTuple):
    """The outcome of one check.

    Attributes:
        status: "not here" is what this machine does not have and this run does not demand.
        detail: What was found.
        advice: What to do; empty where all is well.
        check: Its name.
    """

    status: Status
    detail: str
    advice: str = ""
    check: str = ""

    def line(self) -> str:
        """For people."""
        return f"{self.status:8}  {self.check:10}  {self.detail}" + (f" -> {self.advice}" if self.advice else "")

    def as_dict(self) -> dict[str, str]:
        """For programs."""
        return {"check": self.check, "status": self.status, "detail": self.detail, "advice": self.advice}


@dataclass(frozen=True)
class Node:
    """What is asked of this machine."""

    cfg: Config | None = None
    data: Path | None = None

    @property
    def wants_gpu(self) -> bool:
        """Whether the run demands one."""
        return self.cfg is not None and self.cfg.run.device == "cuda"

    @property
    def num_gpus(self) -> int:
        """Those that torch can use."""
        import torch

        from fastssl.machine.nvidia_gpu import has_gpu

        return torch.cuda.device_count() if has_gpu() else 0

    def without_gpu(self, what: str) -> Finding:
        """The finding of a check that needs a GPU where there is none."""
        if self.wants_gpu:
            return Finding("fail", f"{what}: torch finds no GPU", "run.device is cuda: see the check gpu")
        return Finding("not here", f"{what}: torch finds no GPU")
