"""Diffusion noise on images, the disturbed view that VCD contrasts with (arXiv 2311.16922).

Works on what the image processor returns (normalised pixels), in fp32, one draw per image.
"""

import hashlib

import torch
from torch import Tensor

NUM_STEPS = 1000


def noise_scales(step: int) -> tuple[Tensor, Tensor]:
    """Return the factors (of the image, of the noise) after `step` of the diffusion, 0..999.

    They are sqrt(abar) and sqrt(1 - abar). The betas rise along a sigmoid from 1e-5 to 5e-3, as in
    the official code (the paper's text says a constant rate); even step 999 keeps 0.285 of the
    image. Fp32 throughout, so that the factors are the official ones to the bit.
    """
    betas = torch.sigmoid(torch.linspace(-6, 6, NUM_STEPS)) * (5e-3 - 1e-5) + 1e-5
    abar = torch.cumprod(1 - betas, dim=0)[step]
    return abar.sqrt(), (1 - abar).sqrt()


def add_noise(pixel_values: Tensor, step: int, seed: int) -> Tensor:
    """Return noised `pixel_values` [I, C, H, W], of the same shape, dtype and device.

    The draw of an image depends on `seed` and on its own pixels, on nothing else: neither its place
    in the batch nor its company changes it, so that a batch decodes as its rows do alone. It is
    made on the CPU, where every machine draws the same numbers.
    """
    images = pixel_values.detach().to("cpu", torch.float32)
    keep, spread = noise_scales(step)
    noised = torch.empty_like(images)
    for image, target in zip(images, noised, strict=True):
        torch.add(keep * image, spread * _draw(image, seed), out=target)
    return noised.to(pixel_values)


def _draw(image: Tensor, seed: int) -> Tensor:
    """Standard normal numbers in the shape of `image` (CPU), fixed by `seed` and its pixels."""
    digest = hashlib.sha256(f"{seed}:".encode() + image.contiguous().numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(image.shape, generator=generator)
