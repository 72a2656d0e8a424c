"""Starting a patch-stem dVAE as a k-means tokenizer.

After this the encoder's logits are -s |patch - centroid|^2 (up to a constant per patch), the decoder's first layer
holds the centroids, every residual branch adds nothing yet, and hard codes reconstruct exactly what k-means would.
Whatever quality such a model has before training comes from k-means, not from the dVAE's objective.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dalle_scale import log
from dalle_scale.models.dvae import Bottleneck, Decoder, Encoder
from dalle_scale.nn import kmeans
from dalle_scale.nn.likelihoods import PHI_EPS, Gaussian, LogitLaplace, phi

_ITERATIONS = 10
_NEVER = -1e4  # logit of a code without a centroid; those of the others are >= 0 at the chosen code
_ONE_LEVEL = (1 - 2 * PHI_EPS) / 255 / 0.25  # a step of one byte value in logit space, at mid-grey


def codebook(patches: Tensor, vocab: int) -> tuple[Tensor, float]:
    """Centroids of uint8 patches [N, D] in phi space, fp32 [k, D], and the mean absolute error in logit space.

    With no more than `vocab` distinct patches the codebook holds them all, exactly (k is their number, error 0);
    otherwise k = `vocab` and the centroids are those of weighted k-means over the distinct patches.
    """
    distinct, counts = torch.unique(patches, dim=0, return_counts=True)
    points, weights = phi(distinct), counts.float()
    if len(points) <= vocab:
        spare = f"; {vocab - len(points)} codes stay unused" if len(points) < vocab else ""
        log.say(f"k-means: the codebook holds all {len(points)} distinct patches{spare}")
        return points, 0.0
    centroids = kmeans.kmeans(points, weights, vocab, _ITERATIONS, seed=0, progress=log.progress)
    nearest, _ = kmeans.assign(points, centroids)
    errors = (torch.logit(points) - torch.logit(centroids[nearest])).abs().mean(dim=1)
    return centroids, float((errors * weights).sum() / weights.sum())


@torch.no_grad()
def start_from_centroids(
    encoder: Encoder,
    decoder: Decoder,
    centroids: Tensor,
    error: float,
    sharpness: float,
    likelihood: LogitLaplace | Gaussian,
) -> None:
    """Set the weights of both nets, in place.

    The first D channels carry the patch from input to output. The ReLU before each last layer must not cut them: phi
    is positive already, and the decoder adds a shift to its locations that its last bias takes away again. Other
    channels keep their random weights, with no way to the output yet.

    Args:
        encoder: patch stem; every width at least D = 3 downsampling^2.
        decoder: likewise, n_init included.
        centroids: phi space fp32 [k, D], k <= vocab; codes from k on are never chosen.
        error: mean absolute error of the codebook in logit space: sets ln b.
        sharpness: nats by which a patch that equals its centroid prefers it to the nearest other one, on average.
        likelihood: what the decoder's maps mean.
    """
    size, depth = centroids.shape
    eye = torch.eye(depth)
    for module in [*encoder.trunk, *decoder.trunk]:
        if isinstance(module, Bottleneck):
            last = module.branch[-1]
            assert isinstance(last, nn.Conv2d)
            nn.init.zeros_(last.weight)
            if isinstance(module.skip, nn.Conv2d):
                _pass_through(module.skip, eye)
    _pass_through(encoder.input, eye)

    scale = sharpness / _neighbour_distance(centroids)
    encoder.output.weight.zero_()
    encoder.output.bias.fill_(_NEVER)
    # -s |x - c|^2 + s |x - 1/2|^2: the second term is the same for all codes and keeps the numbers small, so that
    # fp32 tells apart patches that differ by one byte value
    encoder.output.weight[:size, :depth] = 2 * scale * (centroids - 0.5)
    encoder.output.bias[:size] = -scale * (centroids.square() - 0.25).sum(dim=1)

    locations = likelihood.location(centroids)
    bound = float(likelihood.location(torch.tensor([PHI_EPS, 1 - PHI_EPS])).abs().max())
    shift = 2 * bound
    decoder.input.weight[:, :depth] = shift
    decoder.input.weight[:size, :depth] = shift + locations
    nn.init.zeros_(decoder.output.weight)
    bias = decoder.output.bias
    assert bias is not None
    decoder.output.weight[:depth, :depth, 0, 0] = eye
    bias[:depth] = -shift
    bias[depth:] = math.log(max(error, _ONE_LEVEL))  # ln b, where the likelihood has one


def _pass_through(layer: nn.Conv2d, eye: Tensor) -> None:
    """Make the first D outputs of a 1x1 convolution equal its first D inputs."""
    depth = len(eye)
    layer.weight[:depth] = 0
    layer.weight[:depth, :depth, 0, 0] = eye


def _neighbour_distance(centroids: Tensor) -> float:
    """Mean squared distance from a centroid to the nearest other one; 1 for a single centroid."""
    if len(centroids) == 1:
        return 1.0
    nearest = []
    for start in range(0, len(centroids), 1024):
        rows = torch.cdist(centroids[start : start + 1024], centroids)
        rows[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = math.inf
        nearest.append(rows.amin(dim=1))
    return float(torch.cat(nearest).square().mean())
