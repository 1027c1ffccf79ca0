"""What `mmalign doctor` finds out: what is installed, and what works here when it is tried.

Kernels and codecs are tried in a child process, because a mismatched binary can end its process
instead of raising. `python -m mmalign.doctor NAME...` is that child.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from packaging.requirements import Requirement

TIMEOUT_SECONDS = 180
MARK = "doctor: "  # before a finding, among whatever else a library prints

# What goes without a package that an extra installs; every package comes from mmalign's metadata.
COSTS = {
    "av": "no clips, unless decord is there",
    "bitsandbytes": "no optim.optimizer=adamw_8bit, no model.quantization",
    "decord": "no clips by backend=decord",
    "deepspeed": "no ZeRO-2 and ZeRO-3",
    "diffusers": "no diffusion models",
    "lmms-eval": "no `mmalign eval lmms`, unless --python names an environment that has it",
    "math-verify": "no rewards or checks by verifier=math",
    "num2words": "no SmolVLM2",
    "openai": "no generators or judges behind a server",
    "ray": "no builds or evals by engine=ray",
    "tensorboard": "no run.trackers=[tensorboard]",
    "torchcodec": "clips are decoded by PyAV",
    "trl": "no comparison with TRL's losses",
    "wandb": "no run.trackers=[wandb]",
    "xformers": "no model.attention=xformers",
}


@dataclass(frozen=True, kw_only=True)
class Package:
    """One distribution: what is wanted, what is there, and what its absence costs."""

    name: str
    wanted: str
    found: str | None
    required: bool
    cost: str
    install: str

    @property
    def good(self) -> bool:
        """True when it is installed in a version that mmalign works with."""
        return self.found is not None and Requirement(f"x{self.wanted}").specifier.contains(
            self.found, prereleases=True
        )


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was tried here."""

    name: str
    works: bool
    detail: str
    required: bool


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Everything the doctor found."""

    python: str
    platform: str
    packages: tuple[Package, ...]
    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """False when something that mmalign cannot do without is missing or broken."""
        return all(p.good for p in self.packages if p.required) and all(
            c.works for c in self.checks if c.required
        )

    def as_json(self) -> str:
        """For programs."""
        packages = [asdict(package) | {"good": package.good} for package in self.packages]
        data = asdict(self) | {"packages": packages, "healthy": self.healthy}
        return json.dumps(data, indent=2)

    def as_text(self) -> str:
        """For people: versions, what works, then what is missing and the line that installs it."""
        lines = [f"python {self.python} on {self.platform}", "", "Packages"]
        lines += [f"  {p.name:25} {p.found}" for p in self.packages if p.found]
        lines += ["", "Tried here"]
        lines += [f"  {c.name:25} {'yes' if c.works else 'no '}  {c.detail}" for c in self.checks]
        lacking = [package for package in self.packages if not package.good]
        if lacking:
            lines += ["", "Missing"]
        for package in lacking:
            what = package.name
            if package.found:
                what += f" {package.found} is not {package.wanted}"
            need = "required" if package.required else package.cost
            lines += [f"  {what}: {need}", f"      {package.install}"]
        verdict = (
            "Ready." if self.healthy else "Something required is missing or broken: see above."
        )
        return "\n".join([*lines, "", verdict])


def examine(checks: Sequence[str] | None = None) -> Diagnosis:
    """Look at every package and try every check, or only those named."""
    return Diagnosis(
        python=platform.python_version(),
        platform=platform.platform(terse=True),
        packages=packages(),
        checks=tuple(try_checks(list(CHECKS) if checks is None else checks)),
    )


def packages(
    declared: Sequence[str] | None = None, installed: Callable[[str], str] = version
) -> tuple[Package, ...]:
    """What mmalign declares, required first; development tools only where they cost something."""
    if declared is None:
        try:
            declared = requires("mmalign") or ()
        except PackageNotFoundError:
            declared = ("mmalign",)
    found: dict[str, Package] = {}
    for text in declared:
        requirement = Requirement(text)
        if requirement.name in found:
            continue
        extra = _extra(requirement)
        if extra == "dev" and requirement.name not in COSTS:
            continue
        try:
            here = installed(requirement.name)
        except PackageNotFoundError:
            here = None
        found[requirement.name] = Package(
            name=requirement.name,
            wanted=str(requirement.specifier),
            found=here,
            required=extra is None,
            cost=COSTS.get(requirement.name, ""),
            install=f"pip install 'mmalign[{extra}]'" if extra else "pip install mmalign",
        )
    return tuple(sorted(found.values(), key=lambda package: not package.required))


def try_checks(names: Sequence[str], timeout_seconds: float = TIMEOUT_SECONDS) -> list[Check]:
    """Try checks in a child process; when one ends it, go on with the next in a new child."""
    results: list[Check] = []
    while len(results) < len(names):
        command = [sys.executable, "-m", "mmalign.doctor", *names[len(results) :]]
        try:
            child = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout_seconds, check=False
            )
            printed, ending = child.stdout, f"ended its process (exit code {child.returncode})"
        except subprocess.TimeoutExpired as error:
            printed = (error.stdout or b"").decode(errors="replace")
            ending = f"did not finish in {timeout_seconds:.0f} s"
        for line in printed.splitlines():
            if line.startswith(MARK):
                results.append(Check(**json.loads(line.removeprefix(MARK))))
        if len(results) < len(names):
            results.append(_check(names[len(results)], works=False, detail=ending))
    return results


def attempt(name: str) -> Check:
    """Try one check in this process."""
    try:
        return _check(name, works=True, detail=CHECKS[name]())
    except Exception as error:
        # Whatever a foreign kernel raises is the finding.
        return _check(name, works=False, detail=_shorten(str(error) or type(error).__name__))


def _torch() -> str:
    import torch

    device = _device()
    torch.ones(4, 4, device=device).matmul(torch.ones(4, 4, device=device))
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return f"{torch.__version__}, {cuda}, {', '.join(names) or 'no GPU seen'}"


def _torchvision() -> str:
    import torch
    import torchvision

    # The first thing to fail when torch and torchvision are no pair.
    torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    return f"{torchvision.__version__}, its kernels load"


def _eager() -> str:
    import torch

    query, key, value = _heads()
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1, torch.float32)
    (weights.to(value.dtype) @ value).sum().backward()
    return f"forward and backward on {query.device.type}"


def _sdpa() -> str:
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value = _heads()
    scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()
    return f"forward and backward on {query.device.type}"


def _packed(name: str) -> str:
    """Attention over packed rows, as training would try it."""
    import torch

    from mmalign.attention.choose import Heads, trial

    device = _device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    reason = trial(name, device, dtype, Heads(8, 2, 64))
    if reason is not None:
        raise RuntimeError(reason)
    return f"packed rows on {device}, {str(dtype).removeprefix('torch.')}, equal to sdpa"


def _backbone(name: str) -> str:
    """Attention of a diffusion backbone, as training would try it, at the head width of SDXL."""
    import torch

    from mmalign.diffusion.attention import trial

    device = _device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    reason = trial(name, device, dtype, 64)
    if reason is not None:
        raise RuntimeError(reason)
    return f"diffusion backbones on {device}, {str(dtype).removeprefix('torch.')}, equal to sdpa"


def _adam_8bit() -> str:
    import torch
    from bitsandbytes.optim import AdamW8bit

    # Smaller tensors are kept in 32 bits.
    weight = torch.nn.Parameter(torch.ones(64, 128, device=_device()))
    optimizer = AdamW8bit([weight], lr=1e-3)
    weight.sum().backward()
    optimizer.step()
    if optimizer.state[weight]["state1"].dtype != torch.uint8:
        raise RuntimeError("its state is not in 8 bits")
    return f"one step on {_device()}"


def _four_bits() -> str:
    from mmalign.models.quantization import try_here

    return try_here()


def _clips(backend: Literal["torchcodec", "pyav", "decord"]) -> str:
    from mmalign.clips import FrameSampling, open_clip
    from mmalign.decoders import why_not
    from mmalign.records import Media

    reason = why_not(backend)
    if reason is not None:
        raise RuntimeError(f"{backend} {reason}")
    with TemporaryDirectory() as folder:
        media, sampling = Media(path=_clip(folder).name), FrameSampling(num_frames=8)
        clip = open_clip(media, Path(folder), sampling, backend=backend)
    return f"decodes {len(set(clip.indices))} frames of a clip"


CHECKS: dict[str, Callable[[], str]] = {
    "torch": _torch,
    "torchvision": _torchvision,
    "attention: eager": _eager,
    "attention: sdpa": _sdpa,
    "attention: flash": partial(_packed, "flash"),
    "attention: flex": partial(_packed, "flex"),
    "attention: xformers": partial(_packed, "xformers"),
    "backbone: flash": partial(_backbone, "flash"),
    "backbone: xformers": partial(_backbone, "xformers"),
    "8-bit Adam": _adam_8bit,
    "4-bit weights": _four_bits,
    "clips: torchcodec": partial(_clips, "torchcodec"),
    "clips: av": partial(_clips, "pyav"),
    "clips: decord": partial(_clips, "decord"),
}
REQUIRED_CHECKS = ("torch", "torchvision", "attention: eager", "attention: sdpa")


def _check(name: str, *, works: bool, detail: str) -> Check:
    return Check(name=name, works=works, detail=detail, required=name in REQUIRED_CHECKS)


def _shorten(text: str, limit: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]}…"


def _extra(requirement: Requirement) -> str | None:
    """The extra that a requirement belongs to: `extra == "video"` is video."""
    marker = str(requirement.marker or "")
    return marker.partition("extra == ")[2].strip('"') or None


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _heads() -> list[Any]:
    """Query, key and value [1, 2, 64, 32], in the precision that a device trains in."""
    import torch

    dtype = torch.bfloat16 if _device() == "cuda" else torch.float32
    shape = (1, 2, 64, 32)
    return [torch.ones(shape, device=_device(), dtype=dtype, requires_grad=True) for _ in range(3)]


def _clip(folder: str) -> Path:
    """Write a clip of eight frames, with PyAV."""
    import numpy as np

    try:
        import av
    except ImportError:
        raise RuntimeError("imports; PyAV, which makes a clip to try it on, is missing") from None
    path = Path(folder) / "clip.mp4"
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        for brightness in range(0, 256, 32):
            picture = np.full((64, 64, 3), brightness, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"{MARK}{json.dumps(asdict(attempt(argument)))}", flush=True)
