"""Reports what the machine supports: devices, precision, kernels, decoders, cores, disk."""

from __future__ import annotations

import io
import platform
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchcodec.decoders import decode_image

from vitral.engines import profile
from vitral.machine import available_cores, num_gpus, peak_flops, pick_device, processor

KERNELS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


def examine() -> str:
    """Returns the report as plain text."""
    packages = ("vitral", "torch", "torchvision", "torchcodec", "safetensors", "numpy", "pillow")
    lines = [
        f"python      {platform.python_version()} on {platform.platform()}",
        "packages    " + ", ".join(f"{name} {version(name)}" for name in packages),
        f"processor   {processor()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"cores: {available_cores()}, threads in torch: {torch.get_num_threads()}",
    ]
    device = pick_device("auto")
    others = ["GPU         none that torch can use"]
    if device.type != "cpu":
        others = [f"GPU         {device.type}: float32 with PyTorch's built-in kernels"]
    lines += _gpu() if device.type == "cuda" else others
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        lines.append(f"attention   {name} on {device.type}: {', '.join(_kernels(device, dtype))}")
    lines.append(f"decoders    {', '.join(_decoders())}")
    lines += [_disk("runs", Path.cwd()), *_shared_memory(), *_profile()]
    return "\n".join(lines)


def _gpu() -> list[str]:
    lines = []
    for index in range(num_gpus()):
        gpu = torch.cuda.get_device_properties(index)
        lines.append(f"GPU {index}       {gpu.name}, {gpu.total_memory / 1e9:.0f} GB")
    bf16 = "yes" if torch.cuda.is_bf16_supported() else "no: training runs in float32"
    peak = peak_flops()
    rate = f"{peak / 1e12:.0f} TFLOP/s" if peak else "unknown, so MFU is not shown"
    return [*lines, f"bf16        {bf16}", f"peak rate   {rate}"]


def _kernels(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Returns the supported attention kernels; with grouped queries in bf16 on CUDA."""
    q = torch.zeros(1, 6, 197, 64, device=device, dtype=dtype)
    grouped = device.type == "cuda" and dtype == torch.bfloat16
    k = q[:, :2] if grouped else q
    supported = []
    for kernel in KERNELS:
        try:
            with warnings.catch_warnings(action="ignore"), sdpa_kernel(kernel):
                F.scaled_dot_product_attention(q, k, k, enable_gqa=grouped)
        except RuntimeError:
            continue
        supported.append(kernel.name.lower().removesuffix("_attention"))
    return supported


def _decoders() -> list[str]:
    """Returns the common image formats, and whether torchcodec can decode them."""
    supported = []
    picture = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    for name in ("JPEG", "PNG", "WEBP", "AVIF"):
        content = io.BytesIO()
        try:
            picture.save(content, name)
            decode_image(content.getvalue())
        except Exception as error:  # missing codecs raise various errors
            supported.append(f"{name} with Pillow only ({type(error).__name__})")
        else:
            supported.append(name)
    return supported


def _disk(name: str, path: Path) -> str:
    usage = shutil.disk_usage(path)
    return f"disk        {usage.free / 1e9:,.0f} GB free for {name} in {path}"


def _profile() -> list[str]:
    """Returns the measurements of the machine profile."""
    if not profile.is_enabled():
        return ["profile     off, because of VITRAL_PROFILE"]
    found = profile.measurements() or ["empty; the first training run or prediction fills it"]
    return [f"profile     {line}" for line in found]


def _shared_memory() -> list[str]:
    """Workers pass batches through shared memory; containers often have only 64 MB."""
    path = Path("/dev/shm")
    if not path.exists():
        return []
    free = shutil.disk_usage(path).free / 1e9
    hint = "" if free > 1 else "; too little for workers: run docker with --ipc=host"
    return [f"shared mem  {free:,.1f} GB free{hint}"]
